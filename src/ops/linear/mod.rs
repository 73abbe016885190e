//! Frozen linear layers with LoRA adapters on slices of their output (Hu et al., 2021), over segments of rows that
//! each have a base weight (an expert's) and an adapter (a session's) of their own.
//!
//! forward   h = s · x·Aᵀ,  y = x·W₀ᵀ + bias,  y[:, part] += h_part·B_partᵀ
//! backward  g_part = s · dy[:, part]·B_part,  dx = dy·W₀ + g·A,  dA += gᵀ·x,  dB_part += dy[:, part]ᵀ·h_part
//!
//! A is `[Σ rank, in]`, the A's of all parts one below the other, so that one GEMM of Σ rank columns serves q, k and v.
//! The frozen weight has no gradient. Parameter gradients are added in fp32.
//!
//! Base GEMMs run once over all rows of a base weight, adapter GEMMs by segment (segmented LoRA, as SGMV in Punica).
//! Segments are slices of the same tensors: nothing is padded or copied, and a segment without rows costs nothing.
//! `backend` chooses how: GEMMs of our own in bf16 on CPUs with AMX or AVX512-BF16 (`tiled.rs`), libtorch's grouped
//! GEMM on devices that have it (`grouped.rs`), libtorch's GEMMs one after another elsewhere (`plain.rs`; a grouped
//! one was measured no faster on a CPU), and one order of sums for each row where that is asked for (`invariant.rs`).
//! Adapters with dropout are computed beside all that (`dropout.rs`), magnitudes of DoRA around it (`dora.rs`).

mod dora;
mod dropout;
mod grouped;
mod invariant;
mod matrices;
mod on_device;
mod packed;
mod plain;
mod segments;
#[cfg(test)]
mod tests;
mod tiled;

use super::{
    Buffer, batch_invariant,
    cpu::{
        dots::{self, Start},
        operand::Matrix,
    },
};
use dora::Dora;
use dropout::Dropped;
use grouped::Grouped;
use half::bf16;
use invariant::Invariant;
use plain::Plain;
use std::ops::Range;
use tch::{Device, Tensor};
use tiled::Tiled;
pub use {
    dora::{Magnitudes, row_norms},
    dropout::Dropout,
    matrices::Matrices,
    packed::{PackedMatrices, Weight},
    segments::{Pattern, RowSegments, Segment, one_adapter, sizes},
};

/// Frozen weight `[out, in]`, in compute dtype or packed, and bias `[out]` in compute dtype. Experts have a weight each
/// and share the bias.
pub struct Base {
    pub weight: Weight,
    pub bias: Option<Tensor>,
}

/// One logical adapter on output columns `out`.
pub struct Part {
    /// Columns of the output that it adds to.
    pub out: Range<i64>,
    /// Its rows of A.
    pub ranks: Range<i64>,
    /// alpha / rank, or alpha / √rank.
    pub scaling: f64,
    /// B `[out, rank]`.
    pub b: Matrices,
}

/// A session's adapter of one linear layer, gathered, in compute dtype.
pub struct BoundAdapter {
    /// `[Σ rank, in]`
    pub a: Matrices,
    pub parts: Vec<Part>,
    /// Acts on rows that have keys; see [`RowSegments::with_keys`].
    pub dropout: Option<Dropout>,
    /// Scale the sum of base and adapter by row (DoRA); on dense layers, without dropout.
    pub magnitudes: Option<Magnitudes>,
    /// fp32 views to which the gradients are added.
    pub gradient: AdapterGradient,
}

impl BoundAdapter {
    /// The columns of h, those of neighbouring parts with the same factor together, and the factor.
    fn scales(&self) -> Vec<(Range<i64>, f64)> {
        let mut scales: Vec<(Range<i64>, f64)> = Vec::new();
        for Part { ranks, scaling, .. } in &self.parts {
            match scales.last_mut() {
                Some((before, factor)) if factor == scaling => before.end = ranks.end,
                _ => scales.push((ranks.clone(), *scaling)),
            }
        }
        scales
    }

    /// Multiplies `hidden` `[rows, Σ rank]` with the parts' factors, in place.
    fn scale(&self, hidden: &Tensor) {
        for (ranks, factor) in self.scales() {
            let _ = columns(hidden, &ranks).g_mul_scalar_(factor);
        }
    }
}

