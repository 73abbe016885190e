//! Ranks give each other bytes through files of one folder: written beside, then renamed, so that what is there is
//! whole.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

/// Where a communicator's ranks meet, and when they stop waiting for each other.
pub struct Place {
    pub folder: PathBuf,
    pub stopped: AtomicBool,
}

/// The wait was ended.
pub struct Stopped;

impl Place {
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let (beside, path) = (self.folder.join(format!("{name}.new")), self.folder.join(name));
        std::fs::write(&beside, bytes)
            .and_then(|()| std::fs::rename(&beside, path))
            .expect("a folder to write to");
    }

    /// Waits for what another puts there.
    pub fn get(&self, name: &str) -> Result<Vec<u8>, Stopped> {
        loop {
            if self.stopped.load(Ordering::Acquire) {
                return Err(Stopped);
            }
            if let Ok(bytes) = std::fs::read(self.folder.join(name)) {
                return Ok(bytes);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    pub fn forget(&self, name: &str) {
        let _ = std::fs::remove_file(self.folder.join(name));
    }
}
