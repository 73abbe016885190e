//! Bytes of output_dir, and their limit. They are counted at the start and kept; only a number that says that there is
//! no room is counted anew, for others may have deleted files.

use crate::checkpoint::saves::bytes_below;
use std::path::{Path, PathBuf};

/// The server's own folder in output_dir. No client's path leads there: names in paths start with a letter, a digit or
/// '_'.
pub const OWN: &str = ".server";

/// The files in output_dir would be larger than the limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} needs about {needed} bytes in the server's output_dir, which has {used} of the {limit} that storage_limit \
     allows; delete checkpoints that are not needed (list_checkpoints names them, delete_checkpoint deletes one)"
)]
pub struct Full {
    what: String,
    needed: u64,
    used: u64,
    limit: u64,
}

/// The bytes of an output directory with one writer.
#[derive(Debug)]
pub struct Storage {
    folder: PathBuf,
    limit: Option<u64>,
    used: u64,
}

impl Storage {
    /// Counts the bytes in `folder`.
    pub fn new(folder: PathBuf, limit: Option<u64>) -> Self {
        let used = bytes_below(&folder);
        Self { folder, limit, used }
    }

    pub fn used(&self) -> u64 {
        self.used
    }

    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// True for a folder of the server's own, whose saves keep what clients would lose at a stop: they have no limit.
    pub fn is_own(&self, folder: &Path) -> bool {
        folder.starts_with(self.folder.join(OWN))
    }

    /// Checks that `needed` more bytes, for `what`, are within the limit.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&mut self, needed: u64, what: &str) -> Result<(), Full> {
        let Some(limit) = self.limit else { return Ok(()) };
        if self.used.saturating_add(needed) > limit {
            self.used = bytes_below(&self.folder);
        }
        if self.used.saturating_add(needed) > limit {
            return Err(Full { what: what.to_owned(), needed, used: self.used, limit });
        }
        Ok(())
    }

    /// Says that files of `old` bytes have become files of `new` bytes.
    pub fn changed(&mut self, old: u64, new: u64) {
        self.used = self.used.saturating_sub(old).saturating_add(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn bytes_are_kept_and_counted_anew_before_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes| fs::write(folder.path().join(name), vec![0; bytes]).unwrap();
        write("a", 60);
        fs::create_dir(folder.path().join(".hidden")).unwrap();
        fs::hard_link(folder.path().join("a"), folder.path().join(".hidden/same")).unwrap();
        let mut storage = Storage::new(folder.path().into(), Some(100));
        assert_eq!((storage.used(), storage.check(40, "a save")), (60, Ok(())));
        // Its own files, by what it is told.
        write("b", 30);
        storage.changed(0, 30);
        assert_eq!(storage.used(), 90);
        let full = storage.check(40, "a save").unwrap_err().to_string();
        assert!(
            full.contains("a save needs about 40")
                && full.contains("90 of the 100")
                && full.contains("delete"),
            "{full}"
        );
        // What others have deleted.
        fs::remove_file(folder.path().join("b")).unwrap();
        assert_eq!((storage.check(40, "a save"), storage.used()), (Ok(()), 60));
        assert_eq!(Storage::new(folder.path().into(), None).check(u64::MAX, "a save"), Ok(()));
        let is_own =
            ["a/b", ".server/adapters/a", ".servers"].map(|own| storage.is_own(&folder.path().join(own)));
        assert_eq!(is_own, [false, true, false]);
    }
}
