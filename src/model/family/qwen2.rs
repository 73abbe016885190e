//! Qwen2 and Qwen2.5: biases on q, k and v only. `use_sliding_window` lets the layers from `max_window_layers` on
//! (or those that `layer_types` names) slide over `sliding_window` tokens.

use super::{
    ATTENTION_AND_MLP,
    Absent::{Flag, Null, Size},
    Decoder, Family,
};
use crate::model::{
    Ffn, GqaSpec, Mixer,
    hf_config::{ConfigError, Fields},
};

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    absent: &[
        ("vocab_size", Size(151936)),
        ("hidden_size", Size(4096)),
        ("intermediate_size", Size(22016)),
        ("num_hidden_layers", Size(32)),
        ("num_attention_heads", Size(32)),
        ("num_key_value_heads", Size(32)),
        ("max_position_embeddings", Size(32768)),
        ("layer_types", Null),
        ("max_window_layers", Size(28)),
        ("sliding_window", Size(4096)),
        ("use_sliding_window", Flag(false)),
    ],
    aliases: &[],
    rope_theta: 10_000.0,
    default_targets: ATTENTION_AND_MLP,
    layers: |fields, decoder| {
        let gqa = GqaSpec { qkv_bias: true, ..decoder.gqa(fields)? };
        let (dense, windows) = (decoder.dense(fields)?, windows(fields, decoder)?);
        Ok(decoder.layers(|i| (Mixer::Gqa(GqaSpec { window: windows[i], ..gqa.clone() }), Ffn::Dense(dense))))
    },
};

/// The windows of Qwen2 and Qwen3. A window of null has no effect.
pub(super) fn windows(fields: &Fields, decoder: &Decoder) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = window(fields)?;
    let first = fields.count("max_window_layers")?;
    fields.windows(decoder.num_layers, window, |layer| window.is_some() && layer >= first)
}

/// The window of a Qwen that slides. One that does not may have any number there.
pub(super) fn window(fields: &Fields) -> Result<Option<usize>, ConfigError> {
    if fields.flag("use_sliding_window")? { fields.optional_size("sliding_window") } else { Ok(None) }
}
