//! From a file and the command line to a typed, validated configuration. The command line wins: a field that is given
//! there is not read from the file.

use super::compat::Verdict;
use super::error::{ConfigError, FieldLocations, Issue, Place, Problem};
use super::file::{self, ConfigFile};
use super::nearest::Hint;
use super::source::{self, Document, Entry, Kind, Node, SyntaxError};
use super::{RunConfig, ServerConfig, paths, validate};
use crate::regular_file;
use std::collections::BTreeSet;
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
pub struct Loaded<C = RunConfig> {
    pub config: C,
    /// One line each, `run.yaml:7: model.attn_implementation: ignored: …`, for rank 0 to print.
    pub warnings: Vec<String>,
    /// The place of each field, for messages about values that only the model or the data can judge.
    pub places: FieldLocations,
}

/// Reads the .yaml, .yml or .json file at `path`, lays `overrides` over it and validates the result.
///
/// # Errors
/// All problems, each with its file and line or its flag.
pub fn load(path: &Path, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    resolve(path, read(path)?, overrides, false)
}

/// Like [`load`], for a run on this machine: the paths that are named have to lead to what their fields read.
///
/// # Errors
/// As [`load`], with a problem for each such path.
pub fn load_with_paths(path: &Path, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    resolve(path, read(path)?, overrides, true)
}

/// [`load_with_paths`] for YAML text that is already read; `name` stands for the file in messages.
///
/// # Errors
/// As [`load_with_paths`].
pub fn load_yaml_with_paths(name: &Path, text: &str, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    resolve(name, source::parse_yaml(text), overrides, true)
}

/// Like [`load`] for YAML text that is already read; `name` stands for the file in messages.
pub fn load_yaml(name: &Path, text: &str, overrides: &[Override]) -> Result<Loaded, ConfigError> {
    resolve(name, source::parse_yaml(text), overrides, false)
}

/// [`load_with_paths`] for `server.yaml`, with overrides `--server.field`.
///
/// # Errors
/// As [`load_with_paths`].
pub fn load_server(path: &Path, overrides: &[Override]) -> Result<Loaded<ServerConfig>, ConfigError> {
    resolve(path, read(path)?, overrides, true)
}

/// [`load_yaml`] for `server.yaml`.
///
/// # Errors
/// As [`load`].
pub fn load_server_yaml(
    name: &Path,
    text: &str,
    overrides: &[Override],
) -> Result<Loaded<ServerConfig>, ConfigError> {
    resolve(name, source::parse_yaml(text), overrides, false)
}

fn read(path: &Path) -> Result<Result<Document, SyntaxError>, ConfigError> {
    let json = match path.extension().and_then(|extension| extension.to_str()) {
        Some("yaml" | "yml") => false,
        Some("json") => true,
        _ => return Err(ConfigError::Extension { path: path.to_owned() }),
    };
    let text = regular_file::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    Ok(if json { source::parse_json(&text) } else { source::parse_yaml(&text) })
}

fn resolve<C: ConfigFile>(
    path: &Path,
    document: Result<Document, SyntaxError>,
    overrides: &[Override],
    checks_paths: bool,
) -> Result<Loaded<C>, ConfigError> {
    let mut loader = Loader {
        path,
        config: C::default(),
        warnings: Vec::new(),
        places: FieldLocations::new(path),
        faults: Vec::new(),
        unread: BTreeSet::new(),
    };
    let Document { root, repeated } = document.map_err(|error| loader.syntax(error.line, error.message))?;
    for SyntaxError { line, message } in repeated {
        loader.faults.push(loader.syntax(line, message));
    }
    loader.file(root, overrides)?;
    for given in overrides {
        loader.flag(given);
    }
    let Loader { mut config, warnings, places, mut faults, unread, .. } = loader;
    faults.extend(validate::validate(&mut config, &places, &unread));
    if checks_paths {
        faults.extend(paths::faults(config.named_paths(), &places));
    }
    ConfigError::of(faults).map_or(Ok(Loaded { config, warnings, places }), Err)
}

struct Loader<'a, C> {
    path: &'a Path,
    config: C,
    warnings: Vec<String>,
    places: FieldLocations,
    faults: Vec<ConfigError>,
    /// Fields and sections that were given in some form and could not be read.
    unread: BTreeSet<String>,
}

