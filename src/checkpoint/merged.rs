//! A model with an adapter merged into it: an HF checkpoint that stands alone. Tensors are read, summed and written
//! one after another, in parts, so that no more than a part is in memory. Several ranks write different tensors.

use super::{
    CheckpointError, FolderWriter, config_json, io,
    model_files::{FileTensor, ModelFiles, ModelWriter, fault},
};
use crate::{
    config::BaseFiles,
    dtype::DType,
    lora::{LoraShapes, MergePlan, Site, Survival, merge},
    quant::{Format, Grid},
    shard::ShardError,
    weights::{TensorMeta, WeightSource},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::Range,
    path::Path,
};
use tch::{Device, Tensor};

/// A base and an adapter that become one model.
pub struct Merged<'a> {
    source: &'a dyn WeightSource,
    plan: MergePlan,
    /// A and B by logical parameter name.
    values: &'a HashMap<String, Vec<f32>>,
    files: ModelFiles,
    /// Dtype of all weights; `None`: each as the base has it.
    dtype: Option<DType>,
}

impl<'a> Merged<'a> {
    /// The merge of the adapter of `shapes` on `sites` with `values` into `source`. Weights are stored in `dtype`,
    /// `None`: in the base's own, those of `formats` packed, in files of at most `most` bytes.
    ///
    /// # Errors
    /// Values of the adapter that are not finite.
    pub fn new(
        source: &'a dyn WeightSource,
        sites: &[Site],
        shapes: &LoraShapes,
        values: &'a HashMap<String, Vec<f32>>,
        dtype: Option<DType>,
        formats: &BTreeMap<String, Format>,
        most: u64,
    ) -> Result<Self, CheckpointError> {
        let mut broken = values.iter().filter(|(_, values)| values.iter().any(|value| !value.is_finite()));
        if let Some(tensor) = broken.by_ref().map(|(name, _)| name.clone()).min() {
            return Err(CheckpointError::NotFinite { tensor, hint: ", as the adapter's is not" });
        }
        let files = files(source, dtype, formats, most);
        Ok(Self { source, plan: MergePlan::new(sites, shapes), values, files, dtype })
    }

    /// Tensors of the model.
    pub fn tensors(&self) -> usize {
        self.files.tensors().count()
    }

    /// Opens the hidden directory of `out` with everything in it but the values of the weights. `base`: the files
    /// beside the base's weights, which are copied.
    ///
    /// # Errors
    /// `out` exists, or the disk's error.
    pub fn begin(&self, out: &Path, base: &BaseFiles) -> Result<FolderWriter, CheckpointError> {
        let writer = FolderWriter::new_folder(out)?;
        self.create(writer.directory(), base)?;
        Ok(writer)
    }

    /// Puts everything but the values of the weights into the hidden directory `folder`; see [`begin`](Self::begin).
    ///
    /// # Errors
    /// The disk's.
    pub fn create(&self, folder: &Path, base: &BaseFiles) -> Result<(), CheckpointError> {
        let copy = |from: &Path, to: &Path| fs::copy(from, to).map(|_| ()).map_err(io(to));
        config_json::put_beside(base.side_files(), folder, &self.files, self.dtype, copy)?;
        self.files.create(folder)
    }

    /// Writes the tensors of rank `rank` of `ranks` into the hidden directory `folder`. Returns what became of the
    /// delta of each that the adapter changes, by name.
    ///
    /// # Errors
    /// A value that is not finite, or the disk's error.
    pub fn write(
        &self,
        folder: &Path,
        rank: usize,
        ranks: usize,
    ) -> Result<Vec<(String, Survival)>, CheckpointError> {
        let writer = self.files.open(folder)?;
        let mut survivals = Vec::new();
        let owners = self.files.owners(ranks);
        for ((name, tensor), _) in self.files.tensors().zip(owners).filter(|(_, owner)| *owner == rank) {
            let Some(columns) = self.plan.columns(name) else {
                writer.copy_whole(self.source, name)?;
                continue;
            };
            let survival = match tensor.grid() {
                Some(grid) => self.merge_packed(&writer, name, grid)?,
                None => self.merge_plain(&writer, name, columns, &tensor.meta)?,
            };
            survivals.push((name.to_owned(), survival));
        }
        writer.sync()?;
        Ok(survivals)
    }

