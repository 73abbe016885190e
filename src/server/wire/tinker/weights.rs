//! Saved weights: save, load, describe, copy.

use super::{
    Answer, Call,
    answers::{
        CopiedWeights, LoadedWeights, SavedExternalWeights, SavedSamplerWeights, SavedWeights, WeightsInfo,
        texts,
    },
    calls::{
        CopyWeights, LoadTarget, LoadWeights, SamplerSave, SaveWeights, SaveWeightsForSampler,
        WeightsInfoCall, ttl,
    },
    json,
};
use crate::{
    checkpoint::saves,
    server::{
        app::{DEFAULT_MODEL, Submission, mismatched},
        checkpoints::{self, Stored},
        fault::Fault,
        futures::{Body, Render},
        labels::{self, About},
        paths::{self, Checkpoint, Kind},
        request::{AdapterSpec, Contents, Load, ModelId, Reply, Save, Task},
        runs::Record,
        sessions::of_model,
    },
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

/// The scheme of paths that clients get.
pub(super) const SCHEME: &str = "tinker";

/// A save as the three calls ask for it.
struct Wanted<'a> {
    model_id: &'a str,
    seq_id: Option<u64>,
    name: &'a str,
    kind: Kind,
    ttl_seconds: Option<i64>,
    user_metadata: Option<&'a BTreeMap<String, String>>,
    overwrite: bool,
}

impl Wanted<'_> {
    /// Submits the save. `answer` writes its result from the path and the bytes.
    fn submit<T: Serialize>(
        self,
        call: &Call,
        answer: impl Fn(String, u64) -> T + Send + Sync + 'static,
    ) -> Answer {
        let Wanted { model_id, seq_id, name, kind, ttl_seconds, user_metadata, overwrite } = self;
        let model = call.model(model_id)?;
        if name.contains('/') {
            return Err(call.refuse(format!("path {name:?}: expected a name without '/', like \"step_10\"")));
        }
        let ttl_seconds = ttl(ttl_seconds).map_err(|error| call.refuse(error))?;
        let root = call.app.root(call.tenant)?;
        let place = checkpoints::to_save(&root, name, &model, kind);
        let (folder, checkpoint) = place.map_err(|error| call.used_up(error))?;
        let spec = call.app.spec(call.tenant, &model)?;
        let metadata = labels::metadata(&model, Some(&spec), user_metadata, ttl_seconds);
        let trains = kind == Kind::Weights;
        let contents = if trains { Contents::Training } else { Contents::Adapter };
        let save = Save { folder, contents, overwrite, metadata };
        let path = checkpoint.uri(SCHEME);
        let render = Box::new(move |reply: &Reply, _| match reply {
            Reply::Saved { bytes, .. } => Body::json(&answer(path.clone(), *bytes)),
            other => mismatched(other),
        });
        call.submit(&model, seq_id, Task::Save(save), render)
    }
}

/// The name of a save that its client does not name.
fn unnamed() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("checkpoint-{}", since.as_millis())
}

/// Saves a model with its training state.
pub fn save(call: &Call) -> Answer {
    let body: SaveWeights = call.read()?;
    let name = body.path.clone().unwrap_or_else(unnamed);
    wanted(&body, &name, Kind::Weights).submit(call, |path, _| SavedWeights { path })
}

/// Saves a model as PEFT has it, to be downloaded.
pub fn save_external(call: &Call) -> Answer {
    let body: SaveWeights = call.read()?;
    if body.age_encryption_recipients.as_ref().is_some_and(|recipients| !recipients.is_empty()) {
        return Err(call.refuse(
            "age_encryption_recipients: files are not encrypted here; leave it out, for their addresses are signed",
        ));
    }
    let name = body.path.clone().unwrap_or_else(unnamed);
    wanted(&body, &name, Kind::External)
        .submit(call, |path, size_bytes| SavedExternalWeights { path, size_bytes })
}

fn wanted<'a>(body: &'a SaveWeights, name: &'a str, kind: Kind) -> Wanted<'a> {
    let SaveWeights { model_id, seq_id, ttl_seconds, overwrite, user_metadata, .. } = body;
    Wanted {
        model_id,
        seq_id: *seq_id,
        name,
        kind,
        ttl_seconds: *ttl_seconds,
        user_metadata: user_metadata.as_ref(),
        overwrite: *overwrite,
    }
}

/// Saves a model for a sampler under a name, or makes the sampler without one.
pub fn save_for_sampler(call: &Call) -> Answer {
    let body: SaveWeightsForSampler = call.read()?;
    let name = match body.target().map_err(|error| call.refuse(error))? {
        SamplerSave::Named(name) => name,
        SamplerSave::Ephemeral { sampling_session_seq_id } => {
            return call.freeze(&body.model_id, body.seq_id, sampling_session_seq_id);
        }
    };
    let wanted = Wanted {
        model_id: &body.model_id,
        seq_id: body.seq_id,
        name,
        kind: Kind::Sampler,
        ttl_seconds: body.ttl_seconds,
        user_metadata: body.user_metadata.as_ref(),
        overwrite: false,
    };
    wanted.submit(call, |path, _| SavedSamplerWeights { path: Some(path), sampling_session_id: None })
}

