//! Errors of data, tokenizers and templates: one line each, with the place and what would be right.

use super::formats::Place;
use crate::{
    config::{DataArgs, FieldLocations},
    hub::HubError,
};
use std::path::{Path, PathBuf};

/// Why data could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{}: {source}; data are prepared there: free some room, or set TMPDIR or data.dataset_prepared_path to a folder \
         that has it", path.display()
    )]
    Temporary { path: PathBuf, source: std::io::Error },
    #[error("{}", lines(path, first, *more))]
    Lines { path: PathBuf, first: Vec<(Place, LineProblem)>, more: usize },
    #[error(
        "{}: its rows are of type {kind}: train.loss_fn dpo and simpo read rows of type preference, other losses all \
         other types", path.display()
    )]
    OfAnotherLoss { path: PathBuf, kind: String },
    #[error("data.datasets: expected at least one entry")]
    NoDatasets,
    #[error("{}: the folder holds no file of data (jsonl, json, parquet, arrow, csv, tsv, txt){found}", path.display())]
    NoFiles { path: PathBuf, found: String },
    /// `place` is the field that names the data set, with a colon and a space behind it, or empty.
    #[error("{place}{}: {error}", path.display())]
    Hub { place: String, path: PathBuf, error: Box<HubError> },
    #[error("{}: {problem}", path.display())]
    Foreign { path: PathBuf, problem: String },
    #[error("{}: expected at least one sample, found none; {remedy}", path.display())]
    Empty { path: PathBuf, remedy: &'static str },
    #[error("all {samples} samples are longer than {limit} tokens: raise {field} or shorten the data")]
    AllDropped { samples: usize, limit: usize, field: &'static str },
    #[error(
        "data.val_set_size: {size} of {records} different samples leaves none to train or none with a loss to validate; \
         choose another size, or give data.test_datasets"
    )]
    Split { size: f64, records: usize },
    #[error("{}: `dummy` needs a vocabulary of at least 1 and samples of at least 1 token", path.display())]
    DummyShape { path: PathBuf },
    #[error("`dummy` has no {input}, which train.loss_fn reads; give rows of type tokenized")]
    DummyInput { input: &'static str },
    #[error("padding id {pad_id} is not in the model's vocabulary of {vocab_size}")]
    PadId { pad_id: i64, vocab_size: usize },
    #[error("{}: all types but tokenized need a tokenizer: set model.tokenizer_path", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    Tokenizer { path: PathBuf, problem: String },
    #[error("{}: {problem}", dir.display())]
    TokenizerFolder { dir: PathBuf, problem: String },
    #[error("{}: nothing can be learned from it: no token has a loss{hint}", path.display())]
    NothingToLearn { path: PathBuf, hint: String },
    #[error("data.turns: last trains parts of a chat, and data.train_on_inputs all of it; set one of them")]
    TurnsOfAll,
    #[error("{}: no chat template: expected chat_template.jinja, or chat_template in tokenizer_config.json", dir.display())]
    NoTemplate { dir: PathBuf },
    #[error("{}: {problem}", path.display())]
    Template { path: PathBuf, problem: String },
    #[error("{0}")]
    Render(LineProblem),
    #[error(
        "position {position} of epoch {epoch} was asked for, but an epoch has {rows} rows (a bug in the plan)"
    )]
    DataCursor { epoch: usize, position: usize, rows: usize },
    #[error("the loader thread ended before its plan did: {0}")]
    LoaderDied(String),
}

/// The remedy for a data set without a row.
pub(super) const NO_ROWS: &str = "give it rows, as configs/README.md shows";

/// The remedy in a file for a field of a row that is missing, where the row's other fields tell none.
fn remedy(problem: &LineProblem) -> &'static str {
    match problem {
        LineProblem::Missing { field, hint: "", .. } if field.contains('[') => {
            "; write it, or name it by message_property_mappings"
        }
        LineProblem::Missing { hint: "", .. } => {
            "; in data.datasets set type to that of the rows, or name the field by columns"
        }
        _ => "",
    }
}

/// A line for each of the `first` faults of a file; the last of them counts the records that are wrong as well.
fn lines(path: &Path, first: &[(Place, LineProblem)], more: usize) -> String {
    let line = |(place, problem): &(Place, LineProblem)| {
        format!("{}:{place}: {problem}{}", path.display(), remedy(problem))
    };
    let mut told: Vec<String> = first.iter().map(line).collect();
    if let Some(last) = told.last_mut().filter(|_| more > 0) {
        let of = if matches!(first[0].0, Place::Line(_)) { "line" } else { "row" };
        *last += &format!(
            "; {} wrong too",
            if more == 1 { format!("1 more {of} is") } else { format!("{more} more {of}s are") }
        );
    }
    told.join("\n")
}

/// Doubt of a row whose one field looks like a line of a file with another delimiter.
fn delimited(found: &str) -> &'static str {
    match found.contains([';', '\t', '|']) && !found.contains(", ") {
        true => ", whose columns commas should divide",
        false => "",
    }
}

