//! Llama 2 and 3, and models of their architecture (SmolLM2): `attention_bias` puts a bias on q, k, v and o,
//! `mlp_bias` one on gate, up and down.

use super::{ATTENTION_AND_MLP, Family};
use crate::model::{DenseSpec, Ffn, GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "llama",
    fields: &["attention_bias", "mlp_bias"],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let bias = fields.flag("attention_bias", false)?;
        let gqa = GqaSpec { qkv_bias: bias, o_bias: bias, ..decoder.gqa(fields)? };
        let dense = DenseSpec { bias: fields.flag("mlp_bias", false)?, ..decoder.dense(fields)? };
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa), Ffn::Dense(dense))))
    },
};
