//! Periodic merges (ReLoRA, Lialin et al., 2023): the adapter goes into the base, and a fresh one is trained on.

use super::{Run, Trainer};
use crate::{
    comm::Reduce,
    config::LoraArgs,
    error::{Error, Result},
    lora::{MergeInto, MergePlan, Survival, merge::MUCH_LOST},
};
use std::collections::HashMap;

/// Merges of a run: when they fall, and those that were made.
pub(super) struct Merger {
    plan: MergePlan,
    interval: usize,
    at_end: bool,
    reset_optimizer: bool,
    seed: u64,
    done: u64,
}

impl Merger {
    /// That of `run`, with the merges before the step that it resumes from.
    pub fn new(run: &Run) -> Self {
        let LoraArgs { merge_lora_interval: interval, merge_at_end: at_end, .. } = run.config.lora;
        Self {
            plan: MergePlan::new(&run.sites, &run.shapes),
            interval,
            at_end,
            reset_optimizer: run.config.lora.reset_optimizer_on_merge,
            seed: run.config.train.seed,
            done: run.resumed().map_or(0, |resumed| resumed.state.merges),
        }
    }

    /// The tensors that merges change.
    pub fn plan(&self) -> &MergePlan {
        &self.plan
    }

    /// Merges made.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// True if a merge follows the update of `step` (1-based), the `last` or not.
    pub fn is_due(&self, step: usize, last: bool) -> bool {
        self.interval > 0 && step.is_multiple_of(self.interval) || self.at_end && last
    }

    /// W ← round(W + ΔW) on the ranks that own it; then A is fresh and B zero, and the optimizer too if the run asks
    /// for it. Collective.
    ///
    /// # Errors
    /// A merged value that is not finite.
    pub fn merge(&mut self, trainer: &mut Trainer, step: usize) -> Result<()> {
        let Trainer { model, session, world, .. } = trainer;
        let mut kept = Survival::default();
        for unit in 0..model.spec().layers.len() {
            let whole = session.adapter.whole_of(unit)?;
            let values: HashMap<String, Vec<f32>> =
                whole.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
            let mut change = MergeInto { plan: &self.plan, values: &values, kept: Survival::default() };
            model.update_layer(unit, &mut change)?;
            kept += change.kept;
        }
        let mut sums = [kept.delta, kept.lost];
        world.all_reduce_host(&mut sums, Reduce::Sum)?;
        if !sums[1].is_finite() {
            let reason = format!(
                "the merge after step {step} gives weights that are not finite; lower train.lr or lora.lora_alpha, and \
                 go on from an earlier step"
            );
            return Err(if world.rank() == 0 {
                Error::Failure(reason)
            } else {
                Error::Elsewhere { code: 1 }
            });
        }
        self.done += 1;
        session.adapter.init_after_merge(self.seed, self.done)?;
        if self.reset_optimizer {
            session.optimizer.reset();
        }
        let lost = Survival { delta: sums[0], lost: sums[1] }.lost_share();
        if world.rank() == 0 {
            tracing::info!("merged after step {step}: {lost:.3} of the adapter was lost by rounding");
            if lost > MUCH_LOST {
                tracing::warn!(
                    "the merge after step {step} lost {lost:.3} of the adapter by rounding: let more steps pass between \
                     merges (lora.merge_lora_interval), or keep the base in more digits ({})",
                    if model.spec().quantization.is_some() {
                        "lora.quant_format: block_fp8, or enable_qlora: false"
                    } else {
                        "train.enable_mixed_precision: false"
                    }
                );
            }
        }
        Ok(())
    }
}
