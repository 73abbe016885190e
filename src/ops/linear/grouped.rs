//! All segments in one grouped GEMM of libtorch, for devices: starting a GEMM for each segment would take longer than
//! the GEMMs themselves.
//!
//! Adapters of one pass may differ in rank, alpha and columns. Then they are stacked, padded with zeros to the largest
//! rank (A `[segments, ranks, in]`, B `[segments, out, ranks]` over all output columns), which costs a copy of the
//! adapters and, for the columns that an adapter lacks, products with zeros. One adapter is used where it lies.

use super::{
    Backend, Base, BoundAdapter, GroupedLinear, LoraHiddenGrad, Matrices, Part, Weight, add_product, columns,
    segments::OnDevice, with_columns,
};
use crate::ops::Buffer;
use tch::{Kind, Tensor};

/// Distances in memory that the kernels take are multiples of this (elements of 2 bytes).
const ALIGNMENT: i64 = 8;

impl Weight {
    /// True if the kernels take the matrices; decoded ones are dense.
    fn are_aligned(&self) -> bool {
        match self {
            Self::Plain(matrices) => matrices.are_aligned(),
            Self::Packed(_) | Self::Noisy(..) => self.columns() % ALIGNMENT == 0,
        }
    }
}

impl Matrices {
    /// True if the kernels take them.
    fn are_aligned(&self) -> bool {
        let stride = self.tensor().stride();
        let (columns, distances) = (stride[stride.len() - 1], &stride[..stride.len() - 1]);
        let starts = self.tensor().data_ptr().addr().is_multiple_of(16);
        starts && columns == 1 && distances.iter().all(|distance| distance % ALIGNMENT == 0)
    }

    /// x·Wᵀ `[rows, out]`, whose matrices' rows end at `ends`.
    fn apply(&self, x: &Tensor, ends: &Tensor) -> Tensor {
        match self {
            Self::Shared(w) => x.mm(&w.tr()),
            Self::Each(w) => grouped_product(x, &w.transpose(1, 2), ends),
        }
    }

    /// dy·W `[rows, in]`
    fn apply_transposed(&self, d_y: &Tensor, ends: &Tensor) -> Tensor {
        match self {
            Self::Shared(w) => d_y.mm(w),
            Self::Each(w) => grouped_product(d_y, w, ends),
        }
    }

    /// Adds dyᵀ·x of each matrix's rows to self, the sums.
    fn add(&self, d_y: &Tensor, x: &Tensor, segments: &OnDevice) {
        match self {
            Self::Shared(sum) => add_product(sum, &d_y.tr(), x),
            Self::Each(sum) => {
                let _ = sum.shallow_clone().g_add_(&products_of_rows(d_y, x, segments));
            }
        }
    }

    /// The matrices of `bases` bases as one tensor `[bases, rows, columns]`.
    fn of_each(&self, bases: i64) -> Tensor {
        match self {
            Self::Shared(w) => w.unsqueeze(0).expand([bases, -1, -1], false),
            Self::Each(w) => w.shallow_clone(),
        }
    }

    /// Adds products `[bases, rows, columns]`, summed over the bases where these share the matrix.
    fn add_each(&self, products: &Tensor) {
        let mut sums = self.tensor().shallow_clone();
        let _ = match self {
            Self::Shared(_) => sums.g_add_(&products.sum_dim_intlist(0, false, sums.kind())),
            Self::Each(_) => sums.g_add_(products),
        };
    }
}

/// libtorch's `_grouped_mm`, whose `mat2` is `[groups, n, m]`; or `[rows, m]` where the rows are what is summed over.
fn grouped_product(mat1: &Tensor, mat2: &Tensor, ends: &Tensor) -> Tensor {
    mat1.internal_grouped_mm(mat2, Some(ends), None, None)
}

/// dyᵀ·x of each segment's rows: `[segments, out, in]`.
fn products_of_rows(d_y: &Tensor, x: &Tensor, segments: &OnDevice) -> Tensor {
    // The kernel leaves the product of a segment without rows as it was.
    grouped_product(&d_y.tr(), x, &segments.ends).masked_fill_(&segments.is_empty, 0.0)
}

/// A layer computed so.
pub(super) struct Grouped<'a> {
    bases: &'a [Base],
    segments: &'a OnDevice,
    adapters: Adapters<'a>,
}

