//! Data of a pass: the client's data, whose targets are shifted already or not, and rows as a local run has them.

use super::cell::Cell;
use crate::{
    data::{IGNORE_INDEX, Notes, Row as FileRow, RowInput, Sample, Shifted, parse_tokenized},
    server::{
        fault::Fault,
        request::Datum,
        wire::{
            bounded::{Fields, List},
            scalar::LARGEST_WHOLE,
        },
    },
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Inputs of losses that a row may carry; they are aligned with `input_ids` as labels are.
const ROW_INPUTS: [RowInput; 8] = [
    input("weights"),
    input("logprobs"),
    input("advantages"),
    input("ref_logprobs"),
    input("rollout_logprobs"),
    input("sequence_ratio_mask"),
    input("clip_low_threshold"),
    input("clip_high_threshold"),
];

const fn input(name: &'static str) -> RowInput {
    RowInput { name, required: false }
}

/// A row of `batches`.
pub type Row = Fields<Cell>;

/// A datum of `forward_backward_input`.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::Datum)]
pub struct WireDatum {
    model_input: ModelInput,
    /// `target_tokens`, which are shifted already, or `labels`, which are not; and other inputs of the loss. One row
    /// for each token.
    #[serde(default)]
    #[schema(
        value_type = BTreeMap<String, Cell>,
        required = true,
        example = json!({"target_tokens": [2, 3, 4]})
    )]
    loss_fn_inputs: Fields<Cell>,
}

/// Tokens of a datum, at least one, as `input_ids` or else in chunks.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::ModelInput, example = json!({"input_ids": [1, 2, 3]}))]
struct ModelInput {
    input_ids: Option<Cell>,
    #[schema(value_type = Option<Vec<Chunk>>)]
    chunks: Option<List<Chunk>>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::Chunk)]
struct Chunk {
    #[schema(required = true, value_type = Cell)]
    tokens: Option<Cell>,
}

/// Bounds on data.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub vocab_size: usize,
    /// Tokens of a request.
    pub max_tokens: usize,
}

impl Bounds {
    /// Checks token ids, each of them below the vocabulary.
    fn check(&self, ids: &[i64], at: &str) -> Result<(), Fault> {
        let is_known = |id: i64| usize::try_from(id).is_ok_and(|id| id < self.vocab_size);
        match ids.iter().position(|&id| !is_known(id)) {
            _ if ids.is_empty() => Err(Fault::user(format!("{at}: expected at least one token, got none"))),
            None => Ok(()),
            Some(i) => Err(Fault::user(format!(
                "{at}[{i}]: token id {} is not in the model's vocabulary of {}",
                ids[i], self.vocab_size
            ))),
        }
    }

    /// All of `data`, read in turn until they are too many.
    pub fn gather(&self, data: impl Iterator<Item = Result<Vec<Datum>, Fault>>) -> Result<Vec<Datum>, Fault> {
        let (mut all, mut tokens) = (Vec::new(), 0);
        for some in data {
            let some = some?;
            tokens += some.iter().map(|datum| datum.ids.len()).sum::<usize>();
            self.check_tokens("data", tokens)?;
            all.extend(some);
        }
        if tokens == 0 { Err(Fault::user("data: expected at least one datum, got none")) } else { Ok(all) }
    }

    fn check_tokens(&self, at: &str, tokens: usize) -> Result<(), Fault> {
        match tokens > self.max_tokens {
            false => Ok(()),
            true => Err(Fault::user(format!(
                "{at}: {tokens} tokens are more than the {} that one request may have; send them in several",
                self.max_tokens
            ))),
        }
    }
}

