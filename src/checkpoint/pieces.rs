//! Pieces of an adapter by name, as they are stored: `optimizer-{rank}-of-{world}.safetensors` in `training_state/`
//! holds one rank's, the fp32 master of each region, the optimizer's state tensors, and the gradient where a save has
//! one, under `{region}.{tensor}`.
//!
//! With replicas only the ranks of the first copy write. They own all pieces between them: as many files as shards.

use super::{
    CheckpointError, io,
    publish::sync,
    reshard::{self, Cut, Move},
    state::{AdapterState, FOLDER},
};
use crate::{regular_file, shard::FlatRegion};
use fail::fail_point;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The tensor of every region that the optimizer updates; the others are the optimizer's state, and [`GRADIENT`].
pub const MASTER: &str = "master";
/// The accumulated gradient of every region, summed over all ranks, where there is one.
pub const GRADIENT: &str = "gradient";

/// One rank's pieces: flat fp32 tensors `[piece elements]` by region and name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pieces(pub(super) BTreeMap<String, BTreeMap<String, Vec<f32>>>);

impl Pieces {
    pub fn insert(&mut self, region: &str, tensor: &str, values: Vec<f32>) {
        self.0.entry(region.to_owned()).or_default().insert(tensor.to_owned(), values);
    }

    /// Takes a tensor out, so that it need not be held twice.
    pub fn take(&mut self, region: &str, tensor: &str) -> Option<Vec<f32>> {
        self.0.get_mut(region)?.remove(tensor)
    }

    /// Zeros for `tensors` of every region of `own`.
    fn zeros(own: Cut, tensors: &[&str]) -> Self {
        let zeros = |region: &FlatRegion| {
            let named = tensors.iter().map(|&tensor| (tensor.to_owned(), vec![0.0; region.piece]));
            (region.name.clone(), named.collect())
        };
        Self(own.regions.iter().map(zeros).collect())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str, &Vec<f32>)> {
        self.0.iter().flat_map(|(region, tensors)| {
            tensors.iter().map(move |(tensor, values)| (region.as_str(), tensor.as_str(), values))
        })
    }
}

/// The file of rank `rank` of `world`, in a step.
pub(super) fn optimizer_file(rank: usize, world: usize) -> String {
    format!("{FOLDER}/optimizer-{rank}-of-{world}.safetensors")
}

/// Writes the pieces of rank `rank` of `world` into the step directory `step`, and waits until they are on the disk:
/// another node's sync would not bring them there.
pub fn write_pieces(step: &Path, rank: usize, world: usize, pieces: &Pieces) -> Result<(), CheckpointError> {
    let path = step.join(optimizer_file(rank, world));
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let mut views = BTreeMap::new();
    for (region, tensor, values) in pieces.iter() {
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
        views.insert(key(region, tensor), view.map_err(|error| format(error.to_string()))?);
    }
    let bytes = safetensors::serialize(views, None).map_err(|error| format(error.to_string()))?;
    fail_point!("pieces.begun");
    fs::write(&path, bytes).map_err(io(&path))?;
    fail_point!("pieces.written");
    sync(&path)?;
    fail_point!("pieces.synced");
    Ok(())
}

/// Reads the pieces that shard `shard` of `own` owns after a resume from `step`, whose state is `state`: the master and
/// the tensors `names` of every region. Reads the files that hold a part of them, and of those that part.
///
/// # Errors
/// Parameters that differ from the stored ones, and files that do not hold what `state` says.
pub fn read_pieces(
    step: &Path,
    state: &AdapterState,
    own: Cut,
    shard: usize,
    names: &[&str],
) -> Result<Pieces, CheckpointError> {
    let unfit = |reason| CheckpointError::Unfit { path: step.to_owned(), reason };
    let moves = reshard::plan(state.cut(), own, shard).map_err(unfit)?;
    let mut pieces = Pieces::zeros(own, &[&[MASTER], names].concat());
    for stored in 0..state.shards {
        let from_here: Vec<&Move> = moves.iter().filter(|part| part.shard == stored).collect();
        if !from_here.is_empty() {
            PiecesFile::open(step, stored, state)?.copy(&from_here, &mut pieces)?;
            fail_point!("load.pieces");
        }
    }
    Ok(pieces)
}

fn key(region: &str, tensor: &str) -> String {
    format!("{region}.{tensor}")
}

/// One rank's stored pieces, mapped.
struct PiecesFile {
    path: PathBuf,
    map: Mmap,
}

impl PiecesFile {
    fn open(step: &Path, rank: usize, state: &AdapterState) -> Result<Self, CheckpointError> {
        let path = step.join(optimizer_file(rank, state.world));
        let fault =
            |error: std::io::Error| CheckpointError::Format { path: path.clone(), reason: error.to_string() };
        let file = regular_file::open(&path).map_err(fault)?;
        // SAFETY: published steps are not written to. A file that shrinks under us would end the process with
        // SIGBUS, as it would for every reader of mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(fault)?;
        Ok(Self { path, map })
    }

    /// Copies the sources of `moves` from this file into `pieces`.
    fn copy(&self, moves: &[&Move], pieces: &mut Pieces) -> Result<(), CheckpointError> {
        let format = |reason: String| CheckpointError::Format { path: self.path.clone(), reason };
        let file = SafeTensors::deserialize(&self.map).map_err(|error| format(error.to_string()))?;
        for Move { stored, from, own, to, .. } in moves {
            for (tensor, target) in pieces.0.get_mut(&own.name).into_iter().flatten() {
                let key = key(&stored.name, tensor);
                let view = file.tensor(&key).map_err(|_| format(format!("{key} is missing")))?;
                if view.dtype() != Dtype::F32 || view.shape() != [stored.piece] {
                    let (dtype, shape, piece) = (view.dtype(), view.shape(), stored.piece);
                    return Err(format(format!("{key} is {dtype:?} {shape:?}, expected F32 [{piece}]")));
                }
                let bytes = &view.data()[from.start * 4..from.end * 4];
                let values = bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word));
                target[*to..to + from.len()].iter_mut().zip(values).for_each(|(own, value)| *own = value);
            }
        }
        Ok(())
    }
}
