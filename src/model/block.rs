//! A decoder layer: forward, backward, and what it saves between the two.
//!
//! u = x + O(attention(rope(qkv(norm(x))))),  y = u + mlp(norm(u))
//!
//! Saved: r of both norms, q|k|v as attention saw them, its output and row sums, u, what the MLP saves, and the thin LoRA
//! activations; the caller keeps x. What of it is not kept is computed again, see
//! [`CheckpointingMethod`](crate::config::CheckpointingMethod). The normalised inputs and the SwiGLU output are always
//! computed again. Nothing saved refers to a slot. Backward gives up each saved tensor with its last use.

use super::{
    ffn::{
        gated::{GatedSaved, Share},
        moe::MoeSaved,
    },
    layer::{Layer, Mlp},
    rows::RowAdapters,
};
use crate::{
    ops::{
        Buffer,
        attention::{self, Documents, Heads},
        linear::{self, GroupedLinear},
        norm, rope,
    },
    shard::ShardError,
};
use std::rc::Rc;
use tch::Tensor;

/// What all layers need to know of a flat batch.
pub struct BatchContext {
    pub documents: Rc<Documents>,
    /// cos and sin of each token's position: `[tokens, 1, head_dim / 2]` fp32.
    pub cos: Tensor,
    pub sin: Tensor,
    /// The adapter of each row.
    pub adapters: Rc<RowAdapters>,
}

/// What the arithmetic of a layer depends on besides its weights.
#[derive(Clone, Copy, Debug)]
pub struct BlockSpec {
    pub heads: Heads,
    pub eps: f64,
    /// q, k and v are cut off at ± this before the rotation.
    pub clip_qkv: Option<f64>,
}

/// What backward needs of the attention block.
pub struct AttentionSaved {
    r_input: Tensor,
    qk: Option<UnnormedQk>,
    /// Where q|k|v was cut off: bool, as q|k|v.
    clipped: Option<Tensor>,
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
    inner: InnerSaved,
}

enum InnerSaved {
    Dense(GatedSaved),
    Moe(Box<MoeSaved>),
}

impl MlpSaved {
    /// What a router chose, and its experts made of that.
    pub fn moe(&self) -> Option<&MoeSaved> {
        match &self.inner {
            InnerSaved::Dense(_) => None,
            InnerSaved::Moe(saved) => Some(saved),
        }
    }
}

