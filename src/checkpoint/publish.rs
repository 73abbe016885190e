//! Publishing of a folder: a step of a run, or a save of a server. Files are written into a hidden directory, fsynced,
//! and listed with size and SHA-256 in `manifest.json`, which is written last. Then the directory is renamed into
//! place; of a step, `latest` follows. A folder without a valid manifest does not exist: a kill at any instant leaves
//! earlier ones untouched.
//!
//! A published folder is replaced by two renames, the old one away and the new one in. After a kill between them
//! [`present`] finds the old one, and the next writer beside it puts it back.

use super::{CheckpointError, io, steps};
use crate::{
    comm::{CommError, Communicator},
    regular_file,
};
use fail::fail_point;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fmt,
    fs::{self, File, Metadata},
    io::{Read, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Component, Path, PathBuf},
};

/// The file whose presence is the commit of a folder.
pub const MANIFEST: &str = "manifest.json";
/// Prefix of directories that are not published yet, or no longer.
const HIDDEN: &str = ".tmp-";
/// Prefix of a published directory that the next one is about to replace.
const REPLACED: &str = ".tmp-replaced-";
/// Prefix of a directory that is being removed.
const WITHDRAWN: &str = ".tmp-withdrawn-";

/// A file's entry in `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    size: u64,
    sha256: String,
}

/// The files of a folder, by their path in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Manifest(BTreeMap<String, Listed>);

impl<'de> Deserialize<'de> for Manifest {
    /// Refuses a name that is there twice: a flipped bit may turn the name of one shard into that of another, and with
    /// the last entry alone the first file would be missed by nobody.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Files;
        impl<'de> Visitor<'de> for Files {
            type Value = Manifest;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Manifest, A::Error> {
                let mut files = BTreeMap::new();
                while let Some((name, listed)) = entries.next_entry::<String, Listed>()? {
                    if files.contains_key(&name) {
                        return Err(A::Error::custom(format!("{name} is there twice")));
                    }
                    files.insert(name, listed);
                }
                Ok(Manifest(files))
            }
        }
        deserializer.deserialize_map(Files)
    }
}

impl Manifest {
    /// Reads the manifest of `step`. [`verify`] compares the files with it.
    pub fn read(step: &Path) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged { path: step.to_owned(), reason };
        let text = regular_file::read_to_string(&step.join(MANIFEST)).map_err(|error| {
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

    /// The files, by their path in the step.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Bytes of `file`; 0 if the step does not have it.
    pub fn size(&self, file: &str) -> u64 {
        self.0.get(file).map_or(0, |listed| listed.size)
    }

    /// Bytes of the files.
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|listed| listed.size).fold(0, u64::saturating_add)
    }

    /// True if `name`, an entry of the folder, is a file of it or leads to one.
    pub fn has_entry(&self, name: &str) -> bool {
        self.0.keys().any(|file| file.split('/').next() == Some(name))
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

/// A folder that is being written.
pub struct FolderWriter {
    folder: PathBuf,
    /// The run and the number of a step.
    step: Option<(PathBuf, usize)>,
    hidden: PathBuf,
    expected: Vec<String>,
    /// Publishing replaces a folder of this name.
    replaces: bool,
}

impl FolderWriter {
    /// Opens a hidden directory for step `step` of `run`; see [`begin`](Self::begin).
    ///
    /// # Errors
    /// The step is published and whole.
    pub fn of_step(run: &Path, step: usize) -> Result<Self, CheckpointError> {
        let published = steps::directory(run, step);
        // A damaged step counts as absent. It goes when this one is published.
        if published.exists() && verify(&published).is_ok() {
            return Err(CheckpointError::Published { path: published });
        }
        let mut writer = Self::begin(&published)?;
        writer.step = Some((run.to_owned(), step));
        Ok(writer)
    }

    /// Opens `.tmp-{name}-{pid}` beside `folder`, and tidies up after earlier processes: hidden directories that they
    /// have abandoned go, and a folder that they were replacing comes back. A published `folder` stays until this one
    /// is published. The caller is the only writer of the directory that `folder` is in.
    pub fn begin(folder: &Path) -> Result<Self, CheckpointError> {
        let (parent, name) = split(folder)?;
        create_folder(parent)?;
        recover(parent)?;
        let hidden = parent.join(format!("{HIDDEN}{name}-{}", std::process::id()));
        fs::create_dir(&hidden).map_err(io(&hidden))?;
        fail_point!("publish.begun");
        Ok(Self { folder: folder.to_owned(), step: None, hidden, expected: Vec::new(), replaces: true })
    }

    /// Opens a hidden directory for a new `folder` anywhere, beside which others may write, too: nothing there is
    /// tidied up or replaced.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`]: `folder` is there already, or what a killed process has left of it.
    pub fn new_folder(folder: &Path) -> Result<Self, CheckpointError> {
        if folder.symlink_metadata().is_ok() {
            return Err(CheckpointError::Exists { path: folder.to_owned() });
        }
        let (parent, name) = split(folder)?;
        create_folder(parent)?;
        let hidden = parent.join(format!("{HIDDEN}{name}-{}", std::process::id()));
        match fs::create_dir(&hidden) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(CheckpointError::Exists { path: hidden });
            }
            made => made.map_err(io(&hidden))?,
        }
        fail_point!("publish.begun");
        Ok(Self { folder: folder.to_owned(), step: None, hidden, expected: Vec::new(), replaces: false })
    }

