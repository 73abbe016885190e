//! Saves and loads of one adapter, as the engine carries them out. All ranks call them together, and get one outcome:
//! an error of any rank has its text on every rank, so that rank 0 can answer with it. Only collectives that fail
//! ([`Error::Comm`], [`Error::Shard`]) differ between ranks; after these the ranks have to end.

use super::request::{Contents, Load, Refusal, Save};
use crate::{
    checkpoint::{
        FolderWriter,
        adapter_store::{self, Reader, Stored},
        peft::{AdapterFolder, StoredAdapter},
        pieces::write_pieces,
        publish::{KnownHashes, publish_together},
        saves,
        state::{Accumulated, AdapterState},
    },
    comm::Communicator,
    config::{BaseFiles, ExportFormat},
    error::{Error, Result, broadcast_from_root},
    lora::{LoraShapes, Parameter, Site, targets::Projection},
    model::quantized::Quantization,
    session::Session,
    shard::ProcessGroups,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The base that the server's adapters are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Path or hub name, which PEFT finds in a save.
    pub name: String,
    /// [`crate::model::quantized::digest`]
    pub digest: String,
    /// Its storage, if it is quantised.
    pub quantization: Option<Quantization>,
    pub files: BaseFiles,
    /// Key of its weights if they are random and have no file.
    pub seed: u64,
}

/// The outcome of a load, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Updates that the optimizer has seen; 0 if it is as new.
    pub step: u64,
    /// Passes whose gradient was loaded.
    pub accumulated: Accumulated,
}

/// The failure of a rank, for the others.
#[derive(Serialize, Deserialize)]
struct Failed {
    text: String,
    code: i32,
}

/// Saves `session`, and with [`Contents::Training`] its optimizer and the gradient of the passes that `accumulated`
/// counts; [`merged`](super::merged) saves a merged model. Returns the folder and the bytes of its files on rank 0,
/// `None` elsewhere. Collective; nothing of the session changes.
///
/// # Errors
/// The same on every rank: `save.folder` is a save already and is not to be overwritten, or is no save; a disk fails.
/// An earlier save of the name is untouched then.
pub fn save(
    session: &Session,
    groups: &ProcessGroups,
    base: &Base,
    accumulated: Accumulated,
    save: &Save,
) -> Result<Option<(PathBuf, u64)>> {
    let world = &*groups.world;
    let whole = session.adapter.whole()?;
    let trains = save.contents == Contents::Training;
    let with_gradient = trains && accumulated.passes > 0;
    let gradients = with_gradient.then(|| session.adapter.reduced_gradients()).transpose()?;
    let sites = session.adapter.plan().sites();
    let shapes = LoraShapes::of_sites(&sites)
        .ok_or_else(|| Error::Input(format!("adapter {} has no module that could be saved", session.name)))?;
    let state = trains.then(|| AdapterState {
        accumulated: with_gradient.then_some(accumulated),
        ..adapter_store::state_of(session, &shapes, &groups.mesh, &base.digest, base.quantization.as_ref())
    });
    let opened = if groups.rank == 0 {
        let sites: Vec<Site> = sites.into_iter().map(|(site, _)| site.clone()).collect();
        open(save, state.as_ref(), whole, &sites, &shapes, base).map(Some)
    } else {
        Ok(None)
    };
    let write_own = |hidden: &Path| {
        if state.is_none() || groups.mesh.coordinates(groups.rank).replicate > 0 {
            return Ok(());
        }
        let pieces = adapter_store::pieces_of(session, &groups.device, gradients.as_deref())?;
        Ok(write_pieces(hidden, groups.rank, groups.mesh.world(), &pieces)?)
    };
    publish_together(world, |own| same_outcome(world, own), opened, write_own, publish)
}

/// Makes a save visible. Returns its folder and the bytes of its files.
pub(super) fn publish(writer: FolderWriter) -> Result<(PathBuf, u64)> {
    let folder = writer.publish(&mut KnownHashes::default())?;
    let bytes = saves::bytes_below(&folder);
    Ok((folder, bytes))
}

