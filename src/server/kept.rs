//! Adapters over a restart. A server that stops saves each with its optimizer and what it has accumulated, in a folder
//! of its own that no client's path names (`{output_dir}/.server/adapters`); the next server on this output_dir brings
//! them back before it takes requests. An adapter that had changed when its server was killed does not come back at an
//! older state in silence: it is lost, what was saved of it last becomes a checkpoint of its owner, and its requests
//! are refused with the name of that checkpoint until someone makes it again.

use super::{
    journal::{self, Journal, JournalError, State},
    labels,
    paths::Kind,
    registry::{Loss, Tenant},
    request::{AdapterSpec, Answer, Contents, Engine, Load, ModelId, Refusal, Request, Save, Task},
    storage,
};
use crate::{
    checkpoint::{CheckpointError, saves, state::AdapterState},
    console::{count, first_of},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::UNIX_EPOCH,
};

const ADAPTERS: &str = "adapters";
const JOURNAL: &str = "journal.jsonl";
/// The field of a save's metadata that has its [`Owned`].
const OWNED: &str = "server";

/// The reason why adapters cannot be kept or brought back.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(
        "adapter {model} cannot be brought back: {reason}; start the server as it was, or move {folder} away to start \
         without this adapter, of which only its clients' saves are then left"
    )]
    NotBack { model: ModelId, folder: PathBuf, reason: String },
    #[error("{} could not be saved: {}", count(.0.len(), "adapter"), first_of(.0))]
    NotSaved(Vec<String>),
}

impl KeptError {
    /// 2 for what the user can set right, else 1.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Checkpoint(error) => error.exit_code(),
            Self::Journal(JournalError::Line { .. }) | Self::NotBack { .. } => 2,
            Self::Io { .. } | Self::Journal(JournalError::Io { .. }) | Self::NotSaved(_) => 1,
        }
    }
}

/// Owner and shape of an adapter, as its save has them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Owned {
    /// None in a server without keys.
    tenant: Option<String>,
    model: String,
    spec: AdapterSpec,
    /// The largest number of a request that was taken for it.
    last_number: Option<i64>,
}

impl Owned {
    /// Reads those of `model` in its `folder`.
    fn read(model: &ModelId, folder: &Path) -> Result<Self, KeptError> {
        let not_back =
            |reason| KeptError::NotBack { model: model.clone(), folder: folder.to_owned(), reason };
        let metadata = saves::describe(folder).map_err(|error| not_back(error.to_string()))?.metadata;
        let unowned = |_| not_back("its metadata.json does not say whose it is".into());
        serde_json::from_value(metadata[OWNED].clone()).map_err(unowned)
    }
}

/// An adapter that a killed server has lost.
#[derive(Clone, Debug)]
pub struct Lost {
    pub tenant: Tenant,
    pub model: ModelId,
    /// For its client: the last save of it, and the way to go on.
    pub loss: Loss,
}

impl Lost {
    /// The adapter's name, behind that of its tenant where there are several.
    pub fn name(&self) -> String {
        match self.tenant.is_only() {
            true => self.model.to_string(),
            false => format!("{}:{}", self.tenant.name(), self.model),
        }
    }
}

/// The adapters that a server keeps over restarts.
pub struct Kept {
    folder: PathBuf,
    /// Clients of this server have keys.
    has_keys: bool,
    journal: Arc<Journal>,
    /// Adapters to bring back.
    back: Vec<(ModelId, AdapterSpec)>,
    last_numbers: BTreeMap<ModelId, i64>,
    lost: Vec<Lost>,
}

/// The adapters of earlier processes that come back, those that are lost, and those whose save has outlived them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parted {
    back: Vec<ModelId>,
    lost: Vec<ModelId>,
    gone: Vec<ModelId>,
}

