//! The causal language-model loss over a head whose logits are never whole.
//!
//! For hidden states x `[tokens, hidden]`, head rows w_v and targets t, with l_v = x·w_v:
//!
//! loss      ℓ = log Σ_v exp(l_v) − l_t
//! gradient  dx = Σ_{v≠t} p_v·w_v − (1 − p_t)·w_t
//!
//! The vocabulary comes in chunks, the tokens too. As in online softmax (Milakov & Gimelshein, 2018) a running
//! maximum m, s = Σ_{v≠t} exp(l_v − m) and a = Σ_{v≠t} exp(l_v − m)·w_v are kept and rescaled when m grows, so
//! one pass over the head gives both the loss and the hidden gradient. The target is left out of s and a, so a
//! confident token (p_t near 1) loses no digits to cancellation.

use tch::{Kind, Tensor};

/// The running sums of one pass over the head.
pub struct LinearCrossEntropy {
    /// Hidden states of the tokens that carry loss: `[valid, hidden]`, compute dtype.
    x: Tensor,
    /// Their targets: `[valid]` i64.
    targets: Tensor,
    /// Which of all tokens they are: `[valid]` i64.
    index: Tensor,
    /// Shape of all hidden states.
    shape: Vec<i64>,
    chunk_tokens: i64,
    maximum: Tensor,
    sum: Tensor,
    target_logit: Tensor,
    /// a and w_t, each `[valid, hidden]`; `None` when no gradient is wanted.
    gradient: Option<[Tensor; 2]>,
}

/// What a pass over the head gives.
pub struct TokenLosses {
    /// Σ ℓ over the tokens that carry loss.
    pub sum: f64,
    /// How many they are.
    pub tokens: usize,
    /// d(scale·Σ ℓ)/dx `[tokens, hidden]` in x's dtype, zero where there is no loss.
    pub d_x: Option<Tensor>,
}

impl LinearCrossEntropy {
    /// Starts a pass for x `[tokens, hidden]` and targets `[tokens]` i64, negative where there is no loss.
    /// Logits exist for at most `chunk_tokens` tokens at a time.
    pub fn new(x: &Tensor, targets: &Tensor, chunk_tokens: usize, wants_gradient: bool) -> Self {
        let _span = crate::trace::operation("cross_entropy.new");
        let index = targets.ge(0).nonzero().view([-1]);
        let shape = x.size();
        let (x, targets) = (x.index_select(0, &index), targets.index_select(0, &index));
        let wide = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let column = |value: f64| Tensor::full([targets.size()[0], 1], value, (wide, x.device()));
        let gradient = wants_gradient.then(|| [x.zeros_like().to_kind(wide), x.zeros_like()]);
        let (maximum, sum, target_logit) = (column(f64::NEG_INFINITY), column(0.0), column(0.0));
        let chunk_tokens = chunk_tokens.max(1) as i64;
        Self { x, targets, index, shape, chunk_tokens, maximum, sum, target_logit, gradient }
    }

    /// Takes in head rows `first..` of `weight` `[rows, hidden]`. Every row of the head comes exactly once.
    pub fn add_rows(&mut self, weight: &Tensor, first: usize) {
        let _span = crate::trace::operation("cross_entropy.add_rows");
        let valid = self.targets.size()[0];
        let rows = weight.size()[0];
        let mut start = 0;
        while start < valid {
            let n = self.chunk_tokens.min(valid - start);
            let part = |t: &Tensor| t.narrow(0, start, n);
            let x = part(&self.x);
            let (mut m, mut s) = (part(&self.maximum), part(&self.sum));
            let local = part(&self.targets) - first as i64;
            let here = local.ge(0).logical_and(&local.lt(rows)).nonzero().view([-1]);
            let target = local.index_select(0, &here);

            let mut logits = x.mm(&weight.tr()).to_kind(m.kind());
            let new_maximum = m.maximum(&logits.amax([1i64], true));
            let at_target = [Some(here.shallow_clone()), Some(target.shallow_clone())];
            let chosen = logits.index(&at_target).unsqueeze(1);
            let _ = part(&self.target_logit).index_copy_(0, &here, &chosen);
            let _ = logits.g_sub_(&new_maximum).exp_();
            let zeros = chosen.zeros_like().squeeze_dim(1);
            let _ = logits.index_put_(&at_target, &zeros, false);
            let rescale = (&m - &new_maximum).exp();
            let _ = s.g_mul_(&rescale).g_add_(&logits.sum_dim_intlist(1, true, None));
            m.copy_(&new_maximum);
            if let Some([a, w_t]) = &self.gradient {
                let (mut a, mut w_t) = (part(a), part(w_t));
                let product = logits.to_kind(x.kind()).mm(weight);
                let _ = a.g_mul_(&rescale).g_add_(&product);
                let _ = w_t.index_copy_(0, &here, &weight.index_select(0, &target));
            }
            start += n;
        }
    }

