//! The journal of adapters: which have changed since the server saved them last. A server that was killed leaves it
//! behind, so the next one knows what it has lost. An adapter has a line at its first change and at its save, not for
//! each request.

use super::request::{
    Answer, Engine, EngineState, Listener, ModelId, Pass, Refusal, Request, Source, Task, Ticket,
};
use crate::{infer::request::SampleRequest, regular_file};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The state of an adapter between the server's memory and its own saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Memory has more than the save.
    Changed,
    /// The save is all of it.
    Saved,
    /// Memory had more, and its process was killed. Nobody has made the adapter again.
    Lost,
    /// There is no such adapter; its save may still be there.
    Gone,
}

#[derive(Serialize, Deserialize)]
struct Line {
    model: String,
    state: State,
}

/// The reason why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "{path}:{line}: this is no line of the server's journal: move the file away and start again; adapters then come \
         back as the server saved them last, and what was trained since is lost"
    )]
    Line { path: PathBuf, line: usize },
}

struct Open {
    file: File,
    states: BTreeMap<ModelId, State>,
}

/// A journal that is open for writing.
pub struct Journal {
    path: PathBuf,
    open: Mutex<Open>,
}

/// The states that the journal at `path` ends with; none where there is no file. What a kill has left of the last line
/// counts for nothing.
pub fn read(path: &Path) -> Result<BTreeMap<ModelId, State>, JournalError> {
    let text = match regular_file::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(JournalError::Io { path: path.to_owned(), error }),
    };
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut states = BTreeMap::new();
    for (index, line) in whole.lines().enumerate() {
        let parsed = serde_json::from_str(line).ok();
        let parsed = parsed.and_then(|Line { model, state }| Some((ModelId::new(model).ok()?, state)));
        let Some((model, state)) = parsed else {
            return Err(JournalError::Line { path: path.to_owned(), line: index + 1 });
        };
        states.insert(model, state);
    }
    Ok(states)
}

