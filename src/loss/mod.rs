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

use crate::ops::{
    self, Buffer,
    cross_entropy::{self, Sums},
};
use tch::{Device, Tensor};

/// Rows of the head that a CPU takes at a time: the logits of some thousand tokens then stay in its caches.
pub const HOST_ROWS: i64 = 2048;

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
    sums: Sums,
    /// `None` when no gradient is wanted.
    gradient: Option<Gradient>,
}

/// What the gradient is made of.
struct Gradient {
    /// a `[valid, hidden]`, once there is a row of the head: in compute dtype after the first ones, then fp32.
    a: Option<Buffer>,
    /// w_t `[valid, hidden]`, compute dtype.
    w_t: Buffer,
}

/// What a pass over the head gives.
pub struct TokenLosses {
    /// Σ ℓ over the tokens that carry loss.
    pub sum: f64,
    /// How many they are.
    pub tokens: usize,
    /// d(scale·Σ ℓ)/dx `[tokens, hidden]` in x's dtype, zero where there is no loss.
    pub d_x: Option<Buffer>,
}

impl LinearCrossEntropy {
    /// Starts a pass for x `[tokens, hidden]` and targets `[tokens]` i64, negative where there is no loss.
    /// Logits exist for at most `chunk_tokens` tokens at a time.
    pub fn new(x: &Tensor, targets: &Tensor, chunk_tokens: usize, wants_gradient: bool) -> Self {
        let index = targets.ge(0).nonzero().view([-1]);
        let shape = x.size();
        let (x, targets) = (x.index_select(0, &index), targets.index_select(0, &index));
        let sums = Sums::new(targets.size()[0], x.kind(), x.device());
        let gradient = wants_gradient.then(|| Gradient { a: None, w_t: Buffer::like(&x) });
        Self { x, targets, index, shape, chunk_tokens: chunk_tokens.max(1) as i64, sums, gradient }
    }

    /// Takes in head rows `first..` of `weight` `[rows, hidden]`. Every row of the head comes exactly once.
    pub fn add_rows(&mut self, weight: &Tensor, first: usize) {
        let _span = crate::trace::operation("cross_entropy.add_rows");
        let rows = weight.size()[0];
        let block = if weight.device() == Device::Cpu { HOST_ROWS } else { rows.max(1) };
        for start in (0..rows).step_by(block as usize) {
            self.add_block(&weight.narrow(0, start, block.min(rows - start)), first + start as usize);
        }
        let Some(Gradient { w_t, .. }) = &self.gradient else { return };
        let valid = self.x.size()[0];
        for start in (0..valid).step_by(self.chunk_tokens as usize) {
            let part = |t: &Tensor| t.narrow(0, start, self.chunk_tokens.min(valid - start));
            let local = part(&self.targets) - first as i64;
            // No list of those that are here: a device would have to tell the host how long it is.
            let here = local.ge(0).logical_and(&local.lt(rows)).unsqueeze(1);
            let chosen = weight.index_select(0, &local.clamp(0, rows - 1));
            part(w_t).copy_(&chosen.where_self(&here, &part(w_t)));
        }
    }

    fn add_block(&mut self, weight: &Tensor, first: usize) {
        let (valid, hidden) = (self.x.size()[0], self.x.size()[1]);
        let rows = weight.size()[0];
        let (kind, device) = (self.x.kind(), self.x.device());
        let most = self.chunk_tokens.min(valid);
        let logits = Buffer::empty(&[most, rows], kind, device);
        // The first product is a already: it is kept whole, the others are added to it.
        let before = self.gradient.as_mut().and_then(|gradient| gradient.a.take()).map(widened);
        let kept = if before.is_some() { most } else { valid };
        let product = self.gradient.as_ref().map(|_| Buffer::empty(&[kept, hidden], kind, device));
        for start in (0..valid).step_by(self.chunk_tokens as usize) {
            let n = most.min(valid - start);
            let part = |t: &Tensor| t.narrow(0, start, n);
            let local = part(&self.targets) - first as i64;
            let logits = logits.narrow(0, 0, n);
            let _ = part(&self.x).mm_out(&logits, &weight.tr());
            let rescale = self.sums.narrow(start, n).exponentials(&logits, &local);
            let Some(product) = &product else { continue };
            let product = if before.is_some() { product.narrow(0, 0, n) } else { part(product) };
            let _ = logits.mm_out(&product, weight);
            if let Some(a) = &before {
                cross_entropy::accumulate(&part(a), &rescale, &product);
            }
        }
        if let Some(gradient) = &mut self.gradient {
            gradient.a = before.or(product);
        }
    }

