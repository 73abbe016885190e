//! The model's tokenizer (tokenizer.json), without special tokens of its own accord: a chat template writes them.

use super::{DataError, LineProblem, error::one_line};
use sha2::{Digest, Sha256};
use std::{ops::Range, path::Path};

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
    /// Reads `tokenizer.json` of `dir`. Truncation and padding that it may prescribe are left out.
    pub fn load(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        let problem = |problem: String| DataError::Tokenizer { path: path.clone(), problem };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| problem(format!("not a tokenizer: {}", one_line(error))))?;
        inner.with_truncation(None).map_err(|error| problem(one_line(error)))?;
        inner.with_padding(None);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Self { inner, vocab_size, digest: Sha256::digest(&bytes).into() })
    }

    /// Token ids of `text`; special tokens are recognised in it but none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, DataError> {
        Ok(self.encode_with_offsets(text).map_err(DataError::Render)?.ids)
    }

    /// As [`Tokenizer::encode`], with the byte range of each token.
    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Encoded, LineProblem> {
        let encoding =
            self.inner.encode(text, false).map_err(|error| LineProblem::Tokenize(one_line(error)))?;
        Ok(Encoded {
            ids: encoding.get_ids().iter().map(|&id| i64::from(id)).collect(),
            offsets: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect(),
        })
    }

    /// The text of `ids`; special tokens are left out if `skip_special_tokens`, unknown ids always.
    pub fn decode(&self, ids: &[i64], skip_special_tokens: bool) -> Result<String, DataError> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        self.inner
            .decode(&ids, skip_special_tokens)
            .map_err(|error| DataError::Render(LineProblem::Tokenize(one_line(error))))
    }

    /// One more than the largest token id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact text.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// SHA-256 of tokenizer.json.
    pub(super) fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_straddles_a_border_counts() {
        let encoded = Encoded { ids: vec![1, 2, 3, 4, 5], offsets: vec![0..2, 2..5, 5..5, 5..7, 7..9] };
        assert_eq!(encoded.covered_by(&[]), [false; 5]);
        assert_eq!(encoded.covered_by(std::slice::from_ref(&(4..6))), [false, true, true, true, false]);
        assert_eq!(encoded.covered_by(&[0..1, 8..9]), [true, false, false, false, true]);
        assert_eq!(encoded.covered_by(&[3..3, 20..30]), [false; 5]);
    }
}
