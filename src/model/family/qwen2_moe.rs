//! Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; a shared expert for every token, times a sigmoid, beside the routed
//! ones. `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. Without `layer_types`, a model that
//! slides does so in every second layer up to `max_window_layers`, from the first on.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Null, Size},
    Family, mixture, qwen2, sparse,
};
use crate::model::{GqaSpec, Mixer, MoeSpec};

pub const FAMILY: Family = Family {
    model_type: "qwen2_moe",
    absent: &[
        ("vocab_size", Size(151936)),
        ("hidden_size", Size(2048)),
        ("intermediate_size", Size(5632)),
        ("num_hidden_layers", Size(24)),
        ("num_attention_heads", Size(16)),
        ("num_key_value_heads", Size(16)),
        ("max_position_embeddings", Size(32768)),
        ("decoder_sparse_step", Size(1)),
        ("layer_types", Null),
        ("max_window_layers", Size(28)),
        ("mlp_only_layers", Null),
        ("moe_intermediate_size", Size(1408)),
        ("norm_topk_prob", Flag(false)),
        ("num_experts", Size(60)),
        ("num_experts_per_tok", Size(4)),
        ("qkv_bias", Flag(true)),
        ("shared_expert_intermediate_size", Size(5632)),
        ("sliding_window", Size(4096)),
        ("use_sliding_window", Flag(false)),
    ],
    aliases: &[],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let (slides, last) = (fields.flag("use_sliding_window")?, fields.count("max_window_layers")?);
        let slides = |layer: usize| slides && layer.is_multiple_of(2) && layer < last;
        let windows = fields.windows(decoder.num_layers, qwen2::window(fields)?, slides)?;
        let gqa = GqaSpec { qkv_bias: fields.flag("qkv_bias")?, ..decoder.gqa(fields)? };
        let shared_width = Some(fields.size("shared_expert_intermediate_size")?);
        let moe = MoeSpec { shared_width, ..mixture(fields, "moe_intermediate_size")? };
        let ffn = sparse(fields, moe, decoder.dense(fields)?)?;
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa.clone() }), ffn(i))))
    },
};
