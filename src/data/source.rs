//! The sources of a run, records of data files with their faults, and checks that all kinds of rows share. Nothing here
//! trusts its input.

use super::{
    DataError, LineProblem, files,
    formats::{self, Place, Record},
    integers, kinds,
};
use crate::{
    config::{DatasetArgs, DatasetType, SampleBy},
    hub::{self, HubId},
};
use serde_json::{Map, Value};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// An entry of `data.datasets` with its files.
#[derive(Debug)]
pub(super) struct Source {
    /// Its place in `data.datasets`.
    pub index: usize,
    /// Its type, never `auto`.
    pub kind: DatasetType,
    /// A chat template renders its rows.
    pub has_chats: bool,
    /// None of random data.
    pub files: Vec<PathBuf>,
}

impl Source {
    /// Finds the files of `entry`, and its type by the first row where it is not given.
    pub fn of(index: usize, entry: &DatasetArgs) -> Result<Self, DataError> {
        if entry.is_dummy() {
            return Ok(Self { index, kind: DatasetType::Tokenized, has_chats: false, files: Vec::new() });
        }
        let files::Files { paths: files, remark } = files_of(entry)?;
        if let Some(remark) = remark {
            tracing::warn!("{}: {remark}", entry.path.display());
        }
        let mut source = Self { index, kind: entry.kind, has_chats: false, files };
        source.has_chats = match entry.kind {
            DatasetType::Chat | DatasetType::Alpaca => true,
            DatasetType::Tokenized | DatasetType::Text => false,
            DatasetType::Auto | DatasetType::Completion | DatasetType::Preference => source.look(entry)?,
        };
        Ok(source)
    }

    /// Looks at the first row: sets the type where it is not given. True for a row that a chat template renders.
    fn look(&mut self, entry: &DatasetArgs) -> Result<bool, DataError> {
        let whole = entry.sample_by == SampleBy::Document;
        for path in &self.files {
            let Some((place, record)) = first_record(path, whole)? else { continue };
            let fault = |problem| {
                let (path, first) = (path.clone(), vec![(place, problem)]);
                DataError::Lines { path, first, more: 0 }
            };
            let fields = kinds::fields(&record, entry, self.kind).map_err(fault)?;
            if self.kind == DatasetType::Auto {
                let (kind, field) = kinds::detect(&fields).map_err(fault)?;
                self.kind = kind;
                let (shown, name) = (entry.path.display(), kinds::name(kind));
                tracing::info!("{shown}: type {name}, as its field `{field}` tells");
            }
            let is_chat = match self.kind {
                DatasetType::Completion => kinds::is_of_messages(&fields),
                DatasetType::Preference => kinds::has_messages(&fields).map_err(fault)?,
                kind => matches!(kind, DatasetType::Chat | DatasetType::Alpaca),
            };
            return Ok(is_chat);
        }
        // Without a row it has no type; it is refused as empty.
        self.kind = DatasetType::Tokenized;
        Ok(false)
    }
}

/// The files of an entry; of a data set of the hub those in its cache.
fn files_of(entry: &DatasetArgs) -> Result<files::Files, DataError> {
    let Some(id) = HubId::of_data(&entry.path) else {
        return match &entry.name {
            Some(name) => Err(DataError::Foreign {
                path: entry.path.clone(),
                problem: format!("a path here, which has no configurations; remove name: {name}"),
            }),
            None => files::files(&entry.path, entry.split.as_deref()),
        };
    };
    let paths = hub::cached_rows(&id, &entry.subset());
    let lacks =
        |error| DataError::Hub { place: String::new(), path: entry.path.clone(), error: Box::new(error) };
    let paths = paths.map_err(lacks)?;
    Ok(files::Files { paths, remark: None })
}

/// Different faults of a file that are told; the other records that are wrong are counted.
const FAULTS_TOLD: usize = 3;

/// The faults of a file's records.
#[derive(Debug, Default)]
pub(super) struct Faults {
    first: Vec<(Place, LineProblem)>,
    more: usize,
}

impl Faults {
    pub fn add(&mut self, place: Place, problem: LineProblem) {
        let is_told = self.first.iter().any(|(_, told)| *told == problem);
        if is_told || self.first.len() == FAULTS_TOLD {
            self.more += 1;
        } else {
            self.first.push((place, problem));
        }
    }

    /// One error, which names the file and its first different faults with their places.
    pub fn of(self, path: &Path) -> Result<(), DataError> {
        let Self { first, more } = self;
        if first.is_empty() { Ok(()) } else { Err(DataError::Lines { path: path.into(), first, more }) }
    }
}

/// Calls `visit` with every record of a file, also behind one that is wrong. All that is wrong becomes one error.
pub(super) fn for_each_record(
    path: &Path,
    mut visit: impl FnMut(Record) -> Result<(), LineProblem>,
) -> Result<(), DataError> {
    let mut faults = Faults::default();
    formats::read(path, false, &mut |place, found| {
        if let Err(problem) = found.and_then(&mut visit) {
            faults.add(place, problem);
        }
        ControlFlow::Continue(())
    })?;
    faults.of(path)
}

/// The first record of a file that is one, with its place.
pub(super) fn first_record(path: &Path, whole: bool) -> Result<Option<(Place, Record)>, DataError> {
    let mut first = None;
    formats::read(path, whole, &mut |place, found| {
        first = found.ok().map(|record| (place, record));
        if first.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(first)
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
