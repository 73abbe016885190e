//! Qwen3: an RMSNorm over each head of q and k before the rotation, `attention_bias` on q, k, v and o (false in
//! every released model), windows as in Qwen2.

use super::{ATTENTION_AND_MLP, Decoder, Family, qwen2};
use crate::model::{
    Ffn, GqaSpec, Mixer, QkNorm,
    hf_config::{ConfigError, Fields},
};

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    fields: &["attention_bias", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = attention(fields, decoder)?;
        let (dense, windows) = (decoder.dense(fields)?, qwen2::windows(fields, decoder)?);
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa }), Ffn::Dense(dense))))
    },
};

/// The attention of Qwen3 and Qwen3-MoE.
pub(super) fn attention(fields: &Fields, decoder: &Decoder) -> Result<GqaSpec, ConfigError> {
    let bias = fields.flag("attention_bias", false)?;
    Ok(GqaSpec { qkv_bias: bias, o_bias: bias, qk_norm: Some(QkNorm::Head), ..decoder.gqa(fields)? })
}
