//! Mistral 7B and relatives: no biases; a `sliding_window` that is not null holds for every layer.

use super::{ATTENTION_AND_MLP, Absent::Size, Family};
use crate::model::{Ffn, GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    absent: &[
        ("vocab_size", Size(32000)),
        ("hidden_size", Size(4096)),
        ("intermediate_size", Size(14336)),
        ("num_hidden_layers", Size(32)),
        ("num_attention_heads", Size(32)),
        ("num_key_value_heads", Size(8)),
        ("max_position_embeddings", Size(131072)),
        ("eos_token_id", Size(2)),
        ("sliding_window", Size(4096)),
    ],
    aliases: &[],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = GqaSpec { window: fields.optional_size("sliding_window")?, ..decoder.gqa(fields)? };
        let dense = decoder.dense(fields)?;
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa.clone()), Ffn::Dense(dense))))
    },
};
