//! Causal grouped-query attention over packed documents: no document attends to another, and no mask exists.
//!
//! forward   P = softmax(c·q·kᵀ),  o = P·v,  L = logsumexp of each score row
//! backward  FlashAttention-2 (Dao, 2023): dv = Pᵀ·do,  dS = P ∘ (do·vᵀ − rowsum(do∘o)),  dq = c·dS·k,  dk = c·dSᵀ·q
//!
//! c is the scale, 1/√d by default. Heads of v may be narrower than those of q and k.
//!
//! Backends: tiled kernels of our own on the CPU (`cpu`), libtorch's FlashAttention on CUDA (`flash`), libtorch
//! operations for anything else (`formula`).

mod cpu;
mod flash;
mod formula;
mod paged;

pub use paged::{Paged, Part, over_pages};

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
    /// Offsets of the documents and the end: `[documents + 1]` i32 on the batch's device.
    offsets: Tensor,
}

impl Documents {
    /// Documents of the given lengths in order, for tensors on `device`; empty ones are skipped.
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

    /// Tokens of the longest document.
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

/// Heads of the fused q|k|v tensor, and the score function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    pub query: i64,
    pub key_value: i64,
    /// Width of a head of q and k.
    pub dim: i64,
    /// Width of a head of v and of the output.
    pub value_dim: i64,
    /// Factor of the scores.
    pub scale: f64,
    /// Tokens that a query sees, itself included; `None` for all before it.
    pub window: Option<i64>,
}

impl Heads {
    /// Heads of one width, scores over √dim, no window.
    pub fn new(query: i64, key_value: i64, dim: i64) -> Self {
        let scale = (dim as f64).sqrt().recip();
        Self { query, key_value, dim, value_dim: dim, scale, window: None }
    }

    /// Columns of q, k and v.
    pub fn widths(&self) -> [i64; 3] {
        [self.query * self.dim, self.key_value * self.dim, self.key_value * self.value_dim]
    }

    /// Columns of the output.
    pub fn output(&self) -> i64 {
        self.query * self.value_dim
    }

    /// q, k and v of `qkv` `[tokens, Σ widths]`, each a view `[tokens, heads, width of a head]`.
    pub fn split(&self, qkv: &Tensor) -> [Tensor; 3] {
        let [q, k, v] = self.widths();
        let part = |first, columns, dim| qkv.narrow(1, first, columns).unflatten(1, [columns / dim, dim]);
        [part(0, q, self.dim), part(q, k, self.dim), part(q + k, v, self.value_dim)]
    }
}

/// o `[tokens, query·value_dim]` and L `[tokens·query]` fp32 (in the backend's order) from fused q|k|v
/// `[tokens, Σ widths]`.
pub fn forward(qkv: &Tensor, heads: Heads, documents: &Documents) -> (Buffer, Tensor) {
    let _span = crate::trace::operation("attention.forward");
    let tokens = qkv.size()[0];
    let out = Buffer::empty(&[tokens, heads.output()], qkv.kind(), qkv.device());
    let lse = Tensor::empty([tokens * heads.query], (accum_kind(qkv.kind()), qkv.device()));
    if has_kernels(qkv) {
        on_cpu(qkv.kind(), Forward { qkv, heads, documents, first: 0, out: &out, lse: &lse });
    } else if flash::takes(qkv, heads) && tokens > 0 {
        libtorch(flash::forward(qkv, heads, documents, &out, &lse));
    } else {
        formula::forward(qkv, heads, documents, &out, &lse);
    }
    (out, lse)
}

/// o as [`forward`] has it, of the queries from `first` on of one document; rows before them have any value. Only where
/// kernels of ours compute.
fn continued(qkv: &Tensor, heads: Heads, document: &Documents, first: usize) -> Buffer {
    let out = Buffer::empty(&[qkv.size()[0], heads.output()], qkv.kind(), qkv.device());
    let lse = Tensor::empty([qkv.size()[0] * heads.query], (accum_kind(qkv.kind()), qkv.device()));
    on_cpu(qkv.kind(), Forward { qkv, heads, documents: document, first, out: &out, lse: &lse });
    out
}

/// [`forward`] by kernels of ours.
struct Forward<'a> {
    qkv: &'a Tensor,
    heads: Heads,
    documents: &'a Documents,
    /// The first query of each document.
    first: usize,
    out: &'a Tensor,
    lse: &'a Tensor,
}

impl Kernel for Forward<'_> {
    fn run<M: MicroKernel>(self, machine: M) {
        let Self { qkv, heads, documents, first, out, lse } = self;
        cpu::forward(machine, Rows::of(qkv), heads, (documents, first), Rows::of(out), Rows::of(lse));
    }
}

/// Backward of [`forward`]: the gradient of fused q|k|v from do `[tokens, query·value_dim]`, o and L.
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

