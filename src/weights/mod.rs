//! Sources of base weights. A source knows names, shapes and types without reading data, and reads any run of elements
//! or rectangular tile of a tensor, so that a rank touches only the bytes that it owns.

mod as_packed;
mod files;
mod fit;
mod packed;
mod quantised;
mod random;
mod safetensors;

use crate::{
    dtype::DType,
    lfs,
    quant::{Format, QuantError},
};
use sha2::{Digest, Sha256};
use std::{ops::Range, path::PathBuf};

pub use as_packed::AsPacked;
pub use files::{WeightFiles, weight_files};
pub use fit::{names_in_model, validate};
pub use packed::pack_values;
pub use quantised::Scheme;
pub use random::RandomSource;
pub use safetensors::SafetensorsSource;

/// Dtype and shape of a tensor, known before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// The packed form of a matrix in a source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackedForm {
    pub format: Format,
    /// The fp32 scale of the matrix; 1 where the format has none.
    pub global: f32,
}

/// A rectangle of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixTile {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// True if the source stores the transpose, `[columns, rows]`.
    pub transposed: bool,
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
    /// Reads rows × columns `tile` of the matrix `name`, converted to `dtype`, row by row into `out`
    /// (`rows · columns · dtype.size()` bytes). Reads no element outside of the tile.
    ///
    /// # Errors
    /// `name` is not there or no matrix, the tile lies outside of it, or [`read`](Self::read)'s.
    fn read_tile(
        &self,
        name: &str,
        tile: &MatrixTile,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        let meta = self.meta(name).ok_or_else(|| unknown(name))?;
        let &[stored_rows, stored_columns] = &meta.shape[..] else {
            return Err(SourceError::NoMatrix { name: name.to_owned(), shape: meta.shape });
        };
        // Runs of the file are rows of the stored matrix.
        let (rows, columns) =
            if tile.transposed { (&tile.columns, &tile.rows) } else { (&tile.rows, &tile.columns) };
        if rows.end > stored_rows || columns.end > stored_columns {
            let (name, tile, shape) = (name.to_owned(), tile.clone(), [stored_rows, stored_columns]);
            return Err(SourceError::Tile { name, tile, shape });
        }
        let size = dtype.size();
        let mut run = vec![0; columns.len() * size];
        for (i, row) in rows.clone().enumerate() {
            let first = row * stored_columns;
            self.read(name, first + columns.start..first + columns.end, dtype, &mut run)?;
            if !tile.transposed {
                out[i * run.len()..(i + 1) * run.len()].copy_from_slice(&run);
                continue;
            }
            for (j, number) in run.chunks_exact(size).enumerate() {
                let at = (j * rows.len() + i) * size;
                out[at..at + size].copy_from_slice(number);
            }
        }
        Ok(())
    }
    /// The packed form in which the source has the matrix `name`, if it is not plain numbers.
    fn packed(&self, _name: &str) -> Option<PackedForm> {
        None
    }
    /// Tiles `tiles` of the matrix `name` ([`Grid`](crate::quant::Grid) of its shape) in `format` into `out`: as the
    /// source has them, if it has the matrix in this format, otherwise packed from its values. `global` is the scale of
    /// the matrix ([`Format::global`] of its amax, or that of [`packed`](Self::packed)).
    ///
    /// # Errors
    /// `name` is no matrix, a value is not finite, `global` is not that of the packed form, or [`read`](Self::read)'s.
    fn read_packed(
        &self,
        name: &str,
        format: Format,
        global: f32,
        tiles: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        pack_values(self, name, format, global, tiles, out)
    }
    /// The largest magnitude in `tiles` of the matrix `name`, of which a format with a global scale makes it.
    ///
    /// # Errors
    /// As of [`read_packed`](Self::read_packed).
    fn amax(&self, name: &str, format: Format, tiles: Range<usize>) -> Result<f32, SourceError> {
        packed::amax_of_values(self, name, format, tiles)
    }
    /// Bytes of the source read so far by this process.
    fn bytes_read(&self) -> u64;
}

