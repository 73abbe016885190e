//! AdamW (Loshchilov & Hutter, 2019) with decoupled decay over flat fp32 shards, in torch's order of operations:
//!
//! g ← c·g,  p ← p·(1 − lr·wd),  m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − m / (√v/√(1−β₂ᵗ) + eps) · lr/(1−β₁ᵗ)
//!
//! p is also rounded to the compute dtype, in which it will be gathered. In kernels of our own all that is
//! one pass, and so is the question whether all of it stays finite.

use super::{
    cpu::{Element, Rows, each_row},
    cuda,
};
use crate::device::has_kernels;
use half::bf16;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Kind, Tensor};

/// Numbers of an update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    pub lr: f64,
    pub weight_decay: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    /// t: the updates so far, this one included.
    pub count: u64,
    /// c, from clipping.
    pub coefficient: f64,
}

/// Tensors that an update changes: flat, as long as the gradient.
pub struct State<'a> {
    /// p, fp32
    pub master: &'a Tensor,
    /// m, fp32
    pub exp_avg: &'a Tensor,
    /// v, fp32
    pub exp_avg_sq: &'a Tensor,
    /// p in compute dtype
    pub compute: &'a Tensor,
}

impl Update {
    /// Moves `state` against `gradient`, flat fp32, which stays as it is.
    pub fn apply(&self, gradient: &Tensor, state: &State) {
        let by_device =
            || cuda::kernels(gradient).is_some_and(|kernels| self.start(kernels, gradient, state));
        match (has_kernels(gradient), state.compute.kind()) {
            (true, Kind::BFloat16) => rows::apply::<bf16>(self, gradient, state),
            (true, Kind::Float) => rows::apply::<f32>(self, gradient, state),
            _ if by_device() => {}
            _ => torch::apply(self, gradient, state),
        }
    }

    /// True if [`apply`](Self::apply) would leave every element of `state` finite. Changes nothing.
    pub fn stays_finite(&self, gradient: &Tensor, state: &State) -> bool {
        match (has_kernels(gradient), state.compute.kind()) {
            (true, Kind::BFloat16) => rows::stays_finite::<bf16>(self, gradient, state),
            (true, Kind::Float) => rows::stays_finite::<f32>(self, gradient, state),
            _ => torch::stays_finite(self, gradient, state),
        }
    }

    /// True if a device's kernel does it.
    fn start(&self, kernels: &cuda::Kernels, gradient: &Tensor, state: &State) -> bool {
        let State { master, exp_avg, exp_avg_sq, compute } = state;
        let f = self.factors();
        let [[keep_m, keep_v], [take_m, take_v]] = [f.keep, f.take];
        let factors = [f.coefficient, f.decay, keep_m, keep_v, take_m, take_v, f.root, f.eps, f.rate];
        kernels.adamw([gradient, master, exp_avg, exp_avg_sq], compute, factors)
    }

    fn factors(&self) -> Factors {
        let (beta1, beta2) = self.betas;
        Factors {
            coefficient: self.coefficient as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            keep: [beta1 as f32, beta2 as f32],
            take: [(1.0 - beta1) as f32, (1.0 - beta2) as f32],
            root: self.correction(beta2).sqrt() as f32,
            eps: self.eps as f32,
            rate: (self.lr / self.correction(beta1)) as f32,
        }
    }

    /// 1 − βᵗ
    fn correction(&self, beta: f64) -> f64 {
        1.0 - beta.powf(self.count as f64)
    }
}

/// The factors of the formula, as a libtorch operation rounds its scalars. Of two the first is for m, the second for v.
struct Factors {
    coefficient: f32,
    decay: f32,
    keep: [f32; 2],
    take: [f32; 2],
    root: f32,
    eps: f32,
    rate: f32,
}

/// Kernels over the pieces of host vectors.
mod rows {
    use super::*;

    pub fn apply<E: Element<Accum = f32>>(update: &Update, gradient: &Tensor, state: &State) {
        let factors = update.factors();
        each_row::<E, _, _, _>(
            [],
            [Rows::pieces(state.compute)],
            [gradient, state.master, state.exp_avg, state.exp_avg_sq].map(Rows::pieces),
            #[inline(always)]
            |_, [], [compute], [g, p, m, v]| step(&factors, g, p, m, v, compute),
        );
    }

