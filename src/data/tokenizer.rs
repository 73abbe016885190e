//! The model's tokenizer: tokenizer.json, and tokens that files beside it add. It writes no special tokens of its own
//! accord: a chat template does.

use super::{DataError, LineProblem, error::one_line, guard::guarded, special_tokens::SpecialTokens};
use crate::{lfs, regular_file};
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};
use std::{ops::Range, path::Path};
use tokenizers::models::ModelWrapper;

/// Token ids of a text with the bytes of the text that each stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids `[tokens]`.
    pub ids: Vec<i64>,
    /// Byte ranges of the text `[tokens]`; tokens that share a character share its range.
    pub offsets: Vec<Range<usize>>,
}

impl Encoded {
    /// True for each token that stands for a byte of `spans`, from the first such token of a span to the last.
    pub fn covered_by(&self, spans: &[Range<usize>]) -> Vec<bool> {
        let mut covered = vec![false; self.ids.len()];
        for span in spans.iter().filter(|span| !span.is_empty()) {
            // Some tokenizers trim spaces from offsets: such tokens count by their neighbours, as in transformers.
            let first =
                self.offsets.iter().position(|offset| offset.end > span.start && offset.start < span.end);
            let last =
                self.offsets.iter().rposition(|offset| offset.start < span.end && offset.end > span.start);
            if let (Some(first), Some(last)) = (first, last) {
                covered[first..=last].fill(true);
            }
        }
        covered
    }
}

/// The tokenizer of a model directory.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    digest: [u8; 32],
}

impl Tokenizer {
    /// Reads `tokenizer.json` of `dir`, and adds the tokens that other files there have besides. Truncation and padding
    /// that it may prescribe are left out.
    pub fn load(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join("tokenizer.json");
        let bytes = match regular_file::read(&path) {
            Ok(bytes) => bytes,
            Err(source) => return Err(without_tokenizer(dir).unwrap_or(DataError::Io { path, source })),
        };
        let problem = |problem: String| DataError::Tokenizer { path: path.clone(), problem };
        if lfs::is_pointer(&bytes) {
            let remedy = "a pointer of Git LFS in place of the file; run `git lfs pull` in the folder";
            return Err(problem(remedy.into()));
        }
        let parsed = |bytes: &[u8]| match guarded(|| tokenizers::Tokenizer::from_bytes(bytes)) {
            Some(read) => read.map_err(|error| {
                problem(format!("not a tokenizer: {}; copy the model's file again", one_line(error)))
            }),
            None => {
                let fault = serde_json::from_slice::<IgnoredAny>(bytes).map_err(one_line);
                let why = fault.err().unwrap_or_else(|| "its reader failed".into());
                Err(problem(format!("not a tokenizer: {why}; it is cut or damaged: copy or write it again")))
            }
        };
        let mut inner = parsed(&bytes)?;
        let present = inner.get_added_tokens_decoder().into_iter().collect();
        let tokens = SpecialTokens::load(dir)?;
        let bytes = match &tokens.class {
            None => bytes,
            Some(class) => {
                let rebuilt = class.rebuilt(&bytes)?;
                inner = parsed(&rebuilt)?;
                rebuilt
            }
        };
        if let ModelWrapper::BPE(model) = inner.get_model()
            && let Some(dropout) = model.dropout.filter(|&dropout| dropout != 0.0)
        {
            let what = "would tokenize the same text differently each time; set it to null";
            return Err(problem(format!("model.dropout: {dropout} {what}")));
        }
        inner.with_truncation(None).map_err(|error| problem(one_line(error)))?;
        inner.with_padding(None);
        if tokens.names_code {
            let config = dir.join("tokenizer_config.json");
            tracing::warn!("{}: auto_map: its code is not run, tokenizer.json is used", config.display());
        }
        let missing = tokens.missing(&present);
        guarded(|| inner.add_tokens(&missing))
            .ok_or_else(|| problem("its reader failed at a token that files beside it add".into()))?;
        inner.set_encode_special_tokens(tokens.split);
        for (stated, token) in &tokens.added {
            if let Some(id) = inner.token_to_id(&token.content).filter(|id| id != stated) {
                let (text, dir) = (&token.content, dir.display());
                tracing::warn!(
                    "{dir}: {text} is token {id}, as in transformers, although a file says {stated}"
                );
            }
        }
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let all = Sha256::new().chain_update(&bytes).chain_update(format!("{missing:?} {}", tokens.split));
        Ok(Self { inner, vocab_size, digest: all.finalize().into() })
    }

