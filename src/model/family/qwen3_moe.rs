//! Qwen3-MoE: Qwen3's attention; `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. A model that
//! slides does so in every layer.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Null, Size},
    Family, mixture, qwen2, qwen3, sparse,
};
use crate::model::{GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    absent: &[
        ("vocab_size", Size(151936)),
        ("hidden_size", Size(2048)),
        ("intermediate_size", Size(6144)),
        ("num_hidden_layers", Size(24)),
        ("num_attention_heads", Size(32)),
        ("num_key_value_heads", Size(4)),
        ("max_position_embeddings", Size(32768)),
        ("attention_bias", Flag(false)),
        ("decoder_sparse_step", Size(1)),
        ("mlp_only_layers", Null),
        ("moe_intermediate_size", Size(768)),
        ("norm_topk_prob", Flag(false)),
        ("num_experts", Size(128)),
        ("num_experts_per_tok", Size(8)),
        ("sliding_window", Size(4096)),
        ("use_sliding_window", Flag(false)),
    ],
    aliases: &[("num_local_experts", "num_experts")],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = GqaSpec { window: qwen2::window(fields)?, ..qwen3::attention(fields, decoder)? };
        let ffn = sparse(fields, mixture(fields, "moe_intermediate_size")?, decoder.dense(fields)?)?;
        Ok(decoder.layers(|i| (Mixer::Gqa(gqa.clone()), ffn(i))))
    },
};
