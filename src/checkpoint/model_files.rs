//! Weight files of an HF model as they are written: `model.safetensors`, or shards with their index. All places are
//! known beforehand, so several ranks may write into the same files. A packed matrix is several tensors
//! (`packed_files`).

use super::{
    CheckpointError, io,
    packed_files::{self, Part},
};
use crate::{
    dtype::DType,
    quant::{Format, Grid},
    weights::{SourceError, TensorMeta, WeightSource},
};
use fail::fail_point;
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Bytes of a shard, as transformers has long written them; a larger tensor is a shard of its own.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Elements read at a time.
pub(super) const CHUNK: usize = 1 << 20;

/// The weight files of a model, planned.
pub struct ModelFiles {
    files: Vec<Planned>,
    tensors: BTreeMap<String, FileTensor>,
    places: BTreeMap<String, Place>,
}

/// A tensor of the model as files hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Shape, and dtype of plain numbers; of a packed matrix, the dtype that it stands for.
    pub meta: TensorMeta,
    /// The format of a packed matrix.
    pub format: Option<Format>,
}

impl From<TensorMeta> for FileTensor {
    fn from(meta: TensorMeta) -> Self {
        Self { meta, format: None }
    }
}

impl FileTensor {
    /// The tiles of a packed matrix.
    pub fn grid(&self) -> Option<Grid> {
        let &[rows, columns] = &self.meta.shape[..] else { return None };
        Some(Grid { format: self.format?, rows, columns })
    }

    /// The tensors of the files that hold it.
    fn parts(&self, name: &str) -> Vec<Part> {
        match self.grid() {
            Some(grid) => packed_files::parts(name, grid, self.meta.dtype),
            None => vec![Part::plain(name.to_owned(), &self.meta)],
        }
    }

    fn bytes(&self, name: &str) -> u64 {
        self.parts(name).iter().map(Part::bytes).sum()
    }
}

struct Planned {
    name: String,
    /// Header with its length before it.
    header: Vec<u8>,
    /// Size of the whole file.
    bytes: u64,
}

struct Place {
    file: usize,
    /// First byte in the file.
    start: u64,
}

impl ModelFiles {
    /// Plans files of at most `most` bytes of weights for `tensors`, in their order.
    pub fn new<T: Into<FileTensor>>(tensors: impl IntoIterator<Item = (String, T)>, most: u64) -> Self {
        let tensors: Vec<(String, FileTensor)> =
            tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect();
        let mut shards: Vec<Vec<Part>> = Vec::new();
        let mut filled = 0;
        for (name, tensor) in &tensors {
            let (parts, bytes) = (tensor.parts(name), tensor.bytes(name));
            match shards.last_mut().filter(|_| filled + bytes <= most) {
                Some(shard) => shard.extend(parts),
                None => {
                    filled = 0;
                    shards.push(parts);
                }
            }
            filled += bytes;
        }
        let count = shards.len();
        let name = |number: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let (mut files, mut places) = (Vec::new(), BTreeMap::new());
        for (file, mut shard) in shards.into_iter().enumerate() {
            // Readers want numbers at multiples of their size, and nothing may lie between tensors.
            shard.sort_by_key(|part| std::cmp::Reverse(part.size));
            let (header, end) = header(&shard);
            let mut start = header.len() as u64;
            files.push(Planned { name: name(file), bytes: start + end, header });
            for part in shard {
                let bytes = part.bytes();
                places.insert(part.name, Place { file, start });
                start += bytes;
            }
        }
        Self { files, tensors: tensors.into_iter().collect(), places }
    }

    /// The tensors of the model by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &FileTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tiles of the packed matrix `tensor`; `None` for plain numbers.
    pub fn grid(&self, tensor: &str) -> Option<Grid> {
        self.tensors.get(tensor)?.grid()
    }

