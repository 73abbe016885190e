//! The tensors of a stored adapter by key.

use super::{CheckpointError, io};
use crate::dtype::DType;
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PICKLE_FILE: &str = "adapter_model.bin";

/// A file of tensors, read whole.
pub(super) struct AdapterFile {
    pub path: PathBuf,
    bytes: Vec<u8>,
    tensors: BTreeMap<String, Entry>,
}

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
        if !path.exists() {
            let remedy =
                "it is a pickle; convert it: PeftModel.from_pretrained(MODEL, DIR).save_pretrained(DIR)";
            let is_pickle = pickle.exists();
            return Err(if is_pickle {
                format(&pickle, remedy.into())
            } else {
                format(&path, "is missing".into())
            });
        }
        let bytes = std::fs::read(&path).map_err(io(&path))?;
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(format(
                &path,
                "a pointer of Git LFS stands in place of the tensors: run `git lfs pull`".into(),
            ));
        }
        let tensors = header(&bytes).map_err(|error| format(&path, error.to_string()))?;
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
fn header(bytes: &[u8]) -> Result<Vec<(String, Entry)>, safetensors::SafeTensorError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes)?;
    // Behind the header's length and the header.
    let start = size_of::<u64>() + header;
    let entry = |(key, info): (String, &TensorInfo)| {
        let (from, to) = info.data_offsets;
        (key, Entry { dtype: info.dtype, shape: info.shape.clone(), data: start + from..start + to })
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}

/// The tensors by the keys that PEFT saves. `lora_A.default.weight`, the name inside a PEFT model, is another spelling.
fn by_key(tensors: Vec<(String, Entry)>) -> Result<BTreeMap<String, Entry>, String> {
    let mut named = BTreeMap::new();
    for (key, entry) in tensors {
        let short = ["lora_A", "lora_B"].iter().find_map(|factor| {
            let start = key.strip_suffix(&format!(".{factor}.default.weight"))?;
            Some(format!("{start}.{factor}.weight"))
        });
        let name = short.unwrap_or_else(|| key.clone());
        if named.insert(name.clone(), entry).is_some() {
            return Err(format!("{name} is there twice, also with .default. in its name; keep one of them"));
        }
    }
    Ok(named)
}
