//! Quantisation of a model's base: the format, and the linear layers that keep their numbers. Pure.

use super::{ModelSpec, base_plan::all_projections};
use crate::{
    config::{QuantArgs, QuantFormat},
    lora::targets::{Projection, TargetError, file_tensor, named},
    quant::{Format, Noise},
    rng::Stream,
    weights::{self, SourceError, WeightSource},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use tch::Device;

/// Modules that are never quantised, by the ends of their names; to exclude them changes nothing.
const NEVER: [&str; 6] = ["lm_head", "embed_tokens", "norm", "gate", "router", "shared_expert_gate"];

/// Storage of the linear layers of decoder layers as packed tiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantization {
    pub format: Format,
    /// Dotted paths of the leaves (`model.layers.3.self_attn.q_proj`) that are stored in compute dtype.
    pub excluded: BTreeSet<String>,
}

impl From<QuantFormat> for Format {
    fn from(format: QuantFormat) -> Self {
        match format {
            QuantFormat::Nf4 => Self::Nf4,
            QuantFormat::BlockFp8 => Self::BlockFp8,
            QuantFormat::Nvfp4 => Self::NvFp4,
        }
    }
}

/// Quantisation noise of a training step. All micro-batches of the step have the same, in forward and backward: rows
/// are dealt to micro-batches and ranks otherwise in each topology, so that noise by micro-batch would make the result
/// depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNoise {
    /// Seed of the run.
    pub seed: u64,
    pub step: usize,
    /// Factor of the steps of codes.
    pub alpha: f32,
}

impl StepNoise {
    /// The noise of the matrix that the files call `tensor`.
    pub fn of(self, tensor: &str) -> Noise {
        let Self { seed, step, alpha } = self;
        Noise { stream: Stream::new(seed, &format!("quantisation noise {step} {tensor}")), alpha }
    }
}

/// Errors of the choice of a quantised base.
#[derive(Debug, thiserror::Error)]
pub enum QuantizationError {
    /// A name matches nothing.
    #[error(transparent)]
    Excluded(#[from] TargetError),
    /// The files hold another format.
    #[error(
        "the model's files have {tensor} in {files}, which is not packed anew: set quant_format: {files}"
    )]
    Format { tensor: String, files: Format },
}

impl Quantization {
    /// The linear layers of `spec` in `format`, but for those that `exclude` names as targets are named. Of files that
    /// are packed already, layers that are not packed there keep their numbers.
    ///
    /// # Errors
    /// A name matches nothing, or `source` is packed in another format.
    pub fn new(
        format: Format,
        exclude: &[String],
        spec: &ModelSpec,
        source: &dyn WeightSource,
    ) -> Result<Self, QuantizationError> {
        let projections = all_projections(spec);
        let counts = |name: &&String| !NEVER.iter().any(|never| name.ends_with(never));
        let exclude: Vec<String> = exclude.iter().filter(counts).cloned().collect();
        let mut excluded = named(&projections, &exclude)?;
        let leaves = leaves_in(&projections, source);
        if leaves.iter().any(|(_, _, files)| files.is_some()) {
            for (leaf, tensor, files) in leaves {
                match files {
                    Some(files) if files != format => {
                        return Err(QuantizationError::Format { tensor, files });
                    }
                    Some(_) => {}
                    None => drop(excluded.insert(leaf)),
                }
            }
        }
        Ok(Self { format, excluded })
    }

