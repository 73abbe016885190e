//! Qwen3-MoE: Qwen3's attention; `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. A model that slides
//! does so in every layer.

use super::{ATTENTION_AND_MLP, Family, MOE_NAMES, Traits, qwen3, sparse_layers};
use crate::model::MoeSpec;

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
    traits: |fields, layers| {
        let slides = fields.flag("use_sliding_window", false)?;
        let window = fields.optional_size("sliding_window")?.filter(|_| slides);
        // transformers writes both names.
        let experts = fields.optional_size("num_local_experts")?;
        let moe = MoeSpec {
            layers: sparse_layers(fields, layers)?,
            experts: experts.map_or_else(|| fields.size("num_experts"), Ok)?,
            top_k: fields.size("num_experts_per_tok")?,
            normalise: fields.flag("norm_topk_prob", false)?,
            width: fields.size("moe_intermediate_size")?,
            shared_width: None,
            names: MOE_NAMES,
        };
        Ok(Traits { moe: Some(moe), ..qwen3::attention(fields, vec![window; layers])? })
    },
};
