//! Inputs of a loss beside the log-probabilities: checked, and laid out over a micro-batch.

use super::LossError;
use std::collections::BTreeMap;

/// One sequence as a loss by name sees it.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// `[tokens × k]`, token by token: negative where a target is absent.
    pub targets: &'a [i64],
    /// Targets a token, at least 1.
    pub k: usize,
    /// `[tokens × k]` each, by name. Those that the loss does not read are ignored.
    pub inputs: &'a BTreeMap<String, Vec<f32>>,
}

/// The values of an input that a sequence does not give.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Absent {
    /// The input is required.
    Refused,
    /// This number everywhere.
    Is(f64),
    /// 1 where the target has an advantage that is not 0, else 0.
    Advantaged,
}

/// An input that a loss reads: a number for each target, `[tokens × k]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Input {
    /// Its name on the wire and in rows.
    pub name: &'static str,
    pub absent: Absent,
}

impl Input {
    pub(super) const fn required(name: &'static str) -> Self {
        Self { name, absent: Absent::Refused }
    }

    pub(super) const fn or(name: &'static str, default: f64) -> Self {
        Self { name, absent: Absent::Is(default) }
    }
}

pub(super) const WEIGHTS: &str = "weights";
pub(super) const LOGPROBS: &str = "logprobs";
pub(super) const ADVANTAGES: &str = "advantages";
pub(super) const RATIO_MASK: &str = "sequence_ratio_mask";
pub(super) const CLIP_LOW: &str = "clip_low_threshold";
pub(super) const CLIP_HIGH: &str = "clip_high_threshold";
pub(super) const ROLLOUT: &str = "rollout_logprobs";
pub(super) const REFERENCE: &str = "ref_logprobs";

/// The inputs of a loss over all targets of a micro-batch, each `[tokens × k]` and empty where the loss does not read
/// it.
#[derive(Clone, Debug, Default)]
pub(super) struct Columns {
    pub weights: Vec<f64>,
    pub old: Vec<f64>,
    pub advantages: Vec<f64>,
    pub low: Vec<f64>,
    pub high: Vec<f64>,
    pub ratio_mask: Vec<f64>,
    pub rollout: Vec<f64>,
    pub reference: Vec<f64>,
}

impl Columns {
    /// Inputs of checked sequences, one after another.
    pub fn new(inputs: &[Input], sequences: &[Sequence]) -> Self {
        let mut columns = Self::default();
        for sequence in sequences {
            for input in inputs {
                columns.add(input, sequence);
            }
        }
        columns
    }

    /// Adds `input` of a sequence. [`Absent::Advantaged`] reads the advantages, which are added before it.
    fn add(&mut self, input: &Input, sequence: &Sequence) {
        let count = sequence.targets.len();
        let values: Vec<f64> = match (sequence.inputs.get(input.name), input.absent) {
            (Some(values), _) => values.iter().map(|&value| f64::from(value)).collect(),
            (None, Absent::Is(default)) => vec![default; count],
            (None, Absent::Advantaged) => {
                let own = self.advantages.len().saturating_sub(count);
                self.advantages[own..].iter().map(|&a| f64::from(u8::from(a != 0.0))).collect()
            }
            (None, Absent::Refused) => Vec::new(),
        };
        let column = match input.name {
            WEIGHTS => &mut self.weights,
            LOGPROBS => &mut self.old,
            ADVANTAGES => &mut self.advantages,
            CLIP_LOW => &mut self.low,
            CLIP_HIGH => &mut self.high,
            RATIO_MASK => &mut self.ratio_mask,
            ROLLOUT => &mut self.rollout,
            _ => &mut self.reference,
        };
        column.extend(values);
    }
}

/// Checks what `sequence` gives against what `loss` reads.
pub(super) fn check(loss: &'static str, inputs: &[Input], sequence: &Sequence) -> Result<(), LossError> {
    let (targets, k) = (sequence.targets.len(), sequence.k);
    if k == 0 || !targets.is_multiple_of(k) {
        return Err(LossError::Targets { loss, targets, k });
    }
    for &Input { name: input, absent } in inputs {
        let Some(values) = sequence.inputs.get(input) else {
            if absent == Absent::Refused {
                let found: Vec<&str> = sequence.inputs.keys().map(String::as_str).collect();
                let found = if found.is_empty() { "none".into() } else { found.join(", ") };
                return Err(LossError::MissingInput { loss, input, found });
            }
            continue;
        };
        if values.len() != targets {
            return Err(LossError::InputLength { loss, input, expected: targets, found: values.len() });
        }
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(LossError::NotFinite { loss, input, index, value: values[index] });
        }
    }
    Ok(())
}
