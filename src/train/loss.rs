//! The loss of a run's rows: `train.loss_fn` over the inputs that rows give.

use super::{MicroBatch, Run, run::deal};
use crate::{
    config::{FieldLocations, TrainArgs},
    data::{Row, RowInput, RowNeeds, Shifted, StepRows},
    error::{Error, Result},
    lora,
    loss::{Absent, LossError, NamedLoss, PAIR_LOSSES, Pairs, Preference, Sequence},
    model::transformer::Batch,
};
use std::ops::Range;
use tch::{Device, Tensor};

/// The loss of a run.
pub(super) struct RowLoss {
    kind: Kind,
    needs: RowNeeds,
}

/// The two kinds of losses.
enum Kind {
    /// Over tokens or sequences.
    Named(NamedLoss),
    /// Over pairs of answers: neighbouring documents of a row.
    Pairs(Preference),
}

impl RowLoss {
    /// # Errors
    /// There is no such loss, or its parameters are wrong: with the place of the field.
    pub fn new(train: &TrainArgs, places: &FieldLocations) -> Result<Self> {
        let wrong = |error: LossError| {
            let field = match &error {
                LossError::Unknown { .. } | LossError::Refused { .. } => "train.loss_fn",
                _ => "train.loss_fn_params",
            };
            let pairs = match &error {
                LossError::Unknown { .. } => format!(", {}", PAIR_LOSSES.join(", ")),
                _ => String::new(),
            };
            Error::Input(format!("{}: {error}{pairs}", places.of(field)))
        };
        let (name, params) = (&train.loss_fn, &train.loss_fn_params);
        if PAIR_LOSSES.contains(&name.as_str()) {
            let loss = Preference::new(name, params).map_err(wrong)?;
            return Ok(Self {
                kind: Kind::Pairs(loss),
                needs: RowNeeds { pairs: true, ..RowNeeds::default() },
            });
        }
        let loss = NamedLoss::new(name, params.clone()).map_err(wrong)?;
        let inputs = loss.inputs().map_err(wrong)?.into_iter();
        let inputs =
            inputs.map(|input| RowInput { name: input.name, required: input.absent == Absent::Refused });
        Ok(Self { kind: Kind::Named(loss), needs: RowNeeds { inputs: inputs.collect(), pairs: false } })
    }

    /// True for a loss over pairs of answers.
    pub fn is_of_pairs(&self) -> bool {
        matches!(self.kind, Kind::Pairs(_))
    }

    /// True if a pass of the reference comes before each micro-batch.
    pub fn reads_reference(&self) -> bool {
        matches!(self.kind, Kind::Pairs(loss) if loss.reads_reference())
    }

    /// Its needs of rows.
    pub fn needs(&self) -> &RowNeeds {
        &self.needs
    }

    /// A micro-batch of `rows`, flat, with its loss; `pad` fills packs. `keys`: those of its tokens, for dropout.
    /// `reference` `[tokens, 1]`: log-probabilities of the targets under the reference, where the loss reads them.
    pub fn micro_batch(
        &self,
        rows: &[Row],
        pad: i64,
        keys: Option<Vec<u64>>,
        reference: Option<&Tensor>,
        device: Device,
    ) -> Result<MicroBatch> {
        let batch = batch(rows, pad, device);
        let batch = match keys {
            Some(keys) => batch.with_token_keys(&keys),
            None => batch,
        };
        let wrong = |error: LossError| Error::Failure(format!("rows that were checked: {error} (a bug)"));
        let documents: Vec<Shifted> = rows.iter().flat_map(Row::shifted).collect();
        let loss = match &self.kind {
            Kind::Named(loss) => loss,
            Kind::Pairs(loss) => {
                let targets = documents.iter().map(|document| &document.targets[..]);
                let pairs = Pairs::new(*loss, targets, reference).map_err(wrong)?;
                return Ok(MicroBatch::of_pairs(batch, pairs));
            }
        };
        if loss.is_plain() && rows.iter().all(|row| row.inputs.is_empty()) {
            return Ok(batch.into());
        }
        let sequences = documents.iter();
        let sequences: Vec<Sequence> =
            sequences.map(|Shifted { targets, inputs }| Sequence { targets, k: 1, inputs }).collect();
        let valid = sequences.iter().map(|sequence| loss.valid(sequence)).sum::<Result<u64, _>>();
        let loss = loss.over(&sequences, 1.0, device).map_err(wrong)?;
        Ok(MicroBatch::with_loss(batch, loss, valid.map_err(wrong)? as usize))
    }

    /// `rows` that validate, flat: with a loss over pairs, or with their cross-entropy, whatever other loss the run
    /// has. `reference`: as of [`micro_batch`](Self::micro_batch).
    pub fn evaluated(
        &self,
        rows: &[Row],
        pad: i64,
        reference: Option<&Tensor>,
        device: Device,
    ) -> Result<MicroBatch> {
        match &self.kind {
            Kind::Named(loss) if !loss.is_plain() => Ok(batch(rows, pad, device).into()),
            _ => self.micro_batch(rows, pad, None, reference, device),
        }
    }
}

impl Run {
    /// Keys of the tokens of this rank's `rows` of a step, by micro-batch, where the adapter has a dropout. `all`: the
    /// step's rows by their places in the epoch.
    pub(super) fn token_keys(
        &self,
        rows: &StepRows,
        all: Range<usize>,
        rank: usize,
    ) -> Vec<Option<Vec<u64>>> {
        let train = &self.config.train;
        if self.config.lora.lora_dropout == 0.0 {
            return vec![None; rows.micro_batches.len()];
        }
        let places = deal(&self.mesh, rank, all, train.micro_batch_size);
        let of_row = |(row, &place): (&Row, &usize)| {
            lora::init::token_keys(train.seed, rows.step, place, row.input_ids.len())
        };
        let own = rows.micro_batches.iter().zip(&places);
        own.map(|(rows, places)| Some(rows.iter().zip(places).flat_map(of_row).collect())).collect()
    }
}

/// A batch of `rows`, flat; `pad` fills packs.
pub(super) fn batch(rows: &[Row], pad: i64, device: Device) -> Batch {
    let ids: Vec<i64> = rows.iter().flat_map(|row| row.input_ids.iter().copied()).collect();
    let labels: Vec<i64> = rows.iter().flat_map(|row| row.labels.iter().copied()).collect();
    let lengths: Vec<usize> = rows.iter().flat_map(|row| row.document_lengths.iter().copied()).collect();
    let padding = rows.iter().map(|row| row.padding(pad)).sum();
    Batch::new(&ids, &labels, &lengths, device).with_padding(padding)
}
