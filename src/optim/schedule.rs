//! The learning rate of a step: linear warm-up from `lr_start`, then constant, linear or cosine decay to `lr_min`
//! over `lr_decay_ratio` of the run. Pure.

use crate::config::{LrDecayStyle, Optimizer, RunConfig, TrainArgs};
use std::ops::Range;

/// The learning rate as a function of the step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    pub lr: f64,
    pub lr_min: f64,
    pub lr_start: f64,
    pub style: LrDecayStyle,
    pub warmup_steps: usize,
    /// Steps, warm-up included, after which the rate stays at `lr_min`.
    pub decay_steps: usize,
    /// Warm-up after merges, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_merge: Option<AfterMerge>,
}

/// The rise of the rate after each merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AfterMerge {
    /// Steps between merges.
    pub interval: usize,
    /// Steps of the rise.
    pub steps: usize,
}

impl AfterMerge {
    /// The part of the schedule's rate that `step` (0-based) uses.
    fn part(self, step: usize) -> f64 {
        match step.checked_rem(self.interval) {
            Some(since) if step >= self.interval && since < self.steps => {
                (since + 1) as f64 / self.steps as f64
            }
            _ => 1.0,
        }
    }
}

impl Schedule {
    /// The schedule of a run of `total_steps` as `config` has it.
    pub fn of_run(config: &RunConfig, total_steps: usize) -> Self {
        let lora = &config.lora;
        let (interval, steps) = (lora.merge_lora_interval, lora.merge_warmup_steps);
        let after_merge = (interval > 0 && steps > 0).then_some(AfterMerge { interval, steps });
        Self { after_merge, ..Self::new(&config.train, total_steps) }
    }

    /// The schedule of `total_steps` without merges.
    pub fn new(args: &TrainArgs, total_steps: usize) -> Self {
        let part = |ratio: f64| (ratio * total_steps as f64) as usize;
        let (lr, lr_min, lr_start) = match args.optimizer {
            // As xorl has it: each learning rate is its peak times one function of the step.
            Optimizer::Muon => {
                let peak = args.rule.muon_lr;
                (peak, args.lr_min / args.lr * peak, args.lr_start / args.lr * peak)
            }
            _ => (args.lr, args.lr_min, args.lr_start),
        };
        Self {
            lr,
            lr_min,
            lr_start,
            style: args.lr_decay_style,
            warmup_steps: args.lr_warmup_steps.unwrap_or_else(|| part(args.lr_warmup_ratio)),
            decay_steps: part(args.lr_decay_ratio),
            after_merge: None,
        }
    }

    /// The first of `steps` (0-based) at which this schedule's rate is not that of `other`.
    pub fn parts_from(&self, other: &Self, steps: Range<usize>) -> Option<usize> {
        if self == other {
            return None;
        }
        let settled = self.settled().max(other.settled());
        let end = steps.end.min(settled.saturating_add(1).max(steps.start.saturating_add(1)));
        (steps.start..end).find(|&step| self.rate(step) != other.rate(step))
    }

    /// The step from which on the rate stays as it is.
    fn settled(&self) -> usize {
        if self.after_merge.is_some() {
            return usize::MAX;
        }
        match self.style {
            LrDecayStyle::Constant => self.warmup_steps,
            LrDecayStyle::Linear | LrDecayStyle::Cosine => self.warmup_steps.max(self.decay_steps),
        }
    }

    /// The rate that the update of `step` (0-based) uses.
    pub fn rate(&self, step: usize) -> f64 {
        self.after_merge.map_or(1.0, |after| after.part(step)) * self.rate_without_merges(step)
    }