/// Errors of opening or reading weights. All are user errors (exit 2).
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error(
        "{path}: neither model.safetensors nor model.safetensors.index.json is there; give a folder that has the weights, \
         too, as save_pretrained writes it"
    )]
    NoWeights { path: PathBuf },
    #[error("{path}: {found} is there and no model.safetensors: {remedy}")]
    Foreign { path: PathBuf, found: String, remedy: &'static str },
    #[error(
        "{path}: an adapter in the folder of a model, which transformers applies; merge it into the model, or move its \
         files elsewhere and name them in lora.adapter_path (generate: --adapter)"
    )]
    AdapterInside { path: PathBuf },
    #[error("{path}: {}", lfs::REMEDY)]
    LfsPointer { path: PathBuf },
    #[error("{index}: lists {file}, which is not there; copy or download it into the same folder")]
    NoShard { index: PathBuf, file: String },
    #[error("{path}: not a whole safetensors file: {reason}; copy or download it again")]
    Format { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Index { path: PathBuf, reason: String },
    #[error(
        "{path}: tensor {name} is {dtype}; float32, bfloat16 and float16 can be read: take the model's \
         checkpoint in one of these, or dequantize it"
    )]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error("tensor {name}: elements {range:?} of {elements} were asked for")]
    Range { name: String, range: Range<usize>, elements: usize },
    #[error("tensor {name} has shape {shape:?}, expected a matrix")]
    NoMatrix { name: String, shape: Vec<usize> },
    #[error("tensor {name} is stored as {shape:?}: it has no tile {tile:?}")]
    Tile { name: String, tile: MatrixTile, shape: [usize; 2] },
    #[error("{path}: {field} is {found}; {remedy}")]
    Scheme { path: PathBuf, field: String, found: String, remedy: String },
    #[error("tensor {name}: {reason}")]
    Packed { name: String, reason: String },
    #[error("tensor {name}: element {index:?} is {value}: only finite weights can be quantized")]
    NonFinite { name: String, index: [usize; 2], value: f32 },
    #[error("tensor {name}: {error}")]
    Quant { name: String, error: QuantError },
    #[error("the model's tensors do not fit its config: {0}")]
    Mismatch(String),
    /// [`SourceError::Mismatch`] of a folder's tensors.
    #[error("{path}: its tensors do not fit its config.json: {faults}; take both of one model")]
    Unfit { path: PathBuf, faults: String },
    #[error("tensors {stored} and {name} of the model are one weight under two names; keep one")]
    Twice { stored: String, name: String },
    #[error(
        "the model's tensors have a prefix that transformers does not load: {prefix} in {example}; save the \
         model without it ({remedy})"
    )]
    Prefix { prefix: String, example: String, remedy: &'static str },
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
    Ok(format!("{:x}", hash.finalize()))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares tiles of the matrix `name`, as stored and transposed, with the whole matrix. Counts the bytes read.
    pub(super) fn tiles_equal_the_matrix(source: &dyn WeightSource, name: &str) {
        let TensorMeta { dtype: stored, shape } = source.meta(name).unwrap();
        let (m, n) = (shape[0], shape[1]);
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let size = dtype.size();
            let mut whole = vec![0; m * n * size];
            source.read(name, 0..m * n, dtype, &mut whole).unwrap();
            let number = |row: usize, column: usize| &whole[(row * n + column) * size..][..size];
            for (i, j) in
                [(0..m, 0..n), (1..m - 1, 1..n - 1), (m - 1..m, n - 1..n), (3..3, 0..n), (1..4, 2..2)]
            {
                let as_stored = MatrixTile { rows: i.clone(), columns: j.clone(), transposed: false };
                let transposed = MatrixTile { rows: j.clone(), columns: i.clone(), transposed: true };
                let mut found = vec![0; i.len() * j.len() * size];
                let before = source.bytes_read();
                source.read_tile(name, &as_stored, dtype, &mut found).unwrap();
                let read = source.bytes_read() - before;
                assert!(read as usize <= i.len() * j.len() * stored.size(), "{read} bytes for {as_stored:?}");
                let by_row = i.clone().flat_map(|row| j.clone().map(move |column| (row, column)));
                let expected = by_row.flat_map(|(row, column)| number(row, column).to_vec());
                assert_eq!(found, expected.collect::<Vec<u8>>(), "{name} {dtype} {as_stored:?}");
                source.read_tile(name, &transposed, dtype, &mut found).unwrap();
                let by_column = j.flat_map(|column| i.clone().map(move |row| (row, column)));
                let expected = by_column.flat_map(|(row, column)| number(row, column).to_vec());
                assert_eq!(found, expected.collect::<Vec<u8>>(), "{name} {dtype} {transposed:?}");
            }
        }
        let outside = MatrixTile { rows: 0..m + 1, columns: 0..n, transposed: false };
        let mut room = vec![0; (m + 1) * n * 4];
        let refused = source.read_tile(name, &outside, DType::F32, &mut room);
        assert!(matches!(refused, Err(SourceError::Tile { .. })));
    }

    #[test]
    fn tiles_of_random_tensors_equal_the_matrix() {
        let source = RandomSource::new(vec![("w".into(), vec![7, 5]), ("v".into(), vec![4])], 0.1, 3);
        tiles_equal_the_matrix(&source, "w");
        let tile = MatrixTile { rows: 0..2, columns: 0..2, transposed: false };
        let refused = source.read_tile("v", &tile, DType::F32, &mut [0; 16]);
        assert!(matches!(refused, Err(SourceError::NoMatrix { .. })));
    }
}
