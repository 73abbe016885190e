//! SwiGLU (Shazeer, 2020) over the fused gate|up output, with the sigmoid in fp32; each token's output times a scale,
//! where it has one: the weight with which a router chose an expert.
//!
//! forward   s = g·σ(g),  y = c · s ∘ u
//! backward  du = c · dy ∘ s,  dg = c · dy ∘ u ∘ (σ(g) + s·(1 − σ(g))),  dc = Σ dy ∘ s ∘ u
//!
//! The scale comes before the matrix that follows, which is linear: W·(c·y) = c·(W·y), and this side has fewer columns.

use super::{
    Buffer, accum_kind,
    cpu::{Element, Real, Rows, dispatch, each_row, lanes},
    cuda,
};
use crate::device::has_kernels;
use tch::Tensor;

/// y [tokens, n] from gate|up [tokens, 2n] and c [tokens, 1] (fp32, or fp64 for fp64 inputs), 1 where there is none.
pub fn forward(gate_up: &Tensor, scale: Option<&Tensor>) -> Buffer {
    let _span = crate::trace::operation("swiglu.forward");
    let (tokens, n) = (gate_up.size()[0], gate_up.size()[1] / 2);
    let y = Buffer::empty(&[tokens, n], gate_up.kind(), gate_up.device());
    if has_kernels(gate_up) {
        dispatch!(gate_up.kind(), E => rows::forward::<E>(gate_up, scale, &y));
    } else if !cuda::kernels(gate_up).is_some_and(|kernels| kernels.swiglu_forward(gate_up, scale, &y)) {
        torch::forward(gate_up, scale, &y);
    }
    y
}

/// Results of [`backward`].
pub struct Gradients {
    /// [tokens, 2n], in the memory of gate|up.
    pub gate_up: Buffer,
    /// y again [tokens, n], in the memory of dy.
    pub y: Buffer,
    /// [tokens, 1], where there was a scale.
    pub scale: Option<Tensor>,
}

/// The gradients from dy [tokens, n] and what forward was given.
pub fn backward(d_y: Buffer, gate_up: Buffer, scale: Option<&Tensor>) -> Gradients {
    let _span = crate::trace::operation("swiglu.backward");
    let d_scale = scale.map(Tensor::empty_like);
    let scales = scale.zip(d_scale.as_ref());
    if has_kernels(&gate_up) {
        dispatch!(gate_up.kind(), E => rows::backward::<E>(&d_y, &gate_up, scales));
    } else if !cuda::kernels(&gate_up).is_some_and(|kernels| kernels.swiglu_backward(&d_y, &gate_up, scales))
    {
        torch::backward(&d_y, &gate_up, scales);
    }
    Gradients { gate_up, y: d_y, scale: d_scale }
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    pub fn forward<E: Element>(gate_up: &Tensor, scale: Option<&Tensor>, y: &Tensor) {
        let (gate_up, y) = (Rows::of(gate_up), Rows::of(y));
        match scale {
            None => each_row::<E, _, _, _>(
                [gate_up],
                [y],
                [],
                #[inline(always)]
                |_, [gate_up], [y], []| activate(gate_up, E::Accum::ONE, y),
            ),
            Some(scale) => each_row::<E, _, _, _>(
                [gate_up],
                [y],
                [Rows::of(scale)],
                #[inline(always)]
                |_, [gate_up], [y], [scale]| activate(gate_up, scale[0], y),
            ),
        }
    }

    pub fn backward<E: Element>(d_y: &Tensor, gate_up: &Tensor, scales: Option<(&Tensor, &Tensor)>) {
        let both = [Rows::of(gate_up), Rows::of(d_y)];
        match scales {
            None => each_row::<E, _, _, _>(
                [],
                both,
                [],
                #[inline(always)]
                |_, [], [gate_up, d_y], []| {
                    gradient(gate_up, d_y, E::Accum::ONE);
                },
            ),
            Some((scale, d_scale)) => each_row::<E, _, _, _>(
                [],
                both,
                [Rows::of(scale), Rows::of(d_scale)],
                #[inline(always)]
                |_, [], [gate_up, d_y], [scale, d_scale]| d_scale[0] = gradient(gate_up, d_y, scale[0]),
            ),
        }
    }

    #[inline(always)]
    fn activate<E: Element>(gate_up: &[E], scale: E::Accum, y: &mut [E]) {
        let (gate, up) = gate_up.split_at(y.len());
        for ((gate, up), y) in gate.iter().zip(up).zip(y) {
            let gate = gate.to_accum();
            *y = E::narrow(gate * gate.sigmoid() * up.to_accum() * scale);
        }
    }

    /// g, u and dy become dg, du and y; dc.
    #[inline(always)]
    fn gradient<E: Element>(gate_up: &mut [E], d_y: &mut [E], scale: E::Accum) -> E::Accum {
        let (gate, up) = gate_up.split_at_mut(d_y.len());
        let mut sums = [E::Accum::ZERO; lanes::LANES];
        let (gates, gate_tail) = gate.as_chunks_mut::<{ lanes::LANES }>();
        let (ups, up_tail) = up.as_chunks_mut::<{ lanes::LANES }>();
        let (d_ys, d_y_tail) = d_y.as_chunks_mut::<{ lanes::LANES }>();
        for ((gate, up), d_y) in gates.iter_mut().zip(ups).zip(d_ys) {
            for i in 0..lanes::LANES {
                sums[i] += element(&mut gate[i], &mut up[i], &mut d_y[i], scale);
            }
        }
        for (i, gate) in gate_tail.iter_mut().enumerate() {
            sums[i] += element(gate, &mut up_tail[i], &mut d_y_tail[i], scale);
        }
        lanes::total(sums)
    }

    /// As [`gradient`], for one column.
    #[inline(always)]
    fn element<E: Element>(gate: &mut E, up: &mut E, d_y: &mut E, scale: E::Accum) -> E::Accum {
        let (g, u, d) = (gate.to_accum(), up.to_accum(), d_y.to_accum());
        let sigmoid = g.sigmoid();
        let silu = g * sigmoid;
        let scaled = d * scale;
        *gate = E::narrow(scaled * u * (sigmoid + silu * (E::Accum::ONE - sigmoid)));
        *up = E::narrow(scaled * silu);
        let y = silu * u;
        *d_y = E::narrow(y * scale);
        d * y
    }
}

