//! A decoder layer: forward, backward, and what it saves between the two.
//!
//! u = x + O(attention(rope(qkv(norm(x))))),  y = u + down(swiglu(gate_up(norm(u))))
//!
//! Saved: r of both norms, q|k|v as attention saw them, its output and row sums, u, gate|up, and the thin LoRA
//! activations; the caller keeps x. What of it is not kept is computed again, see
//! [`CheckpointingMethod`](crate::config::CheckpointingMethod). The normalised inputs and the SwiGLU output are always
//! computed again. Nothing saved refers to a slot. Backward gives up each saved tensor with its last use.

use super::layer::{LayerAdapters, LayerWeights, Linear};
use crate::ops::{
    Buffer,
    attention::{self, Documents, Heads},
    linear::{self, ThinGradient},
    norm, rope, swiglu,
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

/// What backward needs of the attention block.
pub struct AttentionSaved {
    r_input: Tensor,
    qk: Option<UnnormedQk>,
    /// After norm and rotation.
    qkv: Buffer,
    out: Buffer,
    lse: Tensor,
    /// u: x plus the block's output.
    middle: Buffer,
    h_qkv: Option<Buffer>,
    h_o: Option<Buffer>,
}

/// q|k before their norm `[tokens, (query + key_value)·dim]`, with the statistics of each (Qwen3).
struct UnnormedQk {
    qk: Buffer,
    r: [Tensor; 2],
}

/// What backward needs of the MLP.
pub struct MlpSaved {
    r_middle: Tensor,
    gate_up: Buffer,
    h_gate_up: Option<Buffer>,
    h_down: Option<Buffer>,
}

/// A layer with all that it computes with.
pub struct Block<'a> {
    pub spec: BlockSpec,
    pub weights: LayerWeights,
    pub adapters: LayerAdapters,
    pub batch: &'a BatchContext,
}