    /// The hidden directory with the folder's files.
    pub fn directory(&self) -> &Path {
        &self.hidden
    }

    /// Makes publishing fail unless `file` is there: another rank writes it.
    pub fn expect(&mut self, file: String) {
        self.expected.push(file);
    }

    /// Makes the whole folder visible, in place of a published one of the same name, and returns it.
    pub fn publish(self, known: &mut KnownHashes) -> Result<PathBuf, CheckpointError> {
        let mut manifest = Manifest::default();
        list(&self.hidden, &self.hidden, &mut manifest, known)?;
        fail_point!("publish.listed");
        if let Some(absent) = self.expected.iter().find(|file| !manifest.lists(file)) {
            return Err(io(&self.hidden.join(absent))(std::io::ErrorKind::NotFound.into()));
        }
        let path = self.hidden.join(MANIFEST);
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
        fs::write(&path, text + "\n").map_err(io(&path))?;
        fail_point!("publish.manifest_written");
        sync(&path)?;
        fail_point!("publish.manifest_synced");
        sync(&self.hidden)?;
        fail_point!("publish.hidden_synced");
        let (parent, name) = split(&self.folder)?;
        let replaced = parent.join(format!("{REPLACED}{name}"));
        let replaces = self.folder.exists();
        if replaces && !self.replaces {
            return Err(CheckpointError::Exists { path: self.folder.clone() });
        }
        if replaces {
            fs::rename(&self.folder, &replaced).map_err(io(&self.folder))?;
            fail_point!("publish.replaced_away");
        }
        if let Err(error) = fs::rename(&self.hidden, &self.folder) {
            if replaces {
                let _ = fs::rename(&replaced, &self.folder);
            }
            return Err(io(&self.folder)(error));
        }
        fail_point!("publish.renamed");
        sync(parent)?;
        fail_point!("publish.parent_synced");
        if replaces {
            remove(&replaced)?;
            fail_point!("publish.replaced_removed");
        }
        if let Some((run, step)) = &self.step {
            steps::set_latest(run, *step)?;
        }
        Ok(self.folder.clone())
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        // Files of a save that has failed; of one that was published none are left here.
        let _ = fs::remove_dir_all(&self.hidden);
    }
}

/// Publishes a folder to which all ranks write, and returns what `publish` does, on rank 0. Rank 0 has `opened` it,
/// every rank writes its part into the hidden directory that it is handed, rank 0 publishes. After each of these
/// `agree` makes one outcome of those of all ranks: what follows is entered by all or by none. Collective over `world`.
///
/// # Errors
/// Those of `agree`.
pub fn publish_together<T, E: From<CommError>>(
    world: &dyn Communicator,
    agree: impl Fn(Result<(), E>) -> Result<(), E>,
    opened: Result<Option<FolderWriter>, E>,
    write_own: impl FnOnce(&Path) -> Result<(), E>,
    publish: impl FnOnce(FolderWriter) -> Result<T, E>,
) -> Result<Option<T>, E> {
    let mut writer = None;
    agree(opened.map(|opened| writer = opened))?;
    let own = writer.as_ref().map(|writer| writer.directory().as_os_str().as_bytes());
    let all = world.all_gather_host(own.unwrap_or_default())?;
    let hidden = OsStr::from_bytes(all.first().map(Vec::as_slice).unwrap_or_default());
    agree(write_own(Path::new(hidden)))?;
    let mut published = None;
    let outcome = writer.map_or(Ok(()), |writer| publish(writer).map(|made| published = Some(made)));
    agree(outcome)?;
    Ok(published)
}

