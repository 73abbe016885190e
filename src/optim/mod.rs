//! Optimizers over the pieces of an adapter that a rank owns, the learning-rate schedule, and the one global gradient
//! norm.
//!
//! An optimizer is an [`UpdateRule`] in a file of its own, and an arm of [`Settings::rule`]; one that updates every
//! element by itself is an `ElementRule`. [`Optimizer`] holds the rule together with its state, which is named: by
//! region, then by state (`exp_avg`).

mod adamw;
mod anyprecision;
pub mod clip;
mod elements;
pub mod muon;
pub mod schedule;
mod sgd;
mod signsgd;
#[cfg(test)]
mod testing;

use crate::{
    config::{self, MuonAdjustLr, OptimizerArgs, OptimizerDtype, TrainArgs},
    dtype::DType,
    shard::{FlatRegion, OwnedPiece, PlacedParameter, ShardError},
};
use adamw::AdamW;
use anyprecision::AnyPrecisionAdamW;
use elements::{ElementRule, Elements};
use muon::Muon;
use sgd::Sgd;
use signsgd::SignSgd;
use std::{collections::BTreeMap, ops::Index};
use tch::Tensor;

pub use clip::{ClippedNorm, global_norm};
pub use schedule::Schedule;

/// The choice of an optimizer and its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub kind: config::Optimizer,
    pub weight_decay: f64,
    /// AdamW's β₁ and β₂, each from 0 to below 1.
    pub betas: (f64, f64),
    /// AdamW's addend to the root of the second moment, above 0.
    pub eps: f64,
    /// Dtype of the state, for those that leave it open.
    pub dtype: OptimizerDtype,
    /// Muon's μ, from 0 to below 1.
    pub momentum: f64,
    /// Muon looks ahead.
    pub nesterov: bool,
    /// Muon's Newton-Schulz iterations.
    pub ns_steps: usize,
    /// Muon's factor of the learning rate by shape.
    pub adjust_lr: MuonAdjustLr,
    /// LoRA+: the learning rate of B as a multiple of that of A.
    pub lr_ratio_of_b: f64,
}

impl From<&TrainArgs> for Settings {
    fn from(train: &TrainArgs) -> Self {
        let own = Self::new(train.optimizer, &train.rule);
        Self {
            weight_decay: train.weight_decay,
            betas: (train.adam_beta1, train.adam_beta2),
            eps: train.adam_epsilon,
            ..own
        }
    }
}

impl Settings {
    /// Settings of `kind` from `args`, with the default weight decay, betas and ε of a run.
    pub fn new(kind: config::Optimizer, args: &OptimizerArgs) -> Self {
        let train = TrainArgs::default();
        Self {
            kind,
            weight_decay: train.weight_decay,
            betas: (train.adam_beta1, train.adam_beta2),
            eps: train.adam_epsilon,
            dtype: args.optimizer_dtype,
            momentum: args.muon_momentum,
            nesterov: args.muon_nesterov,
            ns_steps: args.muon_ns_steps,
            adjust_lr: args.muon_adjust_lr_fn.unwrap_or(MuonAdjustLr::Original),
            lr_ratio_of_b: args.loraplus_lr_ratio,
        }
    }

    /// The rule that these settings choose.
    pub fn rule(&self) -> Box<dyn UpdateRule> {
        let &Self { kind, weight_decay, betas, eps, momentum, nesterov, ns_steps, adjust_lr, .. } = self;
        let dtype = match self.dtype {
            OptimizerDtype::Fp32 => DType::F32,
            OptimizerDtype::Bf16 => DType::Bf16,
        };
        match kind {
            config::Optimizer::Adamw => Box::new(AdamW { weight_decay, betas, eps }),
            config::Optimizer::AnyprecisionAdamw => {
                Box::new(AnyPrecisionAdamW { weight_decay, betas, eps, dtype })
            }
            config::Optimizer::Sgd => Box::new(Sgd { weight_decay }),
            config::Optimizer::Signsgd => Box::new(SignSgd { weight_decay }),
            config::Optimizer::Muon => {
                Box::new(Muon { weight_decay, momentum, nesterov, ns_steps, adjust_lr, dtype })
            }
        }
    }

