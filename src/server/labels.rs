//! Facts about a saved adapter beside its values: those that it was saved with, which are in the save, and those that
//! may change later, which are in a label beside it. A saved adapter whose time is over counts as absent.

use super::{
    checkpoints::{self, OWNER, StoreError, Stored},
    paths::{Checkpoint, inside},
    request::{AdapterSpec, ModelId},
    runs,
};
use crate::{checkpoint::saves, regular_file};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The folder, in a model's, of labels: a file by the name of the checkpoint.
const LABELS: &str = ".labels";

/// The metadata of a save.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Carried {
    user_metadata: Option<BTreeMap<String, String>>,
    spec: Option<AdapterSpec>,
    ttl_seconds: Option<u64>,
}

/// A label. It is of one save: another of the same name has none.
#[derive(Debug, Serialize, Deserialize)]
struct Label {
    /// Nanoseconds from 1970 to the publication of its save.
    saved: u64,
    public: bool,
    /// Seconds from 1970.
    expires: Option<u64>,
}

/// The facts about a saved adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// The shape of the adapter as its client asked for it.
    pub spec: Option<AdapterSpec>,
    pub is_public: bool,
    /// `None`: never.
    pub expires: Option<SystemTime>,
}

/// The metadata for a save; see [`crate::server::request::Save`].
pub fn metadata(
    model: &ModelId,
    spec: Option<&AdapterSpec>,
    user_metadata: Option<&BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
) -> Value {
    json!({OWNER: model, "user_metadata": user_metadata, "spec": spec, "ttl_seconds": ttl_seconds})
}

fn label(checkpoint: &Checkpoint) -> PathBuf {
    [checkpoint.kind.folder(), &checkpoint.model.folder(), LABELS, &checkpoint.name].iter().collect()
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    since.try_into().unwrap_or(u64::MAX)
}

/// The JSON in the file `path` below `root`; `None` where there is none that can be read.
pub(super) fn read<T: DeserializeOwned>(root: &Path, path: &Path) -> Option<T> {
    serde_json::from_slice(&regular_file::read(&inside(root, path).ok()?).ok()?).ok()
}

/// Replaces the file `path` below `root` by `value` as JSON; see [`checkpoints::replace`].
pub(super) fn write(root: &Path, path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let text = serde_json::to_vec(value);
    let text = text.map_err(|error| StoreError::Io { path: path.to_owned(), error: error.into() })?;
    checkpoints::replace(root, path, &text)
}

/// The facts about a saved adapter. Of one whose metadata cannot be read, only its label is known.
pub fn about(root: &Path, stored: &Stored) -> About {
    let carried = saves::metadata(&stored.folder).ok();
    let carried: Carried = carried.and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default();
    let Carried { user_metadata, spec, ttl_seconds } = carried;
    let label: Option<Label> = read(root, &label(&stored.checkpoint));
    let label = label.filter(|label| label.saved == nanoseconds(stored.time));
    let after = |start: SystemTime, seconds| start.checked_add(Duration::from_secs(seconds));
    let expires = match &label {
        Some(label) => label.expires.and_then(|seconds| after(UNIX_EPOCH, seconds)),
        None => ttl_seconds.and_then(|seconds| after(stored.time, seconds)),
    };
    About { user_metadata, spec, is_public: label.is_some_and(|label| label.public), expires }
}

/// Changes publicity and expiry of a saved adapter.
///
/// # Errors
/// The label cannot be written.
pub fn change(root: &Path, stored: &Stored, change: impl FnOnce(&mut About)) -> Result<(), StoreError> {
    let mut about = about(root, stored);
    change(&mut about);
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let new = Label {
        saved: nanoseconds(stored.time),
        public: about.is_public,
        expires: about.expires.map(seconds),
    };
    write(root, &label(&stored.checkpoint), &new)
}

