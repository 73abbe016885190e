//! Qwen3-MoE: Qwen3's attention; `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. A model that
//! slides does so in every layer.

use super::{ATTENTION_AND_MLP, Family, mixture, qwen3, sparse};
use crate::model::{GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    fields: &[
        "attention_bias",
        "decoder_sparse_step",
        "max_window_layers",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "sliding_window",
        "use_sliding_window",
    ],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let slides = fields.flag("use_sliding_window", false)?;
        let window = fields.optional_size("sliding_window")?.filter(|_| slides);
        let gqa = GqaSpec { window, ..qwen3::attention(fields, decoder)? };
        let ffn = sparse(fields, mixture(fields, "moe_intermediate_size")?, decoder.dense(fields)?)?;
        Ok(decoder.layers(|i| (Mixer::Gqa(gqa), ffn(i))))
    },
};
