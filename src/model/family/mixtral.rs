//! Mixtral: Mistral's attention; every layer has `num_local_experts` experts as wide as `intermediate_size`, their
//! weights divided by their sum. In its files the block is `block_sparse_moe` and the matrices are w1, w3 and w2.

use super::{ATTENTION_AND_MLP, Family};
use crate::{
    lora::MoeNames,
    model::{Ffn, GqaSpec, Mixer, MoeSpec},
};

pub const FAMILY: Family = Family {
    model_type: "mixtral",
    fields: &[
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sliding_window",
    ],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        fields.neutral("router_jitter_noise", 0.0)?;
        let moe = MoeSpec {
            experts: fields.size("num_local_experts")?,
            top_k: fields.size("num_experts_per_tok")?,
            normalise: true,
            width: fields.size("intermediate_size")?,
            shared_width: None,
            names: MoeNames { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" },
        };
        let gqa = GqaSpec { window: fields.optional_size("sliding_window")?, ..decoder.gqa(fields)? };
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa), Ffn::Moe(moe))))
    },
};
