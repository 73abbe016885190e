//! A `tokenized` line: token ids, their labels and masks, and the documents that they make.

use super::{
    IGNORE_INDEX, LineProblem, RowInput, messages,
    notes::Notes,
    source::{check_tokens, in_vocabulary, parse_object, wrong},
};
use serde_json::{Map, Value};

/// Tokens of a sample with aligned labels, both checked against the vocabulary.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    pub tokens: Vec<u32>,
    pub labels: Vec<i64>,
    /// Lengths of the documents; they add up to the tokens.
    pub documents: Vec<usize>,
    /// Inputs of the loss that the sample gives, bits of fp32, aligned with the tokens.
    pub inputs: Vec<(&'static str, Vec<u32>)>,
}

impl Sample {
    /// Tokens with loss: labels behind the first token of each document.
    pub fn valid_tokens(&self) -> usize {
        let (mut at, mut valid) = (0, 0);
        for &length in &self.documents {
            let labels = self.labels[at..at + length].iter().skip(1);
            valid += labels.filter(|&&label| label != IGNORE_INDEX).count();
            at += length;
        }
        valid
    }

    /// A sample of one document.
    pub fn whole(tokens: Vec<u32>, labels: Vec<i64>) -> Self {
        Self { documents: vec![tokens.len()], tokens, labels, inputs: Vec::new() }
    }

    /// A sample of the documents of both, without inputs of a loss.
    pub fn followed_by(mut self, other: Self) -> Self {
        self.tokens.extend(other.tokens);
        self.labels.extend(other.labels);
        self.documents.extend(other.documents);
        Self { inputs: Vec::new(), ..self }
    }
}

/// Fields that say which tokens have a loss. All that a line has must be 1 for a token to be trained.
const LOSS_MASKS: [&str; 3] = ["loss_mask", "assistant_masks", "completion_mask"];

/// Fields that a tokenizer writes and the loss does not depend on.
const HARMLESS: [&str; 6] = [
    // Special tokens are trained like others where their label says so.
    "special_tokens_mask",
    // Places in a text that is not here.
    "offset_mapping",
    // Counts of `input_ids`, as it is or as it was before it was cut.
    "length",
    "num_tokens",
    "num_truncated_tokens",
    "overflow_to_sample_mapping",
];

const INTEGERS: &str = "a list of integers";

const DOCUMENTS: &str = "not read; give position_ids that start again at 0 where a document begins";
const WEIGHTS: &str = "not read; give `weights`, a number for each token, or labels of -100";
const OTHER_INPUTS: &str = "not read: the models here take token ids alone";
const PAIRS: &str = "pairs are not read: give one answer a row";

/// Fields that change the loss elsewhere and are not built here.
const REFUSED: [(&str, &str); 31] = [
    ("seq_lengths", DOCUMENTS),
    ("sequence_lengths", DOCUMENTS),
    ("document_lengths", DOCUMENTS),
    ("document_ids", DOCUMENTS),
    ("segment_ids", DOCUMENTS),
    ("sequence_ids", DOCUMENTS),
    ("seq_idx", DOCUMENTS),
    ("cu_seqlens", DOCUMENTS),
    ("cu_seq_lens_q", DOCUMENTS),
    ("cu_seq_lens_k", DOCUMENTS),
    ("weight", WEIGHTS),
    ("loss_weight", WEIGHTS),
    ("loss_weights", WEIGHTS),
    ("sample_weight", WEIGHTS),
    ("token_weights", WEIGHTS),
    ("inputs_embeds", OTHER_INPUTS),
    ("pixel_values", OTHER_INPUTS),
    ("image_grid_thw", OTHER_INPUTS),
    ("input_features", OTHER_INPUTS),
    ("mm_token_type_ids", OTHER_INPUTS),
    ("decoder_input_ids", OTHER_INPUTS),
    ("decoder_attention_mask", OTHER_INPUTS),
    ("past_key_values", OTHER_INPUTS),
    ("chosen_input_ids", PAIRS),
    ("rejected_input_ids", PAIRS),
    ("prompt_input_ids", PAIRS),
    ("chosen_labels", PAIRS),
    ("rejected_labels", PAIRS),
    ("chosen_attention_mask", PAIRS),
    ("rejected_attention_mask", PAIRS),
    ("prompt_attention_mask", PAIRS),
];

