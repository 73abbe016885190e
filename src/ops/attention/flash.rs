//! FlashAttention-2 (Dao, 2023) of libtorch on CUDA, over all documents at once by their offsets.

use super::{Documents, Heads};
use crate::device::has_flash;
use tch::{Device, Kind, Tensor};

/// True if the kernels take these: 16-bit kinds, heads of one width, a multiple of 8 up to 256.
pub fn takes(qkv: &Tensor, heads: Heads) -> bool {
    let kind = matches!(qkv.kind(), Kind::BFloat16 | Kind::Half);
    matches!(qkv.device(), Device::Cuda(_))
        && has_flash()
        && kind
        && heads.dim % 8 == 0
        && heads.dim <= 256
        && heads.value_dim == heads.dim
}

fn by_head(rows: &Tensor, heads: Heads) -> Tensor {
    rows.view([-1, heads.query, heads.dim])
}

/// Tokens before its own that a query sees, where limited.
fn left(heads: Heads) -> Option<i64> {
    heads.window.map(|window| window - 1)
}

/// See [`super::forward`]; L is ordered by head, then by token.
pub fn forward(
    qkv: &Tensor,
    heads: Heads,
    documents: &Documents,
    out: &Tensor,
    lse: &Tensor,
) -> Result<(), tch::TchError> {
    let [q, k, v] = heads.split(qkv);
    let (offsets, longest) = (&documents.offsets, documents.longest());
    let no: Option<&Tensor> = None;
    let sums = Tensor::f_internal_flash_attention_forward_no_dropout_inplace(
        &by_head(out, heads),
        &q,
        &k,
        &v,
        Some(offsets),
        Some(offsets),
        longest,
        longest,
        0.0,
        true,
        false,
        Some(heads.scale),
        left(heads),
        Some(0),
        no,
        no,
        no,
        None,
    )?;
    lse.view([heads.query, -1]).f_copy_(&sums)
}

/// See [`super::backward`].
pub fn backward(
    [d_out, qkv, out, lse]: [&Tensor; 4],
    heads: Heads,
    documents: &Documents,
    d_qkv: &Tensor,
) -> Result<(), tch::TchError> {
    let [q, k, v] = heads.split(qkv);
    let (offsets, longest) = (&documents.offsets, documents.longest());
    // State of a generator, which only dropout uses.
    let unused = Tensor::zeros([2], (Kind::Int64, qkv.device()));
    let gradients = Tensor::f_internal_flash_attention_backward(
        &by_head(d_out, heads),
        &q,
        &k,
        &v,
        &by_head(out, heads),
        &lse.view([heads.query, -1]),
        offsets,
        offsets,
        longest,
        longest,
        0.0,
        true,
        &unused,
        &unused,
        Some(heads.scale),
        left(heads),
        Some(0),
    )?;
    for (mut target, gradient) in heads.split(d_qkv).into_iter().zip([gradients.0, gradients.1, gradients.2])
    {
        target.f_copy_(&gradient)?;
    }
    Ok(())
}
