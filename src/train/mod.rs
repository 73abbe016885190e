//! Training.
//!
//! - [`step`]: one step, as the algorithm reads
//! - [`run`]: the run around it
//! - `evaluate`: the loss of rows that validate; `best`: the best step by it, and early stopping
//! - `held_out`: the command `eval`
//! - `loss`: the loss of a run's rows; `identity`: all ranks run the same
//! - `output`: the output directory, for one process at a time
//! - `merge`: periodic merges of the adapter into the base; `variants`: those of LoRA
//! - `resume`: the start of a run, fresh or from a step; `save`: saves of steps, beside training
//! - `signals`: requests to stop
//! - `report`: cost of a run, before it starts; `samples`: its rows as the model sees them; `recompute`: fitting it
//!   into memory; `reference`: the model that a loss over pairs compares with
//! - [`metrics`]: metrics of a run; `tensorboard`: files of them; `records`: how both grow; `progress`: what people see
//!   of it; `profile`: traces of steps

mod best;
mod evaluate;
mod held_out;
mod identity;
mod loss;
mod merge;
pub mod metrics;
mod output;
mod profile;
mod progress;
mod recompute;
mod records;
mod reference;
mod report;
mod resume;
pub mod run;
mod samples;
mod save;
mod signals;
pub mod step;
mod tensorboard;
mod variants;

pub use evaluate::Evaluation;
pub use held_out::{EvalRequest, HeldOut};
pub use identity::Identity;
pub use output::take_output;
pub use run::{Ended, Run};
pub use signals::{Program, STOPPED, StopSignals, outlive_file_limit};
pub use step::{Made, MicroBatch, StepReport, Trainer};