    /// Bytes of the state of an element.
    pub fn state_bytes(&self) -> usize {
        let rule = self.rule();
        rule.state_names().len() * rule.state_dtype().size()
    }

    /// The numbers of the rule and the ratio of learning rates, as a resume compares them.
    pub fn numbers(&self) -> Vec<Number> {
        let mut numbers = self.rule().numbers();
        numbers.push(Number::new("loraplus_lr_ratio", self.lr_ratio_of_b));
        numbers
    }
}

/// Names of the state tensors of an optimizer; see [`UpdateRule::state_names`].
pub fn state_names(kind: config::Optimizer) -> &'static [&'static str] {
    let train = TrainArgs { optimizer: kind, ..TrainArgs::default() };
    Settings::from(&train).rule().state_names()
}

/// One update of a whole adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    pub lr: f64,
    /// The learning rate of B as a multiple of `lr`.
    pub lr_ratio_of_b: f64,
    /// Factor of every gradient, from clipping.
    pub coefficient: f64,
    /// Updates so far, this one included: t of a bias correction.
    pub count: u64,
}

impl Update {
    /// The learning rate of `parameter`.
    fn lr_of(&self, parameter: &PlacedParameter) -> f64 {
        // PEFT counts vectors to B.
        let as_b = [".lora_B", ".lora_magnitude_vector"].iter().any(|end| parameter.name.ends_with(end));
        if as_b { self.lr * self.lr_ratio_of_b } else { self.lr }
    }
}

/// The arithmetic of an optimizer.
pub trait UpdateRule {
    /// Names of its state tensors. A region's piece has one of each: `[piece elements]`, zero at first.
    fn state_names(&self) -> &'static [&'static str];

    /// Dtype of its state tensors. Files hold them in fp32, which bf16 fits into.
    fn state_dtype(&self) -> DType;

    /// Its numbers, by their field in the configuration.
    fn numbers(&self) -> Vec<Number>;

    /// Updates the master of every piece from its gradient, which stays as it is, and rounds the master into the
    /// compute copy. `state` has every piece's region.
    ///
    /// An optimizer of matrices finds the parameters of a piece with [`OwnedPiece::parts`]. It can make them whole over
    /// [`OwnedPiece::shards`]: every rank of a group passes the same regions in the same order.
    ///
    /// # Errors
    /// Those of collectives, if it enters any.
    fn step(&self, pieces: &[OwnedPiece], state: &State, update: &Update) -> Result<(), ShardError>;

    /// True if every master, state tensor and compute copy of `pieces` would be finite after [`step`](Self::step) with
    /// the same arguments. Changes nothing.
    ///
    /// # Errors
    /// Those of collectives, if it enters any.
    fn stays_finite(&self, pieces: &[OwnedPiece], state: &State, update: &Update)
    -> Result<bool, ShardError>;
}

/// A number of an optimizer, as a resume compares it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number {
    /// `adam_beta1`, of section `train`.
    pub field: &'static str,
    pub value: f64,
    /// The state means nothing under another value: a resume with one is refused. Others may change on a resume.
    pub shapes_state: bool,
}

impl Number {
    /// A number that may change on a resume.
    fn new(field: &'static str, value: f64) -> Self {
        Self { field, value, shapes_state: false }
    }

    /// The bits of a state's element, as number of field `optimizer_dtype`.
    fn of_dtype(dtype: DType) -> Self {
        Self::new("optimizer_dtype", 8.0 * dtype.size() as f64)
    }

    /// A `value` of this field as the configuration writes it.
    pub fn shown(&self, value: f64) -> String {
        match self.field {
            "optimizer_dtype" => if value == 32.0 { "fp32" } else { "bf16" }.to_owned(),
            "muon_adjust_lr_fn" => if value == 0.0 { "original" } else { "match_rms_adamw" }.to_owned(),
            "muon_nesterov" => (value != 0.0).to_string(),
            "muon_ns_steps" => format!("{value}"),
            _ => format!("{value:?}"),
        }
    }
}

