//! Attention as a forward/backward pair object, apart from the mixer that projects q, k and v: training attends within
//! the documents of a batch ([`WithinDocuments`]), generation over a cache ([`infer::cache`](crate::infer::cache)).
//!
//! Context parallelism is a third implementation, over `Mesh::sequence_group`: it would exchange tokens for heads by an
//! all-to-all before attention and back after it, in forward and in backward, around [`WithinDocuments`].

use crate::{
    ops::{
        Buffer,
        attention::{self, Documents, Heads},
    },
    shard::ShardError,
};
use tch::Tensor;

/// Forward of attention.
pub trait Attend {
    /// o `[tokens, query·value_dim]` of fused q|k|v `[tokens, Σ widths]` of layer `layer`, rotated, and L
    /// `[tokens·query]` for backward, empty where none follows.
    fn forward(&self, layer: usize, qkv: &Tensor, heads: Heads) -> Result<(Buffer, Tensor), ShardError>;
}

/// Attention that training goes back through.
pub trait AttendBackward: Attend {
    /// Gradient of q|k|v from that of o.
    fn backward(
        &self,
        layer: usize,
        d_out: &Tensor,
        saved: AttendSaved,
        heads: Heads,
    ) -> Result<Buffer, ShardError>;
}

/// Input and results of [`Attend::forward`].
pub struct AttendSaved<'a> {
    pub qkv: &'a Tensor,
    pub out: &'a Tensor,
    pub lse: &'a Tensor,
}

/// Causal attention within each document of a flat batch.
pub struct WithinDocuments<'a>(pub &'a Documents);

impl Attend for WithinDocuments<'_> {
    fn forward(&self, _layer: usize, qkv: &Tensor, heads: Heads) -> Result<(Buffer, Tensor), ShardError> {
        Ok(attention::forward(qkv, heads, self.0))
    }
}

impl AttendBackward for WithinDocuments<'_> {
    fn backward(
        &self,
        _layer: usize,
        d_out: &Tensor,
        AttendSaved { qkv, out, lse }: AttendSaved,
        heads: Heads,
    ) -> Result<Buffer, ShardError> {
        Ok(attention::backward(d_out, qkv, out, lse, heads, self.0))
    }
}
