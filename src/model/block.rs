//! A decoder layer: forward, backward, and what it saves between the two.
//!
//! u = x + O(attention(rope(qkv(norm(x))))),  y = u + down(swiglu(gate_up(norm(u))))
//!
//! Saved: the inputs of the two norms, q|k|v as attention saw them, its output and row sums, gate|up, and the thin
//! LoRA activations. The normalised inputs and the SwiGLU output are computed again. Nothing saved refers to a slot.

use super::layer::{LayerAdapters, LayerWeights, Linear};
use crate::ops::{
    Buffer,
    attention::{self, Documents, Heads},
    linear, norm, rope, swiglu,
};
use tch::Tensor;

/// What all layers need to know of a flat batch.
pub struct BatchContext {
    pub documents: Documents,
    /// cos and sin of each token's position: `[tokens, 1, head_dim / 2]` fp32.
    pub cos: Tensor,
    pub sin: Tensor,
}

/// What the arithmetic of a layer depends on besides its weights.
#[derive(Clone, Copy, Debug)]
pub struct BlockSpec {
    pub heads: Heads,
    pub eps: f64,
}

/// What backward needs of forward.
pub struct Saved {
    x: Tensor,
    r_input: Tensor,
    /// q and k before their norm, with its statistics (Qwen3).
    qk: Option<[(Tensor, Tensor); 2]>,
    /// After norm and rotation.
    qkv: Tensor,
    attention: Buffer,
    lse: Tensor,
    /// x plus the attention block's output.
    middle: Tensor,
    r_middle: Tensor,
    gate_up: Tensor,
    h: [Option<Tensor>; 4],
}

impl BlockSpec {
    fn qkv_width(&self) -> i64 {
        (self.heads.query + 2 * self.heads.key_value) * self.heads.dim
    }

    /// q and k of `qkv`, each `[tokens, heads, dim]`.
    fn query_key(&self, qkv: &Tensor) -> [Tensor; 2] {
        let all = qkv.view([qkv.size()[0], self.heads.query + 2 * self.heads.key_value, self.heads.dim]);
        [all.narrow(1, 0, self.heads.query), all.narrow(1, self.heads.query, self.heads.key_value)]
    }

    /// q|k|v `[tokens, (query + 2·key_value)·dim]` with norm and rotation applied, in place.
    pub fn prepare_qkv(
        &self,
        qkv: &Tensor,
        weights: &LayerWeights,
        cos: &Tensor,
        sin: &Tensor,
    ) -> Option<[(Tensor, Tensor); 2]> {
        let [query, key] = self.query_key(qkv);
        let normalise = |x: &Tensor, weight: &Tensor| {
            let before = x.contiguous().copy();
            let r = norm::forward_into(&before, weight, self.eps, x);
            (before, r)
        };
        let saved = weights.qk_norm.as_ref().map(|[q, k]| [normalise(&query, q), normalise(&key, k)]);
        rope::forward(qkv, self.heads.query + self.heads.key_value, cos, sin);
        saved
    }

    /// y `[tokens, hidden]` of x `[tokens, hidden]`, and what backward needs. `attend` gives the attention's output
    /// and row sums of q|k|v: over the documents of the batch, or over a cache when one is continued.
    pub fn forward(
        &self,
        x: &Tensor,
        weights: &LayerWeights,
        adapters: &LayerAdapters,
        batch: &BatchContext,
        attend: impl FnOnce(&Tensor, Heads) -> (Buffer, Tensor),
    ) -> (Tensor, Saved) {
        let linear = |linear: Linear, x: &Tensor, width: i64| {
            let out = Tensor::empty([x.size()[0], width], (x.kind(), x.device()));
            let h = linear::forward(x, weights.bases(linear), adapters.adapter(linear), &out);
            (out, h)
        };
        let hidden = x.size()[1];
        let (normed, r_input) = norm::forward(x, &weights.input_norm, self.eps);
        let (qkv, h_qkv) = linear(Linear::Qkv, &normed, self.qkv_width());
        let qk = self.prepare_qkv(&qkv, weights, &batch.cos, &batch.sin);
        let (attention, lse) = attend(&qkv, self.heads);
        let (mut middle, h_o) = linear(Linear::O, &attention, hidden);
        let _ = middle.g_add_(x);

        let (normed, r_middle) = norm::forward(&middle, &weights.post_attention_norm, self.eps);
        let width = weights.bases(Linear::GateUp).iter().map(|base| base.weight.size()[0]).sum();
        let (gate_up, h_gate_up) = linear(Linear::GateUp, &normed, width);
        let (mut y, h_down) = linear(Linear::Down, &swiglu::forward(&gate_up), hidden);
        let _ = y.g_add_(&middle);
        let h = [h_qkv, h_o, h_gate_up, h_down];
        let x = x.shallow_clone();
        (y, Saved { x, r_input, qk, qkv, attention, lse, middle, r_middle, gate_up, h })
    }

    /// dx from dy `[tokens, hidden]`; adds the adapters' gradients. What was saved is used up.
    pub fn backward(
        &self,
        d_y: &Tensor,
        saved: &Saved,
        weights: &LayerWeights,
        adapters: &LayerAdapters,
        batch: &BatchContext,
    ) -> Buffer {
        let linear = |linear: Linear, d_y: &Tensor, x: &Tensor| {
            let h = saved.h[linear as usize].as_ref();
            linear::backward(d_y, x, h, weights.bases(linear), adapters.with_gradient(linear))
        };
        let d_activated = linear(Linear::Down, d_y, &swiglu::forward(&saved.gate_up));
        let (d_gate_up, _) = swiglu::backward(d_activated.into(), saved.gate_up.shallow_clone().into());
        let normed = norm::recompute(&saved.middle, &weights.post_attention_norm, &saved.r_middle);
        let d_normed = linear(Linear::GateUp, &d_gate_up, &normed);
        let (weight, r) = (&weights.post_attention_norm, &saved.r_middle);
        let d_middle = norm::backward(d_normed.into(), &saved.middle, weight, r, Some(d_y));

        let d_attention = linear(Linear::O, &d_middle, &saved.attention);
        let d_qkv = attention::backward(
            &d_attention,
            &saved.qkv,
            &saved.attention,
            &saved.lse,
            self.heads,
            &batch.documents,
        );
        rope::backward(&d_qkv, self.heads.query + self.heads.key_value, &batch.cos, &batch.sin);
        if let (Some(norms), Some(saved)) = (&weights.qk_norm, &saved.qk) {
            for ((d, weight), (before, r)) in self.query_key(&d_qkv).iter().zip(norms).zip(saved) {
                norm::backward_into(d, before, weight, r);
            }
        }
        let normed = norm::recompute(&saved.x, &weights.input_norm, &saved.r_input);
        let d_normed = linear(Linear::Qkv, &d_qkv, &normed);
        norm::backward(d_normed.into(), &saved.x, &weights.input_norm, &saved.r_input, Some(&d_middle))
    }
}
