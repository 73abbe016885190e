//! Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; beside the routed experts one that every token goes to, times a sigmoid.
//! `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. Without `layer_types`, a model that slides does so
//! in every second layer up to `max_window_layers`, from the first on.

use super::{ATTENTION_AND_MLP, Family, Traits, mixture};
use crate::model::MoeSpec;

pub const FAMILY: Family = Family {
    model_type: "qwen2_moe",
    fields: &[
        "decoder_sparse_step",
        "layer_types",
        "max_window_layers",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "output_router_logits",
        "qkv_bias",
        "router_aux_loss_coef",
        "shared_expert_intermediate_size",
        "sliding_window",
        "use_sliding_window",
    ],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| {
        let slides = fields.flag("use_sliding_window", false)?;
        // transformers writes a window of 0 where nothing slides.
        let window = if slides { fields.optional_size("sliding_window")? } else { None };
        let layer_windows = if fields.has("layer_types") {
            fields.windows(layers, window)?
        } else {
            let last = fields.optional_size("max_window_layers")?.unwrap_or(layers);
            (0..layers).map(|layer| window.filter(|_| layer % 2 == 0 && layer < last)).collect()
        };
        let shared_width = Some(fields.size("shared_expert_intermediate_size")?);
        let moe = MoeSpec { shared_width, ..mixture(fields, layers, "moe_intermediate_size")? };
        let qkv_bias = fields.flag("qkv_bias", true)?;
        Ok(Traits { qkv_bias, layer_windows, moe: Some(moe), ..Traits::default() })
    },
};