    /// The losses, and the gradient times `scale` (1 ÷ valid tokens of the whole step).
    pub fn finish(self, scale: f64) -> TokenLosses {
        let _span = crate::trace::operation("cross_entropy.finish");
        // ℓ = log(1 + s·exp(m − l_t)) = softplus(log s + m − l_t): exact for confident and for lost tokens.
        let losses = (self.sum.log() + &self.maximum - &self.target_logit).softplus();
        let d_x = self.gradient.map(|[a, w_t]| {
            let target = (&self.target_logit - &self.maximum).exp();
            let total = &self.sum + target;
            let other = &self.sum / &total;
            let d_valid = (a / total - w_t * other) * scale;
            let mut d_x = Tensor::zeros(&self.shape[..], (self.x.kind(), self.x.device()));
            let _ = d_x.index_copy_(0, &self.index, &d_valid.to_kind(self.x.kind()));
            d_x
        });
        let tokens = losses.numel();
        TokenLosses { sum: losses.sum(Kind::Double).double_value(&[]), tokens, d_x }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    fn pass(x: &Tensor, weight: &Tensor, targets: &Tensor, chunks: (usize, i64)) -> TokenLosses {
        let mut pass = LinearCrossEntropy::new(x, targets, chunks.0, true);
        let rows = weight.size()[0];
        for first in (0..rows).step_by(chunks.1 as usize) {
            pass.add_rows(&weight.narrow(0, first, chunks.1.min(rows - first)), first as usize);
        }
        pass.finish(0.25)
    }

    #[test]
    fn matches_autograd_for_every_chunking() {
        let (x, weight) = (leaf(&[7, 5]), leaf(&[11, 5]).detach());
        let targets = Tensor::from_slice(&[3i64, -100, 0, 10, 10, -100, 4]);
        let valid = targets.ge(0).nonzero().view([-1]);
        let logits = x.matmul(&weight.tr()).index_select(0, &valid);
        let losses = -logits
            .log_softmax(-1, Kind::Double)
            .gather(1, &targets.index_select(0, &valid).unsqueeze(1), false)
            .sum(Kind::Double);
        let expected = autograd(&losses, &Tensor::from(0.25f64), &[&x]);
        let _guard = tch::no_grad_guard();
        for chunks in [(1, 1), (2, 4), (100, 11), (3, 10)] {
            let result = pass(&x.detach(), &weight, &targets, chunks);
            assert!((result.sum - losses.double_value(&[])).abs() < 1e-12, "{chunks:?}");
            assert_eq!(result.tokens, 5);
            let d_x = result.d_x.expect("asked for");
            assert!(distance(&d_x, &expected[0]) < 1e-13, "{chunks:?}: {}", distance(&d_x, &expected[0]));
        }
    }

    #[test]
    fn confident_and_lost_tokens_keep_their_digits() {
        let weight = Tensor::from_slice(&[40.0f32, -40.0]).view([2, 1]);
        let x = Tensor::from_slice(&[1.0f32, 1.0]).view([2, 1]);
        let result = pass(&x, &weight, &Tensor::from_slice(&[0i64, 1]), (8, 2));
        assert!((result.sum - 80.0).abs() < 1e-4, "{}", result.sum);
        let d_x: Vec<f32> = result.d_x.expect("asked for").view([-1]).try_into().expect("floats");
        // d = 0.25·(1 − p_t)·(w_other − w_t)
        assert!((f64::from(d_x[0]) / (-0.25 * 80.0 * (-80.0f64).exp()) - 1.0).abs() < 1e-3, "{}", d_x[0]);
        assert!((f64::from(d_x[1]) - 20.0).abs() < 1e-4, "{}", d_x[1]);
    }

    #[test]
    fn no_valid_token_is_no_loss() {
        let result = pass(
            &leaf(&[3, 4]).detach(),
            &leaf(&[6, 4]).detach(),
            &Tensor::full([3], -100, (Kind::Int64, tch::Device::Cpu)),
            (2, 3),
        );
        assert_eq!((result.sum, result.tokens), (0.0, 0));
        assert_eq!(result.d_x.expect("asked for").abs().sum(Kind::Double).double_value(&[]), 0.0);
    }
}
