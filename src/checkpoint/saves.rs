//! Saves of a server: folders of adapters by name (`{output_dir}/weights/{model_id}/{name}`). Anyone may list and
//! describe them; the one writer of an output directory makes and deletes them.

use super::{
    CheckpointError, FolderWriter,
    adapter_config::read_config,
    io,
    publish::{
        KnownHashes, MANIFEST, Manifest, create_folder, present, published_name, recover, sync, verify,
        withdraw,
    },
    state,
};
use crate::{lora::LoraShape, regular_file};
use fail::fail_point;
use serde_json::Value;
use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The file with what the user wrote beside a save, as JSON.
pub const METADATA: &str = "metadata.json";

/// A save by what its files say.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Rank and scale of most of its adapters.
    pub shape: LoraShape,
    /// The base's path or name.
    pub base: Option<String>,
    /// With training state: a load can go on from its optimizer.
    pub has_optimizer: bool,
    /// Bytes of its files.
    pub bytes: u64,
    /// The time at which it was published.
    pub time: SystemTime,
    /// Null where none was given.
    pub metadata: Value,
}

/// The name of the folder of a save or an adapter called `name`: ':' is written `%3A`.
pub fn folder_name(name: &str) -> String {
    name.replace(':', "%3A")
}

/// The name of a save or an adapter, from that of its folder.
pub fn name_of(folder_name: &str) -> String {
    folder_name.replace("%3A", ":")
}

/// Opens a save for writing. An earlier one of the same name stays until this one is published.
///
/// # Errors
/// `folder` is a whole save and `overwrite` is false, or it is something that no save may replace.
pub fn begin(folder: &Path, overwrite: bool) -> Result<FolderWriter, CheckpointError> {
    let earlier = present(folder);
    if earlier.exists() {
        nothing_else(&earlier)?;
        // A damaged save counts as absent.
        if !overwrite && verify(&earlier).is_ok() {
            return Err(CheckpointError::Taken { path: folder.to_owned() });
        }
    }
    FolderWriter::begin(folder)
}

/// The directory of the save `folder`, whole: size and hash of every file are those that were published.
pub fn whole(folder: &Path) -> Result<PathBuf, CheckpointError> {
    let directory = present(folder);
    verify(&directory)?;
    Ok(directory)
}

/// Deletes a save. It disappears at once.
///
/// # Errors
/// `folder` is no save, or has other things in it.
pub fn delete(folder: &Path) -> Result<(), CheckpointError> {
    let directory = present(folder);
    nothing_else(&directory)?;
    withdraw(&directory)
}

/// Gives the save `folder` the name `new`, which no other has. A kill leaves it under one of the two.
pub fn rename(folder: &Path, new: &Path) -> Result<(), CheckpointError> {
    let directory = present(folder);
    let parents = [&directory, new].map(|path| path.parent().unwrap_or(Path::new("")).to_owned());
    create_folder(&parents[1])?;
    fs::rename(&directory, new).map_err(io(new))?;
    fail_point!("rename.renamed");
    parents.iter().try_for_each(|parent| sync(parent))?;
    fail_point!("rename.synced");
    Ok(())
}

/// Checks that the directory `folder` is a save, and has nothing in it that the save has not listed: with it, other
/// saves and foreign files would go.
fn nothing_else(folder: &Path) -> Result<(), CheckpointError> {
    let no_save = |reason: String| CheckpointError::NoSave { path: folder.to_owned(), reason };
    let manifest = match folder.join(MANIFEST).is_file() {
        true => Manifest::read(folder)?,
        false if folder.is_dir() => return Err(no_save(format!("a folder without {MANIFEST}"))),
        false if folder.exists() => return Err(no_save("a file".into())),
        false => return Err(no_save("there is no such folder".into())),
    };
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let name = entry.map_err(io(folder))?.file_name().to_string_lossy().into_owned();
        if name != MANIFEST && !manifest.has_entry(&name) {
            return Err(no_save(format!("{name} is in it, which no save has written")));
        }
    }
    Ok(())
}

