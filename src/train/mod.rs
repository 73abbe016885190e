//! Training: the step ([`step`]), reading like the algorithm that it is, and the run around it ([`run`]).

pub mod run;
pub mod step;

pub use run::Run;
pub use step::{StepReport, Trainer};