/// State tensors by region and name.
#[derive(Default)]
pub struct State(BTreeMap<String, BTreeMap<&'static str, Tensor>>);

impl Index<&FlatRegion> for State {
    type Output = BTreeMap<&'static str, Tensor>;

    fn index(&self, region: &FlatRegion) -> &Self::Output {
        &self.0[&region.name]
    }
}

/// The optimizer of a whole adapter, on this rank.
pub struct Optimizer {
    settings: Settings,
    rule: Box<dyn UpdateRule>,
    state: State,
    updates: u64,
}

impl Optimizer {
    /// A fresh optimizer for the adapter that has `pieces`.
    pub fn new<'a>(settings: &Settings, pieces: impl IntoIterator<Item = OwnedPiece<'a>>) -> Self {
        let rule = settings.rule();
        let options = |piece: &OwnedPiece| (rule.state_dtype().kind(), piece.master.device());
        let fresh = |piece: OwnedPiece| {
            let zeros = || Tensor::zeros(piece.master.size(), options(&piece));
            let tensors = rule.state_names().iter().map(|&name| (name, zeros()));
            (piece.region.name.clone(), tensors.collect())
        };
        let state = State(pieces.into_iter().map(fresh).collect());
        Self { settings: *settings, rule, state, updates: 0 }
    }

    /// Its name in the configuration.
    pub fn kind(&self) -> config::Optimizer {
        self.settings.kind
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Sets the count of updates that the state has seen, for a resume.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Forgets all updates: the state is that of a fresh optimizer.
    pub fn reset(&mut self) {
        let tensors = self.state.0.values().flat_map(BTreeMap::values);
        tensors.for_each(|tensor| drop(tensor.shallow_clone().zero_()));
        self.updates = 0;
    }

    /// The state tensors by name, `[piece elements]` each in the dtype of the rule. A resume copies into them.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sets the numbers of its rule to those of `settings`, of the same kind. The state stays.
    pub fn set_numbers(&mut self, settings: &Settings) {
        let rule = settings.rule();
        debug_assert_eq!(rule.state_names(), self.rule.state_names());
        debug_assert_eq!(rule.state_dtype(), self.rule.state_dtype());
        (self.settings, self.rule) = (*settings, rule);
    }

    /// See [`Settings::numbers`].
    pub fn numbers(&self) -> Vec<Number> {
        self.settings.numbers()
    }

    /// Updates the masters and compute copies of `pieces` at learning rate `lr`, with gradients times `coefficient`.
    /// The caller invalidates gathered copies of the adapter beforehand, as they are stale afterwards.
    ///
    /// # Errors
    /// See [`UpdateRule::step`].
    pub fn step<'a>(
        &mut self,
        pieces: impl IntoIterator<Item = OwnedPiece<'a>>,
        lr: f64,
        coefficient: f64,
    ) -> Result<(), ShardError> {
        let _span = crate::trace::operation("optimizer.step");
        let _guard = tch::no_grad_guard();
        self.updates += 1;
        let pieces: Vec<OwnedPiece> = pieces.into_iter().collect();
        self.rule.step(&pieces, &self.state, &self.numbered(lr, coefficient, self.updates))
    }

    /// True if all that [`step`](Self::step) changes would be finite after it. Changes nothing.
    ///
    /// # Errors
    /// See [`UpdateRule::stays_finite`].
    pub fn stays_finite<'a>(
        &self,
        pieces: impl IntoIterator<Item = OwnedPiece<'a>>,
        lr: f64,
        coefficient: f64,
    ) -> Result<bool, ShardError> {
        let _span = crate::trace::operation("optimizer.stays_finite");
        let _guard = tch::no_grad_guard();
        let pieces: Vec<OwnedPiece> = pieces.into_iter().collect();
        self.rule.stays_finite(&pieces, &self.state, &self.numbered(lr, coefficient, self.updates + 1))
    }

    fn numbered(&self, lr: f64, coefficient: f64, count: u64) -> Update {
        Update { lr, lr_ratio_of_b: self.settings.lr_ratio_of_b, coefficient, count }
    }
}
