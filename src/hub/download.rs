//! A model or data set from the hub into the cache. A file is downloaded beside its place, goes on where an earlier
//! download ended, and gets its name once its size and, if it is a large one, its sha256 are right.

use super::{
    HubError, HubId,
    cache::{INDEX, README, Repository, SINGLE, is_commit, make_parent, missing, shards},
    io,
    progress::Progress,
    remote::{Remote, RemoteFile},
    rows::{Subset, choose},
    settings::Settings,
};
use crate::{
    console::{first_of, size},
    regular_file,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Seek, Write},
    path::{Component, Path},
    thread::sleep,
    time::Duration,
};

/// Requests in a row that bring nothing, before a download ends.
const ATTEMPTS: u32 = 5;
/// Downloads of a file that turn out to be other bytes, before it ends.
const WRONG: usize = 2;
/// Wait after the first failure; it doubles.
const WAIT: Duration = Duration::from_millis(250);
/// Time between two looks at a file that another process downloads.
const LOOK: Duration = Duration::from_millis(200);
const BUFFER: usize = 1 << 20;

/// Files of a model beside its weights: those that are read here, and those by which others read a merged model.
const SMALL: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The files of a repository that are wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Wanted {
    /// Config and tokenizer of a model, and its weights.
    Model { weights: bool },
    /// Rows of a data set.
    Rows(Subset),
}

impl Wanted {
    /// True if the files of `other` are among these.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Model { weights: ours }, Self::Model { weights: theirs }) => ours >= theirs,
            _ => self == other,
        }
    }

    /// True if the cache has them.
    fn are_in(&self, repository: &Repository, commit: &str) -> bool {
        match self {
            Self::Model { weights } => !weights || missing(&repository.snapshot(commit)).is_empty(),
            Self::Rows(subset) => {
                repository.rows(commit, subset).is_ok_and(|files| files.iter().all(|file| file.is_file()))
            }
        }
    }
}

/// A repository at a commit, with the names of its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pinned {
    pub id: HubId,
    pub commit: String,
    pub wanted: Wanted,
    /// `None`: the cache has all, or no request may be made.
    files: Option<Vec<String>>,
}

/// Asks the hub for the commit of a repository's revision, and for the names of its files. Where no request may be
/// made, or the hub is not reached, the cache has to know the commit.
///
/// # Errors
/// The repository is absent or not to be read; [`HubError::NotCached`].
pub fn pin(id: &HubId, wanted: &Wanted) -> Result<Pinned, HubError> {
    let settings = Settings::from_env()?;
    let repository = settings.repository(id);
    let known = repository.commit().filter(|commit| repository.snapshot(commit).is_dir());
    let pinned = |commit, files| Pinned { id: id.clone(), commit, wanted: wanted.clone(), files };
    if settings.offline.is_some() {
        return known.map(|commit| pinned(commit, None)).ok_or_else(|| settings.not_cached(id));
    }
    let whole = known.filter(|commit| wanted.are_in(&repository, commit));
    // Files beside the weights are not known to be whole.
    let is_known = is_commit(id.revision()) && *wanted != (Wanted::Model { weights: false });
    if let Some(commit) = whole.as_ref().filter(|_| is_known) {
        return Ok(pinned(commit.clone(), None));
    }
    // With the files at hand a hub that is not reached is asked once.
    let attempts = if whole.is_some() { 1 } else { ATTEMPTS };
    match retried(attempts, || Remote::new(&settings, id).revision()) {
        Ok(revision) => {
            if let Wanted::Model { weights } = wanted {
                check_weights(&revision.files, *weights)?;
            }
            Ok(pinned(revision.commit, Some(revision.files)))
        }
        Err(error @ HubError::Unreachable { .. }) => {
            let Some(commit) = whole else {
                return Err(HubError::NotHere { kind: id.kind, error: Box::new(error) });
            };
            tracing::warn!(
                "{} is not reached: {id} is used as the cache has it, at {commit}",
                settings.endpoint
            );
            Ok(pinned(commit, None))
        }
        Err(error) => Err(error),
    }
}

/// Downloads what the cache lacks of a pinned repository, one process at a time. `is_shown`: with progress on stderr.
///
/// # Errors
/// The hub cannot be reached, or sends other files than it says; the disk is full.
pub fn fetch(pinned: &Pinned, is_shown: bool) -> Result<(), HubError> {
    let settings = Settings::from_env()?;
    let repository = settings.repository(&pinned.id);
    if let Some(files) = &pinned.files {
        let remote = Remote::new(&settings, &pinned.id);
        let fetcher = Fetcher { settings: &settings, repository: &repository, remote, pinned, is_shown };
        let weights = match &pinned.wanted {
            Wanted::Model { weights } => *weights,
            Wanted::Rows(subset) => {
                fetcher.fetch_rows(files, subset)?;
                return repository.set_commit(&pinned.commit);
            }
        };
        let has = |name: &&str| files.iter().any(|file| file == name);
        let mut wanted: Vec<&str> = SMALL.iter().copied().filter(has).collect();
        let is_sharded = weights && !has(&SINGLE);
        wanted.extend(is_sharded.then_some(INDEX));
        fetcher.fetch(&wanted)?;
        let shards = if is_sharded {
            let index = repository.snapshot(&pinned.commit).join(INDEX);
            shards(&regular_file::read_to_string(&index).map_err(io(&index))?)
        } else {
            Vec::new()
        };
        let listed = shards.iter().map(String::as_str).filter(|name| has(name) && is_below(name));
        let mut listed: Vec<&str> = listed.collect();
        listed.extend((weights && !is_sharded).then_some(SINGLE));
        fetcher.fetch(&listed)?;
    }
    repository.set_commit(&pinned.commit)
}