/// Sums of an adapter's gradients: views of A's shape and of each B's.
pub struct AdapterGradient {
    pub a: Matrices,
    pub b: Vec<Matrices>,
}

/// A linear layer, or as many of the same widths as there are experts.
pub struct Linear {
    /// Frozen layers whose outputs lie side by side in the layer's own: one, or the split parts of a projection.
    pub bases: Vec<Base>,
    /// The adapters of the pass, by the index that segments have; `None` for one that does not target this layer.
    pub adapters: Vec<Option<BoundAdapter>>,
}

impl Linear {
    /// Width of the output.
    pub fn output(&self) -> i64 {
        self.bases.iter().map(|base| base.weight.rows()).sum()
    }

    /// Width of the input.
    pub fn input(&self) -> i64 {
        self.bases.first().map_or(0, |base| base.weight.columns())
    }
}

/// A linear layer with the segments of the rows that go through it.
#[derive(Clone, Copy)]
pub struct GroupedLinear<'a> {
    pub linear: &'a Linear,
    pub segments: &'a RowSegments,
}

impl<'a> GroupedLinear<'a> {
    /// The adapter of a segment, if it has one on this layer.
    fn adapter(self, segment: &Segment) -> Option<&'a BoundAdapter> {
        self.linear.adapters.get(segment.adapter?)?.as_ref()
    }

    /// The adapters of the layer that some segment names, rows or not.
    fn named_adapters(self) -> impl Iterator<Item = &'a BoundAdapter> {
        let named = self.segments.pattern().iter().flatten();
        named.filter_map(move |&adapter| self.linear.adapters.get(adapter)?.as_ref())
    }

    /// The segments that have rows and an adapter on this layer.
    fn adapted(self) -> impl Iterator<Item = (Segment, &'a BoundAdapter)> {
        self.segments.iter().filter_map(move |segment| Some((segment.clone(), self.adapter(&segment)?)))
    }

    /// Those of one base.
    fn adapted_of(self, base: usize) -> impl Iterator<Item = (Segment, &'a BoundAdapter)> {
        let own = self.segments.of_base(base);
        own.filter_map(move |segment| Some((segment.clone(), self.adapter(&segment)?)))
    }

    /// `[rows, largest Σ rank]` beside `x`, `None` without adapters. A segment uses its adapter's leading columns.
    fn lora_hidden_like(self, x: &Tensor) -> Option<Buffer> {
        let ranks = self.named_adapters().map(|adapter| adapter.a.rows()).max()?;
        Some(Buffer::empty(&[x.size()[0], ranks], x.kind(), x.device()))
    }
}

/// h of an adapter's rows: the leading columns.
fn hidden_of(h: &Tensor, rows: &Range<i64>, adapter: &BoundAdapter) -> Tensor {
    columns(&rows_of(h, rows), &(0..adapter.a.rows()))
}

/// y += h·Bᵀ of every adapted row of `layer`, by libtorch's GEMMs.
fn add_hidden(y: &Tensor, h: &Tensor, layer: GroupedLinear) {
    for (segment, adapter) in layer.adapted() {
        let (y, h) = (rows_of(y, &segment.rows), hidden_of(h, &segment.rows, adapter));
        for part in &adapter.parts {
            let b = part.b.of(segment.base).tr();
            let _ = columns(&y, &part.out).addmm_(&columns(&h, &part.ranks), &b);
        }
    }
}

/// One way to compute the four operations of a layer; see the functions of the same names.
trait Backend {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>);
    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer>;
    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad);
    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor);
}

/// The backend for `rows` `[rows, …]` of a layer.
fn backend<'a>(rows: &Tensor, layer: GroupedLinear<'a>) -> Box<dyn Backend + 'a> {
    match Dora::of(layer, || without_magnitudes(rows, layer)) {
        Some(dora) => Box::new(dora),
        None => without_magnitudes(rows, layer),
    }
}

fn without_magnitudes<'a>(rows: &Tensor, layer: GroupedLinear<'a>) -> Box<dyn Backend + 'a> {
    if let Some(dropped) = Dropped::of(rows, layer) {
        return Box::new(dropped);
    }
    if let Some(grouped) = Grouped::of(rows, layer) {
        return Box::new(grouped);
    }
    if let Some(invariant) = Invariant::of(rows, layer) {
        return Box::new(invariant);
    }
    match Tiled::of(rows, layer) {
        Some(tiled) => Box::new(tiled),
        None => Box::new(Plain(layer)),
    }
}