impl WireDatum {
    /// The datum as the engine takes it. `at` says where it stands: `data[3]`.
    pub fn datum(&self, at: &str, bounds: Bounds) -> Result<Datum, Fault> {
        let mut ids = Vec::new();
        if let Some(cell) = &self.model_input.input_ids {
            ids = cell.integers(&format!("{at}.model_input.input_ids"))?;
        } else {
            for (i, chunk) in self.model_input.chunks.iter().flat_map(|chunks| chunks.iter()).enumerate() {
                let at = format!("{at}.model_input.chunks[{i}].tokens");
                let Some(tokens) = &chunk.tokens else {
                    return Err(Fault::user(format!(
                        "{at}: expected token ids, got none; other inputs are not read"
                    )));
                };
                ids.extend(tokens.integers(&at)?);
            }
        }
        bounds.check(&ids, &format!("{at}.model_input.input_ids"))?;
        let inputs = self.loss_fn_inputs.iter();
        let others = inputs.filter(|(name, _)| !["target_tokens", "labels"].contains(&name.as_str()));
        let others: Vec<(&String, &Cell)> = others.collect();
        match (self.loss_fn_inputs.get("target_tokens"), self.loss_fn_inputs.get("labels")) {
            (Some(_), Some(_)) => Err(Fault::user(format!(
                "{at}.loss_fn_inputs: expected target_tokens, which are shifted, or labels, which are not; got both"
            ))),
            (None, None) => Err(Fault::user(format!(
                "{at}.loss_fn_inputs: expected target_tokens, which are shifted, or labels, which are not; got neither"
            ))),
            (Some(targets), None) => shifted_already(at, ids, targets, &others, bounds),
            (None, Some(labels)) => {
                let at = format!("{at}.loss_fn_inputs");
                let labels = labels.integers(&format!("{at}.labels"))?;
                if labels.len() != ids.len() {
                    return Err(unlike_ids(&format!("{at}.labels"), ids.len(), labels.len()));
                }
                let labels = checked_targets(labels, &format!("{at}.labels"), bounds)?;
                let inputs = aligned(&at, &others, ids.len())?;
                let document_lengths = vec![ids.len()];
                let row = FileRow { input_ids: ids, labels, document_lengths, inputs };
                documents(&row).next().ok_or_else(|| unlike_ids(&at, row.input_ids.len(), 0))
            }
        }
    }
}

/// A datum whose targets are shifted: `[tokens]`, or `[tokens, k]`.
fn shifted_already(
    at: &str,
    ids: Vec<i64>,
    targets: &Cell,
    inputs: &[(&String, &Cell)],
    bounds: Bounds,
) -> Result<Datum, Fault> {
    let at = format!("{at}.loss_fn_inputs");
    let (values, shape) = targets.numbers(&format!("{at}.target_tokens"))?;
    let k = match shape {
        [_, k] => (*k).max(1),
        _ => 1,
    };
    if ids.len().checked_mul(k) != Some(values.len()) {
        return Err(Fault::user(format!(
            "{at}.target_tokens: expected {} values like input_ids, or that many lists of equal length, got {}",
            ids.len(),
            values.len()
        )));
    }
    let of_targets = format!("{at}.target_tokens");
    let targets = checked_targets(targets.integers(&of_targets)?, &of_targets, bounds)?;
    let mut taken = BTreeMap::new();
    for (name, cell) in inputs {
        let at = format!("{at}.{name}");
        let (values, _) = cell.numbers(&at)?;
        if values.len() != ids.len() * k && values.len() != ids.len() {
            let expected =
                if k == 1 { format!("{}", ids.len()) } else { format!("{} or {}", ids.len() * k, ids.len()) };
            return Err(Fault::user(format!(
                "{at}: expected {expected} values like target_tokens, got {}",
                values.len()
            )));
        }
        taken.insert((*name).clone(), values.iter().map(|&value| value as f32).collect());
    }
    Ok(Datum { ids, targets, k, inputs: taken })
}

/// Targets with one value for all that are absent.
fn checked_targets(mut targets: Vec<i64>, at: &str, bounds: Bounds) -> Result<Vec<i64>, Fault> {
    for target in &mut targets {
        if *target < 0 {
            *target = IGNORE_INDEX;
        } else {
            bounds.check(&[*target], at)?;
        }
    }
    Ok(targets)
}

fn unlike_ids(at: &str, tokens: usize, got: usize) -> Fault {
    Fault::user(format!("{at}: expected {tokens} values like input_ids, got {got}"))
}

/// Inputs that are aligned with `input_ids`.
fn aligned(
    at: &str,
    inputs: &[(&String, &Cell)],
    tokens: usize,
) -> Result<BTreeMap<String, Vec<f32>>, Fault> {
    let one = |(name, cell): &(&String, &Cell)| {
        let at = format!("{at}.{name}");
        let (values, _) = cell.numbers(&at)?;
        match values.len() == tokens {
            true => Ok(((*name).clone(), values.iter().map(|&value| value as f32).collect())),
            false => Err(unlike_ids(&at, tokens, values.len())),
        }
    };
    inputs.iter().map(one).collect()
}

