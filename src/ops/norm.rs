//! RMSNorm (Zhang & Sennrich, 2019), as transformers computes it: statistics in fp32, weights in fp32.
//!
//! forward   r = (mean(x²) + eps)^-½,  y = w ∘ x · r
//! backward  dx = r · (w∘dy) − x · r³/n · Σ(w∘dy∘x)
//!
//! x, y and their gradients are [..., n] in compute dtype, w `[n]`; r is [..., 1] fp32, or fp64 for fp64 inputs
//! (tests). The last dimension is dense; q or k inside a fused q|k|v, [tokens, heads, dim], will do.

use super::{
    Buffer, accum_kind,
    cpu::{Element, Real, Rows, dispatch, each_row, lanes, values},
    cuda,
};
use crate::device::has_kernels;
use tch::Tensor;

/// y and r.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> (Buffer, Tensor) {
    let y = Buffer::like(x);
    let r = forward_into(x, weight, eps, &y);
    (y, r)
}

/// As [`forward`], with y written to `out`, which does not overlap x.
pub fn forward_into(x: &Tensor, weight: &Tensor, eps: f64, out: &Tensor) -> Tensor {
    let _span = crate::trace::operation("norm.forward");
    let mut shape = x.size();
    shape.pop();
    shape.push(1);
    let r = Tensor::empty(shape, (accum_kind(x.kind()), x.device()));
    if has_kernels(x) {
        dispatch!(x.kind(), E => rows::forward::<E>(x, weight, eps, out, &r));
    } else if !cuda::kernels(x).is_some_and(|kernels| kernels.norm_forward(x, weight, eps, out, &r)) {
        torch::forward(x, weight, eps, out, &r);
    }
    r
}

/// y again from saved x and r, for a backward that did not keep it.
pub fn recompute(x: &Tensor, weight: &Tensor, r: &Tensor) -> Buffer {
    let _span = crate::trace::operation("norm.recompute");
    let y = Buffer::like(x);
    if has_kernels(x) {
        dispatch!(x.kind(), E => rows::recompute::<E>(x, weight, r, &y));
    } else if !cuda::kernels(x).is_some_and(|kernels| kernels.norm_recompute(x, weight, r, &y)) {
        torch::normalise(x, weight, r, &y);
    }
    y
}

/// dx from dy, in its memory, and saved x, r; plus `add`, the gradient that reached x past the norm.
pub fn backward(d_y: Buffer, x: &Tensor, weight: &Tensor, r: &Tensor, add: Option<&Tensor>) -> Buffer {
    let _span = crate::trace::operation("norm.backward");
    differentiate(&d_y, x, weight, r, add);
    d_y
}

/// As [`backward`]: turns dy into dx where it is.
pub fn backward_into(d: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor) {
    let _span = crate::trace::operation("norm.backward");
    differentiate(d, x, weight, r, None);
}

