//! Evaluation: the mean loss of a token of the rows that validate, the same in any topology.
//!
//! Every rank computes its part of the rows, forward alone, in as many micro-batches as every other, perhaps empty
//! ones: the ranks gather the same layers in the same order. Weights, random numbers and the order of training are left
//! as they are.

use super::{Run, StopSignals, reference::ReferenceModel, run::deal, signals::Asked};
use crate::{
    comm::{Communicator, Reduce},
    error::{Error, Result},
    lora::Adapter,
    loss::Rewards,
    model::transformer::Transformer,
};
use std::time::Instant;

/// Result of an evaluation, the same on every rank but for the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy of a token that has a target, in nats; mean loss of a pair in a run with a loss over such.
    pub loss: f64,
    /// Tokens that have a target, or pairs, over all ranks.
    pub tokens: u64,
    /// Rewards of the pairs, of a loss over such.
    pub rewards: Option<Rewards>,
    /// Seconds of this rank.
    pub seconds: f64,
}

impl Evaluation {
    /// e to the loss; infinite where that is beyond fp64.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl Run {
    /// True if an evaluation follows step `done` (1-based): after every `train.eval_steps` steps, without that at the
    /// end of each epoch; and after the `last`.
    pub(super) fn evaluates_after(&self, done: usize, ends_epoch: bool, last: bool) -> bool {
        let due = match self.config.train.eval_steps {
            None | Some(0) => ends_epoch,
            Some(steps) => done.is_multiple_of(steps),
        };
        self.dataset.validation_rows() > 0 && (due || last)
    }

    /// The loss of the rows that validate under `adapters`, on all ranks of `world`; `reference`: of a loss that
    /// compares with one. Slots are empty afterwards: the next step gathers as much as the first. `None`: `stop` was
    /// asked for on some rank before the last micro-batch, and the rest was left. Collective.
    ///
    /// # Errors
    /// A collective fails, or no row validates.
    pub(super) fn evaluate(
        &self,
        model: &mut Transformer,
        adapters: &mut [&mut Adapter],
        world: &dyn Communicator,
        stop: Option<&StopSignals>,
        mut reference: Option<&mut ReferenceModel>,
    ) -> Result<Option<Evaluation>> {
        let (begin, device) = (Instant::now(), model.device().tensors());
        let (rows, micro) = (self.dataset.validation_rows(), self.config.train.micro_batch_size);
        let (mut sum, mut tokens, mut rewards) = (0.0, 0, None::<Rewards>);
        let mut is_left = false;
        for own in deal(&self.mesh, world.rank(), 0..rows, micro) {
            if let Some(stop) = stop {
                is_left = stop.agreed(world, 0.0)?.0 != Asked::No;
                if is_left {
                    break;
                }
            }
            let rows = own.into_iter().map(|index| self.dataset.validation_row(index));
            let rows = rows.collect::<Result<Vec<_>, _>>()?;
            let compared = reference.as_mut().map(|reference| reference.log_probs(model, &rows, self.pad_id));
            let micro_batch =
                self.loss.evaluated(&rows, self.pad_id, compared.transpose()?.as_ref(), device)?;
            let (loss, valid, own) = micro_batch.evaluate(model, adapters)?;
            sum += loss;
            tokens += valid;
            if let Some(own) = own {
                rewards.get_or_insert_default().add(&own);
            }
        }
        if let Some(rewards) = &mut rewards {
            let mut sums = rewards.sums();
            world.all_reduce_host(&mut sums, Reduce::Sum)?;
            *rewards = Rewards::of(sums);
        }
        let mut all = [sum, tokens as f64];
        world.all_reduce_host(&mut all, Reduce::Sum)?;
        model.forget_gathered()?;
        adapters.iter_mut().try_for_each(|adapter| adapter.regions_mut().invalidate())?;
        reference.map_or(Ok(()), ReferenceModel::forget_gathered)?;
        if is_left {
            return Ok(None);
        }
        let [sum, tokens] = all;
        if tokens == 0.0 {
            return Err(Error::Failure("no row that validates has a token with a loss (a bug)".into()));
        }
        let seconds = begin.elapsed().as_secs_f64();
        Ok(Some(Evaluation { loss: sum / tokens, tokens: tokens as u64, rewards, seconds }))
    }
}
