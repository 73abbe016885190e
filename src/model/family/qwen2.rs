//! Qwen2 and Qwen2.5: biases on q, k and v only. `use_sliding_window` lets the layers from `max_window_layers` on
//! (or those that `layer_types` names) slide over `sliding_window` tokens.

use super::{ATTENTION_AND_MLP, Decoder, Family};
use crate::model::{
    Ffn, GqaSpec, Mixer,
    hf_config::{ConfigError, Fields},
};

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    fields: &["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = GqaSpec { qkv_bias: true, ..decoder.gqa(fields)? };
        let (dense, windows) = (decoder.dense(fields)?, windows(fields, decoder)?);
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa }), Ffn::Dense(dense))))
    },
};

/// The windows of Qwen2 and Qwen3.
pub(super) fn windows(fields: &Fields, decoder: &Decoder) -> Result<Vec<Option<usize>>, ConfigError> {
    let slides = fields.flag("use_sliding_window", false)?;
    fields.windows(decoder.num_layers, fields.optional_size("sliding_window")?.filter(|_| slides))
}
