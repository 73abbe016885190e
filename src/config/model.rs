//! Section `model`.

use super::error::Problem;
use super::section::section;
use std::path::PathBuf;

section! {
    /// Section `model`: the base model.
    pub struct ModelArgs {
        /// HF model directory (config.json, safetensors). null: random weights, `config_path` is then needed.
        model_path: Option<PathBuf> = None;
        /// HF config directory or config.json, when it is not in `model_path`.
        config_path: Option<PathBuf> = None;
        /// Directory with tokenizer.json and the chat template. null: `model_path`, then `config_path`.
        tokenizer_path: Option<PathBuf> = None;
        /// Compute q, k, v (and gate, up) as one GEMM. Results and adapter keys are the same either way.
        merge_qkv: bool = true;
    }
}

impl ModelArgs {
    /// The HF config: a config.json, or its directory.
    pub fn hf_config(&self) -> PathBuf {
        self.config_path.clone().or(self.model_path.clone()).unwrap_or_default()
    }

    /// The problem of a model that is named nowhere.
    pub(super) fn missing(&self) -> Option<Problem> {
        let needed = "an HF model directory, or config_path alone for random weights";
        (self.model_path.is_none() && self.config_path.is_none()).then_some(Problem::Missing { needed })
    }

    /// The directory of the tokenizer.
    pub fn tokenizer(&self) -> PathBuf {
        self.tokenizer_path.clone().unwrap_or_else(|| self.hf_config())
    }
}
