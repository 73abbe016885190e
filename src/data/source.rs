//! Data files: which there are, their lines, and checks that all kinds of lines share. Nothing here trusts its input.

use super::{DataError, LineProblem, integers};
use crate::{console::first_of, lfs};
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

/// The files of a dataset: `path` itself, or the .jsonl files of the folder (not of its subfolders) by name.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    if !std::fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|extension| extension == "jsonl") && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        let found = Some(left_out(path)).filter(|names| !names.is_empty());
        let found = found.map(|names| format!("; it has {}", first_of(&names))).unwrap_or_default();
        return Err(DataError::NoFiles { path: path.into(), found });
    }
    files.sort();
    Ok(files)
}

/// Files of the folder `path` that [`files`] does not read, by name: those that are not hidden and no text about it.
pub(crate) fn left_out(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let name = |entry: std::fs::DirEntry| {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let ending = path.extension().unwrap_or_default();
        (path.is_file() && !name.starts_with('.') && ending != "jsonl" && ending != "md").then_some(name)
    };
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

/// The first bytes of files in other formats, and what to do with them.
const FOREIGN: [(&[u8], &str); 7] = [
    (b"\x1f\x8b", "a file that gzip packed; unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "a file that zstd packed; unpack it with `unzstd`"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (
        b"PAR1",
        "a parquet file; one row a line is wanted (jsonl): write it with pandas' to_json(orient=\"records\", lines=True)",
    ),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"{\0", UTF_16),
];
const UTF_16: &str = "text in UTF-16; write it in UTF-8, as `iconv -f UTF-16 -t UTF-8` does";
const CSV: &str = "a table (CSV); one JSON row a line is wanted (jsonl): python3 -c 'import csv, json, sys; \
    [print(json.dumps({\"messages\": [{\"role\": \"user\", \"content\": row[\"question\"]}, {\"role\": \"assistant\", \
    \"content\": row[\"answer\"]}]})) for row in csv.DictReader(sys.stdin)]' < data.csv > data.jsonl, with the names of \
    your columns";
const ARRAY: &str = "a JSON list; one row a line is wanted (jsonl), as `jq -c '.[]'` writes it";

/// Tells a file that begins with `start` and is no jsonl by what it is, a table by its name.
fn foreign(path: &Path, start: &[u8]) -> Option<&'static str> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    if matches!(ending.as_str(), "csv" | "tsv") && !start.trim_ascii_start().starts_with(b"{") {
        return Some(CSV);
    }
    let text = start.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(start);
    let known = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| *what);
    if lfs::is_pointer(start) { Some(lfs::REMEDY) } else { known }
        .or_else(|| text.trim_ascii_start().starts_with(b"[").then_some(ARRAY))
}

/// Different faults of a file that are told; the other lines that are wrong are counted.
const FAULTS_TOLD: usize = 3;

/// Calls `visit` with every line that is not blank, also behind one that is wrong. What it finds wrong becomes one
/// error, which names the file and its first different faults with their lines.
pub(crate) fn for_each_line(
    path: &Path,
    mut visit: impl FnMut(&[u8]) -> Result<(), LineProblem>,
) -> Result<(), DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
    if let Some(problem) = foreign(path, reader.fill_buf().map_err(io)?) {
        return Err(DataError::Foreign { path: path.into(), problem });
    }
    let (mut buffer, mut first, mut more) = (Vec::new(), Vec::<(usize, LineProblem)>::new(), 0);
    for line in 1.. {
        buffer.clear();
        if reader.read_until(b'\n', &mut buffer).map_err(io)? == 0 {
            break;
        }
        let text = if line == 1 { buffer.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&buffer) } else { &buffer };
        let text = text.trim_ascii();
        if text.is_empty() {
            continue;
        }
        if let Err(problem) = visit(text) {
            let is_told = first.iter().any(|(_, told)| *told == problem);
            if is_told || first.len() == FAULTS_TOLD {
                more += 1;
            } else {
                first.push((line, problem));
            }
        }
    }
    if first.is_empty() { Ok(()) } else { Err(DataError::Lines { path: path.into(), first, more }) }
}

/// Checks ids against the vocabulary; an empty list is an error too.
pub(crate) fn check_tokens(ids: &[i64], vocab_size: usize, field: &str) -> Result<Vec<u32>, LineProblem> {
    if ids.is_empty() {
        return Err(LineProblem::NoTokens);
    }
    let check = |(index, &value): (usize, &i64)| match u32::try_from(value) {
        Ok(token) if in_vocabulary(value, vocab_size) => Ok(token),
        _ => Err(LineProblem::Vocabulary { field: format!("{field}[{index}]"), value, vocab_size }),
    };
    ids.iter().enumerate().map(check).collect()
}

/// A line that is a JSON object.
pub(super) fn parse_object(line: &[u8]) -> Result<Map<String, Value>, LineProblem> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(wrong("line", "a JSON object", &other)),
        Err(error) => {
            let text = error.to_string();
            let problem = text.split(" at line ").next().unwrap_or(&text).to_string();
            Err(LineProblem::Json { column: error.column(), problem })
        }
    }
}

/// True for an id below `vocab_size`.
pub(super) fn in_vocabulary(value: i64, vocab_size: usize) -> bool {
    usize::try_from(value).is_ok_and(|value| value < vocab_size)
}

/// A type error that shows the value when it is short, otherwise its kind.
pub(super) fn wrong(field: &str, expected: &'static str, found: &Value) -> LineProblem {
    let found = match found {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => integers::digits(found).map_or("an object".into(), str::to_string),
        Value::String(text) if text.chars().count() > 40 => "a long string".into(),
        other => other.to_string(),
    };
    LineProblem::Type { field: field.into(), expected, found }
}