    /// Token ids of `text`; special tokens are recognised in it but none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, DataError> {
        self.ids(text, false).map_err(DataError::Render)
    }

    /// Token ids of `text`, with the special tokens that the tokenizer sets around a text if `with_special`.
    pub(super) fn ids(&self, text: &str, with_special: bool) -> Result<Vec<i64>, LineProblem> {
        let encoding = self.guarded(|inner| inner.encode_fast(text, with_special))?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }

    /// As [`Tokenizer::ids`], with the byte range of each token.
    pub(super) fn ids_with_ranges(&self, text: &str, with_special: bool) -> Result<Encoded, LineProblem> {
        let encoding = self.guarded(|inner| inner.encode(text, with_special))?;
        Ok(Encoded {
            ids: encoding.get_ids().iter().map(|&id| i64::from(id)).collect(),
            offsets: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect(),
        })
    }

    fn guarded(
        &self,
        encode: impl Fn(&tokenizers::Tokenizer) -> tokenizers::Result<tokenizers::Encoding>,
    ) -> Result<tokenizers::Encoding, LineProblem> {
        let encoding = guarded(|| encode(&self.inner)).ok_or_else(failed)?;
        encoding.map_err(|error| LineProblem::Tokenize(one_line(error)))
    }

    /// The text of `ids`; special tokens are left out if `skip_special_tokens`, unknown ids always.
    pub fn decode(&self, ids: &[i64], skip_special_tokens: bool) -> Result<String, DataError> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        guarded(|| self.inner.decode(&ids, skip_special_tokens))
            .ok_or_else(failed)
            .and_then(|text| text.map_err(|error| LineProblem::Tokenize(one_line(error))))
            .map_err(DataError::Render)
    }

    /// One more than the largest token id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact text.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// SHA-256 of tokenizer.json and the tokens that are added to it.
    pub(super) fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

/// The problem of a text at which the tokenizer panicked, as one of a damaged file may.
fn failed() -> LineProblem {
    LineProblem::Tokenize("the tokenizer failed; its tokenizer.json may be damaged".into())
}

/// Files of tokenizers in other forms, which transformers converts.
const OTHER_FORMS: [&str; 8] = [
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
];

/// Refuses a tokenizer folder that is not there, or is a file.
pub(super) fn check_folder(dir: &Path) -> Result<(), DataError> {
    let is = match std::fs::metadata(dir) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => "a file",
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "no such folder",
        Err(source) => return Err(DataError::Io { path: dir.into(), source }),
    };
    let problem = format!("{is}; set model.tokenizer_path to the folder that has tokenizer.json");
    Err(DataError::TokenizerFolder { dir: dir.into(), problem })
}

/// Says of a folder without tokenizer.json why it has none.
pub(super) fn without_tokenizer(dir: &Path) -> Option<DataError> {
    if let Err(error) = check_folder(dir) {
        return Some(error);
    }
    let problem = if dir.join("tokenizer.json").exists() {
        return None;
    } else if let Some(form) = other_form(dir) {
        let shown = dir.display();
        format!(
            "{form} but no tokenizer.json; convert it once: python -c \"from transformers import AutoTokenizer as T; \
             T.from_pretrained('{shown}').save_pretrained('{shown}')\""
        )
    } else {
        "no tokenizer.json; copy it here with tokenizer_config.json and chat_template.jinja, or, for a run, set \
         model.tokenizer_path to the folder that has it"
            .into()
    };
    Some(DataError::TokenizerFolder { dir: dir.into(), problem })
}

fn other_form(dir: &Path) -> Option<String> {
    let named = OTHER_FORMS.into_iter().find(|name| dir.join(name).is_file()).map(str::to_string);
    named.or_else(|| {
        let entries = std::fs::read_dir(dir).ok()?.flatten();
        let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.find(|name| name.ends_with(".tiktoken"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_anywhere_is_refused_in_one_line() {
        let whole = include_str!("../../tests/data/chat/byte_level/tokenizer.json");
        let folder = tempfile::tempdir().unwrap();
        for length in (1..whole.len() - 2).step_by(97) {
            std::fs::write(folder.path().join("tokenizer.json"), &whole.as_bytes()[..length]).unwrap();
            let error = Tokenizer::load(folder.path()).unwrap_err().to_string();
            assert!(error.contains("not a tokenizer: ") && !error.contains('\n'), "{length}: {error}");
        }
    }

    #[test]
    fn a_token_that_straddles_a_border_counts() {
        let encoded = Encoded { ids: vec![1, 2, 3, 4, 5], offsets: vec![0..2, 2..5, 5..5, 5..7, 7..9] };
        assert_eq!(encoded.covered_by(&[]), [false; 5]);
        assert_eq!(encoded.covered_by(std::slice::from_ref(&(4..6))), [false, true, true, true, false]);
        assert_eq!(encoded.covered_by(&[0..1, 8..9]), [true, false, false, false, true]);
        assert_eq!(encoded.covered_by(&[3..3, 20..30]), [false; 5]);
    }
}
