//! Errors of a configuration, each one line: the place of a setting, and its problem.

use super::source::Node;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// The section of `server.yaml`, which names it on the command line only.
const UNNAMED_SECTION: &str = "server.";

/// The place at which a setting was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `run.yaml:14: train.lr`
    File { path: PathBuf, line: usize, field: String },
    /// `--train.lr`
    Flag { field: String },
}

impl Place {
    /// The dotted field, `train.lr`.
    pub fn field(&self) -> &str {
        match self {
            Self::File { field, .. } | Self::Flag { field } => field,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, field } => {
                let field = field.strip_prefix(UNNAMED_SECTION).unwrap_or(field);
                write!(f, "{}:{line}: {field}", path.display())
            }
            Self::Flag { field } => write!(f, "--{field}"),
        }
    }
}

/// The places of all fields of a loaded configuration, for later messages about them.
#[derive(Clone, Debug)]
pub struct FieldLocations {
    pub(super) path: PathBuf,
    pub(super) sections: BTreeMap<String, usize>,
    pub(super) given: BTreeMap<String, Place>,
}

impl FieldLocations {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), sections: BTreeMap::new(), given: BTreeMap::new() }
    }

    /// Notes that the field of `place` was given as `node`, and the places of the parts of its value.
    pub(super) fn give(&mut self, place: Place, node: &Node) {
        for (suffix, line) in node.parts() {
            let mut part = place.clone();
            match &mut part {
                Place::File { line: at, field, .. } => (*at, *field) = (line, format!("{field}{suffix}")),
                Place::Flag { field } => *field += &suffix,
            }
            self.given.insert(part.field().to_owned(), part);
        }
        self.given.insert(place.field().to_owned(), place);
    }

    /// The place of `field` (`train.lr`); for a default, the start of its section.
    pub fn of(&self, field: &str) -> Place {
        self.given.get(field).cloned().unwrap_or_else(|| {
            let section = field.split('.').next().unwrap_or(field);
            let line = self.sections.get(section).copied().unwrap_or(1);
            Place::File { path: self.path.clone(), line, field: field.to_owned() }
        })
    }

    /// True if `field` was given in the file or on the command line, false for a default.
    pub fn is_given(&self, field: &str) -> bool {
        self.given.contains_key(field)
    }
}

/// The problem of a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The value has another type or is out of range.
    #[error("expected {expected}, got {got}")]
    Expected { expected: String, got: String },
    /// No such field.
    #[error("unknown field{}", did_you_mean(.nearest))]
    UnknownField { nearest: Option<String> },
    /// No such section.
    #[error("unknown section{}", did_you_mean(.nearest))]
    UnknownSection { nearest: Option<String> },
    /// A name of another trainer's.
    #[error("unknown field; {hint}")]
    Foreign { hint: String },
    /// A field without default was not given.
    #[error("missing: {needed}")]
    Missing { needed: &'static str },
    /// A value that would change the result or the mesh and is not built.
    #[error("{value} is refused: {reason}")]
    Refused { value: String, reason: &'static str },
    /// A path that leads to nothing that the field could read.
    #[error("{}: {fault}", .path.display())]
    Path { path: PathBuf, fault: String },
    /// Two settings contradict each other.
    #[error("{0}")]
    Conflict(String),
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

fn absent_words(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            "; --config names a .yaml, .yml or .json file, from the current directory on"
        }
        _ => "",
    }
}

/// The reason why a configuration was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not text.
    #[error("{}: cannot read the configuration: {source}{}", .path.display(), absent_words(source))]
    Read { path: PathBuf, source: std::io::Error },
    /// The name says neither YAML nor JSON.
    #[error("{}: expected a .yaml, .yml or .json file", .path.display())]
    Extension { path: PathBuf },
    /// The configuration of the other program.
    #[error("{}", kind_words(.path, *.is_server))]
    Kind { path: PathBuf, is_server: bool },
    /// Not YAML, or not a mapping of sections.
    #[error("{}:{line}: {message}", .path.display())]
    Syntax { path: PathBuf, line: usize, message: String },
    /// One field is wrong.
    #[error("{place}: {problem}")]
    Field { place: Place, problem: Problem },
    /// Several things are wrong, a line each in the order of the file; flags come last.
    #[error("{}", lines(.0))]
    Several(Vec<ConfigError>),
}

impl ConfigError {
    /// All of `faults` as one error; `None` if there are none.
    pub(super) fn of(mut faults: Vec<ConfigError>) -> Option<Self> {
        faults.sort_by_key(Self::line);
        match faults.len() {
            0 | 1 => faults.pop(),
            _ => Some(Self::Several(faults)),
        }
    }

    /// The same with the names by which the user gave flags: pairs of field and name.
    pub fn with_flags(self, names: &[(&str, &str)]) -> Self {
        match self {
            Self::Field { place: Place::Flag { field }, problem } => {
                let given =
                    names.iter().find(|(ours, _)| *ours == field).map(|(_, given)| (*given).to_owned());
                Self::Field { place: Place::Flag { field: given.unwrap_or(field) }, problem }
            }
            Self::Several(faults) => {
                Self::Several(faults.into_iter().map(|fault| fault.with_flags(names)).collect())
            }
            other => other,
        }
    }

    /// The line of the file; a flag is behind all of them.
    fn line(&self) -> usize {
        match self {
            Self::Syntax { line, .. } | Self::Field { place: Place::File { line, .. }, .. } => *line,
            Self::Field { place: Place::Flag { .. }, .. } => usize::MAX,
            Self::Read { .. } | Self::Extension { .. } | Self::Kind { .. } | Self::Several(_) => 0,
        }
    }
}

fn kind_words(path: &Path, is_server: bool) -> String {
    let file = path.display();
    if is_server {
        format!("{file} is of a server, not of a run: xorl-dist serve --config {file} checks it and starts")
    } else {
        format!(
            "{file} is of a run, not of a server: xorl-dist --config {file} trains it; configs/server/README.md has \
             the fields of a server"
        )
    }
}

fn lines(faults: &[ConfigError]) -> String {
    faults.iter().map(ConfigError::to_string).collect::<Vec<_>>().join("\n")
}

/// All problems of a value.
pub(super) type Issues = Vec<Issue>;

/// A problem inside the value of a field. `suffix` (`[0].type`) and `line` are the place of a part of the value.
#[derive(Debug, PartialEq)]
pub(super) struct Issue {
    pub suffix: String,
    pub line: Option<usize>,
    pub problem: Problem,
}

impl Issue {
    pub fn expected(expected: impl Into<String>, got: impl Into<String>) -> Self {
        Problem::Expected { expected: expected.into(), got: got.into() }.into()
    }

    /// Moves the issue into an element or entry of the value.
    pub fn inside(mut self, suffix: &str, line: usize) -> Self {
        self.suffix.insert_str(0, suffix);
        self.line.get_or_insert(line);
        self
    }
}

impl From<Problem> for Issue {
    fn from(problem: Problem) -> Self {
        Self { suffix: String::new(), line: None, problem }
    }
}
