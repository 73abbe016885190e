//! The best step of a run by its evaluations, and early stopping: pure, the same on all ranks.

use super::{Run, evaluate::Evaluation};
use crate::{
    checkpoint::state::{BestStep, EvaluationState},
    config::MetricForBest,
    console::count,
};

/// Evaluations of a run so far; nothing where no metric says which is best.
pub(super) struct Best {
    state: Option<EvaluationState>,
    /// Evaluations in a row without a better one after which the run ends.
    patience: Option<usize>,
}

impl Best {
    /// That of `run`, going on from the step that it resumes from. Rank 0 warns where that step's values cannot be
    /// compared.
    pub fn new(run: &Run, rank: usize) -> Self {
        let train = &run.config.train;
        let metric = train.metric_for_best.filter(|_| run.dataset.validation_rows() > 0);
        let fresh = metric.map(|metric| EvaluationState {
            metric,
            data: run.dataset.validation_fingerprint(),
            best: None,
            since: 0,
        });
        let stored = run.resumed().and_then(|resumed| resumed.state.evaluations.clone());
        let state = match (fresh, stored) {
            (Some(fresh), Some(stored)) if fresh.metric == stored.metric && fresh.data == stored.data => {
                Some(stored)
            }
            (Some(fresh), Some(_)) => {
                if rank == 0 {
                    tracing::warn!(
                        "the run was evaluated on other rows, or by another train.metric_for_best: the best step before \
                         is forgotten"
                    );
                }
                Some(fresh)
            }
            (fresh, _) => fresh,
        };
        Self { state, patience: train.early_stopping_patience }
    }

    /// For the training state of a step.
    pub fn state(&self) -> Option<&EvaluationState> {
        self.state.as_ref()
    }

    /// The best step.
    pub fn step(&self) -> Option<BestStep> {
        self.state.as_ref()?.best
    }

    /// Takes in the evaluation after `step`; true if it is the best so far. A value that is not finite is never better.
    pub fn weigh(&mut self, step: usize, evaluation: &Evaluation) -> bool {
        let Some(state) = &mut self.state else { return false };
        let value = match state.metric {
            MetricForBest::EvalLoss => evaluation.loss,
            MetricForBest::EvalPerplexity => evaluation.perplexity(),
        };
        let is_best = value.is_finite() && state.best.is_none_or(|best| value < best.value);
        if is_best {
            (state.best, state.since) = (Some(BestStep { step, value }), 0);
        } else {
            state.since += 1;
        }
        is_best
    }

    /// True if `train.early_stopping_patience` is used up.
    pub fn is_over(&self) -> bool {
        let since = self.state.as_ref().map_or(0, |state| state.since);
        self.patience.is_some_and(|patience| since >= patience)
    }

    /// The best step in words: `step_20 (eval_loss 1.2345)`.
    pub fn told(&self) -> Option<String> {
        let BestStep { step, value } = self.step()?;
        Some(format!("step_{step} ({} {value:.4})", self.metric()))
    }

    /// The end of a run by early stopping, in words.
    pub fn ending(&self) -> String {
        let since = self.state.as_ref().map_or(0, |state| state.since);
        let best = self.told().map_or_else(String::new, |best| format!("; the best is {best}"));
        let evaluations = count(since, "evaluation");
        format!("no better {} in {evaluations} (train.early_stopping_patience){best}", self.metric())
    }

    fn metric(&self) -> &'static str {
        match self.state.as_ref().map(|state| state.metric) {
            Some(MetricForBest::EvalPerplexity) => "eval_perplexity",
            _ => "eval_loss",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(metric: MetricForBest, patience: Option<usize>) -> Best {
        Best { state: Some(EvaluationState { metric, data: String::new(), best: None, since: 0 }), patience }
    }

    fn weigh(best: &mut Best, step: usize, loss: f64) -> bool {
        best.weigh(step, &Evaluation { loss, tokens: 1, rewards: None, seconds: 0.0 })
    }

    #[test]
    fn the_lowest_value_is_best_and_patience_counts_those_after_it() {
        let mut own = best(MetricForBest::EvalLoss, Some(2));
        let values = [f64::NAN, 3.0, 2.0, 2.0, 1.0, f64::INFINITY];
        let seen: Vec<(bool, bool)> =
            (1..).zip(values).map(|(step, value)| (weigh(&mut own, step, value), own.is_over())).collect();
        let [better, worse] = [(true, false), (false, false)];
        assert_eq!(seen, [worse, better, better, worse, better, worse]);
        assert_eq!(own.step(), Some(BestStep { step: 5, value: 1.0 }));
        assert!(!weigh(&mut own, 7, 1.0) && own.is_over());
        let words = "no better eval_loss in 2 evaluations (train.early_stopping_patience); the best is step_5 (eval_loss 1.0000)";
        assert_eq!(own.ending(), words);
    }

    #[test]
    fn perplexity_orders_as_the_loss_does() {
        let mut own = best(MetricForBest::EvalPerplexity, None);
        assert!(weigh(&mut own, 1, 2.0) && weigh(&mut own, 2, 1.0) && !weigh(&mut own, 3, 1000.0));
        assert_eq!(own.told().unwrap(), "step_2 (eval_perplexity 2.7183)");
        assert!(!own.is_over());
        let mut none = Best { state: None, patience: None };
        assert!(!weigh(&mut none, 1, 1.0) && none.told().is_none());
    }
}
