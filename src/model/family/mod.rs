//! The families: one page each, with the config fields that it knows and what differs from the common decoder.

mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use super::{
    MoeSpec, QkNorm,
    hf_config::{ConfigError, Fields},
};
use crate::lora::MoeNames;

/// A family of HF models.
#[derive(Debug)]
pub struct Family {
    /// As in config.json.
    pub model_type: &'static str,
    /// Its config fields besides those that all families share.
    pub fields: &'static [&'static str],
    /// What a null `lora_target_modules` means.
    pub default_targets: &'static [&'static str],
    /// Reads what differs, for a model of so many layers.
    pub traits: fn(&Fields, usize) -> Result<Traits, ConfigError>,
}

/// What differs between families.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traits {
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: Option<QkNorm>,
    pub clip_qkv: Option<f64>,
    pub layer_windows: Vec<Option<usize>>,
    pub moe: Option<MoeSpec>,
}

/// Every family that is built.
pub const FAMILIES: &[Family] = &[
    llama::FAMILY,
    mistral::FAMILY,
    mixtral::FAMILY,
    olmoe::FAMILY,
    qwen2::FAMILY,
    qwen2_moe::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
];

/// The experts of Qwen's kind, whose width is the field `width`; `decoder_sparse_step` and `mlp_only_layers`, where a family
/// has them, leave some layers dense.
fn mixture(fields: &Fields, layers: usize, width: &str) -> Result<MoeSpec, ConfigError> {
    let step = fields.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let dense = fields.indices("mlp_only_layers")?;
    let sparse = |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    // transformers writes the one or the other.
    let experts = fields.optional_size("num_local_experts")?;
    Ok(MoeSpec {
        layers: (0..layers).map(sparse).collect(),
        experts: experts.map_or_else(|| fields.size("num_experts"), Ok)?,
        top_k: fields.size("num_experts_per_tok")?,
        normalise: fields.flag("norm_topk_prob", false)?,
        width: fields.size(width)?,
        shared_width: None,
        names: MoeNames::MLP,
    })
}

/// Attention and MLP, the default targets; a name selects dense layers and experts alike.
const ATTENTION_AND_MLP: &[&str] =
    &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