    pub fn stays_finite<E: Element<Accum = f32>>(update: &Update, gradient: &Tensor, state: &State) -> bool {
        let factors = update.factors();
        let finite = AtomicBool::new(true);
        each_row::<f32, _, _, _>(
            [gradient, state.master, state.exp_avg, state.exp_avg_sq].map(Rows::pieces),
            [],
            [],
            #[inline(always)]
            |_, [g, p, m, v], [], []| {
                // Without a branch, so that the loop vectorizes.
                let bad = g.iter().zip(p).zip(m).zip(v).fold(0, |bad, (((&g, &p), &m), &v)| {
                    let [p, m, v] = moved(&factors, g, [p, m, v]);
                    let compute = E::narrow(p).to_accum();
                    bad | [m, v, compute].iter().fold(0, |bad, x| bad | u32::from(!x.is_finite()))
                });
                if bad != 0 {
                    finite.store(false, Ordering::Relaxed);
                }
            },
        );
        finite.into_inner()
    }

    #[inline(always)]
    fn step<E: Element<Accum = f32>>(
        f: &Factors,
        g: &[f32],
        p: &mut [f32],
        m: &mut [f32],
        v: &mut [f32],
        compute: &mut [E],
    ) {
        for ((((&g, p), m), v), compute) in g.iter().zip(p).zip(m).zip(v).zip(compute) {
            [*p, *m, *v] = moved(f, g, [*p, *m, *v]);
            *compute = E::narrow(*p);
        }
    }

    /// p, m and v after a step along `g`.
    #[inline(always)]
    fn moved(f: &Factors, g: f32, [p, m, v]: [f32; 3]) -> [f32; 3] {
        let g = g * f.coefficient;
        let m = m * f.keep[0] + g * f.take[0];
        let v = v * f.keep[1] + g * g * f.take[1];
        [p * f.decay - m / (v.sqrt() / f.root + f.eps) * f.rate, m, v]
    }
}

/// The same in libtorch's operations, for what no kernel takes.
mod torch {
    use super::*;

    pub fn apply(update: &Update, gradient: &Tensor, state: &State) {
        let (beta1, beta2) = update.betas;
        let gradient = gradient * update.coefficient;
        let [mut p, mut m, mut v, mut compute] =
            [state.master, state.exp_avg, state.exp_avg_sq, state.compute].map(Tensor::shallow_clone);
        let _ = p.g_mul_scalar_(1.0 - update.lr * update.weight_decay);
        let _ = m.g_mul_scalar_(beta1).g_add_(&(&gradient * (1.0 - beta1)));
        let _ = v.g_mul_scalar_(beta2).g_add_(&(gradient.square() * (1.0 - beta2)));
        let denominator = v.sqrt() / update.correction(beta2).sqrt() + update.eps;
        let _ = p.g_sub_(&(m / denominator * (update.lr / update.correction(beta1))));
        compute.copy_(&p);
    }

