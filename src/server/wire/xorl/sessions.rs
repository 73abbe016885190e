//! Adapters: create, describe, unload, and the end of a session.

use super::{
    Call, Query,
    answers::{
        Cursor, Info, Killed, ModelData, ModelResult, SessionInfo, Submitted, TrainingRun, TrainingRuns,
    },
    bodies::{CreateModel, KillSession},
    fields::{checked, model_id},
    value,
    weights::{listed, timestamp},
};
use crate::server::{
    app::{App, Submission, mismatched},
    checkpoints,
    fault::Fault,
    futures::{Body, Look},
    paths::Kind,
    registry::Tenant,
    request::{AdapterSpec, Contents, ModelId, Reply, Save, Task},
    wire::{Later, described::QueryField, iso_time},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

/// Time for which `kill_session` waits for its save. The client gives up after 120 s.
const KILL_TIME: Duration = Duration::from_secs(110);

/// The query of [`session_info`].
pub const OF_SESSION: [QueryField; 2] = [
    QueryField { name: "model_id", about: "Name of the adapter; `default` where absent.", is_integer: false },
    QueryField { name: "session_id", about: "Another name of `model_id`.", is_integer: false },
];
/// The query of [`training_runs`].
pub const OF_LIST: [QueryField; 2] = [
    QueryField { name: "limit", about: "Adapters at most; 20 where absent.", is_integer: true },
    QueryField { name: "offset", about: "Adapters that are left out.", is_integer: true },
];

/// Creates an adapter, or begins anew with one that has this shape.
pub fn create(call: &Call) -> Result<Value, Fault> {
    let settings = &call.app.settings;
    let (model, _, CreateModel { base_model, lora_config }) = call.read()?;
    if model.as_str().contains(':') {
        return Err(Fault::user(format!(
            "model_id {model}: names with ':' are of tinker's clients; leave it out"
        )));
    }
    if let Some(base) = base_model {
        settings.check_base("base_model", &base)?;
    }
    let (lora, own) = (lora_config.unwrap_or_default(), &settings.adapter);
    let is_rank = |rank: f64| rank >= 1.0 && rank.fract() == 0.0 && rank <= 1e6;
    let rank =
        checked("lora_config.rank", lora.lora_rank.or(lora.rank), "an integer of at least 1", is_rank)?;
    let rank = rank.map_or(own.rank, |rank| rank as usize);
    call.app.check_rank(rank)?;
    let alpha = lora.lora_alpha.or(lora.alpha);
    let alpha = checked("lora_config.alpha", alpha, "a positive number", |alpha| alpha > 0.0)?;
    let spec = AdapterSpec {
        rank,
        alpha: alpha.unwrap_or(own.alpha),
        targets: lora.target_modules.or_else(|| own.targets.clone()),
        train_attn: lora.train_attn.unwrap_or(own.train_attn),
        train_mlp: lora.train_mlp.unwrap_or(own.train_mlp),
        seed: lora.seed.map_or(own.seed, |seed| seed as u64),
    };
    let dropout = lora.dropout.or(lora.lora_dropout);
    let dropout =
        checked("lora_config.dropout", dropout, "a number from 0 to 1", |rate| (0.0..=1.0).contains(&rate))?;
    let warning = dropout.filter(|&rate| rate > 0.0);
    let warning = warning.map(|rate| format!("lora_config.dropout {rate} is ignored: no dropout is applied"));
    let name = model.clone();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Created => {
            let warning_message = warning.as_deref();
            Body::json(&ModelResult { model_id: &name, r#type: "create_model", warning_message })
        }
        other => mismatched(other),
    });
    let request_id = call.app.create(call.tenant, &model, spec, render)?;
    value(&Submitted { request_id, model_id: &model })
}

/// Forgets an adapter. A repeat is an error, for the first has forgotten it.
pub fn unload(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id) = call.address()?;
    let name = model.clone();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Unloaded => {
            Body::json(&ModelResult { model_id: &name, r#type: "unload_model", warning_message: None })
        }
        other => mismatched(other),
    });
    call.submit(&model, seq_id, Task::Unload, render)
}

/// Describes an adapter and its base.
pub fn info(call: &Call) -> Result<Value, Fault> {
    let ((model_id, _), settings) = (call.address()?, &call.app.settings);
    let spec = call.app.spec(call.tenant, &model_id)?;
    let model_name = settings.base_model.clone();
    let model_data = ModelData {
        arch: settings.architecture.clone(),
        model_name: model_name.clone(),
        tokenizer_id: settings.tokenizer.clone(),
    };
    value(&Info {
        r#type: "get_info",
        model_id,
        model_name,
        model_data,
        is_lora: true,
        lora_rank: spec.rank,
        lora_alpha: spec.alpha,
    })
}