impl Journal {
    /// Begins the journal at `path` anew with `states`. A kill leaves the old one or the new one.
    pub fn begin(path: &Path, states: BTreeMap<ModelId, State>) -> Result<Self, JournalError> {
        let io = |error| JournalError::Io { path: path.to_owned(), error };
        let new = path.with_extension("new");
        let write = || {
            let mut file = File::create(&new)?;
            let lines: String = states.iter().map(|(model, state)| line(model, *state)).collect();
            file.write_all(lines.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
            Ok(file)
        };
        Ok(Self { path: path.to_owned(), open: Mutex::new(Open { file: write().map_err(io)?, states }) })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of an adapter; `None`: there is no such adapter.
    pub fn state(&self, model: &ModelId) -> Option<State> {
        self.lock().states.get(model).copied()
    }

    /// The adapters in memory, by name.
    pub fn in_memory(&self) -> Vec<ModelId> {
        let open = self.lock();
        let present = open.states.iter().filter(|(_, state)| **state != State::Lost);
        present.map(|(model, _)| model.clone()).collect()
    }

    /// Notes the state of an adapter. The line is on the disk when this returns, but for [`State::Gone`].
    pub fn note(&self, model: &ModelId, state: State) -> Result<(), JournalError> {
        let mut open = self.lock();
        if open.states.get(model).copied().unwrap_or(State::Gone) == state {
            return Ok(());
        }
        let written = open.file.write_all(line(model, state).as_bytes());
        let written =
            if state == State::Gone { written } else { written.and_then(|()| open.file.sync_data()) };
        written.map_err(|error| JournalError::Io { path: self.path.clone(), error })?;
        match state {
            State::Gone => open.states.remove(model),
            state => open.states.insert(model.clone(), state),
        };
        Ok(())
    }
}

fn line(model: &ModelId, state: State) -> String {
    let line = Line { model: model.to_string(), state };
    // Names and plain words always have a JSON form.
    serde_json::to_string(&line).unwrap_or_default() + "\n"
}

/// An engine whose changes of adapters are in a journal before they are made.
pub struct Recorded {
    pub engine: Arc<dyn Engine>,
    pub journal: Arc<Journal>,
}

/// True if an adapter after `task` is not what it was, and not what `create_model` makes.
fn changes(task: &Task) -> bool {
    match task {
        Task::Pass(Pass { backward, .. }) => *backward,
        Task::OptimStep(_) | Task::AbortGradients | Task::Load(_) => true,
        _ => false,
    }
}

impl Engine for Recorded {
    fn submit(&self, request: Request, answer: Box<dyn FnOnce(Answer) + Send>) {
        if changes(&request.task)
            && let Err(error) = self.journal.note(&request.model, State::Changed)
        {
            let text = format!("{error}; without its journal the server changes no adapter");
            return answer(Err(Refusal::Server(text)));
        }
        if request.task != Task::Unload {
            return self.engine.submit(request, answer);
        }
        let (journal, model) = (self.journal.clone(), request.model.clone());
        let answered = move |given: Answer| {
            if given.is_ok()
                && let Err(error) = journal.note(&model, State::Gone)
            {
                tracing::warn!("{error}: after a kill {model} counts as lost");
            }
            answer(given);
        };
        self.engine.submit(request, Box::new(answered));
    }

    fn sample(&self, source: Source, request: SampleRequest, listener: Box<dyn Listener>) -> Ticket {
        self.engine.sample(source, request, listener)
    }

    fn cancel(&self, ticket: Ticket) {
        self.engine.cancel(ticket);
    }

    fn end_sampling(&self) {
        self.engine.end_sampling();
    }

    fn state(&self) -> EngineState {
        self.engine.state()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::request::{AdapterSpec, Contents, OptimStep, Reply, Save};
    use std::sync::mpsc;

    fn id(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    /// Does what it is asked.
    struct Echo;

    impl Engine for Echo {
        fn submit(&self, _: Request, answer: Box<dyn FnOnce(Answer) + Send>) {
            answer(Ok(Reply::Created));
        }

        fn sample(&self, _: Source, _: SampleRequest, _: Box<dyn Listener>) -> Ticket {
            Ticket(0)
        }

        fn cancel(&self, _: Ticket) {}

        fn state(&self) -> EngineState {
            EngineState::default()
        }
    }

    fn create() -> Task {
        let (train_attn, train_mlp) = (true, true);
        Task::Create(AdapterSpec { rank: 4, alpha: 8.0, targets: None, train_attn, train_mlp, seed: 1 })
    }

    fn step() -> Task {
        let (betas, eps) = ((0.9, 0.95), 1e-8);
        Task::OptimStep(OptimStep {
            lr: 1e-3,
            betas,
            eps,
            weight_decay: 0.0,
            max_grad_norm: 0.0,
            divide: true,
        })
    }

    #[test]
    fn a_change_is_on_the_disk_before_it_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let before = BTreeMap::from([(id("kept"), State::Saved), (id("lost"), State::Lost)]);
        let journal = Arc::new(Journal::begin(&path, before.clone()).unwrap());
        assert_eq!(read(&path).unwrap(), before);
        let recorded = Recorded { engine: Arc::new(Echo), journal: journal.clone() };
        let ask = |model: &str, task| {
            let (send, answer) = mpsc::channel();
            let give = Box::new(move |given| send.send(given).unwrap());
            recorded.submit(Request { model: id(model), task }, give);
            answer.recv().unwrap().is_ok()
        };
        let (folder, metadata) = ("f".into(), serde_json::Value::Null);
        let save = Save { folder, contents: Contents::Training, overwrite: false, metadata };
        assert!(ask("kept", create()) && ask("kept", Task::Save(save)) && ask("lost", create()));
        assert_eq!(read(&path).unwrap(), before, "none of these changes one");
        assert!(ask("kept", step()) && ask("new", step()) && ask("other", step()));
        assert!(ask("other", Task::Unload));
        let after = BTreeMap::from([
            (id("kept"), State::Changed),
            (id("lost"), State::Lost),
            (id("new"), State::Changed),
            (id("other"), State::Gone),
        ]);
        assert_eq!(read(&path).unwrap(), after);
        assert_eq!(journal.in_memory(), ["kept", "new"].map(id));
        journal.note(&id("new"), State::Saved).unwrap();
        assert_eq!(read(&path).unwrap()[&id("new")], State::Saved);
        assert!(ask("lost", create()) && ask("lost", Task::Unload));
        assert_eq!(read(&path).unwrap()[&id("lost")], State::Gone, "a lost adapter can be given up");
    }

    #[test]
    fn a_torn_last_line_counts_for_nothing_and_another_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        assert!(read(&path).unwrap().is_empty());
        let (a, b) = (line(&id("a"), State::Changed), line(&id("b:train:0"), State::Saved));
        for cut in 0..b.len() {
            fs::write(&path, format!("{a}{}", &b[..cut])).unwrap();
            assert_eq!(read(&path).unwrap(), BTreeMap::from([(id("a"), State::Changed)]), "{cut}");
        }
        fs::write(&path, format!("{a}{{}}\n{b}")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("journal.jsonl:2: this is no line"));
    }
}
