//! The families: one page each, with the config fields that it knows and what differs from the common decoder.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use super::hf_config::{ConfigError, Fields};

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
    pub qk_norm: bool,
    pub layer_windows: Vec<Option<usize>>,
}

/// Every family that is built.
pub const FAMILIES: &[Family] = &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// Attention and MLP, the default targets of dense decoders.
const ATTENTION_AND_MLP: &[&str] =
    &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
