//! Models and data sets of the hub that a command names: in the cache of every host before the ranks read them.

use crate::{
    checkpoint::steps,
    comm::World,
    config::{self, DataArgs, HubModel, ModelArgs, Override},
    error::{Error, Result, agree, broadcast_from_root},
    hub::{self, HubError, HubId, Pinned, Subset, Wanted},
};
use std::path::Path;

/// A repository of the hub, and the field or flag that names it.
pub(super) struct Named {
    place: String,
    id: HubId,
    wanted: Wanted,
}

/// The models and data sets of a run. None of a configuration that is refused: whoever prepares the run says why.
pub(super) fn of_run(path: &Path, overrides: &[Override]) -> Vec<Named> {
    let loaded = config::load_with_paths(path, overrides).ok();
    let named = loaded.map(|loaded| {
        let mut named = of_model(&loaded.config.model, |key| loaded.places.of(&format!("model.{key}")));
        named.extend(of_data(&loaded.config.data, |field| loaded.places.of(field)));
        named
    });
    named.unwrap_or_default()
}

/// The models of a server, as [`of_run`].
pub(super) fn of_server(path: &Path, overrides: &[Override]) -> Vec<Named> {
    let loaded = config::load_server(path, overrides).ok();
    let named =
        loaded.map(|loaded| of_model(&loaded.config.model, |key| loaded.places.of(&format!("server.{key}"))));
    named.unwrap_or_default()
}

fn of_model(model: &ModelArgs, place: impl Fn(&str) -> config::Place) -> Vec<Named> {
    let of_hub = model.of_hub().into_iter();
    let named = |HubModel { key, id, weights }| Named {
        place: place(key).to_string(),
        id,
        wanted: Wanted::Model { weights },
    };
    of_hub.map(named).collect()
}

fn of_data(data: &DataArgs, place: impl Fn(&str) -> config::Place) -> Vec<Named> {
    let named = data.named_sets().filter(|(_, set)| !set.is_dummy()).filter_map(|(field, set)| {
        let place = place(&format!("{field}.path")).to_string();
        Some(Named { place, id: HubId::of_data(&set.path)?, wanted: Wanted::Rows(set.subset()) })
    });
    named.collect()
}

/// The data set of `--data`.
pub(super) fn of_data_flag(data: &Path) -> Option<Named> {
    let id = HubId::of_data(data)?;
    Some(Named { place: "--data".into(), id, wanted: Wanted::Rows(Subset::default()) })
}

/// The model of `--model`, else the base that `adapter` names.
pub(super) fn of_adapter(model: Option<&Path>, adapter: Option<&Path>) -> Vec<Named> {
    let named = |place: String, id| Named { place, id, wanted: Wanted::Model { weights: true } };
    let given = match (model, adapter.map(steps::adapter_folder)) {
        (Some(model), _) => HubId::of_path(model).map(|id| named("--model".into(), id)),
        (None, Some(Ok(adapter))) => {
            let place = format!("{}: its base", adapter.display());
            steps::base_id(&adapter).map(|id| named(place, id))
        }
        (None, _) => None,
    };
    given.into_iter().collect()
}

/// Downloads what `named` gives on rank 0, once on each host, by its first rank. Collective.
///
/// # Errors
/// That of the first rank that has one, and [`Error::Elsewhere`] on the others.
pub(super) fn fetch(world: &World, named: impl FnOnce() -> Vec<Named>) -> Result<()> {
    let everyone = world.group("world", 0);
    let _downloading = world.watcher().slow("download");
    let is_root = world.rank() == 0;
    // All hosts have the commit that rank 0 was told.
    let own = if is_root { pinned(named()).and_then(|pinned| written(&pinned)) } else { Ok(String::new()) };
    let text = broadcast_from_root(&*everyone, &agree(&*everyone, own)?)?;
    let pinned: Vec<(String, Pinned)> = serde_json::from_str(&text)
        .map_err(|error| Error::Failure(format!("names of repositories did not arrive: {error}")))?;
    if pinned.is_empty() {
        return Ok(());
    }
    let own = match world.local_rank() {
        0 => pinned.iter().try_for_each(|(place, pinned)| {
            hub::fetch(pinned, is_root).map_err(|error| failure(place, &pinned.id, &error))
        }),
        _ => Ok(()),
    };
    agree(&*everyone, own)
}

/// The repositories at commits, those that are wanted twice once.
fn pinned(named: Vec<Named>) -> Result<Vec<(String, Pinned)>> {
    let mut all: Vec<(String, Pinned)> = Vec::new();
    for Named { place, id, wanted } in named {
        if all.iter().any(|(_, known)| known.id == id && known.wanted.covers(&wanted)) {
            continue;
        }
        let pinned = hub::pin(&id, &wanted).map_err(|error| failure(&place, &id, &error))?;
        all.push((place, pinned));
    }
    Ok(all)
}

fn written(pinned: &[(String, Pinned)]) -> Result<String> {
    serde_json::to_string(pinned).map_err(|error| Error::Failure(error.to_string()))
}

fn failure(place: &str, id: &HubId, error: &HubError) -> Error {
    let text = format!("{place}: {id}: {error}");
    if error.is_input() { Error::Input(text) } else { Error::Failure(text) }
}
