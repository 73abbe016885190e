//! The steps of cross entropy over a vocabulary that comes in chunks: see [`crate::loss`], which has the formulas.
//!
//! For a token with target t, over the logits l_v seen so far: the maximum m, s = Σ_{v≠t} exp(l_v − m), l_t, and
//! a = Σ_{v≠t} exp(l_v − m)·w_v.
//!
//! exponentials  m′ = max(m, max l),  e = exp(m − m′),  s ← s·e + Σ_{v≠t} p_v,  p_v = exp(l_v − m′), p_t = 0
//! accumulate    a ← a·e + p·W
//! gradient      dx = scale / (s + exp(l_t − m)) · (a − s·w_t)

use super::{
    accum_kind,
    cpu::{Element, LANES, Real, Rows, dispatch, each_row, lanes, values},
    cuda,
};
use crate::device::has_kernels;
use tch::{Device, Kind, Tensor};

/// The running sums of some tokens, each [tokens, 1] fp32, or fp64 for fp64 logits (tests).
pub struct Sums {
    /// m
    pub maximum: Tensor,
    /// s
    pub sum: Tensor,
    /// l_t
    pub target_logit: Tensor,
}

impl Sums {
    /// Of `tokens` tokens before the first logit, for hidden states of `kind`.
    pub fn new(tokens: i64, kind: Kind, device: Device) -> Self {
        let column = |value: f64| Tensor::full([tokens, 1], value, (accum_kind(kind), device));
        Self { maximum: column(f64::NEG_INFINITY), sum: column(0.0), target_logit: column(0.0) }
    }

    /// Of the tokens `start..start + n`, in the same memory.
    pub fn narrow(&self, start: i64, n: i64) -> Self {
        let part = |t: &Tensor| t.narrow(0, start, n);
        Self { maximum: part(&self.maximum), sum: part(&self.sum), target_logit: part(&self.target_logit) }
    }

    /// Takes in a chunk of the vocabulary: `logits` [tokens, chunk] in compute dtype become p. `targets` `[tokens]` i64
    /// count from the chunk's start and may lie outside of it. Returns e [tokens, 1].
    pub fn exponentials(&self, logits: &Tensor, targets: &Tensor) -> Tensor {
        let rescale = self.maximum.empty_like();
        let sums = [&self.maximum, &self.sum, &self.target_logit, &rescale];
        if has_kernels(logits) {
            dispatch!(logits.kind(), E => rows::exponentials::<E>(self, logits, &values(targets), &rescale));
        } else if !cuda::kernels(logits).is_some_and(|kernels| kernels.exponentials(logits, targets, sums)) {
            return torch::exponentials(self, logits, targets);
        }
        rescale
    }

    /// Σ of the losses ℓ = log(1 + s·exp(m − l_t)) = softplus(log s + m − l_t): exact for confident and for lost tokens.
    pub fn losses(&self) -> f64 {
        let losses = (self.sum.log() + &self.maximum - &self.target_logit).softplus();
        losses.sum(Kind::Double).double_value(&[])
    }

    /// a [tokens, hidden] becomes dx, in a's kind: compute dtype, or that of the sums. w_t is [tokens, hidden] in compute
    /// dtype.
    pub fn gradient(&self, a: &Tensor, w_t: &Tensor, scale: f64) {
        if !has_kernels(a) {
            return torch::gradient(self, a, w_t, scale);
        }
        dispatch!(w_t.kind(), E => {
            if a.kind() == w_t.kind() {
                rows::gradient::<E>(self, a, w_t, scale);
            } else {
                rows::wide_gradient::<E>(self, a, w_t, scale);
            }
        });
    }
}

