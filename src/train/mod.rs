//! Training: the step ([`step`]), reading like the algorithm that it is, the run around it ([`run`]) and what it
//! tells ([`metrics`]).

pub mod metrics;
pub mod run;
pub mod step;

pub use run::Run;
pub use step::{StepReport, Trainer};
