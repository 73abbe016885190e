//! Checkpoints: files of a run or a server that another program or a resume reads. Plain slices and paths; ranks only
//! in `adapter_store` and in `publish_together`.
//!
//! - [`adapter_store`]: one trained adapter with its optimizer, into a folder and back
//! - [`peft`]: adapter files; [`adapter_config`] reads what they say of themselves, `adapter_file` their
//!   tensors, which `stored` and `experts` lay out
//! - [`state`]: training state by name; [`pieces`]: its tensors; [`reshard`]: those for another world
//! - [`base`]: the base in HF layout; [`model_files`]: its weights, `packed_files` if they are packed; `config_json`:
//!   what config.json says of them; [`merged`]: those with an adapter added
//! - [`publish`]: a folder becomes visible whole or not at all; [`steps`]: those of a run; [`saves`]: those of a server
//! - [`contents`]: what the files of a whole folder say, checked against each other
//! - [`output`]: the lock on the output directory
//! - [`failpoints`]: instants at which tests kill a rank

pub mod adapter_config;
mod adapter_file;
pub mod adapter_store;
pub mod base;
mod config_json;
pub mod contents;
mod experts;
pub mod failpoints;
pub mod merged;
pub mod model_files;
pub mod output;
mod packed_files;
pub mod peft;
pub mod pieces;
pub mod publish;
pub mod reshard;
pub mod saves;
pub mod state;
pub mod steps;
mod stored;

use crate::shard::ShardError;
use std::path::{Path, PathBuf};

pub use adapter_config::AdapterConfig;
pub use peft::LogicalAdapter;
pub use publish::FolderWriter;
pub use state::TrainerState;

/// The reason why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("{path}: {field} is {found}, which is not built: {remedy}")]
    NotBuilt { path: PathBuf, field: String, found: String, remedy: &'static str },
    #[error("{path}: the adapter does not fit: {reason}")]
    Mismatch { path: PathBuf, reason: String },
    #[error("{path} is published already; a published step is never replaced")]
    Published { path: PathBuf },
    #[error("{path} is saved already: choose another name, or ask to overwrite it")]
    Taken { path: PathBuf },
    #[error("{path} exists already, and nothing is replaced: give another --out")]
    Exists { path: PathBuf },
    #[error("{tensor}: a merged value is not finite{hint}")]
    NotFinite { tensor: String, hint: &'static str },
    #[error("{path} is no save: {reason}")]
    NoSave { path: PathBuf, reason: String },
    #[error(
        "{path} was saved with {stored}; the adapter has {own}: load it into one of the shape that was saved"
    )]
    OtherShape { path: PathBuf, stored: String, own: String },
    #[error("{tensor} of {region} was not read (a bug)")]
    NotRead { region: String, tensor: String },
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A step directory that is not a whole step. Nobody may rely on it.
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
    #[error(
        "{path} holds steps, none of which is whole: {newest}; bring their files back, start afresh with \
         --train.overwrite true, which removes them, or give another train.run_id"
    )]
    NoneWhole { path: PathBuf, newest: Box<CheckpointError> },
    #[error("{path} is in use by {holder}: wait for that process to end, or give another output_dir")]
    Locked { path: PathBuf, holder: String },
    #[error(
        "{path} is not the directory that rank 0 writes: output_dir has to be on storage that all ranks see"
    )]
    NotShared { path: PathBuf },
    #[error(
        "{path}: {later} is published after the step to resume from; resume from `auto`, remove later steps with \
         --train.overwrite true, or give another train.run_id"
    )]
    Later { path: PathBuf, later: String },
}

impl CheckpointError {
    /// The exit code: 1 for a disk or a device that fails and for bugs, 2 (a user error) for all else.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Self::Io { .. } | Self::Shard(_) | Self::NotRead { .. }) { 1 } else { 2 }
    }
}

/// Makes an I/O error at `path` a [`CheckpointError::Io`].
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    move |error| CheckpointError::Io { path: path.to_owned(), error }
}
