//! Models and data sets of the Hugging Face hub, by their ids: downloaded into the cache that Python's
//! `huggingface_hub` uses, and found there. [`pin`] and [`fetch`] use the network; [`cached`] and [`cached_rows`] read
//! the cache alone, so that a rank finds without a request what one rank of its host has downloaded.
//!
//! The environment is `huggingface_hub`'s: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE`.

mod cache;
mod download;
mod progress;
mod remote;
mod rows;
mod settings;

pub use download::{Pinned, Wanted, fetch, pin};
pub use rows::{Subset, choose};

use settings::Settings;
use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Endings of files, which no repository's name has.
const FILES: [&str; 15] = [
    ".jsonl",
    ".json",
    ".parquet",
    ".csv",
    ".txt",
    ".gz",
    ".yaml",
    ".yml",
    ".safetensors",
    ".bin",
    ".pt",
    ".arrow",
    ".tsv",
    ".ndjson",
    ".zst",
];

/// Kind of a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    #[default]
    Model,
    DataSet,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::DataSet => "data set",
        })
    }
}

/// The id of a repository: `owner/name`, or `owner/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct HubId {
    /// `owner/name`
    pub name: String,
    /// Branch, tag or commit, where one is named.
    pub revision: Option<String>,
    pub kind: Kind,
}

impl HubId {
    /// Reads the id of a model; `None` for a text that has not its form.
    pub fn parse(text: &str) -> Option<Self> {
        let word = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_alphanumeric())
                && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let (owner, model) = name.split_once('/')?;
        let is_name = word(owner) && word(model) && !FILES.iter().any(|ending| model.ends_with(ending));
        let is_id = is_name && revision.is_none_or(is_revision);
        is_id.then(|| Self {
            name: name.to_owned(),
            revision: revision.map(str::to_owned),
            kind: Kind::Model,
        })
    }

    /// The id of a model that `path` is. `None` where there is such a path here, or a folder of the owner's name, in
    /// which a path is misspelt.
    pub fn of_path(path: &Path) -> Option<Self> {
        let id = Self::parse(path.to_str()?)?;
        let owner = id.name.split('/').next()?;
        (!path.exists() && !Path::new(owner).exists()).then_some(id)
    }

    /// The id of a data set that `path` is, as [`HubId::of_path`].
    pub fn of_data(path: &Path) -> Option<Self> {
        Self::of_path(path).map(|id| Self { kind: Kind::DataSet, ..id })
    }

    /// Its path in addresses of the hub.
    fn path(&self) -> String {
        match self.kind {
            Kind::Model => self.name.clone(),
            Kind::DataSet => format!("datasets/{}", self.name),
        }
    }

    /// The id in an address of the hub's pages (`https://huggingface.co/owner/name/tree/main`).
    pub fn of_address(address: &str) -> Option<Self> {
        let (_, rest) = address.split_once("://")?;
        let (host, path) = rest.split_once('/')?;
        if !["huggingface.co", "www.huggingface.co", "hf.co"].contains(&host) {
            return None;
        }
        let path = path.split(['?', '#']).next()?.trim_start_matches("datasets/");
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let id = Self::parse(&parts.get(..2)?.join("/"))?;
        match parts.get(2..) {
            Some(["tree" | "blob" | "resolve", revision, ..]) if *revision != "main" => Some(id.at(revision)),
            _ => Some(id),
        }
    }

    /// The same repository at `revision`.
    pub fn at(self, revision: &str) -> Self {
        Self { revision: Some(revision.to_owned()), ..self }
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// True for a name that a revision may have: a path below `refs/` in the cache.
pub fn is_revision(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+'))
    };
    text.split('/').all(part)
}

/// The remedy for an address in the place of a folder or file.
pub fn address_words(address: &str) -> String {
    match HubId::of_address(address) {
        Some(id) => format!("an address; name it by its hub id, {id}"),
        None => {
            let scheme = address.split("://").next().unwrap_or_default();
            format!("a {scheme} address is not read; name a local path, or a hub id, owner/name")
        }
    }
}

/// The fault of a model's `path` that is not there.
pub fn absent_words(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.contains("://") {
        return address_words(&text);
    }
    "no such folder; expected an HF model directory (config.json, safetensors) or a hub id, owner/name".into()
}

