//! The output directory of a run or a server: made and locked by rank 0, and seen by all ranks.

use super::Run;
use crate::{
    checkpoint::{
        CheckpointError,
        output::{OutputLock, SharedToken},
        publish::create_folder,
    },
    comm::Communicator,
    config::TrainArgs,
    error::{Error, Result, agree, broadcast_from_root},
};
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

impl Run {
    /// The output directory.
    pub fn output(&self) -> &Path {
        &self.config.train.output_dir
    }
}

/// The steps of a run.
pub(super) fn run_dir(train: &TrainArgs) -> PathBuf {
    train.output_dir.join("weights").join(&train.run_id)
}

/// Refuses an `output` where a file is, or below one. `place` stands before the error.
pub(super) fn may_become_folder(output: &Path, place: &str) -> Result<()> {
    let found = output.ancestors().find_map(|at| Some((at, std::fs::metadata(at).ok()?)));
    match found.filter(|(_, found)| !found.is_dir()) {
        None => Ok(()),
        Some((file, _)) => {
            let file = file.display();
            Err(Error::Input(format!("{place}: {file}: a file, where a folder belongs; name another one")))
        }
    }
}

/// The error of an output directory that cannot be taken, a user's: nothing was written yet. `place` stands before it.
pub(super) fn not_taken(place: &str, error: &CheckpointError) -> Error {
    Error::Input(match error {
        CheckpointError::Io { error: cause, .. } => format!("{place}: {error}; {}", remedy(cause.kind())),
        _ => format!("{place}: {error}"),
    })
}

/// The remedy of an error of the file system of an output directory.
pub(super) fn remedy(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free space there, or give another output_dir",
        ErrorKind::ReadOnlyFilesystem => "mount it for writing, or give another output_dir",
        ErrorKind::PermissionDenied => "give this user the right to write there, or another output_dir",
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::StaleNetworkFileHandle => {
            "it was removed, or its file system is gone: bring that back, or give another output_dir"
        }
        ErrorKind::AlreadyExists => {
            "it is a link that leads nowhere: make its target, or give another output_dir"
        }
        ErrorKind::InvalidFilename => "give a shorter output_dir",
        ErrorKind::FileTooLarge => "let files be larger there (ulimit -f), or give another output_dir",
        _ => "see that its file system works, or give another output_dir",
    }
}

/// Makes `output` and locks it on rank 0, unless that `held` the lock already, and checks that all ranks see the same
/// directory. `place` stands before errors. Gives the lock to rank 0. Collective.
///
/// # Errors
/// The error of the first rank that has one, and [`Error::Elsewhere`] on the others.
pub fn take_output(
    output: &Path,
    place: &str,
    held: Option<OutputLock>,
    world: &dyn Communicator,
) -> Result<Option<OutputLock>> {
    let take = || {
        create_folder(output)?;
        let lock = held.map_or_else(|| OutputLock::take(output), Ok)?;
        Ok(Some((lock, SharedToken::put(output)?)))
    };
    let taken = if world.rank() == 0 { take() } else { Ok(None) };
    let taken = taken.map_err(|error| not_taken(place, &error));
    let (lock, token) = agree(world, taken)?.unzip();
    let name = broadcast_from_root(world, token.as_ref().map_or("", SharedToken::name))?;
    agree(world, SharedToken::is_seen(output, &name).map_err(Error::from))?;
    Ok(lock)
}
