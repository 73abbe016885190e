//! The layout of `huggingface_hub`'s cache: `refs/REVISION` holds a commit, `snapshots/COMMIT` links to the files,
//! which are `blobs/ETAG`.

use super::{
    HubError, HubId, Kind, io,
    rows::{Subset, choose},
};
use crate::regular_file;
use hf_hub::{Cache, Repo, RepoType};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

pub(super) const CONFIG: &str = "config.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const README: &str = "README.md";
/// Folder of a repository with a list of each commit's files (`COMMIT.json`). A snapshot has those alone that were
/// wanted, so it does not tell whether a split is whole. `huggingface_hub` looks at no such folder.
const LISTS: &str = ".xorl-dist";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// A repository in the cache, at a revision.
pub(super) struct Repository {
    folder: PathBuf,
    /// Files that `huggingface_hub` locks, too, while it downloads one of the same name.
    locks: PathBuf,
    layout: hf_hub::CacheRepo,
    revision: String,
}

impl Repository {
    pub fn new(cache: &Path, id: &HubId) -> Self {
        let kind = match id.kind {
            Kind::Model => RepoType::Model,
            Kind::DataSet => RepoType::Dataset,
        };
        let repo = Repo::with_revision(id.name.clone(), kind, id.revision().to_owned());
        let name = repo.folder_name();
        Self {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(name),
            layout: Cache::new(cache.to_owned()).repo(repo),
            revision: id.revision().to_owned(),
        }
    }

    /// The commit that the cache has for the revision.
    pub fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let text = regular_file::read_to_string(&self.folder.join("refs").join(&self.revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Has the revision lead to `commit`.
    pub fn set_commit(&self, commit: &str) -> Result<(), HubError> {
        if self.revision == commit || self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        self.layout.create_ref(commit).map_err(io(&self.folder.join("refs").join(&self.revision)))
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// Notes the names of all `files` of `commit`.
    pub fn set_files(&self, commit: &str, files: &[String]) -> Result<(), HubError> {
        let path = self.list(commit);
        make_parent(&path)?;
        // Several processes may write it, all of them the same.
        let own = path.with_extension(format!("{}.tmp", std::process::id()));
        let text = serde_json::to_string(files).unwrap_or_default();
        fs::write(&own, text).and_then(|()| fs::rename(&own, &path)).map_err(io(&path))
    }

    fn list(&self, commit: &str) -> PathBuf {
        self.folder.join(LISTS).join(format!("{commit}.json"))
    }

    /// The files of `subset` of a data set at `commit`, also those that the cache lacks. Where their names were not
    /// noted, they are those of the snapshot.
    pub fn rows(&self, commit: &str, subset: &Subset) -> Result<Vec<PathBuf>, HubError> {
        let folder = self.snapshot(commit);
        let noted = regular_file::read_to_string(&self.list(commit)).ok();
        let noted: Option<Vec<String>> = noted.and_then(|text| serde_json::from_str(&text).ok());
        let files = noted.unwrap_or_else(|| files_in(&folder));
        let readme = regular_file::read_to_string(&folder.join(README)).ok();
        let chosen = choose(&files, readme.as_deref(), subset)?;
        Ok(chosen.into_iter().map(|file| folder.join(file)).collect())
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// A download of a blob that is not at its end.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// Has `file` of `commit` lead to its blob.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        make_parent(&pointer)?;
        // One that leads nowhere is in the way.
        let _ = fs::remove_file(&pointer);
        let blob = format!("{}blobs/{etag}", "../".repeat(2 + file.matches('/').count()));
        let linked = symlink(blob, &pointer);
        // Some file systems have no links.
        linked.or_else(|_| fs::copy(self.blob(etag), &pointer).map(|_| ())).map_err(io(&pointer))
    }
}

/// Names of all files below `folder`.
fn files_in(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(folder.join(&below)).into_iter().flatten().flatten() {
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() { folders.push(name + "/") } else { files.push(name) }
        }
    }
    files
}

/// Makes the folder of a file.
pub(super) fn make_parent(file: &Path) -> Result<(), HubError> {
    match file.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(io(folder)),
        None => Ok(()),
    }
}

/// True for the hash of a commit, which needs no request to be known.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Names of a model's files that `folder` lacks: config and weights.
pub(super) fn missing(folder: &Path) -> Vec<String> {
    let lacks = |file: &&str| !folder.join(file).is_file();
    let mut missing: Vec<String> =
        [CONFIG].iter().copied().filter(|file| lacks(file)).map(str::to_owned).collect();
    if !lacks(&SINGLE) {
        return missing;
    }
    match regular_file::read_to_string(&folder.join(INDEX)) {
        Ok(index) => missing.extend(shards(&index).into_iter().filter(|file| lacks(&file.as_str()))),
        Err(_) => missing.push(SINGLE.into()),
    }
    missing
}

/// The files that an index names; none of one that cannot be read.
pub(super) fn shards(index: &str) -> Vec<String> {
    let index: serde_json::Value = serde_json::from_str(index).unwrap_or_default();
    let map = index["weight_map"].as_object().into_iter().flatten();
    let mut files: Vec<String> = map.filter_map(|(_, file)| Some(file.as_str()?.to_owned())).collect();
    files.sort_unstable();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_tells_which_files_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(missing(folder.path()), [CONFIG, SINGLE]);
        fs::write(at(CONFIG), "{}").unwrap();
        fs::write(
            at(INDEX),
            r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#,
        )
        .unwrap();
        fs::write(at("2.safetensors"), "").unwrap();
        assert_eq!(missing(folder.path()), ["1.safetensors"]);
        fs::write(at(SINGLE), "").unwrap();
        assert!(missing(folder.path()).is_empty());
    }
}
