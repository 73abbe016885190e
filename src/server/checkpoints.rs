//! Saved adapters in a tenant's folder, and whole models with one merged into them: finds, lists, describes and deletes
//! them. The folders are the only record; a save to a folder of the client's choice leaves a note with its path under
//! the name by which it is listed.

use super::{
    paths::{self, Checkpoint, Kind, PathError, Place, inside},
    request::ModelId,
};
use crate::{
    checkpoint::{
        CheckpointError,
        publish::{self, MANIFEST, create_folder},
        saves,
    },
    lora::LoraShape,
    regular_file,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// The folder, in a model's, of notes about saves elsewhere: a file by the name of the checkpoint holds the path.
const NOTES: &str = ".elsewhere";

/// The field of a save's metadata with the name of its adapter.
pub const OWNER: &str = "model_id";

/// The reason why a saved adapter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("{0}: no such checkpoint; list_checkpoints names those that there are")]
    Absent(String),
    #[error("{name} is listed already, for the save in {other}: give another name, or delete that one")]
    Taken { name: String, other: String },
    #[error("path {path:?} is the save {owner}: give another path; only {model} may replace or delete it")]
    Foreign { path: String, owner: String, model: ModelId },
    #[error("path {path:?}: {other} is a save, and no other goes into its folder: give a path outside it")]
    Within { path: String, other: String },
    #[error(
        "path {path:?}: the folder has other things in it, and a save has its folder for itself: give another path"
    )]
    Around { path: String },
    #[error(
        "{0} is a whole model, with an adapter merged into it, and no adapter: serve it as a model_path of its own, and \
         name a save of save_weights or save_weights_for_sampler here"
    )]
    Whole(String),
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("{0}")]
    Unreadable(String),
    #[error("{0}")]
    Failed(String),
}

/// A saved adapter that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub checkpoint: Checkpoint,
    /// Its folder, absolute.
    pub folder: PathBuf,
    pub time: SystemTime,
    pub bytes: u64,
}

impl Stored {
    /// The same, if it is an adapter.
    ///
    /// # Errors
    /// It is a whole model.
    pub fn adapter(self) -> Result<Self, StoreError> {
        self.checkpoint.adapter()?;
        Ok(self)
    }
}

impl Checkpoint {
    /// The same, if it is an adapter.
    fn adapter(&self) -> Result<&Self, StoreError> {
        match self.kind {
            Kind::Full => Err(StoreError::Whole(self.uri("xorl"))),
            Kind::Weights | Kind::Sampler | Kind::External => Ok(self),
        }
    }
}

/// Time and bytes of the save in `folder`, if it is published.
fn published(folder: &Path) -> Option<(SystemTime, u64)> {
    saves::published(folder).ok().map(|(time, manifest)| (time, manifest.bytes()))
}

fn note(checkpoint: &Checkpoint) -> PathBuf {
    [checkpoint.kind.folder(), &checkpoint.model.folder(), NOTES, &checkpoint.name].iter().collect()
}

/// The folder that a note names, relative to the tenant's, unless another adapter has saved to it.
fn elsewhere(root: &Path, checkpoint: &Checkpoint) -> Option<PathBuf> {
    let text = regular_file::read_to_string(&inside(root, &note(checkpoint)).ok()?).ok()?;
    let is_fine = !text.is_empty() && text.split('/').all(paths::is_name);
    let folder: PathBuf = is_fine.then(|| text.into())?;
    // A save that was refused leaves a note, too: the folder may be another adapter's.
    let is_own = owner(&inside(root, &folder).ok()?).is_none_or(|owner| owner == checkpoint.model);
    is_own.then_some(folder)
}

/// The adapter whose save `folder` is; `None`: it does not say, or is no save.
fn owner(folder: &Path) -> Option<ModelId> {
    let metadata = saves::metadata(folder).ok()?;
    ModelId::new(metadata[OWNER].as_str()?).ok()
}

