//! The output directory of a run or a server: made and locked by rank 0, and seen by all ranks.

use super::Run;
use crate::{
    checkpoint::{
        output::{OutputLock, SharedToken},
        publish::create_folder,
    },
    comm::Communicator,
    config::TrainArgs,
    error::{Error, Result, agree, broadcast_from_root},
};
use std::path::{Path, PathBuf};

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
    // A directory that cannot be written is a user error, as nothing was written yet.
    let input = |error: &dyn std::fmt::Display| Error::Input(format!("{place}: {error}"));
    let take = || {
        create_folder(output).map_err(|error| input(&error))?;
        let lock = held.map_or_else(|| OutputLock::take(output), Ok).map_err(|error| input(&error))?;
        let token = SharedToken::put(output).map_err(|error| input(&error))?;
        Ok(Some((lock, token)))
    };
    let taken = if world.rank() == 0 { take() } else { Ok(None) };
    let (lock, token) = agree(world, taken)?.unzip();
    let name = broadcast_from_root(world, token.as_ref().map_or("", SharedToken::name))?;
    agree(world, SharedToken::is_seen(output, &name).map_err(Error::from))?;
    Ok(lock)
}
