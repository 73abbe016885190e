//! SwiGLU (Shazeer, 2020) over the fused gate|up output, with the sigmoid in fp32.
//!
//! forward   s = g·σ(g),  y = s ∘ u
//! backward  du = dy ∘ s,  dg = dy ∘ u ∘ (σ(g) + s·(1 − σ(g)))

use super::{
    Buffer,
    cpu::{Element, Real, Rows, dispatch, each_row},
    wide,
};
use tch::{Device, Tensor};

/// y [tokens, n] from gate|up [tokens, 2n].
pub fn forward(gate_up: &Tensor) -> Buffer {
    let _span = crate::trace::operation("swiglu.forward");
    let (tokens, n) = (gate_up.size()[0], gate_up.size()[1] / 2);
    let y = Buffer::empty(&[tokens, n], gate_up.kind(), gate_up.device());
    if gate_up.device() != Device::Cpu {
        torch::forward(gate_up, &y);
    } else {
        dispatch!(gate_up.kind(), E => rows::forward::<E>(gate_up, &y));
    }
    y
}

/// The gradient of gate|up [tokens, 2n], in its memory, and y again, in that of dy [tokens, n].
pub fn backward(d_y: Buffer, gate_up: Buffer) -> (Buffer, Buffer) {
    let _span = crate::trace::operation("swiglu.backward");
    if gate_up.device() != Device::Cpu {
        torch::backward(&d_y, &gate_up);
    } else {
        dispatch!(gate_up.kind(), E => rows::backward::<E>(&d_y, &gate_up));
    }
    (gate_up, d_y)
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    pub fn forward<E: Element>(gate_up: &Tensor, y: &Tensor) {
        each_row::<E, _, _, _>(
            [Rows::of(gate_up)],
            [Rows::of(y)],
            [],
            #[inline(always)]
            |_, [gate_up], [y], []| {
                let (gate, up) = gate_up.split_at(y.len());
                activate(gate, up, y);
            },
        );
    }

    pub fn backward<E: Element>(d_y: &Tensor, gate_up: &Tensor) {
        each_row::<E, _, _, _>(
            [],
            [Rows::of(gate_up), Rows::of(d_y)],
            [],
            #[inline(always)]
            |_, [], [gate_up, d_y], []| {
                let (gate, up) = gate_up.split_at_mut(d_y.len());
                gradient(gate, up, d_y);
            },
        );
    }

    #[inline(always)]
    fn activate<E: Element>(gate: &[E], up: &[E], y: &mut [E]) {
        for ((gate, up), y) in gate.iter().zip(up).zip(y) {
            let gate = gate.wide();
            *y = E::narrow(gate * gate.sigmoid() * up.wide());
        }
    }

    /// g, u and dy become dg, du and y.
    #[inline(always)]
    fn gradient<E: Element>(gate: &mut [E], up: &mut [E], d_y: &mut [E]) {
        for ((gate, up), d_y) in gate.iter_mut().zip(up).zip(d_y) {
            let (g, u, d) = (gate.wide(), up.wide(), d_y.wide());
            let sigmoid = g.sigmoid();
            let silu = g * sigmoid;
            *gate = E::narrow(d * u * (sigmoid + silu * (E::Wide::ONE - sigmoid)));
            *up = E::narrow(d * silu);
            *d_y = E::narrow(silu * u);
        }
    }
}

/// The same in libtorch's operations, for devices without kernels.
mod torch {
    use super::*;

    fn halves(gate_up: &Tensor) -> (Tensor, Tensor) {
        let kind = wide(gate_up.kind());
        let n = gate_up.size()[1] / 2;
        (gate_up.narrow(1, 0, n).to_kind(kind), gate_up.narrow(1, n, n).to_kind(kind))
    }

    pub fn forward(gate_up: &Tensor, y: &Tensor) {
        let (gate, up) = halves(gate_up);
        y.shallow_clone().copy_(&gate.silu().g_mul_(&up));
    }

    pub fn backward(d_y: &Tensor, gate_up: &Tensor) {
        let (gate, up) = halves(gate_up);
        let n = gate.size()[1];
        let d = d_y.to_kind(gate.kind());
        let sigmoid = gate.sigmoid();
        let silu = gate * &sigmoid;
        let slope = &sigmoid + &silu * (1.0 - &sigmoid);
        // All before the first is written: where the kinds are the same, `gate`, `up` and `d` are what is written to.
        let (d_gate, d_up, y) = (&d * &up * slope, &d * &silu, silu * &up);
        gate_up.narrow(1, 0, n).copy_(&d_gate);
        gate_up.narrow(1, n, n).copy_(&d_up);
        d_y.shallow_clone().copy_(&y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, autograd, distance, everywhere, leaf};
    use tch::Kind;

    #[test]
    fn matches_autograd() {
        for (kind, tolerance) in KINDS {
            for (tokens, n) in [(0, 7), (1, 7), (6, 7), (3, 1), (40, 1000)] {
                let rounded = |t: Tensor| t.detach().to_kind(kind).to_kind(Kind::Double);
                let gate_up = rounded(leaf(&[tokens, 2 * n]) * 3.0).set_requires_grad(true);
                let d_y = rounded(leaf(&[tokens, n]));
                let y = gate_up.narrow(1, 0, n).silu() * gate_up.narrow(1, n, n);
                let expected = autograd(&y, &d_y, &[&gate_up]).remove(0);
                let inputs = || (d_y.to_kind(kind).copy(), gate_up.detach().to_kind(kind).copy());
                let near = |ours: &Tensor, exact: &Tensor| {
                    assert_eq!(ours.kind(), kind);
                    // Relative to the largest value: products of three normal values reach far.
                    let most = if tokens == 0 { 1.0 } else { 1.0 + exact.abs().max().double_value(&[]) };
                    let off = distance(ours, exact) / most;
                    assert!(off < tolerance, "{kind:?} {tokens} {n}: {off}");
                };
                everywhere(|| {
                    let (d, both) = inputs();
                    near(&forward(&both), &y);
                    let (d_both, again) = backward(d.into(), both.into());
                    near(&d_both, &expected);
                    near(&again, &y);
                });
                let (d, both) = inputs();
                let ours = d.empty_like();
                torch::forward(&both, &ours);
                near(&ours, &y);
                torch::backward(&d, &both);
                near(&both, &expected);
                near(&d, &y);
            }
        }
    }

    #[test]
    fn far_gates_are_off_or_linear() {
        for (kind, _) in KINDS {
            let gate_up = Tensor::from_slice(&[-1e4f32, 1e4, -90.0, 90.0, 2.0, 2.0, 2.0, 2.0]);
            let y = forward(&gate_up.view([1, 8]).to_kind(kind)).to_kind(Kind::Double);
            assert!(distance(&y, &Tensor::from_slice(&[0.0, 2e4, 0.0, 180.0]).view([1, 4])) < 80.0, "{y:?}");
            let d = Tensor::ones([1, 4], (kind, Device::Cpu));
            let (d_both, _) = backward(d.into(), gate_up.view([1, 8]).to_kind(kind).into());
            let exact = Tensor::from_slice(&[0.0, 2.0, 0.0, 2.0, 0.0, 1e4, 0.0, 90.0]).view([1, 8]);
            assert!(distance(&d_both, &exact) < 40.0, "{kind:?}");
            assert!(d_both.isfinite().all().int64_value(&[]) == 1);
        }
    }
}