/// Checks that `model` may save to `target`, which is `relative` below `root`.
fn check_free(root: &Path, target: &Path, relative: &Path, model: &ModelId) -> Result<(), StoreError> {
    let path = relative.display().to_string();
    if published(target).is_some() {
        let name = || relative.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return match owner(target).filter(|owner| owner != model) {
            None => Ok(()),
            Some(model) => {
                let own = Checkpoint { model: model.clone(), kind: Kind::Weights, name: name() };
                Err(StoreError::Foreign { path, owner: own.uri("xorl"), model })
            }
        };
    }
    for above in relative.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
        if published(&inside(root, above)?).is_some() {
            return Err(StoreError::Within { path, other: above.display().to_string() });
        }
    }
    let has_things = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some());
    if has_things && !target.join(MANIFEST).exists() { Err(StoreError::Around { path }) } else { Ok(()) }
}

/// The folder of `checkpoint`, with time and bytes, if it exists.
fn stored(root: &Path, checkpoint: Checkpoint) -> Result<Option<Stored>, StoreError> {
    let own = inside(root, &checkpoint.folder())?;
    let noted = || inside(root, &elsewhere(root, &checkpoint)?).ok();
    let found = published(&own).map(|found| (own, found)).or_else(|| {
        let folder = noted()?;
        Some((folder.clone(), published(&folder)?))
    });
    Ok(found.map(|(folder, (time, bytes))| Stored { checkpoint, folder, time, bytes }))
}

/// The folder that a client's `path` names for `model`, to load from. One that does not exist yet may be the place of
/// a save that waits in the queue: it is the first that the path may mean.
pub fn to_load(root: &Path, path: &str, model: &ModelId) -> Result<PathBuf, StoreError> {
    let places = paths::to_load(path, model)?;
    for place in &places {
        let found = match place {
            Place::Checkpoint(checkpoint) => {
                stored(root, checkpoint.adapter()?.clone())?.map(|stored| stored.folder)
            }
            Place::Folder(folder) => Some(inside(root, folder)?).filter(|folder| published(folder).is_some()),
        };
        if let Some(folder) = found {
            return Ok(folder);
        }
    }
    let first = match places.first() {
        Some(Place::Checkpoint(checkpoint)) => elsewhere(root, checkpoint).unwrap_or(checkpoint.folder()),
        Some(Place::Folder(folder)) => folder.clone(),
        None => return Err(StoreError::Absent(path.into())),
    };
    Ok(inside(root, &first)?)
}

/// The folder for a save of `model` to `path`, and the name under which it is listed.
///
/// # Errors
/// The path is refused, is another adapter's, or in or around another save, or the name is listed for another folder.
pub fn to_save(
    root: &Path,
    path: &str,
    model: &ModelId,
    kind: Kind,
) -> Result<(PathBuf, Checkpoint), StoreError> {
    let place = paths::to_save(path, model, kind)?;
    let (checkpoint, relative) = match place {
        Place::Checkpoint(checkpoint) => (checkpoint.clone(), checkpoint.folder()),
        Place::Folder(folder) => {
            let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            (Checkpoint { model: model.clone(), kind, name }, folder)
        }
    };
    let target = inside(root, &relative)?;
    if let Some(other) = stored(root, checkpoint.clone())?.filter(|other| other.folder != target) {
        let other = other.folder.strip_prefix(root).unwrap_or(&other.folder).display().to_string();
        return Err(StoreError::Taken { name: checkpoint.uri("xorl"), other });
    }
    if relative != checkpoint.folder() {
        check_free(root, &target, &relative, model)?;
        replace(root, &note(&checkpoint), relative.to_string_lossy().as_bytes())?;
    }
    Ok((target, checkpoint))
}

/// [`publish::replace`] for the file `path` below `root`, whose folder is made.
pub(super) fn replace(root: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let whole = inside(root, path)?;
    let folder = whole.parent().unwrap_or(root);
    create_folder(folder).map_err(|error| StoreError::Failed(error.to_string()))?;
    // Two requests may write one file.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    publish::replace(&whole, bytes).map_err(|error| StoreError::Io { path: path.to_owned(), error })
}

