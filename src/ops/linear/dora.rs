//! DoRA (Liu et al., 2024), as PEFT has it: y = c ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias with c = m / n, a trained magnitude m of
//! each output and n = ‖W + s·B·A‖ of its row, which counts as a constant in backward.
//!
//! z = x·Wᵀ + h·Bᵀ is what the layer computes without magnitudes, by any backend. m, n and c are fp32 whatever z is, as
//! in PEFT: c lies near 1, and bf16 has no number between 1 and 1.007. Backward: dz = c ⊙ dy, which goes on as there,
//! and dm = Σ over rows of dy ⊙ z / n; z is computed again for it.

use super::{
    Backend, BoundAdapter, GroupedLinear, Linear, LoraHiddenGrad, Part, columns, rows_of, with_columns,
};
use crate::ops::Buffer;
use std::{cell::OnceCell, ops::Range};
use tch::{Kind, Tensor};

/// Elements of W that are added to s·B·A at a time.
const AT_ONCE: i64 = 1 << 20;

/// The magnitudes of an adapter's parts.
#[derive(Debug)]
pub struct Magnitudes {
    /// m `[out of the part]` of each part, in fp32 (or fp64 where the layer is).
    pub parts: Vec<Tensor>,
    /// fp32 sums of their gradients, of the same shapes.
    pub gradients: Vec<Tensor>,
    /// Norms of the rows: see [`row_norms`].
    norms: OnceCell<Vec<Tensor>>,
}

impl Magnitudes {
    pub fn new(parts: Vec<Tensor>, gradients: Vec<Tensor>) -> Self {
        Self { parts, gradients, norms: OnceCell::new() }
    }
}

/// ‖W + s·B·A‖ of each row of the parts of `adapter` on the dense layer `linear`: `[out of the part]` each, in fp32 (or
/// fp64 where the layer is).
pub fn row_norms(linear: &Linear, adapter: &BoundAdapter) -> Vec<Tensor> {
    adapter.parts.iter().map(|part| part_norms(linear, adapter, part)).collect()
}

fn part_norms(linear: &Linear, adapter: &BoundAdapter, part: &Part) -> Tensor {
    let kind = if adapter.a.tensor().kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let a = rows_of(&adapter.a.of(0), &part.ranks).to_kind(kind) * part.scaling;
    let b = part.b.of(0);
    let step = (AT_ONCE / linear.input().max(1)).max(1);
    let mut norms = Vec::new();
    for (base, range) in with_columns(&linear.bases) {
        let (from, to) = (part.out.start.max(range.start), part.out.end.min(range.end));
        if from >= to {
            continue;
        }
        let weight = base.weight.of(0).tensor();
        for first in (from..to).step_by(step as usize) {
            let rows = first..to.min(first + step);
            let of = |tensor: &Tensor, start: i64| {
                rows_of(tensor, &(rows.start - start..rows.end - start)).to_kind(kind)
            };
            let sum = of(&weight, range.start) + of(&b, part.out.start).mm(&a);
            norms.push(sum.norm_scalaropt_dim(2.0, [1], false));
        }
    }
    Tensor::cat(&norms, 0)
}

/// Rows of y and columns that are scaled by m / n.
struct Scaled {
    rows: Range<i64>,
    out: Range<i64>,
    /// `[columns]`
    m: Tensor,
    /// `[columns]`
    n: Tensor,
    /// Sums of the gradient of m: `[columns]`.
    d_m: Tensor,
}

impl Scaled {
    /// Its part of `y` `[rows, out]`.
    fn part_of(&self, y: &Tensor) -> Tensor {
        columns(&rows_of(y, &self.rows), &self.out)
    }

    /// c `[columns]`. What is multiplied by it in place is rounded once.
    fn factor(&self) -> Tensor {
        &self.m / &self.n
    }
}

/// A layer on which an adapter has magnitudes, with the backend of the same layer without them.
pub(super) struct Dora<'a> {
    layer: GroupedLinear<'a>,
    plain: Box<dyn Backend + 'a>,
}

impl<'a> Dora<'a> {
    /// `None` for layers without magnitudes. `plain` makes the backend.
    pub(super) fn of(
        layer: GroupedLinear<'a>,
        plain: impl FnOnce() -> Box<dyn Backend + 'a>,
    ) -> Option<Self> {
        layer.named_adapters().find(|adapter| adapter.magnitudes.is_some())?;
        Some(Self { layer, plain: plain() })
    }

    fn scaled(&self) -> Vec<Scaled> {
        let mut scaled = Vec::new();
        for (segment, adapter) in self.layer.adapted() {
            let Some(magnitudes) = &adapter.magnitudes else { continue };
            let norms = magnitudes.norms.get_or_init(|| row_norms(self.layer.linear, adapter));
            for (i, part) in adapter.parts.iter().enumerate() {
                let [m, n, d_m] =
                    [&magnitudes.parts[i], &norms[i], &magnitudes.gradients[i]].map(Tensor::shallow_clone);
                scaled.push(Scaled { rows: segment.rows.clone(), out: part.out.clone(), m, n, d_m });
            }
        }
        scaled
    }

    /// The bias of the columns `out`, if the layer has one.
    fn bias(&self, out: &Range<i64>) -> Option<Tensor> {
        let biases: Option<Vec<&Tensor>> =
            self.layer.linear.bases.iter().map(|base| base.bias.as_ref()).collect();
        Some(Tensor::cat(&biases?, 0).narrow(0, out.start, out.end - out.start))
    }