/// A datum for each document of a row, shifted as in a local run.
fn documents(row: &FileRow) -> impl Iterator<Item = Datum> {
    let mut rest = &row.input_ids[..];
    row.document_lengths.iter().zip(row.shifted()).map(move |(&length, Shifted { targets, inputs })| {
        let (ids, later) = rest.split_at(length);
        rest = later;
        Datum { ids: ids.to_vec(), targets, k: 1, inputs }
    })
}

/// The data of a row as a local run has it: one datum a document, so a row with several gives several. A row of lists
/// of lists is as many rows.
pub fn of_row(row: &Row, at: &str, bounds: Bounds) -> Result<Vec<Datum>, Fault> {
    if let Some(Cell::Numbers { values, shape }) = row.get("input_ids") {
        bounds.check_tokens(at, values.len())?;
        if let [rows, width] = shape[..] {
            let one = |i| of_row(&part(row, i, rows, width), &format!("{at}[{i}]"), bounds);
            return (0..rows).map(one).collect::<Result<Vec<_>, _>>().map(|data| data.concat());
        }
    }
    if let Some((name, cell)) = row.iter().find(|(_, cell)| cell.count() > bounds.max_tokens) {
        let (values, most) = (cell.count(), bounds.max_tokens);
        return Err(Fault::user(format!(
            "{at}.{name}: {values} values are more than the {most} tokens that one request may have"
        )));
    }
    let line: Map<String, Value> = row.iter().map(|(name, cell)| (name.clone(), plain(cell))).collect();
    let text = serde_json::to_vec(&line).unwrap_or_default();
    let sample = parse_tokenized(&text, bounds.vocab_size, &ROW_INPUTS, &mut Notes::default());
    let Sample { tokens, labels, documents: document_lengths, inputs } =
        sample.map_err(|error| Fault::user(format!("{at}: {error}")))?;
    let values = |bits: Vec<u32>| bits.into_iter().map(f32::from_bits).collect();
    let row = FileRow {
        input_ids: tokens.into_iter().map(i64::from).collect(),
        labels,
        document_lengths,
        inputs: inputs.into_iter().map(|(name, bits)| (name.to_owned(), values(bits))).collect(),
    };
    Ok(documents(&row).collect())
}

/// Row `i` of `rows` in a row of lists of lists. Cells of another shape belong to all; one that is too long for any is
/// cut to where that shows, since it is copied for each.
fn part(row: &Row, i: usize, rows: usize, width: usize) -> Row {
    let cut = |cell: &Cell| match cell {
        Cell::Numbers { values, shape } if shape.len() == 2 && shape[0] == rows => {
            let values = values[i * shape[1]..(i + 1) * shape[1]].to_vec();
            Cell::Numbers { values, shape: vec![shape[1]] }
        }
        Cell::Numbers { values, .. } if values.len() > width => {
            Cell::Numbers { values: values[..=width].to_vec(), shape: vec![width + 1] }
        }
        other => other.clone(),
    };
    Fields(row.iter().map(|(name, cell)| (name.clone(), cut(cell))).collect())
}

