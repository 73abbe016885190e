//! Causal grouped-query attention over packed documents: no document attends to another, and no mask exists.
//!
//! forward   P = softmax(q·kᵀ/√d),  o = P·v,  L = logsumexp of each score row
//! backward  FlashAttention-2 (Dao, 2023): dv = Pᵀ·do,  dS = P ∘ (do·vᵀ − rowsum(do∘o)),  dq = dS·k/√d,  dk = dSᵀ·q/√d
//!
//! On the CPU both are kernels of tiles (`cpu`), on CUDA libtorch's (`flash`); what neither takes its operations compute
//! (`formula`).

mod cpu;
mod flash;
mod formula;

use super::{
    Buffer, accum_kind,
    cpu::{
        Isa, Rows,
        tile::{MicroKernel, Multiplier, Plain},
    },
};
use crate::device::has_kernels;
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Documents of one flat batch, as runs of equal length.
#[derive(Debug, PartialEq)]
pub struct Documents {
    /// (first token, documents, tokens per document)
    runs: Vec<(i64, i64, i64)>,
    /// Where each begins, and the end: `[documents + 1]` i32, where the batch is.
    offsets: Tensor,
}

impl Documents {
    /// From the lengths of the documents in order, for tensors on `device`; empty ones are skipped.
    pub fn new(lengths: &[usize], device: Device) -> Self {
        let mut runs: Vec<(i64, i64, i64)> = Vec::new();
        let mut start = 0;
        let mut offsets = vec![0];
        for length in lengths.iter().map(|&length| length as i64).filter(|&length| length > 0) {
            match runs.last_mut() {
                Some((_, count, tokens)) if *tokens == length => *count += 1,
                _ => runs.push((start, 1, length)),
            }
            start += length;
            offsets.push(start as i32);
        }
        Self { runs, offsets: Tensor::from_slice(&offsets).to_device(device) }
    }

    /// Tokens of the longest.
    fn longest(&self) -> i64 {
        self.runs.iter().map(|&(_, _, tokens)| tokens).max().unwrap_or(0)
    }

    /// The tokens of each document.
    fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.runs.iter().flat_map(|&(start, count, length)| {
            (0..count).map(move |i| {
                let first = (start + i * length) as usize;
                first..first + length as usize
            })
        })
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

/// o [tokens, query·dim] and L `[tokens·query]` fp32 (in an order that [`backward`] knows) from fused q|k|v
/// [tokens, (query + 2·key_value)·dim].
pub fn forward(qkv: &Tensor, heads: Heads, documents: &Documents) -> (Buffer, Tensor) {
    let _span = crate::trace::operation("attention.forward");
    let tokens = qkv.size()[0];
    let out = Buffer::empty(&[tokens, heads.query * heads.dim], qkv.kind(), qkv.device());
    let lse = Tensor::empty([tokens * heads.query], (accum_kind(qkv.kind()), qkv.device()));
    struct Forward<'a>(&'a Tensor, Heads, &'a Documents, &'a Tensor, &'a Tensor);
    impl Kernel for Forward<'_> {
        fn run<M: MicroKernel>(self, machine: M) {
            let Self(qkv, heads, documents, out, lse) = self;
            cpu::forward(machine, Rows::of(qkv), heads, documents, Rows::of(out), Rows::of(lse));
        }
    }
    if has_kernels(qkv) {
        on_cpu(qkv.kind(), Forward(qkv, heads, documents, &out, &lse));
    } else if flash::takes(qkv, heads) && tokens > 0 {
        libtorch(flash::forward(qkv, heads, documents, &out, &lse));
    } else {
        formula::forward(qkv, heads, documents, &out, &lse);
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
) -> Buffer {
    let _span = crate::trace::operation("attention.backward");
    let d_qkv = Buffer::like(qkv);
    struct Backward<'a>([&'a Tensor; 5], Heads, &'a Documents);
    impl Kernel for Backward<'_> {
        fn run<M: MicroKernel>(self, machine: M) {
            let Self([d_out, qkv, out, lse, d_qkv], heads, documents) = self;
            let [d_out, qkv, out, d_qkv] = [d_out, qkv, out, d_qkv].map(Rows::of);
            cpu::backward(machine, [d_out, qkv, out], Rows::of(lse), heads, documents, d_qkv);
        }
    }
    if has_kernels(qkv) {
        on_cpu(qkv.kind(), Backward([d_out, qkv, out, lse, &d_qkv], heads, documents));
    } else if flash::takes(qkv, heads) && qkv.size()[0] > 0 {
        libtorch(flash::backward([d_out, qkv, out, lse], heads, documents, &d_qkv));
    } else {
        formula::backward(d_out, qkv, out, lse, heads, documents, &d_qkv);
    }
    d_qkv
}

