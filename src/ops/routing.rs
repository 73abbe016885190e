//! The router of a mixture of experts: top-k experts of each token and their weights (Shazeer et al., 2017), with the
//! softmax over all experts, as in Mixtral and Qwen.
//!
//! forward   p = softmax(x·Wᵀ) in fp32,  (w, e) = the k largest of p,  divided by their sum if normalised
//! backward  dl = q ∘ (dw at e − Σ dw ∘ w),  dx += dl·W,  with q = p, or w at e and 0 elsewhere if normalised
//!
//! W `[experts, hidden]` is frozen.

use super::{
    accum_kind, batch_invariant,
    cpu::{Element, Real, Rows, dispatch, each_row},
    linear::product,
};
use tch::{Kind, Tensor};

/// Experts and weights of each token.
pub struct Routing {
    /// `[tokens, k]` i64
    pub experts: Tensor,
    /// `[tokens, k]` fp32, or fp64 for fp64 inputs (tests)
    pub weights: Tensor,
    /// `[tokens, experts]`, of the kind of the weights
    pub probabilities: Tensor,
}

/// Choice of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopK {
    pub k: i64,
    /// Divide the weights of a token by their sum.
    pub normalise: bool,
}

/// Routing of x `[tokens, hidden]`. `chosen` `[tokens, k]` replays the experts of an earlier forward, so that a
/// recompute has the same ones whatever the rounding.
pub fn forward(x: &Tensor, weight: &Tensor, choice: TopK, chosen: Option<&Tensor>) -> Routing {
    let _span = crate::trace::operation("routing.forward");
    let probabilities = product(x, weight).softmax(-1, accum_kind(x.kind()));
    let (weights, experts) = match chosen {
        Some(experts) => (probabilities.gather(1, experts, false), experts.shallow_clone()),
        None => probabilities.topk(choice.k, -1, true, true),
    };
    let weights =
        if choice.normalise { &weights / weights.sum_dim_intlist(-1, true, None::<Kind>) } else { weights };
    Routing { experts, weights, probabilities }
}

/// σ(x·gᵀ) `[tokens, 1]`, of the kind of a routing's weights, from x `[tokens, hidden]` and a gate g `[1, hidden]`.
pub fn gate(x: &Tensor, gate: &Tensor) -> Tensor {
    let logits = product(x, gate).to_kind(accum_kind(x.kind()));
    if !batch_invariant::is_on(x) {
        return logits.sigmoid();
    }
    // libtorch's sigmoid has other bits at the end of a vector of tokens than in it.
    dispatch!(logits.kind(), E => each_row::<E, _, _, _>(
        [],
        [Rows::of(&logits)],
        [],
        #[inline(always)]
        |_, [], [logit], []| logit[0] = E::narrow(logit[0].to_accum().sigmoid()),
    ));
    logits
}

/// Backward of [`forward`]: adds the gradient of x to `d_x` `[tokens, hidden]`, from that of the weights `[tokens, k]`.
pub fn backward(d_weights: &Tensor, routing: &Routing, weight: &Tensor, choice: TopK, d_x: &Tensor) {
    let _span = crate::trace::operation("routing.backward");
    let Routing { experts, weights, probabilities } = routing;
    let spread = |values: &Tensor| probabilities.zeros_like().scatter(1, experts, values);
    let mean = (d_weights * weights).sum_dim_intlist(-1, true, None::<Kind>);
    let chosen = if choice.normalise { spread(weights) } else { probabilities.shallow_clone() };
    let d_logits = chosen * (spread(d_weights) - mean);
    let _ = d_x.shallow_clone().addmm_(&d_logits.to_kind(weight.kind()), weight);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    #[test]
    fn matches_autograd() {
        for (tokens, experts, k) in [(0, 4, 2), (1, 1, 1), (7, 5, 3), (6, 4, 4)] {
            for normalise in [false, true] {
                let choice = TopK { k, normalise };
                let (x, weight) = (leaf(&[tokens, 6]), leaf(&[experts, 6]).detach());
                let (largest, chosen) =
                    x.matmul(&weight.tr()).softmax(-1, Kind::Double).topk(k, -1, true, true);
                let expected = if normalise {
                    &largest / largest.sum_dim_intlist(-1, true, None::<Kind>)
                } else {
                    largest
                };
                let d_weights = leaf(&[tokens, k]).detach();
                let d_expected = autograd(&expected, &d_weights, &[&x]).remove(0);

                let _guard = tch::no_grad_guard();
                let x = x.detach();
                let routing = forward(&x, &weight, choice, None);
                assert_eq!(routing.experts, chosen);
                assert!(distance(&routing.weights, &expected) < 1e-14);
                let d_x = x.ones_like();
                backward(&d_weights, &routing, &weight, choice, &d_x);
                assert!(distance(&(d_x - 1.0), &d_expected) < 1e-13);

                let other = (&chosen + 1).remainder(experts);
                let again = forward(&x, &weight, choice, Some(&other));
                assert_eq!(again.experts, other, "what was chosen before is what counts");
            }
        }
    }
}
