//! Mixtral: Mistral's attention; every layer has `num_local_experts` experts as wide as `intermediate_size`, their
//! weights divided by their sum. In its files the block is `block_sparse_moe` and the matrices are w1, w3 and w2.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Null, Number, Size},
    Family, MOST_EXPERTS,
};
use crate::{
    lora::MoeNames,
    model::{Ffn, GqaSpec, Mixer, MoeSpec},
};

pub const FAMILY: Family = Family {
    model_type: "mixtral",
    absent: &[
        ("vocab_size", Size(32000)),
        ("hidden_size", Size(4096)),
        ("intermediate_size", Size(14336)),
        ("num_hidden_layers", Size(32)),
        ("num_attention_heads", Size(32)),
        ("num_key_value_heads", Size(8)),
        ("max_position_embeddings", Size(131072)),
        ("rms_norm_eps", Number(1e-5)),
        ("eos_token_id", Size(2)),
        ("num_experts_per_tok", Size(2)),
        ("num_local_experts", Size(8)),
        ("sliding_window", Null),
    ],
    aliases: &[("num_experts", "num_local_experts")],
    rope_theta: 1_000_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let moe = MoeSpec {
            experts: fields.size_up_to("num_local_experts", MOST_EXPERTS)?,
            top_k: fields.size("num_experts_per_tok")?,
            normalise: true,
            width: fields.size("intermediate_size")?,
            shared_width: None,
            names: MoeNames { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" },
        };
        let gqa = GqaSpec { window: fields.optional_size("sliding_window")?, ..decoder.gqa(fields)? };
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa.clone()), Ffn::Moe(moe))))
    },
};