/// a ← a·e + product, where a [tokens, hidden] has the kind of e [tokens, 1], `product` compute dtype.
pub fn accumulate(a: &Tensor, rescale: &Tensor, product: &Tensor) {
    if !has_kernels(a) {
        let _ = a.shallow_clone().g_mul_(rescale).g_add_(product);
        return;
    }
    dispatch!(product.kind(), E => rows::accumulate::<E>(a, rescale, product));
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    /// Logits that are widened at a time: they stay in the first-level cache.
    const BLOCK: usize = 8 * LANES;

    pub fn exponentials<E: Element>(sums: &Sums, logits: &Tensor, targets: &[i64], rescale: &Tensor) {
        let columns = [&sums.maximum, &sums.sum, &sums.target_logit, rescale].map(Rows::of);
        each_row::<E, _, _, _>(
            [],
            [Rows::of(logits)],
            columns,
            #[inline(always)]
            |i, [], [row], [m, s, target_logit, rescale]| {
                let maximum = lanes::maximum(row).max(m[0]);
                if let Some(target) = usize::try_from(targets[i]).ok().and_then(|t| row.get_mut(t)) {
                    target_logit[0] = target.to_accum();
                    // Its exponential is 0 then: left out of the sum and of the product.
                    *target = E::narrow(E::Accum::NEG_INFINITY);
                }
                rescale[0] = (m[0] - maximum).exp();
                s[0] = s[0] * rescale[0] + exponentiate(row, maximum);
                m[0] = maximum;
            },
        );
    }

    /// l becomes exp(l − m); returns the sum.
    #[inline(always)]
    fn exponentiate<E: Element>(row: &mut [E], m: E::Accum) -> E::Accum {
        let mut lanes = [E::Accum::ZERO; LANES];
        let (blocks, tail) = row.as_chunks_mut::<BLOCK>();
        for block in blocks {
            let mut wide = [E::Accum::ZERO; BLOCK];
            for (wide, x) in wide.iter_mut().zip(block.iter()) {
                *wide = (x.to_accum() - m).exp();
            }
            for (x, &wide) in block.iter_mut().zip(&wide) {
                *x = E::narrow(wide);
            }
            for wide in wide.as_chunks::<LANES>().0 {
                for (lane, &wide) in lanes.iter_mut().zip(wide) {
                    *lane += wide;
                }
            }
        }
        for (i, x) in tail.iter_mut().enumerate() {
            let wide = (x.to_accum() - m).exp();
            *x = E::narrow(wide);
            lanes[i % LANES] += wide;
        }
        lanes::total(lanes)
    }

    pub fn accumulate<E: Element>(a: &Tensor, rescale: &Tensor, product: &Tensor) {
        each_row::<E, _, _, _>(
            [Rows::of(product)],
            [],
            [Rows::of(a), Rows::of(rescale)],
            #[inline(always)]
            |_, [product], [], [a, rescale]| add(a, rescale[0], product),
        );
    }

    #[inline(always)]
    fn add<E: Element>(a: &mut [E::Accum], rescale: E::Accum, product: &[E]) {
        for (a, product) in a.iter_mut().zip(product) {
            *a = *a * rescale + product.to_accum();
        }
    }

    pub fn gradient<E: Element>(sums: &Sums, a: &Tensor, w_t: &Tensor, scale: f64) {
        let columns = [&sums.maximum, &sums.sum, &sums.target_logit].map(Rows::of);
        let scale = E::Accum::of(scale);
        each_row::<E, _, _, _>(
            [Rows::of(w_t)],
            [Rows::of(a)],
            columns,
            #[inline(always)]
            |_, [w_t], [a], [m, s, target_logit]| {
                let total = s[0] + (target_logit[0] - m[0]).exp();
                differentiate(a, w_t, s[0], scale / total);
            },
        );
    }

    pub fn wide_gradient<E: Element>(sums: &Sums, a: &Tensor, w_t: &Tensor, scale: f64) {
        let columns = [a, &sums.maximum, &sums.sum, &sums.target_logit].map(Rows::of);
        let scale = E::Accum::of(scale);
        each_row::<E, _, _, _>(
            [Rows::of(w_t)],
            [],
            columns,
            #[inline(always)]
            |_, [w_t], [], [a, m, s, target_logit]| {
                let total = s[0] + (target_logit[0] - m[0]).exp();
                differentiate(a, w_t, s[0], scale / total);
            },
        );
    }

    #[inline(always)]
    fn differentiate<A, E>(a: &mut [A], w_t: &[E], s: E::Accum, factor: E::Accum)
    where
        A: Element<Accum = E::Accum>,
        E: Element,
    {
        for (a, w_t) in a.iter_mut().zip(w_t) {
            *a = A::narrow((a.to_accum() - w_t.to_accum() * s) * factor);
        }
    }
}

