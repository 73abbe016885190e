//! Mistral 7B and its kin: no biases; a `sliding_window` that is not null holds for every layer.

use super::{ATTENTION_AND_MLP, Family, Traits};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    fields: &["sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| {
        let window = fields.optional_size("sliding_window")?;
        Ok(Traits { layer_windows: vec![window; layers], ..Traits::default() })
    },
};
