//! Llama 2 and 3, and what shares their architecture (SmolLM2): `attention_bias` puts a bias on q, k, v and o,
//! `mlp_bias` one on gate, up and down.

use super::{ATTENTION_AND_MLP, Family, Traits};

pub const FAMILY: Family = Family {
    model_type: "llama",
    fields: &["attention_bias", "mlp_bias"],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| {
        let bias = fields.flag("attention_bias", false)?;
        let mlp_bias = fields.flag("mlp_bias", false)?;
        Ok(Traits {
            qkv_bias: bias,
            o_bias: bias,
            mlp_bias,
            layer_windows: vec![None; layers],
            ..Traits::default()
        })
    },
};