/// Refuses a model whose weights are not read here.
fn check_weights(files: &[String], weights: bool) -> Result<(), HubError> {
    let has = |name: &str| files.iter().any(|file| file == name);
    if !weights || has(SINGLE) || has(INDEX) {
        return Ok(());
    }
    let is_weights = |file: &&String| {
        [".bin", ".safetensors", ".gguf", ".pth", ".pt", ".h5", ".msgpack"]
            .iter()
            .any(|end| file.ends_with(end))
    };
    let found: Vec<&String> = files.iter().filter(is_weights).collect();
    Err(HubError::NoWeights {
        found: if found.is_empty() { "no weights at all".into() } else { first_of(&found) },
    })
}

/// True for a path that stays in the folder that it is joined to.
fn is_below(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Repeats what fails for a reason that may pass.
fn retried<T>(attempts: u32, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
    let mut failures = 0;
    loop {
        match attempt() {
            Err(error) if error.is_transient() && failures + 1 < attempts => {
                tracing::debug!("{error}");
                sleep(WAIT * 2u32.pow(failures));
                failures += 1;
            }
            other => return other,
        }
    }
}

struct Fetcher<'a> {
    settings: &'a Settings,
    repository: &'a Repository,
    remote: Remote<'a>,
    pinned: &'a Pinned,
    is_shown: bool,
}

