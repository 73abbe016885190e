//! Evaluation: the mean loss of a token of the rows that validate, the same in any topology.
//!
//! Every rank computes its part of the rows, forward alone, in as many micro-batches as every other, perhaps empty
//! ones: the ranks gather the same layers in the same order. Weights, random numbers and the order of training are left
//! as they are.

use super::{MicroBatch, Run, StopSignals, run::deal};
use crate::{
    comm::{Communicator, Reduce},
    error::{Error, Result},
    lora::Adapter,
    model::transformer::Transformer,
};
use std::time::Instant;

/// Result of an evaluation, the same on every rank but for the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy of a token that has a target, in nats.
    pub loss: f64,
    /// Tokens that have a target, over all ranks.
    pub tokens: u64,
    /// Seconds of this rank.
    pub seconds: f64,
}

impl Evaluation {
    /// e to the loss; infinite where that is beyond fp64.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// An evaluation, and the requests to stop that came until its end.
pub(super) struct Evaluated {
    pub evaluation: Evaluation,
    /// A signal to any rank asks the run to stop.
    pub stopping: bool,
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

    /// The loss of the rows that validate under `adapters`, on all ranks of `world`. Slots are empty afterwards: the
    /// next step gathers as much as the first. Collective.
    ///
    /// # Errors
    /// A collective fails, or no row validates.
    pub(super) fn evaluate(
        &self,
        model: &mut Transformer,
        adapters: &mut [&mut Adapter],
        world: &dyn Communicator,
        stop: Option<&StopSignals>,
    ) -> Result<Evaluated> {
        let (begin, device) = (Instant::now(), model.device().tensors());
        let (rows, micro) = (self.dataset.validation_rows(), self.config.train.micro_batch_size);
        let (mut sum, mut tokens) = (0.0, 0);
        for own in deal(&self.mesh, world.rank(), 0..rows, micro) {
            let rows = own.into_iter().map(|index| self.dataset.validation_row(index));
            let rows = rows.collect::<Result<Vec<_>, _>>()?;
            let micro_batch: MicroBatch = self.loss.evaluated(&rows, self.pad_id, device)?;
            let (loss, valid) = micro_batch.evaluate(model, adapters)?;
            sum += loss;
            tokens += valid;
        }
        let asked = stop.is_some_and(StopSignals::asked);
        let mut all = [sum, tokens as f64, f64::from(u8::from(asked))];
        world.all_reduce_host(&mut all, Reduce::Sum)?;
        model.forget_gathered()?;
        adapters.iter_mut().try_for_each(|adapter| adapter.regions_mut().invalidate())?;
        let [sum, tokens, asked] = all;
        if tokens == 0.0 {
            return Err(Error::Failure("no row that validates has a token with a loss (a bug)".into()));
        }
        let seconds = begin.elapsed().as_secs_f64();
        let evaluation = Evaluation { loss: sum / tokens, tokens: tokens as u64, seconds };
        Ok(Evaluated { evaluation, stopping: asked > 0.0 })
    }
}