/// The folder that `path` names: itself, or that of the model whose id it is, with `weights` or without.
///
/// # Errors
/// As [`cached`].
pub fn locate(path: &Path, weights: bool) -> Result<PathBuf, HubError> {
    HubId::of_path(path).map_or_else(|| Ok(path.to_owned()), |id| cached(&id, weights))
}

/// The folder of a model in the cache, with config and weights if `weights` are wanted. Makes no request.
///
/// # Errors
/// [`HubError::NotCached`], or [`HubError::Missing`] if files of the model are absent.
pub fn cached(id: &HubId, weights: bool) -> Result<PathBuf, HubError> {
    let settings = Settings::from_env()?;
    let repository = settings.repository(id);
    let folder = repository.commit().map(|commit| repository.snapshot(&commit));
    let folder = folder.filter(|folder| folder.is_dir()).ok_or_else(|| settings.not_cached(id))?;
    let missing = if weights { cache::missing(&folder) } else { Vec::new() };
    if missing.is_empty() {
        return Ok(folder);
    }
    Err(HubError::Missing { folder, files: crate::console::first_of(&missing), offline: settings.offline })
}

/// The files of a data set's rows in the cache, in the order of reading. Makes no request.
///
/// # Errors
/// [`HubError::NotCached`], [`HubError::Missing`] if some of the files are absent, or those of [`choose`].
pub fn cached_rows(id: &HubId, subset: &Subset) -> Result<Vec<PathBuf>, HubError> {
    let settings = Settings::from_env()?;
    let repository = settings.repository(id);
    let commit = repository.commit().filter(|commit| repository.snapshot(commit).is_dir());
    let commit = commit.ok_or_else(|| settings.not_cached(id))?;
    let folder = repository.snapshot(&commit);
    let paths = repository.rows(&commit, subset)?;
    let missing: Vec<String> =
        paths.iter().filter(|path| !path.is_file()).map(|path| name_in(&folder, path)).collect();
    if missing.is_empty() {
        return Ok(paths);
    }
    Err(HubError::Missing { folder, files: crate::console::first_of(&missing), offline: settings.offline })
}

fn name_in(folder: &Path, path: &Path) -> String {
    path.strip_prefix(folder).unwrap_or(path).display().to_string()
}

/// Errors of a model or data set on the hub or in its cache. The caller names it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The cache has no such revision, and no request may be made, or was.
    #[error(
        "{}, and no such {kind} in the cache {}{}",
        here(*.kind), cache.display(), offline_words(.offline, *.kind, cache)
    )]
    NotCached { kind: Kind, cache: PathBuf, offline: Option<&'static str> },
    /// A download into the cache was not finished.
    #[error("{} lacks {files}{}", folder.display(), rest_words(.offline))]
    Missing { folder: PathBuf, files: String, offline: Option<&'static str> },
    /// The hub knows no such repository, or does not admit it.
    #[error(
        "{}, and no such {kind} on {endpoint}, or a private one: check the name; a private one needs {}",
        here(*.kind), if *has_token { "a token that may read it, in HF_TOKEN" } else { "HF_TOKEN" }
    )]
    Absent { kind: Kind, endpoint: String, has_token: bool },
    #[error(
        "{endpoint} has the {kind}, but no revision {revision} of it; name a branch, tag or commit, or none for main"
    )]
    Revision { kind: Kind, endpoint: String, revision: String },
    /// The owner gives access on request.
    #[error(
        "it is gated: accept its terms at {page}, then {}",
        if *has_token { "give the token of that account in HF_TOKEN" } else { "set HF_TOKEN to a token of that account" }
    )]
    Gated { page: String, has_token: bool },
    #[error("{endpoint} does not accept the token: renew HF_TOKEN, or unset it for a public {kind}")]
    Token { kind: Kind, endpoint: String },
    /// The repository has no weights that are read here.
    #[error(
        "the model has no safetensors (model.safetensors or {}), but {found}; give a model in HF format",
        cache::INDEX
    )]
    NoWeights { found: String },
    /// A data set without the rows that are asked for.
    #[error("{problem}")]
    Rows { problem: String },
    /// A revision of a model that is no model of the hub.
    #[error("a path here, which has no revisions; remove it")]
    NoRevisions,
    /// An answer that ends the download.
    #[error("{address}: the hub answers {status}; try again later")]
    Status { address: String, status: u16 },
    /// An answer that is not the hub's.
    #[error("{address}: {reason}; HF_ENDPOINT has to name a hub")]
    Answer { address: String, reason: String },
    #[error(
        "{address}: {reason}; check the network, HF_ENDPOINT, HTTPS_PROXY and the certificates of SSL_CERT_FILE, or set \
         HF_HUB_OFFLINE=1 to use the cache alone"
    )]
    Unreachable { address: String, reason: String },
    /// A path that is misspelt has the form of an id.
    #[error("{}, and as a hub id: {error}", here(*.kind))]
    NotHere { kind: Kind, error: Box<HubError> },
    /// A download that came to an end before the file's.
    #[error(
        "{address}: the connection ended after {got} of {size} bytes; start again, which goes on from there"
    )]
    Cut { address: String, got: u64, size: u64 },
    /// Bytes that are not the file's, twice.
    #[error(
        "{address}: expected a file with {expected}, got {got}; it was not kept: try again, or another HF_ENDPOINT"
    )]
    Corrupt { address: String, expected: String, got: String },
    #[error("{}: {needed} are needed for the download, {free} are free; HF_HUB_CACHE names another place", cache.display())]
    Space { cache: PathBuf, needed: String, free: String },
    #[error("no folder for the cache: set HF_HUB_CACHE, or HOME")]
    NoHome,
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn here(kind: Kind) -> &'static str {
    match kind {
        Kind::Model => "no such folder here",
        Kind::DataSet => "no such file or folder here",
    }
}

