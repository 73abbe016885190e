//! Qwen2 and Qwen2.5: biases on q, k and v only. `use_sliding_window` lets the layers from `max_window_layers` on
//! (or those that `layer_types` names) slide over `sliding_window` tokens.

use super::{ATTENTION_AND_MLP, Family, Traits};
use crate::model::hf_config::{ConfigError, Fields};

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    fields: &["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| {
        Ok(Traits { qkv_bias: true, layer_windows: windows(fields, layers)?, ..Traits::default() })
    },
};

/// The windows of Qwen2 and Qwen3.
pub(super) fn windows(fields: &Fields, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let slides = fields.flag("use_sliding_window", false)?;
    fields.windows(layers, fields.optional_size("sliding_window")?.filter(|_| slides))
}
