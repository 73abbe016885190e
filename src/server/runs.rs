//! Training runs: the adapters that a client has trained, while they are in memory and later by their saves. A record
//! beside the saves keeps what these do not tell.

use super::{
    app::App,
    checkpoints::{StoreError, Stored},
    fault::Fault,
    labels::{self, About},
    paths::Kind,
    registry::Tenant,
    request::{AdapterSpec, ModelId},
};
use crate::checkpoint::saves;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// The record of a run, in the folder of its weights.
const RECORD: &str = ".run.json";

/// The facts that a client gave for a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub spec: AdapterSpec,
    pub user_metadata: Option<BTreeMap<String, String>>,
}

/// A training run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub id: ModelId,
    /// The rank of its adapter, if a record or a save tells it.
    pub rank: Option<usize>,
    pub user_metadata: Option<BTreeMap<String, String>>,
    pub last_request: SystemTime,
    /// Oldest first.
    pub saves: Vec<(Stored, About)>,
}

fn record_path(model: &ModelId) -> PathBuf {
    [Kind::Weights.folder(), &model.folder(), RECORD].iter().collect()
}

/// Writes the record of a run.
///
/// # Errors
/// The file cannot be written.
pub fn record(root: &Path, model: &ModelId, record: &Record) -> Result<(), StoreError> {
    labels::write(root, &record_path(model), record)
}

/// The models with a folder for saves, perhaps an empty one.
pub fn saved(root: &Path) -> BTreeSet<ModelId> {
    let entries = Kind::ALL.map(|kind| fs::read_dir(root.join(kind.folder())));
    let entries = entries.into_iter().flatten().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| ModelId::new(saves::name_of(&name)).ok()).collect()
}

/// A run that has an adapter (`live`: its rank and the time of its last request) or saves.
fn run(root: &Path, id: ModelId, live: Option<(usize, SystemTime)>) -> Option<Run> {
    let saves = labels::list(root, &id);
    if live.is_none() && saves.is_empty() {
        return None;
    }
    let record: Option<Record> = labels::read(root, &record_path(&id));
    let of_saves = || saves.iter().rev().find_map(|(_, about)| Some(about.spec.as_ref()?.rank));
    let rank =
        live.map(|(rank, _)| rank).or(record.as_ref().map(|record| record.spec.rank)).or_else(of_saves);
    let last_save = || saves.last().map_or(UNIX_EPOCH, |(stored, _)| stored.time);
    let last_request = live.map_or_else(last_save, |(_, time)| time);
    Some(Run { id, rank, user_metadata: record.and_then(|record| record.user_metadata), last_request, saves })
}

/// The run `id` of a tenant.
///
/// # Errors
/// There is none, or the tenant's folder cannot be made.
pub fn find(app: &App, tenant: &Tenant, id: &str) -> Result<Run, Fault> {
    let absent = || {
        let shown: String = id.chars().take(128).collect();
        Fault::not_found(format!(
            "training run {shown:?} is not known; training_runs names those that there are"
        ))
    };
    let model = ModelId::new(id).map_err(|_| absent())?;
    let live = app.registry().get(tenant, &model).map(|known| (known.spec.rank, known.last_request));
    run(&app.root(tenant)?, model, live).ok_or_else(absent)
}

/// All runs of a tenant, the one with the last request first.
///
/// # Errors
/// The tenant's folder cannot be made.
pub fn list(app: &App, tenant: &Tenant) -> Result<Vec<Run>, Fault> {
    let root = app.root(tenant)?;
    let mut live: BTreeMap<ModelId, (usize, SystemTime)> = {
        let registry = app.registry();
        registry.of(tenant).map(|(id, known)| (id.clone(), (known.spec.rank, known.last_request))).collect()
    };
    let ids: BTreeSet<ModelId> = saved(&root).into_iter().chain(live.keys().cloned()).collect();
    let mut runs: Vec<Run> = ids
        .into_iter()
        .filter_map(|id| {
            let live = live.remove(&id);
            run(&root, id, live)
        })
        .collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run.last_request));
    Ok(runs)
}
