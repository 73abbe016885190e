//! RowSegments of rows on a device: one grouped GEMM of libtorch for all groups in place of one GEMM a group, whose starts would take
//! longer than the GEMMs themselves.

use super::{
    GroupedLinear, Linear, LoraHiddenGrad, Matrices, Part, add_product, columns, segments::OnDevice,
    with_columns,
};
use crate::ops::Buffer;
use tch::{Kind, Tensor};

/// What the kernels want distances in memory to be a multiple of (elements of 2 bytes).
const ALIGNMENT: i64 = 8;

impl Matrices {
    /// Whether the kernels take them.
    fn are_aligned(&self) -> bool {
        let stride = self.tensor().stride();
        let (columns, distances) = (stride[stride.len() - 1], &stride[..stride.len() - 1]);
        let starts = self.tensor().data_ptr().addr().is_multiple_of(16);
        starts && columns == 1 && distances.iter().all(|distance| distance % ALIGNMENT == 0)
    }

    /// x·Wᵀ `[rows, out]`
    fn apply(&self, x: &Tensor, groups: &OnDevice) -> Tensor {
        match self {
            Self::Shared(w) => x.mm(&w.tr()),
            Self::Each(w) => grouped_product(x, &w.transpose(1, 2), groups),
        }
    }

    /// dy·W `[rows, in]`
    fn apply_transposed(&self, d_y: &Tensor, groups: &OnDevice) -> Tensor {
        match self {
            Self::Shared(w) => d_y.mm(w),
            Self::Each(w) => grouped_product(d_y, w, groups),
        }
    }

    /// Adds dyᵀ·x of each group's rows, where self are the sums.
    fn add(&self, d_y: &Tensor, x: &Tensor, groups: &OnDevice) {
        match self {
            Self::Shared(sum) => add_product(sum, &d_y.tr(), x),
            Self::Each(sum) => {
                // Whether a group without rows is written to is the kernel's own affair.
                let product = grouped_product(&d_y.tr(), x, groups).masked_fill_(&groups.is_empty, 0.0);
                let _ = sum.shallow_clone().g_add_(&product);
            }
        }
    }
}

/// libtorch's `_grouped_mm`, whose `mat2` is [groups, n, m]; or [rows, m] where the rows are what is summed over.
fn grouped_product(mat1: &Tensor, mat2: &Tensor, groups: &OnDevice) -> Tensor {
    mat1.internal_grouped_mm(mat2, Some(&groups.ends), None, None)
}

/// GroupedLinear on a device that computes all groups at once.
pub(super) struct Grouped<'a> {
    linear: &'a Linear,
    groups: &'a OnDevice,
}

impl<'a> Grouped<'a> {
    /// `None` where one GEMM after another has to do.
    pub(super) fn of(rows: &Tensor, layers: GroupedLinear<'a>) -> Option<Self> {
        let (linear, groups) = (layers.linear, layers.groups.computed_at_once()?);
        let fits = rows.kind() == Kind::BFloat16 && rows.size()[0] > 0 && takes(linear);
        fits.then_some(Self { linear, groups })
    }

    /// See [`super::forward`].
    pub(super) fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let _span = crate::trace::operation("linear.forward_at_once");
        let mut y = one(self.linear.bases.iter().map(|base| base.weight.apply(x, self.groups)).collect());
        if let Some(add) = add {
            let _ = y.g_add_(add);
        }
        let h = self.lora_hidden(x);
        if let Some((adapter, h)) = self.linear.adapter().zip(h.as_deref()) {
            for Part { out, ranks, b } in &adapter.parts {
                let _ = columns(&y, out).g_add_(&b.apply(&columns(h, ranks), self.groups));
            }
        }
        (y.into(), h)
    }

    /// See [`super::lora_hidden`].
    pub(super) fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let adapter = self.linear.adapter()?;
        Some(adapter.a.apply(x, self.groups).g_mul_scalar_(adapter.scaling).into())
    }

    /// See [`super::backward_input`].
    pub(super) fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let mut parts = with_columns(&self.linear.bases)
            .map(|(base, range)| base.weight.apply_transposed(&columns(d_y, &range), self.groups));
        let mut d_x = parts.next().unwrap_or_else(|| d_y.zeros_like());
        for part in parts {
            let _ = d_x.g_add_(&part);
        }
        let g = self.linear.adapter().map(|adapter| {
            let of = |Part { out, b, .. }: &Part| b.apply_transposed(&columns(d_y, out), self.groups);
            let g = one(adapter.parts.iter().map(of).collect()).g_mul_scalar_(adapter.scaling);
            let _ = d_x.g_add_(&adapter.a.apply_transposed(&g, self.groups));
            g.into()
        });
        (d_x.into(), LoraHiddenGrad(g))
    }

    /// See [`super::backward_parameters`].
    pub(super) fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        let Some((adapter, gradient)) = &self.linear.adapter else { return };
        for (Part { out, ranks, .. }, d_b) in adapter.parts.iter().zip(&gradient.b) {
            d_b.add(&columns(d_y, out), &columns(h, ranks), self.groups);
        }
        gradient.a.add(g, x, self.groups);
    }
}

/// Whether the kernels take all of the layer's matrices, and what goes through them.
fn takes(linear: &Linear) -> bool {
    let bases = with_columns(&linear.bases).all(|(base, range)| {
        base.bias.is_none() && range.start % ALIGNMENT == 0 && base.weight.are_aligned()
    });
    let adapter = linear.adapter().is_none_or(|adapter| {
        let part = |Part { out, ranks, b }: &Part| {
            [out.start, ranks.start].iter().all(|start| start % ALIGNMENT == 0) && b.are_aligned()
        };
        adapter.a.rows() % ALIGNMENT == 0 && adapter.a.are_aligned() && adapter.parts.iter().all(part)
    });
    [linear.input(), linear.output()].iter().all(|width| width % ALIGNMENT == 0) && bases && adapter
}

/// Side by side.
fn one(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1) }
}
