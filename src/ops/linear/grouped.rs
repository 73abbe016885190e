//! Groups of rows on a device: one grouped GEMM of libtorch for all groups in place of one GEMM a group, whose starts would take
//! longer than the GEMMs themselves. For layers whose tensors lie one after the other in memory, as those of a region do.

use super::{AdapterGradient, AtOnce, Layers, Part, ThinGradient, add_product, columns, with_columns};
use crate::ops::Buffer;
use std::ops::Range;
use tch::{Kind, Tensor};

/// What the kernels want distances in memory to be a multiple of (elements of 2 bytes).
const ALIGNMENT: i64 = 8;

/// A matrix of each group.
enum Stack {
    /// One that all groups share: [out, in].
    Shared(Tensor),
    /// [groups, out, in]
    Each(Tensor),
}

impl Stack {
    /// `None` where the matrices are not equally far apart.
    fn of<'a>(mut matrices: impl Iterator<Item = &'a Tensor>) -> Option<Self> {
        let first = matrices.next()?;
        let start = first.data_ptr().addr();
        let (mut count, mut step) = (1, 0);
        for matrix in matrices {
            let from_first = matrix.data_ptr().addr().checked_sub(start)?;
            if count == 1 {
                step = from_first;
            }
            if from_first != count * step
                || matrix.size() != first.size()
                || matrix.stride() != first.stride()
            {
                return None;
            }
            count += 1;
        }
        if step == 0 {
            return Some(Self::Shared(first.shallow_clone()));
        }
        let step = i64::try_from(step / first.kind().elt_size_in_bytes()).ok()?;
        let size = [&[count as i64], &first.size()[..]].concat();
        let stride = [&[step], &first.stride()[..]].concat();
        let aligned = stride[..2].iter().all(|stride| stride % ALIGNMENT == 0) && start.is_multiple_of(16);
        if !aligned || stride[2] != 1 {
            return None;
        }
        // What is not all in the first one's memory is refused: others of the same size may lie behind it by chance.
        first.f_as_strided(size, stride, None::<i64>).ok().map(Self::Each)
    }

    /// x·Wᵀ `[rows, out]`
    fn apply(&self, x: &Tensor, ends: &Tensor) -> Tensor {
        match self {
            Self::Shared(w) => x.mm(&w.tr()),
            Self::Each(w) => grouped(x, &w.transpose(1, 2), ends),
        }
    }

    /// dy·W `[rows, in]`
    fn apply_transposed(&self, d_y: &Tensor, ends: &Tensor) -> Tensor {
        match self {
            Self::Shared(w) => d_y.mm(w),
            Self::Each(w) => grouped(d_y, w, ends),
        }
    }

    /// Adds dyᵀ·x of each group's rows, where self are the sums.
    fn add(&self, d_y: &Tensor, x: &Tensor, groups: &AtOnce) {
        match self {
            Self::Shared(sum) => add_product(sum, &d_y.tr(), x),
            Self::Each(sum) => {
                let mut product = grouped(&d_y.tr(), x, &groups.ends);
                if let Some(empty) = &groups.empty {
                    // Whether a group without rows is written to is the kernel's own affair.
                    let _ = product.index_fill_(0, empty, 0.0);
                }
                let _ = sum.shallow_clone().g_add_(&product);
            }
        }
    }
}

/// libtorch's `_grouped_mm`, whose `mat2` is [groups, n, m]; or [rows, m] where the rows are what is summed over.
fn grouped(mat1: &Tensor, mat2: &Tensor, ends: &Tensor) -> Tensor {
    mat1.internal_grouped_mm(mat2, Some(ends), None, None)
}

/// An adapter's B, with where it is.
struct StackedPart<'a> {
    part: &'a Part,
    b: Stack,
    d_b: Stack,
}

/// The layers of all groups.
pub(super) struct Stacked<'a> {
    groups: &'a AtOnce,
    bases: Vec<(Stack, Range<i64>)>,
    adapter: Option<StackedAdapter<'a>>,
}

struct StackedAdapter<'a> {
    a: Stack,
    d_a: Stack,
    parts: Vec<StackedPart<'a>>,
    scaling: f64,
}

