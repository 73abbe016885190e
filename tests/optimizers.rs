//! Optimizers make the steps of their references in Python: masters and named state, for several settings, in fp32, on
//! one rank and on two, whose border cuts a matrix.

use crate::common::{python, relative, run_workers};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use tch::{Kind, Tensor};
use xorl_dist::{
    comm::World,
    config::{MuonAdjustLr, Optimizer, OptimizerArgs, OptimizerDtype, ReduceGradients, TrainArgs},
    dtype::DType,
    optim::{self, Settings},
    rng::Stream,
    shard::{
        AdapterRegions, EntrySpec, FlatRegion, PlacedParameter, ProcessGroups, Region, RegionLayout, Storage,
        adapter::align_bytes,
    },
};

/// An adapter with a wide and a tall matrix of each kind.
const PARAMETERS: [(&str, [usize; 2]); 4] = [
    ("layer.q_proj.lora_A", [4, 33]),
    ("layer.q_proj.lora_B", [29, 4]),
    ("layer.o_proj.lora_A", [7, 11]),
    ("layer.o_proj.lora_B", [5, 7]),
];
const STEPS: usize = 20;
const LR: f64 = 3e-3;

/// Values of both signs and of sizes from 1e-6 to 1.
fn values(name: &str, count: usize) -> Vec<f32> {
    let stream = Stream::new(5, name);
    let value = |i: u64| {
        let size = 10f32.powi(-(stream.below(2 * i, 7) as i32));
        size * (stream.below(2 * i + 1, 2001) as f32 / 1000.0 - 1.0)
    };
    (0..count as u64).map(value).collect()
}

