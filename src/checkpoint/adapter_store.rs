//! One trained adapter into a folder and back: values, optimizer and accumulated gradient. A step of a local run and a
//! save of a server are written and read by these functions.

use super::{
    AdapterConfig, CheckpointError, FolderWriter, io,
    peft::{self, AdapterFolder},
    pieces::{GRADIENT, MASTER, Pieces, read_pieces},
    reshard::{self, Cut},
    state::{self, Accumulated, AdapterState, OptimizerState},
};
use crate::{
    config::{self, ExportFormat},
    device::{RankDevice, Staging},
    lora::{Adapter, LoraShapes, Parameter, Site, pissa},
    mesh::Mesh,
    model::quantized::Quantization,
    optim::{self, Optimizer},
    session::Session,
    shard::{FlatRegion, ShardError},
};
use std::{collections::HashMap, path::Path};
use tch::{Kind, Tensor};

/// The state of `session`. `base`: digest of the base, which is stored as `quantization` says.
pub fn state_of(
    session: &Session,
    shapes: &LoraShapes,
    mesh: &Mesh,
    base: &str,
    quantization: Option<&Quantization>,
) -> AdapterState {
    let numbers = session.optimizer.numbers();
    AdapterState {
        world: mesh.world(),
        shards: mesh.block(),
        optimizer: OptimizerState {
            kind: session.optimizer.kind(),
            updates: session.optimizer.updates(),
            numbers: numbers.iter().map(|number| (number.field.to_owned(), number.value)).collect(),
        },
        lora: shapes.clone(),
        base: base.to_owned(),
        pissa: false,
        quantization: quantization.cloned(),
        regions: session.adapter.plan().flat().cloned().collect(),
        accumulated: None,
    }
}

/// Opens `training_state/` of a folder that is being written: `write` writes the file of `state` into the directory
/// that it is handed, and the files with the pieces of all shards are expected.
///
/// # Errors
/// The regions of `state` do not hold their parameters.
pub fn open_state(
    writer: &mut FolderWriter,
    state: &AdapterState,
    write: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    reshard::check(state.cut()).map_err(|reason| CheckpointError::Mismatch {
        path: writer.directory().to_owned(),
        reason: format!("its shards do not tile its shapes: {reason}"),
    })?;
    let folder = writer.directory().join(state::FOLDER);
    std::fs::create_dir(&folder).map_err(io(&folder))?;
    write(writer.directory())?;
    state.piece_files().for_each(|file| writer.expect(file));
    Ok(())
}

/// What a file of an adapter says beside its values.
pub struct Export<'a> {
    pub sites: &'a [Site],
    pub shapes: &'a LoraShapes,
    /// The base's path or name.
    pub base: Option<String>,
    pub format: ExportFormat,
    /// Dropout of training.
    pub dropout: f64,
    /// A₀ and B₀ that were taken from the base.
    pub subtracted: Option<&'a pissa::Values>,
}

/// Writes `whole`, the values of an adapter, as PEFT reads them.
pub fn write_adapter(
    directory: &Path,
    whole: Vec<(Parameter, Vec<f32>)>,
    export: Export,
) -> Result<(), CheckpointError> {
    let Export { sites, shapes, base, format, dropout, subtracted } = export;
    let (whole, shapes) = match subtracted {
        Some(first) => (pissa::with_subtracted(whole, first), &pissa::of_twice_the_rank(shapes)),
        None => (whole, shapes),
    };
    let mut whole: HashMap<String, Vec<f32>> =
        whole.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
    let adapters = peft::adapters(sites, shapes, |name| whole.remove(name));
    let config = AdapterConfig::new(shapes.common, base, &adapters, format);
    let config = AdapterConfig { lora_dropout: dropout, ..config };
    peft::write(directory, &config, &adapters, format)
}

/// This rank's pieces of `session`. `gradients`: those of [`Adapter::reduced_gradients`], to be stored too.
pub fn pieces_of(
    session: &Session,
    device: &RankDevice,
    gradients: Option<&[Tensor]>,
) -> Result<Pieces, ShardError> {
    let mut pieces = Pieces::default();
    let mut staging = Staging::new(device)?;
    for (place, piece) in session.adapter.pieces().enumerate() {
        let region = &piece.region.name;
        pieces.insert(region, MASTER, staging.fetch(piece.master)?);
        for (name, tensor) in &session.optimizer.state()[piece.region] {
            pieces.insert(region, name, staging.fetch(&tensor.to_kind(Kind::Float))?);
        }
        if let Some(gradients) = gradients {
            pieces.insert(region, GRADIENT, staging.fetch(&gradients[place])?);
        }
    }
    Ok(pieces)
}