/// The same in libtorch's operations, for tensors that no kernel takes.
mod torch {
    use super::*;

    pub fn exponentials(sums: &Sums, logits: &Tensor, targets: &Tensor) -> Tensor {
        let Sums { maximum, sum, target_logit } = sums;
        let inside = targets.ge(0).logical_and(&targets.lt(logits.size()[1]));
        let here = inside.nonzero().view([-1]);
        let at_target = [Some(here.shallow_clone()), Some(targets.index_select(0, &here))];
        let mut wide_logits = logits.to_kind(maximum.kind());
        let new_maximum = maximum.maximum(&wide_logits.amax([1i64], true));
        let chosen = wide_logits.index(&at_target);
        let _ = target_logit.shallow_clone().index_copy_(0, &here, &chosen.unsqueeze(1));
        let _ = wide_logits.g_sub_(&new_maximum).exp_();
        let _ = wide_logits.index_put_(&at_target, &chosen.zeros_like(), false);
        let rescale = (maximum - &new_maximum).exp();
        let _ = sum.shallow_clone().g_mul_(&rescale).g_add_(&wide_logits.sum_dim_intlist(1, true, None));
        maximum.shallow_clone().copy_(&new_maximum);
        logits.shallow_clone().copy_(&wide_logits);
        rescale
    }

