//! From a file and the command line to a typed, validated configuration. The command line wins: a field that is given
//! there is not read from the file.

use super::compat::{self, Verdict};
use super::error::{ConfigError, FieldLocations, Place, Problem};
use super::source::{self, Kind, Node, SyntaxError};
use super::{RunConfig, nearest, validate};
use std::path::Path;

/// One `--section.field value…` of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// The dotted field, `train.lr`.
    pub field: String,
    /// Its values: several for a list, none for a bare flag (true).
    pub values: Vec<String>,
}

/// A configuration with its warnings and places.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: RunConfig,
    /// One line each, `run.yaml:7: model.attn_implementation: ignored: …`, for rank 0 to print.
    pub warnings: Vec<String>,
    /// The place of each field, for messages about values that only the model or the data can judge.
    pub places: FieldLocations,
}

/// Reads the .yaml, .yml or .json file at `path`, lays `overrides` over it and validates the result.
///
/// # Errors
/// The first problem, with its file and line or its flag.
pub fn load(path: &Path, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    let json = match path.extension().and_then(|extension| extension.to_str()) {
        Some("yaml" | "yml") => false,
        Some("json") => true,
        _ => return Err(ConfigError::Extension { path: path.to_owned() }),
    };
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let root = if json { source::parse_json(&text) } else { source::parse_yaml(&text) };
    resolve(path, root, overrides)
}

/// Like [`load`] for YAML text that is already read; `name` stands for the file in messages.
pub fn load_yaml(name: &Path, text: &str, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    resolve(name, source::parse_yaml(text), overrides)
}

fn resolve(
    path: &Path,
    root: Result<Node, SyntaxError>,
    overrides: &[Override],
) -> Result<Loaded, ConfigError> {
    let mut loader = Loader {
        loaded: Loaded {
            config: RunConfig::default(),
            warnings: Vec::new(),
            places: FieldLocations::new(path),
        },
    };
    let syntax =
        |e: SyntaxError| ConfigError::Syntax { path: path.to_owned(), line: e.line, message: e.message };
    loader.file(path, root.map_err(syntax)?, overrides)?;
    for given in overrides {
        loader.flag(given)?;
    }
    let Loaded { mut config, warnings, places } = loader.loaded;
    validate::validate(&mut config, &places)?;
    Ok(Loaded { config, warnings, places })
}

struct Loader {
    loaded: Loaded,
}

impl Loader {
    fn file(&mut self, path: &Path, root: Node, overrides: &[Override]) -> Result<(), ConfigError> {
        let syntax = |line, message| ConfigError::Syntax { path: path.to_owned(), line, message };
        let Kind::Map(sections) = root.kind else {
            let message = format!("expected sections {}, got {}", super::SECTIONS.join(", "), root.shown());
            return Err(syntax(root.line, message));
        };
        for section in sections {
            let name = section.key;
            if !is_section(&name) {
                let place = Place::File { path: path.to_owned(), line: section.line, field: name.clone() };
                let problem = Problem::UnknownSection { nearest: nearest::section(&name) };
                return Err(ConfigError::Field { place, problem });
            }
            self.loaded.places.sections.insert(name.clone(), section.line);
            let entries = match section.value.kind {
                Kind::Map(entries) => entries,
                _ if section.value.is_null() => continue,
                _ => {
                    let message = format!("{name}: expected fields, got {}", section.value.shown());
                    return Err(syntax(section.line, message));
                }
            };
            for entry in entries {
                let field = format!("{name}.{}", entry.key);
                if overrides.iter().any(|given| given.field == field) {
                    continue;
                }
                let place = Place::File { path: path.to_owned(), line: entry.line, field };
                self.assign(place, &name, &entry.key, &entry.value)?;
            }
        }
        Ok(())
    }

    fn flag(&mut self, given: &Override) -> Result<(), ConfigError> {
        let place = Place::Flag { field: given.field.clone() };
        match given.field.split_once('.') {
            Some((section, key)) if is_section(section) => {
                let node = node_of(&given.values);
                self.assign(place, section, key, &node)
            }
            _ => {
                let section = given.field.split('.').next().unwrap_or_default();
                let problem = Problem::UnknownSection { nearest: nearest::section(section) };
                Err(ConfigError::Field { place, problem })
            }
        }
    }

    /// Sets the field to `node`, or judges it as a field of xorl's.
    fn assign(&mut self, place: Place, section: &str, key: &str, node: &Node) -> Result<(), ConfigError> {
        let known = match self.loaded.config.section_mut(section) {
            None => false,
            Some(fields) => match fields.set(key, node) {
                Ok(known) => known,
                Err(issue) => {
                    let problem = compat::unbuilt(place.field(), node).unwrap_or(issue.problem);
                    let place = within(place, &issue.suffix, issue.line);
                    return Err(ConfigError::Field { place, problem });
                }
            },
        };
        if known {
            self.loaded.places.given.insert(place.field().to_owned(), place);
            return Ok(());
        }
        match compat::judge(place.field(), node) {
            Ok(Verdict::Neutral) => Ok(()),
            Ok(Verdict::Warn(reason)) => {
                self.loaded.warnings.push(format!("{place}: ignored: {reason}"));
                Ok(())
            }
            Ok(Verdict::Unknown) => {
                let problem = Problem::UnknownField { nearest: nearest::field(section, key) };
                Err(ConfigError::Field { place, problem })
            }
            Err(problem) => Err(ConfigError::Field { place, problem }),
        }
    }
}

/// True for this program's sections and for those that only xorl has.
fn is_section(name: &str) -> bool {
    super::SECTIONS.contains(&name) || compat::names().any(|field| field.split('.').next() == Some(name))
}

/// The place of a part of a field's value.
fn within(place: Place, suffix: &str, part: Option<usize>) -> Place {
    match place {
        Place::File { path, line, field } => {
            Place::File { path, line: part.unwrap_or(line), field: field + suffix }
        }
        Place::Flag { field } => Place::Flag { field: field + suffix },
    }
}

/// The value of a flag: nothing, one scalar or JSON text, or several scalars as a list.
fn node_of(values: &[String]) -> Node {
    match values {
        [] => Node { line: 1, kind: Kind::Bare },
        [one] if one.starts_with(['[', '{']) => {
            // A glob may start with a bracket too, so the text may be no JSON.
            source::parse_json(one).unwrap_or_else(|_| Node::plain(one))
        }
        [one] => Node::plain(one),
        many => Node { line: 1, kind: Kind::List(many.iter().map(|value| Node::plain(value)).collect()) },
    }
}
