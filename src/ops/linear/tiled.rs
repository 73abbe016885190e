//! bf16 GEMMs of our own on CPUs with AMX or AVX512-BF16: where all rows of a base have one adapter, its part of an
//! output is one more term of the same fp32 sum, without a pass or a rounding of its own; segments may have any
//! length.

use super::{
    Backend, Base, BoundAdapter, GroupedLinear, LoraHiddenGrad, Matrices, Part, columns, matrix_of,
    packed::WeightFactor, rows_of, with_columns,
};
use crate::{
    device::has_kernels,
    ops::{
        Buffer,
        cpu::{
            Isa,
            matmul::{Output, Term, multiply},
            operand::{Matrix, Operand},
            tile::Multiplier,
        },
    },
};
use half::bf16;
use std::ops::Range;
use tch::{Kind, Tensor};

/// The multiplier of this CPU for x; `None` where x is not bf16 or the CPU has none.
pub(super) fn multiplier(x: &Tensor) -> Option<Multiplier> {
    let fits = x.kind() == Kind::BFloat16 && has_kernels(x);
    fits.then(Isa::current).and_then(Multiplier::of)
}

/// Packing a weight for fewer rows, as in generation, was measured to cost more than it saves (in vectors; tile
/// registers pack the same).
const FEWEST_ROWS: i64 = 8;

/// A layer computed so.
pub(super) struct Tiled<'a> {
    pub multiplier: Multiplier,
    pub layer: GroupedLinear<'a>,
}

impl<'a> Tiled<'a> {
    /// `None` where libtorch's GEMMs have to do, or do better.
    pub(super) fn of(rows: &Tensor, layer: GroupedLinear<'a>) -> Option<Self> {
        let multiplier = multiplier(rows)?;
        let is_worth_it = layer.segments.base_runs().any(|(_, rows)| rows.end - rows.start >= FEWEST_ROWS);
        is_worth_it.then_some(Self { multiplier, layer })
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

    /// The adapter of all rows of `base`, if they have one and the same: then it is a term of the base's own sum.
    fn adapter_of_all(&self, base: usize) -> Option<&'a BoundAdapter> {
        let mut segments = self.layer.segments.of_base(base);
        let only = segments.next().filter(|_| segments.next().is_none())?;
        self.layer.adapter(&only)
    }

    /// h = s · x·Aᵀ of the segments of `base`.
    fn fill_lora_hidden(&self, base: usize, x: Matrix<bf16>, h: Matrix<bf16>) {
        for (segment, adapter) in self.layer.adapted_of(base) {
            let rows = usizes(&segment.rows);
            for (ranks, scale) in adapter.scales() {
                let (ranks, a) = (usizes(&ranks), matrix_of(&adapter.a, base));
                let to = h.rows(&rows).columns(&ranks);
                let to = Output::Rounded { to, start: None, scale: scale as f32 };
                self.multiply(&[by_columns(x.rows(&rows), a.rows(&ranks))], to);
            }
        }
    }

    /// g_part = s · dy[:, part]·B_part of the segments of `base`.
    fn fill_hidden_grad(&self, base: usize, d_y: Matrix<bf16>, g: Matrix<bf16>) {
        for (segment, adapter) in self.layer.adapted_of(base) {
            let rows = usizes(&segment.rows);
            for part in &adapter.parts {
                let to = g.rows(&rows).columns(&usizes(&part.ranks));
                let to = Output::Rounded { to, start: None, scale: part.scaling as f32 };
                let d_y = d_y.rows(&rows).columns(&usizes(&part.out));
                self.multiply(&[by_rows(d_y, matrix_of(&part.b, base))], to);
            }
        }
    }
}

