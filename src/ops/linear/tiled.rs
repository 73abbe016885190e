//! GroupedLinear in bf16 on a CPU that multiplies tiles: an adapter's part of an output is one more term of the sum that makes it, and
//! a group of rows costs no more than what it computes.

use super::{
    Adapter, Base, GroupedLinear, Linear, LoraHiddenGrad, Matrices, Part, columns, rows_of, with_columns,
};
use crate::{
    device::has_kernels,
    ops::{
        Buffer,
        cpu::{
            Isa,
            matmul::{Matrix, Operand, Output, Term, multiply},
            tile::Multiplier,
        },
    },
};
use half::bf16;
use std::ops::Range;
use tch::{Kind, Tensor};

/// What multiplies x, if that is bf16 on a CPU that has such a thing.
pub(super) fn multiplier(x: &Tensor) -> Option<Multiplier> {
    let fits = x.kind() == Kind::BFloat16 && has_kernels(x);
    fits.then(Isa::current).and_then(Multiplier::of)
}

/// Where all groups have fewer rows, as where an answer is generated, packing a weight was measured to cost more than it wins (in
/// vectors; tile registers pack the same).
const FEWEST_ROWS: i64 = 8;

/// The layers, on such a machine.
pub(super) struct Tiled<'a> {
    pub multiplier: Multiplier,
    pub layers: GroupedLinear<'a>,
}

impl<'a> Tiled<'a> {
    /// `None` where libtorch's products have to do, or do better.
    pub(super) fn of(rows: &Tensor, layers: GroupedLinear<'a>) -> Option<Self> {
        let multiplier = multiplier(rows)?;
        let is_worth_it = layers.with_rows().any(|(_, rows)| rows.end - rows.start >= FEWEST_ROWS);
        is_worth_it.then_some(Self { multiplier, layers })
    }

    fn multiply(&self, terms: &[Term], out: Output) {
        match self.multiplier {
            #[cfg(target_arch = "x86_64")]
            Multiplier::Registers(machine) => multiply(machine, terms, out),
            #[cfg(target_arch = "x86_64")]
            Multiplier::Vectors(machine) => multiply(machine, terms, out),
            #[cfg(test)]
            Multiplier::Emulated(machine) => multiply(machine, terms, out),
        }
    }

    /// See [`super::forward`].
    pub(super) fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let linear = self.layers.linear;
        let y = Buffer::empty(&[x.size()[0], linear.output()], x.kind(), x.device());
        let h = self.layers.lora_hidden_like(x);
        let segments = segments(linear);
        let [x_rows, y_rows] = [x, &*y].map(Matrix::of);
        let [h_rows, add_rows] = [h.as_deref(), add].map(|tensor| tensor.map(Matrix::of));
        for (group, rows) in self.layers.with_rows() {
            let range = usizes(&rows);
            let (x, h) = (x_rows.rows(&range), h_rows.map(|h| h.rows(&range)));
            if let Some((adapter, h)) = linear.adapter().zip(h) {
                self.lora_hidden_of(x, group, adapter, h);
            }
            for Segment { out, base, at, part } in &segments {
                let to = y_rows.rows(&range).columns(&usizes(out));
                let added = add_rows.map(|add| add.rows(&range).columns(&usizes(out)));
                let weight = matrix(&base.weight, group).rows(&usizes(at));
                let bias = base.bias.as_ref().map(|bias| bias.narrow(0, at.start, at.end - at.start));
                let mut terms = vec![by_columns(x, weight)];
                if let Some(((part, at), h)) = part.as_ref().zip(h) {
                    let b = matrix(&part.b, group).rows(&usizes(at));
                    terms.push(by_columns(h.columns(&usizes(&part.ranks)), b));
                }
                let bias_rows = || bias.as_ref().map(|bias| Matrix::repeated(bias, range.len()));
                let start = added.or_else(bias_rows);
                self.multiply(&terms, Output::Rounded { to, start, scale: 1.0 });
                if let (Some(_), Some(bias)) = (add, &bias) {
                    let _ = columns(&rows_of(&y, &rows), out).g_add_(bias);
                }
            }
        }
        (y, h)
    }

    /// See [`super::lora_hidden`].
    pub(super) fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let (adapter, h) = self.layers.linear.adapter().zip(self.layers.lora_hidden_like(x))?;
        let [x, to] = [x, &*h].map(Matrix::of);
        for (group, rows) in self.layers.with_rows() {
            let rows = usizes(&rows);
            self.lora_hidden_of(x.rows(&rows), group, adapter, to.rows(&rows));
        }
        Some(h)
    }

    /// h = s · x·Aᵀ
    fn lora_hidden_of(&self, x: Matrix<bf16>, group: usize, adapter: &Adapter, h: Matrix<bf16>) {
        let to = Output::Rounded { to: h, start: None, scale: adapter.scaling as f32 };
        self.multiply(&[by_columns(x, matrix(&adapter.a, group))], to);
    }

    /// See [`super::backward_input`].
    pub(super) fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let linear = self.layers.linear;
        let d_x = Buffer::empty(&[d_y.size()[0], linear.input()], d_y.kind(), d_y.device());
        let g = self.layers.lora_hidden_like(d_y);
        let [d_y_rows, d_x_rows] = [d_y, &*d_x].map(Matrix::of);
        let g_rows = g.as_deref().map(Matrix::of);
        for (group, rows) in self.layers.with_rows() {
            let rows = usizes(&rows);
            let d_y = d_y_rows.rows(&rows);
            let bases = with_columns(&linear.bases);
            let mut terms: Vec<Term> = bases
                .map(|(base, out)| by_rows(d_y.columns(&usizes(&out)), matrix(&base.weight, group)))
                .collect();
            if let Some((adapter, g)) = linear.adapter().zip(g_rows) {
                let g = g.rows(&rows);
                for part in &adapter.parts {
                    let to = g.columns(&usizes(&part.ranks));
                    let to = Output::Rounded { to, start: None, scale: adapter.scaling as f32 };
                    self.multiply(&[by_rows(d_y.columns(&usizes(&part.out)), matrix(&part.b, group))], to);
                }
                terms.push(by_rows(g, matrix(&adapter.a, group)));
            }
            let to = Output::Rounded { to: d_x_rows.rows(&rows), start: None, scale: 1.0 };
            self.multiply(&terms, to);
        }
        (d_x, LoraHiddenGrad(g))
    }

    /// See [`super::backward_parameters`].
    pub(super) fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        let Some((adapter, gradient)) = &self.layers.linear.adapter else { return };
        let all = [d_y, x, h, g].map(Matrix::of);
        for (group, rows) in self.layers.with_rows() {
            let [d_y, x, h, g] = all.map(|matrix| matrix.rows(&usizes(&rows)));
            for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
                // (hᵀ·dy)ᵀ: what is packed once for each block of rows is then the thin factor.
                let product = summed_rows(h.columns(&usizes(&part.ranks)), d_y.columns(&usizes(&part.out)));
                self.multiply(&[product], Output::AddedTransposed(sums(d_b, group)));
            }
            self.multiply(&[summed_rows(g, x)], Output::Added(sums(&gradient.a, group)));
        }
    }
}

