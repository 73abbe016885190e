//! Training: the step ([`step`]), reading like the algorithm that it is, and the run around it ([`run`]): what it
//! starts from (`resume`), what it saves (`save`), when it stops (`signals`) and what it tells, before it starts
//! (`report`) and as it goes ([`metrics`]).

pub mod metrics;
mod report;
mod resume;
pub mod run;
mod save;
mod signals;
pub mod step;

pub use run::{Ended, Run};
pub use signals::StopSignals;
pub use step::{StepReport, Trainer};
