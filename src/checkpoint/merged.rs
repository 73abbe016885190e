//! A model with an adapter merged into it: an HF checkpoint that stands alone. Tensors are read, summed and written
//! one after another, in parts, so that no more than a part is in memory. Several ranks write different tensors.

use super::{
    CheckpointError, FolderWriter,
    base::{BaseFiles, CONFIG},
    io,
    model_files::{ModelFiles, ModelWriter, fault},
};
use crate::{
    dtype::DType,
    json,
    lora::{LoraShapes, MergePlan, Site, Survival, merge},
    shard::ShardError,
    weights::{TensorMeta, WeightSource},
};
use serde_json::{Map, Value};
use std::{collections::HashMap, fs, ops::Range, path::Path};
use tch::{Device, Tensor};

/// Fields of config.json with the dtype of the weights: the present name, and that of transformers before 5.
const DTYPE_FIELDS: [&str; 2] = ["dtype", "torch_dtype"];

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
    /// `None`: in the base's own, in files of at most `most` bytes.
    ///
    /// # Errors
    /// Values of the adapter that are not finite.
    pub fn new(
        source: &'a dyn WeightSource,
        sites: &[Site],
        shapes: &LoraShapes,
        values: &'a HashMap<String, Vec<f32>>,
        dtype: Option<DType>,
        most: u64,
    ) -> Result<Self, CheckpointError> {
        let mut broken = values.iter().filter(|(_, values)| values.iter().any(|value| !value.is_finite()));
        if let Some(tensor) = broken.by_ref().map(|(name, _)| name.clone()).min() {
            return Err(CheckpointError::NotFinite { tensor, hint: ", as the adapter's is not" });
        }
        let tensors = source.names().into_iter().filter_map(|name| {
            let meta = source.meta(&name)?;
            Some((name, TensorMeta { dtype: dtype.unwrap_or(meta.dtype), ..meta }))
        });
        let files = ModelFiles::new(tensors, most);
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
        let folder = writer.directory();
        for (name, path) in base.side_files() {
            let to = folder.join(&name);
            match self.dtype.filter(|_| name == CONFIG) {
                Some(dtype) => write_config(&path, &to, dtype)?,
                None => fs::copy(&path, &to).map(|_| ()).map_err(io(&to))?,
            }
        }
        self.files.create(folder)?;
        Ok(writer)
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
        for ((name, meta), _) in self.files.tensors().zip(owners).filter(|(_, owner)| *owner == rank) {
            let elements = meta.shape.iter().product();
            let Some(columns) = self.plan.columns(name) else {
                writer.copy(self.source, name, 0..elements)?;
                continue;
            };
            let mut survival = Survival::default();
            let part = merge::PART.next_multiple_of(columns.max(1));
            for first in (0..elements).step_by(part) {
                survival += self.merge_part(&writer, name, first..elements.min(first + part), meta.dtype)?;
            }
            survivals.push((name.to_owned(), survival));
        }
        writer.sync()?;
        Ok(survivals)
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

/// The bytes of a host tensor.
fn bytes_of(values: &Tensor) -> Result<Vec<u8>, ShardError> {
    debug_assert_eq!(values.device(), Device::Cpu);
    Ok(Vec::<u8>::try_from(values.f_contiguous()?.f_view_dtype(tch::Kind::Uint8)?.f_view([-1])?)?)
}

/// Writes the config.json at `from` to `to` as that of weights in `dtype`.
fn write_config(from: &Path, to: &Path, dtype: DType) -> Result<(), CheckpointError> {
    let text = fs::read_to_string(from).map_err(io(from))?;
    let mut fields: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
        CheckpointError::Format { path: from.to_owned(), reason: json::problem(text.as_bytes(), &error) }
    })?;
    let known: Vec<&str> = DTYPE_FIELDS.into_iter().filter(|field| fields.contains_key(*field)).collect();
    for field in if known.is_empty() { &DTYPE_FIELDS[1..] } else { &known } {
        fields.insert((*field).to_owned(), dtype.name().into());
    }
    let text = serde_json::to_string_pretty(&fields).unwrap_or_default();
    fs::write(to, text + "\n").map_err(io(to))
}
