//! Checks a configuration's paths before anything is read: each has to lead to a file or folder of the kind that its
//! field reads. An error says what the path is instead.

use super::error::{ConfigError, FieldLocations, Problem};
use super::nearest::misspelt;
use super::{ModelArgs, RunConfig};
use crate::hub::{self, HubId};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The kind of thing that a field reads.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// An HF model directory.
    Model,
    /// An HF config.json, or its directory.
    ModelConfig,
    Tokenizer,
    Data,
    Adapter,
    /// Hashes of API keys.
    Keys,
}

/// A path with its field.
pub(super) struct NamedPath<'a> {
    field: String,
    path: &'a Path,
    kind: Kind,
}

impl<'a> NamedPath<'a> {
    /// `None` where no path was given.
    pub fn new(field: impl Into<String>, path: Option<&'a Path>, kind: Kind) -> Option<Self> {
        path.map(|path| Self { field: field.into(), path, kind })
    }
}

/// A problem for each path that leads nowhere, or to something else than its field reads.
pub(super) fn faults(named: Vec<NamedPath<'_>>, places: &FieldLocations) -> Vec<ConfigError> {
    let fault = |NamedPath { field, path, kind }: NamedPath<'_>| {
        let problem = Problem::Path { path: path.to_owned(), fault: fault(path, kind)? };
        Some(ConfigError::Field { place: places.of(&field), problem })
    };
    named.into_iter().filter_map(fault).collect()
}

/// The paths of a model whose fields stand in `section`.
pub(super) fn of_model<'a>(section: &str, model: &'a ModelArgs) -> Vec<NamedPath<'a>> {
    let named = [
        ("model_path", &model.model_path, Kind::Model),
        ("config_path", &model.config_path, Kind::ModelConfig),
        ("tokenizer_path", &model.tokenizer_path, Kind::Tokenizer),
    ];
    let named = named.into_iter();
    named
        .filter_map(|(key, path, kind)| NamedPath::new(format!("{section}.{key}"), path.as_deref(), kind))
        .collect()
}

/// The paths of `run.yaml`.
pub(super) fn of_run(config: &RunConfig) -> Vec<NamedPath<'_>> {
    let RunConfig { model, data, lora, .. } = config;
    let read = data.named_sets().filter(|(_, set)| !set.is_dummy());
    let sets =
        read.filter_map(|(field, set)| NamedPath::new(format!("{field}.path"), Some(&set.path), Kind::Data));
    let adapter = NamedPath::new("lora.adapter_path", lora.adapter_path.as_deref(), Kind::Adapter);
    of_model("model", model).into_iter().chain(adapter).chain(sets).collect()
}

/// The fault of `path` as a `kind`, and the remedy.
fn fault(path: &Path, kind: Kind) -> Option<String> {
    if path.is_dir() {
        let lacks = |name: &str| !path.join(name).exists();
        return match kind {
            Kind::Keys => Some(format!("a folder, where {} belongs", kind.expected())),
            Kind::Tokenizer if lacks("tokenizer.json") => {
                Some(format!("a folder without one; expected {}", kind.expected()))
            }
            _ => None,
        };
    }
    if path.exists() {
        return of_file(path, kind);
    }
    // The hub says whether it has it.
    if kind.may_be_of_hub() && HubId::of_path(path).is_some() {
        return None;
    }
    let text = path.to_string_lossy();
    if kind == Kind::Data && glob::glob(&text).is_ok_and(|mut files| files.next().is_some()) {
        return None;
    }
    Some(match absent(&text, kind) {
        Some(words) => words,
        None => {
            let absent = match kind {
                Kind::Data => format!("no such file or folder; expected {}", kind.expected()),
                Kind::Keys => format!("no such file; expected {}", kind.expected()),
                _ => format!("no such folder; expected {}", kind.expected()),
            };
            match neighbour(path) {
                Some(name) => format!("{absent}; did you mean {}?", name.display()),
                None => absent,
            }
        }
    })
}

/// The neighbour of `path` that is named nearly like it.
fn neighbour(path: &Path) -> Option<PathBuf> {
    let folder = path.parent()?;
    let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = std::fs::read_dir(listed).ok()?.flatten();
    let names: BTreeSet<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    misspelt(path.file_name()?.to_str()?, names).map(|name| folder.join(name))
}

/// The fault of a file.
fn of_file(path: &Path, kind: Kind) -> Option<String> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    match kind {
        Kind::Data | Kind::Keys => None,
        Kind::ModelConfig if ending == "json" => None,
        // Files of a run's folder that name a step.
        Kind::Adapter if path.ends_with("latest") || path.ends_with("best") => None,
        _ if ending == "gguf" => {
            Some("GGUF is not read; give the Hugging Face directory that it was made from".into())
        }
        _ => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.map_or(".".into(), |folder| folder.display().to_string());
            Some(format!("a file, where {} belongs; did you mean its folder, {folder}?", kind.expected()))
        }
    }
}

/// Fault of a path that is not there, by what it looks like; `None` if it looks like an ordinary path.
fn absent(text: &str, kind: Kind) -> Option<String> {
    if text.starts_with('~') {
        return Some("no such path; ~ is not expanded here, write the path in full".into());
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Some(match kind {
            Kind::Adapter | Kind::Keys => {
                format!("a {scheme} address; {} is read from local files only", kind.thing())
            }
            _ => hub::address_words(text),
        });
    }
    if text.contains(['*', '?', '[']) {
        return Some(match kind {
            Kind::Data => "no file matches this glob".into(),
            _ => format!("a glob, which is not expanded; name {}", kind.expected()),
        });
    }
    let may_be_hub_id = kind == Kind::Adapter && HubId::of_path(Path::new(text)).is_some();
    may_be_hub_id.then(|| {
        format!(
            "no such folder; if it is an adapter of the Hugging Face hub, download it first and name the folder: \
             hf download {text} --local-dir {}",
            text.rsplit('/').next().unwrap_or(text)
        )
    })
}

impl Kind {
    /// True for a thing that is downloaded if it has a hub id.
    fn may_be_of_hub(self) -> bool {
        matches!(self, Self::Model | Self::ModelConfig | Self::Tokenizer | Self::Data)
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Model => "an HF model directory (config.json, safetensors) or a hub id, owner/name",
            Self::ModelConfig => "an HF config.json, its directory or a hub id, owner/name",
            Self::Tokenizer => "a directory with tokenizer.json or a hub id, owner/name",
            Self::Data => "a data file, a folder of them, a glob or a hub id, owner/name",
            Self::Adapter => "a PEFT adapter directory, such as a published step",
            Self::Keys => "a file with the hashes of API keys",
        }
    }

    fn thing(self) -> &'static str {
        match self {
            Self::Model | Self::ModelConfig => "a model",
            Self::Tokenizer => "a tokenizer",
            Self::Data => "data",
            Self::Adapter => "an adapter",
            Self::Keys => "a file of keys",
        }
    }
}
