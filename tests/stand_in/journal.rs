//! What was called, one line each: `{call} {words}`, in `{folder}/journal-{rank}`.

use crate::{folder, world_rank};
use std::{
    fs::File,
    io::Write,
    sync::{Mutex, OnceLock},
};

pub fn write(line: &str) {
    static JOURNAL: OnceLock<Option<Mutex<File>>> = OnceLock::new();
    let open = || {
        let path = folder().join(format!("journal-{}", world_rank()));
        File::options().create(true).append(true).open(path).ok().map(Mutex::new)
    };
    if let Some(file) = JOURNAL.get_or_init(open)
        && let Ok(mut file) = file.lock()
    {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}