impl Block<'_> {
    /// The attention block of x `[tokens, hidden]`. `attend` gives the attention's output and row sums of q|k|v: over
    /// the documents of the batch, or over a cache when one is continued.
    pub fn attention(
        &self,
        x: &Tensor,
        attend: impl FnOnce(&Tensor, Heads) -> (Buffer, Tensor),
    ) -> AttentionSaved {
        let (normed, r_input) = norm::forward(x, &self.weights.input_norm, self.spec.eps);
        let (qkv, h_qkv) = self.linear(Linear::Qkv, &normed, None);
        drop(normed);
        let qk = self.weights.qk_norm.as_ref().map(|weights| self.normalise_qk(&qkv, weights));
        rope::forward(&qkv, self.rotated_heads(), &self.batch.cos, &self.batch.sin);
        let (out, lse) = attend(&qkv, self.spec.heads);
        let (middle, h_o) = self.linear(Linear::O, &out, Some(x));
        AttentionSaved { r_input, qk, qkv, out, lse, middle, h_qkv, h_o }
    }

    /// The MLP up to its last matrix, and SwiGLU's output that goes into that.
    pub fn mlp(&self, attention: &AttentionSaved) -> (MlpSaved, Buffer) {
        let (normed, r_middle) =
            norm::forward(&attention.middle, &self.weights.post_attention_norm, self.spec.eps);
        let (gate_up, h_gate_up) = self.linear(Linear::GateUp, &normed, None);
        drop(normed);
        let activated = swiglu::forward(&gate_up);
        (MlpSaved { r_middle, gate_up, h_gate_up, h_down: None }, activated)
    }

    /// y `[tokens, hidden]`: the MLP's last matrix and the residual.
    pub fn output(&self, attention: &AttentionSaved, mlp: &mut MlpSaved, activated: &Tensor) -> Buffer {
        let (y, h_down) = self.linear(Linear::Down, activated, Some(&attention.middle));
        mlp.h_down = h_down;
        y
    }

    /// The MLP as far as backward needs it.
    pub fn mlp_again(&self, attention: &AttentionSaved) -> MlpSaved {
        let (mut mlp, activated) = self.mlp(attention);
        mlp.h_down = self.adapters.adapter(Linear::Down).map(|adapter| linear::thin(&activated, adapter));
        mlp
    }

    /// dx from dy `[tokens, hidden]` and x; adds the adapters' gradients.
    pub fn backward(&self, d_y: Buffer, x: &Tensor, attention: AttentionSaved, mlp: MlpSaved) -> Buffer {
        let MlpSaved { r_middle, gate_up, h_gate_up, h_down } = mlp;
        let (d_activated, g) = self.backward_input(Linear::Down, &d_y);
        let (d_gate_up, activated) = swiglu::backward(d_activated, gate_up);
        self.backward_parameters(Linear::Down, &d_y, &activated, h_down, &g);
        drop(activated);

        let AttentionSaved { r_input, qk, qkv, out, lse, middle, h_qkv, h_o } = attention;
        let d_middle = {
            let weight = &self.weights.post_attention_norm;
            let (d_normed, g) = self.backward_input(Linear::GateUp, &d_gate_up);
            let normed = norm::recompute(&middle, weight, &r_middle);
            self.backward_parameters(Linear::GateUp, &d_gate_up, &normed, h_gate_up, &g);
            norm::backward(d_normed, &middle, weight, &r_middle, Some(&d_y))
        };
        drop((d_y, d_gate_up, middle));

        let (d_out, g) = self.backward_input(Linear::O, &d_middle);
        self.backward_parameters(Linear::O, &d_middle, &out, h_o, &g);
        let d_qkv = attention::backward(&d_out, &qkv, &out, &lse, self.spec.heads, &self.batch.documents);
        drop((d_out, out, qkv));
        rope::backward(&d_qkv, self.rotated_heads(), &self.batch.cos, &self.batch.sin);
        if let (Some(weights), Some(UnnormedQk { qk, r })) = (&self.weights.qk_norm, qk) {
            let both = self.spec.query_key(&d_qkv).into_iter().zip(self.spec.query_key(&qk));
            for (((d, x), weight), r) in both.zip(weights).zip(&r) {
                norm::backward_into(&d, &x, weight, r);
            }
        }
        let weight = &self.weights.input_norm;
        let (d_normed, g) = self.backward_input(Linear::Qkv, &d_qkv);
        let normed = norm::recompute(x, weight, &r_input);
        self.backward_parameters(Linear::Qkv, &d_qkv, &normed, h_qkv, &g);
        norm::backward(d_normed, x, weight, &r_input, Some(&d_middle))
    }

    /// A linear layer's output `[tokens, its width]` plus `add`, and its thin LoRA activations.
    fn linear(&self, linear: Linear, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let bases = self.weights.bases(linear);
        let width = bases.iter().map(|base| base.weight.size()[0]).sum();
        let out = Buffer::empty(&[x.size()[0], width], x.kind(), x.device());
        let h = linear::forward(x, bases, self.adapters.adapter(linear), add, &out);
        (out, h)
    }

    fn backward_input(&self, linear: Linear, d_y: &Tensor) -> (Buffer, ThinGradient) {
        linear::backward_input(d_y, self.weights.bases(linear), self.adapters.adapter(linear))
    }

    fn backward_parameters(
        &self,
        linear: Linear,
        d_y: &Tensor,
        x: &Tensor,
        h: Option<Buffer>,
        g: &ThinGradient,
    ) {
        linear::backward_parameters(d_y, x, h.as_deref(), g, self.adapters.with_gradient(linear));
    }

    /// Normalises q and k of `qkv` in place.
    fn normalise_qk(&self, qkv: &Tensor, weights: &[Tensor; 2]) -> UnnormedQk {
        let width = self.rotated_heads() * self.spec.heads.dim;
        let mut qk = Buffer::empty(&[qkv.size()[0], width], qkv.kind(), qkv.device());
        qk.copy_(&qkv.narrow(1, 0, width));
        let [q, k] = self.spec.query_key(&qk);
        let [q_out, k_out] = self.spec.query_key(qkv);
        let r = [(q, q_out, &weights[0]), (k, k_out, &weights[1])]
            .map(|(x, out, weight)| norm::forward_into(&x, weight, self.spec.eps, &out));
        UnnormedQk { qk, r }
    }

    fn rotated_heads(&self) -> i64 {
        self.spec.heads.query + self.spec.heads.key_value
    }
}

impl BlockSpec {
    /// q and k of `qkv` or `qk`, each `[tokens, heads, dim]`.
    fn query_key(&self, qkv: &Tensor) -> [Tensor; 2] {
        let all = qkv.view([qkv.size()[0], qkv.size()[1] / self.heads.dim, self.heads.dim]);
        [all.narrow(1, 0, self.heads.query), all.narrow(1, self.heads.query, self.heads.key_value)]
    }
}
