//! Where base weights come from. A source knows names, shapes and types without reading data, and reads any
//! run of elements of a tensor, so that a rank touches only the bytes that it owns.

mod random;
mod safetensors;

use crate::dtype::DType;
use sha2::{Digest, Sha256};
use std::{ops::Range, path::PathBuf};

pub use random::RandomSource;
pub use safetensors::{SafetensorsSource, weight_files};

/// What a source knows of a tensor before reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// A named set of base tensors.
pub trait WeightSource {
    /// All tensor names, sorted.
    fn names(&self) -> Vec<String>;
    /// Type and shape of `name`, or `None` when the source has no such tensor.
    fn meta(&self, name: &str) -> Option<TensorMeta>;
    /// Reads elements `range` (row-major order) of `name`, converted to `dtype`, into `out`
    /// (`range.len() * dtype.size()` bytes).
    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError>;
    /// Bytes of the source read so far by this process.
    fn bytes_read(&self) -> u64;
}

/// Why weights could not be opened or read. All of them are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: neither model.safetensors nor model.safetensors.index.json is there")]
    NoWeights { path: PathBuf },
    #[error("{path}: not a safetensors file: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Index { path: PathBuf, reason: String },
    #[error("{path}: tensor {name} is {dtype}; float32, bfloat16 and float16 can be read")]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error("tensor {name}: elements {range:?} of {elements} were asked for")]
    Range { name: String, range: Range<usize>, elements: usize },
    #[error("the model's tensors do not fit its config: {0}")]
    Mismatch(String),
}

/// Compares what `source` has with what the model needs. One error names everything that is missing, surplus or
/// of another shape.
pub fn validate(source: &dyn WeightSource, needed: &[(String, Vec<usize>)]) -> Result<(), SourceError> {
    let mut faults = Vec::new();
    let mut list = |what: &str, names: Vec<String>| {
        if !names.is_empty() {
            faults.push(format!("{what}: {}", names.join(", ")));
        }
    };
    let absent = needed.iter().filter(|(name, _)| source.meta(name).is_none());
    list("missing", absent.map(|(name, _)| name.clone()).collect());
    let misshapen = needed.iter().filter_map(|(name, shape)| {
        let found = source.meta(name)?.shape;
        (found != *shape).then(|| format!("{name} is {found:?}, expected {shape:?}"))
    });
    list("of another shape", misshapen.collect());
    let tied_head = !needed.iter().any(|(name, _)| name == "lm_head.weight");
    // Old checkpoints carry the rotary buffer, and some a copy of the tied head: neither is a weight.
    let harmless =
        |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied_head && name == "lm_head.weight");
    let known: std::collections::HashSet<&str> = needed.iter().map(|(name, _)| name.as_str()).collect();
    let surplus = source.names().into_iter().filter(|name| !known.contains(name.as_str()) && !harmless(name));
    list("surplus", surplus.collect());
    if faults.is_empty() { Ok(()) } else { Err(SourceError::Mismatch(faults.join("; "))) }
}

/// Tells one base from another without reading it: SHA-256 over the name, type, shape and first values of each tensor.
pub fn digest(source: &dyn WeightSource) -> Result<String, SourceError> {
    const VALUES: usize = 64;
    let mut hash = Sha256::new();
    for name in source.names() {
        let TensorMeta { dtype, shape } = source.meta(&name).ok_or_else(|| unknown(&name))?;
        let mut values = [0u8; VALUES * 4];
        let count = shape.iter().product::<usize>().min(VALUES);
        source.read(&name, 0..count, DType::F32, &mut values[..count * 4])?;
        hash.update(format!("{name} {dtype} {shape:?}\n"));
        hash.update(values);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Checks `range` against a tensor's size.
fn check_range(name: &str, range: &Range<usize>, meta: &TensorMeta) -> Result<(), SourceError> {
    let elements = meta.shape.iter().product();
    if range.start > range.end || range.end > elements {
        return Err(SourceError::Range { name: name.to_owned(), range: range.clone(), elements });
    }
    Ok(())
}

/// The error of asking for a tensor that is not there; [`validate`] has excluded it for a model's own tensors.
fn unknown(name: &str) -> SourceError {
    SourceError::Mismatch(format!("missing: {name}"))
}
