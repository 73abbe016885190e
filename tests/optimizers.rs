//! Optimizers make torch's steps: master and named state, for several settings, in fp32.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod common;

use common::{python, relative};
use serde_json::{Value, json};
use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use tch::Tensor;
use xorl_dist::{
    comm::World,
    config::{Optimizer as Kind, ReduceGradients, TrainArgs},
    dtype::DType,
    optim::{Optimizer, Settings},
    rng::Stream,
    shard::{
        AdapterRegions, EntrySpec, FlatRegion, PlacedParameter, ProcessGroups, Region, RegionLayout, Storage,
        adapter::align_bytes,
    },
};

const ELEMENTS: usize = 77;
const STEPS: usize = 12;
const LR: f64 = 3e-3;

/// Values of both signs and of sizes from 1e-6 to 1.
fn values(name: &str) -> Vec<f32> {
    let stream = Stream::new(5, name);
    let value = |i: u64| {
        let size = 10f32.powi(-(stream.below(2 * i, 7) as i32));
        size * (stream.below(2 * i + 1, 2001) as f32 / 1000.0 - 1.0)
    };
    (0..ELEMENTS as u64).map(value).collect()
}

fn gradient(step: usize) -> Vec<f32> {
    values(&format!("gradient {step}"))
}

/// The steps that torch makes in each of `cases`, `{optimizer, settings}`.
fn torch(cases: &[Value]) -> Vec<Vec<Value>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/optimizers.py");
    let gradients: Vec<_> = (0..STEPS).map(gradient).collect();
    let asked = json!({"cases": cases, "start": values("start"), "gradients": gradients});
    let mut command = Command::new(python());
    let mut oracle =
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("no Python");
    oracle.stdin.take().unwrap().write_all(asked.to_string().as_bytes()).unwrap();
    let output = oracle.wait_with_output().unwrap();
    assert!(output.status.success(), "the oracle failed: {}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn adapter() -> (AdapterRegions, FlatRegion) {
    let entry = EntrySpec {
        name: "a".into(),
        shape: vec![ELEMENTS],
        storage: Storage::Plain(DType::F32),
        spans: Vec::new(),
    };
    let layout = RegionLayout::new("layer", vec![entry], 1, align_bytes(DType::F32));
    let parameters = vec![PlacedParameter { name: "a".into(), shape: [1, ELEMENTS], first: 0 }];
    let piece = layout.piece_bytes() / DType::F32.size();
    let region = FlatRegion { name: "layers.0".into(), piece, expert_groups: 1, parameters };
    let groups = ProcessGroups::one_block(&World::start().unwrap());
    let mut adapter = AdapterRegions::new(vec![layout], Vec::new(), 1, &groups, ReduceGradients::Step);
    adapter.of_mut(Region::Dense).set_master(0, 0..ELEMENTS, &values("start"));
    (adapter, region)
}

/// Makes our steps of `train` and compares each with torch's: ‖a − b‖ ≤ 1e-6·‖b‖ for the master and each state tensor.
fn compare(train: &TrainArgs, theirs: &[Value]) {
    let (mut adapter, region) = adapter();
    let mut optimizer = Optimizer::new(&Settings::from(train), [adapter.of(Region::Dense).piece(0, &region)]);
    for (step, theirs) in theirs.iter().enumerate() {
        let own = adapter.of(Region::Dense).gradient(0).narrow(0, 0, ELEMENTS as i64);
        own.shallow_clone().copy_(&Tensor::from_slice(&gradient(step)));
        adapter.invalidate().unwrap();
        optimizer.step([adapter.of(Region::Dense).piece(0, &region)], LR, 1.0).unwrap();
        let state = optimizer.state()[&region].iter().map(|(name, tensor)| (*name, tensor));
        let ours: Vec<(&str, &Tensor)> =
            state.chain([("master", adapter.of(Region::Dense).master(0))]).collect();
        assert_eq!(ours.len(), theirs.as_object().unwrap().len(), "{theirs}");
        for (name, tensor) in ours {
            let theirs: Vec<f64> = serde_json::from_value(theirs[name].clone()).unwrap();
            let ours = tensor.narrow(0, 0, ELEMENTS as i64).to_kind(tch::Kind::Double);
            let apart = relative(&Vec::<f64>::try_from(ours).unwrap(), &theirs);
            assert!(apart <= 1e-6, "step {step}, {name}: {apart} apart with {train:?}");
        }
    }
}

#[test]
fn python_adamw_makes_torchs_steps() {
    let settings = [(0.9, 0.95, 1e-8, 0.01), (0.9, 0.999, 1e-6, 0.1), (0.5, 0.8, 1e-3, 0.0)];
    let cases = settings.map(|(beta1, beta2, eps, decay)| {
        let settings = json!({"lr": LR, "betas": [beta1, beta2], "eps": eps, "weight_decay": decay});
        json!({"optimizer": "AdamW", "settings": settings})
    });
    for ((beta1, beta2, eps, decay), theirs) in settings.into_iter().zip(torch(&cases)) {
        let train = TrainArgs {
            adam_beta1: beta1,
            adam_beta2: beta2,
            adam_epsilon: eps,
            weight_decay: decay,
            ..TrainArgs::default()
        };
        compare(&train, &theirs);
    }
}

#[test]
fn python_sgd_makes_torchs_steps() {
    let decays = [0.0, 0.1];
    let cases =
        decays.map(|decay| json!({"optimizer": "SGD", "settings": {"lr": LR, "weight_decay": decay}}));
    for (weight_decay, theirs) in decays.into_iter().zip(torch(&cases)) {
        compare(&TrainArgs { optimizer: Kind::Sgd, weight_decay, ..TrainArgs::default() }, &theirs);
    }
}
