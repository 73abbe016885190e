//! Qwen3: an RMSNorm over each head of q and k before the rotation, `attention_bias` on q, k, v and o (false in
//! every released model), windows as in Qwen2.

use super::{ATTENTION_AND_MLP, Family, Traits, qwen2};

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    fields: &["attention_bias", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"],
    default_targets: ATTENTION_AND_MLP,
    traits: |fields, layers| {
        let bias = fields.flag("attention_bias", false)?;
        let layer_windows = qwen2::windows(fields, layers)?;
        Ok(Traits { qkv_bias: bias, o_bias: bias, mlp_bias: false, qk_norm: true, layer_windows })
    },
};