    pub fn gradient(sums: &Sums, a: &Tensor, w_t: &Tensor, scale: f64) {
        let Sums { maximum, sum, target_logit } = sums;
        let factor = scale / (sum + (target_logit - maximum).exp());
        a.shallow_clone().copy_(&((a - w_t * sum) * factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, distance, everywhere, leaf};

    /// p, s, l_t and m of `logits` [tokens, vocabulary] in fp64, by the formulas.
    fn exact(logits: &Tensor, targets: &[i64]) -> [Tensor; 4] {
        let targets = Tensor::from_slice(targets).unsqueeze(1);
        let m = logits.amax([1i64], true);
        let p = (logits - &m).exp().scatter_value(1, &targets, 0.0);
        let s = p.sum_dim_intlist(1, true, Kind::Double);
        [p, s, logits.gather(1, &targets, false), m]
    }

    #[test]
    fn chunks_of_logits_become_sums() {
        type Step<'a> = &'a dyn Fn(&Sums, &Tensor, &Tensor) -> Tensor;
        let on_device = cuda::on_host::kernels();
        let device = |sums: &Sums, logits: &Tensor, targets: &Tensor| {
            let e = sums.maximum.empty_like();
            let all = [&sums.maximum, &sums.sum, &sums.target_logit, &e];
            assert!(on_device.exponentials(logits, targets, all));
            e
        };
        for (kind, tolerance) in KINDS {
            for (tokens, vocabulary, cut) in
                [(1, 1, 1), (0, 5, 2), (3, 131, 60), (5, 1000, 999), (4, 1000, 600), (2, 9008, 4000)]
            {
                let logits = (leaf(&[tokens, vocabulary]).detach() * 4.0).to_kind(kind);
                let targets: Vec<i64> = (0..tokens).map(|i| (i * 7919) % vocabulary).collect();
                let [p, s, target_logit, m] = exact(&logits.to_kind(Kind::Double), &targets);
                // Half a unit in the last place of what sums are taken in: for each unit of an exponent l − m, four for each
                // of two exponentials, one for each addition of a lane.
                let unit = if kind == Kind::Double { f64::EPSILON } else { f64::from(f32::EPSILON) } / 2.0;
                let exponents = 2.0 * distance(&logits, &logits.zeros_like());
                let rounding = unit * (exponents + 8.0 + (vocabulary as f64 / LANES as f64).ceil());
                let check = |step: Step| {
                    let sums = Sums::new(tokens, kind, Device::Cpu);
                    let ours = logits.copy();
                    let at = Tensor::from_slice(&targets);
                    let _ = step(&sums, &ours.narrow(1, 0, cut), &at);
                    let e = step(&sums, &ours.narrow(1, cut, vocabulary - cut), &(at - cut));
                    let before = ours.narrow(1, 0, cut).to_kind(Kind::Double) * e.to_kind(Kind::Double);
                    let ours = Tensor::cat(&[before, ours.narrow(1, cut, vocabulary - cut)], 1);
                    assert!(
                        distance(&ours, &p) < 2.0 * tolerance,
                        "{kind:?} {vocabulary}: {}",
                        distance(&ours, &p)
                    );
                    // The sum is of values that were not rounded to the compute dtype.
                    let off =
                        distance(&(sums.sum.to_kind(Kind::Double) / (&s + 1e-300)), &(&s / (&s + 1e-300)));
                    assert!(off <= rounding, "{kind:?} {tokens} {vocabulary}: {off} of {rounding}");
                    assert_eq!(distance(&sums.target_logit, &target_logit), 0.0);
                    assert_eq!(distance(&sums.maximum, &m), 0.0);
                };
                if cut < vocabulary {
                    everywhere(|| check(&Sums::exponentials));
                    check(&torch::exponentials);
                    if kind != Kind::Double && vocabulary % 8 == 0 && cut % 8 == 0 {
                        check(&device);
                    }
                }
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_level() {
        let logits = leaf(&[2, 777]).detach().to_kind(Kind::BFloat16);
        let seen = std::cell::RefCell::new(Vec::new());
        everywhere(|| {
            let sums = Sums::new(2, Kind::BFloat16, Device::Cpu);
            let _ = sums.exponentials(&logits.copy(), &Tensor::from_slice(&[3i64, -1]));
            seen.borrow_mut().push(Vec::<f32>::try_from(sums.sum.view([-1])).expect("floats"));
        });
        assert!(seen.borrow().iter().all(|sum| *sum == seen.borrow()[0]), "{seen:?}");
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let logits = leaf(&[1, 300]).detach().to_kind(Kind::BFloat16);
        let _ = logits.get(0).get(200).fill_(f64::NAN);
        let sums = Sums::new(1, Kind::BFloat16, Device::Cpu);
        let _ = sums.exponentials(&logits, &Tensor::from_slice(&[3i64]));
        assert!(sums.losses().is_nan());
    }

    #[test]
    fn accumulates_and_differentiates() {
        for (kind, tolerance) in KINDS {
            for (tokens, hidden) in [(0, 3), (1, 1), (4, 17), (50, 576)] {
                let random = |columns: i64, kind| leaf(&[tokens, columns]).detach().to_kind(kind);
                let double = |t: &Tensor| t.to_kind(Kind::Double);
                let column = || random(1, accum_kind(kind)).abs() + 0.5;
                let (product, w_t) = (random(hidden, kind), random(hidden, kind));
                let sums = Sums { maximum: column(), sum: column(), target_logit: column() };
                let e = column();
                let total = double(&sums.sum) + double(&(&sums.target_logit - &sums.maximum)).exp();
                for a_kind in [kind, accum_kind(kind)] {
                    let a = random(hidden, a_kind);
                    let sum = double(&a) * double(&e) + double(&product);
                    let d_x = (double(&a) - double(&w_t) * double(&sums.sum)) * (0.25 / &total);
                    let near = |ours: &Tensor, exact: &Tensor| {
                        let off = distance(ours, exact);
                        assert!(off < tolerance * 8.0, "{kind:?} {a_kind:?} {tokens} {hidden}: {off}");
                    };
                    everywhere(|| {
                        if a_kind == accum_kind(kind) {
                            let ours = a.copy();
                            accumulate(&ours, &e, &product);
                            near(&ours, &sum);
                        }
                        let ours = a.copy();
                        sums.gradient(&ours, &w_t, 0.25);
                        near(&ours, &d_x);
                    });
                    let ours = a.copy();
                    torch::gradient(&sums, &ours, &w_t, 0.25);
                    near(&ours, &d_x);
                }
            }
        }
    }
}