/// Rank 0's files of a save, still hidden.
fn open(
    save: &Save,
    state: Option<&AdapterState>,
    whole: Vec<(Parameter, Vec<f32>)>,
    sites: &[Site],
    shapes: &LoraShapes,
    base: &Base,
) -> Result<FolderWriter> {
    let mut writer = saves::begin(&save.folder, save.overwrite)?;
    if let Some(state) = state {
        adapter_store::open_state(&mut writer, state, |folder| state.write(folder))?;
    }
    let (name, format) = (Some(base.name.clone()), ExportFormat::Peft);
    let export = adapter_store::Export { sites, shapes, base: name, format, dropout: 0.0, subtracted: None };
    adapter_store::write_adapter(writer.directory(), whole, export)?;
    saves::write_metadata(&writer, &save.metadata)?;
    Ok(writer)
}

/// Loads a save of any world, or a step of a local run, into `session`. With `load.optimizer`, and if the folder has
/// training state, the optimizer and what was accumulated come with it; otherwise the optimizer is as new and nothing
/// is accumulated. Collective.
///
/// # Errors
/// The same on every rank, and the session is as it was: the folder is not whole, or was saved with another shape, base
/// or optimizer.
pub fn load(session: &mut Session, groups: &ProcessGroups, base: &Base, load: &Load) -> Result<Loaded> {
    let folder = found(&load.folder, groups)?;
    let optimizer = load.optimizer.then(|| session.optimizer.kind());
    let (mesh, rank, adapter) = (&groups.mesh, groups.rank, &session.adapter);
    let read = Reader { adapter, mesh, rank, base: &base.digest, optimizer }.read(&folder);
    let stored: Stored = same_outcome(&*groups.world, read.map_err(Error::from))?;
    let accumulated = stored.restore(session)?;
    Ok(Loaded { step: session.optimizer.updates(), accumulated })
}

/// The directory of the save `folder`, whole, as rank 0 finds it. Collective.
fn found(folder: &Path, groups: &ProcessGroups) -> Result<PathBuf> {
    let world = &*groups.world;
    let found = if groups.rank == 0 { saves::whole(folder) } else { Ok(PathBuf::new()) };
    let found = same_outcome(world, found.map_err(Error::from))?;
    Ok(broadcast_from_root(world, &found.to_string_lossy())?.into())
}

/// The adapter in `directory`, a save or a step of a local run.
fn stored(directory: &Path, base: &Base) -> Result<AdapterFolder> {
    let state = AdapterState::read(directory)?;
    adapter_store::check_base(directory, state.as_ref(), &base.digest)?;
    Ok(AdapterFolder::open(directory)?)
}

/// Sites and shapes of the adapter in the save `folder`, on a model of `projections`.
///
/// # Errors
/// The folder is not whole, was saved on another base, or does not fit the model.
pub fn shapes(folder: &Path, base: &Base, projections: &[Projection]) -> Result<(Vec<Site>, LoraShapes)> {
    let stored = stored(&saves::whole(folder)?, base)?;
    let sites = stored.sites(projections);
    let shapes = stored.shapes(&sites)?;
    Ok((sites, shapes))
}

/// The values of the adapter in the save `folder`, of any shape, on a model of `projections`. Collective.
///
/// # Errors
/// The same on every rank: those of [`shapes`], and values that are missing.
pub fn values(
    folder: &Path,
    groups: &ProcessGroups,
    base: &Base,
    projections: &[Projection],
) -> Result<StoredAdapter> {
    let folder = found(folder, groups)?;
    let read = stored(&folder, base).and_then(|stored| Ok(stored.adapter(projections)?));
    same_outcome(&*groups.world, read)
}

/// The answer to a client for an error of [`save`], [`load`] or [`values`].
pub fn refusal(error: &Error) -> Refusal {
    match error.exit_code() {
        2 => Refusal::User(error.to_string()),
        _ => Refusal::Server(error.to_string()),
    }
}

/// Every rank's own result where all succeeded, otherwise on every rank the error of the first that failed. Collective.
pub(super) fn same_outcome<T>(world: &dyn Communicator, own: Result<T>) -> Result<T> {
    let failed = own.as_ref().err().map(|error| Failed { text: error.to_string(), code: error.exit_code() });
    let bytes = failed.map(|failed| serde_json::to_vec(&failed).unwrap_or_default()).unwrap_or_default();
    let all = world.all_gather_host(&bytes)?;
    let Some(first) = all.iter().position(|said| !said.is_empty()) else { return own };
    if first == world.rank() {
        return own;
    }
    Err(match serde_json::from_slice(&all[first]) {
        Ok(Failed { text, code: 2 }) => Error::Input(text),
        Ok(Failed { text, .. }) => Error::Failure(text),
        Err(error) => {
            Error::Failure(format!("rank {first} has failed, and its error cannot be read: {error}"))
        }
    })
}
