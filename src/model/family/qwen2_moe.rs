//! Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; a shared expert for every token, times a sigmoid, beside the routed
//! ones. `decoder_sparse_step` and `mlp_only_layers` leave some layers dense. Without `layer_types`, a model that
//! slides does so in every second layer up to `max_window_layers`, from the first on.

use super::{ATTENTION_AND_MLP, Family, mixture, sparse};
use crate::model::{GqaSpec, Mixer, MoeSpec};

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
    layers: |fields, decoder| {
        let slides = fields.flag("use_sliding_window", false)?;
        // transformers writes a window of 0 where nothing slides.
        let window = if slides { fields.optional_size("sliding_window")? } else { None };
        let windows = if fields.has("layer_types") {
            fields.windows(decoder.num_layers, window)?
        } else {
            let last = fields.optional_size("max_window_layers")?.unwrap_or(decoder.num_layers);
            let slides = |layer: usize| layer.is_multiple_of(2) && layer < last;
            (0..decoder.num_layers).map(|layer| window.filter(|_| slides(layer))).collect()
        };
        let gqa = GqaSpec { qkv_bias: fields.flag("qkv_bias", true)?, ..decoder.gqa(fields)? };
        let shared_width = Some(fields.size("shared_expert_intermediate_size")?);
        let moe = MoeSpec { shared_width, ..mixture(fields, "moe_intermediate_size")? };
        let ffn = sparse(fields, moe, decoder.dense(fields)?)?;
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa }), ffn(i))))
    },
};