/// The directory that has `folder`: itself, or after a kill while it was replaced, the old one beside it.
pub fn present(folder: &Path) -> PathBuf {
    if !folder.exists()
        && let Ok((parent, name)) = split(folder)
    {
        let replaced = parent.join(format!("{REPLACED}{name}"));
        if replaced.exists() {
            return replaced;
        }
    }
    folder.to_owned()
}

/// The name under which the entry `name` of a directory is published: its own, or that which it is being replaced
/// under. `None` for other hidden entries.
pub fn published_name(name: &str) -> Option<&str> {
    name.strip_prefix(REPLACED).or_else(|| (!name.starts_with(HIDDEN)).then_some(name))
}

/// Removes a published folder. It disappears at once: a kill leaves at most a hidden directory.
pub fn withdraw(folder: &Path) -> Result<(), CheckpointError> {
    let (parent, name) = split(folder)?;
    let hidden = parent.join(format!("{WITHDRAWN}{name}"));
    // One that `folder` has replaced would be in its place afterwards.
    for left in [&hidden, &parent.join(format!("{REPLACED}{name}"))] {
        if left.exists() {
            remove(left)?;
        }
    }
    fail_point!("withdraw.begun");
    fs::rename(folder, &hidden).map_err(io(folder))?;
    fail_point!("withdraw.renamed");
    sync(parent)?;
    fail_point!("withdraw.synced");
    remove(&hidden)?;
    fail_point!("withdraw.removed");
    Ok(())
}

/// Tidies `parent` up after killed processes: folders that they were replacing come back, and what was not published
/// goes. An abandoned directory that cannot be removed does no harm: a warning names it. The caller is the only writer
/// of `parent`.
pub fn recover(parent: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let back = name.strip_prefix(REPLACED).map(|name| parent.join(name)).filter(|back| !back.exists());
        if let Some(back) = back {
            fs::rename(&path, &back).map_err(io(&back))?;
            fail_point!("recover.renamed");
            sync(parent)?;
        } else if name.starts_with(HIDDEN) {
            fail_point!("recover.begun");
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            fail_point!("recover.removed");
            if let Err(error) = removed {
                tracing::warn!("{}: an abandoned directory that cannot be removed: {error}", path.display());
            }
        }
    }
    Ok(())
}

/// The directory that `folder` is in, and its name.
fn split(folder: &Path) -> Result<(&Path, &str), CheckpointError> {
    let name = folder.file_name().and_then(OsStr::to_str);
    // The parent of a lone name is empty, which is the current directory.
    let parent =
        folder.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    parent.zip(name).ok_or_else(|| CheckpointError::Format {
        path: folder.to_owned(),
        reason: "expected the path of a folder that ends in a name of UTF-8".into(),
    })
}

/// Creates `folder` with those above it, on the disk when this returns.
pub fn create_folder(folder: &Path) -> Result<(), CheckpointError> {
    // The last part of a relative path is in the current directory.
    let here = |path: &Path| if path.as_os_str().is_empty() { PathBuf::from(".") } else { path.to_owned() };
    let absent: Vec<&Path> = folder.ancestors().take_while(|above| !here(above).is_dir()).collect();
    fs::create_dir_all(folder).map_err(io(folder))?;
    fail_point!("folder.created");
    absent.iter().filter_map(|new| new.parent()).try_for_each(|above| sync(&here(above)))
}

/// Removes a hidden directory, perhaps at the same time as another process.
fn remove(hidden: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(hidden) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(hidden)(error)),
        _ => Ok(()),
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
            fail_point!("publish.file_synced");
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            manifest.0.insert(name, known.listed(&path)?);
        }
    }
    sync(directory)
}

