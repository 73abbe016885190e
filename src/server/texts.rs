//! Texts of the model: token ids of what clients write, and the text of what was sampled.

use super::fault::Fault;
use crate::data::{ChatTemplate, Tokenizer};
use axum::http::StatusCode;
use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

/// The tokenizer of the base, read when it is first needed: a server that only trains needs none.
#[derive(Debug)]
pub struct Texts {
    folder: PathBuf,
    /// Ids of the model's vocabulary; a tokenizer may have more.
    vocab_size: usize,
    loaded: OnceLock<Result<Arc<Tokenizer>, String>>,
    template: OnceLock<Result<ChatTemplate, String>>,
}

impl Texts {
    /// The texts of the tokenizer in `folder`, for a model of `vocab_size` ids.
    pub fn new(folder: PathBuf, vocab_size: usize) -> Self {
        Self { folder, vocab_size, loaded: OnceLock::new(), template: OnceLock::new() }
    }

    /// # Errors
    /// The tokenizer cannot be read. Permanent, so 400: clients send again what a 5xx answers.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Fault> {
        let load = || Tokenizer::load(&self.folder).map(Arc::new).map_err(|error| error.to_string());
        self.loaded.get_or_init(load).as_ref().map_err(|error| {
            Fault::user(format!(
                "texts need the tokenizer, which cannot be read: {error}; send token ids instead"
            ))
        })
    }

    /// The chat template beside the tokenizer.
    ///
    /// # Errors
    /// There is none, or it cannot be read. Permanent, as for the tokenizer.
    pub fn template(&self) -> Result<&ChatTemplate, Fault> {
        let load = || ChatTemplate::load(&self.folder).map_err(|error| error.to_string());
        self.template.get_or_init(load).as_ref().map_err(|error| {
            Fault::user(format!(
                "chats need the model's chat template: {error}; send text to /v1/completions"
            ))
        })
    }

    /// Ids of `text`, at least one and all of the model's vocabulary. Special tokens in it are recognised; none are
    /// added.
    ///
    /// # Errors
    /// There is no tokenizer, or the text has no token or one that the model lacks.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, Fault> {
        let ids = self.tokenizer()?.encode(text).map_err(|error| Fault::user(error.to_string()))?;
        if let Some(id) = ids.iter().find(|&&id| id >= self.vocab_size as i64) {
            let vocabulary = self.vocab_size;
            return Err(Fault::user(format!("text: token {id} is none of the model's {vocabulary}")));
        }
        if ids.is_empty() {
            return Err(Fault::user("text: it has no token"));
        }
        Ok(ids)
    }

    /// The text of `ids`, which may end within a character. `skip_special`: without special tokens.
    ///
    /// # Errors
    /// There is no tokenizer, or it fails.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String, Fault> {
        let text = self.tokenizer()?.decode(ids, skip_special);
        text.map_err(|error| Fault::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_text_is_encoded_as_it_is_and_comes_back() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat/byte_level");
        let texts = Texts::new(folder.clone(), 100_000);
        let ids = texts.encode("hello world").unwrap();
        assert_eq!(texts.decode(&ids, true).unwrap(), "hello world");
        assert!(texts.encode("").unwrap_err().detail.contains("no token"));
        let small = Texts::new(folder, 1);
        assert!(small.encode("hello").unwrap_err().detail.contains("none of the model's 1"));
    }

    #[test]
    fn without_a_tokenizer_texts_are_refused_with_the_folder() {
        let texts = Texts::new("/no/such/folder".into(), 10);
        for fault in [texts.encode("a").unwrap_err(), texts.decode(&[1], true).unwrap_err()] {
            assert_eq!(fault.status, StatusCode::BAD_REQUEST);
            assert!(fault.detail.contains("/no/such/folder"), "{fault}");
        }
    }
}