/// Panics on an error, as tch's own wrappers of libtorch do.
fn libtorch(done: Result<(), tch::TchError>) {
    if let Err(error) = done {
        panic!("attention of libtorch: {error}");
    }
}

/// A kernel generic over the micro-kernel that multiplies its tiles.
trait Kernel {
    fn run<M: MicroKernel>(self, machine: M);
}

/// Runs `kernel` with the best micro-kernel for tensors of `kind`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        cpu::{amx::Emulated, tile::InTiles},
        testing::{autograd, distance},
    };

    /// The textbook formula, one document and one head at a time.
    pub fn reference(qkv: &Tensor, heads: Heads, lengths: &[usize]) -> Tensor {
        let mut rows = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            let [q, k, v] = [
                (0, heads.query, heads.dim),
                (heads.query * heads.dim, heads.key_value, heads.dim),
                ((heads.query + heads.key_value) * heads.dim, heads.key_value, heads.value_dim),
            ]
            .map(|(first, n, dim)| {
                let part = qkv.narrow(0, start, length).narrow(1, first, n * dim);
                part.reshape([length, n, dim])
            });
            let position = Tensor::arange(length, (Kind::Int64, Device::Cpu));
            let ahead = position.unsqueeze(1) - position.unsqueeze(0);
            let hidden = ahead.lt(0).logical_or(&ahead.ge(heads.window.unwrap_or(i64::MAX)));
            let columns: Vec<Tensor> = (0..heads.query)
                .map(|h| {
                    let kv = h / (heads.query / heads.key_value);
                    let scores = q.select(1, h).matmul(&k.select(1, kv).tr()) * heads.scale;
                    let p = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None);
                    p.matmul(&v.select(1, kv))
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

    /// The same in emulated tile registers.
    fn in_emulated_tiles(qkv: &Tensor, d_out: &Tensor, heads: Heads, lengths: &[usize]) -> [Buffer; 2] {
        let (machine, documents) = (InTiles(Emulated), Documents::new(lengths, Device::Cpu));
        let (out, d_qkv) = (Buffer::like(d_out), Buffer::like(qkv));
        let lse = Tensor::empty([qkv.size()[0] * heads.query], (Kind::Float, Device::Cpu));
        let [d_out, qkv] = [d_out, qkv].map(Rows::of);
        cpu::forward(machine, qkv, heads, (&documents, 0), Rows::of(&out), Rows::of(&lse));
        let inputs = [d_out, qkv, Rows::of(&out)];
        cpu::backward(machine, inputs, Rows::of(&lse), heads, &documents, Rows::of(&d_qkv));
        [out, d_qkv]
    }

    /// Heads, windows, scales and documents of every kind.
    fn cases() -> Vec<(Heads, Vec<usize>)> {
        let heads = |query, key_value, dim, window| Heads { window, ..Heads::new(query, key_value, dim) };
        vec![
            (heads(4, 2, 8, None), vec![1]),
            (heads(4, 2, 8, None), vec![5, 5, 1, 0, 9]),
            (heads(4, 2, 8, Some(3)), vec![7, 2, 7]),
            (heads(4, 2, 8, Some(64)), vec![70, 64]),
            (heads(3, 1, 64, None), vec![65, 200, 64]),
            (heads(2, 2, 80, Some(70)), vec![150, 193]),
            (heads(2, 1, 6, Some(1)), vec![67]),
            (heads(2, 1, 128, None), vec![3]),
            (Heads { scale: 0.5, ..heads(4, 2, 16, None) }, vec![70, 3]),
            // v narrower than q and k, as in multi-head latent attention, and wider.
            (Heads { value_dim: 16, ..heads(3, 3, 24, None) }, vec![66, 5]),
            (Heads { value_dim: 64, scale: 0.1, ..heads(4, 2, 96, Some(40)) }, vec![130, 1]),
            (Heads { value_dim: 40, ..heads(2, 1, 6, None) }, vec![67, 4]),
        ]
    }

    fn inputs((heads, lengths): &(Heads, Vec<usize>)) -> [Tensor; 2] {
        let tokens = lengths.iter().sum::<usize>() as i64;
        let normal = |width| Tensor::randn([tokens, width], (Kind::Double, Device::Cpu));
        [normal(heads.widths().iter().sum()), normal(heads.output())]
    }

    #[test]
    fn matches_autograd_at_every_level() {
        let before = tch::get_num_threads();
        for (i, case) in cases().iter().enumerate() {
            tch::set_num_threads(1 + i as i32 % 3);
            let (heads, lengths) = case;
            let [qkv, d_out] = inputs(case);
            let exact = expected(&qkv, &d_out, *heads, lengths);
            // Values that bf16 holds, so that only the arithmetic is compared.
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
}
