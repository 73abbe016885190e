//! Mistral 7B and relatives: no biases; a `sliding_window` that is not null holds for every layer.

use super::{ATTENTION_AND_MLP, Family};
use crate::model::{Ffn, GqaSpec, Mixer};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    fields: &["sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = GqaSpec { window: fields.optional_size("sliding_window")?, ..decoder.gqa(fields)? };
        let dense = decoder.dense(fields)?;
        Ok(decoder.layers(|_| (Mixer::Gqa(gqa), Ffn::Dense(dense))))
    },
};