impl Backend for Tiled<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let linear = self.layer.linear;
        let y = Buffer::empty(&[x.size()[0], linear.output()], x.kind(), x.device());
        let h = self.layer.lora_hidden_like(x);
        let [x_rows, y_rows] = [x, &*y].map(Matrix::of);
        let [h_rows, add_rows] = [h.as_deref(), add].map(|tensor| tensor.map(Matrix::of));
        for (group, rows) in self.layer.segments.base_runs() {
            let range = usizes(&rows);
            if let Some(h) = h_rows {
                self.fill_lora_hidden(group, x_rows, h);
            }
            let fused = self.adapter_of_all(group);
            let weights: Vec<WeightFactor> =
                linear.bases.iter().map(|base| base.weight.factor(group)).collect();
            for Columns { out, base, at, part } in columns_of(&linear.bases, fused) {
                let to = y_rows.rows(&range).columns(&usizes(&out));
                let added = add_rows.map(|add| add.rows(&range).columns(&usizes(&out)));
                let weight = weights[base].transposed(&usizes(&at));
                let bias =
                    linear.bases[base].bias.as_ref().map(|bias| bias.narrow(0, at.start, at.end - at.start));
                let mut terms = vec![Term { left: Operand::Of(x_rows.rows(&range)), right: weight }];
                if let Some(((part, at), h)) = part.as_ref().zip(h_rows) {
                    let b = matrix_of(&part.b, group).rows(&usizes(at));
                    terms.push(by_columns(h.rows(&range).columns(&usizes(&part.ranks)), b));
                }
                let bias_rows = || bias.as_ref().map(|bias| Matrix::repeated(bias, range.len()));
                let start = added.or_else(bias_rows);
                self.multiply(&terms, Output::Rounded { to, start, scale: 1.0 });
                if let (Some(_), Some(bias)) = (add, &bias) {
                    let _ = columns(&rows_of(&y, &rows), &out).g_add_(bias);
                }
            }
            let Some(h) = h_rows.filter(|_| fused.is_none()) else { continue };
            for (segment, adapter) in self.layer.adapted_of(group) {
                let rows = usizes(&segment.rows);
                for part in &adapter.parts {
                    let to = y_rows.rows(&rows).columns(&usizes(&part.out));
                    let b = matrix_of(&part.b, group);
                    let product = by_columns(h.rows(&rows).columns(&usizes(&part.ranks)), b);
                    self.multiply(&[product], Output::Rounded { to, start: Some(to), scale: 1.0 });
                }
            }
        }
        (y, h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let h = self.layer.lora_hidden_like(x)?;
        let [x, to] = [x, &*h].map(Matrix::of);
        self.layer.segments.base_runs().for_each(|(base, _)| self.fill_lora_hidden(base, x, to));
        Some(h)
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let linear = self.layer.linear;
        let d_x = Buffer::empty(&[d_y.size()[0], linear.input()], d_y.kind(), d_y.device());
        let g = self.layer.lora_hidden_like(d_y);
        let [d_y_rows, d_x_rows] = [d_y, &*d_x].map(Matrix::of);
        let g_rows = g.as_deref().map(Matrix::of);
        for (group, rows) in self.layer.segments.base_runs() {
            if let Some(g) = g_rows {
                self.fill_hidden_grad(group, d_y_rows, g);
            }
            let fused = self.adapter_of_all(group);
            let range = usizes(&rows);
            let d_y = d_y_rows.rows(&range);
            let weights: Vec<WeightFactor> =
                linear.bases.iter().map(|base| base.weight.factor(group)).collect();
            let bases = with_columns(&linear.bases).zip(&weights);
            let mut terms: Vec<Term> = bases
                .map(|((_, out), weight)| Term {
                    left: Operand::Of(d_y.columns(&usizes(&out))),
                    right: weight.whole(),
                })
                .collect();
            terms.extend(fused.zip(g_rows).map(|(adapter, g)| by_rows_of(adapter, g.rows(&range), group)));
            let to = Output::Rounded { to: d_x_rows.rows(&range), start: None, scale: 1.0 };
            self.multiply(&terms, to);
            let Some(g) = g_rows.filter(|_| fused.is_none()) else { continue };
            for (segment, adapter) in self.layer.adapted_of(group) {
                let rows = usizes(&segment.rows);
                let to = d_x_rows.rows(&rows);
                let to = Output::Rounded { to, start: Some(to), scale: 1.0 };
                self.multiply(&[by_rows_of(adapter, g.rows(&rows), group)], to);
            }
        }
        (d_x, LoraHiddenGrad(g))
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        let all = [d_y, x, h, g].map(Matrix::of);
        for (segment, adapter) in self.layer.adapted() {
            let [d_y, x, h, g] = all.map(|matrix| matrix.rows(&usizes(&segment.rows)));
            let gradient = &adapter.gradient;
            for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
                // (hᵀ·dy)ᵀ: the factor that is packed once for each block of rows is then the one of few columns.
                let product = summed_rows(h.columns(&usizes(&part.ranks)), d_y.columns(&usizes(&part.out)));
                self.multiply(&[product], Output::AddedTransposed(sums(d_b, segment.base)));
            }
            let g = g.columns(&usizes(&(0..adapter.a.rows())));
            self.multiply(&[summed_rows(g, x)], Output::Added(sums(&gradient.a, segment.base)));
        }
    }
}

