//! The one pass over a head whose logits are never whole.
//!
//! The vocabulary comes in chunks, the tokens too. As in online softmax (Milakov & Gimelshein, 2018) a running
//! maximum and sums are kept and rescaled when the maximum grows: [`ops::cross_entropy`] has the formulas. Tokens
//! without a target stay out of the pass. The head rows of all targets are kept, because their factors are known only
//! after the last chunk.

use super::{LogProbs, Targets, targets::OnDevice};
use crate::ops::{
    self, Buffer,
    cross_entropy::{self, Sums, TargetRows},
    linear,
};
use tch::{Device, Kind, Tensor};

/// Rows of the head that a CPU takes at a time: the logits of some thousand tokens then stay in its caches.
pub const HOST_ROWS: i64 = 2048;

/// The running sums of one pass over the head.
pub struct HeadPass<'a> {
    targets: &'a Targets,
    /// Hidden states of the tokens that have a target: `[valid, hidden]`, compute dtype.
    x: Tensor,
    chunk_tokens: i64,
    sums: Sums,
    /// `None` when no gradient is wanted.
    gradient: Option<Gradient>,
}

/// Parts of the gradient.
struct Gradient {
    /// a `[valid, hidden]`, once there is a row of the head: in compute dtype after the first ones, then fp32.
    a: Option<Buffer>,
    /// w_t `[entries, hidden]`, compute dtype.
    w_t: Buffer,
}

impl<'a> HeadPass<'a> {
    /// Starts a pass for x `[tokens, hidden]`. Logits exist for at most `chunk_tokens` tokens at a time.
    pub fn new(x: &Tensor, targets: &'a Targets, chunk_tokens: usize, wants_gradient: bool) -> Self {
        let OnDevice { index, distinct, entries, .. } = &targets.on_device;
        let x = x.index_select(0, index);
        let sums = Sums::new(distinct.size()[0], distinct.size()[1], x.kind(), x.device());
        let w_t = || Buffer::empty(&[entries.size()[0], x.size()[1]], x.kind(), x.device());
        let gradient = wants_gradient.then(|| Gradient { a: None, w_t: w_t() });
        Self { targets, x, chunk_tokens: chunk_tokens.max(1) as i64, sums, gradient }
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
        let entries = &self.targets.on_device.entries;
        let count = entries.size()[0];
        for start in (0..count).step_by(self.chunk_tokens as usize) {
            let part = |t: &Tensor| t.narrow(0, start, self.chunk_tokens.min(count - start));
            let local = part(entries) - first as i64;
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
            let local = part(&self.targets.on_device.distinct) - first as i64;
            let logits = logits.narrow(0, 0, n);
            linear::product_to(&logits, &part(&self.x), weight);
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

    /// The log-probabilities, once every row of the head has come.
    pub fn log_probs(&self) -> LogProbs<'a> {
        let _span = crate::trace::operation("cross_entropy.log_probs");
        let OnDevice { index, column, .. } = &self.targets.on_device;
        let here = column.ge(0);
        let values = self.sums.log_probabilities().gather(1, &column.clamp_min(0), false);
        let values = values.where_scalarother(&here, 0.0);
        let all = |kind| {
            Tensor::zeros([self.targets.tokens() as i64, self.targets.k() as i64], (kind, values.device()))
        };
        LogProbs {
            values: all(values.kind()).index_copy(0, index, &values),
            present: all(Kind::Bool).index_copy(0, index, &here),
            sequences: self.targets.sequences(),
        }
    }

    /// ∂L/∂x `[tokens, hidden]` in x's dtype, from the coefficients ∂L/∂log p `[tokens, K]`; zero where a token has
    /// no target. `None` when no gradient was wanted.
    pub fn backward(self, coefficients: &Tensor) -> Option<Buffer> {
        let _span = crate::trace::operation("cross_entropy.finish");
        let Self { targets, x, sums, gradient, .. } = self;
        let Gradient { a, w_t } = gradient?;
        let mut d_x = Buffer::empty(&[targets.tokens() as i64, x.size()[1]], x.kind(), x.device());
        let _ = d_x.zero_();
        if let Some(a) = a {
            let OnDevice { index, offsets, .. } = &targets.on_device;
            let rows = TargetRows { weight: &w_t, offsets };
            sums.gradient(&a, rows, &of_distinct(targets, coefficients, &sums.target_logits));
            let _ = d_x.index_copy_(0, index, &a.to_kind(x.kind()));
        }
        Some(d_x)
    }
}

/// Coefficients by distinct target, shaped `like` `[valid, width]`: of a target that a token has several times, their
/// sum.
fn of_distinct(targets: &Targets, coefficients: &Tensor, like: &Tensor) -> Tensor {
    let OnDevice { index, column, .. } = &targets.on_device;
    let coefficients = coefficients.to_kind(like.kind()).index_select(0, index);
    let coefficients = coefficients.where_scalarother(&column.ge(0), 0.0);
    let (place, mut sums) = (column.clamp_min(0), like.zeros_like());
    for k in 0..targets.k() as i64 {
        // One target of a token at a time, so the order of additions is fixed.
        let _ = sums.scatter_add_(1, &place.narrow(1, k, 1), &coefficients.narrow(1, k, 1));
    }
    sums
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