/// The saved adapters of `model`, newest last.
pub fn list(root: &Path, model: &ModelId) -> Vec<Stored> {
    let mut found = Vec::new();
    for kind in Kind::ALL {
        let folder: PathBuf = [kind.folder(), &model.folder()].iter().collect();
        let Ok(folder) = inside(root, &folder) else { continue };
        let entries = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries(folder.clone())
            .chain(entries(folder.join(NOTES)))
            .filter_map(|entry| entry.file_name().into_string().ok().filter(|name| paths::is_name(name)))
            .collect();
        names.sort();
        names.dedup();
        let checkpoints = names.into_iter().map(|name| Checkpoint { model: model.clone(), kind, name });
        found.extend(checkpoints.filter_map(|checkpoint| stored(root, checkpoint).ok().flatten()));
    }
    found.sort_by_key(|stored| stored.time);
    found
}

/// The checkpoint that a client's `path` names.
pub fn find(root: &Path, path: &str, model: &ModelId) -> Result<Stored, StoreError> {
    for place in paths::to_load(path, model)? {
        if let Place::Checkpoint(checkpoint) = place
            && let Some(found) = stored(root, checkpoint)?
        {
            return Ok(found);
        }
    }
    Err(StoreError::Absent(path.into()))
}

/// Deletes a saved adapter. It disappears at once.
pub fn delete(root: &Path, found: &Stored) -> Result<(), StoreError> {
    saves::delete(&found.folder).map_err(|error| refused(found, &error))?;
    if let Ok(path) = inside(root, &note(&found.checkpoint)) {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Rank and scale of a saved adapter.
pub fn describe(found: &Stored) -> Result<LoraShape, StoreError> {
    saves::describe(&found.folder).map(|save| save.shape).map_err(|error| refused(found, &error))
}

/// The error of a save, which clients know by its name and not by its folder.
pub fn refused(found: &Stored, error: &CheckpointError) -> StoreError {
    let text = error.to_string().replace(&*found.folder.to_string_lossy(), &found.checkpoint.uri("xorl"));
    match error.exit_code() {
        2 => StoreError::Unreadable(text),
        _ => StoreError::Failed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn model() -> ModelId {
        ModelId::new("policy_v1").unwrap()
    }

    fn publish(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("adapter"), "12345").unwrap();
        fs::write(folder.join(MANIFEST), r#"{"adapter": {"size": 5, "sha256": ""}}"#).unwrap();
    }

    fn ids(root: &Path) -> Vec<String> {
        let mut ids: Vec<String> = list(root, &model()).iter().map(|stored| stored.checkpoint.id()).collect();
        ids.sort();
        ids
    }

    #[test]
    fn a_list_has_what_is_published_wherever_it_was_saved() {
        let root = tempfile::tempdir().unwrap();
        let save = |path: &str, kind| {
            let (folder, checkpoint) = to_save(root.path(), path, &model(), kind).unwrap();
            publish(&folder);
            checkpoint.uri("xorl")
        };
        assert!(ids(root.path()).is_empty());
        assert_eq!(save("one", Kind::Weights), "xorl://policy_v1/weights/one");
        assert_eq!(save("one", Kind::Sampler), "xorl://policy_v1/sampler_weights/one");
        assert_eq!(save("outputs/adapters/two", Kind::Weights), "xorl://policy_v1/weights/two");
        assert!(root.path().join("outputs/adapters/two/adapter").exists());
        fs::create_dir_all(root.path().join("weights/policy_v1/unfinished")).unwrap();
        fs::create_dir_all(root.path().join("weights/policy_v1/.tmp-step_1-5")).unwrap();
        assert_eq!(ids(root.path()), ["sampler_weights/one", "weights/one", "weights/two"]);
        assert!(list(root.path(), &model()).iter().all(|stored| stored.bytes == 5));
        for path in ["two", "weights/two", "xorl://policy_v1/weights/two", "outputs/adapters/two"] {
            let folder = to_load(root.path(), path, &model()).unwrap();
            assert_eq!(folder, root.path().canonicalize().unwrap().join("outputs/adapters/two"), "{path}");
        }
    }

    /// A kill in the middle of it would take a save that is there out of the list.
    #[test]
    fn a_note_is_never_written_in_place() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("weights/policy_v1").join(NOTES).join("x");
        let save = || publish(&to_save(root.path(), "a/x", &model(), Kind::Weights).unwrap().0);
        save();
        let first = fs::File::open(&path).unwrap();
        save();
        assert_ne!(first.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
        assert_eq!(ids(root.path()), ["weights/x"]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn two_saves_do_not_share_a_name() {
        let root = tempfile::tempdir().unwrap();
        let save = |path: &str| {
            to_save(root.path(), path, &model(), Kind::Weights).map(|(folder, _)| publish(&folder))
        };
        save("a/x").unwrap();
        save("a/x").unwrap();
        for other in ["x", "b/x"] {
            let error = save(other).unwrap_err().to_string();
            assert!(
                error.contains("xorl://policy_v1/weights/x is listed already, for the save in a/x"),
                "{error}"
            );
        }
        delete(root.path(), &find(root.path(), "x", &model()).unwrap()).unwrap();
        save("x").unwrap();
        assert!(save("a/x").is_err());
    }

    #[test]
    fn a_save_of_another_adapter_is_neither_replaced_nor_listed() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let bob = ModelId::new("bob").unwrap();
        let place = |path: &str, model: &ModelId| to_save(root, path, model, Kind::Weights);
        // Both ask before either is saved, so bob leaves a note.
        place("runs/final", &bob).unwrap();
        let own = place("runs/final", &model()).unwrap().0;
        publish(&own);
        let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}"#;
        fs::write(own.join("adapter_config.json"), config).unwrap();
        fs::write(own.join(saves::METADATA), r#"{"model_id": "policy_v1"}"#).unwrap();
        let manifest = r#"{"metadata.json": {"size": 25, "sha256": ""}}"#;
        fs::write(own.join(MANIFEST), manifest).unwrap();
        let error = place("runs/final", &bob).unwrap_err().to_string();
        assert!(error.contains("xorl://policy_v1/weights/final: give another path"), "{error}");
        assert!(list(root, &bob).is_empty() && find(root, "final", &bob).is_err());
        assert!(!to_load(root, "final", &bob).unwrap().exists());
        assert_eq!(ids(root), ["weights/final"]);
        assert_eq!(place("runs/final", &model()).unwrap().0, own);
        place("other/final", &bob).unwrap();
    }

    #[test]
    fn no_save_goes_into_the_folder_of_another_or_around_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let save = |path: &str| to_save(root, path, &model(), Kind::Weights);
        publish(&save("adapters/policy_v1").unwrap().0);
        for inner in ["sub", "training_state", "adapter", "a/b"] {
            let error = save(&format!("adapters/policy_v1/{inner}")).unwrap_err().to_string();
            assert!(error.contains("adapters/policy_v1 is a save"), "{error}");
        }
        publish(&save("more/adapters/x").unwrap().0);
        let error = save("more/adapters").unwrap_err().to_string();
        assert!(error.contains("the folder has other things in it"), "{error}");
        assert_eq!(ids(root), ["weights/policy_v1", "weights/x"]);
    }

    #[test]
    fn a_deleted_checkpoint_is_gone_and_others_stay() {
        let root = tempfile::tempdir().unwrap();
        for path in ["one", "outputs/two", "three"] {
            publish(&to_save(root.path(), path, &model(), Kind::Weights).unwrap().0);
        }
        for path in ["weights/one", "xorl://policy_v1/weights/two"] {
            delete(root.path(), &find(root.path(), path, &model()).unwrap()).unwrap();
        }
        assert_eq!(ids(root.path()), ["weights/three"]);
        assert!(matches!(find(root.path(), "one", &model()), Err(StoreError::Absent(_))));
        assert!(!root.path().join("outputs/two").exists());
        assert!(find(root.path(), "../three", &model()).is_err());
    }

    #[test]
    fn a_note_that_someone_changed_leads_nowhere_else() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        publish(outside.path());
        publish(&to_save(root.path(), "a/x", &model(), Kind::Weights).unwrap().0);
        let note = root.path().join("weights/policy_v1").join(NOTES).join("x");
        for text in [outside.path().to_str().unwrap(), "../..", "", "a/../../b"] {
            fs::write(&note, text).unwrap();
            assert!(find(root.path(), "x", &model()).is_err(), "{text}");
        }
    }
}
