//! Every key of tokenizer_config.json and special_tokens_map.json: read, known to change nothing, or refused.

use super::{DataError, special_tokens::is_name};
use serde_json::{Map, Value};
use std::path::Path;

/// Keys that are read, besides names of tokens.
const READ: [&str; 9] = [
    "add_prefix_space",
    "legacy",
    "tokenizer_class",
    "auto_map",
    "chat_template",
    "extra_special_tokens",
    "additional_special_tokens",
    "added_tokens_decoder",
    "split_special_tokens",
];

/// Keys that change no token of a rendered chat.
const HARMLESS: [&[&str]; 5] = [
    // A chat is encoded as its template writes it, and no token is added.
    &["add_bos_token", "add_eos_token", "add_special_tokens", "use_default_system_prompt"],
    // tokenizer.json holds what these say of a tokenizer in another form.
    &[
        "slow_tokenizer_class",
        "tokenizer_type",
        "model_type",
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "spm_file",
        "sp_model_kwargs",
        "add_dummy_prefix",
        "do_lower_case",
        "lowercase",
        "strip_accents",
        "tokenize_chinese_chars",
        "do_basic_tokenize",
        "do_word_tokenize",
        "do_subword_tokenize",
        "never_split",
        "keep_accents",
        "remove_space",
        "trim_offsets",
        "legacy_behaviour",
        "from_slow",
        "use_fast",
        "errors",
        "clean_text",
        "wordpieces_prefix",
        "unk_id",
        "extra_ids",
        "byte_fallback",
        "init_inputs",
        "is_fast",
        "vocab_size",
        "language",
        "task",
        "src_lang",
        "tgt_lang",
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "pad_token_id",
    ],
    // Samples are neither cut nor padded by the tokenizer.
    &[
        "model_max_length",
        "max_length",
        "max_len",
        "max_seq_length",
        "stride",
        "truncation",
        "truncation_side",
        "truncation_strategy",
        "padding",
        "padding_side",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "padding_strategy",
        "return_token_type_ids",
        "return_attention_mask",
        "return_tensors",
        "model_input_names",
    ],
    // Tokens to text.
    &[
        "clean_up_tokenization_spaces",
        "spaces_between_special_tokens",
        "skip_special_tokens",
        "response_schema",
    ],
    // Notes of the program that wrote the file.
    &[
        "name_or_path",
        "special_tokens_map_file",
        "added_tokens_file",
        "processor_class",
        "image_processor_type",
        "feature_extractor_type",
        "is_local",
        "local_files_only",
        "backend",
        "files_loaded",
        "trust_remote_code",
        "use_auth_token",
        "cache_dir",
        "revision",
        "verbose",
        "device_map",
        "_from_auto",
        "_commit_hash",
        "transformers_version",
        "unsloth_version",
    ],
];

/// Keys that would change tokens.
const REFUSED: [(&str, &str); 2] = [
    (
        "fix_mistral_regex",
        "another pre-tokenizer than tokenizer.json has; save the tokenizer with it and leave the key out",
    ),
    (
        "fast_tokenizer_files",
        "tokenizers by version of transformers; keep tokenizer.json alone and leave the key out",
    ),
];

/// Checks tokenizer_config.json.
pub(super) fn check(path: &Path, config: &Map<String, Value>) -> Result<(), DataError> {
    for (key, value) in config {
        let nothing = matches!(value, Value::Null | Value::Bool(false));
        if let Some((_, reason)) = REFUSED.iter().find(|(name, _)| name == key && !nothing) {
            return Err(problem(path, format!("{key}: not built: {reason}")));
        }
        let known = READ.contains(&key.as_str()) || HARMLESS.iter().any(|keys| keys.contains(&key.as_str()));
        if !(known || nothing || is_name(key, value)) {
            return Err(unknown(path, key));
        }
    }
    match config.get("split_special_tokens") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(other) => {
            Err(problem(path, format!("split_special_tokens: expected true or false, got {other}")))
        }
    }
}

/// Checks special_tokens_map.json.
pub(super) fn check_map(path: &Path, map: &Map<String, Value>) -> Result<(), DataError> {
    let lists = ["extra_special_tokens", "additional_special_tokens"];
    match map
        .iter()
        .find(|(key, value)| !lists.contains(&key.as_str()) && !value.is_null() && !is_name(key, value))
    {
        Some((key, _)) => Err(unknown(path, key)),
        None => Ok(()),
    }
}

fn unknown(path: &Path, key: &str) -> DataError {
    problem(path, format!("{key}: an unknown key, which may change tokens; take it out if it does not"))
}

fn problem(path: &Path, problem: String) -> DataError {
    DataError::Tokenizer { path: path.into(), problem }
}