/// The adapters of a layer's segments.
enum Adapters<'a> {
    None,
    /// All rows have the same.
    One(&'a BoundAdapter),
    Stacked(Stacked<'a>),
}

impl<'a> Grouped<'a> {
    /// `None` where one GEMM after another has to do.
    pub(super) fn of(rows: &Tensor, layer: GroupedLinear<'a>) -> Option<Self> {
        let segments = layer.segments.computed_at_once()?;
        let bases = &layer.linear.bases[..];
        if rows.kind() != Kind::BFloat16 || rows.size()[0] == 0 || !takes(layer) {
            return None;
        }
        let adapters = match (&layer.segments.pattern()[..], layer.named_adapters().next()) {
            (_, None) => Adapters::None,
            ([_], Some(adapter)) => Adapters::One(adapter),
            _ => Adapters::Stacked(Stacked::new(layer, segments)),
        };
        Some(Self { bases, segments, adapters })
    }
}

impl Backend for Grouped<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let _span = crate::trace::operation("linear.forward_at_once");
        let base_ends = &self.segments.base_ends;
        let mut y = one(self.bases.iter().map(|base| base.weight.all().apply(x, base_ends)).collect());
        if let Some(add) = add {
            let _ = y.g_add_(add);
        }
        let h = self.lora_hidden(x);
        match (&self.adapters, &h) {
            (Adapters::One(adapter), Some(h)) => {
                for Part { out, ranks, b, .. } in &adapter.parts {
                    let product = b.apply(&columns(h, ranks), &self.segments.ends);
                    let _ = columns(&y, out).g_add_(&product);
                }
            }
            (Adapters::Stacked(stacked), Some(h)) => {
                let _ = y.g_add_(&grouped_product(h, &stacked.b().transpose(1, 2), &self.segments.ends));
            }
            _ => {}
        }
        (y.into(), h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        match &self.adapters {
            Adapters::None => None,
            Adapters::One(adapter) => {
                let h = adapter.a.apply(x, &self.segments.ends);
                adapter.scale(&h);
                Some(h.into())
            }
            Adapters::Stacked(stacked) => {
                let a = stacked.scaled(&stacked.a(), &stacked.scales().unsqueeze(3));
                Some(grouped_product(x, &a.transpose(1, 2), &self.segments.ends).into())
            }
        }
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let mut parts = with_columns(self.bases).map(|(base, range)| {
            base.weight.all().apply_transposed(&columns(d_y, &range), &self.segments.base_ends)
        });
        let mut d_x = parts.next().unwrap_or_else(|| d_y.zeros_like());
        for part in parts {
            let _ = d_x.g_add_(&part);
        }
        let ends = &self.segments.ends;
        let g = match &self.adapters {
            Adapters::None => None,
            Adapters::One(adapter) => {
                let of = |Part { out, b, .. }: &Part| b.apply_transposed(&columns(d_y, out), ends);
                let g = one(adapter.parts.iter().map(of).collect());
                adapter.scale(&g);
                let _ = d_x.g_add_(&adapter.a.apply_transposed(&g, ends));
                Some(g.into())
            }
            Adapters::Stacked(stacked) => {
                let b = stacked.scaled(&stacked.b(), &stacked.scales().unsqueeze(2));
                let g = grouped_product(d_y, &b, ends);
                let _ = d_x.g_add_(&grouped_product(&g, &stacked.a(), ends));
                Some(g.into())
            }
        };
        (d_x.into(), LoraHiddenGrad(g))
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        match &self.adapters {
            Adapters::None => {}
            Adapters::One(adapter) => {
                for (Part { out, ranks, .. }, d_b) in adapter.parts.iter().zip(&adapter.gradient.b) {
                    d_b.add(&columns(d_y, out), &columns(h, ranks), self.segments);
                }
                adapter.gradient.a.add(g, x, self.segments);
            }
            Adapters::Stacked(stacked) => {
                let d_b = products_of_rows(d_y, h, self.segments);
                stacked.add_gradients(&products_of_rows(g, x, self.segments), &d_b);
            }
        }
    }
}

/// Adapters that differ, one for each segment of a base, padded to the same shape.
struct Stacked<'a> {
    /// By segment of a base; `None` where its rows have none.
    adapters: Vec<Option<&'a BoundAdapter>>,
    bases: i64,
    /// The largest Σ rank, rounded up to what the kernels take.
    ranks: i64,
    input: i64,
    output: i64,
    /// An empty tensor of the adapters' dtype on their device.
    like: Tensor,
}

