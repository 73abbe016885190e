//! One optimizer step over all ranks: count, accumulate (forward and backward of each micro-batch), reduce, update.
//!
//! Reductions are sums. The loss is divided beforehand by the valid tokens of the whole step, over all ranks and
//! micro-batches, so that accumulated gradients equal those of one large batch.

use crate::{
    comm::{Communicator, Reduce},
    console::first_of,
    lora::Adapter,
    loss::{CrossEntropy, LogProbs, LossValues, Pairs, Rewards, TokenLoss},
    model::{
        quantized::StepNoise,
        router_load::RouterReport,
        transformer::{Batch, Transformer},
    },
    optim::Schedule,
    session::{Session, Update},
    shard::ShardError,
};
use std::{convert::Infallible, ops::ControlFlow, rc::Rc, time::Instant};
use tch::Tensor;

/// The rows of one forward and backward, with their loss.
pub struct MicroBatch {
    batch: Batch,
    /// Targets that the loss of the step is divided by; pairs of a loss over such.
    valid: usize,
    loss: RowsLoss,
}

/// The loss of a micro-batch.
enum RowsLoss {
    /// Cross-entropy over all targets.
    Plain,
    Of(Box<dyn TokenLoss>),
    Pairs(Pairs),
}

impl RowsLoss {
    /// `None`: cross-entropy over all targets.
    fn given(&self) -> Option<&dyn TokenLoss> {
        match self {
            Self::Plain => None,
            Self::Of(loss) => Some(&**loss),
            Self::Pairs(pairs) => Some(pairs),
        }
    }

    /// The rewards of its pairs with `log_probs` `[tokens, 1]`, of a loss over such.
    fn rewards(&self, log_probs: &Tensor) -> Option<Rewards> {
        match self {
            Self::Plain | Self::Of(_) => None,
            Self::Pairs(pairs) => Some(pairs.rewards(log_probs)),
        }
    }
}

impl From<Batch> for MicroBatch {
    /// With cross-entropy over all targets.
    fn from(batch: Batch) -> Self {
        Self { valid: batch.valid_tokens(), batch, loss: RowsLoss::Plain }
    }
}

impl MicroBatch {
    /// With a `loss` of these rows that counts `valid` targets.
    pub fn with_loss(batch: Batch, loss: Box<dyn TokenLoss>, valid: usize) -> Self {
        Self { batch, valid, loss: RowsLoss::Of(loss) }
    }

    /// With a loss over the pairs of its rows.
    pub fn of_pairs(batch: Batch, pairs: Pairs) -> Self {
        Self { batch, valid: pairs.len(), loss: RowsLoss::Pairs(pairs) }
    }

    /// Σ of its loss values under `adapters`, without any gradient, the targets or pairs that it counts, and rewards
    /// of a loss over pairs, on this rank. Collective.
    ///
    /// # Errors
    /// A gather fails.
    pub fn evaluate(
        &self,
        model: &mut Transformer,
        adapters: &mut [&mut Adapter],
    ) -> Result<(f64, usize, Option<Rewards>), ShardError> {
        let plain = CrossEntropy { scale: 1.0 };
        let loss = self.loss.given().unwrap_or(&plain);
        let done = model.evaluate(&self.batch, adapters, loss)?;
        Ok((done.sum, self.valid, self.loss.rewards(&done.log_probs)))
    }
}

/// A loss with another factor of its gradient.
struct Scaled<'a> {
    loss: &'a dyn TokenLoss,
    factor: f64,
}

impl TokenLoss for Scaled<'_> {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LossValues { values, coefficients } = self.loss.evaluate(log_probs);
        LossValues { values, coefficients: coefficients * self.factor }
    }

    fn is_policy(&self) -> bool {
        self.loss.is_policy()
    }
}

/// Progress of a step after a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Made {
    /// Micro-batches that are left.
    pub left: usize,
    /// Seconds of one on this rank, the mean of those made.
    pub seconds: f64,
}

/// Outcome of a step, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Loss of the step divided by its valid tokens; `None` when there was none.
    pub loss: Option<f64>,
    /// Global L2 norm before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Targets that the loss was divided by: those with a weight or an advantage that is not 0; of a loss over pairs,
    /// the pairs.
    pub valid_tokens: u64,
    /// All tokens that were computed.
    pub total_tokens: u64,
    /// Padding of packs among them.
    pub padding_tokens: u64,
    /// Router statistics, in a model with experts.
    pub router: Option<RouterReport>,
    /// Rewards of the pairs, of a loss over such.
    pub rewards: Option<Rewards>,
    /// Parameters whose gradient was not finite. Not empty: no rank updated anything.
    pub non_finite: Vec<String>,
}