/// Moves pieces that were read for this rank into its masters, the optimizer's state, and where `state` has one, the
/// accumulated gradient.
///
/// # Errors
/// A piece that was not read (a bug).
pub fn restore(
    state: &AdapterState,
    mut pieces: Pieces,
    adapter: &mut Adapter,
    optimizer: &mut Optimizer,
) -> Result<(), CheckpointError> {
    let mut take = |region: &FlatRegion, name: &str| {
        let values = pieces.take(&region.name, name);
        let absent = || CheckpointError::NotRead { region: region.name.clone(), tensor: name.to_owned() };
        Ok::<_, CheckpointError>(Tensor::from_slice(&values.ok_or_else(absent)?))
    };
    for piece in adapter.pieces() {
        piece.master.shallow_clone().copy_(&take(piece.region, MASTER)?);
        for (name, tensor) in &optimizer.state()[piece.region] {
            tensor.shallow_clone().copy_(&take(piece.region, name)?);
        }
    }
    if state.accumulated.is_some() {
        adapter.set_reduced_gradients(|region| take(region, GRADIENT))?;
    }
    optimizer.set_updates(state.optimizer.updates);
    Ok(adapter.regions_mut().refresh()?)
}

/// Checks that the adapter in `folder`, of `state` if it has one, was trained on the base of digest `base`.
pub fn check_base(folder: &Path, state: Option<&AdapterState>, base: &str) -> Result<(), CheckpointError> {
    match state {
        Some(state) if state.base != base => {
            let reason = "it was trained on another base".into();
            Err(CheckpointError::Mismatch { path: folder.to_owned(), reason })
        }
        _ => Ok(()),
    }
}

/// A stored adapter that fits another one, as this rank needs it.
pub enum Stored {
    /// Pieces of a folder with training state.
    Trained { state: Box<AdapterState>, pieces: Pieces },
    /// A and B by logical parameter name.
    Values(HashMap<String, Vec<f32>>),
}

/// The adapter that a folder is read for.
pub struct Reader<'a> {
    pub adapter: &'a Adapter,
    pub mesh: &'a Mesh,
    pub rank: usize,
    /// Digest of the base.
    pub base: &'a str,
    /// Reads the training state too, if the folder has one: that of an optimizer of this kind.
    pub optimizer: Option<config::Optimizer>,
}

impl Reader<'_> {
    /// Reads the whole folder `folder`, a save or a step of a local run, in any world.
    ///
    /// # Errors
    /// Files that cannot be read, and an adapter of another shape, another base or another optimizer.
    pub fn read(&self, folder: &Path) -> Result<Stored, CheckpointError> {
        let mismatch = |reason: String| CheckpointError::Mismatch { path: folder.to_owned(), reason };
        let state = AdapterState::read(folder)?;
        check_base(folder, state.as_ref(), self.base)?;
        let (Some(kind), Some(state)) = (self.optimizer, state) else {
            return self.values(folder).map(Stored::Values);
        };
        if state.optimizer.kind != kind {
            let (stored, own) = (state.optimizer.kind, kind);
            return Err(mismatch(format!("its optimizer is {stored:?}, not {own:?}; load it without")));
        }
        if state.pissa {
            let reason = "its training state belongs to a base that lacks what it started with (lora.init_lora_weights: \
                          pissa); load it without its optimizer";
            return Err(mismatch(reason.into()));
        }
        self.same_shapes(folder, &state.lora)?;
        let regions: Vec<FlatRegion> = self.adapter.plan().flat().cloned().collect();
        let own = Cut { regions: &regions, shards: self.mesh.block() };
        let gradient = state.accumulated.map(|_| GRADIENT);
        let names: Vec<&str> = optim::state_names(kind).iter().copied().chain(gradient).collect();
        let pieces = read_pieces(folder, &state, own, self.rank % self.mesh.block(), &names);
        let pieces = pieces.map_err(|error| match error {
            CheckpointError::Unfit { path, reason } => CheckpointError::Mismatch { path, reason },
            other => other,
        })?;
        Ok(Stored::Trained { state: Box::new(state), pieces })
    }

    /// A and B from the files that PEFT reads.
    fn values(&self, folder: &Path) -> Result<HashMap<String, Vec<f32>>, CheckpointError> {
        let sites: Vec<Site> = self.adapter.plan().sites().iter().map(|(site, _)| (*site).clone()).collect();
        let stored = AdapterFolder::open(folder)?;
        let shapes = stored.shapes(&sites)?;
        self.same_shapes(folder, &shapes)?;
        stored.values(&sites, &shapes)
    }

    fn same_shapes(&self, folder: &Path, stored: &LoraShapes) -> Result<(), CheckpointError> {
        let sites = self.adapter.plan().sites();
        let differs = sites.into_iter().find(|(site, own)| stored.of(site) != *own);
        let Some((site, own)) = differs else { return Ok(()) };
        let of_site = |shape| format!("{shape} on {}", site.path());
        Err(CheckpointError::OtherShape {
            path: folder.to_owned(),
            stored: of_site(stored.of(site)),
            own: of_site(own),
        })
    }
}

impl Stored {
    /// Moves it into `session`. The optimizer is as new and nothing is accumulated, unless training state was read.
    /// Returns what is accumulated then.
    pub fn restore(self, session: &mut Session) -> Result<Accumulated, CheckpointError> {
        let Session { adapter, optimizer, .. } = session;
        adapter.regions_mut().zero_gradients();
        match self {
            Self::Trained { state, pieces } => {
                restore(&state, pieces, adapter, optimizer)?;
                Ok(state.accumulated.unwrap_or_default())
            }
            Self::Values(values) => {
                adapter.set(|parameter, range| values[&parameter.name][range].to_vec())?;
                optimizer.reset();
                Ok(Accumulated::default())
            }
        }
    }
}
