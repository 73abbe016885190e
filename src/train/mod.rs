//! Training: the step ([`step`]), reading like the algorithm that it is, and the run around it ([`run`]): what it
//! starts from (`resume`), what it saves (`save`) and what it tells, before it starts (`report`) and as it goes ([`metrics`]).

pub mod metrics;
mod report;
mod resume;
pub mod run;
mod save;
pub mod step;

pub use run::Run;
pub use step::{StepReport, Trainer};
