//! Publishing of a step. Files are written into a hidden directory, fsynced, and listed with size and SHA-256 in
//! `manifest.json`, which is written last. Then the directory is renamed into place and `latest` follows. A step
//! without a valid manifest does not exist: a kill at any instant leaves earlier steps untouched.

use super::{CheckpointError, io, steps};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, Metadata},
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

/// The file whose presence is the commit of a step.
pub const MANIFEST: &str = "manifest.json";

/// A file's entry in `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    size: u64,
    sha256: String,
}

/// The files of a step, by their path in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Manifest(BTreeMap<String, Listed>);

impl Manifest {
    /// Reads the manifest of `step`. [`verify`] compares the files with it.
    pub fn read(step: &Path) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged { path: step.to_owned(), reason };
        let text = fs::read_to_string(step.join(MANIFEST)).map_err(|error| {
            damaged(match step.is_dir() {
                true => format!("{MANIFEST}: {error}"),
                false => "there is no such directory".into(),
            })
        })?;
        serde_json::from_str(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))
    }

    /// True if the step has `file`.
    pub fn lists(&self, file: &str) -> bool {
        self.0.contains_key(file)
    }
}

/// Hashes of files that several steps hold (a base that is linked into each), computed once a run.
#[derive(Debug, Default)]
pub struct KnownHashes(HashMap<FileIdentity, String>);

/// Device, inode, size and time of the last change of the contents (seconds, nanoseconds).
type FileIdentity = (u64, u64, u64, i64, i64);

fn identity(data: &Metadata) -> FileIdentity {
    (data.dev(), data.ino(), data.size(), data.mtime(), data.mtime_nsec())
}

impl KnownHashes {
    /// The manifest entry of `path`. Remembers the hashes of files with several links.
    fn listed(&mut self, path: &Path) -> Result<Listed, CheckpointError> {
        let data = fs::metadata(path).map_err(io(path))?;
        let size = data.size();
        if data.nlink() == 1 {
            return Ok(Listed { size, sha256: sha256(path).map_err(io(path))? });
        }
        let id = identity(&data);
        if let Some(sha256) = self.0.get(&id) {
            return Ok(Listed { size, sha256: sha256.clone() });
        }
        let sha256 = sha256(path).map_err(io(path))?;
        self.0.insert(id, sha256.clone());
        Ok(Listed { size, sha256 })
    }
}

/// A step that is being written.
pub struct StepWriter {
    run: PathBuf,
    step: usize,
    hidden: PathBuf,
    expected: Vec<String>,
}

impl StepWriter {
    /// Opens `{run}/.tmp-step_{step}-{pid}`, and removes hidden directories that earlier processes have abandoned. The
    /// caller is the only writer of `run`.
    pub fn begin(run: &Path, step: usize) -> Result<Self, CheckpointError> {
        let published = steps::directory(run, step);
        // A damaged step counts as absent. It goes when this one is published.
        if published.exists() && verify(&published).is_ok() {
            return Err(CheckpointError::Published { path: published });
        }
        if !run.is_dir() {
            fs::create_dir_all(run).map_err(io(run))?;
            // Each folder of `{output_dir}/weights/{run_id}` may be new.
            let above = run.ancestors().skip(1).take(2).filter(|folder| folder.is_dir());
            above.into_iter().try_for_each(sync)?;
        }
        steps::sweep(run);
        let hidden = run.join(format!("{}step_{step}-{}", steps::HIDDEN, std::process::id()));
        fs::create_dir(&hidden).map_err(io(&hidden))?;
        Ok(Self { run: run.to_owned(), step, hidden, expected: Vec::new() })
    }

    /// The hidden directory with the step's files.
    pub fn directory(&self) -> &Path {
        &self.hidden
    }

    /// Makes publishing fail unless `file` is there: another rank writes it.
    pub fn expect(&mut self, file: String) {
        self.expected.push(file);
    }

