//! Training: the step ([`step`]), reading like the algorithm that it is, and the run around it ([`run`]): what it
//! starts from (`resume`), whether all ranks run the same (`identity`), what it saves (`save`), when it stops (`signals`) and what it tells, before it starts
//! (`report`), as it goes ([`metrics`]) and of where its time goes (`profile`).

mod identity;
pub mod metrics;
mod profile;
mod report;
mod resume;
pub mod run;
mod save;
mod signals;
pub mod step;

pub use run::{Ended, Run};
pub use signals::StopSignals;
pub use step::{StepReport, Trainer};
