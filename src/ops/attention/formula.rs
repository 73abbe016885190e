//! The formulas in libtorch's operations, for tensors that no kernel takes.

use super::{Documents, Heads, accum_kind};
use tch::{Kind, Tensor};

/// Documents of one length: (first token, documents, tokens per document).
type Run = (i64, i64, i64);

/// q, k, v of one run of `qkv`, each `[documents, key-value heads, query heads of each or 1, length, width of a head]`.
fn split(qkv: &Tensor, heads: Heads, &(start, count, length): &Run) -> [Tensor; 3] {
    heads.split(&qkv.narrow(0, start, count * length)).map(|part| {
        let each = part.size()[1] / heads.key_value;
        part.unflatten(0, [count, length]).transpose(1, 2).unflatten(1, [heads.key_value, each])
    })
}

/// Rows of a run, each `[documents, key-value heads, query heads of each, length, value_dim]`.
fn by_head(rows: &Tensor, heads: Heads, &(start, count, length): &Run) -> Tensor {
    let run = rows.narrow(0, start, count * length).view([count, length, heads.query, heads.value_dim]);
    run.transpose(1, 2).unflatten(1, [heads.key_value, heads.query / heads.key_value])
}

/// The part of L that belongs to a run: `[documents, key-value heads, query heads of each, length, 1]`.
fn sums_of(lse: &Tensor, heads: Heads, &(start, count, length): &Run) -> Tensor {
    let group = heads.query / heads.key_value;
    let run = lse.narrow(0, start * heads.query, count * length * heads.query);
    run.view([count, heads.key_value, group, length, 1])
}

/// Scores c·q·kᵀ in fp32 (fp64 for fp64), −∞ where a key is hidden.
fn scores(q: &Tensor, k: &Tensor, heads: Heads, length: i64) -> Tensor {
    let wide = accum_kind(q.kind());
    let scores = q.to_kind(wide).matmul(&k.to_kind(wide).transpose(-1, -2)) * heads.scale;
    let position = Tensor::arange(length, (Kind::Int64, q.device()));
    let age = position.unsqueeze(1) - position.unsqueeze(0);
    let hidden = age.lt(0).logical_or(&age.ge(heads.window.unwrap_or(i64::MAX)));
    scores.masked_fill(&hidden, f64::NEG_INFINITY)
}

/// See [`super::forward`].
pub fn forward(qkv: &Tensor, heads: Heads, documents: &Documents, out: &Tensor, lse: &Tensor) {
    for run in &documents.runs {
        let [q, k, v] = split(qkv, heads, run);
        let scores = scores(&q, &k, heads, run.2);
        let sums = scores.logsumexp([-1i64], true);
        let weights = (scores - &sums).exp();
        sums_of(lse, heads, run).copy_(&sums);
        by_head(out, heads, run).copy_(&weights.matmul(&v.to_kind(weights.kind())));
    }
}

/// See [`super::backward`].
pub fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: Heads,
    documents: &Documents,
    d_qkv: &Tensor,
) {
    for run in &documents.runs {
        let [q, k, v] = split(qkv, heads, run);
        let weights = (scores(&q, &k, heads, run.2) - sums_of(lse, heads, run)).exp();
        let wide = |t: &Tensor| t.to_kind(weights.kind());
        let (q, k, v) = (wide(&q), wide(&k), wide(&v));
        let d_o = wide(&by_head(d_out, heads, run));
        let dot = (&d_o * wide(&by_head(out, heads, run))).sum_dim_intlist(-1, true, None);
        let d_scores = &weights * (d_o.matmul(&v.transpose(-1, -2)) - dot) * heads.scale;
        let over_group = |d: Tensor| d.sum_dim_intlist(2, true, None);
        let d_v = over_group(weights.transpose(-1, -2).matmul(&d_o));
        let d_k = over_group(d_scores.transpose(-1, -2).matmul(&q));
        let gradients = [d_scores.matmul(&k), d_k, d_v];
        for (mut target, gradient) in split(d_qkv, heads, run).into_iter().zip(gradients) {
            target.copy_(&gradient);
        }
    }
}