fn offline_words(offline: &Option<&'static str>, kind: Kind, cache: &Path) -> String {
    match offline {
        Some(variable) => format!(
            ", and {variable} keeps it from being downloaded: unset {variable}, or copy the {kind}'s folder from the cache \
             of another machine into {}",
            cache.display()
        ),
        None => String::new(),
    }
}

fn rest_words(offline: &Option<&'static str>) -> String {
    offline.map_or_else(
        || "; it comes with the next download".into(),
        |variable| format!(", and {variable} keeps it from being downloaded: unset {variable}"),
    )
}

impl HubError {
    /// True if the user's input is to blame; otherwise it is network, disk or hub.
    pub fn is_input(&self) -> bool {
        matches!(
            self,
            Self::NotCached { .. }
                | Self::Missing { .. }
                | Self::Absent { .. }
                | Self::Revision { .. }
                | Self::Gated { .. }
                | Self::Token { .. }
                | Self::NoWeights { .. }
                | Self::Rows { .. }
                | Self::NoRevisions
                | Self::NoHome
        )
    }

    /// True if the same request may succeed later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Cut { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502..=504),
            _ => false,
        }
    }
}

/// [`HubError::Io`] of `path`.
fn io(path: &Path) -> impl FnOnce(io::Error) -> HubError + '_ {
    |error| HubError::Io { path: path.to_owned(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_told_from_a_path() {
        for id in ["HuggingFaceTB/SmolLM2-135M", "a/b.c_d", "Qwen/Qwen2.5-0.5B@v1.0", "a/b@refs/pr/1"] {
            let parsed = HubId::of_path(Path::new(id)).unwrap_or_else(|| panic!("{id}"));
            assert_eq!(parsed.to_string(), id);
        }
        for path in [
            "./a/b",
            "/a/b",
            "a/b/c",
            "a",
            "src/nothing",
            "a/rows.jsonl",
            "../a/b",
            "a b/c",
            "a/b@",
            "a/b@../x",
            "a/b@x y",
        ] {
            assert_eq!(HubId::of_path(Path::new(path)), None, "{path}");
        }
        for (address, id) in [
            ("https://huggingface.co/Qwen/Qwen2.5-0.5B", Some("Qwen/Qwen2.5-0.5B")),
            ("https://huggingface.co/Qwen/Qwen2.5-0.5B/tree/v1", Some("Qwen/Qwen2.5-0.5B@v1")),
            ("https://hf.co/datasets/tatsu-lab/alpaca/blob/main/a.parquet", Some("tatsu-lab/alpaca")),
            ("https://huggingface.co/gpt2", None),
            ("https://example.org/a/b", None),
            ("s3://bucket/a", None),
        ] {
            assert_eq!(HubId::of_address(address).map(|id| id.to_string()).as_deref(), id, "{address}");
        }
        assert_eq!(HubId::parse("a/b").map(|id| id.at("x").revision().to_owned()), Some("x".into()));
    }
}