    /// The storage that a configuration asks for, see [`new`](Self::new); `None` for plain numbers, with a warning
    /// where the files are packed.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn of_base(
        args: &QuantArgs,
        exclude: &[String],
        spec: &ModelSpec,
        source: &dyn WeightSource,
    ) -> Result<Option<Self>, QuantizationError> {
        let Some(format) = args.format() else {
            warn_of_packed(spec, source);
            return Ok(None);
        };
        Self::new(format.into(), exclude, spec, source).map(Some)
    }

    /// The reason why tensors on `device` cannot be of a quantised base, if they cannot.
    pub fn refusal(device: Device) -> Option<&'static str> {
        let reason = "packed weights are decoded on CPUs and NVIDIA GPUs alone; give --device cpu or cuda";
        (!matches!(device, Device::Cpu | Device::Cuda(_))).then_some(reason)
    }

    /// The format of each packed matrix of `spec`, by its name in the files.
    pub fn matrices(&self, spec: &ModelSpec) -> BTreeMap<String, Format> {
        let mut matrices = BTreeMap::new();
        for Projection { parent, leaves, experts, .. } in all_projections(spec) {
            for (leaf, _) in leaves {
                let Some(format) = self.of(&parent, leaf) else { continue };
                let copies = 0..experts.map_or(1, |experts| experts.count);
                matrices.extend(copies.map(|copy| (file_tensor(&parent, experts, copy, leaf), format)));
            }
        }
        matrices
    }

    /// The reason why files cannot hold the packed matrices of `spec`, if they cannot: those of nvfp4 have whole groups
    /// in each row.
    pub fn unwritable(&self, spec: &ModelSpec) -> Option<String> {
        let group = Format::NvFp4.group();
        all_projections(spec).into_iter().find_map(|Projection { parent, leaves, input, .. }| {
            let is_ragged = |leaf: &str| self.of(&parent, leaf) == Some(Format::NvFp4) && input % group != 0;
            let (leaf, _) = leaves.into_iter().find(|(leaf, _)| is_ragged(leaf))?;
            Some(format!(
                "{parent}.{leaf} has {input} columns, no multiple of {group}, which files in nvfp4 cannot hold: exclude \
                 it from quantisation, or take nf4"
            ))
        })
    }

    /// The format of leaf `leaf` of the module `parent`; `None` if it keeps its numbers.
    pub fn of(&self, parent: &str, leaf: &str) -> Option<Format> {
        let is_excluded = !self.excluded.is_empty() && self.excluded.contains(&format!("{parent}.{leaf}"));
        (!is_excluded).then_some(self.format)
    }
}

/// The format of each matrix of `spec` that is packed, by its name in the files: in training as `quantization` says,
/// without it in `source`.
pub fn formats(
    quantization: Option<&Quantization>,
    spec: &ModelSpec,
    source: &dyn WeightSource,
) -> BTreeMap<String, Format> {
    let of_files = || {
        let packed = |name: String| Some((source.packed(&name)?.format, name));
        source.names().into_iter().filter_map(packed).map(|(format, name)| (name, format)).collect()
    };
    quantization.map_or_else(of_files, |packed| packed.matrices(spec))
}

/// The leaves of `projections` by dotted path, the first tensor of the files that is of each, and the format in which
/// the files have it, if it is packed there.
fn leaves_in(projections: &[Projection], source: &dyn WeightSource) -> Vec<(String, String, Option<Format>)> {
    let of_projection = |projection: &Projection| {
        let Projection { parent, leaves, experts, .. } = projection.clone();
        leaves.into_iter().map(move |(leaf, _)| {
            let tensor = file_tensor(&parent, experts, 0, leaf);
            (format!("{parent}.{leaf}"), tensor)
        })
    };
    let named = projections.iter().flat_map(of_projection);
    named
        .map(|(leaf, tensor)| {
            let format = source.packed(&tensor).map(|form| form.format);
            (leaf, tensor, format)
        })
        .collect()
}

/// The digest of a base in its storage: [`weights::digest`] of its files, and the format in which they are packed. The
/// same files in another format are another base.
pub fn digest(source: &dyn WeightSource, quantization: Option<&Quantization>) -> Result<String, SourceError> {
    let files = weights::digest(source)?;
    let Some(Quantization { format, excluded }) = quantization else { return Ok(files) };
    let excluded: Vec<&str> = excluded.iter().map(String::as_str).collect();
    Ok(format!("{:x}", Sha256::digest(format!("{files} {format} {}", excluded.join(" ")))))
}

/// Warns where the files of a base that is not to be quantised are packed.
fn warn_of_packed(spec: &ModelSpec, source: &dyn WeightSource) {
    let leaves = leaves_in(&all_projections(spec), source);
    if let Some((_, tensor, Some(format))) = leaves.into_iter().find(|(_, _, format)| format.is_some()) {
        tracing::warn!(
            "the model's files have {tensor} in {format}: its numbers are decoded while they are loaded; set \
             enable_qlora: true and quant_format: {format} to keep them packed"
        );
    }
}