/// True if segments of any length cost alike. With libtorch's GEMMs on a CPU they do not: oneDNN compiles and keeps a
/// kernel for each number of rows, except where every segment is short.
pub fn takes_any_rows(x: &Tensor) -> bool {
    x.device() != Device::Cpu || tiled::multiplier(x).is_some() || batch_invariant::is_on(x)
}

/// x·wᵀ `[rows, out]` of x `[rows, in]` and a frozen w `[out, in]`, both in compute dtype.
pub fn product(x: &Tensor, w: &Tensor) -> Tensor {
    if !batch_invariant::is_on(x) {
        return x.mm(&w.tr());
    }
    let out = Tensor::empty([x.size()[0], w.size()[0]], (x.kind(), x.device()));
    dots::multiply(x, w, Start::NOTHING, &out);
    out
}

/// [`product`], written to `out` `[rows, out]`.
pub fn product_to(out: &Tensor, x: &Tensor, w: &Tensor) {
    if batch_invariant::is_on(x) {
        dots::multiply(x, w, Start::NOTHING, out);
    } else {
        let _ = x.mm_out(out, &w.tr());
    }
}

/// y `[rows, out]` from x `[rows, in]`, plus `add` `[rows, out]` (the residual branch), and s·h `[rows, Σ rank]` where
/// there are adapters.
pub fn forward(x: &Tensor, layer: GroupedLinear, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
    let _span = crate::trace::operation("linear.forward");
    backend(x, layer).forward(x, add)
}

/// s·h `[rows, Σ rank]`, recomputed for a backward that did not keep it.
pub fn lora_hidden(x: &Tensor, layer: GroupedLinear) -> Option<Buffer> {
    backend(x, layer).lora_hidden(x)
}

/// g `[rows, Σ rank]`, passed from [`backward_input`] to [`backward_parameters`].
pub struct LoraHiddenGrad(Option<Buffer>);

/// dx `[rows, in]` from dy `[rows, out]`, and g for [`backward_parameters`].
pub fn backward_input(d_y: &Tensor, layer: GroupedLinear) -> (Buffer, LoraHiddenGrad) {
    let _span = crate::trace::operation("linear.backward_input");
    backend(d_y, layer).backward_input(d_y)
}

/// Adds the adapters' gradients from dy, x, what [`forward`] returned and what [`backward_input`] did. A function of
/// its own because x may become known only with dx, as SwiGLU's output does.
pub fn backward_parameters(
    d_y: &Tensor,
    x: &Tensor,
    h: Option<&Tensor>,
    LoraHiddenGrad(g): &LoraHiddenGrad,
    layer: GroupedLinear,
) {
    let _span = crate::trace::operation("linear.backward_parameters");
    if let (Some(h), Some(g)) = (h, g) {
        backend(d_y, layer).backward_parameters(d_y, x, h, g);
    }
}

/// Each base with its output columns.
fn with_columns(bases: &[Base]) -> impl Iterator<Item = (&Base, Range<i64>)> {
    bases.iter().scan(0, |end, base| {
        let start = *end;
        *end += base.weight.rows();
        Some((base, start..*end))
    })
}

/// The matrix of `base`.
fn matrix_of(all: &Matrices, base: usize) -> Matrix<'_, bf16> {
    match all {
        Matrices::Shared(matrix) => Matrix::of(matrix),
        Matrices::Each(all) => Matrix::one_of(all, base),
    }
}

fn rows_of(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(0, range.start, range.end - range.start)
}

fn columns(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(1, range.start, range.end - range.start)
}

/// sum += a·b, where the sum is fp32 (or fp64) and a, b are in compute dtype: fp32 and bf16, or the same kind.
fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) {
    let mut sum = sum.shallow_clone();
    if a.kind() == sum.kind() {
        let _ = sum.addmm_(a, b);
    } else if sum.device() == Device::Cpu {
        let _ = sum.g_add_(&a.mm(b));
    } else {
        // No rounding of the product and no pass of its own. libtorch has it for CUDA alone: tests/gpu.sh holds it
        // against the CPU.
        let _ = sum.addmm_dtype_out(&sum, a, b, sum.kind());
    }
}
