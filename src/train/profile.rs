//! `train.profile_steps`: traces steps of a run after the warm-up, and writes the trace.

use super::Trainer;
use crate::{
    error::{Result, broadcast_from_root},
    trace::{self, Zero},
};
use std::{
    io::ErrorKind,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

/// Steps that a process makes before one is traced. They allocate buffers and choose kernels.
const WARM_UP: usize = 2;

/// The trace of a run, on this rank.
pub(super) struct Profile {
    folder: PathBuf,
    rank: usize,
    zero: Zero,
    /// The traced steps of this process, counted from 1; empty if none are.
    window: RangeInclusive<usize>,
    /// Steps that this process has made.
    made: usize,
}

impl Profile {
    /// A trace of the `steps` steps after the warm-up, into `folder`, which rank 0 removes first. Collective if `steps`
    /// is not 0: ranks agree on a zero of time.
    pub fn new(steps: usize, folder: &Path, trainer: &Trainer) -> Result<Self> {
        let rank = trainer.world.rank();
        let mut profile =
            Self { folder: folder.to_owned(), rank, zero: 0, window: window(steps, WARM_UP), made: 0 };
        if steps > 0 {
            if rank == 0 {
                remove(folder)?;
            }
            // The wall clock is the same on all ranks of a machine, and nearly so on machines that keep it.
            profile.zero =
                broadcast_from_root(&*trainer.world, &trace::zero().to_string())?.parse().unwrap_or(0);
        }
        Ok(profile)
    }

    /// Starts the trace at the first step of the window. Called before each step.
    pub fn before_step(&self) {
        if self.window.contains(&(self.made + 1)) && !trace::is_on() {
            trace::start();
        }
    }

    /// Writes the trace after the last step of the window, or of the process, which `ends` marks. Called after each
    /// step.
    pub fn after_step(&mut self, step: usize, ends: bool) -> Result<()> {
        self.made += 1;
        if (ends || self.made >= *self.window.end())
            && let Some(trace) = trace::finish()
        {
            trace.write(&self.folder, self.rank, self.zero)?;
            if self.rank == 0 {
                let first = step + self.window.start() - self.made;
                let folder = self.folder.display();
                tracing::info!(
                    "traced steps {first} to {step}: {folder}/rank_*.json, summed up in rank_*.txt"
                );
            }
        } else if ends && !self.window.is_empty() && self.made < *self.window.start() && self.rank == 0 {
            let made = self.made;
            tracing::warn!("train.profile_steps: nothing is traced in {made} steps, as {WARM_UP} warm up");
        }
        Ok(())
    }
}

/// The steps to trace, counted from 1.
fn window(steps: usize, warm_up: usize) -> RangeInclusive<usize> {
    warm_up + 1..=warm_up.saturating_add(steps)
}

/// Removes the folder of an earlier trace: it may have more ranks, whose files would be taken for this run's.
fn remove(folder: &Path) -> Result<(), trace::TraceError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(trace::TraceError::Io { path: folder.to_owned(), error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of `made` that were traced in a profile of `steps`.
    fn traced(steps: usize, made: usize) -> Vec<bool> {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("trace/run");
        let mut profile =
            Profile { folder: at.clone(), rank: 0, zero: 0, window: window(steps, WARM_UP), made: 0 };
        let step = |step: usize| {
            profile.before_step();
            let on = trace::is_on();
            assert!(!at.exists(), "written before step {step}");
            profile.after_step(step, step == made).unwrap();
            if !trace::is_on() && on {
                std::fs::remove_dir_all(&at).unwrap();
            }
            on
        };
        let on = (1..=made).map(step).collect();
        assert!(!trace::is_on());
        on
    }

    #[test]
    fn the_steps_after_the_warm_up_are_traced() {
        assert_eq!(traced(2, 6), [false, false, true, true, false, false]);
        assert_eq!(traced(0, 4), [false; 4]);
        assert_eq!(traced(9, 4), [false, false, true, true]);
        assert_eq!(traced(1, 2), [false, false]);
        assert_eq!(traced(usize::MAX, 3), [false, false, true]);
    }
}
