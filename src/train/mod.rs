//! Training: the step ([`step`]), reading like the algorithm that it is.

pub mod step;

pub use step::{StepReport, Trainer};