/// Loads saved weights into a model, or creates one by them.
pub fn load(call: &Call) -> Answer {
    let mut body: LoadWeights = call.read()?;
    body.base_model = body.base_model.map(|named| call.base_model(named));
    match body.target(&call.defaults()).map_err(|error| call.refuse(error))? {
        LoadTarget::New(model) => create_by_load(call, &body, &model),
        LoadTarget::Existing(model) => {
            call.model(model.as_str())?;
            let root = call.app.root(call.tenant)?;
            let folder = checkpoints::to_load(&root, &body.path, &model);
            let load =
                Load { folder: folder.map_err(|error| call.used_up(error))?, optimizer: body.optimizer };
            let render = loaded(&model, body.path);
            call.submit(&model, body.seq_id, Task::Load(load), render)
        }
    }
}

fn loaded(model: &ModelId, path: String) -> Render {
    let answer = LoadedWeights { path, model_id: model.to_string() };
    Box::new(move |reply: &Reply, _| match reply {
        Reply::Loaded { .. } => Body::json(&answer),
        other => mismatched(other),
    })
}

/// Creates a model of the shape of a save, with its values.
fn create_by_load(call: &Call, body: &LoadWeights, model: &ModelId) -> Answer {
    let Some((session, number)) = of_model(model) else {
        return Err(Fault::user(format!("session_id: {model} is no model of a session")));
    };
    call.once(session, number, |model| {
        let root = call.app.root(call.tenant)?;
        let (stored, about) = labels::find(&root, &body.path, model)?;
        let stored = stored.adapter()?;
        let spec = spec_of(call, &stored, about)?;
        call.app.check_rank(spec.rank)?;
        let record = Record { spec: spec.clone(), user_metadata: body.user_metadata.as_ref().map(texts) };
        let load = Load { folder: stored.folder, optimizer: body.optimizer };
        let submission = Submission {
            tenant: call.tenant,
            model,
            call: call.path,
            number: None,
            task: Task::Load(load),
            render: loaded(model, body.path.clone()),
        };
        let future = call.app.create_by_load(submission, spec)?;
        call.begin(model, &record)?;
        Ok(future)
    })
}

/// The shape of a saved adapter: as its client asked for it, or by its files and the server's targets.
fn spec_of(call: &Call, stored: &Stored, about: About) -> Result<AdapterSpec, Fault> {
    if let Some(spec) = about.spec {
        return Ok(spec);
    }
    let shape = checkpoints::describe(stored)?;
    Ok(AdapterSpec { rank: shape.rank, alpha: shape.alpha, ..call.app.settings.adapter.clone() })
}

/// The saved adapter that a path names, by any of its forms.
fn find(call: &Call, path: &str) -> Result<(Stored, About), Fault> {
    let model = ModelId::new(DEFAULT_MODEL).map_err(|error| Fault::user(error.to_string()))?;
    let (stored, about) = labels::find(&call.app.root(call.tenant)?, path, &model)?;
    Ok((stored.adapter()?, about))
}

/// Describes saved weights.
pub fn info(call: &Call) -> Answer {
    let WeightsInfoCall { tinker_path } = call.read()?;
    let (stored, about) = find(call, &tinker_path)?;
    let spec = spec_of(call, &stored, about)?;
    json(&WeightsInfo {
        base_model: call.app.settings.base_model.clone(),
        is_lora: true,
        lora_rank: spec.rank,
        train_unembed: false,
        train_mlp: spec.train_mlp,
        train_attn: spec.train_attn,
    })
}

/// Gives saved weights to another run, which has no adapter. The files are shared. A repeat finds the copy.
pub fn copy(call: &Call) -> Answer {
    let body: CopyWeights = call.read()?;
    let ttl_seconds = ttl(body.ttl_seconds).map_err(|error| call.refuse(error))?;
    let (stored, about) = find(call, &body.source_path)?;
    let root = call.app.root(call.tenant)?;
    let model = match (&body.session_id, body.model_seq_id) {
        (Some(session), Some(number)) => {
            call.app
                .sessions()
                .heartbeat(call.tenant, session)
                .map_err(|error| Fault::user(error.to_string()))?;
            super::calls::model_id(session, number)
        }
        (None, None) => super::calls::model_id(&session_of_copy(call), 0),
        _ => return Err(Fault::user("copy_weights: session_id and model_seq_id come together")),
    };
    let model = model.map_err(|error| Fault::user(error.to_string()))?;
    if call.app.registry().get(call.tenant, &model).is_some() {
        return Err(Fault::user(format!("model_id {model} exists; take another model_seq_id")));
    }
    let Checkpoint { kind, name, .. } = stored.checkpoint.clone();
    let copy = Checkpoint { model, kind, name };
    let tinker_path = copy.uri(SCHEME);
    if labels::find(&root, &tinker_path, &copy.model).is_err() {
        let folder = paths::inside(&root, &copy.folder())?;
        let metadata =
            labels::metadata(&copy.model, about.spec.as_ref(), about.user_metadata.as_ref(), ttl_seconds);
        saves::link(&stored.folder, &folder, &metadata)
            .map_err(|error| checkpoints::refused(&stored, &error))?;
    }
    json(&CopiedWeights { tinker_path })
}

/// The session of a copy outside sessions: the same for a repeat, which has the same key.
fn session_of_copy(call: &Call) -> String {
    let key = call.headers.get("x-idempotency-key").map_or(&b""[..], |key| key.as_bytes());
    let hash = Sha256::new().chain_update(key).chain_update([0]).chain_update(call.body).finalize();
    let digits: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("copy-{digits}")
}
