//! From data files to rows of token ids, in an order that depends on (seed, epoch, position) alone.
//!
//! [`Dataset::open`] reads the sources, renders chats with the model's own template, tokenises and packs; the
//! result is the same on every rank. [`order`] and [`schedule`] say, as pure functions, which rows a step takes and
//! which of them a rank computes; [`Loader`] brings them ahead of the trainer. [`ChatTemplate`] and [`Tokenizer`]
//! also serve generation.

mod chat_template;
mod dataset;
mod error;
mod integers;
mod jinja;
mod jinja_methods;
mod jinja_values;
mod loader;
mod messages;
mod notes;
pub mod order;
mod pack;
mod prepared;
mod prompt;
pub mod schedule;
mod source;
mod special_tokens;
mod store;
mod tokenized;
mod tokenizer;
mod tokenizer_class;
mod tokenizer_keys;
mod turns;

pub use chat_template::{Chat, ChatTemplate, Clock};
pub use dataset::{Dataset, Summary, TRAINING_CLOCK};
pub use error::{DataError, LineProblem};
pub use loader::{Loader, StepPlan, StepRows};
pub use pack::pack;
pub use prompt::{Prompt, Reference};
pub use tokenizer::{Encoded, Tokenizer};

/// Label of a token that carries no loss.
pub const IGNORE_INDEX: i64 = -100;

/// Adjacent rows that stay together from the order of an epoch to a micro-batch: the causal language-model loss needs
/// one row at a time.
pub const ROWS_PER_GROUP: usize = 1;

/// One row: a sample, or a pack of documents, formed before and independently of the world.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Token ids `[tokens]`.
    pub input_ids: Vec<i64>,
    /// Aligned with `input_ids` (not shifted), [`IGNORE_INDEX`] where there is no loss.
    pub labels: Vec<i64>,
    /// Lengths of the documents, in order; they add up to the row. Padding is a last document of its own
    /// with no labels. Documents never attend to each other and their positions start at 0.
    pub document_lengths: Vec<usize>,
}

impl Row {
    /// Tokens that fill up a pack: a last document of the padding token `pad` alone, without labels.
    pub fn padding(&self, pad: i64) -> usize {
        let [_, .., last] = self.document_lengths[..] else { return 0 };
        let start = self.input_ids.len() - last;
        let fills = self.input_ids[start..].iter().all(|&id| id == pad);
        if fills && self.labels[start..].iter().all(|&label| label == IGNORE_INDEX) { last } else { 0 }
    }

    /// Tokens that carry loss: labels that are not [`IGNORE_INDEX`] after the shift, which never crosses a
    /// document (so the first label of each document does not count).
    pub fn valid_tokens(&self) -> usize {
        let mut rest = &self.labels[..];
        let mut valid = 0;
        for &length in &self.document_lengths {
            let (document, tail) = rest.split_at(length.min(rest.len()));
            valid += document.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count();
            rest = tail;
        }
        valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_a_last_document_of_the_padding_token_without_labels() {
        let row = |ids: &[i64], labels: &[i64], lengths: &[usize]| {
            let row =
                Row { input_ids: ids.to_vec(), labels: labels.to_vec(), document_lengths: lengths.to_vec() };
            row.padding(9)
        };
        assert_eq!(row(&[1, 2, 9, 9], &[1, 2, -100, -100], &[2, 2]), 2);
        assert_eq!(row(&[1, 2, 9, 9], &[1, 2, -100, 9], &[2, 2]), 0);
        assert_eq!(row(&[1, 2, 9, 8], &[1, 2, -100, -100], &[2, 2]), 0);
        assert_eq!(row(&[9, 9], &[-100, -100], &[2]), 0);
    }
}