    /// c ⊙ dy, in a tensor of its own.
    fn through_scale(&self, d_y: &Tensor) -> Tensor {
        let d_z = d_y.copy();
        for scaled in self.scaled() {
            let _ = scaled.part_of(&d_z).g_mul_(&scaled.factor());
        }
        d_z
    }
}

impl Backend for Dora<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let (mut y, h) = self.plain.forward(x, None);
        for scaled in self.scaled() {
            let (c, mut part) = (scaled.factor(), scaled.part_of(&y));
            let _ = part.g_mul_(&c);
            // The bias is not scaled.
            if let Some(bias) = self.bias(&scaled.out) {
                let _ = part.g_add_(&(bias * (c.ones_like() - &c)));
            }
        }
        if let Some(add) = add {
            let _ = y.g_add_(add);
        }
        (y, h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        self.plain.lora_hidden(x)
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        self.plain.backward_input(&self.through_scale(d_y))
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        self.plain.backward_parameters(&self.through_scale(d_y), x, h, g);
        let (z, _) = self.plain.forward(x, None);
        for scaled in self.scaled() {
            let kind = scaled.d_m.kind();
            let [d_y, z] = [d_y, &*z].map(|tensor| scaled.part_of(tensor).to_kind(kind));
            let z = match self.bias(&scaled.out) {
                Some(bias) => z - bias.to_kind(kind),
                None => z,
            };
            let sums = (d_y * z).sum_dim_intlist(0, false, kind) / &scaled.n;
            let _ = scaled.d_m.shallow_clone().g_add_(&sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        linear::{
            AdapterGradient, Base, Matrices, RowSegments, backward_input, backward_parameters, forward,
            lora_hidden,
        },
        testing::{autograd, distance, leaf},
    };

    /// Two parts of q|k|v, in one GEMM and in three, with and without a bias, against autograd with constant norms.
    #[test]
    fn equals_autograd_with_constant_norms() {
        let places = [(0..4, 0..2, 0.5), (7..10, 2..5, 2.0)];
        for (split, has_bias) in [(false, false), (false, true), (true, false), (true, true)] {
            let (w, a, bias) = (leaf(&[10, 6]), leaf(&[5, 6]), leaf(&[10]));
            let b = [leaf(&[4, 2]), leaf(&[3, 3])];
            let m = [leaf(&[4]), leaf(&[3])];
            let (x, add, d_y) = (leaf(&[7, 6]), leaf(&[7, 10]).detach(), leaf(&[7, 10]).detach());
            let mut y = x.matmul(&w.tr());
            let mut parts = vec![Tensor::zeros([7, 3], (Kind::Double, tch::Device::Cpu))];
            for (((out, ranks, scaling), b), m) in places.iter().zip(&b).zip(&m) {
                let delta: Tensor = b.matmul(&rows_of(&a, ranks)) * *scaling;
                let norm = (rows_of(&w, out) + &delta).norm_scalaropt_dim(2.0, [1], false).detach();
                let z = columns(&y, out) + x.matmul(&delta.tr());
                parts.push(z * (m / norm));
            }
            y = Tensor::cat(&[&parts[1], &columns(&y, &(4..7)), &parts[2]], 1) + &add;
            if has_bias {
                y += &bias;
            }
            let leaves = [&x, &a, &b[0], &b[1], &m[0], &m[1]];
            let gradients = autograd(&y, &d_y, &leaves);

            let _guard = tch::no_grad_guard();
            let shared = |tensor: &Tensor| Matrices::Shared(tensor.detach());
            let sums = |tensor: &Tensor| Matrices::Shared(tensor.detach().zeros_like());
            let part = |i: usize| {
                let (out, ranks, scaling) = places[i].clone();
                Part { out, ranks, scaling, b: shared(&b[i]) }
            };
            let magnitudes = Magnitudes::new(
                m.iter().map(Tensor::detach).collect(),
                m.iter().map(|m| m.detach().zeros_like()).collect(),
            );
            let adapter = BoundAdapter {
                a: shared(&a),
                parts: vec![part(0), part(1)],
                dropout: None,
                magnitudes: Some(magnitudes),
                gradient: AdapterGradient { a: sums(&a), b: vec![sums(&b[0]), sums(&b[1])] },
            };
            let base = |rows: &Range<i64>| Base {
                weight: shared(&rows_of(&w, rows)).into(),
                bias: has_bias.then(|| rows_of(&bias, rows).detach()),
            };
            let bases = if split { vec![0..4, 4..7, 7..10] } else { std::iter::once(0..10).collect() };
            let linear = Linear { bases: bases.iter().map(base).collect(), adapters: vec![Some(adapter)] };
            let layer = GroupedLinear { linear: &linear, segments: &RowSegments::one(7) };
            let x = x.detach();
            let (found_y, h) = forward(&x, layer, Some(&add));
            assert!(distance(&lora_hidden(&x, layer).unwrap(), h.as_deref().unwrap()) < 1e-12);
            let (d_x, g) = backward_input(&d_y, layer);
            backward_parameters(&d_y, &x, h.as_deref(), &g, layer);
            let bound = linear.adapters[0].as_ref().unwrap();
            let of_m = bound.magnitudes.iter().flat_map(|magnitudes| &magnitudes.gradients);
            let of_factors =
                [&bound.gradient.a, &bound.gradient.b[0], &bound.gradient.b[1]].map(|sums| sums.of(0));
            let found: Vec<&Tensor> = [&*found_y, &*d_x].into_iter().chain(&of_factors).chain(of_m).collect();
            let expected: Vec<&Tensor> = std::iter::once(&y).chain(&gradients).collect();
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let apart = distance(found, &expected.detach());
                assert!(apart < 1e-11, "split {split}, bias {has_bias}: {i} is {apart} off");
            }
        }
    }
}
