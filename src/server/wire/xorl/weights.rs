//! Saved adapters: save, load, list, delete, describe.

use super::{
    Call,
    answers::{self, Checkpoints, Deleted, LoadResult, SaveResult, StoredInfo, StoredShape},
    bodies::{DeleteCheckpoint, LoadWeights, SaveForSampler, SaveWeights, WeightsInfo},
    value,
};
use crate::{
    lora::LoraShape,
    server::{
        app::mismatched,
        checkpoints::{self, Stored},
        fault::Fault,
        futures::Body,
        labels,
        paths::Kind,
        request::{Load, ModelId, Reply, Save, Task},
        wire::iso_time,
    },
};
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};

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
    let spec = call.app.spec(call.tenant, model)?;
    let root = call.app.root(call.tenant)?;
    let (folder, checkpoint) = checkpoints::to_save(&root, path, model, kind)?;
    let overwrite = overwrite.unwrap_or(false);
    let metadata = labels::metadata(model, Some(&spec), None, None);
    let save = Save { folder, training_state: kind == Kind::Weights, overwrite, metadata };
    let uri = checkpoint.uri("xorl");
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Saved { folder, bytes } => {
            Body::json(&SaveResult { path: &uri, model_path: folder, size_bytes: *bytes })
        }
        other => mismatched(other),
    });
    call.submit(model, seq_id, Task::Save(save), render)
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

/// A saved adapter as lists show it.
pub fn listed(stored: &Stored) -> answers::Checkpoint {
    let Stored { checkpoint, time, bytes, .. } = stored;
    let checkpoint_type = match checkpoint.kind {
        Kind::Weights => "training",
        Kind::Sampler => "sampler",
        Kind::External => "external",
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

/// Deletes a saved adapter: `weights/n`, `weights/m/n`, or a path.
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
    let found = checkpoints::find(&call.app.root(call.tenant)?, &xorl_path, &model)?;
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