/// Reads a line; see [`tokenized_of`].
pub(crate) fn parse_tokenized(
    line: &[u8],
    vocab_size: usize,
    inputs: &[RowInput],
    notes: &mut Notes,
) -> Result<Sample, LineProblem> {
    tokenized_of(&parse_object(line)?, vocab_size, inputs, notes)
}

/// Reads a row. Without `labels` (or with null) every token is trained: labels are the input ids.
///
/// - `attention_mask` 0 is padding at either end, and dropped.
/// - `loss_mask`, `assistant_masks`, `completion_mask`: a token with 0 has no label.
/// - `position_ids`: a document begins where they start again at 0.
/// - `inputs` of the loss: a number for each token.
pub(super) fn tokenized_of(
    object: &Map<String, Value>,
    vocab_size: usize,
    inputs: &[RowInput],
    notes: &mut Notes,
) -> Result<Sample, LineProblem> {
    let ids = integers(object, "input_ids")?.ok_or_else(|| missing(object, "input_ids"))?;
    let mut tokens = check_tokens(&ids, vocab_size, "input_ids")?;
    let mut labels = labels(object, &ids, vocab_size)?;
    for field in LOSS_MASKS {
        mask_labels(object, field, &ids, &mut labels)?;
    }
    let mut given = Vec::new();
    for input in inputs {
        given.extend(numbers(object, input, ids.len())?);
    }
    let kept = match flags(object, "attention_mask", ids.len())? {
        Some(mask) => kept(&mask)?,
        None => 0..ids.len(),
    };
    let documents = match aligned(object, "position_ids", ids.len())? {
        Some(positions) => documents(&positions[kept.clone()], kept.start)?,
        None => vec![kept.len()],
    };
    if let Some(types) = aligned(object, "token_type_ids", ids.len())?
        && let Some(index) = types.iter().position(|&kind| kind != 0)
    {
        let reason = "not read: the models here know no segments, which are all 0 for one text";
        return Err(LineProblem::Refused { field: format!("token_type_ids[{index}]"), reason });
    }
    let read = ["input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"];
    let names: Vec<&str> = inputs.iter().map(|input| input.name).collect();
    let known = [&read[..], &LOSS_MASKS, &HARMLESS, &names].concat();
    notes.count_fields(object, &known, &REFUSED)?;
    notes.count_padding(ids.len() - kept.len());
    tokens.truncate(kept.end);
    labels.truncate(kept.end);
    for (_, bits) in &mut given {
        bits.truncate(kept.end);
        bits.drain(..kept.start);
    }
    let (tokens, labels) = (tokens.split_off(kept.start), labels.split_off(kept.start));
    Ok(Sample { tokens, labels, documents, inputs: given })
}

/// A missing field, with those that are there and the type that reads them.
fn missing(object: &Map<String, Value>, field: &str) -> LineProblem {
    LineProblem::missing(field, object, messages::hint(object, field))
}

fn labels(object: &Map<String, Value>, ids: &[i64], vocab_size: usize) -> Result<Vec<i64>, LineProblem> {
    let labels = aligned(object, "labels", ids.len())?.unwrap_or_else(|| ids.to_vec());
    for (index, &value) in labels.iter().enumerate() {
        if value != IGNORE_INDEX && !in_vocabulary(value, vocab_size) {
            return Err(LineProblem::Vocabulary { field: format!("labels[{index}]"), value, vocab_size });
        }
    }
    Ok(labels)
}