/// Parts adapters by the journal and by the saves that there are. Pure.
fn part(journal: &BTreeMap<ModelId, State>, saved: &[ModelId]) -> Parted {
    let mut parted = Parted::default();
    for model in saved {
        match journal.get(model) {
            // Without a line the journal was removed: the save is all that is known.
            Some(State::Saved) | None => parted.back.push(model.clone()),
            Some(State::Gone) => parted.gone.push(model.clone()),
            Some(State::Changed | State::Lost) => {}
        }
    }
    let is_lost = |(model, state): &(&ModelId, &State)| match state {
        State::Changed | State::Lost => true,
        State::Saved => !saved.contains(model),
        State::Gone => false,
    };
    parted.lost = journal.iter().filter(is_lost).map(|(model, _)| model.clone()).collect();
    parted
}

impl Kept {
    /// Finds what earlier servers have left in `output`, which this process alone writes. `has_keys`: clients need
    /// keys. Adapters of the other kind of server stay where they are.
    pub fn open(output: &Path, has_keys: bool) -> Result<Self, KeptError> {
        let folder = output.join(storage::OWN);
        let adapters = folder.join(ADAPTERS);
        std::fs::create_dir_all(&adapters)
            .map_err(|error| KeptError::Io { path: adapters.clone(), error })?;
        let path = folder.join(JOURNAL);
        let states = journal::read(&path)?;
        let saved = saves::list(&adapters).into_iter();
        let saved: Vec<ModelId> = saved.filter_map(|(name, _)| ModelId::new(name).ok()).collect();
        let Parted { back, lost, gone } = part(&states, &saved);
        let place = |model: &ModelId| adapters.join(model.folder());
        gone.iter().try_for_each(|model| saves::delete(&place(model)))?;
        let (mut found, mut last_numbers) = (Vec::new(), BTreeMap::new());
        for model in back {
            let Owned { tenant, spec, last_number, .. } = Owned::read(&model, &place(&model))?;
            match tenant.is_some() == has_keys {
                true => {
                    last_numbers.extend(last_number.map(|last| (model.clone(), last)));
                    found.push((model, spec));
                }
                false => tracing::warn!(
                    "adapter {model} is of a server {} api_keys_file: it stays in {} until there is one again",
                    if has_keys { "without" } else { "with" },
                    place(&model).display()
                ),
            }
        }
        let mut losses = Vec::new();
        for model in &lost {
            let Some((tenant, name)) = Tenant::of_engine_id(model.as_str(), has_keys) else { continue };
            let root = tenant.root(output);
            if saved.contains(model) {
                std::fs::create_dir_all(&root)
                    .map_err(|error| KeptError::Io { path: root.clone(), error })?;
                hand_over(&place(model), &root, &name)?;
            }
            losses.push(Lost { tenant, model: name, loss: Loss { root, tell: last_saved } });
        }
        // One that stays where it is has no line: it is found by its save.
        let states = lost.into_iter().map(|model| (model, State::Lost));
        let states = states.chain(found.iter().map(|(model, _)| (model.clone(), State::Saved))).collect();
        let journal = Arc::new(Journal::begin(&path, states)?);
        Ok(Self { folder: adapters, has_keys, journal, back: found, last_numbers, lost: losses })
    }

    /// The journal, for the engine that clients use.
    pub fn journal(&self) -> Arc<Journal> {
        self.journal.clone()
    }

    pub fn lost(&self) -> &[Lost] {
        &self.lost
    }

    /// The largest number of a request that earlier servers took, of each adapter that comes back and has one.
    pub fn last_numbers(&self) -> &BTreeMap<ModelId, i64> {
        &self.last_numbers
    }

    fn place(&self, model: &ModelId) -> PathBuf {
        self.folder.join(model.folder())
    }

    /// Makes all adapters in `engine` as they were saved. Returns their number.
    ///
    /// # Errors
    /// One does not fit this server.
    pub fn bring_back(&self, engine: &dyn Engine) -> Result<usize, KeptError> {
        let create = |(model, spec): &(ModelId, AdapterSpec)| (model.clone(), Task::Create(spec.clone()));
        let load = |(model, _): &(ModelId, AdapterSpec)| {
            (model.clone(), Task::Load(Load { folder: self.place(model), optimizer: true }))
        };
        let tasks = self.back.iter().flat_map(|kept| [create(kept), load(kept)]);
        for (model, answer) in ask(engine, tasks) {
            if let Err(refusal) = answer {
                let folder = self.place(&model);
                return Err(KeptError::NotBack { model, folder, reason: refusal.to_string() });
            }
        }
        Ok(self.back.len())
    }

