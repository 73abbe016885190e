//! Adapters over a restart. A server that stops saves each with its optimizer and what it has accumulated, in a folder of
//! its own that no client's path names (`{output_dir}/.server/adapters`); the next server on this output_dir brings them
//! back before it takes requests. An adapter that had changed when its server was killed does not come back at an older
//! state in silence: it is lost, what was saved of it last becomes a checkpoint of its owner, and its requests are
//! refused with the name of that checkpoint until someone makes it again.

use super::{
    checkpoints,
    journal::{self, Journal, JournalError, State},
    paths::Kind,
    registry::Tenant,
    request::{AdapterSpec, Answer, Engine, Load, ModelId, Refusal, Request, Save, Task},
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

/// The server's own folder in output_dir. Names of clients begin with a letter or a digit.
const FOLDER: &str = ".server";
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
    #[error("{0}: it does not say whose adapter it is; move it out of the server's folder")]
    Unowned(PathBuf),
    #[error(
        "adapter {model} cannot be brought back: {reason}; start the server as it was, or with another output_dir"
    )]
    NotBack { model: ModelId, reason: String },
    #[error("{} could not be saved: {}", count(.0.len(), "adapter"), first_of(.0))]
    NotSaved(Vec<String>),
}

impl KeptError {
    /// 2 for what the user can set right, else 1.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Checkpoint(error) => error.exit_code(),
            Self::Journal(JournalError::Line { .. }) | Self::Unowned(_) | Self::NotBack { .. } => 2,
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
    fn read(folder: &Path) -> Result<Self, KeptError> {
        let metadata = saves::describe(folder)?.metadata;
        serde_json::from_value(metadata[OWNED].clone()).map_err(|_| KeptError::Unowned(folder.to_owned()))
    }
}

/// An adapter that a killed server has lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    pub tenant: Tenant,
    pub model: ModelId,
    /// For its client: what was saved of it last, and what to do.
    pub text: String,
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
        let folder = output.join(FOLDER);
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
            let Owned { tenant, spec, last_number, .. } = Owned::read(&place(&model))?;
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
            losses.push(Lost { text: last_saved(&root, &name), tenant, model: name });
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
                return Err(KeptError::NotBack { model, reason: refusal.to_string() });
            }
        }
        Ok(self.back.len())
    }

    /// Saves all adapters of `engine` that have changed, with the largest number of a request of each, and forgets those
    /// that it has no longer. Returns the number of adapters. Each save is published whole.
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
                Err(Refusal::User(text) | Refusal::Server(text)) => failed.push(format!("{model}: {text}")),
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
        Some(Task::Save(Save { folder, training_state: true, overwrite: true, metadata }))
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
    let (time, _) = saves::published(place)?;
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = format!("stop-{seconds}");
    let target: PathBuf = [Kind::Weights.folder(), &model.folder(), &name].iter().collect();
    let failed = |reason: String| KeptError::NotBack { model: model.clone(), reason };
    let target = super::paths::inside(root, &target).map_err(|error| failed(error.to_string()))?;
    Ok(saves::rename(place, &target)?)
}

/// The text for a client whose adapter is lost.
fn last_saved(root: &Path, model: &ModelId) -> String {
    let newest = checkpoints::list(root, model).into_iter().rfind(|s| s.checkpoint.kind == Kind::Weights);
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
}
