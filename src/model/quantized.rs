//! Quantisation of a model's base: the format, and the linear layers that keep their numbers. Pure.

use super::{ModelSpec, base_plan::all_projections};
use crate::{
    config::QuantFormat,
    lora::targets::{TargetError, named},
    quant::Format,
};
use std::collections::BTreeSet;
use tch::Device;

/// Modules that are never quantised, by the ends of their names; to exclude them changes nothing.
const NEVER: [&str; 6] = ["lm_head", "embed_tokens", "norm", "gate", "router", "shared_expert_gate"];

/// Storage of the linear layers of decoder layers as packed tiles.
#[derive(Clone, Debug, PartialEq)]
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

impl Quantization {
    /// The linear layers of `spec` in `format`, but for those that `exclude` names as targets are named.
    ///
    /// # Errors
    /// A name matches nothing.
    pub fn new(format: Format, exclude: &[String], spec: &ModelSpec) -> Result<Self, TargetError> {
        let counts = |name: &&String| !NEVER.iter().any(|never| name.ends_with(never));
        let exclude: Vec<String> = exclude.iter().filter(counts).cloned().collect();
        Ok(Self { format, excluded: named(&all_projections(spec), &exclude)? })
    }

    /// The reason why tensors on `device` cannot be of a quantised base, if they cannot.
    pub fn refusal(device: Device) -> Option<&'static str> {
        let reason = "packed weights are decoded on CPUs alone; give --device cpu, or leave it out";
        (device != Device::Cpu).then_some(reason)
    }

    /// The format of leaf `leaf` of the module `parent`; `None` if it keeps its numbers.
    pub fn of(&self, parent: &str, leaf: &str) -> Option<Format> {
        let is_excluded = !self.excluded.is_empty() && self.excluded.contains(&format!("{parent}.{leaf}"));
        (!is_excluded).then_some(self.format)
    }
}