impl<C: ConfigFile> Loader<'_, C> {
    fn syntax(&self, line: usize, message: String) -> ConfigError {
        ConfigError::Syntax { path: self.path.to_owned(), line, message }
    }

    fn fault(&mut self, place: Place, problem: Problem) {
        self.faults.push(ConfigError::Field { place, problem });
    }

    fn unknown(&mut self, place: Place, hint: Hint) {
        let Hint { mut problem, meant } = hint;
        if let (Problem::UnknownField { nearest: Some(name) }, Place::File { .. }) = (&mut problem, &place) {
            *name = self.name_in_file(name).to_owned();
        }
        self.unread.extend(meant);
        self.fault(place, problem);
    }

    /// The dotted `field` as the file writes it.
    fn name_in_file<'f>(&self, field: &'f str) -> &'f str {
        let flat = C::SECTIONS.iter().find_map(|section| field.strip_prefix(section)?.strip_prefix('.'));
        flat.filter(|_| C::IS_FLAT).unwrap_or(field)
    }

    fn file(&mut self, root: Node, overrides: &[Override]) -> Result<(), ConfigError> {
        let Kind::Map(entries) = root.kind else {
            let expected = if C::IS_FLAT {
                "expected fields, such as model_path: …".to_owned()
            } else {
                format!("expected sections {}", C::SECTIONS.join(", "))
            };
            return Err(self.syntax(root.line, format!("{expected}, got {}", root.shown())));
        };
        if is_of_the_other_kind::<C>(&entries) {
            return Err(ConfigError::Kind { path: self.path.to_owned(), is_server: !C::IS_FLAT });
        }
        if C::IS_FLAT {
            C::SECTIONS.iter().take(1).for_each(|section| self.entries(section, &entries, overrides));
            return Ok(());
        }
        for section in entries {
            let name = section.key;
            if !is_section::<C>(&name) {
                let place =
                    Place::File { path: self.path.to_owned(), line: section.line, field: name.clone() };
                self.unknown(place, C::unknown_section(&name));
                continue;
            }
            self.places.sections.insert(name.clone(), section.line);
            match section.value.kind {
                Kind::Map(entries) => self.entries(&name, &entries, overrides),
                _ if section.value.is_null() => {}
                _ => {
                    let message = format!("{name}: expected fields, got {}", section.value.shown());
                    self.faults.push(self.syntax(section.line, message));
                    self.unread.insert(name);
                }
            }
        }
        Ok(())
    }

    /// Reads the fields of a section that no flag gives.
    fn entries(&mut self, section: &str, entries: &[Entry], overrides: &[Override]) {
        for entry in entries {
            let field = format!("{section}.{}", entry.key);
            if overrides.iter().any(|given| given.field == field) {
                continue;
            }
            let place = Place::File { path: self.path.to_owned(), line: entry.line, field };
            self.assign(place, section, &entry.key, &entry.value);
        }
    }

    fn flag(&mut self, given: &Override) {
        let place = Place::Flag { field: given.field.clone() };
        match given.field.split_once('.') {
            Some((section, key)) if is_section::<C>(section) => {
                let node = node_of(&given.values);
                self.assign(place, section, key, &node);
            }
            _ => self.unknown(place, C::unknown_section(&given.field)),
        }
    }

    /// Sets the field to `node`, or judges it as a field of xorl's.
    fn assign(&mut self, place: Place, section: &str, key: &str, node: &Node) {
        let set = self.config.section_mut(section).map_or(Ok(false), |fields| fields.set(key, node));
        match set {
            Ok(true) => self.places.give(place, node),
            Ok(false) => self.judge(place, section, key, node),
            Err(issues) => {
                self.unread.insert(place.field().to_owned());
                let unbuilt = C::COMPAT.unbuilt(place.field(), node);
                let issues = unbuilt.map_or(issues, |problem| vec![problem.into()]);
                for Issue { suffix, line, problem } in issues {
                    self.fault(within(place.clone(), &suffix, line), problem);
                }
            }
        }
    }

    fn judge(&mut self, place: Place, section: &str, key: &str, node: &Node) {
        match C::COMPAT.judge(place.field(), node) {
            Ok(Verdict::Neutral) => {}
            Ok(Verdict::Warn(reason)) => self.warnings.push(format!("{place}: ignored: {reason}")),
            Ok(Verdict::Unknown) => self.unknown(place, C::unknown_field(section, key)),
            Err(problem) => self.fault(place, problem),
        }
    }
}

/// True for a file that is read as a run's and most of whose names are fields of a server, none a section of a run; and
/// the other way round.
fn is_of_the_other_kind<C: ConfigFile>(entries: &[Entry]) -> bool {
    let is_of_run = |entry: &Entry| RunConfig::SECTIONS.contains(&entry.key.as_str());
    let of_server = file::names::<ServerConfig>();
    let known =
        [ServerConfig::COMPAT.accepted_names(), ServerConfig::COMPAT.refused_names(), of_server].concat();
    let is_of_server = |entry: &Entry| known.contains(&format!("server.{}", entry.key));
    let count = |is: &dyn Fn(&Entry) -> bool| entries.iter().filter(|entry| is(entry)).count();
    let (run, server) = (count(&is_of_run), count(&is_of_server));
    let (own, other) = if C::IS_FLAT { (server, run) } else { (run, server) };
    own == 0 && 2 * other > entries.len()
}

/// True for this program's sections and for those that only xorl has.
fn is_section<C: ConfigFile>(name: &str) -> bool {
    let compat = C::COMPAT;
    let of_xorl = [compat.accepted_names(), compat.refused_names()].concat();
    C::SECTIONS.contains(&name) || of_xorl.iter().any(|field| field.split('.').next() == Some(name))
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

/// The value of a flag: nothing, one scalar, a list or mapping as YAML writes it in a line, or several scalars as a
/// list.
fn node_of(values: &[String]) -> Node {
    match values {
        [] => Node { line: 1, kind: Kind::Bare },
        [one] if one.starts_with(['[', '{']) => {
            // A glob may start with a bracket too, so the text may be neither.
            let read = source::parse_json(one).or_else(|_| source::parse_yaml(one));
            read.map_or_else(|_| Node::plain(one), |document| document.root)
        }
        [one] => Node::plain(one),
        many => Node { line: 1, kind: Kind::List(many.iter().map(|value| Node::plain(value)).collect()) },
    }
}