impl<'a> Stacked<'a> {
    /// `None` where one GEMM after another has to do.
    pub(super) fn of(rows: &Tensor, layers: Layers<'a>) -> Option<Self> {
        let groups = layers.groups.at_once.as_ref()?;
        let first = layers.layers.first()?;
        let all = layers.layers;
        if rows.kind() != Kind::BFloat16 || rows.size()[0] == 0 || all.len() < 2 {
            return None;
        }
        let ranks = layers.ranks().unwrap_or(0);
        if [first.input(), first.output(), ranks].iter().any(|width| width % ALIGNMENT != 0) {
            return None;
        }
        let mut bases = Vec::with_capacity(first.bases.len());
        for (i, (base, range)) in with_columns(&first.bases).enumerate() {
            if base.bias.is_some() || range.start % ALIGNMENT != 0 {
                return None;
            }
            bases.push((Stack::of(all.iter().map(|layer| &layer.bases[i].weight))?, range));
        }
        let adapter = match &first.adapter {
            None => None,
            Some((adapter, _)) => {
                let both = || all.iter().filter_map(|layer| layer.adapter.as_ref());
                let gradients = || both().map(|(_, gradient): &(_, AdapterGradient)| gradient);
                let mut parts = Vec::with_capacity(adapter.parts.len());
                for (i, part) in adapter.parts.iter().enumerate() {
                    if [part.out.start, part.ranks.start].iter().any(|start| start % ALIGNMENT != 0) {
                        return None;
                    }
                    let b = Stack::of(both().map(|(adapter, _)| &adapter.parts[i].b))?;
                    parts.push(StackedPart {
                        part,
                        b,
                        d_b: Stack::of(gradients().map(|gradient| &gradient.b[i]))?,
                    });
                }
                let a = Stack::of(both().map(|(adapter, _)| &adapter.a))?;
                let d_a = Stack::of(gradients().map(|gradient| &gradient.a))?;
                Some(StackedAdapter { a, d_a, parts, scaling: adapter.scaling })
            }
        };
        Some(Self { groups, bases, adapter })
    }

    /// See [`super::forward`].
    pub(super) fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let _span = crate::trace::operation("linear.forward_at_once");
        let outputs: Vec<Tensor> =
            self.bases.iter().map(|(base, _)| base.apply(x, &self.groups.ends)).collect();
        let mut y = one(outputs);
        if let Some(add) = add {
            let _ = y.g_add_(add);
        }
        let h = self.thin(x);
        for (adapter, h) in self.adapter.iter().zip(&h) {
            for StackedPart { part, b, .. } in &adapter.parts {
                let _ = columns(&y, &part.out).g_add_(&b.apply(&columns(h, &part.ranks), &self.groups.ends));
            }
        }
        (y.into(), h)
    }

    /// See [`super::thin`].
    pub(super) fn thin(&self, x: &Tensor) -> Option<Buffer> {
        let adapter = self.adapter.as_ref()?;
        Some(adapter.a.apply(x, &self.groups.ends).g_mul_scalar_(adapter.scaling).into())
    }

    /// See [`super::backward_input`].
    pub(super) fn backward_input(&self, d_y: &Tensor) -> (Buffer, ThinGradient) {
        let mut parts = self
            .bases
            .iter()
            .map(|(base, range)| base.apply_transposed(&columns(d_y, range), &self.groups.ends));
        let mut d_x = parts.next().unwrap_or_else(|| d_y.zeros_like());
        for part in parts {
            let _ = d_x.g_add_(&part);
        }
        let g = self.adapter.as_ref().map(|adapter| {
            let of = |StackedPart { part, b, .. }: &StackedPart| {
                b.apply_transposed(&columns(d_y, &part.out), &self.groups.ends)
            };
            let g = one(adapter.parts.iter().map(of).collect()).g_mul_scalar_(adapter.scaling);
            let _ = d_x.g_add_(&adapter.a.apply_transposed(&g, &self.groups.ends));
            g.into()
        });
        (d_x.into(), ThinGradient(g))
    }

    /// See [`super::backward_parameters`].
    pub(super) fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        if let Some(adapter) = &self.adapter {
            for StackedPart { part, d_b, .. } in &adapter.parts {
                d_b.add(&columns(d_y, &part.out), &columns(h, &part.ranks), self.groups);
            }
            adapter.d_a.add(g, x, self.groups);
        }
    }
}

/// Side by side.
fn one(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1) }
}
