//! Data files as records, whatever their format: JSON, tables of columns (parquet, arrow), tables of text (csv, tsv)
//! and plain text; forms of text also packed by gzip or zstd. The format is seen from a file's first bytes, and by its
//! name only where these do not tell. Nothing here trusts its input, and no file of text is read as a whole.

mod arrow_sizes;
mod columns;
mod json;
mod packed;
mod table;
mod text;

use super::{DataError, LineProblem, source::parse_object};
use crate::lfs;
use packed::Packing;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    ops::ControlFlow,
    path::Path,
};

/// Bytes of a file that are looked at to tell its format.
const START: usize = 1 << 20;

/// Endings of files that a folder is searched for, in the order of preference; without `.gz` or `.zst`.
pub(super) const ENDINGS: [&str; 8] = ["jsonl", "ndjson", "parquet", "arrow", "json", "csv", "tsv", "txt"];

/// A sample as its file has it.
#[derive(Debug, PartialEq)]
pub(crate) enum Record {
    /// The JSON text of an object.
    Json(Vec<u8>),
    /// The fields of a table's row.
    Fields(Map<String, Value>),
}

/// A record, or why it is none.
pub(crate) type Found = Result<Record, LineProblem>;

/// The place of a record in its file, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Line(usize),
    Row(usize),
}

/// Gets every record of a file with its place, until it breaks off.
pub(super) type Visit<'a> = dyn FnMut(Place, Found) -> ControlFlow<()> + 'a;

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(line) => write!(f, "{line}"),
            Self::Row(row) => write!(f, " row {row}"),
        }
    }
}

impl Record {
    /// The fields. Those of JSON are read from `prepare`'s form of the text.
    pub fn fields<'a, T: AsRef<[u8]>>(
        &'a self,
        prepare: impl Fn(&'a [u8]) -> Result<T, LineProblem>,
    ) -> Result<Map<String, Value>, LineProblem> {
        match self {
            Self::Json(text) => parse_object(prepare(text)?.as_ref()),
            Self::Fields(fields) => Ok(fields.clone()),
        }
    }

    /// Bytes that the record takes, roughly.
    pub fn size(&self) -> usize {
        fn of(value: &Value) -> usize {
            match value {
                Value::String(text) => text.len(),
                Value::Array(items) => items.iter().map(of).sum(),
                Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + of(value)).sum(),
                _ => 8,
            }
        }
        match self {
            Self::Json(text) => text.len(),
            Self::Fields(fields) => fields.iter().map(|(name, value)| name.len() + of(value)).sum(),
        }
    }
}

/// Why a file cannot be read on.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    Broken(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Calls `visit` with every record of the file at `path`. A text is a record by line or, `whole`, by file.
///
/// # Errors
/// A file in a format that is not read, and one that is cut or damaged. Records that are wrong go to `visit`.
pub(super) fn read(path: &Path, whole: bool, visit: &mut Visit) -> Result<(), DataError> {
    read_file(path, whole, visit).map_err(|fault| match fault {
        Fault::Io(source) => DataError::Io { path: path.into(), source },
        Fault::Broken(problem) => DataError::Foreign { path: path.into(), problem },
    })
}

fn read_file(path: &Path, whole: bool, visit: &mut Visit) -> Result<(), Fault> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(START, file);
    let start = reader.fill_buf()?;
    let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if lfs::is_pointer(start) {
        return Err(Fault::Broken(lfs::REMEDY.into()));
    }
    if start.starts_with(b"PAR1") || start.starts_with(b"PARE") {
        return columns::parquet(File::open(path)?, visit);
    }
    if start.starts_with(b"ARROW1") {
        return columns::arrow_file(File::open(path)?, visit);
    }
    if start.starts_with(&[0xff; 4]) {
        return columns::arrow_stream(File::open(path)?, visit);
    }
    let named = |ending: &str| name.ends_with(&format!(".{ending}"));
    for (ending, format) in [("parquet", "a parquet file"), ("arrow", "an arrow file")] {
        if named(ending) {
            let what = if start.is_empty() { "is empty" } else { "does not begin like one" };
            return Err(Fault::Broken(format!("by its name {format}, but it {what}; write it again")));
        }
    }
    let Some(packing) = Packing::of(start) else {
        if named("gz") || named("zst") {
            return Err(Fault::Broken("by its name a packed file, but it does not begin like one".into()));
        }
        return text::read(&mut reader, &name, whole, visit);
    };
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
    packed::read(packing, reader, packed::most_of_a_row(size), name, whole, visit)
}
