//! Policy losses: terms of single targets, from their log-probabilities under the learner and under others.
//!
//! p is the learner's probability of a target, q that of the policy that sampled it, A its advantage, sg(·) a value
//! that has no gradient. The ratio is ρ = p/q, with ∂ρ/∂log p = ρ; [`super::sequence`] has one for whole sequences.
//! All is computed in fp64 on the host: a micro-batch has few targets beside all else.

/// Bound of log-ratios in the losses of xorl, which clamps them.
pub(super) const LOG_RATIO_BOUND: f64 = 20.0;

/// A target, as the losses see it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Target {
    pub log_p: f64,
    /// log q
    pub old: f64,
    pub advantage: f64,
    /// Thresholds of the ratio.
    pub low: f64,
    pub high: f64,
    /// log p under the policy of the rollout, for the correction of stale data.
    pub rollout: f64,
    /// log p under the reference model.
    pub reference: f64,
}

impl Target {
    /// clip(ρ, low, high); high wins where they are in the wrong order.
    pub fn clip(&self, ratio: f64) -> f64 {
        ratio.max(self.low).min(self.high)
    }

    /// The ratio of a log-ratio that may overflow.
    pub fn ratio(&self) -> Ratio {
        Ratio::of(self.log_p - self.old)
    }
}

/// A ratio with its derivative by log p of the target.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ratio {
    pub value: f64,
    pub slope: f64,
}

impl Ratio {
    /// ρ = exp(log ρ), ∂ρ/∂log p = ρ.
    pub fn of(log_ratio: f64) -> Self {
        let value = log_ratio.exp();
        Self { value, slope: value }
    }

    /// ρ = exp(clamp(log ρ, ±20)), whose derivative is 0 where it is clamped.
    pub fn bounded(log_ratio: f64) -> Self {
        let value = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp();
        Self { value, slope: if log_ratio.abs() > LOG_RATIO_BOUND { 0.0 } else { value } }
    }
}

/// The part of a target in a loss.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Term {
    pub value: f64,
    /// ∂value/∂log p
    pub slope: f64,
    /// A threshold took the gradient away, or another ratio's place.
    pub clipped: bool,
    /// IcePop left the target out.
    pub masked: bool,
    pub ratio: f64,
}

/// −ρA, ∂ = −ρA.
pub(super) fn importance_sampling(ratio: Ratio, target: &Target) -> Term {
    let a = target.advantage;
    Term { value: -ratio.value * a, slope: -ratio.slope * a, ratio: ratio.value, ..Term::default() }
}

/// max(−ρA, −clip(ρ)A); ∂ = −ρA where that is the larger, else 0.
pub(super) fn clipped(ratio: Ratio, target: &Target) -> Term {
    let free = importance_sampling(ratio, target);
    let bound = -target.clip(ratio.value) * target.advantage;
    if bound > free.value { Term { value: bound, slope: 0.0, clipped: true, ..free } } else { free }
}

/// −sg(clip(ρ))·A·log p, ∂ = −clip(ρ)·A.
pub(super) fn cispo(ratio: Ratio, target: &Target) -> Term {
    let clip = target.clip(ratio.value);
    let slope = -clip * target.advantage;
    let clipped = clip != ratio.value;
    Term { value: slope * target.log_p, slope, clipped, masked: false, ratio: ratio.value }
}

/// −[A·log p − ½β(log p − log q)²], ∂ = −A + β(log p − log q).
pub(super) fn dro(beta: f64, target: &Target) -> Term {
    let (a, d) = (target.advantage, target.log_p - target.old);
    let ratio = target.ratio().value;
    Term { value: -a * target.log_p + 0.5 * beta * d * d, slope: -a + beta * d, ratio, ..Term::default() }
}

/// Parts of `policy_loss` besides its thresholds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct PolicyLoss {
    /// c of dual clipping.
    pub dual_clip: Option<f64>,
    /// β of IcePop.
    pub icepop: Option<f64>,
    /// Limits of the weights that correct stale data.
    pub tis: Option<[f64; 2]>,
}

impl PolicyLoss {
    /// w·m·L with
    ///
    /// - L = max(−ρA, −clip(ρ)A), and for A < 0 at most −cA (dual clip, Ye et al., 2019); ∂L = −ρA, 0 where clipped;
    /// - m = 1 if 1/β ≤ ρ ≤ β, else 0 (IcePop);
    /// - w = sg(clip(p/rollout)) (truncated importance sampling).
    ///
    /// The gradient has the factors m and w too.
    pub fn term(&self, ratio: Ratio, target: &Target) -> Term {
        let mut term = clipped(ratio, target);
        if let Some(c) = self.dual_clip
            && target.advantage < 0.0
            && -c * target.advantage < term.value
        {
            (term.value, term.slope, term.clipped) = (-c * target.advantage, 0.0, true);
        }
        if let Some(beta) = self.icepop {
            term.masked = !(1.0 / beta..=beta).contains(&ratio.value);
        }
        let weight = match self.tis {
            _ if term.masked => return Term { value: 0.0, slope: 0.0, ..term },
            Some([low, high]) => stale_weight(target).max(low).min(high),
            None => 1.0,
        };
        Term { value: term.value * weight, slope: term.slope * weight, ..term }
    }
}

/// p/rollout, before it is clipped.
pub(super) fn stale_weight(target: &Target) -> f64 {
    Ratio::bounded(target.log_p - target.rollout).value
}

/// An estimator of the divergence from the reference model, d = log p − log p_ref (Schulman, 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Divergence {
    /// d, ∂ = 1.
    K1,
    /// ½d², ∂ = d.
    K2,
    /// exp(−d) + d − 1, ∂ = 1 − exp(−d), with d clamped to ±10.
    K3,
}

impl Divergence {
    /// The value and its derivative by log p.
    pub fn of(self, target: &Target) -> (f64, f64) {
        const BOUND: f64 = 10.0;
        let d = target.log_p - target.reference;
        match self {
            Self::K1 => (d, 1.0),
            Self::K2 => (0.5 * d * d, d),
            Self::K3 => {
                let inside = d.clamp(-BOUND, BOUND);
                let slope = if d.abs() > BOUND { 0.0 } else { 1.0 - (-inside).exp() };
                ((-inside).exp() + inside - 1.0, slope)
            }
        }
    }
}
