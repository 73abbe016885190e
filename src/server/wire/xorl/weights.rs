//! Saved adapters: save, load, list, delete, describe.

use super::{
    Call,
    answers::{self, Checkpoints, Deleted, FullWeights, LoadResult, SaveResult, StoredInfo, StoredShape},
    bodies::{DeleteCheckpoint, LoadWeights, SaveForSampler, SaveFullWeights, SaveWeights, WeightsInfo},
    value,
};
use crate::{
    checkpoint::saves,
    lora::LoraShape,
    server::{
        app::mismatched,
        checkpoints::{self, Stored},
        fault::Fault,
        futures::{Body, Look},
        http::failed,
        labels,
        paths::Kind,
        request::{Contents, Load, ModelId, Reply, Save, Task},
        wire::{Later, iso_time},
    },
};
use serde_json::Value;
use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Time for which `save_full_weights_safetensors` waits. The client gives up after half an hour.
const FULL_TIME: Duration = Duration::from_secs(3600);

/// Milliseconds since 1970, for names of saves that the client does not name.
pub fn timestamp() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

/// Saves an adapter with its training state. Without a path it is `checkpoint-{milliseconds}`.
pub fn save(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id, SaveWeights { path, overwrite }) = call.read()?;
    let unnamed = || format!("checkpoint-{}", timestamp());
    let path = path.filter(|path| !path.is_empty()).unwrap_or_else(unnamed);
    save_to(call, &model, seq_id, (&path, Kind::Weights), overwrite)
}

/// Saves an adapter alone, for a sampler.
pub fn save_for_sampler(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id, SaveForSampler { name, overwrite }) = call.read()?;
    save_to(call, &model, seq_id, (&name, Kind::Sampler), overwrite)
}

fn save_to(
    call: &Call,
    model: &ModelId,
    seq_id: Option<i64>,
    (path, kind): (&str, Kind),
    overwrite: Option<bool>,
) -> Result<Value, Fault> {
    let contents = if kind == Kind::Weights { Contents::Training } else { Contents::Adapter };
    let (task, uri) = task(call, model, (path, kind), contents, overwrite)?;
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Saved { folder, bytes } => {
            Body::json(&SaveResult { path: &uri, model_path: folder, size_bytes: *bytes })
        }
        other => mismatched(other),
    });
    call.submit(model, seq_id, task, render)
}

/// The task of a save to `path`, and the name under which it is listed.
fn task(
    call: &Call,
    model: &ModelId,
    (path, kind): (&str, Kind),
    contents: Contents,
    overwrite: Option<bool>,
) -> Result<(Task, String), Fault> {
    let spec = call.app.spec(call.tenant, model)?;
    let root = call.app.root(call.tenant)?;
    let (folder, checkpoint) = checkpoints::to_save(&root, path, model, kind)?;
    let metadata = labels::metadata(model, Some(&spec), None, None);
    let save = Save { folder, contents, overwrite: overwrite.unwrap_or(false), metadata };
    Ok((Task::Save(save), checkpoint.uri("xorl")))
}

/// Saves the base with an adapter merged into it, and answers when it is there. It goes on if its client leaves.
pub fn save_full(call: &Call) -> Result<Later, Fault> {
    let (model, seq_id, body) = call.read()?;
    let SaveFullWeights { name, dtype, base_model_path, overwrite } = body;
    if let Some(base) = base_model_path {
        call.app.settings.check_base("base_model_path", &base)?;
    }
    let (named, dtype) = dtype.unwrap_or_default().of_weights();
    let (task, uri) = task(call, &model, (&name, Kind::Full), Contents::Merged { dtype }, overwrite)?;
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Saved { folder, bytes } => Body::json(&FullWeights {
            path: folder,
            dtype: named,
            num_shards: shards(folder),
            xorl_path: &uri,
            size_bytes: *bytes,
        }),
        other => mismatched(other),
    });
    let id = call.take(&model, seq_id, task, render)?;
    let (app, tenant) = (call.app.clone(), call.tenant.clone());
    Ok(Box::pin(async move {
        match app.futures.wait(&id, &tenant, Some(FULL_TIME)).await {
            Look::Done(outcome) => {
                let written = move || match outcome.answer() {
                    Ok(_) => Ok(outcome.body(false)),
                    Err(refusal) => Err(refusal.clone().into()),
                };
                tokio::task::spawn_blocking(written).await.map_err(failed)?
            }
            // A client would send what fails with 5xx again.
            Look::Pending(place) => {
                Err(Fault::user(format!("{}; list_checkpoints names it when it is saved", place.reason())))
            }
            Look::Unknown => {
                Err(Fault::user("its result is no longer kept; list_checkpoints names what is saved"))
            }
        }
    }))
}

/// Files of weights in a save.
fn shards(folder: &Path) -> usize {
    let files = saves::published(folder)
        .map(|(_, manifest)| manifest.files().filter(|file| file.ends_with(".safetensors")).count());
    files.unwrap_or(0)
}

/// Loads saved values, with the optimizer's state unless `optimizer` is false.
pub fn load(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id, LoadWeights { path, optimizer }) = call.read()?;
    let folder = checkpoints::to_load(&call.app.root(call.tenant)?, &path, &model)?;
    let load = Load { folder, optimizer: optimizer.unwrap_or(true) };
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Loaded { step } => Body::json(&LoadResult { path: &path, step: *step }),
        other => mismatched(other),
    });
    call.submit(&model, seq_id, Task::Load(load), render)
}

/// A save as lists show it.
pub fn listed(stored: &Stored) -> answers::Checkpoint {
    let Stored { checkpoint, time, bytes, .. } = stored;
    let checkpoint_type = match checkpoint.kind {
        Kind::Weights => "training",
        Kind::Sampler => "sampler",
        Kind::External => "external",
        Kind::Full => "full",
    };
    answers::Checkpoint {
        checkpoint_id: checkpoint.id(),
        checkpoint_type,
        time: iso_time(*time),
        path: checkpoint.uri("xorl"),
        size_bytes: *bytes,
    }
}

pub fn list(call: &Call) -> Result<Value, Fault> {
    let (model, _) = call.address()?;
    let saved = checkpoints::list(&call.app.root(call.tenant)?, &model);
    value(&Checkpoints { checkpoints: saved.iter().map(listed).collect() })
}

/// Deletes a save: `weights/n`, `weights/m/n`, or a path.
pub fn delete(call: &Call) -> Result<Value, Fault> {
    let (model, _, DeleteCheckpoint { checkpoint_id }) = call.read()?;
    let root = call.app.root(call.tenant)?;
    let found = checkpoints::find(&root, &checkpoint_id, &model)?;
    labels::delete(&root, &found)?;
    value(&Deleted { success: true, deleted_path: found.checkpoint.uri("xorl"), error: None })
}

/// Describes a saved adapter by its path.
pub fn info(call: &Call) -> Result<Value, Fault> {
    let (model, _, WeightsInfo { xorl_path }) = call.read()?;
    let found = checkpoints::find(&call.app.root(call.tenant)?, &xorl_path, &model)?.adapter()?;
    let LoraShape { rank, alpha, .. } = checkpoints::describe(&found)?;
    value(&StoredInfo {
        model_id: found.checkpoint.model,
        base_model: call.app.settings.base_model.clone(),
        is_lora: true,
        lora_rank: rank,
        lora_config: StoredShape { rank, alpha },
        size_bytes: found.bytes,
    })
}