/// Takes the labels away where the mask `field` is 0. A 1 over a given label of -100 contradicts it.
fn mask_labels(
    object: &Map<String, Value>,
    field: &'static str,
    ids: &[i64],
    labels: &mut [i64],
) -> Result<(), LineProblem> {
    let Some(mask) = flags(object, field, ids.len())? else { return Ok(()) };
    let given = object.get("labels").is_some_and(|labels| !labels.is_null());
    for (index, (&trained, label)) in mask.iter().zip(labels.iter_mut()).enumerate() {
        match (trained, *label) {
            (true, IGNORE_INDEX) if given => {
                return Err(LineProblem::Contradiction {
                    one: format!("{field}[{index}] is 1"),
                    other: format!("labels[{index}] is -100"),
                });
            }
            (false, _) => *label = IGNORE_INDEX,
            _ => {}
        }
    }
    Ok(())
}

/// The tokens that are no padding: those with a 1, which are one run.
fn kept(mask: &[bool]) -> Result<std::ops::Range<usize>, LineProblem> {
    let start = mask.iter().position(|&kept| kept).ok_or(LineProblem::NoTokens)?;
    let end = mask.iter().rposition(|&kept| kept).map_or(start, |last| last + 1);
    match mask[start..end].iter().position(|&kept| !kept) {
        None => Ok(start..end),
        Some(hole) => Err(LineProblem::Refused {
            field: format!("attention_mask[{}]", start + hole),
            reason: "0 between ones would hide tokens that others see; only padding at the ends is dropped",
        }),
    }
}

/// Lengths of the documents: each begins at position 0. The first may also begin at its place in the row, as it
/// does behind padding.
fn documents(positions: &[i64], first: usize) -> Result<Vec<usize>, LineProblem> {
    let mut lengths = Vec::new();
    for (index, &position) in positions.iter().enumerate() {
        let next = index.checked_sub(1).map_or(first as i64, |before| positions[before] + 1);
        match lengths.last_mut() {
            Some(length) if position == next && position != 0 => *length += 1,
            _ if position == 0 || (index == 0 && position == next) => lengths.push(1),
            _ => {
                return Err(LineProblem::Type {
                    field: format!("position_ids[{}]", first + index),
                    expected: "the next position, or 0 where a document begins",
                    found: format!("{position} behind {}", next - 1),
                });
            }
        }
    }
    Ok(lengths)
}

/// Flags of as many tokens as `input_ids` has: 0 and 1, or false and true.
fn flags(
    object: &Map<String, Value>,
    field: &'static str,
    tokens: usize,
) -> Result<Option<Vec<bool>>, LineProblem> {
    let Some(values) = list(object, field, tokens, INTEGERS)? else { return Ok(None) };
    let flag = |(index, value): (usize, &Value)| match (value.as_bool(), value.as_i64()) {
        (Some(flag), _) => Ok(flag),
        (None, Some(0)) => Ok(false),
        (None, Some(1)) => Ok(true),
        _ => Err(wrong(&format!("{field}[{index}]"), "0 or 1", value)),
    };
    values.iter().enumerate().map(flag).collect::<Result<_, _>>().map(Some)
}

/// An input of the loss, as bits of fp32: as many numbers as `input_ids` has.
fn numbers(
    object: &Map<String, Value>,
    input: &RowInput,
    tokens: usize,
) -> Result<Option<(&'static str, Vec<u32>)>, LineProblem> {
    let field = input.name;
    let Some(values) = list(object, field, tokens, "a list of numbers")? else {
        let hint = "; train.loss_fn reads it";
        return if input.required { Err(LineProblem::missing(field, object, hint)) } else { Ok(None) };
    };
    let number = |(index, value): (usize, &Value)| {
        let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.map(f32::to_bits).ok_or_else(|| wrong(&format!("{field}[{index}]"), "a number", value))
    };
    values.iter().enumerate().map(number).collect::<Result<_, _>>().map(|bits| Some((field, bits)))
}

