//! One optimizer step over all ranks: count, forward and backward of each micro-batch, reduce, clip, update.
//!
//! Reductions are sums. The loss is divided beforehand by the valid tokens of the whole step, over all ranks and
//! micro-batches, so that accumulated gradients equal those of one large batch.

use crate::{
    comm::{Communicator, Reduce},
    model::{
        router_load::RouterReport,
        transformer::{Batch, Transformer},
    },
    optim::{ClippedNorm, Optimizer, Schedule, global_norm},
    shard::ShardError,
};
use std::rc::Rc;

/// What a step did, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's valid tokens; `None` when there was none.
    pub loss: Option<f64>,
    /// Global L2 norm before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// Tokens that carried loss.
    pub valid_tokens: u64,
    /// All tokens that were computed.
    pub total_tokens: u64,
    /// What the routers did, in a model with experts.
    pub router: Option<RouterReport>,
    /// Parameters whose gradient was not finite. Not empty: no rank updated anything.
    pub non_finite: Vec<String>,
}

/// A model with its optimizer, on this rank.
pub struct Trainer {
    pub model: Transformer,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    /// Gradients are clipped to this norm; 0 or less: never.
    pub max_grad_norm: f64,
    /// All ranks that have tokens of the step.
    pub world: Rc<dyn Communicator>,
}

impl Trainer {
    /// Makes step `step` (0-based) of `micro_batches`. Every rank passes the same number, some perhaps empty.
    pub fn step(&mut self, micro_batches: &[Batch], step: usize) -> Result<StepReport, ShardError> {
        let sum = |f: &dyn Fn(&Batch) -> usize| micro_batches.iter().map(f).sum::<usize>() as f64;
        let mut counts = [sum(&Batch::valid_tokens), sum(&Batch::tokens)];
        self.world.all_reduce_host(&mut counts, Reduce::Sum)?;
        let [valid, total] = counts;
        let lr = self.schedule.rate(step);
        let mut report = StepReport {
            loss: None,
            grad_norm: 0.0,
            lr,
            valid_tokens: valid as u64,
            total_tokens: total as u64,
            router: None,
            non_finite: Vec::new(),
        };
        if valid == 0.0 {
            // All ranks see the same count and stay out of the collectives of a pass alike.
            return Ok(report);
        }

        let clock = self.model.clock.clone();
        self.model.adapter.zero_gradients();
        let mut loss = [0.0];
        for batch in micro_batches {
            loss[0] += self.model.forward_backward(batch, 1.0 / valid)?.sum;
        }
        let reducing = clock.phase("reduce");
        self.model.adapter.step_done()?;
        self.world.all_reduce_host(&mut loss, Reduce::Sum)?;
        report.loss = Some(loss[0] / valid);
        let mut load = self.model.take_router_load().sums();
        if let Some(moe) = &self.model.spec().moe {
            self.world.all_reduce_host(&mut load, Reduce::Sum)?;
            report.router = RouterReport::new(&load, moe.experts, moe.top_k);
        }

        drop(reducing);
        let _updating = clock.phase("update");
        let clipped = ClippedNorm::new(global_norm(&self.model.adapter)?, self.max_grad_norm);
        report.grad_norm = clipped.norm;
        if clipped.norm.is_finite() {
            self.optimizer.step(&mut self.model.adapter, lr, clipped.coefficient)?;
        } else {
            report.non_finite = self.non_finite()?;
        }
        Ok(report)
    }

    /// Names of the parameters with a gradient that is not finite, on all ranks alike.
    fn non_finite(&self) -> Result<Vec<String>, ShardError> {
        let own = self.model.non_finite_gradients().join("\n");
        let mut names: Vec<String> = Vec::new();
        for part in self.world.all_gather_host(own.as_bytes())? {
            let part = String::from_utf8_lossy(&part);
            names.extend(part.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
        names.sort();
        names.dedup();
        Ok(names)
    }
}