/// The time at which a save was published, and its files.
///
/// # Errors
/// `folder` is no save, or its files cannot be read.
pub fn published(folder: &Path) -> Result<(SystemTime, Manifest), CheckpointError> {
    let folder = present(folder);
    let path = folder.join(MANIFEST);
    let time = fs::metadata(&path).and_then(|data| data.modified()).map_err(io(&path))?;
    Ok((time, Manifest::read(&folder)?))
}

/// Describes a save, without reading its tensors.
///
/// # Errors
/// `folder` is no save, or its files cannot be read.
pub fn describe(folder: &Path) -> Result<Description, CheckpointError> {
    let (time, manifest) = published(folder)?;
    let config = read_config(&present(folder))?;
    Ok(Description {
        shape: config.shape(),
        has_optimizer: state::is_in(&manifest),
        base: config.base_model_name_or_path,
        bytes: manifest.bytes(),
        time,
        metadata: metadata(folder)?,
    })
}

/// The metadata of a save, which may be a whole model; null where none was given.
///
/// # Errors
/// `folder` is no save, or the file cannot be read.
pub fn metadata(folder: &Path) -> Result<Value, CheckpointError> {
    let (_, manifest) = published(folder)?;
    if !manifest.lists(METADATA) {
        return Ok(Value::Null);
    }
    let path = present(folder).join(METADATA);
    let format =
        |error: serde_json::Error| CheckpointError::Format { path: path.clone(), reason: error.to_string() };
    serde_json::from_str(&regular_file::read_to_string(&path).map_err(io(&path))?).map_err(format)
}

/// Makes a save `to` with the files of the save `from`, which are linked and not copied, and other metadata.
///
/// # Errors
/// `from` is not whole, `to` is taken, or they are on two file systems.
pub fn link(from: &Path, to: &Path, metadata: &Value) -> Result<(), CheckpointError> {
    let from = whole(from)?;
    let writer = begin(to, false)?;
    for file in Manifest::read(&from)?.files().filter(|file| *file != METADATA) {
        let target = writer.directory().join(file);
        let folder = target.parent().unwrap_or(writer.directory());
        fs::create_dir_all(folder)
            .and_then(|()| fs::hard_link(from.join(file), &target))
            .map_err(io(&target))?;
        fail_point!("link.linked");
    }
    write_metadata(&writer, metadata)?;
    writer.publish(&mut KnownHashes::default()).map(drop)
}

/// Writes the user's `metadata` into a save that is being written; nothing for null.
pub fn write_metadata(writer: &FolderWriter, metadata: &Value) -> Result<(), CheckpointError> {
    if metadata.is_null() {
        return Ok(());
    }
    let path = writer.directory().join(METADATA);
    fs::write(&path, metadata.to_string() + "\n").map_err(io(&path))?;
    fail_point!("metadata.written");
    Ok(())
}

