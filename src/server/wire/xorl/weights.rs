//! Saved adapters: save, load, list, delete, describe.

use super::{Call, fields::Fields};
use crate::{
    lora::LoraShape,
    server::{
        app::mismatched,
        checkpoints::{self, Stored},
        fault::Fault,
        futures::Body,
        labels,
        paths::{Checkpoint, Kind},
        request::{Load, ModelId, Reply, Save, Task},
        wire::iso_time,
    },
};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970, for names of saves that the client does not name.
pub fn timestamp() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

/// Saves an adapter with its training state. Without a path it is `checkpoint-{milliseconds}`.
pub fn save(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let unnamed = || format!("checkpoint-{}", timestamp());
    let path = fields.text("path")?.filter(|path| !path.is_empty()).map_or_else(unnamed, str::to_owned);
    save_to(call, fields, &path, Kind::Weights)
}

/// Saves an adapter alone, for a sampler.
pub fn save_for_sampler(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let Some(name) = fields.text("name")?.or(fields.text("path")?) else {
        return Err(Fault::user("name: expected the name of the save, got none"));
    };
    save_to(call, fields, name, Kind::Sampler)
}

fn save_to(call: &Call, fields: &Fields, path: &str, kind: Kind) -> Result<Value, Fault> {
    let model = fields.model()?;
    let spec = call.app.spec(call.tenant, &model)?;
    let root = call.app.root(call.tenant)?;
    let (folder, checkpoint) = checkpoints::to_save(&root, path, &model, kind)?;
    let overwrite = fields.flag("overwrite")?.unwrap_or(false);
    let metadata = labels::metadata(Some(&spec), None, None);
    let save = Save { folder, training_state: kind == Kind::Weights, overwrite, metadata };
    let uri = checkpoint.uri("xorl");
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Saved { folder, bytes } => {
            Body::json(&json!({"path": uri, "model_path": folder, "size_bytes": bytes}))
        }
        other => mismatched(other),
    });
    call.submit(&model, fields.seq_id()?, Task::Save(save), render)
}

/// Loads saved values, with the optimizer's state unless `optimizer` is false.
pub fn load(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let model = fields.model()?;
    let Some(path) = fields.text("path")? else {
        return Err(Fault::user("path: expected the path of a save, got none"));
    };
    let folder = checkpoints::to_load(&call.app.root(call.tenant)?, path, &model)?;
    let load = Load { folder, optimizer: fields.flag("optimizer")?.unwrap_or(true) };
    let path = path.to_owned();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Loaded { step } => Body::json(&json!({"path": path, "step": step})),
        other => mismatched(other),
    });
    call.submit(&model, fields.seq_id()?, Task::Load(load), render)
}

/// A saved adapter as lists show it.
pub fn listed(stored: &Stored) -> Value {
    let Stored { checkpoint, time, bytes, .. } = stored;
    let kind = match checkpoint.kind {
        Kind::Weights => "training",
        Kind::Sampler => "sampler",
        Kind::External => "external",
    };
    json!({
        "checkpoint_id": checkpoint.id(),
        "checkpoint_type": kind,
        "time": iso_time(*time),
        "path": checkpoint.uri("xorl"),
        "size_bytes": bytes,
    })
}

pub fn list(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let saved = checkpoints::list(&call.app.root(call.tenant)?, &fields.model()?);
    Ok(json!({"checkpoints": saved.iter().map(listed).collect::<Vec<_>>()}))
}

/// Deletes a saved adapter: `weights/n`, `weights/m/n`, or a path.
pub fn delete(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let Some(id) = fields.text("checkpoint_id")?.or(fields.text("path")?) else {
        return Err(Fault::user("checkpoint_id: expected one that list_checkpoints names, got none"));
    };
    let root = call.app.root(call.tenant)?;
    let found = checkpoints::find(&root, id, &fields.model()?)?;
    labels::delete(&root, &found)?;
    Ok(json!({"success": true, "deleted_path": found.checkpoint.uri("xorl"), "error": null}))
}

/// Describes a saved adapter by its path.
pub fn info(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let Some(path) = fields.text("xorl_path")?.or(fields.text("path")?) else {
        return Err(Fault::user("xorl_path: expected the path of a save, got none"));
    };
    let found = checkpoints::find(&call.app.root(call.tenant)?, path, &fields.model()?)?;
    let LoraShape { rank, alpha, .. } = checkpoints::describe(&found)?;
    let Checkpoint { model, .. } = &found.checkpoint;
    let model: &ModelId = model;
    Ok(json!({
        "model_id": model,
        "base_model": call.app.settings.base_model,
        "is_lora": true,
        "lora_rank": rank,
        "lora_config": {"rank": rank, "alpha": alpha},
        "size_bytes": found.bytes,
    }))
}