    /// Saves all adapters of `engine` that have changed, with the largest number of a request of each, and forgets
    /// those that it has no longer. Returns the number of adapters. Each save is published whole.
    ///
    /// # Errors
    /// Those that could not be saved; the others are.
    pub fn save(
        &self,
        engine: &dyn Engine,
        last_numbers: &BTreeMap<ModelId, i64>,
    ) -> Result<usize, KeptError> {
        let models = engine.state().models;
        let models: BTreeMap<ModelId, AdapterSpec> = models
            .into_iter()
            .filter_map(|(name, model)| Some((ModelId::new(name).ok()?, model.spec)))
            .collect();
        let changed = models.iter().filter(|(model, _)| self.journal.state(model) != Some(State::Saved));
        let tasks = changed.filter_map(|(model, spec)| {
            let last_number = last_numbers.get(model).copied();
            Some((model.clone(), self.save_of(model, spec, last_number)?))
        });
        let mut failed = Vec::new();
        for (model, answer) in ask(engine, tasks) {
            match answer {
                Ok(_) => self.journal.note(&model, State::Saved)?,
                Err(refusal) => failed.push(format!("{model}: {refusal}")),
            }
        }
        if !failed.is_empty() {
            return Err(KeptError::NotSaved(failed));
        }
        for model in self.journal.in_memory().into_iter().filter(|model| !models.contains_key(model)) {
            self.journal.note(&model, State::Gone)?;
            let place = self.place(&model);
            if saves::published(&place).is_ok() {
                saves::delete(&place)?;
            }
        }
        Ok(models.len())
    }

    fn save_of(&self, model: &ModelId, spec: &AdapterSpec, last_number: Option<i64>) -> Option<Task> {
        let (tenant, name) = Tenant::of_engine_id(model.as_str(), self.has_keys)?;
        let tenant = self.has_keys.then(|| tenant.name().to_owned());
        let owned = Owned { tenant, model: name.to_string(), spec: spec.clone(), last_number };
        let metadata = serde_json::json!({ OWNED: owned });
        let folder = self.place(model);
        Some(Task::Save(Save { folder, contents: Contents::Training, overwrite: true, metadata }))
    }
}

/// Submits all `tasks` and waits for their answers, in this order.
fn ask(
    engine: &dyn Engine,
    tasks: impl IntoIterator<Item = (ModelId, Task)>,
) -> impl Iterator<Item = (ModelId, Answer)> {
    let submit = |(model, task): (ModelId, Task)| {
        let (give, answer) = mpsc::channel();
        let given = move |answer| {
            // Whoever asks may have gone after an error.
            let _ = give.send(answer);
        };
        engine.submit(Request { model: model.clone(), task }, Box::new(given));
        (model, answer)
    };
    let asked: Vec<_> = tasks.into_iter().map(submit).collect();
    asked.into_iter().map(|(model, answer)| {
        let ended = |_| Err(Refusal::Server("the engine has ended".into()));
        (model, answer.recv().unwrap_or_else(ended))
    })
}

/// Makes the server's save `place` of a lost adapter a checkpoint that its owner can name.
fn hand_over(place: &Path, root: &Path, model: &ModelId) -> Result<(), KeptError> {
    let failed = |reason| KeptError::NotBack { model: model.clone(), folder: place.to_owned(), reason };
    let (time, _) = saves::published(place).map_err(|error| failed(error.to_string()))?;
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = format!("stop-{seconds}");
    let target: PathBuf = [Kind::Weights.folder(), &model.folder(), &name].iter().collect();
    let target = super::paths::inside(root, &target).map_err(|error| failed(error.to_string()))?;
    Ok(saves::rename(place, &target)?)
}

