//! Targets of fuzzing: each reads one kind of bytes from outside as the program does. The bytes may be refused; a
//! panic, an endless loop, a read out of bounds and an allocation far beyond the bytes are findings.
//!
//! `tests/fuzz` runs them on bytes that libFuzzer makes, `tests/fuzz_corpus.rs` on those in `tests/fuzz/corpus`.
//! Inputs of several files have [`BORDER`] between them.

mod allocation;
mod checkpoints;
mod data;
mod models;
mod streams;

pub use allocation::{Counted, bounded};

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
};

/// Divides the files of an input.
pub const BORDER: &[u8] = b"\n%%%%\n";

/// A kind of bytes.
pub struct Target {
    pub name: &'static str,
    run: fn(&[u8], &Folder),
    /// Bytes of memory that any input may take: buffers of readers, tables that are made once.
    free: usize,
}

const MIB: usize = 1 << 20;

/// All targets; parsers of our own, the longest, come first.
pub const TARGETS: &[Target] = &[
    Target { name: "frames", run: streams::frames, free: 96 * MIB },
    Target { name: "weights", run: models::weights, free: 96 * MIB },
    Target { name: "prepared", run: data::prepared, free: 96 * MIB },
    Target { name: "rows", run: data::rows, free: 96 * MIB },
    Target { name: "tables", run: data::tables, free: 96 * MIB },
    Target { name: "config", run: streams::config, free: 96 * MIB },
    Target { name: "adapter", run: checkpoints::adapter, free: 96 * MIB },
    Target { name: "state", run: checkpoints::state, free: 96 * MIB },
    Target { name: "bodies", run: streams::bodies, free: 96 * MIB },
    Target { name: "template", run: models::template, free: 2048 * MIB },
    Target { name: "metrics", run: checkpoints::metrics, free: 96 * MIB },
    Target { name: "hf_config", run: models::hf_config, free: 96 * MIB },
    Target { name: "index", run: models::index, free: 96 * MIB },
    Target { name: "tokenizer", run: models::tokenizer, free: 96 * MIB },
];

impl Target {
    /// Reads `input`.
    ///
    /// # Panics
    /// A finding.
    pub fn run(&self, input: &[u8]) {
        thread_local! {
            static FOLDER: RefCell<Folder> = RefCell::new(Folder::new());
        }
        FOLDER.with_borrow(|folder| {
            bounded(self.free, input.len(), || (self.run)(input, folder));
        });
    }
}

/// A folder for the files of an input, in memory where the machine has such a place.
pub struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self(made.expect("a temporary folder"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes `bytes` to the file `name`, or removes the file where there are none.
    fn put(&self, name: &str, bytes: Option<&[u8]>) -> PathBuf {
        let path = self.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).expect("a folder");
        }
        match bytes {
            Some(bytes) => fs::write(&path, bytes).expect("room for a file"),
            None => drop(fs::remove_file(&path)),
        }
        path
    }
}

/// The first `N` files of `input`; the last has the rest. Those that it lacks are `None`.
fn files<const N: usize>(input: &[u8]) -> [Option<&[u8]>; N] {
    let mut rest = Some(input);
    std::array::from_fn(|index| {
        let own = rest?;
        let border = own.windows(BORDER.len()).position(|bytes| bytes == BORDER).filter(|_| index + 1 < N);
        rest = border.map(|at| &own[at + BORDER.len()..]);
        Some(border.map_or(own, |at| &own[..at]))
    })
}
