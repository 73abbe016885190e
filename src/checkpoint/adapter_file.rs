//! The tensors of a stored adapter by key: `adapter_model.safetensors`, or where that is absent `adapter_model.bin`.

use super::{CheckpointError, io};
use crate::{dtype::DType, lfs, regular_file};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use std::{
    collections::BTreeMap,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};
use tch::{Kind, TchError, Tensor};

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PICKLE_FILE: &str = "adapter_model.bin";

/// A file of tensors, read whole.
pub(super) struct AdapterFile {
    pub path: PathBuf,
    bytes: Vec<u8>,
    tensors: BTreeMap<String, Entry>,
}

/// Tensors by the keys of a file.
type Tensors = Vec<(String, Entry)>;

/// A tensor, row-major.
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Range<usize>,
}

impl AdapterFile {
    /// Reads the file of the adapter in `directory`.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let [path, pickle] = [WEIGHTS_FILE, PICKLE_FILE].map(|name| directory.join(name));
        let format = |path: &Path, reason: String| CheckpointError::Format { path: path.to_owned(), reason };
        if !path.exists() && !pickle.exists() {
            return Err(format(&path, format!("is missing, and so is {PICKLE_FILE}")));
        }
        let is_pickle = !path.exists();
        let path = if is_pickle { pickle } else { path };
        let mut start = Vec::new();
        regular_file::open(&path)
            .and_then(|file| file.take(64).read_to_end(&mut start))
            .map_err(io(&path))?;
        if lfs::is_pointer(&start) {
            return Err(format(
                &path,
                "a pointer of Git LFS stands in place of the tensors: run `git lfs pull`".into(),
            ));
        }
        let (tensors, bytes) = if is_pickle {
            let remedy = "libtorch reads no tensors from it: load it in PEFT and save it as safetensors";
            unpickled(&path).map_err(|_| format(&path, remedy.into()))?
        } else {
            let bytes = std::fs::read(&path).map_err(io(&path))?;
            (header(&bytes).map_err(|error| format(&path, error.to_string()))?, bytes)
        };
        let tensors = by_key(tensors).map_err(|reason| format(&path, reason))?;
        Ok(Self { path, bytes, tensors })
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.tensors.get(key)
    }

    /// The values of a tensor in fp32; `None` for one that is not of floating-point numbers.
    pub fn floats(&self, entry: &Entry) -> Option<Vec<f32>> {
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            _ => return None,
        };
        let data = &self.bytes[entry.data.clone()];
        let mut values = vec![0f32; data.len() / dtype.size()];
        dtype.convert(data, DType::F32, bytemuck::cast_slice_mut(&mut values));
        Some(values)
    }
}

/// The tensors of a safetensors file, with their places in it.
fn header(bytes: &[u8]) -> Result<Tensors, safetensors::SafeTensorError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes)?;
    // Behind the header's length and the header.
    let start = size_of::<u64>() + header;
    let entry = |(key, info): (String, &TensorInfo)| {
        let (from, to) = info.data_offsets;
        (key, Entry { dtype: info.dtype, shape: info.shape.clone(), data: start + from..start + to })
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}

/// The tensors of a file of torch.save in fp32, with their places in the data beside them. libtorch reads it, which
/// builds tensors and runs no code.
fn unpickled(path: &Path) -> Result<(Tensors, Vec<u8>), TchError> {
    let (mut tensors, mut data) = (Vec::new(), Vec::new());
    for (key, tensor) in Tensor::loadz_multi(path)? {
        let start = data.len();
        let dtype = if tensor.is_floating_point() { Dtype::F32 } else { Dtype::U8 };
        let values = Vec::<f32>::try_from(tensor.f_to_kind(Kind::Float)?.f_reshape(-1)?)?;
        data.extend_from_slice(bytemuck::cast_slice(&values));
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        tensors.push((key, Entry { dtype, shape, data: start..data.len() }));
    }
    Ok((tensors, data))
}

/// The tensors by the keys that PEFT saves. `lora_A.default.weight`, the name inside a PEFT model, is another spelling.
fn by_key(tensors: Tensors) -> Result<BTreeMap<String, Entry>, String> {
    let mut named = BTreeMap::new();
    for (key, entry) in tensors {
        let short = [("lora_A", ".weight"), ("lora_B", ".weight"), ("lora_magnitude_vector", "")]
            .iter()
            .find_map(|(factor, end)| {
                let start = key.strip_suffix(&format!(".{factor}.default.weight"))?;
                Some(format!("{start}.{factor}{end}"))
            });
        let name = short.unwrap_or_else(|| key.clone());
        if named.insert(name.clone(), entry).is_some() {
            return Err(format!("{name} is there twice, also with .default. in its name; keep one of them"));
        }
    }
    Ok(named)
}