/// Deletes a saved adapter with its label.
///
/// # Errors
/// It cannot be deleted.
pub fn delete(root: &Path, stored: &Stored) -> Result<(), StoreError> {
    checkpoints::delete(root, stored)?;
    if let Ok(path) = inside(root, &label(&stored.checkpoint)) {
        // One that stays is of no other save.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

impl About {
    fn is_over(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// The saved adapters of `model` whose time is not over, newest last.
pub fn list(root: &Path, model: &ModelId) -> Vec<(Stored, About)> {
    let now = SystemTime::now();
    let all = checkpoints::list(root, model).into_iter().map(|stored| {
        let about = about(root, &stored);
        (stored, about)
    });
    all.filter(|(_, about)| !about.is_over(now)).collect()
}

/// The saved adapter that a client's `path` names.
///
/// # Errors
/// There is none, or its time is over.
pub fn find(root: &Path, path: &str, model: &ModelId) -> Result<(Stored, About), StoreError> {
    let stored = checkpoints::find(root, path, model)?;
    let about = about(root, &stored);
    if about.is_over(SystemTime::now()) {
        return Err(StoreError::Absent(path.into()));
    }
    Ok((stored, about))
}

/// Deletes the saved adapters below `root` whose time is over at `now`. One that cannot be deleted is logged.
pub fn sweep(root: &Path, now: SystemTime) {
    let all = runs::saved(root).into_iter().flat_map(|model| checkpoints::list(root, &model));
    for stored in all.filter(|stored| about(root, stored).is_over(now)) {
        if let Err(error) = delete(root, &stored) {
            tracing::warn!("a saved adapter whose time is over: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::publish::MANIFEST, server::paths::Kind};

    fn model() -> ModelId {
        ModelId::new("sess-1:train:0").unwrap()
    }

    fn spec() -> AdapterSpec {
        AdapterSpec { rank: 4, alpha: 8.0, targets: None, train_attn: true, train_mlp: false, seed: 1 }
    }

    /// Saves as the engine does.
    fn save(root: &Path, name: &str, ttl_seconds: Option<u64>) {
        let (folder, _) = checkpoints::to_save(root, name, &model(), Kind::Weights).unwrap();
        fs::create_dir_all(&folder).unwrap();
        let user = BTreeMap::from([("renderer".to_owned(), "x".to_owned())]);
        let config =
            json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).to_string();
        let metadata = metadata(&model(), Some(&spec()), Some(&user), ttl_seconds).to_string();
        let mut manifest = json!({});
        for (file, text) in [("adapter_config.json", config), (saves::METADATA, metadata)] {
            manifest[file] = json!({"size": text.len(), "sha256": ""});
            fs::write(folder.join(file), text).unwrap();
        }
        fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
    }

    #[test]
    fn a_save_brings_its_facts_and_a_label_changes_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        save(root, "one", Some(3600));
        let (stored, about) = find(root, "one", &model()).unwrap();
        assert_eq!((about.spec.as_ref(), about.is_public), (Some(&spec()), false));
        assert_eq!(about.user_metadata.as_ref().unwrap()["renderer"], "x");
        assert_eq!(about.expires, Some(stored.time + Duration::from_secs(3600)));
        change(root, &stored, |about| (about.is_public, about.expires) = (true, None)).unwrap();
        let changed = find(root, "one", &model()).unwrap().1;
        assert_eq!((changed.is_public, changed.expires, &changed.spec), (true, None, &about.spec));
        // Another save of the name has no label.
        std::thread::sleep(Duration::from_millis(20));
        save(root, "one", None);
        assert!(!find(root, "one", &model()).unwrap().1.is_public);
    }

    #[test]
    fn a_saved_adapter_whose_time_is_over_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        save(root, "short", Some(1));
        save(root, "long", Some(3600));
        save(root, "for_ever", None);
        let now = SystemTime::now();
        let (stored, _) = find(root, "short", &model()).unwrap();
        change(root, &stored, |about| about.expires = Some(now - Duration::from_secs(5))).unwrap();
        assert!(matches!(find(root, "short", &model()), Err(StoreError::Absent(_))));
        assert_eq!(list(root, &model()).len(), 2);
        assert!(stored.folder.exists());
        sweep(root, now);
        assert!(!stored.folder.exists());
        sweep(root, now + Duration::from_secs(4000));
        let left: Vec<String> =
            list(root, &model()).into_iter().map(|(stored, _)| stored.checkpoint.name).collect();
        assert_eq!(left, ["for_ever"]);
    }
}
