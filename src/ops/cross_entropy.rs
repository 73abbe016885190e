//! Running sums and hidden gradient of log-probabilities over a vocabulary that comes in chunks. [`crate::loss`] has
//! the pass over the head that calls this, and the derivation.
//!
//! T is the set of a token's distinct targets, l_v its logits seen so far. Kept are the maximum m = max l_v, the
//! target logits l_t, s = Σ_{v∉T} exp(l_v − m) and a = Σ_{v∉T} exp(l_v − m)·w_v. With e_t = exp(l_t − m), Z = s +
//! Σ_{t∈T} e_t and coefficients c_t = ∂L/∂log p_t:
//!
//! exponentials       m′ = max(m, max l),  r = exp(m − m′),  s ← s·r + Σ_{v∉T} p_v,  p_v = exp(l_v − m′), p_t = 0
//! accumulate         a ← a·r + p·W
//! log_probabilities  log p_t = −log(1 + (s + Σ_{u≠t} e_u) / e_t)
//! gradient           dx = (Σ_t (c_t·(s + Σ_{u≠t} e_u) − e_t·Σ_{u≠t} c_u)·w_t − (Σ_t c_t)·a) / Z
//!
//! No sum over the others of T is a difference of sums. So a target with p_t near 1 keeps the digits of 1 − p_t for
//! any number of targets. One target is the case without others: log p_t = −log(1 + s/e_t), dx = −c·(a − s·w_t) / (s
//! + e_t).

use super::{
    accum_kind, batch_invariant,
    cpu::{Element, LANES, Real, Rows, dispatch, each_row, lanes, values},
    cuda,
};
use crate::device::has_kernels;
use tch::{Device, Kind, Tensor};

/// Running sums of the tokens of a pass: fp32, or fp64 for fp64 logits (tests).
pub struct Sums {
    /// m `[tokens, 1]`
    pub maximum: Tensor,
    /// s `[tokens, 1]`
    pub sum: Tensor,
    /// l_t `[tokens, width]`: a column for each distinct target of a token, −∞ where a token has fewer.
    pub target_logits: Tensor,
}

impl Sums {
    /// Sums of `tokens` tokens with at most `width` distinct targets, before the first logit. `kind` is the kind of the
    /// hidden states.
    pub fn new(tokens: i64, width: i64, kind: Kind, device: Device) -> Self {
        let full =
            |columns: i64, value: f64| Tensor::full([tokens, columns], value, (accum_kind(kind), device));
        let none = f64::NEG_INFINITY;
        Self { maximum: full(1, none), sum: full(1, 0.0), target_logits: full(width, none) }
    }

    /// View of the tokens `start..start + n`.
    pub fn narrow(&self, start: i64, n: i64) -> Self {
        let part = |t: &Tensor| t.narrow(0, start, n);
        Self { maximum: part(&self.maximum), sum: part(&self.sum), target_logits: part(&self.target_logits) }
    }

    /// Adds a chunk of the vocabulary: `logits` `[tokens, chunk]` in compute dtype become p. `targets` `[tokens,
    /// width]` i64 count from the chunk's start and may lie outside of it; those of a token inside the chunk are
    /// distinct. Returns r `[tokens, 1]`.
    pub fn exponentials(&self, logits: &Tensor, targets: &Tensor) -> Tensor {
        let rescale = self.maximum.empty_like();
        let sums = [&self.maximum, &self.sum, &self.target_logits, &rescale];
        if has_kernels(logits) {
            dispatch!(logits.kind(), E => rows::exponentials::<E>(self, logits, &values(targets), &rescale));
        } else if !cuda::kernels(logits).is_some_and(|kernels| kernels.exponentials(logits, targets, sums)) {
            return torch::exponentials(self, logits, targets);
        }
        rescale
    }