    /// The losses, and the gradient times `scale` (1 ÷ valid tokens of the whole step).
    pub fn finish(self, scale: f64) -> TokenLosses {
        let _span = crate::trace::operation("cross_entropy.finish");
        let Self { x, index, shape, sums, gradient, .. } = self;
        let d_x = gradient.map(|Gradient { a, w_t }| {
            let mut d_x = Buffer::empty(&shape, x.kind(), x.device());
            let _ = d_x.zero_();
            if let Some(a) = a {
                sums.gradient(&a, &w_t, scale);
                let _ = d_x.index_copy_(0, &index, &a.to_kind(x.kind()));
            }
            d_x
        });
        TokenLosses { sum: sums.losses(), tokens: x.size()[0] as usize, d_x }
    }
}

/// `a` in the kind in which products are summed.
fn widened(a: Buffer) -> Buffer {
    let wide = ops::accum_kind(a.kind());
    if a.kind() == wide {
        return a;
    }
    let mut sum = Buffer::empty(&a.size(), wide, a.device());
    sum.copy_(&a);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};
    use tch::Kind;

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
        // The second is more than a CPU takes at a time.
        for vocabulary in [11, 2 * HOST_ROWS + 3] {
            matches_autograd_for(vocabulary);
        }
    }

    fn matches_autograd_for(vocabulary: i64) {
        let (x, weight) = (leaf(&[7, 5]), leaf(&[vocabulary, 5]).detach());
        let last = vocabulary - 1;
        let targets = Tensor::from_slice(&[3i64, -100, 0, last, last, -100, 4]);
        let valid = targets.ge(0).nonzero().view([-1]);
        let logits = x.matmul(&weight.tr()).index_select(0, &valid);
        let losses = -logits
            .log_softmax(-1, Kind::Double)
            .gather(1, &targets.index_select(0, &valid).unsqueeze(1), false)
            .sum(Kind::Double);
        let expected = autograd(&losses, &Tensor::from(0.25f64), &[&x]);
        let _guard = tch::no_grad_guard();
        for chunks in [(1, vocabulary / 11), (2, vocabulary / 3 + 1), (100, vocabulary), (3, vocabulary - 1)]
        {
            let result = pass(&x.detach(), &weight, &targets, chunks);
            assert!((result.sum - losses.double_value(&[])).abs() < 1e-12, "{chunks:?}");
            assert_eq!(result.tokens, 5);
            let d_x = result.d_x.expect("asked for");
            assert!(distance(&d_x, &expected[0]) < 1e-13, "{chunks:?}: {}", distance(&d_x, &expected[0]));
        }
    }

    #[test]
    fn narrow_kinds_follow_fp64_for_every_chunking() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            let rounded = |shape: &[i64]| leaf(shape).detach().to_kind(kind);
            let (x, weight) = (rounded(&[9, 16]), rounded(&[301, 16]));
            let targets = Tensor::from_slice(&[3i64, -100, 0, 300, 7, -100, 4, 150, 149]);
            let exact = pass(&x.to_kind(Kind::Double), &weight.to_kind(Kind::Double), &targets, (100, 301));
            let d_exact = exact.d_x.expect("asked for");
            for chunks in [(1, 150), (4, 301), (100, 301), (3, 100)] {
                let ours = pass(&x, &weight, &targets, chunks);
                let d_x = ours.d_x.expect("asked for");
                assert_eq!((d_x.kind(), ours.tokens), (kind, 7));
                let off = (ours.sum / exact.sum - 1.0).abs().max(distance(&d_x, &d_exact));
                assert!(off < tolerance, "{kind:?} {chunks:?}: {off}");
            }
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
