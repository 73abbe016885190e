//! Reads a generation_config.json: the tokens that end a generation, the settings that would change a greedy one, and
//! those by which transformers would sample.

use super::{ConfigError, is_same, read_object, token_ids};
use crate::console::shortened;
use serde_json::Value;
use std::path::Path;

/// Settings without effect on greedy decoding, or on its tokens.
const HARMLESS: &[&str] = &[
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "chat_format",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "do_sample",
    "early_stopping",
    "epsilon_cutoff",
    "eta_cutoff",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "max_window_size",
    "min_p",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "trust_remote_code",
    "typical_p",
    "use_cache",
];

/// Settings that would change a greedy continuation, with the value at which they do not. Null does not either.
const NEUTRAL: &[(&str, f64)] = &[
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("guidance_scale", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("repetition_penalty", 1.0),
];

/// Settings of sampling.
const SAMPLING: &[&str] = &["temperature", "top_p", "top_k"];

/// The part of a generation_config.json that generation needs.
pub struct Generation {
    pub eos_token_ids: Vec<i64>,
    /// Settings that are not built, with their values.
    pub unread: Vec<String>,
    /// `do_sample` and the settings of sampling, with their values, if `do_sample` is true.
    pub sampling: Vec<(String, Value)>,
}

impl Generation {
    /// Reads the file at `path`, if there is one.
    pub fn read(path: &Path) -> Result<Option<Self>, ConfigError> {
        if !path.is_file() {
            return Ok(None);
        }
        let map = read_object(path)?;
        let has_effect = |(key, value): &(&String, &Value)| {
            let neutral = NEUTRAL.iter().find(|(name, _)| name == key);
            let is_neutral = neutral.is_some_and(|(_, neutral)| is_same(value, &(*neutral).into()));
            *key != "eos_token_id" && !HARMLESS.contains(&key.as_str()) && !value.is_null() && !is_neutral
        };
        let unread = map.iter().filter(has_effect).map(|(key, value)| format!("{key} {}", shortened(value)));
        let samples = map.get("do_sample").is_some_and(|value| *value == true);
        let sampling = SAMPLING.iter().filter(|_| samples).filter_map(|&key| {
            let value = map.get(key).filter(|value| !value.is_null())?;
            Some((key.to_owned(), value.clone()))
        });
        let of_do_sample = samples.then(|| ("do_sample".to_owned(), Value::Bool(true)));
        let sampling = of_do_sample.into_iter().chain(sampling).collect();
        let unread = unread.collect();
        Ok(Some(Self { eos_token_ids: token_ids(path, &map)?, unread, sampling }))
    }
}