/// Counts of an adapter: `?model_id=` or `?session_id=`.
pub fn session_info(app: &App, tenant: &Tenant, query: &Query) -> Result<Value, Fault> {
    let model = model_id(query.get("model_id").or(query.get("session_id")).map(String::as_str))?;
    let spec = app.spec(tenant, &model)?;
    let id = tenant.engine_id(&model).map_err(|error| Fault::user(error.to_string()))?;
    let state = app.engine.state();
    let known = state.models.get(id.as_str());
    let last_request_time = app.registry().get(tenant, &model).map(|known| iso_time(known.last_request));
    value(&SessionInfo {
        model_id: model.clone(),
        session_id: model,
        base_model: app.settings.base_model.clone(),
        is_lora: true,
        lora_rank: spec.rank,
        lora_alpha: spec.alpha,
        step: known.map_or(0, |model| model.step),
        accumulated_passes: known.map_or(0, |model| model.accumulated),
        last_request_time,
    })
}

/// The adapters of a tenant by name: `?limit=20&offset=0`.
pub fn training_runs(app: &App, tenant: &Tenant, query: &Query) -> Result<Value, Fault> {
    let number = |name: &str, otherwise: usize| match query.get(name) {
        None => Ok(otherwise),
        Some(text) => text
            .parse()
            .map_err(|_| Fault::user(format!("{name}: expected an integer of at least 0, got {text:?}"))),
    };
    let (limit, offset) = (number("limit", 20)?.min(1000), number("offset", 0)?);
    let all: Vec<(ModelId, usize, String)> = {
        let registry = app.registry();
        let run = |(id, model): (&ModelId, &crate::server::registry::Model)| {
            (id.clone(), model.spec.rank, iso_time(model.last_request))
        };
        registry.of(tenant).map(run).collect()
    };
    let root = app.root(tenant)?;
    let run = |(id, rank, last): &(ModelId, usize, String)| {
        let saved = checkpoints::list(&root, id);
        let newest = |kind| saved.iter().rfind(|stored| stored.checkpoint.kind == kind).map(listed);
        TrainingRun {
            training_run_id: id.clone(),
            base_model: app.settings.base_model.clone(),
            model_owner: tenant.name().to_owned(),
            is_lora: true,
            lora_rank: *rank,
            corrupted: false,
            last_request_time: last.clone(),
            last_checkpoint: newest(Kind::Weights),
            last_sampler_checkpoint: newest(Kind::Sampler),
        }
    };
    let training_runs = all.iter().skip(offset).take(limit).map(run).collect();
    value(&TrainingRuns { training_runs, cursor: Cursor { offset, limit, total_count: all.len() } })
}

/// A session that is to end, after a save if there is one.
struct Kill {
    model: ModelId,
    /// The future and the path of the save.
    save: Option<(String, String)>,
}

/// Ends a session.
pub fn kill(call: &Call) -> Result<Later, Fault> {
    let (app, tenant, kill) = (call.app.clone(), call.tenant.clone(), begin_kill(call)?);
    Ok(Box::pin(async move { end(&app, &tenant, kill).await.map(|value| Body::json(&value)) }))
}

/// Submits the save of a session that is to end.
fn begin_kill(call: &Call) -> Result<Kill, Fault> {
    let (model, _, KillSession { save_checkpoint }) = call.read()?;
    call.app.spec(call.tenant, &model)?;
    if !save_checkpoint.unwrap_or(true) {
        return Ok(Kill { model, save: None });
    }
    let root = call.app.root(call.tenant)?;
    let (folder, checkpoint) =
        checkpoints::to_save(&root, &format!("killed-{}", timestamp()), &model, Kind::Weights)?;
    let save = Save { folder, contents: Contents::Training, overwrite: false, metadata: json!({}) };
    let id = submit(call.app, call.tenant, &model, Task::Save(save))?;
    Ok(Kill { model, save: Some((id, checkpoint.uri("xorl"))) })
}

/// Submits a step of the end of a session, whose future only the server asks for.
fn submit(app: &App, tenant: &Tenant, model: &ModelId, task: Task) -> Result<String, Fault> {
    let render = Box::new(|_: &Reply, _| Body::json(&json!({})));
    app.submit(Submission { tenant, model, call: "kill_session", number: None, task, render })
}

/// Waits for the save of a session, and then unloads it. A session that could not be saved goes on.
///
/// # Errors
/// The server takes no request now.
async fn end(app: &Arc<App>, tenant: &Tenant, kill: Kill) -> Result<Value, Fault> {
    let Kill { model, save } = kill;
    let fails = |message: String| value(&Killed { success: false, message, checkpoint_path: None });
    let (save, path) = save.unzip();
    if let Some(id) = save
        && let Err(text) = settled(app, tenant, &id).await
    {
        return fails(format!("{model} goes on, for it could not be saved: {text}"));
    }
    let unload = submit(app, tenant, &model, Task::Unload)?;
    if let Err(text) = settled(app, tenant, &unload).await {
        return fails(format!("{model} could not be unloaded: {text}"));
    }
    value(&Killed { success: true, message: format!("{model} is unloaded"), checkpoint_path: path })
}

/// Waits until a future is there.
async fn settled(app: &App, tenant: &Tenant, id: &str) -> Result<(), String> {
    match app.futures.wait(id, tenant, Some(KILL_TIME)).await {
        Look::Done(outcome) => match outcome.answer() {
            Ok(_) => Ok(()),
            Err(refusal) => Err(refusal.to_string()),
        },
        Look::Pending(place) => Err(place.reason()),
        Look::Unknown => Err("its result is no longer kept".into()),
    }
}
