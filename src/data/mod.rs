//! From data files to rows of token ids, in an order that depends on (seed, epoch, position) alone.
//!
//! [`Dataset::open`] reads the sources (`files` and `formats`: records of any format; `kinds`: their types), renders
//! chats with the model's own template, tokenises and packs; the result is a file that all ranks of a host map.
//! [`order`] and [`schedule`] say, as pure functions, which rows a step takes and which of them a rank computes;
//! [`Loader`] brings them ahead of the trainer. [`ChatTemplate`] and [`Tokenizer`] also serve generation.

mod build;
mod chat_template;
mod dataset;
mod encode;
mod error;
mod files;
mod formats;
mod guard;
mod integers;
mod jinja;
mod jinja_methods;
mod jinja_values;
mod kinds;
mod loader;
mod messages;
mod notes;
pub mod order;
mod pack;
mod preference;
mod prepared;
mod prompt;
pub mod schedule;
mod source;
mod special_tokens;
mod split;
mod spool;
mod store;
mod tokenized;
mod tokenizer;
mod tokenizer_class;
mod tokenizer_keys;
mod turns;
mod untrusted;

pub use chat_template::{Chat, ChatTemplate, Clock};
pub use dataset::{Dataset, SourceSummary, Summary, TRAINING_CLOCK};
pub use error::{DataError, LineProblem};
pub use formats::Place;
pub use guard::is_guarded;
pub use loader::{Loader, StepPlan, StepRows};
pub(crate) use notes::Notes;
pub use pack::pack;
pub use prompt::{Prompt, Reference};
pub(crate) use tokenized::{Sample, parse_tokenized};
pub use tokenizer::{Encoded, Tokenizer};
#[doc(hidden)]
pub use untrusted::{RowReader, prepared_rows};

use std::collections::BTreeMap;

/// Label of a token that carries no loss.
pub const IGNORE_INDEX: i64 = -100;

/// Adjacent rows that stay together from the order of an epoch to a micro-batch: the causal language-model loss needs
/// one row at a time.
pub const ROWS_PER_GROUP: usize = 1;

/// A number for each token that rows may give beside their labels, for the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowInput {
    pub name: &'static str,
    /// Every row has to give it.
    pub required: bool,
}

/// Needs of a loss beside tokens and labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowNeeds {
    /// Numbers for each token. Only rows of type tokenized can give them.
    pub inputs: Vec<RowInput>,
    /// Rows are pairs of answers: of type preference, and no others are.
    pub pairs: bool,
}

/// One row: a sample, or a pack of documents, formed before and independently of the world.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Token ids `[tokens]`.
    pub input_ids: Vec<i64>,
    /// Aligned with `input_ids` (not shifted), [`IGNORE_INDEX`] where there is no loss.
    pub labels: Vec<i64>,
    /// Lengths of the documents, in order; they add up to the row. Padding is a last document of its own
    /// with no labels. Documents never attend to each other and their positions start at 0.
    pub document_lengths: Vec<usize>,
    /// Inputs of the loss by name, `[tokens]` each, aligned with `input_ids`; NaN in a document that does not give it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, Vec<f32>>,
}

/// A document as its loss sees it: each token with what it should predict. The last one predicts nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Shifted {
    /// `[tokens]`, [`IGNORE_INDEX`] where there is no loss.
    pub targets: Vec<i64>,
    /// `[tokens]` each: the inputs that the document gives.
    pub inputs: BTreeMap<String, Vec<f32>>,
}

impl Row {
    /// Tokens that fill up a pack: a last document of the padding token `pad` alone, without labels.
    pub fn padding(&self, pad: i64) -> usize {
        let [_, .., last] = self.document_lengths[..] else { return 0 };
        let start = self.input_ids.len() - last;
        let fills = self.input_ids[start..].iter().all(|&id| id == pad);
        if fills && self.labels[start..].iter().all(|&label| label == IGNORE_INDEX) { last } else { 0 }
    }

    /// The documents of the row, shifted.
    pub fn shifted(&self) -> Vec<Shifted> {
        fn shift<T: Copy>(values: &[T], last: T) -> Vec<T> {
            values.iter().skip(1).copied().chain([last]).take(values.len()).collect()
        }
        let mut start = 0;
        let document = |&length: &usize| {
            let own = start..start + length;
            start = own.end;
            let given = self.inputs.iter().map(|(name, values)| (name, &values[own.clone()]));
            let given = given.filter(|(_, values)| values.iter().all(|value| !value.is_nan()));
            Shifted {
                targets: shift(&self.labels[own.clone()], IGNORE_INDEX),
                inputs: given.map(|(name, values)| (name.clone(), shift(values, 0.0))).collect(),
            }
        };
        self.document_lengths.iter().map(document).collect()
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
            let row = Row {
                input_ids: ids.to_vec(),
                labels: labels.to_vec(),
                document_lengths: lengths.to_vec(),
                ..Row::default()
            };
            row.padding(9)
        };
        assert_eq!(row(&[1, 2, 9, 9], &[1, 2, -100, -100], &[2, 2]), 2);
        assert_eq!(row(&[1, 2, 9, 9], &[1, 2, -100, 9], &[2, 2]), 0);
        assert_eq!(row(&[1, 2, 9, 8], &[1, 2, -100, -100], &[2, 2]), 0);
        assert_eq!(row(&[9, 9], &[-100, -100], &[2]), 0);
    }

    #[test]
    fn inputs_move_with_their_labels_and_stay_in_their_document() {
        let inputs = [
            ("weights", vec![0.5, 1.0, 2.0, f32::NAN, f32::NAN]),
            ("advantages", vec![1.0, 2.0, 3.0, 4.0, 5.0]),
        ];
        let row = Row {
            input_ids: vec![1, 2, 3, 4, 5],
            labels: vec![1, -100, 3, 4, 5],
            document_lengths: vec![3, 2],
            inputs: inputs.map(|(name, values)| (name.to_owned(), values)).into(),
        };
        let given = |given: &[(&str, &[f32])]| {
            given.iter().map(|(name, values)| (name.to_string(), values.to_vec())).collect()
        };
        let first = given(&[("weights", &[1.0, 2.0, 0.0]), ("advantages", &[2.0, 3.0, 0.0])]);
        let second = given(&[("advantages", &[5.0, 0.0])]);
        let expected = [
            Shifted { targets: vec![-100, 3, -100], inputs: first },
            Shifted { targets: vec![5, -100], inputs: second },
        ];
        assert_eq!(row.shifted(), expected);
    }
}
