//! Weight files of an HF model as they are written: `model.safetensors`, or shards with their index. All places are
//! known beforehand, so several ranks may write into the same files.

use super::{CheckpointError, io};
use crate::{
    dtype::DType,
    weights::{SourceError, TensorMeta, WeightSource},
};
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
    tensors: BTreeMap<String, Place>,
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
    meta: TensorMeta,
}

/// Bytes of the tensor that `meta` describes.
fn bytes_of(meta: &TensorMeta) -> u64 {
    meta.shape.iter().map(|&size| size as u64).product::<u64>() * meta.dtype.size() as u64
}

impl ModelFiles {
    /// Plans files of at most `most` bytes of weights for `tensors`, in their order.
    pub fn new(tensors: impl IntoIterator<Item = (String, TensorMeta)>, most: u64) -> Self {
        let mut shards: Vec<Vec<(String, TensorMeta)>> = Vec::new();
        let mut filled = 0;
        for (name, meta) in tensors {
            let bytes = bytes_of(&meta);
            match shards.last_mut().filter(|_| filled + bytes <= most) {
                Some(shard) => shard.push((name, meta)),
                None => {
                    filled = 0;
                    shards.push(vec![(name, meta)]);
                }
            }
            filled += bytes;
        }
        let count = shards.len();
        let name = |number: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut plan = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for (file, shard) in shards.into_iter().enumerate() {
            let (header, end) = header(&shard);
            let mut start = header.len() as u64;
            plan.files.push(Planned { name: name(file), bytes: start + end, header });
            for (name, meta) in shard {
                let bytes = bytes_of(&meta);
                plan.tensors.insert(name, Place { file, start, meta });
                start += bytes;
            }
        }
        plan
    }

    /// Dtype and shape of each tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorMeta)> {
        self.tensors.iter().map(|(name, place)| (name.as_str(), &place.meta))
    }

    /// The rank of `ranks` that writes each tensor, in the order of [`tensors`](Self::tensors): the largest first, each
    /// to the rank with the fewest bytes so far.
    pub fn owners(&self, ranks: usize) -> Vec<usize> {
        let sizes: Vec<u64> = self.tensors().map(|(_, meta)| bytes_of(meta)).collect();
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
            let total: u64 = self.tensors().map(|(_, meta)| bytes_of(meta)).sum();
            let map =
                self.tensors.iter().map(|(name, place)| (name.clone(), json!(self.files[place.file].name)));
            let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(map.collect::<Map<_, _>>())});
            let path = folder.join(INDEX);
            let text = serde_json::to_string_pretty(&index).unwrap_or_default();
            fs::write(&path, text + "\n").map_err(io(&path))?;
        }
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
    /// Writes `values`, elements of `tensor` in its dtype from element `first` on.
    ///
    /// # Errors
    /// A tensor that was not planned (a bug), or the disk's error.
    pub fn write(&self, tensor: &str, first: usize, values: &[u8]) -> Result<(), CheckpointError> {
        let place = self.plan.tensors.get(tensor).ok_or_else(|| CheckpointError::Format {
            path: tensor.into(),
            reason: "the tensor has no place in the files (a bug)".into(),
        })?;
        let (path, file) = &self.files[place.file];
        let at = place.start + (first * place.meta.dtype.size()) as u64;
        file.write_all_at(values, at).map_err(io(path))
    }

    /// Writes the elements `range` of `tensor` as `source` has them, in the tensor's dtype.
    pub fn copy(
        &self,
        source: &dyn WeightSource,
        tensor: &str,
        range: Range<usize>,
    ) -> Result<(), CheckpointError> {
        let dtype = self.plan.tensors.get(tensor).map_or(DType::F32, |place| place.meta.dtype);
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
        self.files.iter().try_for_each(|(path, file)| file.sync_data().map_err(io(path)))
    }
}

/// The header of a file of `tensors` with its length before it, and the bytes behind it.
fn header(tensors: &[(String, TensorMeta)]) -> (Vec<u8>, u64) {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, meta) in tensors {
        let start = end;
        end += bytes_of(meta);
        let dtype = match meta.dtype {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F16 => "F16",
        };
        header
            .insert(name.clone(), json!({"dtype": dtype, "shape": meta.shape, "data_offsets": [start, end]}));
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
                for ((name, meta), _) in plan.tensors().zip(&owners).filter(|(_, owner)| **owner == rank) {
                    writer.copy(&source, name, 0..meta.shape.iter().product()).unwrap();
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