    /// log p_t `[tokens, width]` = −softplus(log(s + Σ_{u≠t} e_u) + m − l_t): exact for p_t near 1 and near 0.
    pub fn log_probabilities(&self) -> Tensor {
        if batch_invariant::is_on(&self.sum) {
            return dispatch!(self.sum.kind(), E => rows::log_probabilities::<E>(self));
        }
        let others = torch::sum_of_others(&self.target_exponentials());
        -((&self.sum + others).log() + &self.maximum - &self.target_logits).softplus()
    }

    /// log Σ exp(l_v) `[tokens]` of all logits, where no token has a target inside of the chunks.
    pub fn log_sums(&self) -> Tensor {
        if !batch_invariant::is_on(&self.sum) {
            return (self.sum.log() + &self.maximum).squeeze_dim(1);
        }
        dispatch!(self.sum.kind(), E => rows::log_sums::<E>(self))
    }

    /// a `[tokens, hidden]` becomes dx, in a's kind: compute dtype, or the kind of the sums. `coefficients` `[tokens,
    /// width]` are c_t in the kind of the sums, 0 where a token has fewer targets.
    pub fn gradient(&self, a: &Tensor, targets: TargetRows, coefficients: &Tensor) {
        if has_kernels(a) {
            let factors = dispatch!(self.sum.kind(), E => rows::factors::<E>(self, coefficients));
            dispatch!(targets.weight.kind(), E => {
                if a.kind() == targets.weight.kind() {
                    rows::gradient::<E>(a, targets, &factors);
                } else {
                    rows::wide_gradient::<E>(a, targets, &factors);
                }
            });
            return;
        }
        let factors = torch::factors(self, coefficients);
        if !cuda::kernels(a).is_some_and(|kernels| kernels.head_gradient(a, targets, &factors)) {
            torch::gradient(a, targets, &factors);
        }
    }

    /// e_t `[tokens, width]`, 0 where a token has fewer targets.
    fn target_exponentials(&self) -> Tensor {
        (&self.target_logits - &self.maximum).exp()
    }
}

/// Head rows of the tokens' distinct targets, one token after another.
#[derive(Clone, Copy)]
pub struct TargetRows<'a> {
    /// w_t `[all targets, hidden]`, compute dtype.
    pub weight: &'a Tensor,
    /// `[tokens + 1]` i64: token i has the rows `offsets[i]..offsets[i + 1]`.
    pub offsets: &'a Tensor,
}

/// dx by token as a sum of rows: dx = (share·a − Σ_t target_t·w_t)·scale. The coefficients are relative to the one of
/// the largest magnitude, −scale·Z, so that one target computes with share 1 and target s exactly.
pub struct GradientFactors {
    /// `[tokens, width]`, 0 where a token has fewer targets.
    pub target: Tensor,
    /// `[tokens, 2]`: share, scale.
    pub row: Tensor,
}