/// The same in libtorch's operations, for tensors that no kernel takes.
mod torch {
    use super::*;

    fn halves(gate_up: &Tensor) -> (Tensor, Tensor) {
        let kind = accum_kind(gate_up.kind());
        let n = gate_up.size()[1] / 2;
        (gate_up.narrow(1, 0, n).to_kind(kind), gate_up.narrow(1, n, n).to_kind(kind))
    }

    pub fn forward(gate_up: &Tensor, scale: Option<&Tensor>, y: &Tensor) {
        let (gate, up) = halves(gate_up);
        let mut product = gate.silu().g_mul_(&up);
        if let Some(scale) = scale {
            product = product.g_mul_(scale);
        }
        y.shallow_clone().copy_(&product);
    }

    pub fn backward(d_y: &Tensor, gate_up: &Tensor, scales: Option<(&Tensor, &Tensor)>) {
        let (gate, up) = halves(gate_up);
        let n = gate.size()[1];
        let d = d_y.to_kind(gate.kind());
        let sigmoid = gate.sigmoid();
        let silu = gate * &sigmoid;
        let slope = &sigmoid + &silu * (1.0 - &sigmoid);
        // All before the first is written: where the kinds are the same, `gate`, `up` and `d` are what is written to.
        let (mut d_gate, mut d_up, mut y) = (&d * &up * slope, &d * &silu, silu * &up);
        if let Some((scale, d_scale)) = scales {
            d_scale.shallow_clone().copy_(&(&d * &y).sum_dim_intlist(-1, true, d_scale.kind()));
            (d_gate, d_up, y) = (d_gate * scale, d_up * scale, y * scale);
        }
        gate_up.narrow(1, 0, n).copy_(&d_gate);
        gate_up.narrow(1, n, n).copy_(&d_up);
        d_y.shallow_clone().copy_(&y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, autograd, distance, everywhere, leaf};
    use tch::{Device, Kind};

    #[test]
    fn matches_autograd() {
        let kernels = cuda::on_host::kernels();
        for (kind, tolerance) in KINDS {
            for (tokens, n) in [(0, 7), (1, 7), (6, 7), (3, 1), (0, 8), (1, 8), (40, 1000)] {
                for scaled in [false, true] {
                    equals_autograd(&kernels, kind, tolerance, tokens, n, scaled);
                }
            }
        }
    }

    fn equals_autograd(
        kernels: &cuda::Kernels,
        kind: Kind,
        tolerance: f64,
        tokens: i64,
        n: i64,
        scaled: bool,
    ) {
        let rounded = |t: Tensor| t.detach().to_kind(kind).to_kind(Kind::Double);
        let gate_up = rounded(leaf(&[tokens, 2 * n]) * 3.0).set_requires_grad(true);
        let d_y = rounded(leaf(&[tokens, n]));
        let scale = leaf(&[tokens, 1]).detach().to_kind(accum_kind(kind));
        let exact_scale = scale.to_kind(Kind::Double).set_requires_grad(true);
        let plain = gate_up.narrow(1, 0, n).silu() * gate_up.narrow(1, n, n);
        let (y, inputs) = if scaled {
            (plain * &exact_scale, vec![&gate_up, &exact_scale])
        } else {
            (plain, vec![&gate_up])
        };
        let expected = autograd(&y, &d_y, &inputs);
        let scale = scaled.then_some(&scale);
        let inputs = || (d_y.to_kind(kind).copy(), gate_up.detach().to_kind(kind).copy());
        let near = |ours: &Tensor, exact: &Tensor| {
            // Relative to the largest value: products of three normal values reach far.
            let most = if tokens == 0 { 1.0 } else { 1.0 + exact.abs().max().double_value(&[]) };
            let off = distance(ours, exact) / most;
            assert!(off < tolerance, "{kind:?} {tokens} {n} {scaled}: {off}");
        };
        let all_near = |gate_up: &Tensor, again: &Tensor, d_scale: Option<&Tensor>| {
            assert_eq!((gate_up.kind(), again.kind()), (kind, kind));
            near(gate_up, &expected[0]);
            near(again, &y);
            assert_eq!(d_scale.is_some(), scaled);
            if let Some(d_scale) = d_scale {
                near(d_scale, &expected[1]);
            }
        };
        everywhere(|| {
            let (d, both) = inputs();
            near(&forward(&both, scale), &y);
            let found = backward(d.into(), both.into(), scale);
            all_near(&found.gate_up, &found.y, found.scale.as_ref());
        });
        let (d, both) = inputs();
        let ours = d.empty_like();
        torch::forward(&both, scale, &ours);
        near(&ours, &y);
        let d_scale = scale.map(Tensor::empty_like);
        torch::backward(&d, &both, scale.zip(d_scale.as_ref()));
        all_near(&both, &d, d_scale.as_ref());
        let (d, both) = inputs();
        let taken = kernels.swiglu_forward(&both, scale, &ours);
        assert_eq!(taken, kind != Kind::Double && n % 8 == 0);
        if taken {
            near(&ours, &y);
            assert!(kernels.swiglu_backward(&d, &both, scale.zip(d_scale.as_ref())));
            all_near(&both, &d, d_scale.as_ref());
        }
    }

    #[test]
    fn far_gates_are_off_or_linear() {
        for (kind, _) in KINDS {
            let gate_up = Tensor::from_slice(&[-1e4f32, 1e4, -90.0, 90.0, 2.0, 2.0, 2.0, 2.0]);
            let y = forward(&gate_up.view([1, 8]).to_kind(kind), None).to_kind(Kind::Double);
            assert!(distance(&y, &Tensor::from_slice(&[0.0, 2e4, 0.0, 180.0]).view([1, 4])) < 80.0, "{y:?}");
            let d = Tensor::ones([1, 4], (kind, Device::Cpu));
            let d_both = backward(d.into(), gate_up.view([1, 8]).to_kind(kind).into(), None).gate_up;
            let exact = Tensor::from_slice(&[0.0, 2.0, 0.0, 2.0, 0.0, 1e4, 0.0, 90.0]).view([1, 8]);
            assert!(distance(&d_both, &exact) < 40.0, "{kind:?}");
            assert!(d_both.isfinite().all().int64_value(&[]) == 1);
        }
    }
}