/// A case by its settings, and how far a master and a state tensor may be from the reference's, relative to it.
struct Case {
    train: TrainArgs,
    reference: Value,
    master: f64,
    state: f64,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |train: TrainArgs, class: &str, more: Value, [master, state]: [f64; 2]| {
        let mut settings = json!({"lr": LR, "weight_decay": train.weight_decay});
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let ratio = train.rule.loraplus_lr_ratio;
        let reference = json!({"optimizer": class, "settings": settings, "ratio": ratio});
        cases.push(Case { train, reference, master, state });
    };
    let rule = OptimizerArgs::default();
    let plus = OptimizerArgs { loraplus_lr_ratio: 4.0, ..rule.clone() };
    let fp32 = OptimizerArgs { optimizer_dtype: OptimizerDtype::Fp32, ..rule.clone() };
    let exact = [1e-6; 2];
    for (beta1, beta2, eps, weight_decay, rule) in
        [(0.9, 0.95, 1e-8, 0.01, &rule), (0.9, 0.999, 1e-6, 0.1, &plus), (0.5, 0.8, 1e-3, 0.0, &rule)]
    {
        let train = TrainArgs {
            adam_beta1: beta1,
            adam_beta2: beta2,
            adam_epsilon: eps,
            weight_decay,
            rule: rule.clone(),
            ..TrainArgs::default()
        };
        let numbers = json!({"betas": [beta1, beta2], "eps": eps});
        case(train.clone(), "AdamW", numbers.clone(), exact);
        let any = TrainArgs { optimizer: Optimizer::AnyprecisionAdamw, ..train };
        // Of a number that lies between two of bf16 both are right where fp32 sums differ in their last bit.
        case(any.clone(), "AnyPrecisionAdamW", numbers.clone(), [1e-5, 1e-4]);
        let rule = OptimizerArgs { loraplus_lr_ratio: any.rule.loraplus_lr_ratio, ..fp32.clone() };
        let mut of_fp32 = numbers;
        of_fp32["dtype"] = "float32".into();
        case(TrainArgs { rule, ..any }, "AnyPrecisionAdamW", of_fp32, exact);
    }
    for (weight_decay, rule) in [(0.0, &rule), (0.1, &rule), (0.1, &plus)] {
        let train =
            |optimizer| TrainArgs { optimizer, weight_decay, rule: rule.clone(), ..TrainArgs::default() };
        case(train(Optimizer::Sgd), "SGD", json!({}), exact);
        case(train(Optimizer::Signsgd), "SignSGD", json!({}), exact);
    }
    let settings = [
        (0.95, true, 5, None, 0.1, &fp32),
        (0.8, false, 3, Some(MuonAdjustLr::MatchRmsAdamw), 0.0, &fp32),
        (0.95, true, 5, Some(MuonAdjustLr::Original), 0.0, &plus),
    ];
    for (momentum, nesterov, ns_steps, adjust, weight_decay, rule) in settings {
        let rule = OptimizerArgs {
            muon_momentum: momentum,
            muon_nesterov: nesterov,
            muon_ns_steps: ns_steps,
            muon_adjust_lr_fn: adjust,
            ..rule.clone()
        };
        let class = if rule.optimizer_dtype == OptimizerDtype::Fp32 { "Muon" } else { "MuonBf16" };
        let numbers =
            json!({"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust});
        let train = TrainArgs { optimizer: Optimizer::Muon, weight_decay, rule, ..TrainArgs::default() };
        case(train, class, numbers, MUON);
    }
    cases
}

/// Muon's iterations are in bf16, where a product of matrices may be summed in another order.
const MUON: [f64; 2] = [1e-3, 1e-6];

/// Masters and state by parameter, name and step, as the references in Python have them.
type Story = BTreeMap<String, BTreeMap<String, Vec<Vec<f64>>>>;

/// The steps that Python makes in each of `cases`, all in one process.
fn theirs(cases: &[Case]) -> Vec<Story> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/optimizers.py");
    let parameter = |(name, shape): &(&str, [usize; 2])| {
        let n = shape[0] * shape[1];
        let gradients: Vec<_> = (0..STEPS).map(|step| values(&format!("{name} {step}"), n)).collect();
        json!({"name": name, "shape": shape, "start": values(name, n), "gradients": gradients})
    };
    let cases: Vec<&Value> = cases.iter().map(|case| &case.reference).collect();
    let asked = json!({"cases": cases, "parameters": PARAMETERS.iter().map(parameter).collect::<Vec<_>>()});
    let mut command = Command::new(python());
    let mut oracle =
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("no Python");
    oracle.stdin.take().unwrap().write_all(asked.to_string().as_bytes()).unwrap();
    let output = oracle.wait_with_output().unwrap();
    assert!(output.status.success(), "the oracle failed: {}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The elements of a rank after every step: of the master and of each state tensor, `[step][piece elements]`.
#[derive(Serialize, Deserialize)]
struct Piece {
    region: FlatRegion,
    first: usize,
    tensors: BTreeMap<String, Vec<Vec<f64>>>,
}

/// Makes the steps of `train` on this rank of `world`.
fn steps(train: &TrainArgs, world: &World) -> Piece {
    let entry = |(name, shape): &(&str, [usize; 2])| EntrySpec {
        name: name.to_string(),
        shape: shape.to_vec(),
        storage: Storage::Plain(DType::F32),
        spans: Vec::new(),
    };
    let layout = RegionLayout::new(
        "layer",
        PARAMETERS.iter().map(entry).collect(),
        world.size(),
        align_bytes(DType::F32),
    );
    let piece = layout.piece_bytes() / 4;
    let first = |i: usize| layout.entries[i].offset / 4;
    let placed = |(i, (name, shape)): (usize, &(&str, [usize; 2]))| PlacedParameter {
        name: name.to_string(),
        shape: *shape,
        first: first(i),
    };
    let parameters = PARAMETERS.iter().enumerate().map(placed).collect();
    let region = FlatRegion { name: "layers.0".into(), piece, expert_groups: 1, parameters };
    let groups = ProcessGroups::one_block(world);
    let mut adapter = AdapterRegions::new(vec![layout], Vec::new(), 1, &groups, ReduceGradients::Step);
    for parameter in &region.parameters {
        let range = parameter.elements().unwrap();
        let start = values(&parameter.name, range.len());
        adapter.of_mut(Region::Dense).set_master(0, range, &start);
    }
    let mut optimizer =
        optim::Optimizer::new(&Settings::from(train), [adapter.of(Region::Dense).piece(0, &region)]);
    let mut tensors: BTreeMap<String, Vec<Vec<f64>>> = BTreeMap::new();
    for step in 0..STEPS {
        let own = adapter.of(Region::Dense).piece(0, &region);
        for part in own.parts() {
            let [rows, columns] = part.parameter.shape;
            let gradient = values(&format!("{} {step}", part.parameter.name), rows * columns);
            let mut target = own.gradient.narrow(0, part.at as i64, part.elements.len() as i64);
            target.copy_(&Tensor::from_slice(&gradient[part.elements.clone()]));
        }
        adapter.invalidate().unwrap();
        let pieces = || [adapter.of(Region::Dense).piece(0, &region)];
        assert!(optimizer.stays_finite(pieces(), LR, 1.0).unwrap());
        optimizer.step(pieces(), LR, 1.0).unwrap();
        let dense = adapter.of(Region::Dense);
        assert_eq!(&dense.compute(0).unwrap(), dense.master(0));
        let state = optimizer.state()[&region].iter().map(|(name, tensor)| (*name, tensor));
        for (name, tensor) in state.chain([("master", dense.master(0))]) {
            let all = Vec::<f64>::try_from(tensor.to_kind(Kind::Double)).unwrap();
            tensors.entry(name.to_owned()).or_default().push(all);
        }
    }
    let first = adapter.of(Region::Dense).owned(0).start;
    Piece { region, first, tensors }
}

/// Holds the pieces of all ranks against the steps of the reference.
fn compare(pieces: &[Piece], case: &Case, theirs: &Story) {
    for parameter in &pieces[0].region.parameters {
        let theirs = &theirs[&parameter.name];
        assert_eq!(theirs.len(), pieces[0].tensors.len(), "{:?}", theirs.keys());
        for (name, steps) in theirs {
            for (step, theirs) in steps.iter().enumerate() {
                let mut ours = vec![f64::NAN; theirs.len()];
                for piece in pieces {
                    let own = &piece.tensors[name][step];
                    for (i, at) in parameter.elements().unwrap().enumerate() {
                        if let Some(value) = at.checked_sub(piece.first).and_then(|at| own.get(at)) {
                            ours[i] = *value;
                        }
                    }
                }
                let (apart, most) =
                    (relative(&ours, theirs), if name == "master" { case.master } else { case.state });
                assert!(
                    apart <= most,
                    "step {step}, {name} of {}: {apart} apart on {} ranks with {}",
                    parameter.name,
                    pieces.len(),
                    case.reference
                );
            }
        }
    }
}

#[test]
fn mpi_python_optimizers_make_the_steps_of_their_references() {
    let cases = cases();
    let theirs = theirs(&cases);
    let folder = tempfile::tempdir().unwrap();
    run_workers("optimizers::mpi_worker", 2, &(), folder.path(), |_| {});
    let of_rank = |rank: usize| -> Vec<Piece> {
        let text = std::fs::read_to_string(folder.path().join(format!("{rank}.json"))).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let world = World::start().unwrap();
    let mut of_two: Vec<Vec<Piece>> = of_rank(0).into_iter().map(|piece| vec![piece]).collect();
    of_two.iter_mut().zip(of_rank(1)).for_each(|(pieces, piece)| pieces.push(piece));
    for ((case, theirs), of_two) in cases.iter().zip(&theirs).zip(&of_two) {
        let one = steps(&case.train, &world);
        compare(std::slice::from_ref(&one), case, theirs);
        compare(of_two, case, theirs);
        // Every rank of two owns a part of a matrix that the other has the rest of.
        let border = of_two[1].first;
        let is_cut = |parameter: &PlacedParameter| {
            let all = parameter.elements().unwrap();
            all.start < border && border < all.end
        };
        assert!(one.region.parameters.iter().any(is_cut));
    }
}

#[test]
fn mpi_worker() {
    let Ok(out) = std::env::var("XORL_TEST_OUT") else { return };
    let world = World::start().unwrap();
    let pieces: Vec<Piece> = cases().iter().map(|case| steps(&case.train, &world)).collect();
    let text = serde_json::to_string(&pieces).unwrap();
    std::fs::write(Path::new(&out).join(format!("{}.json", world.rank())), text).unwrap();
}