/// A layer with all that it computes with.
pub struct Block<'a> {
    pub spec: BlockSpec,
    pub layer: Layer,
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
        let (normed, r_input) = norm::forward(x, &self.layer.input_norm, self.spec.eps);
        let all = |linear| GroupedLinear { linear, segments: self.batch.adapters.dense() };
        let (mut qkv, h_qkv) = linear::forward(&normed, all(&self.layer.qkv), None);
        drop(normed);
        let qk = self.layer.qk_norm.as_ref().map(|weights| self.normalise_qk(&qkv, weights));
        let clipped = self.spec.clip_qkv.map(|most| {
            let clipped = qkv.abs().gt(most);
            let _ = qkv.clamp_(-most, most);
            clipped
        });
        rope::forward(&qkv, self.rotated(), &self.batch.cos, &self.batch.sin);
        let (out, lse) = attend(&qkv, self.spec.heads);
        let (middle, h_o) = linear::forward(&out, all(&self.layer.o), Some(x));
        AttentionSaved { r_input, qk, clipped, qkv, out, lse, middle, h_qkv, h_o }
    }

    /// The MLP up to its last matrix; [`output`](Self::output) follows. `chosen` replays a router's earlier choice.
    pub fn mlp(&self, attention: &AttentionSaved, chosen: Option<&Tensor>) -> Result<MlpSaved, ShardError> {
        let weight = &self.layer.post_attention_norm;
        let (normed, r_middle) = norm::forward(&attention.middle, weight, self.spec.eps);
        let inner = match &self.layer.mlp {
            Mlp::Dense(mlp) => {
                let segments = self.batch.adapters.dense().share();
                InnerSaved::Dense(mlp.forward(&normed, Share { segments, scale: None }))
            }
            Mlp::Moe(moe) => InnerSaved::Moe(Box::new(moe.forward(&normed, chosen, &self.batch.adapters)?)),
        };
        Ok(MlpSaved { r_middle, inner })
    }

    /// y `[tokens, hidden]`: the MLP's last matrix and the residual.
    pub fn output(&self, attention: &AttentionSaved, mlp: &mut MlpSaved) -> Result<Buffer, ShardError> {
        match (&self.layer.mlp, &mut mlp.inner) {
            (Mlp::Dense(mlp), InnerSaved::Dense(saved)) => Ok(mlp.output(saved, Some(&attention.middle))),
            (Mlp::Moe(moe), InnerSaved::Moe(saved)) => moe.output(saved, &attention.middle),
            _ => unreachable!("saved by this layer"),
        }
    }

    /// The MLP as far as backward needs it.
    pub fn mlp_again(
        &self,
        attention: &AttentionSaved,
        chosen: Option<&Tensor>,
    ) -> Result<MlpSaved, ShardError> {
        let mut saved = self.mlp(attention, chosen)?;
        match (&self.layer.mlp, &mut saved.inner) {
            (Mlp::Dense(mlp), InnerSaved::Dense(saved)) => mlp.skip_output(saved),
            (Mlp::Moe(moe), InnerSaved::Moe(saved)) => moe.skip_output(saved),
            _ => unreachable!("saved by this layer"),
        }
        Ok(saved)
    }

    /// dx from dy `[tokens, hidden]` and x; adds the adapters' gradients.
    pub fn backward(
        &self,
        d_y: Buffer,
        x: &Tensor,
        attention: AttentionSaved,
        mlp: MlpSaved,
    ) -> Result<Buffer, ShardError> {
        let AttentionSaved { r_input, qk, clipped, qkv, out, lse, middle, h_qkv, h_o } = attention;
        let d_middle = {
            let MlpSaved { r_middle, inner } = mlp;
            let weight = &self.layer.post_attention_norm;
            let normed = || norm::recompute(&middle, weight, &r_middle);
            let d_normed = match (&self.layer.mlp, inner) {
                (Mlp::Dense(mlp), InnerSaved::Dense(saved)) => mlp.backward(&d_y, || Ok(normed()), saved)?.0,
                (Mlp::Moe(moe), InnerSaved::Moe(saved)) => moe.backward(&d_y, normed(), *saved)?,
                _ => unreachable!("saved by this layer"),
            };
            norm::backward(d_normed, &middle, weight, &r_middle, Some(&d_y))
        };
        drop((d_y, middle));

        let all = |linear| GroupedLinear { linear, segments: self.batch.adapters.dense() };
        let o = all(&self.layer.o);
        let (d_out, g) = linear::backward_input(&d_middle, o);
        linear::backward_parameters(&d_middle, &out, h_o.as_deref(), &g, o);
        let mut d_qkv = attention::backward(&d_out, &qkv, &out, &lse, self.spec.heads, &self.batch.documents);
        drop((d_out, out, qkv));
        rope::backward(&d_qkv, self.rotated(), &self.batch.cos, &self.batch.sin);
        if let Some(clipped) = clipped {
            let _ = d_qkv.masked_fill_(&clipped, 0.0);
        }
        if let (Some(weights), Some(UnnormedQk { qk, r })) = (&self.layer.qk_norm, qk) {
            let both = self.normed_parts(&d_qkv, weights).into_iter().zip(self.normed_parts(&qk, weights));
            for (((d, x), weight), r) in both.zip(weights).zip(&r) {
                norm::backward_into(&d, &x, weight, r);
            }
        }
        let weight = &self.layer.input_norm;
        let layer = all(&self.layer.qkv);
        let (d_normed, g) = linear::backward_input(&d_qkv, layer);
        let normed = norm::recompute(x, weight, &r_input);
        linear::backward_parameters(&d_qkv, &normed, h_qkv.as_deref(), &g, layer);
        Ok(norm::backward(d_normed, x, weight, &r_input, Some(&d_middle)))
    }

    /// Normalises q and k of `qkv` in place.
    fn normalise_qk(&self, qkv: &Tensor, weights: &[Tensor; 2]) -> UnnormedQk {
        let width = self.rotated().heads * self.spec.heads.dim;
        let mut qk = Buffer::empty(&[qkv.size()[0], width], qkv.kind(), qkv.device());
        qk.copy_(&qkv.narrow(1, 0, width));
        let [q, k] = self.normed_parts(&qk, weights);
        let [q_out, k_out] = self.normed_parts(qkv, weights);
        let r = [(q, q_out, &weights[0]), (k, k_out, &weights[1])]
            .map(|(x, out, weight)| norm::forward_into(&x, weight, self.spec.eps, &out));
        UnnormedQk { qk, r }
    }

    /// q and k of `qkv` or `qk`, each as rows of its norm's width: `[tokens, heads, dim]`, or `[tokens, 1, heads·dim]`.
    fn normed_parts(&self, qkv: &Tensor, weights: &[Tensor; 2]) -> [Tensor; 2] {
        let Heads { query, key_value, dim, .. } = self.spec.heads;
        [(0, query * dim, &weights[0]), (query * dim, key_value * dim, &weights[1])].map(
            |(first, columns, weight)| {
                let width = weight.size()[0];
                qkv.narrow(1, first, columns).unflatten(1, [columns / width, width])
            },
        )
    }

    fn rotated(&self) -> rope::Rotated {
        let Heads { query, key_value, dim, .. } = self.spec.heads;
        rope::Rotated { heads: query + key_value, dim }
    }
}