    /// Merges and writes the plain `tensor`, in parts.
    fn merge_plain(
        &self,
        writer: &ModelWriter,
        tensor: &str,
        columns: usize,
        meta: &TensorMeta,
    ) -> Result<Survival, CheckpointError> {
        let elements = meta.shape.iter().product();
        let mut survival = Survival::default();
        // Whole rows of blocks, which a source decodes together.
        let part = merge::PART.next_multiple_of((columns * Format::BlockFp8.group()).max(1));
        for first in (0..elements).step_by(part) {
            survival += self.merge_part(writer, tensor, first..elements.min(first + part), meta.dtype)?;
        }
        Ok(survival)
    }

    /// Merges `tensor` into its packed form and writes it. A matrix without a delta is copied.
    fn merge_packed(
        &self,
        writer: &ModelWriter,
        tensor: &str,
        grid: Grid,
    ) -> Result<Survival, CheckpointError> {
        if self.plan.is_zero(tensor, self.values) {
            writer.copy_whole(self.source, tensor)?;
            return Ok(Survival::default());
        }
        let before = self.source.packed(tensor).map_or(1.0, |form| form.global);
        let sum = |run: Range<usize>| {
            let mut packed = vec![0; run.len() * grid.format.tile().bytes];
            self.source.read_packed(tensor, grid.format, before, run.clone(), &mut packed).map_err(fault)?;
            let sum = self.plan.sum(tensor, grid.format, run, &packed, before, self.values)?;
            Ok::<_, CheckpointError>((sum, packed))
        };
        let mut most = 0f32;
        for run in grid.runs(0..grid.tiles()).filter(|_| grid.format.has_global()) {
            most = most.max(sum(run)?.0.amax());
        }
        let (after, mut survival) = (grid.format.global(most), Survival::default());
        for run in grid.runs(0..grid.tiles()) {
            let (sum, mut packed) = sum(run.clone())?;
            survival += sum.pack(after, &mut packed);
            if !survival.lost.is_finite() {
                return Err(CheckpointError::NotFinite { tensor: tensor.to_owned(), hint: "" });
            }
            writer.write_tiles(tensor, run, &packed)?;
        }
        writer.write_beside(tensor, after)?;
        Ok(survival)
    }

    /// Merges and writes elements `range` of `tensor`, which become `dtype`.
    fn merge_part(
        &self,
        writer: &ModelWriter,
        tensor: &str,
        range: Range<usize>,
        dtype: DType,
    ) -> Result<Survival, CheckpointError> {
        let first = range.start;
        let mut base = vec![0f32; range.len()];
        let bytes = bytemuck::cast_slice_mut(&mut base);
        self.source.read(tensor, range.clone(), DType::F32, bytes).map_err(fault)?;
        let base = Tensor::f_from_slice(&base).map_err(ShardError::from)?;
        let delta = self.plan.delta(tensor, range, self.values).map_err(ShardError::from)?;
        let Some(delta) = delta else { return Ok(Survival::default()) };
        let (values, survival) = merge::merged(&base, &delta, dtype)?;
        // A sum with NaN or infinity is neither.
        if !survival.lost.is_finite() {
            let hint = if dtype == DType::F16 { ": float16 overflows; use --dtype bfloat16" } else { "" };
            return Err(CheckpointError::NotFinite { tensor: tensor.to_owned(), hint });
        }
        writer.write(tensor, first, &bytes_of(&values)?)?;
        Ok(survival)
    }
}

/// The files of a merged model on the base `source`; see [`Merged::new`].
pub fn files(
    source: &dyn WeightSource,
    dtype: Option<DType>,
    formats: &BTreeMap<String, Format>,
    most: u64,
) -> ModelFiles {
    let tensors = source.names().into_iter().filter_map(|name| {
        let meta = source.meta(&name)?;
        let format = formats.get(&name).copied().filter(|_| dtype.is_none());
        Some((name, FileTensor { meta: TensorMeta { dtype: dtype.unwrap_or(meta.dtype), ..meta }, format }))
    });
    ModelFiles::new(tensors, most)
}

/// The bytes of a host tensor.
fn bytes_of(values: &Tensor) -> Result<Vec<u8>, ShardError> {
    debug_assert_eq!(values.device(), Device::Cpu);
    Ok(Vec::<u8>::try_from(values.f_contiguous()?.f_view_dtype(tch::Kind::Uint8)?.f_view([-1])?)?)
}
