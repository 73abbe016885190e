//! Qwen3: an RMSNorm over each head of q and k before the rotation, `attention_bias` on q, k, v and o (false in
//! every released model), windows as in Qwen2.

use super::{ATTENTION_AND_MLP, Family, Traits, qwen2};
use crate::model::{
    QkNorm,
    hf_config::{ConfigError, Fields},
};

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    fields: &["attention_bias", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| attention(fields, qwen2::windows(fields, layers)?),
};

/// The attention of Qwen3 and Qwen3-MoE.
pub(super) fn attention(fields: &Fields, layer_windows: Vec<Option<usize>>) -> Result<Traits, ConfigError> {
    let bias = fields.flag("attention_bias", false)?;
    let qk_norm = Some(QkNorm::Head);
    Ok(Traits { qkv_bias: bias, o_bias: bias, qk_norm, layer_windows, ..Traits::default() })
}