    /// The format of the packed matrices, if there are such.
    pub fn format(&self) -> Option<Format> {
        self.tensors.values().find_map(|tensor| tensor.format)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|planned| planned.bytes).sum()
    }

    /// The rank of `ranks` that writes each tensor, in the order of [`tensors`](Self::tensors): the largest first, each
    /// to the rank with the fewest bytes so far.
    pub fn owners(&self, ranks: usize) -> Vec<usize> {
        let sizes: Vec<u64> = self.tensors().map(|(name, tensor)| tensor.bytes(name)).collect();
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|&tensor| std::cmp::Reverse(sizes[tensor]));
        let (mut loads, mut owners) = (vec![0; ranks.max(1)], vec![0; sizes.len()]);
        for tensor in order {
            let least = (0..loads.len()).min_by_key(|&rank| loads[rank]).unwrap_or(0);
            owners[tensor] = least;
            loads[least] += sizes[tensor];
        }
        owners
    }

    /// Creates the files in `folder` with their headers and no values, and the index of several.
    pub fn create(&self, folder: &Path) -> Result<(), CheckpointError> {
        for Planned { name, header, bytes } in &self.files {
            let path = folder.join(name);
            let file = File::create(&path).map_err(io(&path))?;
            file.write_all_at(header, 0).and_then(|()| file.set_len(*bytes)).map_err(io(&path))?;
        }
        if self.files.len() > 1 {
            let total: u64 = self.tensors().map(|(name, tensor)| tensor.bytes(name)).sum();
            let map =
                self.places.iter().map(|(name, place)| (name.clone(), json!(self.files[place.file].name)));
            let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(map.collect::<Map<_, _>>())});
            let path = folder.join(INDEX);
            let text = serde_json::to_string_pretty(&index).unwrap_or_default();
            fs::write(&path, text + "\n").map_err(io(&path))?;
        }
        fail_point!("model.created");
        Ok(())
    }

    /// Opens the files in `folder`, which some rank has created.
    pub fn open(&self, folder: &Path) -> Result<ModelWriter<'_>, CheckpointError> {
        let open = |planned: &Planned| {
            let path = folder.join(&planned.name);
            let file = OpenOptions::new().write(true).open(&path).map_err(io(&path))?;
            Ok::<_, CheckpointError>((path, file))
        };
        Ok(ModelWriter { plan: self, files: self.files.iter().map(open).collect::<Result<_, _>>()? })
    }
}

/// Writes values into the files of a model.
pub struct ModelWriter<'a> {
    plan: &'a ModelFiles,
    files: Vec<(PathBuf, File)>,
}

impl ModelWriter<'_> {
    /// Writes `values`, elements of the plain `tensor` in its dtype from element `first` on.
    ///
    /// # Errors
    /// A tensor that was not planned (a bug), or the disk's error.
    pub fn write(&self, tensor: &str, first: usize, values: &[u8]) -> Result<(), CheckpointError> {
        let planned = self.plan.tensors.get(tensor);
        let size = planned.map_or(1, |planned| planned.meta.dtype.size());
        self.write_bytes(tensor, first * size, values)
    }

    /// Writes `bytes` of the tensor that the files call `part`, from its byte `first` on.
    fn write_bytes(&self, part: &str, first: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = self.plan.places.get(part).ok_or_else(|| unplanned(part))?;
        let (path, file) = &self.files[place.file];
        file.write_all_at(bytes, place.start + first as u64).map_err(io(path))
    }

    /// Writes `tiles` of the packed matrix `tensor`, which have the bytes `packed`: a run of [`Grid::runs`].
    ///
    /// # Errors
    /// A tensor that was not planned as packed (a bug), or the disk's error.
    pub fn write_tiles(
        &self,
        tensor: &str,
        tiles: Range<usize>,
        packed: &[u8],
    ) -> Result<(), CheckpointError> {
        let grid = self.grid(tensor)?;
        let written = packed_files::of_tiles(tensor, grid, tiles, packed).map_err(|error| {
            CheckpointError::Format { path: tensor.into(), reason: format!("{error} (a bug)") }
        })?;
        written.iter().try_for_each(|(part, first, bytes)| self.write_bytes(part, *first, bytes))
    }

    /// Writes what the files hold of the packed matrix `tensor` beside its tiles. `global`: its scale.
    ///
    /// # Errors
    /// See [`write_tiles`](Self::write_tiles).
    pub fn write_beside(&self, tensor: &str, global: f32) -> Result<(), CheckpointError> {
        let planned = self.plan.tensors.get(tensor).ok_or_else(|| unplanned(tensor))?;
        let beside = packed_files::beside(tensor, self.grid(tensor)?, planned.meta.dtype, global);
        beside.iter().try_for_each(|(part, bytes)| self.write_bytes(part, 0, bytes))
    }

    fn grid(&self, tensor: &str) -> Result<Grid, CheckpointError> {
        self.plan.grid(tensor).ok_or_else(|| unplanned(tensor))
    }

    /// Writes the whole `tensor` as `source` has it: plain numbers in its dtype, tiles of a packed matrix.
    ///
    /// # Errors
    /// The source's, or see [`write`](Self::write).
    pub fn copy_whole(&self, source: &dyn WeightSource, tensor: &str) -> Result<(), CheckpointError> {
        let planned = self.plan.tensors.get(tensor).ok_or_else(|| unplanned(tensor))?;
        let Some(grid) = planned.grid() else {
            return self.copy(source, tensor, 0..planned.meta.shape.iter().product());
        };
        let global = source.packed(tensor).map_or(1.0, |form| form.global);
        for run in grid.runs(0..grid.tiles()) {
            let mut bytes = vec![0; run.len() * grid.format.tile().bytes];
            source.read_packed(tensor, grid.format, global, run.clone(), &mut bytes).map_err(fault)?;
            self.write_tiles(tensor, run, &bytes)?;
        }
        self.write_beside(tensor, global)
    }

    /// Writes the elements `range` of the plain `tensor` as `source` has them, in the tensor's dtype.
    pub fn copy(
        &self,
        source: &dyn WeightSource,
        tensor: &str,
        range: Range<usize>,
    ) -> Result<(), CheckpointError> {
        let dtype = self.plan.tensors.get(tensor).map_or(DType::F32, |planned| planned.meta.dtype);
        let mut buffer = vec![0; range.len().min(CHUNK) * dtype.size()];
        for first in range.clone().step_by(CHUNK) {
            let part = first..range.end.min(first + CHUNK);
            let bytes = &mut buffer[..part.len() * dtype.size()];
            source.read(tensor, part, dtype, bytes).map_err(fault)?;
            self.write(tensor, first, bytes)?;
        }
        Ok(())
    }

    /// Waits until what this process wrote is on the disk.
    pub fn sync(&self) -> Result<(), CheckpointError> {
        fail_point!("model.written");
        self.files.iter().try_for_each(|(path, file)| file.sync_data().map_err(io(path)))?;
        fail_point!("model.synced");
        Ok(())
    }
}

