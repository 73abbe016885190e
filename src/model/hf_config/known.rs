//! Fields of config.json that no family reads: those that have no effect, each with its reason, and those that have one
//! and are not built unless they hold a neutral value. Any other field is refused, as it might change the maths.

use super::{ConfigError, is_same};
use crate::console::shortened;
use crate::model::family::Family;
use crate::weights::Scheme;
use serde_json::{Map, Value};
use std::path::Path;

/// Fields without effect: (reason, fields).
pub const HARMLESS: &[(&str, &[&str])] = &[
    (
        "says which program wrote the file, or for which classes",
        &[
            "_commit_hash",
            "_name_or_path",
            "architectures",
            "auto_map",
            "is_llama_config",
            "model_type",
            "name_or_path",
            "transformers.js_config",
            "transformers_version",
            "unsloth_fixed",
            "unsloth_version",
        ],
    ),
    (
        "belongs to the tokenizer, which has its own files",
        &[
            "bos_token_id",
            "decoder_start_token_id",
            "prefix",
            "sep_token_id",
            "tokenizer_class",
            "tokenizer_model_max_length",
        ],
    ),
    (
        "describes heads of other tasks",
        &["finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"],
    ),
    (
        "chooses a kernel or a form of the output",
        &[
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_experts_implementation_internal",
            "attn_implementation",
            "experts_implementation",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "tf_legacy_loss",
            "torchscript",
            "use_bfloat16",
            "use_cache",
        ],
    ),
    (
        "is the length of a row, which data.max_seq_len and packing set",
        &["max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "seq_length"],
    ),
    ("counts layers with windows, which this family does not have", &["max_window_layers"]),
    ("weighs the routers' loss, which needs output_router_logits", &["router_aux_loss_coef"]),
    (
        "is for generation: transformers reads generation_config.json",
        &[
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ],
    ),
];

/// Fields with an effect that is not built, with the values at which they have none. A family that reads a field
/// allows more.
pub const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_cross_attention", &["false"]),
    ("attention_dropout", &["0.0"]),
    ("chunk_size_feed_forward", &["0"]),
    ("cross_attention_hidden_size", &["null"]),
    ("embd_pdrop", &["0.0"]),
    ("hidden_act", &["\"silu\"", "\"swish\""]),
    ("is_decoder", &["false"]),
    ("is_encoder_decoder", &["false"]),
    ("output_router_logits", &["false"]),
    ("partial_rotary_factor", &["1.0", "null"]),
    ("pretraining_tp", &["1", "null"]),
    ("pruned_heads", &["{}", "null"]),
    ("resid_pdrop", &["0.0"]),
    ("rope_interleaved", &["false"]),
    ("router_jitter_noise", &["0.0"]),
    ("sliding_window", &["null"]),
    ("tie_encoder_decoder", &["false"]),
    ("use_mrope", &["false"]),
    ("use_sliding_window", &["false"]),
];

/// Fields of quantized checkpoints.
const QUANTIZED: &[&str] = &["compression_config", "quantization_config"];

/// Fields that all families read with absent values of their own, or without any.
const READ: &[&str] = &[
    "dtype",
    "original_max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
];

/// The reason for which `field` has no effect, if it has none at any value.
pub fn harmless(field: &str) -> Option<&'static str> {
    HARMLESS.iter().find(|(_, fields)| fields.contains(&field)).map(|(reason, _)| *reason)
}

/// Refuses fields of `map` that `family` does not know, or whose value needs what is not built.
pub(super) fn check(path: &Path, map: &Map<String, Value>, family: &Family) -> Result<(), ConfigError> {
    Scheme::in_config(path, map).map_err(ConfigError::Quantized)?;
    let mut unknown = Vec::new();
    for (field, value) in map {
        let is_read =
            family.reads(field) || [READ, QUANTIZED].iter().any(|fields| fields.contains(&field.as_str()));
        if is_read || harmless(field).is_some() {
            continue;
        }
        match NEUTRAL.iter().find(|(name, _)| name == field) {
            None => unknown.push(field.as_str()),
            Some((_, values)) if values.iter().any(|neutral| is_text(value, neutral)) => {}
            Some((_, values)) => {
                let (field, found) = (field.clone(), shortened(value));
                let expected = format!("{} (anything else is not built)", values[0]);
                return Err(ConfigError::Value { path: path.to_owned(), field, expected, found });
            }
        }
    }
    ConfigError::unknown(path, family.model_type, unknown)
}

/// True if `value` is the JSON `text`.
fn is_text(value: &Value, text: &str) -> bool {
    serde_json::from_str(text).is_ok_and(|other: Value| is_same(value, &other))
}
