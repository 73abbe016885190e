//! The output directory: one run at a time writes it, and all ranks of the run see it.

use super::{CheckpointError, io};
use crate::regular_file;
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const LOCK_FILE: &str = ".lock";
const TOKEN: &str = ".shared-";
/// Opens the line of the lock file that says why a run failed.
const FAILED: &str = "failed: ";
/// Time in which a process that only looks at a lock has let it go.
const LOOKED_WITHIN: Duration = Duration::from_millis(100);
/// Time in which a network file system shows a new file.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

/// The lock on an output directory, held until dropped or until the process ends in any way.
#[derive(Debug)]
pub struct OutputLock {
    _file: File,
}

impl OutputLock {
    /// Locks `output`, which must exist.
    ///
    /// # Errors
    /// [`CheckpointError::Locked`] names the holder.
    pub fn take(output: &Path) -> Result<Self, CheckpointError> {
        let path = output.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io(&path))?;
        let locked = file.try_lock().or_else(|error| match error {
            TryLockError::WouldBlock => {
                std::thread::sleep(LOOKED_WITHIN);
                file.try_lock()
            }
            error => Err(error),
        });
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.take(200).read_to_string(&mut holder);
                let holder = holder.lines().next().filter(|line| !line.is_empty()).unwrap_or("another run");
                return Err(CheckpointError::Locked { path: output.to_owned(), holder: holder.to_owned() });
            }
            // Some network file systems have no locks. A run there trains without one.
            Err(TryLockError::Error(error)) => {
                tracing::warn!("{}: cannot be locked ({error}); run nothing else in it", path.display());
            }
        }
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let holder = format!("process {} on {}\n", std::process::id(), host.trim());
        // The text serves the message above only. The lock holds without it.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(holder.as_bytes()));
        Ok(Self { _file: file })
    }
}

/// The lock of an output directory, seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// A process has it, on this host or on one that shares a file system with locks.
    Held { holder: String },
    /// No process has it. `failure`: the reason that the last one left.
    Free { failure: Option<String> },
}

/// Looks at the lock of `output`, also where nothing can be written.
pub fn look(output: &Path) -> Lock {
    let Ok(mut file) = regular_file::open(&output.join(LOCK_FILE)) else {
        return Lock::Free { failure: None };
    };
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    let mut lines = text.lines();
    // A shared lock, for a moment: two that look are not in each other's way.
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            Lock::Held { holder: lines.next().unwrap_or("another run").to_owned() }
        }
        Ok(()) | Err(TryLockError::Error(_)) => {
            Lock::Free { failure: lines.find_map(|line| line.strip_prefix(FAILED)).map(str::to_owned) }
        }
    }
}

/// Leaves the reason why a run in `output` failed, for [`look`], until the next one locks it.
pub fn note_failure(output: &Path, reason: &str) {
    // The reason was printed; without this line only lists of runs know less.
    let file = OpenOptions::new().append(true).open(output.join(LOCK_FILE));
    let reason = reason.lines().next().unwrap_or_default();
    let _ = file.and_then(|mut file| file.write_all(format!("{FAILED}{reason}\n").as_bytes()));
}

/// A file by which other ranks recognise the writer's directory; removed when dropped.
#[derive(Debug)]
pub struct SharedToken {
    path: PathBuf,
    name: String,
}

impl SharedToken {
    /// Puts a token into `output`, which the caller has locked. Removes one that a killed run has left.
    pub fn put(output: &Path) -> Result<Self, CheckpointError> {
        for entry in fs::read_dir(output).map_err(io(output))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(TOKEN) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let name = format!("{TOKEN}{}-{now}", std::process::id());
        let path = output.join(&name);
        fs::write(&path, "").map_err(io(&path))?;
        Ok(Self { path, name })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks that `output`, as this process sees it, has the token `name`.
    pub fn is_seen(output: &Path, name: &str) -> Result<(), CheckpointError> {
        let (path, begin) = (output.join(name), Instant::now());
        while begin.elapsed() < SEEN_WITHIN {
            if path.exists() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(CheckpointError::NotShared { path: output.to_owned() })
    }
}

impl Drop for SharedToken {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_once_and_free_again_afterwards() {
        let output = tempfile::tempdir().unwrap();
        let lock = OutputLock::take(output.path()).unwrap();
        let error = OutputLock::take(output.path()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains(&format!("process {} on", std::process::id())), "{message}");
        drop(lock);
        OutputLock::take(output.path()).unwrap();
    }

    #[test]
    fn a_token_is_seen_where_it_was_put_and_goes_with_its_owner() {
        let (output, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(output.path().join(".shared-1-2"), "").unwrap();
        let token = SharedToken::put(output.path()).unwrap();
        SharedToken::is_seen(output.path(), token.name()).unwrap();
        assert!(!other.path().join(token.name()).exists());
        drop(token);
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
    }
}
