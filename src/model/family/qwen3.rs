//! Qwen3: an RMSNorm over each head of q and k before the rotation, `attention_bias` on q, k, v and o (false in
//! every released model), windows as in Qwen2.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Null, Size},
    Decoder, Family, qwen2,
};
use crate::model::{
    Ffn, GqaSpec, Mixer, QkNorm,
    hf_config::{ConfigError, Fields},
};

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    absent: &[
        ("vocab_size", Size(151936)),
        ("hidden_size", Size(4096)),
        ("intermediate_size", Size(22016)),
        ("num_hidden_layers", Size(32)),
        ("num_attention_heads", Size(32)),
        ("num_key_value_heads", Size(32)),
        ("head_dim", Size(128)),
        ("max_position_embeddings", Size(32768)),
        ("attention_bias", Flag(false)),
        ("layer_types", Null),
        ("max_window_layers", Size(28)),
        ("sliding_window", Size(4096)),
        ("use_sliding_window", Flag(false)),
    ],
    aliases: &[],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = attention(fields, decoder)?;
        let (dense, windows) = (decoder.dense(fields)?, qwen2::windows(fields, decoder)?);
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa.clone() }), Ffn::Dense(dense))))
    },
};

/// The attention of Qwen3 and Qwen3-MoE.
pub(super) fn attention(fields: &Fields, decoder: &Decoder) -> Result<GqaSpec, ConfigError> {
    let bias = fields.flag("attention_bias")?;
    Ok(GqaSpec { qkv_bias: bias, o_bias: bias, qk_norm: Some(QkNorm::Head), ..decoder.gqa(fields)? })
}