/// The saves in `root`: names, sorted, and folders. Folders without a manifest are none.
pub fn list(root: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(name) = published_name(&name) else { continue };
        if entry.path().join(MANIFEST).is_file() {
            found.push((name_of(name), root.join(name)));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Tidies up after killed processes everywhere below `root`, but not within saves; see [`recover`]. The caller is the
/// only writer of `root`.
pub fn recover_below(root: &Path) -> Result<(), CheckpointError> {
    recover(root)?;
    for entry in fs::read_dir(root).map_err(io(root))? {
        let entry = entry.map_err(io(root))?;
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && !entry.path().join(MANIFEST).is_file() {
            recover_below(&entry.path())?;
        }
    }
    Ok(())
}

/// Bytes of all files below `folder`, hidden ones too. Symbolic links are not followed; a file of several names counts
/// once.
pub fn bytes_below(folder: &Path) -> u64 {
    fn below(folder: &Path, linked: &mut HashSet<(u64, u64)>) -> u64 {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let bytes = |entry: fs::DirEntry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => below(&entry.path(), linked),
            Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |data| {
                let is_first = data.nlink() == 1 || linked.insert((data.dev(), data.ino()));
                if is_first { data.len() } else { 0 }
            }),
            _ => 0,
        };
        entries.map(bytes).sum()
    }
    below(folder, &mut HashSet::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The files of a save, hidden; `text` tells it from others.
    fn written(folder: &Path, text: &str, overwrite: bool) -> FolderWriter {
        let writer = begin(folder, overwrite).unwrap();
        fs::create_dir(writer.directory().join("training_state")).unwrap();
        fs::write(writer.directory().join("training_state/trainer_state.json"), "{}").unwrap();
        fs::write(writer.directory().join("text"), text).unwrap();
        let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
            "base_model_name_or_path": "base"});
        fs::write(writer.directory().join("adapter_config.json"), config.to_string()).unwrap();
        writer
    }

    fn publish(folder: &Path, text: &str) -> PathBuf {
        written(folder, text, true).publish(&mut KnownHashes::default()).unwrap()
    }

    fn text(folder: &Path) -> String {
        fs::read_to_string(whole(folder).unwrap().join("text")).unwrap()
    }

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The directory as a kill leaves it after each part of an overwrite: the old save is whole, or the new one.
    #[test]
    fn an_overwrite_torn_at_any_point_leaves_one_whole_save() {
        for instant in 0..5 {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join("name");
            publish(&folder, "old");
            let old = root.path().join("old");
            // The whole new save, made elsewhere.
            let elsewhere = tempfile::tempdir().unwrap();
            let new = publish(&elsewhere.path().join("name"), "new");
            let (hidden, replaced) =
                (root.path().join(".tmp-name-1"), root.path().join(".tmp-replaced-name"));
            fs::rename(&new, &hidden).unwrap();
            if instant == 0 {
                fs::remove_file(hidden.join(MANIFEST)).unwrap();
            }
            if instant >= 2 {
                fs::rename(&folder, &replaced).unwrap();
            }
            if instant >= 3 {
                fs::rename(&hidden, &folder).unwrap();
            }
            if instant >= 4 {
                fs::remove_file(replaced.join("text")).unwrap();
            }
            let expected = if instant < 3 { "old" } else { "new" };
            assert_eq!(text(&folder), expected, "instant {instant}");
            assert_eq!(list(root.path()), [("name".to_owned(), folder.clone())], "instant {instant}");
            assert_eq!(describe(&folder).unwrap().shape, LoraShape::new(4, 8.0));
            let refused = begin(&folder, false).err().unwrap();
            assert!(matches!(refused, CheckpointError::Taken { .. }), "{refused}");
            // The next writer tidies up.
            publish(&old, "other");
            assert_eq!(text(&folder), expected, "instant {instant}, recovered");
            assert_eq!(entries(root.path()), ["name", "old"]);
            publish(&folder, "third");
            assert_eq!(text(&folder), "third");
            assert_eq!(entries(root.path()), ["name", "old"]);
        }
    }

    #[test]
    fn a_deleted_save_does_not_give_way_to_the_one_that_it_replaced() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("name");
        publish(&folder, "old");
        fs::rename(&folder, root.path().join(".tmp-replaced-name")).unwrap();
        fs::create_dir(&folder).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::rename(publish(&elsewhere.path().join("name"), "new"), &folder).unwrap();
        delete(&folder).unwrap();
        assert!(whole(&folder).is_err() && entries(root.path()).is_empty());
        // The old one alone, as a kill between the renames leaves it.
        fs::rename(publish(&folder, "old"), root.path().join(".tmp-replaced-name")).unwrap();
        delete(&folder).unwrap();
        assert!(whole(&folder).is_err() && entries(root.path()).is_empty());
    }

    #[test]
    fn a_save_that_fails_leaves_the_earlier_one_and_no_files() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("name");
        publish(&folder, "old");
        let mut writer = written(&folder, "new", true);
        writer.expect("training_state/optimizer-1-of-2.safetensors".into());
        let error = writer.publish(&mut KnownHashes::default()).unwrap_err().to_string();
        assert!(error.contains("optimizer-1-of-2"), "{error}");
        assert_eq!((text(&folder).as_str(), entries(root.path())), ("old", vec!["name".to_owned()]));
    }

    #[test]
    fn a_taken_name_is_refused_and_a_damaged_save_is_not_one() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b/name");
        publish(&folder, "old");
        let error = begin(&folder, false).err().unwrap();
        assert!(matches!(error, CheckpointError::Taken { .. }) && error.exit_code() == 2, "{error}");
        fs::write(folder.join("text"), "bent").unwrap();
        assert!(whole(&folder).is_err());
        written(&folder, "new", false).publish(&mut KnownHashes::default()).unwrap();
        assert_eq!(text(&folder), "new");
    }

    #[test]
    fn a_save_is_listed_described_and_deleted() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(folder_name("s-1:train:0"));
        let writer = written(&folder, "text", false);
        write_metadata(&writer, &json!({"note": ["x", 1]})).unwrap();
        let before = SystemTime::now() - std::time::Duration::from_secs(5);
        writer.publish(&mut KnownHashes::default()).unwrap();
        publish(&root.path().join("b"), "b");
        fs::create_dir(root.path().join("no save")).unwrap();
        assert_eq!(
            list(root.path()),
            [("b".to_owned(), root.path().join("b")), ("s-1:train:0".to_owned(), folder.clone())]
        );
        let found = describe(&folder).unwrap();
        assert_eq!((found.shape, found.base.as_deref()), (LoraShape::new(4, 8.0), Some("base")));
        assert!(found.has_optimizer && found.time >= before);
        assert_eq!(found.metadata, json!({"note": ["x", 1]}));
        let manifest = fs::metadata(folder.join(MANIFEST)).unwrap().len();
        assert_eq!(bytes_below(&folder), found.bytes + manifest);
        assert!(describe(&root.path().join("b")).unwrap().metadata.is_null());
        delete(&folder).unwrap();
        assert_eq!(entries(root.path()), ["b", "no save"]);
        let error = delete(&folder).unwrap_err();
        assert!(error.to_string().contains("no such folder") && error.exit_code() == 2, "{error}");
    }

    #[test]
    fn a_linked_save_outlives_the_first_and_has_metadata_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (root.path().join("first"), root.path().join("other/second"));
        let writer = written(&first, "text", false);
        write_metadata(&writer, &json!({"of": "first"})).unwrap();
        writer.publish(&mut KnownHashes::default()).unwrap();
        link(&first, &second, &json!({"of": "second"})).unwrap();
        assert!(matches!(link(&first, &second, &Value::Null), Err(CheckpointError::Taken { .. })));
        delete(&first).unwrap();
        assert_eq!(text(&second), "text");
        assert_eq!(describe(&second).unwrap().metadata, json!({"of": "second"}));
        assert!(link(&first, &root.path().join("third"), &Value::Null).is_err());
    }

    #[test]
    fn a_deletion_that_was_killed_is_finished_later() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("name");
        publish(&folder, "old");
        fs::rename(&folder, root.path().join(".tmp-withdrawn-name")).unwrap();
        assert!(list(root.path()).is_empty() && whole(&folder).is_err());
        let above = root.path().join("a/b");
        fs::create_dir_all(above.join(".tmp-name-1")).unwrap();
        recover_below(root.path()).unwrap();
        assert_eq!((entries(root.path()), entries(&above)), (vec!["a".to_owned()], vec![]));
    }

    #[test]
    fn folders_that_are_more_than_a_save_are_neither_replaced_nor_deleted() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("name");
        publish(&folder.join("inner"), "inner");
        let no_save = |error: CheckpointError, words: &str| {
            assert!(matches!(error, CheckpointError::NoSave { .. }), "{error}");
            assert!(error.to_string().contains(words) && error.exit_code() == 2, "{error}");
        };
        no_save(begin(&folder, true).err().unwrap(), "without manifest.json");
        no_save(delete(&folder).unwrap_err(), "without manifest.json");
        no_save(begin(&folder.join("inner/text"), true).err().unwrap(), "a file");
        let outer = root.path().join("outer");
        publish(&outer, "outer");
        publish(&outer.join("inner"), "inner");
        no_save(begin(&outer, true).err().unwrap(), "inner is in it");
        no_save(delete(&outer).unwrap_err(), "inner is in it");
        assert_eq!((text(&outer).as_str(), text(&outer.join("inner")).as_str()), ("outer", "inner"));
    }
}
