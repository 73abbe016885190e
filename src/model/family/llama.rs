//! Llama 2 and 3, and models of their architecture (SmolLM2): `attention_bias` puts a bias on q, k, v and o,
//! `mlp_bias` one on gate, up and down.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Size},
    Family,
};
use crate::model::{DenseSpec, Ffn, GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "llama",
    absent: &[
        ("vocab_size", Size(32000)),
        ("hidden_size", Size(4096)),
        ("intermediate_size", Size(11008)),
        ("num_hidden_layers", Size(32)),
        ("num_attention_heads", Size(32)),
        ("max_position_embeddings", Size(2048)),
        ("eos_token_id", Size(2)),
        ("attention_bias", Flag(false)),
        ("mlp_bias", Flag(false)),
    ],
    aliases: &[],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let bias = fields.flag("attention_bias")?;
        let gqa = GqaSpec { qkv_bias: bias, o_bias: bias, ..decoder.gqa(fields)? };
        let dense = DenseSpec { bias: fields.flag("mlp_bias")?, ..decoder.dense(fields)? };
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa.clone()), Ffn::Dense(dense))))
    },
};