/// As many integers as `input_ids` has.
fn aligned(
    object: &Map<String, Value>,
    field: &'static str,
    tokens: usize,
) -> Result<Option<Vec<i64>>, LineProblem> {
    list(object, field, tokens, INTEGERS)?;
    integers(object, field)
}

fn list<'a>(
    object: &'a Map<String, Value>,
    field: &'static str,
    tokens: usize,
    expected: &'static str,
) -> Result<Option<&'a [Value]>, LineProblem> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(values)) if values.len() == tokens => Ok(Some(values)),
        Some(Value::Array(values)) => Err(LineProblem::Length { field, values: values.len(), tokens }),
        Some(other) => Err(wrong(field, expected, other)),
    }
}

fn integers(object: &Map<String, Value>, field: &str) -> Result<Option<Vec<i64>>, LineProblem> {
    let values = match object.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(values)) => values,
        Some(other) => return Err(wrong(field, INTEGERS, other)),
    };
    let integer = |(index, value): (usize, &Value)| {
        value.as_i64().ok_or_else(|| wrong(&format!("{field}[{index}]"), "an integer", value))
    };
    values.iter().enumerate().map(integer).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A line, its ids, its labels and the lengths of its documents.
    type Case<'a> = (&'a str, &'a [u32], &'a [i64], &'a [usize]);

    fn parse(line: &str) -> Result<Sample, LineProblem> {
        let inputs = [
            RowInput { name: "weights", required: false },
            RowInput { name: "advantages", required: line.contains("reward") },
        ];
        parse_tokenized(line.as_bytes(), 4, &inputs, &mut Notes::default())
    }

    #[test]
    fn masks_and_positions_say_what_is_trained() {
        let all: [Case; 9] = [
            (r#"{"input_ids": [1, 2, 3]}"#, &[1, 2, 3], &[1, 2, 3], &[3]),
            (r#"{"input_ids": [1, 2], "labels": [-100, 3], "id": "x"}"#, &[1, 2], &[-100, 3], &[2]),
            (r#"{"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0]}"#, &[1, 2], &[1, 2], &[2]),
            (r#"{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1]}"#, &[1, 2], &[1, 2], &[2]),
            (
                r#"{"input_ids": [1, 2, 3], "loss_mask": [false, true, false]}"#,
                &[1, 2, 3],
                &[-100, 2, -100],
                &[3],
            ),
            (
                r#"{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}"#,
                &[1, 2, 3],
                &[-100, 2, -100],
                &[3],
            ),
            (r#"{"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}"#, &[1, 2, 3], &[1, 2, 3], &[2, 1]),
            (
                r#"{"input_ids": [0, 1, 2, 3], "position_ids": [0, 1, 2, 0], "attention_mask": [0, 1, 1, 1]}"#,
                &[1, 2, 3],
                &[1, 2, 3],
                &[2, 1],
            ),
            (
                r#"{"input_ids": [1], "labels": null, "token_type_ids": [0], "seq_idx": null}"#,
                &[1],
                &[1],
                &[1],
            ),
        ];
        for (line, tokens, labels, documents) in all {
            let sample = parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(
                (&sample.tokens[..], &sample.labels[..], &sample.documents[..]),
                (tokens, labels, documents)
            );
        }
    }

    #[test]
    fn inputs_of_the_loss_lose_their_padding() {
        let line = r#"{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1], "weights": [9, -0.5, 2], "advantages": null}"#;
        assert_eq!(parse(line).unwrap().inputs, [("weights", vec![(-0.5f32).to_bits(), 2.0f32.to_bits()])]);
    }

    #[test]
    fn each_bad_line_says_what_is_wrong_and_where() {
        let cases: [(&str, &str); 29] = [
            ("{\"input_ids\": [1", "not valid JSON at column 16: EOF while parsing a list"),
            ("[1]", "line: expected a JSON object, got a list of 1"),
            ("{}", "expected field `input_ids`, found none"),
            ("{\"messages\": []}", "expected field `input_ids`, found `messages`; type chat reads"),
            ("{\"input_ids\": 3}", "input_ids: expected a list of integers, got 3"),
            ("{\"input_ids\": []}", "expected at least one token, found none"),
            ("{\"input_ids\": [1, \"a\"]}", "input_ids[1]: expected an integer, got \"a\""),
            ("{\"input_ids\": [1.5]}", "input_ids[0]: expected an integer, got 1.5"),
            ("{\"input_ids\": [4]}", "input_ids[0]: token id 4 is not in the model's vocabulary of 4"),
            ("{\"input_ids\": [-1]}", "input_ids[0]: token id -1 is not in the model's vocabulary of 4"),
            ("{\"input_ids\": [1], \"labels\": [1, 2]}", "labels: expected 1 values like input_ids, got 2"),
            ("{\"input_ids\": [1], \"labels\": [-1]}", "labels[0]: token id -1 is not in"),
            ("{\"input_ids\": [1], \"labels\": [9]}", "labels[0]: token id 9 is not in"),
            ("{\"input_ids\": [1], \"attention_mask\": [1, 1]}", "attention_mask: expected 1 values"),
            ("{\"input_ids\": [1], \"attention_mask\": [2]}", "attention_mask[0]: expected 0 or 1, got 2"),
            (
                "{\"input_ids\": [1, 2, 3], \"attention_mask\": [1, 0, 1]}",
                "attention_mask[1]: 0 between ones",
            ),
            ("{\"input_ids\": [1], \"attention_mask\": [0]}", "expected at least one token"),
            ("{\"input_ids\": [1], \"loss_mask\": [0.5]}", "loss_mask[0]: expected 0 or 1, got 0.5"),
            (
                "{\"input_ids\": [1], \"loss_mask\": [1], \"labels\": [-100]}",
                "loss_mask[0] is 1, but labels[0] is -100",
            ),
            (
                "{\"input_ids\": [1, 2], \"position_ids\": [0, 2]}",
                "position_ids[1]: expected the next position",
            ),
            (
                "{\"input_ids\": [1, 2], \"position_ids\": [3, 4]}",
                "position_ids[0]: expected the next position",
            ),
            ("{\"input_ids\": [1, 2], \"token_type_ids\": [0, 1]}", "token_type_ids[1]: not read"),
            ("{\"input_ids\": [1], \"seq_lengths\": [1]}", "seq_lengths: not read; give position_ids"),
            ("{\"input_ids\": [1], \"weight\": 0.5}", "weight: not read; give `weights`, a number for each"),
            ("{\"input_ids\": [1], \"weights\": 0.5}", "weights: expected a list of numbers, got 0.5"),
            ("{\"input_ids\": [1], \"weights\": [1, 2]}", "weights: expected 1 values like input_ids, got 2"),
            ("{\"input_ids\": [1], \"weights\": [1e60]}", "weights[0]: expected a number, got 1e+60"),
            (
                "{\"input_ids\": [1], \"reward\": 1}",
                "expected field `advantages`, found `input_ids`, `reward`; train.loss_fn reads it",
            ),
            ("\u{1}", "not valid JSON at column 1: expected value"),
        ];
        for (line, expected) in cases {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{line}: got {message:?}, expected {expected:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_tokenized(&bytes, 100, &[], &mut Notes::default());
        }

        #[test]
        fn no_masks_and_positions_lose_a_token(
            mask in proptest::collection::vec(0i64..2, 1..8), positions in proptest::collection::vec(-1i64..4, 1..8),
        ) {
            let ids = vec![1; mask.len().max(positions.len())];
            let line = serde_json::json!({"input_ids": ids, "attention_mask": mask, "position_ids": positions});
            if let Ok(sample) = parse_tokenized(line.to_string().as_bytes(), 100, &[], &mut Notes::default()) {
                prop_assert_eq!(sample.documents.iter().sum::<usize>(), sample.tokens.len());
                prop_assert_eq!(sample.tokens.len(), mask.iter().sum::<i64>() as usize);
            }
        }
    }
}
