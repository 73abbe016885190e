//! OLMoE: an RMSNorm over all heads of q and of k together, `clip_qkv` after it; every layer has `num_experts` experts
//! as wide as `intermediate_size`.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Null, Number, Size},
    Family, mixture,
};
use crate::model::{Ffn, GqaSpec, Mixer, QkNorm};

pub const FAMILY: Family = Family {
    model_type: "olmoe",
    absent: &[
        ("vocab_size", Size(50304)),
        ("hidden_size", Size(2048)),
        ("intermediate_size", Size(2048)),
        ("num_hidden_layers", Size(16)),
        ("num_attention_heads", Size(16)),
        ("max_position_embeddings", Size(4096)),
        ("rms_norm_eps", Number(1e-5)),
        ("eos_token_id", Size(50279)),
        ("pad_token_id", Size(1)),
        ("attention_bias", Flag(false)),
        ("clip_qkv", Null),
        ("norm_topk_prob", Flag(false)),
        ("num_experts", Size(64)),
        ("num_experts_per_tok", Size(8)),
    ],
    aliases: &[("num_local_experts", "num_experts")],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let bias = fields.flag("attention_bias")?;
        let gqa = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: Some(QkNorm::All),
            clip_qkv: fields.optional_positive("clip_qkv")?,
            ..decoder.gqa(fields)?
        };
        let moe = mixture(fields, "intermediate_size")?;
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa.clone()), Ffn::Moe(moe))))
    },
};
