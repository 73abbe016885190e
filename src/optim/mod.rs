//! Optimizers over the pieces of an adapter that a rank owns, the learning-rate schedule, and the one global gradient
//! norm.
//!
//! An optimizer is an [`UpdateRule`] in a file of its own, and an arm of [`Settings::rule`]. [`Optimizer`] holds the
//! rule together with its state, which is named: by region, then by state (`exp_avg`).

mod adamw;
pub mod clip;
pub mod schedule;
mod sgd;

use crate::{
    config::{self, TrainArgs},
    shard::{FlatRegion, OwnedPiece, ShardError},
};
use adamw::AdamW;
use sgd::Sgd;
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
}

impl From<&TrainArgs> for Settings {
    fn from(train: &TrainArgs) -> Self {
        Self {
            kind: train.optimizer,
            weight_decay: train.weight_decay,
            betas: (train.adam_beta1, train.adam_beta2),
            eps: train.adam_epsilon,
        }
    }
}

impl Settings {
    /// The rule that these settings choose.
    pub fn rule(&self) -> Box<dyn UpdateRule> {
        let &Self { kind, weight_decay, betas, eps } = self;
        match kind {
            config::Optimizer::Adamw => Box::new(AdamW { weight_decay, betas, eps }),
            config::Optimizer::Sgd => Box::new(Sgd { weight_decay }),
        }
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
    /// Factor of every gradient, from clipping.
    pub coefficient: f64,
    /// Updates so far, this one included: t of a bias correction.
    pub count: u64,
}

/// The arithmetic of an optimizer.
pub trait UpdateRule {
    /// Names of its state tensors. A region's piece has one of each: fp32 `[piece elements]`, zero at first.
    fn state_names(&self) -> &'static [&'static str];

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
    rule: Box<dyn UpdateRule>,
    state: State,
    updates: u64,
}

impl Optimizer {
    /// A fresh optimizer for the adapter that has `pieces`.
    pub fn new<'a>(settings: &Settings, pieces: impl IntoIterator<Item = OwnedPiece<'a>>) -> Self {
        let rule = settings.rule();
        let fresh = |piece: OwnedPiece| {
            let tensors = rule.state_names().iter().map(|&name| (name, piece.master.zeros_like()));
            (piece.region.name.clone(), tensors.collect())
        };
        let state = State(pieces.into_iter().map(fresh).collect());
        Self { rule, state, updates: 0 }
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

    /// The state tensors by name, fp32 `[piece elements]` each. A resume copies into them.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sets the numbers of its rule to those of `settings`, of the same kind. The state stays.
    pub fn set_numbers(&mut self, settings: &Settings) {
        let rule = settings.rule();
        debug_assert_eq!(rule.state_names(), self.rule.state_names());
        self.rule = rule;
    }

    /// The numbers of its rule; see [`UpdateRule::numbers`].
    pub fn numbers(&self) -> Vec<Number> {
        self.rule.numbers()
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
        self.rule.step(&pieces, &self.state, &Update { lr, coefficient, count: self.updates })
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
        let update = Update { lr, coefficient, count: self.updates + 1 };
        self.rule.stays_finite(&pieces, &self.state, &update)
    }
}

/// An adapter of three elements on one rank, for the tests of optimizers.
#[cfg(test)]
mod testing {
    use super::*;
    use crate::{
        comm::World,
        config::ReduceGradients,
        dtype::DType,
        shard::{
            AdapterRegions, EntrySpec, PlacedParameter, ProcessGroups, Region, RegionLayout, Storage,
            adapter::align_bytes,
        },
    };

    pub const START: [f32; 3] = [1.0, -2.0, 0.5];

    /// The gradients of five steps.
    pub const GRADIENTS: [[f32; 3]; 5] =
        [[0.3, -0.1, 2.0], [0.6, -0.1, -2.0], [0.9, -0.1, 2.0], [1.2, 0.0, 2.0], [1.5, -0.1, 0.25]];

    pub struct Adapter(AdapterRegions, FlatRegion);

    impl Adapter {
        pub fn new() -> Self {
            let spec = EntrySpec {
                name: "a".into(),
                shape: vec![3],
                storage: Storage::Plain(DType::F32),
                spans: Vec::new(),
            };
            let layout = RegionLayout::new("unit", vec![spec], 1, align_bytes(DType::F32));
            let piece = layout.piece_bytes() / DType::F32.size();
            let parameters = vec![PlacedParameter { name: "a".into(), shape: [1, 3], first: 0 }];
            let region = FlatRegion { name: "layers.0".into(), piece, expert_groups: 1, parameters };
            let groups = ProcessGroups::one_block(&World::start().unwrap());
            let mut adapter = AdapterRegions::new(vec![layout], vec![], 1, &groups, ReduceGradients::Step);
            adapter.of_mut(Region::Dense).set_master(0, 0..3, &START);
            Self(adapter, region)
        }

        pub fn pieces(&self) -> [OwnedPiece<'_>; 1] {
            [self.0.of(Region::Dense).piece(0, &self.1)]
        }

        /// Makes one step of `optimizer`.
        pub fn update(&mut self, optimizer: &mut Optimizer, gradient: [f32; 3], lr: f64, coefficient: f64) {
            let own = self.0.of(Region::Dense).gradient(0);
            own.narrow(0, 0, 3).copy_(&Tensor::from_slice(&gradient));
            optimizer.step(self.pieces(), lr, coefficient).unwrap();
        }

        /// The masters are `expected`, and the compute copies are the masters.
        pub fn equals(&self, expected: [f64; 3], what: &str) {
            let dense = self.0.of(Region::Dense);
            assert_eq!(&dense.compute(0).unwrap(), dense.master(0));
            near(dense.master(0), expected, what);
        }

        pub fn state_equals(&self, optimizer: &Optimizer, name: &str, expected: [f64; 3]) {
            near(&optimizer.state()[&self.1][name], expected, name);
        }
    }

    fn near(tensor: &Tensor, expected: [f64; 3], what: &str) {
        let ours: Vec<f32> = tensor.narrow(0, 0, 3).try_into().unwrap();
        for (ours, expected) in ours.iter().zip(expected) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{what}: {ours} {expected}");
        }
    }
}
