//! Safetensors of HF directories. Only the headers and the asked-for elements are read, and by `pread`: pages of a
//! mapped file would count as this rank's memory.

use super::{
    PackedForm, SourceError, TensorMeta, WeightSource, check_range, files, pack_values,
    quantised::{PackedMatrix, Scheme},
    unknown,
};
use crate::{dtype::DType, lfs, quant::Format, regular_file};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Elements that are read and converted at a time: they stay in the second-level cache.
const PIECE: usize = 1 << 15;

/// A tensor's place in the files.
pub(super) struct Located {
    file: usize,
    /// First byte in the file.
    start: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Located {
    /// Its bytes; all elements have whole bytes.
    pub(super) fn bytes(&self) -> usize {
        self.elements() * self.dtype.bitsize() / 8
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its dtype, if it holds plain numbers.
    pub(super) fn number(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::Bf16),
            Dtype::F16 => Some(DType::F16),
            _ => None,
        }
    }
}

/// The tensors of an HF model directory. Matrices that config.json says are quantized have the name, shape and values
/// of the matrix that they stand for, and are handed out packed, too.
pub struct SafetensorsSource {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Located>,
    matrices: BTreeMap<String, PackedMatrix>,
    read: Cell<u64>,
}

impl SafetensorsSource {
    /// Opens the files of `directory` and reads their headers.
    pub fn open(directory: &Path) -> Result<Self, SourceError> {
        let mut source = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            matrices: BTreeMap::new(),
            read: Cell::new(0),
        };
        let chosen = files::weight_files(directory)?;
        if let Some(index) = chosen.unread_index {
            tracing::warn!(
                "{}: not read, as model.safetensors lies beside it; remove the one that is stale",
                index.display()
            );
        }
        for path in chosen.files {
            source.add(&path)?;
        }
        if let Some(scheme) = Scheme::of(directory)? {
            source.matrices = scheme.take(&mut source)?;
        }
        let other = source.tensors.iter().find(|(_, tensor)| tensor.number().is_none());
        if let Some((name, tensor)) = other {
            let (path, dtype) = (source.files[tensor.file].0.clone(), format!("{:?}", tensor.dtype));
            return Err(SourceError::Dtype { path, name: name.clone(), dtype });
        }
        Ok(source)
    }

    /// Names as stored, of plain numbers and others.
    pub(super) fn stored(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// Takes out the tensor that is stored as `name`.
    pub(super) fn take(&mut self, name: &str) -> Option<Located> {
        self.tensors.remove(name)
    }

    /// Bytes `range` of a tensor that was taken out.
    pub(super) fn read_bytes(
        &self,
        tensor: &Located,
        range: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        let (path, file) = &self.files[tensor.file];
        file.read_exact_at(out, (tensor.start + range.start) as u64)
            .map_err(|error| SourceError::Io { path: path.clone(), error })?;
        self.read.set(self.read.get() + range.len() as u64);
        Ok(())
    }

    /// Gives each tensor the name that `renamed` finds for its own.
    ///
    /// # Errors
    /// Two tensors get one name.
    pub fn rename(&mut self, renamed: impl Fn(&str) -> String) -> Result<(), SourceError> {
        let mut taken = BTreeSet::new();
        self.tensors = with_names(std::mem::take(&mut self.tensors), &renamed, &mut taken)?;
        self.matrices = with_names(std::mem::take(&mut self.matrices), &renamed, &mut taken)?;
        Ok(())
    }

    /// Replaces each tensor for which `parts(name, shape)` has some by these, names with shapes: they lie in it one
    /// after another and fill it.
    ///
    /// # Errors
    /// Two tensors get one name.
    pub fn split(
        &mut self,
        parts: impl Fn(&str, &[usize]) -> Option<Vec<(String, Vec<usize>)>>,
    ) -> Result<(), SourceError> {
        let all = self.tensors.iter();
        let whole: Vec<_> =
            all.filter_map(|(name, tensor)| Some((name.clone(), parts(name, &tensor.shape)?))).collect();
        for (stored, parts) in whole {
            let Some(Located { file, mut start, dtype, .. }) = self.tensors.remove(&stored) else { continue };
            for (name, shape) in parts {
                let part = Located { file, start, dtype, shape };
                start += part.bytes();
                match self.tensors.entry(name) {
                    Entry::Vacant(entry) => entry.insert(part),
                    Entry::Occupied(entry) => {
                        return Err(SourceError::Twice { stored, name: entry.key().clone() });
                    }
                };
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<(), SourceError> {
        let io = |error| SourceError::Io { path: path.to_owned(), error };
        let format = |reason: String| SourceError::Format { path: path.to_owned(), reason };
        let file = regular_file::open(path).map_err(io)?;
        // The library checks the header against the whole file; mapped, no more than the header is touched.
        // SAFETY: model files are not written while a run opens them; a file that shrinks under us would end the
        // process with SIGBUS, as it would for every reader of mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        if lfs::is_pointer(&map) {
            return Err(SourceError::LfsPointer { path: path.to_owned() });
        }
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| format(error.to_string()))?;
        for (name, info) in metadata.tensors() {
            // The header is preceded by its length, 8 bytes.
            let start = 8 + header + info.data_offsets.0;
            if 8 + header + info.data_offsets.1 > map.len() {
                return Err(format(format!("tensor {name} reaches past the end of the file")));
            }
            let (file, dtype, shape) = (self.files.len(), info.dtype, info.shape.clone());
            self.tensors.insert(name, Located { file, start, dtype, shape });
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }
}

/// `tensors` by the names that `renamed` finds for their own.
fn with_names<T>(
    tensors: BTreeMap<String, T>,
    renamed: impl Fn(&str) -> String,
    taken: &mut BTreeSet<String>,
) -> Result<BTreeMap<String, T>, SourceError> {
    let named = tensors.into_iter().map(|(stored, tensor)| {
        let name = renamed(&stored);
        if !taken.insert(name.clone()) {
            return Err(SourceError::Twice { stored, name });
        }
        Ok((name, tensor))
    });
    named.collect()
}

impl WeightSource for SafetensorsSource {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().chain(self.matrices.keys()).cloned().collect();
        names.sort();
        names
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        if let Some(matrix) = self.matrices.get(name) {
            return Some(matrix.meta());
        }
        let tensor = self.tensors.get(name)?;
        Some(TensorMeta { dtype: tensor.number()?, shape: tensor.shape.clone() })
    }

    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError> {
        let meta = self.meta(name).ok_or_else(|| unknown(name))?;
        check_range(name, &range, &meta)?;
        if let Some(matrix) = self.matrices.get(name) {
            return matrix.read(self, name, range, dtype, out);
        }
        let tensor = self.tensors.get(name).ok_or_else(|| unknown(name))?;
        let size = meta.dtype.size();
        if meta.dtype == dtype {
            return self.read_bytes(tensor, range.start * size..range.end * size, out);
        }
        let mut bytes = vec![0; range.len().min(PIECE) * size];
        for (i, out) in out.chunks_mut(PIECE * dtype.size()).enumerate() {
            let bytes = &mut bytes[..out.len() / dtype.size() * size];
            let first = (range.start + i * PIECE) * size;
            self.read_bytes(tensor, first..first + bytes.len(), bytes)?;
            meta.dtype.convert(bytes, dtype, out);
        }
        Ok(())
    }

    fn packed(&self, name: &str) -> Option<PackedForm> {
        Some(self.matrices.get(name)?.form())
    }

    fn read_packed(
        &self,
        name: &str,
        format: Format,
        global: f32,
        tiles: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        match self.matrices.get(name) {
            Some(matrix) if matrix.form() == (PackedForm { format, global }) => {
                matrix.read_tiles(self, name, tiles, out)
            }
            _ => pack_values(self, name, format, global, tiles, out),
        }
    }

    fn bytes_read(&self) -> u64 {
        self.read.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::tensor::TensorView;

    fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn floats(n: usize) -> Vec<u8> {
        bytemuck::cast_slice(&(0..n).map(|i| i as f32).collect::<Vec<_>>()).to_vec()
    }

    #[test]
    fn reads_only_the_range_and_converts_it() {
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join("model.safetensors"), &[("w", Dtype::F32, vec![4, 5], floats(20))]);
        let source = SafetensorsSource::open(directory.path()).unwrap();
        let mut out = [0u8; 6];
        source.read("w", 7..10, DType::Bf16, &mut out).unwrap();
        let back: Vec<f32> =
            out.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        assert_eq!(back, [7.0, 8.0, 9.0]);
        assert_eq!(source.bytes_read(), 12);
        assert!(matches!(source.read("w", 18..21, DType::F32, &mut [0; 12]), Err(SourceError::Range { .. })));
    }

    #[test]
    fn tiles_of_every_dtype_and_odd_sizes_equal_the_matrix() {
        let directory = tempfile::tempdir().unwrap();
        let values = |n: usize, dtype: DType| {
            let mut bytes = vec![0; n * dtype.size()];
            let irregular: Vec<f32> = (0..n).map(|i| (i as f32 * 1.7).sin()).collect();
            DType::F32.convert(bytemuck::cast_slice(&irregular), dtype, &mut bytes);
            bytes
        };
        let tensors = [
            ("single", Dtype::F32, vec![7, 5], values(35, DType::F32)),
            ("half", Dtype::F16, vec![5, 11], values(55, DType::F16)),
            ("brain", Dtype::BF16, vec![13, 3], values(39, DType::Bf16)),
        ];
        write(&directory.path().join("model.safetensors"), &tensors);
        let source = SafetensorsSource::open(directory.path()).unwrap();
        for (name, ..) in tensors {
            super::super::tests::tiles_equal_the_matrix(&source, name);
        }
    }

    #[test]
    fn an_index_names_files_of_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        write(&path("a.safetensors"), &[("a", Dtype::F32, vec![2], floats(2))]);
        write(&path("b.safetensors"), &[("b", Dtype::F32, vec![3], floats(3))]);
        let index = |a: &str| format!(r#"{{"weight_map": {{"a": "{a}", "b": "b.safetensors"}}}}"#);
        std::fs::write(path("model.safetensors.index.json"), index("a.safetensors")).unwrap();
        let source = SafetensorsSource::open(directory.path()).unwrap();
        assert_eq!(source.names(), ["a", "b"]);
        for bad in ["../a.safetensors", "/etc/passwd", ""] {
            std::fs::write(path("model.safetensors.index.json"), index(bad)).unwrap();
            assert!(
                matches!(SafetensorsSource::open(directory.path()), Err(SourceError::Index { .. })),
                "{bad}"
            );
        }
        std::fs::write(path("model.safetensors.index.json"), index("gone.safetensors")).unwrap();
        assert!(matches!(SafetensorsSource::open(directory.path()), Err(SourceError::NoShard { .. })));
    }

    #[test]
    fn one_error_names_all_that_does_not_fit() {
        let directory = tempfile::tempdir().unwrap();
        let tensors =
            ["a", "b", "lm_head.weight", "extra"].map(|name| (name, Dtype::F32, vec![2], floats(2)));
        write(&directory.path().join("model.safetensors"), &tensors);
        let source = SafetensorsSource::open(directory.path()).unwrap();
        let needed =
            [("a", vec![2]), ("b", vec![3]), ("c", vec![1])].map(|(name, shape)| (name.to_owned(), shape));
        let message = super::super::validate(&source, &needed).unwrap_err().to_string();
        for part in ["missing: c", "b is [2], expected [3]", "not read: extra"] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert!(!message.contains("lm_head"), "{message}");
    }

    proptest! {
        #[test]
        fn broken_files_are_errors(cut in 0usize..200, flips in prop::collection::vec((0usize..200, any::<u8>()), 0..8)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("model.safetensors");
            write(&path, &[("w", Dtype::F32, vec![4, 5], floats(20)), ("v", Dtype::BF16, vec![3], vec![0; 6])]);
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, value) in flips {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            let n = bytes.len();
            bytes.truncate(n - cut.min(n));
            std::fs::write(&path, bytes).unwrap();
            // Either it opens and every tensor can be read whole, or it is refused; it never panics.
            if let Ok(source) = SafetensorsSource::open(directory.path()) {
                for name in source.names() {
                    let elements: usize = source.meta(&name).unwrap().shape.iter().product();
                    let mut out = vec![0; elements * 4];
                    source.read(&name, 0..elements, DType::F32, &mut out).unwrap();
                }
            }
        }
    }
}