    pub fn stays_finite(update: &Update, gradient: &Tensor, state: &State) -> bool {
        let [master, exp_avg, exp_avg_sq, compute] =
            [state.master, state.exp_avg, state.exp_avg_sq, state.compute].map(Tensor::copy);
        let after = [&master, &exp_avg, &exp_avg_sq, &compute];
        let state = State { master: &master, exp_avg: &exp_avg, exp_avg_sq: &exp_avg_sq, compute: &compute };
        apply(update, gradient, &state);
        let finite = after.map(|tensor| tensor.isfinite().all());
        Tensor::stack(&finite, 0).all().int64_value(&[]) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{distance, everywhere, leaf};
    use tch::Device;

    #[test]
    fn the_kernel_takes_libtorchs_steps() {
        let kernels = cuda::on_host::kernels();
        for kind in [Kind::BFloat16, Kind::Float] {
            for n in [0, 1, 31, 10_000] {
                let random = || leaf(&[n]).detach().to_kind(Kind::Float);
                let (start, gradients) = (random(), [random(), random() * 1e-3, random() * 1e4]);
                let run = |apply: &dyn Fn(&Update, &Tensor, &State)| {
                    let (master, compute) = (start.copy(), start.zeros_like().to_kind(kind));
                    let (exp_avg, exp_avg_sq) = (start.zeros_like(), start.zeros_like());
                    let state = State {
                        master: &master,
                        exp_avg: &exp_avg,
                        exp_avg_sq: &exp_avg_sq,
                        compute: &compute,
                    };
                    for (i, gradient) in gradients.iter().enumerate() {
                        let update = Update {
                            lr: 0.01,
                            weight_decay: 0.1,
                            betas: (0.9, 0.95),
                            eps: 1e-8,
                            count: i as u64 + 1,
                            coefficient: 0.7,
                        };
                        apply(&update, gradient, &state);
                    }
                    [master, exp_avg, exp_avg_sq, compute]
                };
                let expected = run(&torch::apply);
                assert_eq!(distance(&expected[3], &expected[0].to_kind(kind)), 0.0);
                let on_device = run(&|update, gradient, state| {
                    let taken = update.start(&kernels, gradient, state);
                    assert_eq!(taken, n % 8 == 0, "{n}");
                    if !taken {
                        torch::apply(update, gradient, state);
                    }
                });
                for (ours, expected) in on_device[..3].iter().zip(&expected) {
                    assert!(ours.allclose(expected, 1e-6, 1e-8, false), "{kind:?} {n}");
                }
                assert_eq!(on_device[3], on_device[0].to_kind(kind), "{kind:?} {n}");
                everywhere(|| {
                    let ours = run(&Update::apply);
                    // libtorch's square root is not the nearest number always.
                    assert!(ours[0].allclose(&expected[0], 2e-7, 1e-8, false), "{kind:?} {n}");
                    assert_eq!(ours[1..3], expected[1..3], "{kind:?} {n}");
                    assert_eq!(ours[3], ours[0].to_kind(kind), "{kind:?} {n}");
                });
            }
        }
    }

    /// One element of 10 000, or one number of the update, at a time makes the step overflow.
    #[test]
    fn what_would_not_stay_finite_is_known_before() {
        let (lr, eps) = (0.01, 1e-8);
        let update = Update { lr, weight_decay: 0.1, betas: (0.9, 0.95), eps, count: 1, coefficient: 1.0 };
        let n = 10_000;
        for kind in [Kind::BFloat16, Kind::Float] {
            let tensors = || [1.0, 1.0, 0.5, 0.5].map(|x| Tensor::full([n], x, (Kind::Float, Device::Cpu)));
            let check = |update: &Update, tensors: &[Tensor; 4], expected: bool, what: &str| {
                let [gradient, master, exp_avg, exp_avg_sq] = tensors;
                let compute = master.to_kind(kind);
                let state = State { master, exp_avg, exp_avg_sq, compute: &compute };
                let before = [master, exp_avg, exp_avg_sq, &compute].map(Tensor::copy);
                assert_eq!(torch::stays_finite(update, gradient, &state), expected, "{kind:?} {what}");
                everywhere(|| {
                    assert_eq!(update.stays_finite(gradient, &state), expected, "{kind:?} {what}");
                });
                let after = [master, exp_avg, exp_avg_sq, &compute].map(Tensor::copy);
                let same = |(a, b): (&Tensor, &Tensor)| a.allclose(b, 0.0, 0.0, true);
                assert!(before.iter().zip(&after).all(same), "{kind:?} {what}");
            };
            check(&update, &tensors(), true, "as it is");
            let cases = [
                (0, 1e20, "v overflows"),
                (0, f64::NAN, "a gradient"),
                (1, f64::INFINITY, "a master"),
                (2, f64::NEG_INFINITY, "a first moment"),
                (3, -1.0, "the root of a second moment"),
            ];
            for (at, value, what) in cases {
                for element in [0, n / 2 + 3, n - 1] {
                    let tensors = tensors();
                    let _ = tensors[at].get(element).fill_(value);
                    check(&update, &tensors, false, what);
                }
            }
            // The nearest bf16 of the first is a number, of the second infinity.
            let still = Update { lr: 0.0, ..update };
            for (value, fits) in [(3.38e38, true), (3.4e38, kind == Kind::Float)] {
                let tensors = tensors();
                let _ = tensors[1].get(7).fill_(value);
                check(&still, &tensors, fits, "the rounded master");
            }
            check(&Update { lr: 1e39, ..update }, &tensors(), false, "the rate");
        }
    }
}
