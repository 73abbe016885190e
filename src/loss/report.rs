//! Statistics of policy losses, over the targets that have a part in the loss.

use super::{
    Sequence,
    formula::Formula,
    inputs::Columns,
    policy::{LOG_RATIO_BOUND, PolicyLoss, stale_weight},
};
use std::collections::BTreeMap;

/// Statistics of numbers.
#[derive(Clone, Copy, Debug)]
struct Spread {
    count: f64,
    sum: f64,
    min: f64,
    max: f64,
}

impl Default for Spread {
    fn default() -> Self {
        Self { count: 0.0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY }
    }
}

impl Spread {
    /// A number that is not finite says nothing, and is left out.
    fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.count += 1.0;
            self.sum += value;
            self.min = self.min.min(value);
            self.max = self.max.max(value);
        }
    }

    /// Mean, minimum and maximum; `none` where there was no number.
    fn told(&self, none: f64) -> [f64; 3] {
        if self.count == 0.0 { [none; 3] } else { [self.sum / self.count, self.min, self.max] }
    }
}

/// See [`super::NamedLoss::report`]. Cross-entropy has no statistics.
pub(super) fn statistics(
    formula: &Formula,
    sequences: &[Sequence],
    log_probs: &[impl AsRef<[f32]>],
) -> BTreeMap<String, f64> {
    if *formula == Formula::CrossEntropy {
        return BTreeMap::new();
    }
    let inputs = formula.inputs();
    let parts = match formula {
        Formula::PolicyLoss { parts, .. } => *parts,
        _ => PolicyLoss { dual_clip: None, icepop: None, tis: None },
    };
    let share = |is: bool| f64::from(u8::from(is));
    let bounded = |log_ratio: f64| log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND);
    let [mut ratio, mut clipped, mut masked, mut k3, mut entropy, mut divergence, mut tis, mut tis_clipped] =
        [Spread::default(); 8];
    for (sequence, log_probs) in sequences.iter().zip(log_probs) {
        let log_p: Vec<f64> = log_probs.as_ref().iter().map(|&value| f64::from(value)).collect();
        let columns = Columns::new(&inputs, &[*sequence]);
        let tokens = sequence.targets.len() / sequence.k;
        let is_present = |i: usize| sequence.targets[i] >= 0;
        formula.for_each(&columns, (&[0, tokens], sequence.k), &log_p, is_present, |_, target, term| {
            let log_ratio = bounded(target.log_p - target.old);
            ratio.add(bounded(term.ratio.ln()).exp());
            clipped.add(share(term.clipped));
            masked.add(share(term.masked));
            k3.add(log_ratio.exp() - log_ratio - 1.0);
            entropy.add(-target.old);
            if let Some(value) = formula.divergence(target) {
                divergence.add(value);
            }
            if let Some([low, high]) = parts.tis {
                let weight = stale_weight(target);
                tis.add(weight);
                tis_clipped.add(share(!(low..=high).contains(&weight)));
            }
        });
    }
    let mut told = BTreeMap::new();
    let mut tell = |name: &str, value: f64| {
        told.insert(name.to_owned(), value);
    };
    let [mean, min, max] = ratio.told(1.0);
    tell("ratio_mean:mean", mean);
    tell("ratio_min:min", min);
    tell("ratio_max:max", max);
    tell("pg_clipfrac:mean", clipped.told(0.0)[0]);
    tell("kl_sample_train_k3:mean", k3.told(0.0)[0]);
    tell("entropy_sample:mean", entropy.told(0.0)[0]);
    if parts.icepop.is_some() {
        tell("icepop_maskfrac:mean", masked.told(0.0)[0]);
    }
    if matches!(formula, Formula::DrGrpo { beta, .. } if *beta > 0.0) {
        tell("kl_ref:mean", divergence.told(0.0)[0]);
    }
    if parts.tis.is_some() {
        let [mean, min, max] = tis.told(1.0);
        tell("tis_mean:mean", mean);
        tell("tis_min:min", min);
        tell("tis_max:max", max);
        tell("tis_clipfrac:mean", tis_clipped.told(0.0)[0]);
    }
    told
}