/// Replaces the file `path`, whose folder is there. A kill or a power cut leaves the old one or the new one, and the
/// new one is on the disk when this returns. One caller at a time.
///
/// # Errors
/// The file cannot be written; the old one is left.
pub fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let hidden = folder.join(format!(".new-{}", path.file_name().unwrap_or_default().to_string_lossy()));
    let mut file = File::create(&hidden)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&hidden, path)?;
    File::open(folder)?.sync_all()
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
    let manifest = Manifest::read(step)?;
    if manifest.0.is_empty() {
        return Err(damaged(format!("{MANIFEST} lists no file")));
    }
    for (name, expected) in &manifest.0 {
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(damaged(format!("{MANIFEST} lists {name}, which is not in the step")));
        }
        let path = step.join(name);
        let listed = |error| damaged(format!("{name}: {error} ({MANIFEST} lists it)"));
        let data = fs::metadata(&path).map_err(listed)?;
        // The size comes first: it is cheap to compare, and a device file has no end.
        if !data.is_file() || data.size() != expected.size {
            let (found, size) = (data.size(), expected.size);
            return Err(damaged(format!("{name} has {found} bytes, {size} were published by {MANIFEST}")));
        }
        if sha256(&path).map_err(|error| damaged(format!("{name}: {error}")))? != expected.sha256 {
            let words = "is not the file that was published";
            return Err(damaged(format!("{name} {words} (SHA-256 differs from {MANIFEST})")));
        }
    }
    fail_point!("load.verified");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(run: &Path, step: usize) -> FolderWriter {
        let writer = FolderWriter::of_step(run, step).unwrap();
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
        assert!(matches!(FolderWriter::of_step(run.path(), 5), Err(CheckpointError::Published { .. })));
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
        // As a kill leaves it.
        std::mem::forget(write(run.path(), 1));
        assert!(steps::published(run.path()).is_empty());
        publish(run.path(), 1);
        let hidden = fs::read_dir(run.path()).unwrap().flatten();
        assert_eq!(hidden.filter(|e| e.file_name().to_string_lossy().starts_with(".tmp")).count(), 0);
    }

    #[test]
    fn a_new_folder_leaves_all_else_alone() {
        let parent = tempfile::tempdir().unwrap();
        let (out, others) = (parent.path().join("out"), parent.path().join(".tmp-other-1"));
        fs::create_dir(&others).unwrap();
        let is_refused = |begun| matches!(begun, Err(CheckpointError::Exists { .. }));
        let writer = FolderWriter::new_folder(&out).unwrap();
        assert!(is_refused(FolderWriter::new_folder(&out).map(drop)), "it is being written");
        fs::write(writer.directory().join("file"), "1").unwrap();
        fs::create_dir(&out).unwrap();
        assert!(is_refused(writer.publish(&mut KnownHashes::default()).map(drop)), "it has come meanwhile");
        fs::remove_dir(&out).unwrap();
        let writer = FolderWriter::new_folder(&out).unwrap();
        fs::write(writer.directory().join("file"), "2").unwrap();
        verify(&writer.publish(&mut KnownHashes::default()).unwrap()).unwrap();
        assert!(is_refused(FolderWriter::new_folder(&out).map(drop)), "it is there");
        assert!(others.is_dir());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
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

    #[test]
    fn any_flipped_bit_of_a_manifest_is_noticed() {
        let run = tempfile::tempdir().unwrap();
        let writer = FolderWriter::of_step(run.path(), 1).unwrap();
        // A bit apart: the name of one may become that of the other.
        for name in ["0-of-2", "1-of-2", "A", "a"] {
            fs::write(writer.directory().join(name), name).unwrap();
        }
        let step = writer.publish(&mut KnownHashes::default()).unwrap();
        let path = step.join(MANIFEST);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                fs::write(&path, &flipped).unwrap();
                let text = String::from_utf8_lossy(&flipped).into_owned();
                let error = verify(&step).expect_err(&format!("byte {at}, bit {bit}: {text}"));
                assert!(error.to_string().contains(MANIFEST), "{error}");
            }
        }
        fs::write(&path, "{}").unwrap();
        assert!(verify(&step).unwrap_err().to_string().contains("lists no file"));
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