/// Steps of a run that changed nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Steps without a finite gradient, up to the present one.
    in_a_row: usize,
    /// Some step has updated the adapter.
    learned: bool,
}

impl Skipped {
    /// No step was skipped yet. `learned`: the run goes on from one that has updated the adapter.
    pub fn new(learned: bool) -> Self {
        Self { in_a_row: 0, learned }
    }

    /// Counts a step. An error says why training cannot go on: `most` steps in a row were not finite, or the
    /// `last` step came and none has updated anything.
    pub fn count(&mut self, report: &StepReport, most: usize, last: bool) -> Result<(), String> {
        let skipped = !report.non_finite.is_empty();
        self.learned |= !skipped && report.loss.is_some();
        self.in_a_row = if skipped { self.in_a_row + 1 } else { 0 };
        let named = first_of(&report.non_finite);
        if self.in_a_row >= most {
            return Err(format!(
                "{most} steps in a row (train.max_skipped_steps) were skipped, not finite: {named}; --debug names the \
                 layer that overflows first"
            ));
        }
        match (last && !self.learned, skipped) {
            (true, true) => Err(format!(
                "nothing was learned: every step was skipped, not finite: {named}; --debug names the layer that overflows \
                 first"
            )),
            (true, false) => Err("nothing was learned: no step had a token with a loss".into()),
            _ => Ok(()),
        }
    }

    /// True once a step has updated the adapter.
    pub fn learned(&self) -> bool {
        self.learned
    }
}

/// A model with the session that it trains, on this rank.
pub struct Trainer {
    pub model: Transformer,
    pub session: Session,
    pub schedule: Schedule,
    /// All ranks that have tokens of the step.
    pub world: Rc<dyn Communicator>,
    /// Quantisation noise of step 0, in runs with such.
    pub noise: Option<StepNoise>,
}

impl Trainer {
    /// Makes step `step` (0-based) of `micro_batches`. Every rank passes the same number, some perhaps empty.
    pub fn step(&mut self, micro_batches: &[MicroBatch], step: usize) -> Result<StepReport, ShardError> {
        match self.step_unless::<Infallible>(micro_batches, step, |_| Ok(ControlFlow::Continue(())))? {
            ControlFlow::Continue(report) => Ok(report),
            ControlFlow::Break(never) => match never {},
        }
    }

    /// The same, but after each micro-batch with others left `drops` may break off: all is then as before the step. All
    /// ranks have to decide alike.
    pub fn step_unless<B>(
        &mut self,
        micro_batches: &[MicroBatch],
        step: usize,
        drops: impl FnMut(Made) -> Result<ControlFlow<B>, ShardError>,
    ) -> Result<ControlFlow<B, StepReport>, ShardError> {
        let [valid, total, padding] = self.count(micro_batches)?;
        let mut report = StepReport {
            loss: None,
            grad_norm: 0.0,
            lr: self.schedule.rate(step),
            valid_tokens: valid as u64,
            total_tokens: total as u64,
            padding_tokens: padding as u64,
            router: None,
            rewards: None,
            non_finite: Vec::new(),
        };
        if valid == 0.0 {
            // All ranks see the same count and stay out of the collectives of a pass alike.
            return Ok(ControlFlow::Continue(report));
        }
        self.model.noise = self.noise.map(|noise| StepNoise { step, ..noise });
        let loss = self.accumulate(micro_batches, 1.0 / valid, drops);
        self.model.noise = None;
        let (loss, rewards) = match loss? {
            ControlFlow::Continue(loss) => loss,
            ControlFlow::Break(why) => {
                self.session.adapter.regions_mut().zero_gradients();
                self.model.take_router_load();
                return Ok(ControlFlow::Break(why));
            }
        };
        report.loss = Some(self.reduce(loss)? / valid);
        report.rewards = self.all_rewards(micro_batches, rewards)?;
        report.router = self.router_report()?;
        let update = self.update(report.lr)?;
        (report.grad_norm, report.non_finite) = (update.grad_norm, update.non_finite);
        Ok(ControlFlow::Continue(report))
    }

    /// Tokens with loss, all tokens and padding of the step, over all ranks.
    fn count(&self, micro_batches: &[MicroBatch]) -> Result<[f64; 3], ShardError> {
        let sum = |f: &dyn Fn(&MicroBatch) -> usize| micro_batches.iter().map(f).sum::<usize>() as f64;
        let mut counts = [
            sum(&|micro| micro.valid),
            sum(&|micro| micro.batch.tokens()),
            sum(&|micro| micro.batch.padding()),
        ];
        self.world.all_reduce_host(&mut counts, Reduce::Sum)?;
        Ok(counts)
    }

