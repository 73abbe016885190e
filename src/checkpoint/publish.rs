//! Publishing a step: files are written into a hidden directory, fsynced, listed with size and SHA-256 in
//! `manifest.json`, which is written last; then the directory is renamed into place and `latest` follows. A step
//! without a valid manifest does not exist, so a kill at any instant leaves the steps before it untouched.

use super::{CheckpointError, io};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

const MANIFEST: &str = "manifest.json";
const LATEST: &str = "latest";

/// What `manifest.json` says of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    size: u64,
    sha256: String,
}

/// A step that is being written.
pub struct StepWriter {
    run: PathBuf,
    step: usize,
    hidden: PathBuf,
}

impl StepWriter {
    /// Opens `{run}/.tmp-step_{step}-{pid}`; what an earlier process abandoned there is removed.
    pub fn begin(run: &Path, step: usize) -> Result<Self, CheckpointError> {
        let published = run.join(format!("step_{step}"));
        if published.exists() {
            return Err(CheckpointError::Published { path: published });
        }
        fs::create_dir_all(run).map_err(io(run))?;
        for entry in fs::read_dir(run).map_err(io(run))? {
            let path = entry.map_err(io(run))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".tmp-")) {
                fs::remove_dir_all(&path).map_err(io(&path))?;
            }
        }
        let hidden = run.join(format!(".tmp-step_{step}-{}", std::process::id()));
        fs::create_dir(&hidden).map_err(io(&hidden))?;
        Ok(Self { run: run.to_owned(), step, hidden })
    }

    /// Where the step's files go until it is published.
    pub fn directory(&self) -> &Path {
        &self.hidden
    }

    /// Makes the step visible, whole, and returns its directory.
    pub fn publish(self) -> Result<PathBuf, CheckpointError> {
        let mut manifest = BTreeMap::new();
        list(&self.hidden, &self.hidden, &mut manifest)?;
        let path = self.hidden.join(MANIFEST);
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
        fs::write(&path, text + "\n").map_err(io(&path))?;
        sync(&path)?;
        sync(&self.hidden)?;
        let published = self.run.join(format!("step_{}", self.step));
        fs::rename(&self.hidden, &published).map_err(io(&published))?;
        sync(&self.run)?;
        let (latest, hidden) = (self.run.join(LATEST), self.run.join(format!(".{LATEST}.tmp")));
        fs::write(&hidden, format!("step_{}\n", self.step)).map_err(io(&hidden))?;
        sync(&hidden)?;
        fs::rename(&hidden, &latest).map_err(io(&latest))?;
        sync(&self.run)?;
        Ok(published)
    }
}

/// Adds every file below `directory` to the manifest, synced.
fn list(
    root: &Path,
    directory: &Path,
    manifest: &mut BTreeMap<String, Listed>,
) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(directory).map_err(io(directory))? {
        let path = entry.map_err(io(directory))?.path();
        if path.is_dir() {
            list(root, &path, manifest)?;
        } else {
            sync(&path)?;
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            manifest.insert(name, listed(&path)?);
        }
    }
    sync(directory)
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io(path))
}

fn listed(path: &Path) -> Result<Listed, CheckpointError> {
    let mut file = File::open(path).map_err(io(path))?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(io(path))?;
        if n == 0 {
            let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok(Listed { size, sha256 });
        }
        hash.update(&buffer[..n]);
        size += n as u64;
    }
}

/// Checks that `step` is whole: its manifest is there and every file that it lists has its size and hash.
pub fn verify(step: &Path) -> Result<(), CheckpointError> {
    let path = step.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(io(&path))?;
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let manifest: BTreeMap<String, Listed> =
        serde_json::from_str(&text).map_err(|error| format(error.to_string()))?;
    for (name, expected) in manifest {
        let found = listed(&step.join(&name))?;
        if found != expected {
            return Err(format(format!("{name} is not the file that was published")));
        }
    }
    Ok(())
}

/// Whether `run` holds published steps.
pub fn has_steps(run: &Path) -> bool {
    let step = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with("step_");
    fs::read_dir(run).is_ok_and(|entries| entries.flatten().any(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(run: &Path, step: usize) -> PathBuf {
        let writer = StepWriter::begin(run, step).unwrap();
        fs::create_dir(writer.directory().join("training_state")).unwrap();
        fs::write(writer.directory().join("adapter"), [7; 3000]).unwrap();
        fs::write(writer.directory().join("training_state/state.json"), "{}").unwrap();
        writer.publish().unwrap()
    }

    #[test]
    fn a_published_step_is_whole_and_latest_names_it() {
        let run = tempfile::tempdir().unwrap();
        assert!(!has_steps(run.path()));
        let first = publish(run.path(), 5);
        verify(&first).unwrap();
        publish(run.path(), 10);
        assert_eq!(fs::read_to_string(run.path().join("latest")).unwrap(), "step_10\n");
        assert!(has_steps(run.path()));
        assert!(matches!(StepWriter::begin(run.path(), 5), Err(CheckpointError::Published { .. })));
    }

    #[test]
    fn damage_is_noticed() {
        let run = tempfile::tempdir().unwrap();
        let step = publish(run.path(), 1);
        let file = step.join("adapter");
        fs::write(&file, [[7u8; 2999].as_slice(), &[8]].concat()).unwrap();
        assert!(matches!(verify(&step), Err(CheckpointError::Format { .. })), "a flipped byte");
        fs::write(&file, [7; 2999]).unwrap();
        assert!(matches!(verify(&step), Err(CheckpointError::Format { .. })), "a cut file");
        fs::remove_file(&file).unwrap();
        assert!(matches!(verify(&step), Err(CheckpointError::Io { .. })), "a lost file");
        fs::write(step.join(MANIFEST), "{\"a\": 1").unwrap();
        assert!(matches!(verify(&step), Err(CheckpointError::Format { .. })), "a torn manifest");
        fs::remove_file(step.join(MANIFEST)).unwrap();
        assert!(matches!(verify(&step), Err(CheckpointError::Io { .. })), "no manifest");
    }

    #[test]
    fn what_was_not_published_is_swept_away() {
        let run = tempfile::tempdir().unwrap();
        let writer = StepWriter::begin(run.path(), 1).unwrap();
        fs::write(writer.directory().join("half"), "x").unwrap();
        drop(writer);
        assert!(!has_steps(run.path()));
        publish(run.path(), 1);
        let hidden = fs::read_dir(run.path()).unwrap().flatten();
        assert_eq!(hidden.filter(|e| e.file_name().to_string_lossy().starts_with(".tmp")).count(), 0);
    }
}
