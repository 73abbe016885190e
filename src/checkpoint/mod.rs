//! What a run leaves behind that another program reads: adapter files ([`peft`], their tensors in `stored`, of PEFT's experts in `experts`), the training state ([`state`])
//! and how another world takes it over ([`reshard`]), the base in HF layout ([`base`]); steps that are published whole
//! or not at all ([`publish`]), which of them there are ([`steps`]), and the lock on the place ([`output`]). Plain
//! slices and paths: no ranks, no tensors.

pub mod base;
mod experts;
pub mod output;
pub mod peft;
pub mod publish;
pub mod reshard;
pub mod state;
pub mod steps;
mod stored;

use std::path::{Path, PathBuf};

pub use peft::{AdapterConfig, LogicalAdapter};
pub use publish::StepWriter;
pub use state::TrainerState;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("{path}: {field} is {found}; only {supported} is built")]
    NotBuilt { path: PathBuf, field: &'static str, found: String, supported: &'static str },
    #[error("{path}: the adapter does not fit the run: {reason}")]
    Mismatch { path: PathBuf, reason: String },
    #[error("{path} is published already; a published step is never replaced")]
    Published { path: PathBuf },
    /// A step that does not exist as far as anybody may rely on it.
    #[error("{path} is not a whole step: {reason}")]
    Damaged { path: PathBuf, reason: String },
    /// A whole step that belongs to another run.
    #[error(
        "{path}: this run cannot resume from it: {reason}; keep what the step was trained with, or start anew with \
         another train.run_id"
    )]
    Unfit { path: PathBuf, reason: String },
    #[error(
        "{path} holds steps of an earlier run; go on with --train.load_checkpoint_path auto, remove them with \
         --train.overwrite true, or give another train.run_id"
    )]
    Occupied { path: PathBuf },
    #[error("{path} is in use by {holder}: wait for that run to end, or give another train.output_dir")]
    Locked { path: PathBuf, holder: String },
    #[error(
        "{path} is not the directory that rank 0 writes: train.output_dir has to be on storage that all ranks see"
    )]
    NotShared { path: PathBuf },
    #[error(
        "{path}: {later} is published after the step to resume from; resume from `auto`, remove later steps with \
         --train.overwrite true, or give another train.run_id"
    )]
    Later { path: PathBuf, later: String },
}

impl CheckpointError {
    /// A disk that fails is a failure; anything else is the user's to mend.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Self::Io { .. }) { 1 } else { 2 }
    }
}

/// Turns an I/O error at `path` into ours.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    move |error| CheckpointError::Io { path: path.to_owned(), error }
}