    /// Makes the whole step visible and returns its directory.
    pub fn publish(self, known: &mut KnownHashes) -> Result<PathBuf, CheckpointError> {
        let mut manifest = Manifest::default();
        list(&self.hidden, &self.hidden, &mut manifest, known)?;
        if let Some(absent) = self.expected.iter().find(|file| !manifest.lists(file)) {
            return Err(io(&self.hidden.join(absent))(std::io::ErrorKind::NotFound.into()));
        }
        let path = self.hidden.join(MANIFEST);
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
        fs::write(&path, text + "\n").map_err(io(&path))?;
        sync(&path)?;
        sync(&self.hidden)?;
        let published = steps::directory(&self.run, self.step);
        if published.exists() {
            steps::withdraw(&self.run, self.step)?;
        }
        fs::rename(&self.hidden, &published).map_err(io(&published))?;
        sync(&self.run)?;
        steps::set_latest(&self.run, self.step)?;
        Ok(published)
    }
}

/// Adds every file below `directory` to the manifest, synced.
fn list(
    root: &Path,
    directory: &Path,
    manifest: &mut Manifest,
    known: &mut KnownHashes,
) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(directory).map_err(io(directory))? {
        let path = entry.map_err(io(directory))?.path();
        if path.is_dir() {
            list(root, &path, manifest, known)?;
        } else {
            sync(&path)?;
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            manifest.0.insert(name, known.listed(&path)?);
        }
    }
    sync(directory)
}

/// Waits until a file or directory is on the disk.
pub(super) fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io(path))
}

