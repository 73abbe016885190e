//! OLMoE: an RMSNorm over all heads of q and of k together, `clip_qkv` after it; every layer has `num_experts` experts
//! as wide as `intermediate_size`.

use super::{ATTENTION_AND_MLP, Family, mixture};
use crate::model::{Ffn, GqaSpec, Mixer, QkNorm};

pub const FAMILY: Family = Family {
    model_type: "olmoe",
    fields: &[
        "attention_bias",
        "clip_qkv",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "output_router_logits",
        "router_aux_loss_coef",
    ],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let bias = fields.flag("attention_bias", false)?;
        let gqa = GqaSpec {
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: Some(QkNorm::All),
            clip_qkv: fields.optional_positive("clip_qkv")?,
            ..decoder.gqa(fields)?
        };
        let moe = mixture(fields, "intermediate_size")?;
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa), Ffn::Moe(moe))))
    },
};