/// The text for a client whose adapter is lost.
fn last_saved(root: &Path, model: &ModelId) -> String {
    let mut saved = labels::list(root, model).into_iter().map(|(stored, _)| stored);
    let newest = saved.rfind(|stored| stored.checkpoint.kind == Kind::Weights);
    let (scheme, load) = match model.as_str().contains(':') {
        true => ("tinker", "create a training client from that state, with its optimizer, to go on from it"),
        false => ("xorl", "send create_model, then load_weights of that path to go on from it"),
    };
    let saved = newest.map(|stored| {
        let state = AdapterState::read(&stored.folder).ok().flatten();
        let step = state.map_or_else(String::new, |state| format!("step {}, ", state.optimizer.updates));
        format!("its last saved state is {step}{}; {load}", stored.checkpoint.uri(scheme))
    });
    let saved = saved.unwrap_or_else(|| "nothing of it was saved; send create_model to make it anew".into());
    format!("the server ended before it could save model_id {model}: {saved}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::publish::MANIFEST;

    fn id(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    #[test]
    fn adapters_that_had_changed_are_lost_and_the_others_come_back() {
        let journal = [
            ("same", State::Saved),
            ("changed", State::Changed),
            ("never", State::Changed),
            ("still", State::Lost),
            ("deleted", State::Saved),
            ("unloaded", State::Gone),
            ("unloaded-unsaved", State::Gone),
        ];
        let journal = journal.map(|(name, state)| (id(name), state)).into_iter().collect();
        let saved = ["same", "changed", "unlisted", "unloaded"].map(id);
        let found = part(&journal, &saved);
        assert_eq!(found.back, ["same", "unlisted"].map(id));
        assert_eq!(found.lost, ["changed", "deleted", "never", "still"].map(id));
        assert_eq!(found.gone, ["unloaded"].map(id));
        assert_eq!(part(&BTreeMap::new(), &[]), Parted::default());
    }

    /// A save with these metadata at `folder`.
    fn publish(folder: &Path, metadata: &str) {
        std::fs::create_dir_all(folder).unwrap();
        let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}"#;
        let entry = |text: &str| serde_json::json!({"size": text.len(), "sha256": ""});
        let manifest =
            serde_json::json!({"adapter_config.json": entry(config), (saves::METADATA): entry(metadata)});
        std::fs::write(folder.join("adapter_config.json"), config).unwrap();
        std::fs::write(folder.join(saves::METADATA), metadata).unwrap();
        std::fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
    }

    #[test]
    fn a_lost_adapter_is_not_sent_to_a_save_whose_time_is_over() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str| root.path().join("weights/a").join(name);
        publish(&folder("kept"), "{}");
        std::thread::sleep(std::time::Duration::from_millis(20));
        publish(&folder("over"), r#"{"ttl_seconds": 0}"#);
        assert!(last_saved(root.path(), &id("a")).contains("xorl://a/weights/kept;"));
        saves::delete(&folder("kept")).unwrap();
        assert!(last_saved(root.path(), &id("a")).contains("nothing of it was saved"));
    }

    #[test]
    fn a_damaged_adapter_is_named_with_its_folder() {
        let output = tempfile::tempdir().unwrap();
        let folder = output.path().join(storage::OWN).join(ADAPTERS).join("a");
        let owned = r#"{"server": {"tenant": null, "model": "a", "last_number": null, "spec": {"rank": 4, "alpha": 8.0,
            "targets": null, "train_attn": true, "train_mlp": true, "seed": 1}}}"#;
        publish(&folder, owned);
        assert_eq!(Kept::open(output.path(), false).unwrap().back.len(), 1);
        let says = |words: &str| {
            let error = Kept::open(output.path(), false).err().unwrap();
            let text = error.to_string();
            assert!(
                text.contains(&format!("move {} away", folder.display())) && text.contains(words),
                "{text}"
            );
            assert_eq!(error.exit_code(), 2);
        };
        publish(&folder, "{}");
        says("does not say whose it is");
        std::fs::write(folder.join("adapter_config.json"), "{").unwrap();
        says("adapter_config.json");
        std::fs::remove_dir_all(&folder).unwrap();
        let kept = Kept::open(output.path(), false).unwrap();
        assert!(kept.back.is_empty() && kept.lost[0].name() == "a", "the journal has it still");
    }
}