/// SHA-256 of a file, in hexadecimal.
fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("{:x}", hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Checks that `step` is whole: its manifest is there and every file that it lists has its size and hash.
///
/// # Errors
/// [`CheckpointError::Damaged`] with the first thing that is wrong.
pub fn verify(step: &Path) -> Result<(), CheckpointError> {
    let damaged = |reason: String| CheckpointError::Damaged { path: step.to_owned(), reason };
    for (name, expected) in &Manifest::read(step)?.0 {
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(damaged(format!("{MANIFEST} lists {name}, which is not in the step")));
        }
        let path = step.join(name);
        let data = fs::metadata(&path).map_err(|error| damaged(format!("{name}: {error}")))?;
        // The size comes first: it is cheap to compare, and a device file has no end.
        if !data.is_file() || data.size() != expected.size {
            let (found, size) = (data.size(), expected.size);
            return Err(damaged(format!("{name} has {found} bytes, {size} were published")));
        }
        if sha256(&path).map_err(|error| damaged(format!("{name}: {error}")))? != expected.sha256 {
            return Err(damaged(format!("{name} is not the file that was published (SHA-256 differs)")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(run: &Path, step: usize) -> StepWriter {
        let writer = StepWriter::begin(run, step).unwrap();
        fs::create_dir(writer.directory().join("training_state")).unwrap();
        fs::write(writer.directory().join("adapter"), [7; 3000]).unwrap();
        fs::write(writer.directory().join("training_state/state.json"), "{}").unwrap();
        writer
    }

    fn publish(run: &Path, step: usize) -> PathBuf {
        write(run, step).publish(&mut KnownHashes::default()).unwrap()
    }

    #[test]
    fn a_published_step_is_whole_and_latest_names_it() {
        let run = tempfile::tempdir().unwrap();
        assert!(steps::published(run.path()).is_empty());
        let first = publish(run.path(), 5);
        verify(&first).unwrap();
        let manifest = Manifest::read(&first).unwrap();
        assert!(manifest.lists("training_state/state.json") && !manifest.lists("model"));
        publish(run.path(), 10);
        assert_eq!(fs::read_to_string(run.path().join("latest")).unwrap(), "step_10\n");
        assert_eq!(steps::published(run.path()), [5, 10]);
        assert!(matches!(StepWriter::begin(run.path(), 5), Err(CheckpointError::Published { .. })));
    }

    #[test]
    fn damage_is_noticed() {
        let run = tempfile::tempdir().unwrap();
        let step = publish(run.path(), 1);
        let file = step.join("adapter");
        let said = |words: &str| match verify(&step) {
            Err(error @ CheckpointError::Damaged { .. }) => {
                assert_eq!(error.exit_code(), 2);
                assert!(error.to_string().contains(words), "{words} in {error}");
            }
            other => panic!("{words}: {other:?}"),
        };
        fs::write(&file, [[7u8; 2999].as_slice(), &[8]].concat()).unwrap();
        said("SHA-256 differs");
        fs::write(&file, [7; 2999]).unwrap();
        said("2999 bytes, 3000 were published");
        fs::remove_file(&file).unwrap();
        said("adapter: No such file");
        for name in ["../outside", "/dev/zero", "."] {
            fs::write(step.join(MANIFEST), format!("{{\"{name}\": {{\"size\": 1, \"sha256\": \"\"}}}}"))
                .unwrap();
            said("not in the step");
        }
        fs::write(step.join(MANIFEST), "{\"a\": 1").unwrap();
        said("manifest.json: ");
        fs::remove_file(step.join(MANIFEST)).unwrap();
        said("manifest.json: No such file");
        fs::remove_dir_all(&step).unwrap();
        said("no such directory");
    }

    #[test]
    fn what_was_not_published_is_swept_away() {
        let run = tempfile::tempdir().unwrap();
        drop(write(run.path(), 1));
        assert!(steps::published(run.path()).is_empty());
        publish(run.path(), 1);
        let hidden = fs::read_dir(run.path()).unwrap().flatten();
        assert_eq!(hidden.filter(|e| e.file_name().to_string_lossy().starts_with(".tmp")).count(), 0);
    }

    #[test]
    fn a_step_without_the_files_of_all_ranks_is_not_published() {
        let run = tempfile::tempdir().unwrap();
        let mut writer = write(run.path(), 1);
        writer.expect("training_state/state.json".into());
        writer.expect("training_state/other.json".into());
        let error = writer.publish(&mut KnownHashes::default()).unwrap_err();
        assert!(error.to_string().contains("other.json"), "{error}");
        assert!(steps::published(run.path()).is_empty());
    }

    #[test]
    fn a_damaged_step_is_replaced_when_its_turn_comes() {
        let run = tempfile::tempdir().unwrap();
        let step = publish(run.path(), 3);
        fs::write(step.join("adapter"), "broken").unwrap();
        let writer = write(run.path(), 3);
        assert!(step.join("adapter").exists(), "until then it stays");
        assert_eq!(writer.publish(&mut KnownHashes::default()).unwrap(), step);
        verify(&step).unwrap();
        assert_eq!(steps::published(run.path()), [3]);
    }

    #[test]
    fn a_linked_file_is_hashed_once_and_again_when_it_has_changed() {
        let run = tempfile::tempdir().unwrap();
        let base = run.path().join("base");
        fs::write(&base, "weights").unwrap();
        let mut known = KnownHashes::default();
        for step in 1..3 {
            let writer = write(run.path(), step);
            fs::hard_link(&base, writer.directory().join("base")).unwrap();
            verify(&writer.publish(&mut known).unwrap()).unwrap();
        }
        assert_eq!(known.0.len(), 1);
        fs::write(&base, "other weights").unwrap();
        let writer = write(run.path(), 3);
        fs::hard_link(&base, writer.directory().join("base")).unwrap();
        verify(&writer.publish(&mut known).unwrap()).unwrap();
        assert!(verify(&steps::directory(run.path(), 1)).is_err(), "the link's contents are gone");
    }

    proptest! {
        #[test]
        fn broken_manifests_are_errors(cut in 0usize..200, flips in prop::collection::vec((0usize..200, any::<u8>()), 1..6)) {
            let run = tempfile::tempdir().unwrap();
            let step = publish(run.path(), 1);
            let mut text = fs::read(step.join(MANIFEST)).unwrap();
            for (at, byte) in flips {
                let at = at % text.len();
                text[at] = byte;
            }
            text.truncate(text.len() - cut.min(text.len()));
            fs::write(step.join(MANIFEST), text).unwrap();
            // Whole, or one typed error; never a panic.
            if let Err(error) = verify(&step) {
                let damaged = matches!(error, CheckpointError::Damaged { .. });
                prop_assert!(damaged, "{}", error);
            }
        }
    }
}
