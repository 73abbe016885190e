//! Causal grouped-query attention over packed documents: no document attends to another, and no mask tensor
//! exists unless a sliding window is shorter than a document.
//!
//! forward   P = softmax(q·kᵀ/√d),  o = P·v,  L = logsumexp of each score row
//! backward  FlashAttention-2 (Dao, 2023): dv = Pᵀ·do,  dS = P ∘ (do·vᵀ − rowsum(do∘o)),  dq = dS·k/√d,  dk = dSᵀ·q/√d
//!
//! On the CPU both are libtorch's flash kernels, called once per run of documents of equal length.

use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Documents of one flat batch, as runs of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// (first token, documents, tokens per document)
    runs: Vec<(i64, i64, i64)>,
}

impl Documents {
    /// From the lengths of the documents in order; empty ones are skipped.
    pub fn new(lengths: &[usize]) -> Self {
        let mut runs: Vec<(i64, i64, i64)> = Vec::new();
        let mut start = 0;
        for length in lengths.iter().map(|&length| length as i64).filter(|&length| length > 0) {
            match runs.last_mut() {
                Some((_, count, tokens)) if *tokens == length => *count += 1,
                _ => runs.push((start, 1, length)),
            }
            start += length;
        }
        Self { runs }
    }
}

/// Widths of the fused q|k|v tensor.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub query: i64,
    pub key_value: i64,
    pub dim: i64,
    /// A query sees this many tokens, itself included; `None` for all before it.
    pub window: Option<i64>,
}

impl Heads {
    fn all(&self) -> i64 {
        self.query + 2 * self.key_value
    }

    /// q, k, v of one run of `qkv` [tokens, (query + 2·key_value)·dim], each [documents, heads, length, dim].
    fn split(&self, qkv: &Tensor, &(start, count, length): &(i64, i64, i64)) -> [Tensor; 3] {
        let run =
            qkv.narrow(0, start, count * length).view([count, length, self.all(), self.dim]).transpose(1, 2);
        let heads = |range: Range<i64>| run.narrow(1, range.start, range.end - range.start);
        let (q, k) = (self.query, self.query + self.key_value);
        [heads(0..q), heads(q..k), heads(k..self.all())]
    }

    /// The additive mask of a window that is shorter than the document.
    fn mask(&self, length: i64, kind: Kind, device: Device) -> Option<Tensor> {
        let window = self.window.filter(|&window| window < length)?;
        let position = Tensor::arange(length, (Kind::Int64, device));
        let distance = position.unsqueeze(1) - position.unsqueeze(0);
        let hidden = distance.lt(0).logical_or(&distance.ge(window));
        Some(Tensor::zeros([length, length], (kind, device)).masked_fill(&hidden, f64::NEG_INFINITY))
    }
}

/// o [tokens, query·dim] and L `[tokens·query]` fp32 (by run, document, head, token) from fused q|k|v.
pub fn forward(qkv: &Tensor, heads: Heads, documents: &Documents) -> (Tensor, Tensor) {
    let _span = crate::trace::operation("attention.forward");
    let tokens = qkv.size()[0];
    let out = Tensor::empty([tokens, heads.query * heads.dim], (qkv.kind(), qkv.device()));
    let wide = if qkv.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let lse = Tensor::empty([tokens * heads.query], (wide, qkv.device()));
    for run in &documents.runs {
        let &(start, count, length) = run;
        let [q, k, v] = heads.split(qkv, run);
        let mask = heads.mask(length, qkv.kind(), qkv.device());
        let (o, l) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
            &q,
            &k,
            &v,
            0.0,
            mask.is_none(),
            mask.as_ref(),
            None,
        );
        let shape = [count, length, heads.query, heads.dim];
        out.narrow(0, start, count * length).view(shape).copy_(&o.transpose(1, 2));
        run_of(&lse, heads, run).copy_(&l);
    }
    (out, lse)
}

/// The gradient of fused q|k|v from do [tokens, query·dim] and what forward gave.
pub fn backward(
    d_out: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    heads: Heads,
    documents: &Documents,
) -> Tensor {
    let _span = crate::trace::operation("attention.backward");
    let d_qkv = qkv.empty_like();
    for run in &documents.runs {
        let &(start, count, length) = run;
        let [q, k, v] = heads.split(qkv, run);
        let mask = heads.mask(length, qkv.kind(), qkv.device());
        let by_head = |t: &Tensor| {
            t.narrow(0, start, count * length).view([count, length, heads.query, heads.dim]).transpose(1, 2)
        };
        let (d_q, d_k, d_v) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            &by_head(d_out),
            &q,
            &k,
            &v,
            &by_head(out),
            &run_of(lse, heads, run),
            0.0,
            mask.is_none(),
            mask.as_ref(),
            None,
        );
        for (mut target, gradient) in heads.split(&d_qkv, run).into_iter().zip([d_q, d_k, d_v]) {
            target.copy_(&gradient);
        }
    }
    d_qkv
}

