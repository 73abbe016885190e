//! An adapter of three elements on one rank, for the tests of optimizers.

use super::{FlatRegion, Optimizer, OwnedPiece, Settings};
use crate::{
    comm::World,
    config::{self, ReduceGradients, TrainArgs},
    dtype::DType,
    shard::{
        AdapterRegions, EntrySpec, PlacedParameter, ProcessGroups, Region, RegionLayout, Storage,
        adapter::align_bytes,
    },
};
use tch::Tensor;

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

/// Holds an optimizer without state against `step`: the decrease of a parameter at learning rate 0.01 from the
/// gradient, which counts half, the parameter and the weight decay.
pub fn follows(kind: config::Optimizer, step: impl Fn(f32, f64, f64) -> f64) {
    for weight_decay in [0.0, 0.1] {
        let train = TrainArgs { optimizer: kind, weight_decay, ..TrainArgs::default() };
        let mut adapter = Adapter::new();
        let mut optimizer = Optimizer::new(&Settings::from(&train), adapter.pieces());
        let mut p = START.map(f64::from);
        for gradient in GRADIENTS {
            adapter.update(&mut optimizer, gradient, 0.01, 0.5);
            for i in 0..3 {
                p[i] -= step(gradient[i], p[i], weight_decay);
            }
        }
        adapter.equals(p, &format!("{kind:?}"));
    }
}