/// g·A of base `group`: an adapter's part of dx.
fn by_rows_of<'a>(adapter: &'a BoundAdapter, g: Matrix<'a, bf16>, group: usize) -> Term<'a> {
    by_rows(g.columns(&usizes(&(0..adapter.a.rows()))), matrix_of(&adapter.a, group))
}

/// The sums of `group`.
fn sums(all: &Matrices, group: usize) -> Matrix<'_, f32> {
    match all {
        Matrices::Shared(sums) => Matrix::sums(sums),
        Matrices::Each(all) => Matrix::one_of_sums(all, group),
    }
}

/// x·wᵀ
fn by_columns<'a>(x: Matrix<'a, bf16>, w: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Of(x), right: Operand::Transposed(w).into() }
}

/// x·w
fn by_rows<'a>(x: Matrix<'a, bf16>, w: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Of(x), right: Operand::Of(w).into() }
}

/// aᵀ·b
fn summed_rows<'a>(a: Matrix<'a, bf16>, b: Matrix<'a, bf16>) -> Term<'a> {
    Term { left: Operand::Transposed(a), right: Operand::Of(b).into() }
}

/// Columns of an output that one base and at most one part of an adapter make.
struct Columns<'a> {
    out: Range<i64>,
    /// Index of the base.
    base: usize,
    /// Its rows.
    at: Range<i64>,
    /// With the rows of its B.
    part: Option<(&'a Part, Range<i64>)>,
}

/// The output's columns, cut where a base or a part of the adapter begins or ends.
fn columns_of<'a>(bases: &[Base], adapter: Option<&'a BoundAdapter>) -> Vec<Columns<'a>> {
    let parts = || adapter.into_iter().flat_map(|adapter| &adapter.parts);
    let bases: Vec<Range<i64>> = with_columns(bases).map(|(_, out)| out).collect();
    let ranges = || parts().map(|part| &part.out).chain(&bases);
    let mut borders: Vec<i64> = ranges().flat_map(|out| [out.start, out.end]).collect();
    borders.sort_unstable();
    borders.dedup();
    let within = |out: &Range<i64>, of: &Range<i64>| {
        (of.start <= out.start && out.end <= of.end).then(|| out.start - of.start..out.end - of.start)
    };
    let cut = |pair: &[i64]| {
        let out = pair[0]..pair[1];
        let base = bases.iter().enumerate().find_map(|(base, of)| Some((base, within(&out, of)?)));
        let (base, at) = base.unwrap_or_else(|| panic!("an adapter on columns {out:?}, which no base has"));
        let part = parts().find_map(|part| Some((part, within(&out, &part.out)?)));
        Columns { out, base, at, part }
    };
    borders.windows(2).map(cut).collect()
}

fn usizes(range: &Range<i64>) -> Range<usize> {
    range.start as usize..range.end as usize
}