impl<'a> Stacked<'a> {
    fn new(layer: GroupedLinear<'a>, segments: &OnDevice) -> Self {
        let adapters: Vec<Option<&BoundAdapter>> = layer
            .segments
            .pattern()
            .iter()
            .map(|&adapter| layer.linear.adapters.get(adapter?)?.as_ref())
            .collect();
        let most = adapters.iter().flatten().map(|adapter| adapter.a.rows()).max().unwrap_or(0);
        Self {
            bases: segments.base_ends.size()[0],
            ranks: (most + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT,
            input: layer.linear.input(),
            output: layer.linear.output(),
            like: Tensor::zeros([0], (Kind::BFloat16, segments.ends.device())),
            adapters,
        }
    }

    /// `[bases · adapters, rows, columns]`, `fill`ed by adapter in a view `[bases, rows, columns]` of zeros.
    fn stack(&self, [rows, columns]: [i64; 2], fill: impl Fn(&BoundAdapter, &Tensor)) -> Tensor {
        let count = self.adapters.len() as i64;
        let all =
            self.like.new_zeros([self.bases, count, rows, columns], (self.like.kind(), self.like.device()));
        for (i, adapter) in self.adapters.iter().enumerate() {
            if let Some(adapter) = adapter {
                fill(adapter, &all.select(1, i as i64));
            }
        }
        all.view([self.bases * count, rows, columns])
    }

    fn a(&self) -> Tensor {
        self.stack([self.ranks, self.input], |adapter, to| {
            to.narrow(1, 0, adapter.a.rows()).copy_(&adapter.a.of_each(self.bases));
        })
    }

    /// Over all output columns.
    fn b(&self) -> Tensor {
        self.stack([self.output, self.ranks], |adapter, to| {
            for Part { out, ranks, b, .. } in &adapter.parts {
                let [rows, columns] = [out, ranks].map(|range| range.end - range.start);
                let to = to.narrow(1, out.start, rows).narrow(2, ranks.start, columns);
                to.shallow_clone().copy_(&b.of_each(self.bases));
            }
        })
    }

    /// The parts' factors by rank: `[1, adapters, ranks]`.
    fn scales(&self) -> Tensor {
        let mut scales = vec![0f32; self.adapters.len() * self.ranks as usize];
        for (adapter, own) in self.adapters.iter().zip(scales.chunks_exact_mut((self.ranks as usize).max(1)))
        {
            for (ranks, factor) in adapter.iter().flat_map(|adapter| adapter.scales()) {
                own[ranks.start as usize..ranks.end as usize].fill(factor as f32);
            }
        }
        Tensor::from_slice(&scales).to_device(self.like.device()).view([1, -1, self.ranks])
    }

    /// A stack times `scales`, which has a dimension of 1 where it does not count ranks.
    fn scaled(&self, stack: &Tensor, scales: &Tensor) -> Tensor {
        let size = stack.size();
        let by_adapter = stack.view([self.bases, -1, size[1], size[2]]) * scales;
        by_adapter.to_kind(stack.kind()).view(&size[..])
    }

    /// Adds dA `[segments, ranks, in]` and dB `[segments, out, ranks]` to the adapters' sums.
    fn add_gradients(&self, d_a: &Tensor, d_b: &Tensor) {
        let by_adapter = |products: &Tensor| {
            let size = products.size();
            products.view([self.bases, -1, size[1], size[2]])
        };
        let (d_a, d_b) = (by_adapter(d_a), by_adapter(d_b));
        for (i, adapter) in self.adapters.iter().enumerate() {
            let Some(adapter) = adapter else { continue };
            let (d_a, d_b) = (d_a.select(1, i as i64), d_b.select(1, i as i64));
            adapter.gradient.a.add_each(&d_a.narrow(1, 0, adapter.a.rows()));
            for (Part { out, ranks, .. }, sums) in adapter.parts.iter().zip(&adapter.gradient.b) {
                let [rows, columns] = [out, ranks].map(|range| range.end - range.start);
                sums.add_each(&d_b.narrow(1, out.start, rows).narrow(2, ranks.start, columns));
            }
        }
    }
}

/// True if the kernels take all of the layer's matrices and the rows that go through them.
fn takes(layer: GroupedLinear) -> bool {
    let linear = layer.linear;
    let bases = with_columns(&linear.bases).all(|(base, range)| {
        base.bias.is_none() && range.start % ALIGNMENT == 0 && base.weight.are_aligned()
    });
    // Stacked adapters are aligned.
    let adapters = layer.segments.pattern().len() > 1
        || layer.named_adapters().all(|adapter| {
            let part = |Part { out, ranks, b, .. }: &Part| {
                [out.start, ranks.start].iter().all(|start| start % ALIGNMENT == 0) && b.are_aligned()
            };
            adapter.a.rows() % ALIGNMENT == 0 && adapter.a.are_aligned() && adapter.parts.iter().all(part)
        });
    [linear.input(), linear.output()].iter().all(|width| width % ALIGNMENT == 0) && bases && adapters
}

/// Joins `parts` along their columns.
fn one(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1) }
}