/// A cell as the line of a file has it.
fn plain(cell: &Cell) -> Value {
    let number = |&value: &f64| match value.fract() == 0.0 && value.abs() < LARGEST_WHOLE {
        true => json!(value as i64),
        false => json!(value),
    };
    match cell {
        Cell::Numbers { values, .. } => values.iter().map(number).collect(),
        Cell::Other => json!("something else than numbers"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { vocab_size: 10, max_tokens: 20 };

    fn datum(text: &str) -> Result<Datum, Fault> {
        serde_json::from_str::<WireDatum>(text).unwrap().datum("data[0]", BOUNDS)
    }

    fn rows(text: &str) -> Result<Vec<Datum>, Fault> {
        of_row(&serde_json::from_str(text).unwrap(), "batches[0]", BOUNDS)
    }

    #[test]
    fn targets_that_are_shifted_stay_and_labels_move() {
        let shifted = r#"{"model_input": {"input_ids": [1, 2, 3]}, "loss_fn_inputs": {"target_tokens": [2, 3, -100],
            "weights": {"data": [1.0, 0.5, 0], "dtype": "float32", "shape": [3]}}}"#;
        let labels = r#"{"model_input": {"chunks": [{"tokens": [1], "type": "encoded_text"}, {"tokens": [2, 3]}]},
            "loss_fn_inputs": {"labels": [1, 2, 3], "weights": [7, 1, 0.5]}}"#;
        for text in [shifted, labels] {
            let datum = datum(text).unwrap();
            assert_eq!((&datum.ids[..], &datum.targets[..], datum.k), (&[1, 2, 3][..], &[2, 3, -100][..], 1));
            assert_eq!(datum.inputs["weights"], [1.0, 0.5, 0.0]);
        }
    }

    #[test]
    fn several_targets_a_token_come_as_lists_or_with_a_shape() {
        for targets in ["[[1, 2], [3, 4]]", r#"{"data": [1, 2, 3, 4], "shape": [2, 2]}"#] {
            let text = format!(
                r#"{{"model_input": {{"input_ids": [1, 2]}},
                    "loss_fn_inputs": {{"target_tokens": {targets}, "advantages": [1, 2]}}}}"#
            );
            let datum = datum(&text).unwrap();
            assert_eq!((&datum.targets[..], datum.k), (&[1, 2, 3, 4][..], 2));
            assert_eq!(datum.inputs["advantages"], [1.0, 2.0]);
        }
    }

    #[test]
    fn a_row_is_read_as_a_local_run_reads_it() {
        let plain =
            rows(r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "id": "x", "meta": {"a": [1]}}"#)
                .unwrap();
        assert_eq!((&plain[0].ids[..], &plain[0].targets[..]), (&[1, 2, 3][..], &[2, 3, -100][..]));
        let padded =
            rows(r#"{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1], "advantages": [9, 8, 7]}"#)
                .unwrap();
        assert_eq!((&padded[0].ids[..], &padded[0].targets[..]), (&[1, 2][..], &[2, -100][..]));
        assert_eq!(padded[0].inputs["advantages"], [7.0, 0.0]);
        let packed = rows(r#"{"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}"#).unwrap();
        let targets: Vec<_> = packed.iter().map(|datum| datum.targets.clone()).collect();
        assert_eq!(targets, [[2, -100], [4, -100]]);
        let batch = rows(r#"{"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [-100, -100]]}"#).unwrap();
        let targets: Vec<_> = batch.iter().map(|datum| datum.targets.clone()).collect();
        assert_eq!(targets, [[2, -100], [-100, -100]]);
    }

    #[test]
    fn each_bad_datum_says_what_is_wrong_and_where() {
        let input = |ids: &str, inputs: &str| {
            format!(r#"{{"model_input": {{"input_ids": {ids}}}, "loss_fn_inputs": {{{inputs}}}}}"#)
        };
        for (text, words) in [
            (input("[1, 2]", ""), "got neither"),
            (input("[1]", r#""labels": [1], "target_tokens": [1]"#), "got both"),
            (input("[]", ""), "data[0].model_input.input_ids: expected at least one token"),
            (input("[1, 10]", ""), "input_ids[1]: token id 10 is not in the model's vocabulary of 10"),
            (input("[1.5]", ""), "input_ids[0]: expected an integer, got 1.5"),
            (input("[\"a\"]", ""), "input_ids: expected a list of numbers"),
            (input("[1, 2]", r#""target_tokens": [1]"#), "target_tokens: expected 2 values like input_ids"),
            (input("[1, 2]", r#""target_tokens": [1, 11]"#), "token id 11 is not in"),
            (input("[1, 2]", r#""target_tokens": [1, 2], "weights": [1]"#), "weights: expected 2 values"),
            (
                input("[1, 2]", r#""labels": [1, 2], "weights": [1]"#),
                "weights: expected 2 values like input_ids",
            ),
            (input("[1, 2]", r#""labels": [1]"#), "labels: expected 2 values like input_ids, got 1"),
            (
                input("[1]", r#""target_tokens": {"data": [1, 2], "shape": [3]}"#),
                "as many numbers as the shape says",
            ),
            (
                r#"{"model_input": {"chunks": [{"type": "image"}]}}"#.into(),
                "chunks[0].tokens: expected token ids",
            ),
        ] {
            let error = datum(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        for (text, words) in [
            ("{}", "batches[0]: expected field `input_ids`"),
            (r#"{"input_ids": [1], "labels": [1, 2]}"#, "labels: expected 1 values like input_ids, got 2"),
            (r#"{"input_ids": [1, 2], "weights": [1]}"#, "batches[0]: weights: expected 2 values"),
            (r#"{"input_ids": [[1, 2], [1]]}"#, "input_ids: expected a list of integers"),
            (r#"{"input_ids": [1], "sample_weight": [1]}"#, "sample_weight"),
        ] {
            let error = rows(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let long = format!(r#"{{"input_ids": {:?}}}"#, [1; 21]);
        assert!(rows(&long).unwrap_err().to_string().contains("21 tokens are more than the 20"));
    }
}
