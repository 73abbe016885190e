//! A thread that brings the rows of coming steps while the trainer computes the present one.

use super::{DataError, Dataset, Row};
use crossbeam::channel::{Receiver, bounded};
use std::{sync::Arc, thread::JoinHandle};

/// One step of this rank: positions within `epoch`, by micro-batch (see [`super::schedule::deal`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    pub step: usize,
    pub epoch: usize,
    pub micro_batches: Vec<Vec<usize>>,
}

/// The rows of one step of this rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRows {
    pub step: usize,
    pub epoch: usize,
    pub micro_batches: Vec<Vec<Row>>,
}

/// Yields the rows of a plan in order, prepared ahead. After an error it yields nothing more. Dropping it ends
/// the thread.
#[derive(Debug)]
pub struct Loader {
    receiver: Option<Receiver<Result<StepRows, DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts the thread; it stays at most `ahead` steps (at least 1) ahead of the trainer.
    pub fn start<P>(dataset: Arc<Dataset>, plan: P, ahead: usize) -> Result<Self, DataError>
    where
        P: IntoIterator<Item = StepPlan>,
        P::IntoIter: Send + 'static,
    {
        let (sender, receiver) = bounded(ahead.max(1));
        let plan = plan.into_iter();
        let work = move || {
            for step in plan {
                let rows = step_rows(&dataset, step);
                let failed = rows.is_err();
                if sender.send(rows).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("data-loader".into()).spawn(work);
        let thread = thread.map_err(|error| DataError::LoaderDied(error.to_string()))?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread) })
    }
}

fn step_rows(dataset: &Dataset, plan: StepPlan) -> Result<StepRows, DataError> {
    let rows =
        |positions: Vec<usize>| positions.into_iter().map(|at| dataset.row_at(plan.epoch, at)).collect();
    let micro_batches = plan.micro_batches.into_iter().map(rows).collect::<Result<_, _>>()?;
    Ok(StepRows { step: plan.step, epoch: plan.epoch, micro_batches })
}

impl Iterator for Loader {
    type Item = Result<StepRows, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.receiver.as_ref()?.recv() {
            Ok(Ok(rows)) => Some(Ok(rows)),
            Ok(Err(error)) => {
                self.receiver = None;
                Some(Err(error))
            }
            // The sender is gone: the plan has ended, or the thread has panicked.
            Err(_) => {
                self.receiver = None;
                let panic = self.thread.take()?.join().err()?;
                let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                Some(Err(DataError::LoaderDied(text.unwrap_or_else(|| "it panicked".into()))))
            }
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails, which ends it.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
