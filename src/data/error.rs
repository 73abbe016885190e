//! Errors of data, tokenizers and templates: one line each, with the place and what would be right.

use std::path::PathBuf;

/// Why data could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}:{line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: LineProblem },
    #[error("data.datasets: expected at least one entry")]
    NoDatasets,
    #[error("{}: the folder holds no .jsonl file", path.display())]
    NoFiles { path: PathBuf },
    #[error("{}: expected at least one sample, found none", path.display())]
    Empty { path: PathBuf },
    #[error("all {samples} samples are longer than {limit} tokens: raise {field} or shorten the data")]
    AllDropped { samples: usize, limit: usize, field: &'static str },
    #[error("{}: `dummy` needs a vocabulary of at least 1 and samples of at least 1 token", path.display())]
    DummyShape { path: PathBuf },
    #[error("padding id {pad_id} is not in the model's vocabulary of {vocab_size}")]
    PadId { pad_id: i64, vocab_size: usize },
    #[error("{}: type chat needs a tokenizer and its chat template: set model.tokenizer_path", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{}: {problem}", path.display())]
    Tokenizer { path: PathBuf, problem: String },
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

/// Fault of one line of a data file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    #[error("not valid JSON at column {column}: {problem}")]
    Json { column: usize, problem: String },
    #[error("expected field `{field}`, found none")]
    Missing { field: String },
    #[error("{field}: expected {expected}, got {found}")]
    Type { field: String, expected: &'static str, found: String },
    #[error("{field}: token id {value} is not in the model's vocabulary of {vocab_size}")]
    Vocabulary { field: String, value: i64, vocab_size: usize },
    #[error("labels: expected {tokens} values like input_ids, got {labels}")]
    LabelsLength { labels: usize, tokens: usize },
    #[error("expected at least one token, found none")]
    NoTokens,
    #[error("{0}")]
    Template(String),
    #[error(
        "messages[{message}]: the template renders it differently when other messages follow, so the assistant's \
         tokens cannot be found; mark them with {{% generation %}} in the template, set data.train_on_inputs, or \
         split the conversation"
    )]
    NotPrefixStable { message: usize },
    #[error(
        "the template captures a {{% generation %}} block (in a macro, set or filter), so its place is not known"
    )]
    CapturedGeneration,
    #[error("the tokenizer cannot encode the text: {0}")]
    Tokenize(String),
}

impl DataError {
    /// True for a user error (exit code 2), false for a failure (1).
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::DataCursor { .. } | Self::LoaderDied(_))
    }
}

/// Folds a foreign message into one line.
pub(crate) fn one_line(text: impl std::fmt::Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