    /// Forward and backward of every micro-batch, unless `drops` breaks off: Σ loss values and rewards of this rank,
    /// and gradients of `factor` times the loss.
    fn accumulate<B>(
        &mut self,
        micro_batches: &[MicroBatch],
        factor: f64,
        mut drops: impl FnMut(Made) -> Result<ControlFlow<B>, ShardError>,
    ) -> Result<ControlFlow<B, (f64, Rewards)>, ShardError> {
        let adapter = &mut self.session.adapter;
        adapter.regions_mut().zero_gradients();
        let (mut sum, mut rewards) = (0.0, Rewards::default());
        let plain = CrossEntropy { scale: factor };
        let begin = Instant::now();
        for (before, MicroBatch { batch, loss, .. }) in micro_batches.iter().enumerate() {
            let scaled = loss.given().map(|loss| Scaled { loss, factor });
            let given: &dyn TokenLoss = scaled.as_ref().map_or(&plain, |scaled| scaled);
            let done = self.model.forward_backward(batch, &mut [&mut *adapter], given)?;
            sum += done.sum;
            if let Some(own) = loss.rewards(&done.log_probs) {
                rewards.add(&own);
            }
            let left = micro_batches.len() - before - 1;
            let made = Made { left, seconds: begin.elapsed().as_secs_f64() / (before + 1) as f64 };
            if left > 0
                && let ControlFlow::Break(why) = drops(made)?
            {
                return Ok(ControlFlow::Break(why));
            }
        }
        Ok(ControlFlow::Continue((sum, rewards)))
    }

    /// The rewards of all ranks' pairs, of a loss over such.
    fn all_rewards(&self, micro_batches: &[MicroBatch], own: Rewards) -> Result<Option<Rewards>, ShardError> {
        if !micro_batches.iter().any(|micro| matches!(micro.loss, RowsLoss::Pairs(_))) {
            return Ok(None);
        }
        let mut sums = own.sums();
        self.world.all_reduce_host(&mut sums, Reduce::Sum)?;
        Ok(Some(Rewards::of(sums)))
    }

    /// Sums gradients and loss over all ranks.
    fn reduce(&mut self, loss: f64) -> Result<f64, ShardError> {
        let clock = self.model.clock.clone();
        let _reducing = clock.phase("reduce");
        self.session.reduce()?;
        let mut loss = [loss];
        self.world.all_reduce_host(&mut loss, Reduce::Sum)?;
        Ok(loss[0])
    }

    /// Router statistics of the step over all ranks, in a model with experts.
    fn router_report(&mut self) -> Result<Option<RouterReport>, ShardError> {
        let clock = self.model.clock.clone();
        let _reducing = clock.phase("reduce");
        let mut load = self.model.take_router_load().sums();
        let Some(moe) = self.model.spec().moe() else { return Ok(None) };
        self.world.all_reduce_host(&mut load, Reduce::Sum)?;
        Ok(RouterReport::new(&load, moe.experts, moe.top_k))
    }

    /// Clips and steps the optimizer.
    fn update(&mut self, lr: f64) -> Result<Update, ShardError> {
        let clock = self.model.clock.clone();
        let _updating = clock.phase("update");
        self.session.update(lr, &*self.world)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(loss: Option<f64>, non_finite: &[&str]) -> StepReport {
        StepReport {
            loss,
            grad_norm: 0.0,
            lr: 0.0,
            valid_tokens: 0,
            total_tokens: 0,
            padding_tokens: 0,
            router: None,
            rewards: None,
            non_finite: non_finite.iter().map(|name| name.to_string()).collect(),
        }
    }

    #[test]
    fn steps_in_a_row_and_runs_of_nothing_else_end() {
        let (good, bad) = (report(Some(1.0), &[]), report(Some(f64::NAN), &["a", "b", "c", "d", "e"]));
        let idle = report(None, &[]);
        let mut skipped = Skipped::default();
        for step in [&bad, &bad, &good, &bad, &idle, &bad, &bad] {
            assert_eq!(skipped.count(step, 3, false), Ok(()));
        }
        let error = skipped.count(&bad, 3, false).unwrap_err();
        let start =
            "3 steps in a row (train.max_skipped_steps) were skipped, not finite: a, b, c and 2 more;";
        assert!(error.starts_with(start), "{error}");
        assert!(skipped.learned());

        assert_eq!(Skipped::default().count(&good, 2, true), Ok(()));
        assert_eq!(Skipped::new(true).count(&idle, 2, true), Ok(()));
        assert!(Skipped::default().count(&bad, 2, true).unwrap_err().contains("every step was skipped"));
        assert!(
            Skipped::default().count(&idle, 2, true).unwrap_err().contains("no step had a token with a loss")
        );
    }
}