fn differentiate(d: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor, add: Option<&Tensor>) {
    if has_kernels(x) {
        dispatch!(x.kind(), E => rows::backward::<E>(d, x, weight, r, add));
    } else if !cuda::kernels(x).is_some_and(|kernels| kernels.norm_backward(d, x, weight, r, add)) {
        torch::backward(d, x, weight, r, add);
    }
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    pub fn forward<E: Element>(x: &Tensor, weight: &Tensor, eps: f64, out: &Tensor, r: &Tensor) {
        let (weight, eps) = (values(weight), E::Accum::of(eps));
        each_row::<E, _, _, _>(
            [Rows::of(x)],
            [Rows::of(out)],
            [Rows::of(r)],
            #[inline(always)]
            |_, [x], [y], [r]| {
                r[0] = statistic(x, &weight, eps);
                normalise(x, &weight, r[0], y);
            },
        );
    }

    pub fn recompute<E: Element>(x: &Tensor, weight: &Tensor, r: &Tensor, out: &Tensor) {
        let weight = values(weight);
        each_row::<E, _, _, _>(
            [Rows::of(x)],
            [Rows::of(out)],
            [Rows::of(r)],
            #[inline(always)]
            |_, [x], [y], [r]| normalise(x, &weight, r[0], y),
        );
    }

    pub fn backward<E: Element>(d: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor, add: Option<&Tensor>) {
        let weight = values(weight);
        let (x, d, r) = (Rows::of(x), Rows::of(d), Rows::of(r));
        match add {
            None => each_row::<E, _, _, _>(
                [x],
                [d],
                [r],
                #[inline(always)]
                |_, [x], [d], [r]| gradient(d, x, &weight, r[0]),
            ),
            Some(add) => each_row::<E, _, _, _>(
                [x, Rows::of(add)],
                [d],
                [r],
                #[inline(always)]
                |_, [x, add], [d], [r]| gradient_plus(d, x, &weight, r[0], add),
            ),
        }
    }

    /// r
    #[inline(always)]
    fn statistic<E: Element>(x: &[E], weight: &[E::Accum], eps: E::Accum) -> E::Accum {
        let squares = lanes::sum(
            [x],
            weight,
            #[inline(always)]
            |[x], _| x * x,
        );
        E::Accum::ONE / (squares / E::Accum::of(x.len() as f64) + eps).sqrt()
    }

    #[inline(always)]
    fn normalise<E: Element>(x: &[E], weight: &[E::Accum], r: E::Accum, y: &mut [E]) {
        for ((y, x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = E::narrow(x.to_accum() * r * w);
        }
    }

    /// r³/n · Σ(w∘dy∘x)
    #[inline(always)]
    fn projection<E: Element>(d_y: &[E], x: &[E], weight: &[E::Accum], r: E::Accum) -> E::Accum {
        let dot = lanes::sum(
            [d_y, x],
            weight,
            #[inline(always)]
            |[d, x], w| d * w * x,
        );
        r * r * r * dot / E::Accum::of(x.len() as f64)
    }

    #[inline(always)]
    fn gradient<E: Element>(d: &mut [E], x: &[E], weight: &[E::Accum], r: E::Accum) {
        let c = projection(d, x, weight, r);
        for ((d, x), &w) in d.iter_mut().zip(x).zip(weight) {
            *d = E::narrow(d.to_accum() * w * r - x.to_accum() * c);
        }
    }

    #[inline(always)]
    fn gradient_plus<E: Element>(d: &mut [E], x: &[E], weight: &[E::Accum], r: E::Accum, add: &[E]) {
        let c = projection(d, x, weight, r);
        for (((d, x), &w), add) in d.iter_mut().zip(x).zip(weight).zip(add) {
            *d = E::narrow(d.to_accum() * w * r - x.to_accum() * c + add.to_accum());
        }
    }
}

/// The same in libtorch's operations, for tensors that no kernel takes.
mod torch {
    use super::*;

    pub fn forward(x: &Tensor, weight: &Tensor, eps: f64, out: &Tensor, r: &Tensor) {
        r.shallow_clone()
            .copy_(&(x.to_kind(accum_kind(x.kind())).square().mean_dim(-1, true, None) + eps).rsqrt());
        normalise(x, weight, r, out);
    }

    pub fn normalise(x: &Tensor, weight: &Tensor, r: &Tensor, out: &Tensor) {
        out.shallow_clone().copy_(&(x.to_kind(accum_kind(x.kind())) * r).g_mul_(weight));
    }

    pub fn backward(d: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor, add: Option<&Tensor>) {
        let (wide_x, g) = (x.to_kind(accum_kind(x.kind())), d.to_kind(accum_kind(x.kind())) * weight);
        let n = x.size().last().copied().unwrap_or(1) as f64;
        let c = r.pow_tensor_scalar(3) * (&g * &wide_x).sum_dim_intlist(-1, true, None) / n;
        let mut d_x = g * r - wide_x * c;
        if let Some(add) = add {
            let _ = d_x.g_add_(add);
        }
        d.shallow_clone().copy_(&d_x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, autograd, distance, everywhere, leaf};
    use tch::{Device, Kind};

    /// x and d_y of a kind, with what autograd makes of their fp64 values: y, dx.
    fn example(shape: &[i64], kind: Kind) -> ([Tensor; 3], [Tensor; 2]) {
        let x = leaf(shape).detach().to_kind(kind).to_kind(Kind::Double).set_requires_grad(true);
        let d_y = leaf(shape).detach().to_kind(kind).to_kind(Kind::Double);
        let weight_kind = if kind == Kind::Double { kind } else { Kind::Float };
        let w = leaf(&shape[shape.len() - 1..]).detach().to_kind(weight_kind).to_kind(Kind::Double);
        let y = &x * (x.square().mean_dim(-1, true, None) + 1e-5).rsqrt() * &w;
        let d_x = autograd(&y, &d_y, &[&x]).remove(0);
        ([x.detach().to_kind(kind), w.to_kind(weight_kind), d_y.to_kind(kind)], [y.detach(), d_x])
    }

    #[test]
    fn matches_autograd() {
        for (kind, tolerance) in KINDS {
            for shape in [&[1i64, 7][..], &[5, 33], &[0, 4], &[1, 1], &[90, 576], &[3, 2, 64]] {
                let ([x, w, d_y], [y, d_x]) = example(shape, kind);
                let add = d_y.neg();
                let d_sum = &d_x + add.to_kind(Kind::Double);
                let near = |ours: &Tensor, exact: &Tensor| {
                    assert_eq!(ours.kind(), kind);
                    let off = distance(ours, exact);
                    assert!(off < tolerance * 8.0, "{kind:?} {shape:?}: {off}");
                };
                everywhere(|| {
                    let (ours, r) = forward(&x, &w, 1e-5);
                    assert_eq!(r.size()[..shape.len() - 1], shape[..shape.len() - 1]);
                    near(&ours, &y);
                    assert_eq!(distance(&recompute(&x, &w, &r), &ours), 0.0);
                    near(&backward(d_y.copy().into(), &x, &w, &r, None), &d_x);
                    near(&backward(d_y.copy().into(), &x, &w, &r, Some(&add)), &d_sum);
                });
                let (ours, d) = (x.empty_like(), d_y.copy());
                let r =
                    Tensor::empty([&shape[..shape.len() - 1], &[1]].concat(), (accum_kind(kind), x.device()));
                torch::forward(&x, &w, 1e-5, &ours, &r);
                near(&ours, &y);
                torch::backward(&d, &x, &w, &r, None);
                near(&d, &d_x);
                let d = d_y.copy();
                torch::backward(&d, &x, &w, &r, Some(&add));
                near(&d, &d_sum);
            }
        }
    }

    #[test]
    fn heads_inside_a_wider_tensor() {
        for (kind, tolerance) in KINDS {
            let ([x, w, d_y], [y, d_x]) = example(&[7, 3, 32], kind);
            everywhere(|| {
                let all = Tensor::full([7, 8, 32], 3.0, (kind, Device::Cpu));
                let (mut inside, mut after) = (all.narrow(1, 2, 3), all.narrow(1, 5, 3));
                inside.copy_(&x);
                let r = forward_into(&inside, &w, 1e-5, &after);
                assert!(distance(&after, &y) < tolerance * 8.0);
                after.copy_(&d_y);
                backward_into(&after, &inside, &w, &r);
                assert!(distance(&after, &d_x) < tolerance * 8.0);
                assert_eq!(
                    (distance(&inside, &x), all.narrow(1, 0, 2).ne(3.0).any()),
                    (0.0, Tensor::from(false))
                );
            });
        }
    }

    #[test]
    fn kernels_of_devices_compute_it() {
        let kernels = cuda::on_host::kernels();
        for (kind, tolerance) in KINDS {
            for (tokens, heads, n) in [(1, 1, 8), (0, 2, 16), (37, 1, 576), (9, 3, 64)] {
                let ([x, w, d_y], [y, d_x]) = example(&[tokens, heads, n], kind);
                let all = Tensor::full([tokens, 2 * heads + 2, n], 3.0, (kind, Device::Cpu));
                let (mut inside, mut after) = (all.narrow(1, 1, heads), all.narrow(1, heads + 1, heads));
                inside.copy_(&x);
                let r = Tensor::empty([tokens, heads, 1], (accum_kind(kind), Device::Cpu));
                let near = |ours: &Tensor, exact: &Tensor| {
                    let off = distance(ours, exact);
                    assert!(off < tolerance * 8.0, "{kind:?} {tokens} {heads} {n}: {off}");
                };
                let taken = kernels.norm_forward(&inside, &w, 1e-5, &after, &r);
                assert_eq!(taken, kind != Kind::Double);
                if !taken {
                    continue;
                }
                near(&after, &y);
                let again = x.empty_like();
                assert!(kernels.norm_recompute(&inside, &w, &r, &again));
                assert_eq!(distance(&again, &after), 0.0);
                after.copy_(&d_y);
                assert!(kernels.norm_backward(&after, &inside, &w, &r, None));
                near(&after, &d_x);
                after.copy_(&d_y);
                let add = d_y.neg();
                assert!(kernels.norm_backward(&after, &inside, &w, &r, Some(&add)));
                near(&after, &(&d_x + add.to_kind(Kind::Double)));
                let beside = all.index_select(1, &Tensor::from_slice(&[0, 2 * heads + 1]));
                assert_eq!((distance(&inside, &x), beside.ne(3.0).any()), (0.0, Tensor::from(false)));
            }
            let odd = Tensor::zeros([2, 12], (kind, Device::Cpu));
            let r = Tensor::zeros([2, 1], (accum_kind(kind), Device::Cpu));
            let w = Tensor::zeros([12], (accum_kind(kind), Device::Cpu));
            assert!(!kernels.norm_forward(&odd, &w, 1e-5, &odd.empty_like(), &r), "rows are no packs");
        }
    }
}
