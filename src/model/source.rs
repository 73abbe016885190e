//! Where base weights come from. A source knows names, shapes and types without reading data, and reads any
//! run of elements of a tensor, so that a rank touches only the bytes that it owns.

use crate::dtype::DType;
use std::ops::Range;

/// What a source knows of a tensor before reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// A named set of base tensors.
pub trait WeightSource {
    /// All tensor names.
    fn names(&self) -> Vec<String>;
    /// Type and shape of `name`, or `None` when the source has no such tensor.
    fn meta(&self, name: &str) -> Option<TensorMeta>;
    /// Reads elements `range` (row-major order) of `name`, converted to `dtype`, into `out`
    /// (`range.len() * dtype.size()` bytes).
    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError>;
    /// Bytes of the source read so far by this process.
    fn bytes_read(&self) -> u64;
}

/// Why weights could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{0}")]
    Other(String),
}