/// The part of L that belongs to a run: [documents, query heads, length].
fn run_of(lse: &Tensor, heads: Heads, &(start, count, length): &(i64, i64, i64)) -> Tensor {
    lse.narrow(0, start * heads.query, count * length * heads.query).view([count, heads.query, length])
}

/// Attention of one new token of each sequence over that sequence's cache, for generation: q [sequences, query, dim];
/// k, v [sequences, places, key_value, dim], of which the first `lengths` `[sequences]` i64 count, the new token last.
/// Returns o [sequences, query·dim].
pub fn with_cache(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &Tensor, heads: Heads) -> Tensor {
    let _span = crate::trace::operation("attention.with_cache");
    let (sequences, places) = (k.size()[0], k.size()[1]);
    let shape = [sequences, heads.query * heads.dim];
    if sequences == 0 {
        return Tensor::empty(shape, (q.kind(), q.device()));
    }
    let age = lengths.unsqueeze(1) - 1 - Tensor::arange(places, (Kind::Int64, q.device()));
    let mut hidden = age.lt(0);
    if let Some(window) = heads.window {
        hidden = hidden.logical_or(&age.ge(window));
    }
    let mask = Tensor::zeros([sequences, places], (q.kind(), q.device()));
    let mask = mask.masked_fill(&hidden, f64::NEG_INFINITY).view([sequences, 1, 1, places]);
    let (o, _) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
        &q.unsqueeze(2),
        &k.transpose(1, 2),
        &v.transpose(1, 2),
        0.0,
        false,
        Some(&mask),
        None,
    );
    o.reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    /// The textbook formula, one document and one head at a time.
    fn reference(qkv: &Tensor, heads: Heads, lengths: &[usize]) -> Tensor {
        let mut rows = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            let t = qkv.narrow(0, start, length).view([length, heads.all(), heads.dim]);
            let position = Tensor::arange(length, (Kind::Int64, Device::Cpu));
            let ahead = position.unsqueeze(1) - position.unsqueeze(0);
            let hidden = ahead.lt(0).logical_or(&ahead.ge(heads.window.unwrap_or(i64::MAX)));
            let columns: Vec<Tensor> = (0..heads.query)
                .map(|h| {
                    let kv = h / (heads.query / heads.key_value);
                    let head = |i: i64| t.select(1, i);
                    let scores = head(h).matmul(&head(heads.query + kv).tr()) / (heads.dim as f64).sqrt();
                    let p = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None);
                    p.matmul(&head(heads.query + heads.key_value + kv))
                })
                .collect();
            rows.push(Tensor::cat(&columns, 1));
            start += length;
        }
        Tensor::cat(&rows, 0)
    }

    #[test]
    fn matches_autograd() {
        for (window, lengths) in
            [(None, vec![1]), (None, vec![5, 5, 1, 0, 9]), (Some(3), vec![7, 2, 7]), (Some(64), vec![70, 64])]
        {
            let heads = Heads { query: 4, key_value: 2, dim: 8, window };
            let tokens = lengths.iter().sum::<usize>() as i64;
            let (qkv, d_out) = (leaf(&[tokens, 64]), leaf(&[tokens, 32]).detach());
            let expected_out = reference(&qkv, heads, &lengths);
            let expected = autograd(&expected_out, &d_out, &[&qkv]);
            let documents = Documents::new(&lengths);
            let _guard = tch::no_grad_guard();
            let (out, lse) = forward(&qkv.detach(), heads, &documents);
            assert!(distance(&out, &expected_out) < 1e-12, "{lengths:?}: {}", distance(&out, &expected_out));
            let d_qkv = backward(&d_out, &qkv.detach(), &out, &lse, heads, &documents);
            assert!(
                distance(&d_qkv, &expected[0]) < 1e-11,
                "{lengths:?}: {}",
                distance(&d_qkv, &expected[0])
            );
        }
    }

    #[test]
    fn a_cache_continues_documents_of_different_lengths() {
        let lengths = [9usize, 4, 1];
        for window in [None, Some(3)] {
            let heads = Heads { query: 4, key_value: 2, dim: 8, window };
            let qkv = leaf(&[14, 64]).detach();
            let whole = reference(&qkv, heads, &lengths);
            let t = qkv.view([14, 8, 8]);
            // What lies behind a sequence's end must not count.
            let cache = Tensor::full([3, 12, 4, 8], 7.0, (Kind::Double, Device::Cpu));
            let (mut last, mut end) = (Vec::new(), 0);
            for (i, &length) in lengths.iter().enumerate() {
                let own = t.narrow(0, end, length as i64).narrow(1, 4, 4);
                cache.get(i as i64).narrow(0, 0, length as i64).copy_(&own);
                end += length as i64;
                last.push(end - 1);
            }
            let last = Tensor::from_slice(&last);
            let q = t.narrow(1, 0, 4).index_select(0, &last);
            let (k, v) = (cache.narrow(2, 0, 2), cache.narrow(2, 2, 2));
            let o = with_cache(&q, &k, &v, &Tensor::from_slice(&[9i64, 4, 1]), heads);
            assert!(distance(&o, &whole.index_select(0, &last)) < 1e-12, "{window:?}");
        }
    }
}