/// libtorch's operations panic where they fail; so do these.
fn libtorch(done: Result<(), tch::TchError>) {
    if let Err(error) = done {
        panic!("attention of libtorch: {error}");
    }
}

/// What runs on any machine that multiplies tiles.
trait Kernel {
    fn run<M: MicroKernel>(self, machine: M);
}

/// Runs `kernel` on the best machine for tensors of `kind`.
fn on_cpu(kind: Kind, kernel: impl Kernel) {
    let level = Isa::current();
    match kind {
        Kind::Double => kernel.run(Plain::<f64>::new(level)),
        Kind::Float => kernel.run(Plain::<f32>::new(level)),
        _ => match Multiplier::of(level) {
            None => kernel.run(Plain::<bf16>::new(level)),
            #[cfg(target_arch = "x86_64")]
            Some(Multiplier::Registers(machine)) => kernel.run(machine),
            #[cfg(target_arch = "x86_64")]
            Some(Multiplier::Vectors(machine)) => kernel.run(machine),
            #[cfg(test)]
            Some(Multiplier::Emulated(machine)) => kernel.run(machine),
        },
    }
}

/// Attention of one new token of each sequence over that sequence's cache, for generation: q [sequences, query, dim];
/// k, v [sequences, places, key_value, dim], of which the first `lengths` `[sequences]` i64 count, the new token last.
/// Returns o [sequences, query·dim].
pub fn with_cache(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &Tensor, heads: Heads) -> Tensor {
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
    let (k, v) = (k.transpose(1, 2), v.transpose(1, 2));
    let o = if has_kernels(q) {
        let (q, mask) = (q.unsqueeze(2), Some(&mask));
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu(&q, &k, &v, 0.0, false, mask, None).0
    } else {
        // The heads of a group side by side: [sequences, key_value, group, dim].
        let q = q.reshape([sequences, heads.key_value, -1, heads.dim]);
        let scores = q.matmul(&k.transpose(-1, -2)) / (heads.dim as f64).sqrt() + mask;
        scores.softmax(-1, accum_kind(q.kind())).to_kind(v.kind()).matmul(&v)
    };
    o.reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        cpu::{amx::Emulated, tile::InTiles},
        testing::{autograd, distance, leaf},
    };

    /// The textbook formula, one document and one head at a time.
    fn reference(qkv: &Tensor, heads: Heads, lengths: &[usize]) -> Tensor {
        let mut rows = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            let t = qkv.narrow(0, start, length).view([length, heads.query + 2 * heads.key_value, heads.dim]);
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

    /// Output and gradient of `qkv` by autograd, in fp64.
    fn expected(qkv: &Tensor, d_out: &Tensor, heads: Heads, lengths: &[usize]) -> [Tensor; 2] {
        let qkv = qkv.to_kind(Kind::Double).copy().set_requires_grad(true);
        let out = reference(&qkv, heads, lengths);
        let gradient = autograd(&out, d_out, &[&qkv]).remove(0);
        [out.detach(), gradient]
    }

    /// Output and gradient by the kernels.
    fn ours(qkv: &Tensor, d_out: &Tensor, heads: Heads, lengths: &[usize]) -> [Buffer; 2] {
        let documents = Documents::new(lengths, Device::Cpu);
        let (out, lse) = forward(qkv, heads, &documents);
        let d_qkv = backward(&d_out.to_kind(qkv.kind()), qkv, &out, &lse, heads, &documents);
        [out, d_qkv]
    }

    /// The same in the tiles of a machine that has none.
    fn in_emulated_tiles(qkv: &Tensor, d_out: &Tensor, heads: Heads, lengths: &[usize]) -> [Buffer; 2] {
        let (machine, documents) = (InTiles(Emulated), Documents::new(lengths, Device::Cpu));
        let (out, d_qkv) = (Buffer::like(d_out), Buffer::like(qkv));
        let lse = Tensor::empty([qkv.size()[0] * heads.query], (Kind::Float, Device::Cpu));
        let [d_out, qkv] = [d_out, qkv].map(Rows::of);
        cpu::forward(machine, qkv, heads, &documents, Rows::of(&out), Rows::of(&lse));
        let inputs = [d_out, qkv, Rows::of(&out)];
        cpu::backward(machine, inputs, Rows::of(&lse), heads, &documents, Rows::of(&d_qkv));
        [out, d_qkv]
    }

    /// Heads, windows and documents of every kind.
    fn cases() -> Vec<(Heads, Vec<usize>)> {
        let heads = |query, key_value, dim, window| Heads { query, key_value, dim, window };
        vec![
            (heads(4, 2, 8, None), vec![1]),
            (heads(4, 2, 8, None), vec![5, 5, 1, 0, 9]),
            (heads(4, 2, 8, Some(3)), vec![7, 2, 7]),
            (heads(4, 2, 8, Some(64)), vec![70, 64]),
            (heads(3, 1, 64, None), vec![65, 200, 64]),
            (heads(2, 2, 80, Some(70)), vec![150, 193]),
            (heads(2, 1, 6, Some(1)), vec![67]),
            (heads(2, 1, 128, None), vec![3]),
        ]
    }

    fn inputs((heads, lengths): &(Heads, Vec<usize>)) -> [Tensor; 2] {
        let tokens = lengths.iter().sum::<usize>() as i64;
        let normal = |width| Tensor::randn([tokens, width], (Kind::Double, Device::Cpu));
        [normal((heads.query + 2 * heads.key_value) * heads.dim), normal(heads.query * heads.dim)]
    }

    #[test]
    fn matches_autograd_at_every_level() {
        let before = tch::get_num_threads();
        for (i, case) in cases().iter().enumerate() {
            tch::set_num_threads(1 + i as i32 % 3);
            let (heads, lengths) = case;
            let [qkv, d_out] = inputs(case);
            let exact = expected(&qkv, &d_out, *heads, lengths);
            // What bf16 holds, so that only the arithmetic is compared.
            let [rounded, d_rounded] = [&qkv, &d_out].map(|t| t.to_kind(Kind::BFloat16));
            let exact_of_rounded = expected(&rounded, &d_rounded.to_kind(Kind::Double), *heads, lengths);
            let near = |ours: [Buffer; 2], exact: &[Tensor; 2], tolerance: [f64; 2], what: &str| {
                for ((ours, exact), tolerance) in ours.iter().zip(exact).zip(tolerance) {
                    let off = distance(ours, exact);
                    assert!(off <= tolerance, "{what} {heads:?} {lengths:?}: {off}");
                }
            };
            // Weights, their gradients and results are rounded to 8 bits; gradients are sums over the queries.
            let of_bf16 = [0.02, 0.01 * exact_of_rounded[1].abs().max().double_value(&[]).max(1.0)];
            for level in Isa::available() {
                let check = |kind: Kind, d_out: &Tensor, exact: &[Tensor; 2], tolerance: [f64; 2]| {
                    let ours = level.forced(|| ours(&qkv.to_kind(kind), d_out, *heads, lengths));
                    near(ours, exact, tolerance, &format!("{level:?} {kind:?}"));
                };
                check(Kind::Double, &d_out, &exact, [1e-12, 1e-11]);
                check(Kind::Float, &d_out, &exact, [1e-5, 1e-4]);
                check(Kind::BFloat16, &d_rounded, &exact_of_rounded, of_bf16);
            }
            let ours = in_emulated_tiles(&rounded, &d_rounded, *heads, lengths);
            near(ours, &exact_of_rounded, of_bf16, "emulated tiles");
        }
        tch::set_num_threads(before);
    }

    #[test]
    fn other_devices_compute_the_same() {
        for case in cases() {
            let (heads, lengths) = &case;
            let [qkv, d_out] = inputs(&case);
            let exact = expected(&qkv, &d_out, *heads, lengths);
            let documents = Documents::new(lengths, Device::Cpu);
            let (out, d_qkv) = (d_out.empty_like(), qkv.empty_like());
            let lse = Tensor::empty([qkv.size()[0] * heads.query], (Kind::Double, Device::Cpu));
            formula::forward(&qkv, *heads, &documents, &out, &lse);
            formula::backward(&d_out, &qkv, &out, &lse, *heads, &documents, &d_qkv);
            for (ours, exact) in [out, d_qkv].iter().zip(&exact) {
                assert!(distance(ours, exact) < 1e-11, "{lengths:?}: {}", distance(ours, exact));
            }
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