/// Fault of one line of a data file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    #[error("not valid JSON at column {column}: {problem}; write the row as one JSON object")]
    Json { column: usize, problem: String },
    #[error("not UTF-8 at byte {byte}; write the file in UTF-8, as `iconv -t UTF-8` does")]
    NotUtf8 { byte: usize },
    #[error(
        "{cells} cells where the header has {columns}; put cells with delimiters or line breaks in quotes"
    )]
    Ragged { cells: usize, columns: usize },
    #[error("{field}: not valid JSON, as which a cell holds a list: {problem}")]
    Cell { field: String, problem: String },
    #[error(
        "no type fits a row of {found}{}; chat reads `messages` or `conversations`, completion `prompt` and \
         `completion`, alpaca `instruction` and `output`, preference `chosen` and `rejected`, text `text`, tokenized \
         `input_ids`; in data.datasets set type, and name other fields by columns: {example}", delimited(.found)
    )]
    NoType { found: String, example: String },
    #[error("expected field `{field}`, found {found}{hint}")]
    Missing { field: String, found: String, hint: &'static str },
    #[error("{field}: {reason}")]
    Refused { field: String, reason: &'static str },
    #[error("{one}, but {other}; leave one of them out")]
    Contradiction { one: String, other: String },
    #[error("{field}: expected {expected}, got {found}")]
    Type { field: String, expected: &'static str, found: String },
    #[error(
        "{field}: token id {value} is not in the model's vocabulary of {vocab_size}; tokenize with the model's own \
         tokenizer"
    )]
    Vocabulary { field: String, value: i64, vocab_size: usize },
    #[error("{field}: expected {tokens} values like input_ids, got {values}")]
    Length { field: &'static str, values: usize, tokens: usize },
    #[error("an integer of {digits} digits; at most {most} are read")]
    LongInteger { digits: usize, most: usize },
    #[error("the text has U+10FFFF, which is no character; take it out")]
    NoCharacter,
    #[error("expected at least one token, found none")]
    NoTokens,
    #[error("{0}")]
    Template(String),
    #[error("an answer of the pair has no token with a loss: is it empty, or not the assistant's?")]
    NoAnswer,
    #[error(
        "an answer of the pair makes {answers} rows, because the chat template renders its turns otherwise when others \
         follow; give one answer each, with all before it in the prompt"
    )]
    Answers { answers: usize },
    #[error(
        "messages[{message}]: its tokens cannot be found in the rendered text, because the chat template cannot \
         render a probe in its place ({problem}); mark answers with {{% generation %}} in the template"
    )]
    NoProbe { message: usize, problem: String },
    #[error(
        "the template has {blocks} {{% generation %}} blocks for {messages} assistant messages, and it cannot be told \
         to which message each belongs; leave out data.turns: last, and weights of messages"
    )]
    MarksOfMessages { blocks: usize, messages: usize },
    #[error(
        "the template captures a {{% generation %}} block (in a macro, set or filter), so its place is not known"
    )]
    CapturedGeneration,
    #[error("the tokenizer names no eos_token, which ends a text; set it in tokenizer_config.json")]
    NoEos,
    #[error("the tokenizer cannot encode the text: {0}")]
    Tokenize(String),
}

impl DataError {
    /// The same with the place of the field that names a data set of the hub.
    pub fn placed(self, data: &DataArgs, places: &FieldLocations) -> Self {
        let (path, error) = match self {
            Self::Hub { path, error, .. } => (path, error),
            other => return other,
        };
        let found = data.named_sets().find(|(_, set)| set.path == path);
        let found = found.map(|(field, _)| format!("{}: ", places.of(&format!("{field}.path"))));
        Self::Hub { place: found.unwrap_or_default(), path, error }
    }

    /// True for a user error (exit code 2), false for a failure (1).
    pub fn is_input(&self) -> bool {
        match self {
            Self::Hub { error, .. } => error.is_input(),
            _ => !matches!(self, Self::DataCursor { .. } | Self::LoaderDied(_)),
        }
    }
}

impl LineProblem {
    /// A missing field of an object, with those that it has.
    pub(super) fn missing(
        field: &str,
        object: &serde_json::Map<String, serde_json::Value>,
        hint: &'static str,
    ) -> Self {
        Self::Missing { field: field.into(), found: keys(object), hint }
    }

    /// A field that is there without a value.
    pub(super) fn null(field: &str, expected: &'static str) -> Self {
        Self::Type { field: field.into(), expected, found: "null; write one, or leave the row out".into() }
    }

    /// A row that no type fits.
    pub(super) fn no_type(object: &serde_json::Map<String, serde_json::Value>) -> Self {
        let mut names = object.keys().filter(|key| key.chars().all(|c| c.is_alphanumeric() || c == '_'));
        let example = match (names.next(), names.next()) {
            (Some(prompt), Some(completion)) => format!("{{prompt: {prompt}, completion: {completion}}}"),
            (Some(text), None) => format!("{{text: {text}}}"),
            _ => "{text: NAME}".into(),
        };
        Self::NoType { found: keys(object), example }
    }
}

/// The fields of an object, for people.
fn keys(object: &serde_json::Map<String, serde_json::Value>) -> String {
    const MOST: usize = 8;
    let mut found: Vec<String> = object.keys().take(MOST).map(|key| format!("`{key}`")).collect();
    if object.len() > MOST {
        found.push(format!("and {} more", object.len() - MOST));
    }
    one_line(if found.is_empty() { "none".into() } else { found.join(", ") })
}

/// Folds a foreign message into one line.
pub(crate) fn one_line(text: impl std::fmt::Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