impl Fetcher<'_> {
    /// Downloads the rows of `subset` of a data set with these `files`.
    fn fetch_rows(&self, files: &[String], subset: &Subset) -> Result<(), HubError> {
        let commit = &self.pinned.commit;
        let readme = files.iter().any(|file| file == README);
        self.fetch(if readme { &[README] } else { &[] })?;
        let files: Vec<String> = files.iter().filter(|file| is_below(file)).cloned().collect();
        self.repository.set_files(commit, &files)?;
        let readme = regular_file::read_to_string(&self.repository.snapshot(commit).join(README)).ok();
        let chosen = choose(&files, readme.as_deref(), subset)?;
        self.fetch(&chosen.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Downloads those of the files `names` that the snapshot lacks.
    fn fetch(&self, names: &[&str]) -> Result<(), HubError> {
        let commit = &self.pinned.commit;
        let snapshot = self.repository.snapshot(commit);
        fs::create_dir_all(&snapshot).map_err(io(&snapshot))?;
        let lacking = names.iter().filter(|name| !snapshot.join(name).is_file());
        let files = lacking.map(|name| retried(ATTEMPTS, || self.remote.describe(commit, name)));
        let files = files.collect::<Result<Vec<RemoteFile>, HubError>>()?;
        // Other revisions have some of the same files.
        let has = |file: &RemoteFile| self.repository.blob(&file.etag).is_file();
        let (here, rest): (Vec<RemoteFile>, Vec<RemoteFile>) = files.into_iter().partition(has);
        here.iter().try_for_each(|file| self.repository.link(commit, &file.name, &file.etag))?;
        if rest.is_empty() {
            return Ok(());
        }
        let part = |file: &RemoteFile| {
            fs::metadata(self.repository.incomplete(&file.etag)).map_or(0, |data| data.len().min(file.size))
        };
        let (before, total) =
            (rest.iter().map(part).sum::<u64>(), rest.iter().map(|file| file.size).sum::<u64>());
        self.check_space(total - before)?;
        let mut progress = Progress::new(self.pinned.id.to_string(), before, total, self.is_shown);
        let mut done = 0;
        for file in &rest {
            self.fetch_one(file, |here| progress.at(done + here))?;
            self.repository.link(commit, &file.name, &file.etag)?;
            done += file.size;
        }
        Ok(())
    }

    fn check_space(&self, needed: u64) -> Result<(), HubError> {
        let cache = &self.settings.cache;
        let Ok(disk) = rustix::fs::statvfs(cache) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if needed <= free {
            return Ok(());
        }
        Err(HubError::Space { cache: cache.clone(), needed: size(needed), free: size(free) })
    }

    /// Downloads a file into its blob, unless another process does. `seen` is told how many of its bytes are here.
    fn fetch_one(&self, file: &RemoteFile, mut seen: impl FnMut(u64)) -> Result<(), HubError> {
        let (blob, path) = (self.repository.blob(&file.etag), self.repository.incomplete(&file.etag));
        let lock = self.repository.lock(&file.etag);
        make_parent(&blob)?;
        make_parent(&lock)?;
        let held = File::create(&lock).map_err(io(&lock))?;
        let mut waits = false;
        while let Err(error) = held.try_lock() {
            match error {
                fs::TryLockError::WouldBlock if self.is_shown && !waits => {
                    tracing::info!("{}: waiting for another process that downloads it", file.name);
                }
                fs::TryLockError::WouldBlock => {}
                fs::TryLockError::Error(error) => return Err(HubError::Io { path: lock, error }),
            }
            waits = true;
            sleep(LOOK);
        }
        if blob.is_file() {
            return Ok(());
        }
        let mut part = Part::open(&path)?;
        let (mut failures, mut wrong) = (0, 0);
        loop {
            let before = part.length;
            match self.read_on(file, &mut part, &mut seen) {
                Ok(()) => {}
                Err(error) if error.is_transient() => {
                    failures = if part.length > before { 0 } else { failures + 1 };
                    if failures >= ATTEMPTS {
                        return Err(error);
                    }
                    tracing::debug!("{error}");
                    sleep(WAIT * 2u32.pow(failures));
                    continue;
                }
                Err(error) => return Err(error),
            }
            let Some((expected, got)) = part.fault(file) else { break };
            part.empty()?;
            wrong += 1;
            if wrong == WRONG {
                let _ = fs::remove_file(&path);
                return Err(HubError::Corrupt { address: file.address.clone(), expected, got });
            }
            tracing::warn!(
                "{}: expected a file with {expected}, got {got}; downloading it again",
                file.address
            );
        }
        fs::rename(&path, &blob).map_err(io(&blob))
    }

    /// Reads `file` from where `part` ends to its end.
    fn read_on(
        &self,
        file: &RemoteFile,
        part: &mut Part<'_>,
        seen: &mut impl FnMut(u64),
    ) -> Result<(), HubError> {
        // More than all is no part of it.
        if part.length > file.size {
            part.empty()?;
        }
        if part.length == file.size {
            return Ok(());
        }
        let (start, mut bytes) = self.remote.open(file, part.length)?;
        if start != part.length {
            part.empty()?;
        }
        let mut buffer = vec![0; BUFFER];
        let ended = loop {
            match bytes.read(&mut buffer) {
                Ok(0) => break None,
                Ok(count) => part.write(&buffer[..count])?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
            seen(part.length.min(file.size));
            // Longer than it was said to be: no more of it is wanted.
            if part.length > file.size {
                break None;
            }
        };
        if let Some(error) = &ended {
            tracing::debug!("{}: {error}", file.address);
        }
        if part.length < file.size {
            return Err(HubError::Cut { address: file.address.clone(), got: part.length, size: file.size });
        }
        Ok(())
    }
}

/// A file that is being downloaded, with the hash of what is there.
struct Part<'a> {
    path: &'a Path,
    file: File,
    length: u64,
    hash: Sha256,
}

impl<'a> Part<'a> {
    /// Opens `path`, with what an earlier download has left.
    fn open(path: &'a Path) -> Result<Self, HubError> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut part = Self { path, file: file.map_err(io(path))?, length: 0, hash: Sha256::new() };
        part.length = io::copy(&mut part.file, &mut part.hash).map_err(io(path))?;
        Ok(part)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(io(self.path))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn empty(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(io(self.path))?;
        (self.length, self.hash) = (0, Sha256::new());
        Ok(())
    }

    /// The size or sha256 that `file` has to have, and that it has, if they differ.
    fn fault(&self, file: &RemoteFile) -> Option<(String, String)> {
        if self.length != file.size {
            return Some((format!("{} bytes", file.size), format!("{} or more", self.length)));
        }
        let is_sha256 = file.etag.len() == 64 && file.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let found = format!("{:x}", self.hash.clone().finalize());
        (is_sha256 && found != file.etag.to_lowercase()).then(|| (format!("sha256 {}", file.etag), found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_out_of_the_folder_is_seen() {
        assert!(is_below("model-1.safetensors") && is_below("a/b.safetensors"));
        for name in ["../a", "/a", "a/../../b"] {
            assert!(!is_below(name), "{name}");
        }
    }

    #[test]
    fn weights_in_another_format_are_named() {
        let files = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert!(check_weights(&files(&["config.json", SINGLE]), true).is_ok());
        assert!(check_weights(&files(&["config.json"]), false).is_ok());
        let error =
            check_weights(&files(&["README.md", "pytorch_model.bin", "onnx/a.gguf"]), true).unwrap_err();
        assert!(error.to_string().contains("but pytorch_model.bin, onnx/a.gguf;"), "{error}");
    }
}
