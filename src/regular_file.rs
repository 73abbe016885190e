//! Regular files, of which reading comes to an end: a pipe waits for a writer that may never come, a device may have no
//! end.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

/// Opens `path` for reading.
///
/// # Errors
/// It cannot be opened, or is a pipe, a socket or a device.
pub fn open(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    // The system has words of its own for a folder.
    if !kind.is_file() && !kind.is_dir() {
        return Err(io::Error::other(
            "a pipe, socket or device, where a regular file is expected; put the file itself there",
        ));
    }
    File::open(path)
}

/// All bytes of `path`; errors as of [`open`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of `path`; errors as of [`open`], and bytes that are not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_no_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let [pipe, text] = ["pipe", "text"].map(|name| folder.path().join(name));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        fs::write(&text, "words").unwrap();
        assert_eq!(read(&text).unwrap(), b"words");
        assert_eq!(read_to_string(&text).unwrap(), "words");
        for path in [pipe.as_path(), Path::new("/dev/zero"), Path::new("/dev/null")] {
            assert!(read(path).unwrap_err().to_string().contains("a regular file is expected"));
        }
        for path in [folder.path(), &folder.path().join("lacking")] {
            assert!(read(path).unwrap_err().raw_os_error().is_some());
        }
    }
}
