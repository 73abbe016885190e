//! What a run leaves behind that another program reads: PEFT adapter files ([`peft`]) and steps that are published
//! whole or not at all ([`publish`]). Plain slices and paths: no ranks, no tensors.

pub mod peft;
pub mod publish;

use std::path::{Path, PathBuf};

pub use peft::{AdapterConfig, LogicalAdapter};
pub use publish::StepWriter;

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
    #[error("{path} holds steps of an earlier run; give another train.run_id")]
    Occupied { path: PathBuf },
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
