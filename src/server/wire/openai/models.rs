//! The models that a client can ask: the base, its own adapters, and its saves by their paths. A name that an adapter
//! shares with the base is the base's.

use super::{
    answers::{Model, Models},
    fault::Refused,
};
use crate::server::{
    app::App,
    fault::Fault,
    registry::Tenant,
    request::{ModelId, Source},
};
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// The base first, then the adapters of `tenant` by name, those included that are made when they are first asked.
pub fn list(app: &App, tenant: &Tenant) -> Models {
    let started = unix_seconds(SystemTime::now() - app.history.age());
    let base = &app.settings.base_model;
    let mut ids: BTreeSet<String> = {
        let registry = app.registry();
        let declared = app.settings.model_ids.iter().filter(|id| !registry.is_lost(tenant, id));
        registry.of(tenant).map(|(id, _)| id).chain(declared).map(ModelId::to_string).collect()
    };
    ids.remove(base);
    let of_adapter = |id| Model {
        id,
        object: "model",
        created: started,
        owned_by: tenant.name().to_owned(),
        parent: Some(base.clone()),
    };
    let of_base = Model {
        id: base.clone(),
        object: "model",
        created: started,
        owned_by: "system".into(),
        parent: None,
    };
    Models { object: "list", data: std::iter::once(of_base).chain(ids.into_iter().map(of_adapter)).collect() }
}

/// The model of this name.
///
/// # Errors
/// The client has none.
pub fn find(app: &App, tenant: &Tenant, name: &str) -> Result<Model, Refused> {
    let found = list(app, tenant).data.into_iter().find(|model| model.id == name);
    found.ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> Refused {
    let shown: String = name.chars().take(200).collect();
    Refused::no_model(format!("model {shown:?} does not exist; /v1/models lists those that do"))
}

/// The weights that `name` stands for.
///
/// # Errors
/// The client has no such model, or its adapter is lost.
pub fn source(app: &App, tenant: &Tenant, name: &str) -> Result<Source, Refused> {
    let settings = &app.settings;
    if name == settings.base_model || settings.other_names.iter().any(|other| other == name) {
        return Ok(Source::Base);
    }
    if let Some((scheme, _)) = name.split_once("://") {
        let saved = app.saved(tenant, name, scheme);
        let (stored, path) = saved.map_err(|fault| Refused::no_model(fault.detail))?;
        // Tasks of a sampler are carried out in order, so what is sampled from it waits until it is opened.
        let (source, _) = app.open_path(tenant, &stored, &path)?;
        return Ok(source);
    }
    let model = ModelId::new(name).map_err(|_| unknown(name))?;
    let mut registry = app.registry();
    if let Some(text) = registry.lost(tenant, &model) {
        return Err(Refused::no_model(text));
    }
    app.ensure(&mut registry, tenant, &model)?;
    let known = registry.get(tenant, &model).ok_or_else(|| unknown(name))?;
    known.last_request = SystemTime::now();
    let id = tenant.engine_id(&model).map_err(|error| Fault::user(error.to_string()))?;
    Ok(Source::Adapter(id))
}
