//! The families: one page each, with its config fields and the layers that they describe.

mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use super::{
    DenseSpec, Ffn, GqaSpec, LayerSpec, Mixer, MoeSpec, NormSpec,
    hf_config::{ConfigError, Fields},
};
use crate::lora::MoeNames;
use serde_json::Value;

/// A family of HF models.
#[derive(Debug)]
pub struct Family {
    /// As in config.json.
    pub model_type: &'static str,
    /// The config fields that it reads besides `ABSENT`, or with other values where they are absent: those of its
    /// config class in transformers.
    pub absent: &'static [(&'static str, Absent)],
    /// Config fields under another name: (other name, name).
    pub aliases: &'static [(&'static str, &'static str)],
    /// θ of the rotary embedding where it is absent.
    pub rope_theta: f64,
    /// The targets of a null `lora_target_modules`.
    pub default_targets: &'static [&'static str],
    /// Reads the layers of a model.
    pub layers: fn(&Fields, &Decoder) -> Result<Vec<LayerSpec>, ConfigError>,
}

/// The value of an absent config field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Absent {
    Null,
    Flag(bool),
    Size(u64),
    Number(f64),
}

/// Bounds of sizes, far above those of any model.
const MOST_HEADS: usize = 1 << 16;
const MOST_HEAD_DIM: usize = 1 << 16;
const MOST_EXPERTS: usize = 4096;

/// The fields that all families read, and their values where they are absent.
const ABSENT: &[(&str, Absent)] = &[
    ("eos_token_id", Absent::Null),
    ("head_dim", Absent::Null),
    ("initializer_range", Absent::Number(0.02)),
    ("num_key_value_heads", Absent::Null),
    ("pad_token_id", Absent::Null),
    ("rms_norm_eps", Absent::Number(1e-6)),
    ("tie_word_embeddings", Absent::Flag(false)),
];

impl Absent {
    /// The value as JSON.
    pub fn value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Flag(flag) => flag.into(),
            Self::Size(size) => size.into(),
            Self::Number(number) => number.into(),
        }
    }
}

impl Family {
    /// The config fields that it reads with their values where they are absent, its own first.
    pub fn absent_fields(&self) -> impl Iterator<Item = (&'static str, Absent)> {
        self.absent.iter().chain(ABSENT).copied()
    }

    /// True if it reads the config field `field`, under any name.
    pub fn reads(&self, field: &str) -> bool {
        self.absent_fields().any(|(name, _)| name == field)
            || self.aliases.iter().any(|(other, _)| *other == field)
    }
}

/// Settings that all families read alike.
pub struct Decoder {
    pub num_layers: usize,
    pub rms_norm_eps: f64,
}

impl Decoder {
    /// Plain grouped-query attention of the common fields: no biases, norms or windows.
    fn gqa(&self, fields: &Fields) -> Result<GqaSpec, ConfigError> {
        let num_heads = fields.size_up_to("num_attention_heads", MOST_HEADS)?;
        let num_kv_heads = fields.optional_size("num_key_value_heads")?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of num_attention_heads {num_heads}");
            return Err(fields.fault("num_key_value_heads", expected, &num_kv_heads.into()));
        }
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => fields.size("hidden_size")? / num_heads,
        };
        if head_dim > MOST_HEAD_DIM {
            let expected = format!("at most {MOST_HEAD_DIM}, also as hidden_size / num_attention_heads");
            return Err(fields.fault("head_dim", expected, &head_dim.into()));
        }
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(fields.fault("head_dim", "an even number (rotation pairs)", &head_dim.into()));
        }
        Ok(GqaSpec {
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            scale: None,
            rope: fields.rope(head_dim)?,
            qkv_bias: false,
            o_bias: false,
            qk_norm: None,
            qk_norm_eps: self.rms_norm_eps,
            clip_qkv: None,
            window: None,
        })
    }

    /// The dense MLP of the common fields, without biases.
    fn dense(&self, fields: &Fields) -> Result<DenseSpec, ConfigError> {
        Ok(DenseSpec { width: fields.size("intermediate_size")?, bias: false })
    }

    /// All layers: `layer(i)` is the mixer and the feed-forward network of layer i, behind norms of the usual names.
    fn layers(&self, layer: impl Fn(usize) -> (Mixer, Ffn)) -> Vec<LayerSpec> {
        let norms = NormSpec::new(self.rms_norm_eps);
        let of = |(mixer, ffn)| LayerSpec { mixer, ffn, norms };
        (0..self.num_layers).map(|i| of(layer(i))).collect()
    }
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

/// The experts of Qwen's kind, as wide as the field `width` says.
fn mixture(fields: &Fields, width: &str) -> Result<MoeSpec, ConfigError> {
    Ok(MoeSpec {
        experts: fields.size_up_to("num_experts", MOST_EXPERTS)?,
        top_k: fields.size("num_experts_per_tok")?,
        normalise: fields.flag("norm_topk_prob")?,
        width: fields.size(width)?,
        shared_width: None,
        names: MoeNames::MLP,
    })
}

/// The feed-forward network of each layer: `moe`, but dense in the layers that `decoder_sparse_step` and
/// `mlp_only_layers` leave out.
fn sparse(fields: &Fields, moe: MoeSpec, dense: DenseSpec) -> Result<impl Fn(usize) -> Ffn, ConfigError> {
    let step = fields.size("decoder_sparse_step")?;
    let mlp_only = fields.indices("mlp_only_layers")?;
    let is_sparse = move |layer: usize| !mlp_only.contains(&layer) && (layer + 1).is_multiple_of(step);
    Ok(move |layer| if is_sparse(layer) { Ffn::Moe(moe) } else { Ffn::Dense(dense) })
}

/// The default targets: attention and MLP. A name selects dense layers and experts alike.
const ATTENTION_AND_MLP: &[&str] =
    &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
