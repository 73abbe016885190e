//! A file that grows by whole records, also where the disk is full for a while: a record that cannot be written waits
//! for the next one.

use std::{fs::File, io, os::unix::fs::FileExt};

/// The file, with the records that wait.
pub(super) struct Records {
    file: File,
    /// Bytes of the records in the file.
    length: u64,
    waiting: Vec<u8>,
}

impl Records {
    /// Goes on behind the first `length` bytes of `file`; the rest is cut off.
    pub fn after(file: File, length: u64) -> io::Result<Self> {
        file.set_len(length)?;
        Ok(Self { file, length, waiting: Vec::new() })
    }

    /// Adds `record`, behind those that wait.
    ///
    /// # Errors
    /// It cannot be written, and waits.
    pub fn add(&mut self, record: &[u8]) -> io::Result<()> {
        self.waiting.extend_from_slice(record);
        self.flush()
    }

    /// Writes the records that wait. A kill leaves whole ones, as all are one write.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.file.write_all_at(&self.waiting, self.length) {
            // Part of a record; the next attempt overwrites it.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Replaces what is in the file from byte `start` on by `record`, which is longer.
    pub fn replace(&mut self, start: u64, record: &[u8]) -> io::Result<()> {
        self.length = start;
        self.add(record)
    }

    /// The file, to bring its records to the disk.
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn records_that_could_not_be_written_come_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "one\ntorn").unwrap();
        let writable = File::options().write(true).open(&path).unwrap();
        let mut records = Records::after(writable.try_clone().unwrap(), 4).unwrap();
        records.add(b"two\n").unwrap();
        // A descriptor that refuses every write, as a full disk does.
        records.file = File::open(&path).unwrap();
        for lost in ["three\n", "four\n"] {
            records.add(lost.as_bytes()).unwrap_err();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        records.file = writable;
        records.add(b"five\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\nfour\nfive\n");
        records.replace(19, b"fifth\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\nfour\nfifth\n");
    }
}