/// That of `group`.
fn matrix(all: &Matrices, group: usize) -> Matrix<'_, bf16> {
    match all {
        Matrices::Shared(matrix) => Matrix::of(matrix),
        Matrices::Each(all) => Matrix::one_of(all, group),
    }
}

/// What is added to for `group`.
fn sums(all: &Matrices, group: usize) -> Matrix<'_, f32> {
    match all {
        Matrices::Shared(sums) => Matrix::sums(sums),
        Matrices::Each(all) => Matrix::one_of_sums(all, group),
    }
}

/// x·wᵀ
fn by_columns<'a>(x: Matrix<'a, bf16>, w: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Of(x), right: Operand::Transposed(w) }
}

/// x·w
fn by_rows<'a>(x: Matrix<'a, bf16>, w: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Of(x), right: Operand::Of(w) }
}

/// aᵀ·b
fn summed_rows<'a>(a: Matrix<'a, bf16>, b: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Transposed(a), right: Operand::Of(b) }
}

/// Columns of an output that one base and at most one adapter make.
struct Segment<'a> {
    out: Range<i64>,
    base: &'a Base,
    /// Its rows.
    at: Range<i64>,
    /// With the rows of its B.
    part: Option<(&'a Part, Range<i64>)>,
}

/// The output's columns, cut where a base or an adapter begins or ends.
fn segments(layer: &Linear) -> Vec<Segment<'_>> {
    let parts = || layer.adapter().into_iter().flat_map(|adapter| &adapter.parts);
    let bases: Vec<(&Base, Range<i64>)> = with_columns(&layer.bases).collect();
    let ranges = || parts().map(|part| &part.out).chain(bases.iter().map(|(_, out)| out));
    let mut offsets: Vec<i64> = ranges().flat_map(|out| [out.start, out.end]).collect();
    offsets.sort_unstable();
    offsets.dedup();
    let within = |out: &Range<i64>, of: &Range<i64>| {
        (of.start <= out.start && out.end <= of.end).then(|| out.start - of.start..out.end - of.start)
    };
    let segment = |pair: &[i64]| {
        let out = pair[0]..pair[1];
        let base = bases.iter().find_map(|(base, of)| Some((*base, within(&out, of)?)));
        let (base, at) = base.unwrap_or_else(|| panic!("an adapter on columns {out:?}, which no base has"));
        let part = parts().find_map(|part| Some((part, within(&out, &part.out)?)));
        Segment { out, base, at, part }
    };
    offsets.windows(2).map(segment).collect()
}

fn usizes(range: &Range<i64>) -> Range<usize> {
    range.start as usize..range.end as usize
}