/// The error of a tensor that has no place.
fn unplanned(tensor: &str) -> CheckpointError {
    let reason = "the tensor has no such place in the files (a bug)".into();
    CheckpointError::Format { path: tensor.into(), reason }
}

/// The header of a file of `parts` with its length before it, and the bytes behind it.
fn header(parts: &[Part]) -> (Vec<u8>, u64) {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for part in parts {
        let start = end;
        end += part.bytes();
        let entry = json!({"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, end]});
        header.insert(part.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    // Spaces behind the header align the data.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let length = (header.len() as u64).to_le_bytes();
    ([&length[..], header.as_bytes()].concat(), end)
}

/// The error of reading a base, as an error of writing one.
pub(super) fn fault(error: SourceError) -> CheckpointError {
    match error {
        SourceError::Io { path, error } => CheckpointError::Io { path, error },
        other => CheckpointError::Format { path: super::base::FOLDER.into(), reason: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{RandomSource, SafetensorsSource, digest};

    #[test]
    fn shards_that_several_writers_fill_are_one_model() {
        let sizes = [("a", vec![7, 3]), ("b", vec![3]), ("c", vec![50, 2]), ("d", vec![1])];
        let source = RandomSource::new(sizes.map(|(name, shape)| (name.to_owned(), shape)).to_vec(), 0.02, 5);
        let metas = || source.names().into_iter().filter_map(|name| Some((source.meta(&name)?, name)));
        for most in [40, 100, 10_000] {
            let folder = tempfile::tempdir().unwrap();
            let plan = ModelFiles::new(metas().map(|(meta, name)| (name, meta)), most);
            plan.create(folder.path()).unwrap();
            let owners = plan.owners(2);
            assert_eq!(owners.len(), 4);
            assert!(owners.contains(&0) && owners.contains(&1));
            for rank in 0..2 {
                let writer = plan.open(folder.path()).unwrap();
                for ((name, _), _) in plan.tensors().zip(&owners).filter(|(_, owner)| **owner == rank) {
                    writer.copy_whole(&source, name).unwrap();
                }
                writer.sync().unwrap();
            }
            assert_eq!(folder.path().join(INDEX).is_file(), most < 10_000);
            let back = SafetensorsSource::open(folder.path()).unwrap();
            assert_eq!(digest(&back).unwrap(), digest(&source).unwrap(), "{most}");
            let read = |source: &dyn WeightSource| {
                let mut bytes = [0; 400];
                source.read("c", 0..100, DType::F32, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(read(&back), read(&source));
        }
    }
}