    fn rate_without_merges(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            let done = (step + 1) as f64 / self.warmup_steps as f64;
            return self.lr_start + (self.lr - self.lr_start) * done;
        }
        if self.style == LrDecayStyle::Constant {
            return self.lr;
        }
        if step >= self.decay_steps {
            return self.lr_min;
        }
        let done = (step - self.warmup_steps) as f64 / (self.decay_steps - self.warmup_steps).max(1) as f64;
        let left = match self.style {
            LrDecayStyle::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            LrDecayStyle::Linear | LrDecayStyle::Constant => 1.0 - done,
        };
        self.lr_min + (self.lr - self.lr_min) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(style: LrDecayStyle, warmup: f64, decay: f64) -> Schedule {
        let args = TrainArgs {
            lr: 1.0,
            lr_min: 0.1,
            lr_start: 0.2,
            lr_decay_style: style,
            lr_warmup_ratio: warmup,
            lr_decay_ratio: decay,
            ..TrainArgs::default()
        };
        Schedule::new(&args, 100)
    }

    #[test]
    fn warm_up_decay_and_tail() {
        let cosine = schedule(LrDecayStyle::Cosine, 0.1, 0.9);
        assert!((cosine.rate(0) - 0.28).abs() < 1e-12);
        assert!((cosine.rate(9) - 1.0).abs() < 1e-12);
        assert!((cosine.rate(10) - 1.0).abs() < 1e-12);
        assert!((cosine.rate(50) - 0.55).abs() < 1e-12);
        assert_eq!(cosine.rate(90), 0.1);
        let linear = schedule(LrDecayStyle::Linear, 0.0, 1.0);
        assert!((linear.rate(0) - 1.0).abs() < 1e-12);
        assert!((linear.rate(50) - 0.55).abs() < 1e-12);
        let constant = schedule(LrDecayStyle::Constant, 0.0, 1.0);
        assert_eq!((constant.rate(0), constant.rate(99)), (1.0, 1.0));
    }

    #[test]
    fn the_rate_rises_again_after_each_merge() {
        let constant = schedule(LrDecayStyle::Constant, 0.0, 1.0);
        let merging = Schedule { after_merge: Some(AfterMerge { interval: 10, steps: 4 }), ..constant };
        let rates: Vec<f64> = (8..16).map(|step| merging.rate(step)).collect();
        assert_eq!(rates, [1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        assert_eq!((merging.rate(0), merging.rate(20)), (1.0, 0.25));
        assert_eq!(merging.parts_from(&constant, 0..100), Some(10));
        assert_eq!(merging.parts_from(&constant, 14..20), None);
    }

    #[test]
    fn schedules_part_where_their_rates_do() {
        let args = |style, max_steps| {
            Schedule::new(
                &TrainArgs { lr_decay_style: style, lr_warmup_steps: Some(2), ..TrainArgs::default() },
                max_steps,
            )
        };
        let constant = |steps| args(LrDecayStyle::Constant, steps);
        assert_eq!(constant(10).parts_from(&constant(20), 5..20), None, "a longer run at a constant rate");
        let (short, long) = (args(LrDecayStyle::Cosine, 10), args(LrDecayStyle::Cosine, 20));
        assert_eq!(short.parts_from(&long, 0..20), Some(3), "the first of the decay has the peak in both");
        assert_eq!(long.parts_from(&short, 10..20), Some(10));
        assert_eq!(long.parts_from(&long, 0..20), None);
        let lower = Schedule { lr: 0.5 * short.lr, ..constant(10) };
        assert_eq!(lower.parts_from(&constant(10), 7..9), Some(7));
        assert_eq!(lower.parts_from(&constant(10), 7..7), None);
    }

    #[test]
    fn steps_of_the_warm_up_win_over_its_share() {
        let args = TrainArgs { lr_warmup_steps: Some(7), ..TrainArgs::default() };
        assert_eq!(Schedule::new(&args, 100).warmup_steps, 7);
        let args = TrainArgs { lr_warmup_ratio: 0.5, ..TrainArgs::default() };
        assert_eq!(Schedule::new(&args, 100).warmup_steps, 50);
    }
}