/// a ← a·r + product, where a `[tokens, hidden]` has the kind of r `[tokens, 1]`, `product` compute dtype.
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

    /// Elements that are widened at a time: they stay in the first-level cache.
    const BLOCK: usize = 8 * LANES;

    pub fn exponentials<E: Element>(sums: &Sums, logits: &Tensor, targets: &[i64], rescale: &Tensor) {
        let wide = [&sums.maximum, &sums.sum, &sums.target_logits, rescale].map(Rows::of);
        each_row::<E, _, _, _>(
            [],
            [Rows::of(logits)],
            wide,
            #[inline(always)]
            |i, [], [row], [m, s, target_logits, rescale]| {
                let maximum = lanes::maximum(row).max(m[0]);
                let width = target_logits.len();
                for (target_logit, &target) in target_logits.iter_mut().zip(&targets[i * width..]) {
                    if let Some(target) = usize::try_from(target).ok().and_then(|t| row.get_mut(t)) {
                        *target_logit = target.to_accum();
                        // Makes its exponential 0: left out of the sum and of the product.
                        *target = E::narrow(E::Accum::NEG_INFINITY);
                    }
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

    /// −softplus(log(s + Σ_{u≠t} e_u) + m − l_t). libtorch's functions have other bits at the end of a tensor.
    pub fn log_probabilities<E: Element>(sums: &Sums) -> Tensor {
        let Sums { maximum, sum, target_logits } = sums;
        let values = target_logits.empty_like();
        each_row::<E, _, _, _>(
            [maximum, sum, target_logits].map(Rows::of),
            [Rows::of(&values)],
            [],
            |_, [m, s, logits], [values], []| {
                let (m, s) = (m[0].to_accum().to_f64(), s[0].to_accum().to_f64());
                let logit = |at: usize| logits[at].to_accum().to_f64();
                for (t, value) in values.iter_mut().enumerate() {
                    let others = (0..logits.len()).filter(|&u| u != t).map(|u| (logit(u) - m).exp());
                    let odds = (s + others.sum::<f64>()).ln() + m - logit(t);
                    *value = E::narrow(Real::of(-(odds.max(0.0) + (-odds.abs()).exp().ln_1p())));
                }
            },
        );
        values
    }

    pub fn log_sums<E: Element>(sums: &Sums) -> Tensor {
        let values = sums.sum.empty_like();
        each_row::<E, _, _, _>(
            [&sums.maximum, &sums.sum].map(Rows::of),
            [Rows::of(&values)],
            [],
            |_, [m, s], [value], []| value[0] = E::narrow(s[0].to_accum().ln() + m[0].to_accum()),
        );
        values.squeeze_dim(1)
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

    /// Sums over the other targets are those before plus those behind, so two walks over the targets suffice.
    pub fn factors<E: Element>(sums: &Sums, coefficients: &Tensor) -> GradientFactors {
        let Sums { maximum, sum, target_logits } = sums;
        let exponentials = target_logits.copy();
        let target = coefficients.copy();
        let row = Tensor::empty([sum.size()[0], 2], (sum.kind(), sum.device()));
        let result = target.empty_like();
        each_row::<E, _, _, _>(
            [],
            [],
            [maximum, sum, &exponentials, &target, &result, &row].map(Rows::of),
            #[inline(always)]
            |_, [], [], [m, s, exponentials, relative, target, row]| {
                let largest = relative.iter().fold(E::Accum::ZERO, |most, &c| larger(most, c));
                let (mut total, mut before, mut share) = (s[0], E::Accum::ZERO, E::Accum::ZERO);
                for ((e, c), target) in exponentials.iter_mut().zip(&mut *relative).zip(&mut *target) {
                    *e = (*e - m[0]).exp();
                    *c = if largest == E::Accum::ZERO { *c } else { *c / largest };
                    *target = *c * (s[0] + before) - *e * share;
                    before += *e;
                    share += *c;
                    total += *e;
                }
                let (mut behind, mut share_behind) = (E::Accum::ZERO, E::Accum::ZERO);
                for ((&mut e, &mut c), target) in exponentials.iter_mut().zip(relative).zip(target).rev() {
                    *target += c * behind - e * share_behind;
                    behind += e;
                    share_behind += c;
                }
                row.copy_from_slice(&[share, -largest / total]);
            },
        );
        GradientFactors { target: result, row }
    }

    /// The one of larger magnitude; NaN if one is.
    #[inline(always)]
    fn larger<R: Real>(most: R, c: R) -> R {
        let is_larger = c.max(-c) > most.max(-most);
        if is_larger || c.partial_cmp(&c).is_none() { c } else { most }
    }

    pub fn gradient<E: Element>(a: &Tensor, targets: TargetRows, factors: &GradientFactors) {
        let (weight, offsets) = (Rows::<E>::of(targets.weight), values::<i64>(targets.offsets));
        let (a, factors) = (Rows::of(a), [&factors.target, &factors.row].map(Rows::of));
        assert!(weight.is_apart_from(&a) && factors.iter().all(|factor| weight.is_apart_from(factor)));
        each_row::<E, _, _, _>(
            [],
            [a],
            factors,
            #[inline(always)]
            |i, [], [a], [target, row]| differentiate(a, weight, own(&offsets, i), target, row),
        );
    }

    pub fn wide_gradient<E: Element>(a: &Tensor, targets: TargetRows, factors: &GradientFactors) {
        let (weight, offsets) = (Rows::<E>::of(targets.weight), values::<i64>(targets.offsets));
        let written = [a, &factors.target, &factors.row].map(Rows::of);
        assert!(written.iter().all(|rows| weight.is_apart_from(rows)));
        each_row::<E, _, _, _>(
            [],
            [],
            written,
            #[inline(always)]
            |i, [], [], [a, target, row]| differentiate(a, weight, own(&offsets, i), target, row),
        );
    }

    /// Rows of the targets of token `i`.
    #[inline(always)]
    fn own(offsets: &[i64], i: usize) -> std::ops::Range<usize> {
        offsets[i] as usize..offsets[i + 1] as usize
    }

    /// a ← (share·a − Σ_t target_t·w_t)·scale for one token.
    #[inline(always)]
    fn differentiate<A, E>(
        a: &mut [A],
        weight: Rows<E>,
        own: std::ops::Range<usize>,
        target: &[E::Accum],
        row: &[E::Accum],
    ) where
        A: Element<Accum = E::Accum>,
        E: Element,
    {
        let (share, scale) = (row[0], row[1]);
        let mut first = 0;
        for a in a.chunks_mut(BLOCK) {
            let mut sum = [E::Accum::ZERO; BLOCK];
            let sum = &mut sum[..a.len()];
            for (sum, a) in sum.iter_mut().zip(&*a) {
                *sum = a.to_accum() * share;
            }
            for (t, &factor) in own.clone().zip(target) {
                // SAFETY: `each_row` writes to a, the factors' rows and nothing else, and both callers check that the
                // weight shares no byte with these: no `&mut` of a weight row exists.
                let w_t = unsafe { weight.part(t, first..first + a.len()) };
                for (sum, w_t) in sum.iter_mut().zip(w_t) {
                    *sum = *sum - w_t.to_accum() * factor;
                }
            }
            for (a, &mut sum) in a.iter_mut().zip(sum) {
                *a = A::narrow(sum * scale);
            }
            first += a.len();
        }
    }
}

/// The same in libtorch's operations, for tensors that no kernel takes.
mod torch {
    use super::*;

    pub fn exponentials(sums: &Sums, logits: &Tensor, targets: &Tensor) -> Tensor {
        let Sums { maximum, sum, target_logits } = sums;
        let inside = targets.ge(0).logical_and(&targets.lt(logits.size()[1]));
        let at = inside.nonzero();
        let (token, column) = (at.select(1, 0), at.select(1, 1));
        let vocabulary = targets.index(&[Some(&token), Some(&column)]);
        let at_target = [Some(&token), Some(&vocabulary)];
        let mut wide_logits = logits.to_kind(maximum.kind());
        let new_maximum = maximum.maximum(&wide_logits.amax([1i64], true));
        let chosen = wide_logits.index(&at_target);
        let _ = target_logits.shallow_clone().index_put_(&[Some(&token), Some(&column)], &chosen, false);
        let _ = wide_logits.g_sub_(&new_maximum).exp_();
        let _ = wide_logits.index_put_(&at_target, &chosen.zeros_like(), false);
        let rescale = (maximum - &new_maximum).exp();
        let _ = sum.shallow_clone().g_mul_(&rescale).g_add_(&wide_logits.sum_dim_intlist(1, true, None));
        maximum.shallow_clone().copy_(&new_maximum);
        logits.shallow_clone().copy_(&wide_logits);
        rescale
    }

    /// Σ_{u≠t} x_u `[tokens, width]` of x_t: a product with 1 − I, which subtracts nothing.
    pub fn sum_of_others(x: &Tensor) -> Tensor {
        let width = x.size()[1];
        let options = (x.kind(), x.device());
        x.mm(&(Tensor::ones([width, width], options) - Tensor::eye(width, options)))
    }

    pub fn factors(sums: &Sums, coefficients: &Tensor) -> GradientFactors {
        let e = sums.target_exponentials();
        let largest = coefficients.gather(1, &coefficients.abs().argmax(1, true), false);
        let relative = (coefficients / &largest).where_self(&largest.not_equal(0.0), coefficients);
        let total = &sums.sum + e.sum_dim_intlist(1, true, None);
        let target = &relative * (&sums.sum + sum_of_others(&e)) - e * sum_of_others(&relative);
        let share = relative.sum_dim_intlist(1, true, None);
        // Rounds as libtorch on a GPU divides a scalar by a tensor.
        let scale = (total * -largest.reciprocal()).reciprocal();
        GradientFactors { target, row: Tensor::cat(&[share, scale], 1) }
    }

    pub fn gradient(a: &Tensor, targets: TargetRows, factors: &GradientFactors) {
        let TargetRows { weight, offsets } = targets;
        let (share, scale) = (factors.row.narrow(1, 0, 1), factors.row.narrow(1, 1, 1));
        let mut sum = a * share;
        let tokens = a.size()[0];
        let (first, end) = (offsets.narrow(0, 0, tokens), offsets.narrow(0, 1, tokens));
        for column in 0..factors.target.size()[1] {
            // A token comes once in a column, so the order of additions is fixed.
            let at = &first + column;
            let token = at.lt_tensor(&end).nonzero().view([-1]);
            let w_t = weight.index_select(0, &at.index_select(0, &token));
            let factor = factors.target.narrow(1, column, 1).index_select(0, &token);
            let _ = sum.index_add_(0, &token, &(w_t * -factor));
        }
        a.shallow_clone().copy_(&(sum * scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, distance, everywhere, leaf};
    use half::bf16;

    /// Distinct targets `[tokens, width]` of a vocabulary; every other token has −1 in all columns but the first.
    fn targets_of(tokens: i64, width: i64, vocabulary: i64) -> Tensor {
        let id = |i: i64, k: i64| if k > 0 && i % 2 > 0 { -1 } else { (i * 7919 + k * 61) % vocabulary };
        let ids: Vec<i64> = (0..tokens).flat_map(|i| (0..width).map(move |k| id(i, k))).collect();
        Tensor::from_slice(&ids).view([tokens, width])
    }

    /// p, s, l_t and m of `logits` `[tokens, vocabulary]` in fp64, by the formulas.
    fn exact(logits: &Tensor, targets: &Tensor) -> [Tensor; 4] {
        let at = targets.maximum(&targets.narrow(1, 0, 1));
        let m = logits.amax([1i64], true);
        let p = (logits - &m).exp().scatter_value(1, &at, 0.0);
        let s = p.sum_dim_intlist(1, true, Kind::Double);
        let none = f64::NEG_INFINITY;
        [p, s, logits.gather(1, &at, false).where_scalarother(&targets.ge(0), none), m]
    }

    #[test]
    fn chunks_of_logits_become_sums() {
        type Step<'a> = &'a dyn Fn(&Sums, &Tensor, &Tensor) -> Tensor;
        let on_device = cuda::on_host::kernels();
        let device = |sums: &Sums, logits: &Tensor, targets: &Tensor| {
            let e = sums.maximum.empty_like();
            let all = [&sums.maximum, &sums.sum, &sums.target_logits, &e];
            assert!(on_device.exponentials(logits, targets, all));
            e
        };
        let sizes = [
            (1, 1, 1, 1),
            (0, 5, 2, 1),
            (3, 131, 60, 1),
            (5, 1000, 999, 2),
            (4, 1000, 600, 3),
            (2, 9008, 4000, 1),
        ];
        for (kind, tolerance) in KINDS {
            for (tokens, vocabulary, cut, width) in sizes {
                let logits = (leaf(&[tokens, vocabulary]).detach() * 4.0).to_kind(kind);
                let targets = targets_of(tokens, width, vocabulary);
                let [p, s, target_logits, m] = exact(&logits.to_kind(Kind::Double), &targets);
                // Half a unit in the last place of what sums are taken in: for each unit of an exponent l − m, four
                // for each of two exponentials, one for each addition of a lane.
                let unit = if kind == Kind::Double { f64::EPSILON } else { f64::from(f32::EPSILON) } / 2.0;
                let exponents = 2.0 * distance(&logits, &logits.zeros_like());
                let rounding = unit * (exponents + 8.0 + (vocabulary as f64 / LANES as f64).ceil());
                let check = |step: Step| {
                    let sums = Sums::new(tokens, width, kind, Device::Cpu);
                    let ours = logits.copy();
                    let _ = step(&sums, &ours.narrow(1, 0, cut), &targets);
                    let e = step(&sums, &ours.narrow(1, cut, vocabulary - cut), &(&targets - cut));
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
                    assert_eq!(sums.target_logits.to_kind(Kind::Double), target_logits);
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
            let sums = Sums::new(2, 2, Kind::BFloat16, Device::Cpu);
            let _ = sums.exponentials(&logits.copy(), &Tensor::from_slice(&[3i64, 700, -1, -1]).view([2, 2]));
            seen.borrow_mut().push(Vec::<f32>::try_from(sums.sum.view([-1])).expect("floats"));
        });
        assert!(seen.borrow().iter().all(|sum| *sum == seen.borrow()[0]), "{seen:?}");
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let logits = leaf(&[1, 300]).detach().to_kind(Kind::BFloat16);
        let _ = logits.get(0).get(200).fill_(f64::NAN);
        let sums = Sums::new(1, 1, Kind::BFloat16, Device::Cpu);
        let _ = sums.exponentials(&logits, &Tensor::from_slice(&[3i64]).view([1, 1]));
        assert!(sums.log_probabilities().double_value(&[0, 0]).is_nan());
        let broken = Tensor::from_slice(&[0.5f32, f32::NAN, 2.0]).view([1, 3]);
        let sums = Sums { target_logits: broken.zeros_like(), ..Sums::new(1, 1, Kind::Float, Device::Cpu) };
        for factors in [rows::factors::<f32>(&sums, &broken), torch::factors(&sums, &broken)] {
            assert!(factors.row.double_value(&[0, 1]).is_nan());
        }
    }

    #[test]
    fn log_probabilities_are_those_of_a_softmax() {
        for (kind, unit) in [(Kind::Double, f64::EPSILON), (Kind::Float, f64::from(f32::EPSILON))] {
            // Below −20 libtorch's softplus drops a term of 2e-9, which is nothing in fp32.
            let logits = leaf(&[4, 50]).detach() * 2.0;
            let targets = targets_of(4, 3, 50);
            let sums = Sums::new(4, 3, kind, Device::Cpu);
            let _ = sums.exponentials(&logits.to_kind(kind).copy(), &targets);
            let whole = logits.to_kind(kind).to_kind(Kind::Double).log_softmax(1, None);
            let here = targets.ge(0);
            let present = |t: &Tensor| t.to_kind(Kind::Double).where_scalarother(&here, 0.0);
            let expected = present(&whole.gather(1, &targets.clamp_min(0), false));
            // Differences of logits are rounded to the unit of the largest of them.
            let off = distance(&present(&sums.log_probabilities()), &expected);
            let largest = distance(&logits, &logits.zeros_like());
            assert!(off < 8.0 * unit * largest, "{kind:?}: {off}");
        }
    }

    /// Rows of targets with random sums, such as a pass leaves them.
    struct Case {
        sums: Sums,
        w_t: Tensor,
        offsets: Tensor,
        coefficients: Tensor,
        hidden: i64,
    }

    impl Case {
        fn new(kind: Kind, tokens: i64, width: i64, hidden: i64) -> Self {
            let random = |rows: i64, columns: i64, kind| leaf(&[rows, columns]).detach().to_kind(kind);
            let wide = accum_kind(kind);
            let here = targets_of(tokens, width, 1000).ge(0);
            let counts = here.sum_dim_intlist(1, false, Kind::Int64);
            let offsets = Tensor::cat(
                &[counts.narrow(0, 0, 0), Tensor::zeros([1], (Kind::Int64, Device::Cpu)), counts],
                0,
            );
            let offsets = offsets.cumsum(0, Kind::Int64);
            let entries = offsets.int64_value(&[tokens]);
            // m is the maximum of all logits.
            let maximum = random(tokens, 1, wide).abs() + 3.0;
            let target_logits = random(tokens, width, wide).clamp_max(3.0);
            let target_logits = target_logits.where_scalarother(&here, f64::NEG_INFINITY);
            let sums = Sums { maximum, sum: random(tokens, 1, wide).abs() + 0.5, target_logits };
            let coefficients = random(tokens, width, wide).where_scalarother(&here, 0.0);
            Self { sums, w_t: random(entries, hidden, kind), offsets, coefficients, hidden }
        }

        fn targets(&self) -> TargetRows<'_> {
            TargetRows { weight: &self.w_t, offsets: &self.offsets }
        }

        /// dx = Σ c_t·w_t − C/Z·(a + Σ e_t·w_t) in fp64.
        fn expected(&self, a: &Tensor) -> Tensor {
            let double = |t: &Tensor| t.to_kind(Kind::Double);
            let e = (double(&self.sums.target_logits) - double(&self.sums.maximum)).exp();
            let z = double(&self.sums.sum) + e.sum_dim_intlist(1, true, None);
            let (c, tokens) = (double(&self.coefficients), self.sums.sum.size()[0]);
            let total = c.sum_dim_intlist(1, true, None);
            let factors = &c - &total / &z * e;
            let d_x = double(a) * -(total / z);
            for i in 0..tokens {
                let (first, end) = (self.offsets.int64_value(&[i]), self.offsets.int64_value(&[i + 1]));
                let own = double(&self.w_t.narrow(0, first, end - first));
                let _ = d_x.get(i).g_add_(
                    &factors.get(i).narrow(0, 0, end - first).unsqueeze(0).mm(&own).view([self.hidden]),
                );
            }
            d_x
        }
    }

    #[test]
    fn accumulates() {
        for (kind, tolerance) in KINDS {
            for (tokens, hidden) in [(0, 3), (1, 1), (4, 17), (50, 576)] {
                let random = |columns: i64, kind| leaf(&[tokens, columns]).detach().to_kind(kind);
                let double = |t: &Tensor| t.to_kind(Kind::Double);
                let (a, e) = (random(hidden, accum_kind(kind)), random(1, accum_kind(kind)));
                let product = random(hidden, kind);
                let expected = double(&a) * double(&e) + double(&product);
                everywhere(|| {
                    let ours = a.copy();
                    accumulate(&ours, &e, &product);
                    let off = distance(&ours, &expected);
                    assert!(off < tolerance * 8.0, "{kind:?} {tokens} {hidden}: {off}");
                });
            }
        }
    }

    #[test]
    fn differentiates_for_every_number_of_targets() {
        let on_device = cuda::on_host::kernels();
        for (kind, tolerance) in KINDS {
            for (tokens, width, hidden) in
                [(0, 1, 3), (1, 1, 1), (4, 1, 17), (50, 1, 576), (5, 3, 17), (9, 4, 264), (0, 2, 8)]
            {
                let case = Case::new(kind, tokens, width, hidden);
                for a_kind in [kind, accum_kind(kind)] {
                    let a = leaf(&[tokens, hidden]).detach().to_kind(a_kind);
                    let expected = case.expected(&a);
                    let near = |ours: &Tensor| {
                        let off = distance(ours, &expected);
                        assert!(
                            off < tolerance * 16.0,
                            "{kind:?} {a_kind:?} {tokens} {width} {hidden}: {off}"
                        );
                    };
                    everywhere(|| {
                        let ours = a.copy();
                        case.sums.gradient(&ours, case.targets(), &case.coefficients);
                        near(&ours);
                    });
                    let factors = torch::factors(&case.sums, &case.coefficients);
                    let theirs = a.copy();
                    torch::gradient(&theirs, case.targets(), &factors);
                    near(&theirs);
                    if kind != Kind::Double && hidden % 8 == 0 {
                        // The device rounds every operation as libtorch does.
                        let ours = a.copy();
                        assert!(on_device.head_gradient(&ours, case.targets(), &factors));
                        assert_eq!(ours, theirs, "{kind:?} {a_kind:?} {tokens} {width} {hidden}");
                    }
                }
            }
        }
    }

    /// A coefficient by row costs one target no bit: it is (a − s·w_t)·(scale / Z), in this order.
    #[test]
    fn one_target_is_scaled_as_by_a_scalar() {
        let (scale, hidden) = (1.0f32 / 37.0, 300);
        for kind in [Kind::Float, Kind::BFloat16] {
            let case = Case::new(kind, 6, 1, hidden);
            let floats =
                |t: &Tensor| Vec::<f32>::try_from(t.to_kind(Kind::Float).view([-1])).expect("floats");
            let a = leaf(&[6, hidden]).detach().to_kind(kind);
            let Sums { maximum, sum, target_logits } = &case.sums;
            let [m, s, l, w] = [maximum, sum, target_logits, &case.w_t].map(floats);
            let expected = floats(&a).into_iter().enumerate().map(|(at, a)| {
                let i = at / hidden as usize;
                let total = s[i] + Real::exp(l[i] - m[i]);
                let value = (a - w[at] * s[i]) * (scale / total);
                if kind == Kind::Float { value } else { bf16::from_f32(value).to_f32() }
            });
            let expected: Vec<u32> = expected.map(f32::to_bits).collect();
            case.sums.gradient(&a, case.targets(), &(case.coefficients.ones_like() * f64::from(-scale)));
            assert_eq!(floats(&a).into_iter().map(f32::to_bits).collect::<Vec<_>>(), expected, "{kind:?}");
        }
    }

    #[test]
    fn confident_targets_keep_their_digits() {
        // 1 − p of the first target is 1e-9 and more digits than fp32 has beside 1.
        let (s, others) = (6e-10, [0.0f64, (3e-10f64).ln(), (1e-10f64).ln()]);
        let tensor = |kind, values: &[f64]| Tensor::from_slice(values).to_kind(kind).view([1, -1]);
        let run = |kind| {
            let sums = Sums {
                maximum: tensor(kind, &[0.0]),
                sum: tensor(kind, &[s]),
                target_logits: tensor(kind, &others),
            };
            let (a, w_t) =
                (tensor(kind, &[1e-10, -2e-10]), tensor(kind, &[1.0, 2.0, 3.0, -1.0, 0.5, 2.5]).view([3, 2]));
            let offsets = Tensor::from_slice(&[0i64, 3]);
            let coefficients = tensor(kind, &[-1.0, -2e-9, -1e-9]);
            sums.gradient(&a, TargetRows { weight: &w_t, offsets: &offsets }, &coefficients);
            (sums.log_probabilities().to_kind(Kind::Double), a.to_kind(Kind::Double))
        };
        let ((log_p, d_x), (exact_log_p, exact_d_x)) = (run(Kind::Float), run(Kind::Double));
        // 1 − p = (s + e_2 + e_3) / Z
        assert!((exact_log_p.double_value(&[0, 0]) / -1e-9 - 1.0).abs() < 1e-8, "{exact_log_p}");
        let off = |ours: Tensor, exact: &Tensor| (ours / exact - 1.0).abs().max().double_value(&[]);
        assert!(off(log_p, &exact_log_p) < 1e-6);
        assert!(off(d_x, &exact_d_x) < 1e-5);
    }
}
