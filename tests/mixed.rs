//! Rows of several adapters in one pass over the base: each adapter gets what it gets alone.

use crate::common::{
    relative, run_workers, stand_in,
    topology::{Data, load, row, spec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tch::{Kind, Tensor};
use xorl_dist::{
    comm::{Reduce, World},
    config::{CheckpointingMethod, ReduceGradients},
    device::DeviceChoice,
    lora::{Adapter, LoraShape, targets::resolve},
    loss::{BySegment, CrossEntropy, TokenLoss},
    mesh::{Mesh, MeshSizes},
    model::{
        base_plan::{Options, all_projections},
        transformer::{Batch, Transformer},
    },
    shard::ProcessGroups,
};

/// Rank, alpha and targets of each adapter of the pass; the last leaves the MLPs alone.
const ADAPTERS: [(usize, f64, &[&str]); 3] = [
    (4, 8.0, &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    (8, 4.0, &["qkv_proj", "gate_up_proj", "down_proj"]),
    (16, 32.0, &["q_proj", "o_proj"]),
];

/// The adapter of each row of the mixed batch.
const ROWS: [Option<usize>; 8] = [Some(1), None, Some(0), Some(0), Some(2), Some(1), None, Some(2)];

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    experts_over: usize,
    moe: bool,
    reduce: ReduceGradients,
    stand_in: bool,
}

impl Case {
    fn dense(world: usize) -> Self {
        Self { world, experts_over: 1, moe: false, reduce: ReduceGradients::Step, stand_in: false }
    }

    fn experts(world: usize, experts_over: usize) -> Self {
        Self { experts_over, moe: true, ..Self::dense(world) }
    }

    /// Largest ‖mixed − alone‖₂ / ‖alone‖₂ of a tensor in fp32. GEMMs of other numbers of rows add in another order:
    /// with the stand-in, whose kernels are those of devices, 1.07e-6 was measured.
    fn tolerance(&self) -> f64 {
        match std::env::var("XORL_TEST_DEVICE") {
            Ok(_) => 1e-5,
            Err(_) if self.stand_in => 2e-6,
            Err(_) => 1e-6,
        }
    }
}

/// Losses, log-probabilities and gradients of one adapter, by name; a row of log-probabilities is on the rank of the
/// row.
type Seen = BTreeMap<String, Vec<f32>>;

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).reshape([-1])).unwrap()
}

/// The whole gradients of an adapter, by parameter, by way of its masters, which are lost.
fn gradients(adapter: &mut Adapter) -> Seen {
    adapter.regions_mut().step_done().unwrap();
    for owned in adapter.pieces() {
        owned.master.shallow_clone().copy_(owned.gradient);
    }
    adapter.whole().unwrap().into_iter().map(|(parameter, values)| (parameter.name, values)).collect()
}

/// Computes rows `own` (numbers into [`ROWS`]) in one pass with the adapters `of_pass`, and sees what each adapter
/// gets.
fn pass(
    model: &mut Transformer,
    groups: &ProcessGroups,
    own: &[usize],
    of_pass: &[usize],
    mixed: bool,
) -> Vec<Seen> {
    let sites = |index: usize| {
        let targets: Vec<String> = ADAPTERS[index].2.iter().map(|name| name.to_string()).collect();
        resolve(&all_projections(model.spec()), Some(&targets), &[]).unwrap()
    };
    let mut adapters: Vec<Adapter> = of_pass
        .iter()
        .map(|&index| {
            let shape = LoraShape::new(ADAPTERS[index].0, ADAPTERS[index].1);
            let mut adapter = model.new_adapter(&sites(index), shape);
            adapter.init(7 + index as u64, 0.05).unwrap();
            adapter
        })
        .collect();
    let (mut ids, mut labels, mut lengths, mut segments) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut losses, mut at): (Vec<(std::ops::Range<usize>, CrossEntropy)>, usize) = (Vec::new(), 0);
    for &index in own {
        let (i, l, d) = row(0, index, Data::Random);
        let adapter = ROWS[index].and_then(|adapter| of_pass.iter().position(|&of| of == adapter));
        segments.push((i.len(), adapter));
        // Each session has a scale of its own.
        losses.push((at..at + i.len(), CrossEntropy { scale: ROWS[index].map_or(1.0, |a| 0.5 + a as f64) }));
        at += i.len();
        ids.extend(i);
        labels.extend(l);
        lengths.extend(d);
    }
    let batch = Batch::new(&ids, &labels, &lengths, model.device().tensors());
    let batch = if mixed { batch.with_adapters(&segments, of_pass.len()) } else { batch };
    let loss =
        BySegment::new(losses.iter().map(|(rows, loss)| (rows.clone(), loss as &dyn TokenLoss)).collect());
    let mut handed: Vec<&mut Adapter> = adapters.iter_mut().collect();
    handed.iter_mut().for_each(|adapter| adapter.regions_mut().zero_gradients());
    let found = model.forward_backward(&batch, &mut handed, &loss).unwrap();
    drop(handed);

    let mut seen: Vec<Seen> = adapters.iter_mut().map(gradients).collect();
    seen.push(Seen::new());
    let mut sums = vec![0.0; seen.len()];
    for (&index, (rows, _)) in own.iter().zip(&losses) {
        let place = ROWS[index].and_then(|adapter| of_pass.iter().position(|&of| of == adapter));
        let place = place.unwrap_or(seen.len() - 1);
        let part = found.log_probs.narrow(0, rows.start as i64, rows.len() as i64);
        seen[place].insert(format!("log-probabilities of row {index}"), floats(&part));
        sums[place] += batch.targets().sum(&found.values, rows.clone());
    }
    groups.world.all_reduce_host(&mut sums, Reduce::Sum).unwrap();
    for (seen, sum) in seen.iter_mut().zip(sums) {
        seen.insert("loss".into(), vec![sum as f32]);
    }
    seen
}

/// One rank of a case: the mixed pass against a pass for each adapter alone and one for the rows without.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let mut world = World::start().unwrap();
    match std::env::var("XORL_TEST_DEVICE").as_deref() {
        Ok("cuda") => world.use_device(DeviceChoice::Cuda).unwrap(),
        _ if case.stand_in => world.use_device(DeviceChoice::StandIn).unwrap(),
        _ => {}
    }
    let (rank, size) = (world.rank(), world.size());
    let sizes = MeshSizes { replicate: 1, shard: -1, sequence: 1, expert: case.experts_over };
    let groups = ProcessGroups::new(&world, Mesh::new(size, sizes).unwrap());
    let options = Options {
        vocab_chunk_rows: 300,
        loss_chunk_tokens: 7,
        checkpointing: CheckpointingMethod::Selective.into(),
        reduce: case.reduce,
        ..Options::default()
    };
    let mut model = Transformer::new(spec(case.moe), options, &groups).unwrap();
    load(&mut model, Data::Random);
    let own: Vec<usize> = (0..ROWS.len()).filter(|row| row % size == rank).collect();
    let mixed = pass(&mut model, &groups, &own, &[0, 1, 2], true);
    assert_eq!(mixed.len(), 4);
    for (index, mixed) in mixed.iter().enumerate() {
        let adapter = (index < 3).then_some(index);
        let rows: Vec<usize> = own.iter().copied().filter(|&row| ROWS[row] == adapter).collect();
        let of_pass: Vec<usize> = adapter.into_iter().collect();
        let alone = pass(&mut model, &groups, &rows, &of_pass, false);
        let alone = if adapter.is_some() { &alone[0] } else { &alone[of_pass.len()] };
        assert_eq!(mixed.keys().collect::<Vec<_>>(), alone.keys().collect::<Vec<_>>());
        for (name, ours) in mixed {
            let apart = relative(ours, &alone[name]);
            assert!(apart <= case.tolerance(), "{case:?}, adapter {index}, {name}: {apart}");
        }
        assert!(mixed["loss"][0] > 0.0, "rows of adapter {index} have a loss");
        let trained = mixed
            .iter()
            .filter(|(name, values)| name.contains("lora_") && values.iter().any(|&value| value != 0.0));
        assert!(adapter.is_none() || trained.count() > 10, "adapter {index} has a gradient");
    }
    let all: Vec<Value> = mixed.iter().map(|seen| json!({"loss": seen["loss"]})).collect();
    let out = std::env::var("XORL_TEST_OUT").unwrap();
    std::fs::write(Path::new(&out).join(format!("{rank}.json")), Value::from(all).to_string()).unwrap();
}

/// Runs a case on its ranks; the losses of the adapters and of the rows without.
fn run(case: &Case) -> Vec<f64> {
    let directory = tempfile::tempdir().unwrap();
    run_workers("mixed::mpi_worker", case.world, case, directory.path(), |command| {
        if case.stand_in {
            stand_in(command, directory.path());
        }
    });
    let seen = std::fs::read_to_string(directory.path().join("0.json")).unwrap();
    let seen: Vec<Value> = serde_json::from_str(&seen).unwrap();
    seen.iter().map(|of| of["loss"][0].as_f64().unwrap()).collect()
}

/// Each adapter gets in `case` what it gets alone, and on several ranks what it gets on one.
fn equals_one_rank(case: Case) {
    let one = run(&Case { world: 1, experts_over: 1, reduce: ReduceGradients::Step, ..case.clone() });
    for (several, one) in run(&case).iter().zip(one) {
        assert!((several - one).abs() <= 1e-5 * one, "{case:?}: loss {several}, one rank {one}");
    }
}

#[test]
fn mpi_adapters_of_a_dense_pass_get_what_they_get_alone() {
    equals_one_rank(Case::dense(2));
    equals_one_rank(Case { reduce: ReduceGradients::MicroBatch, ..Case::dense(3) });
}

#[test]
fn mpi_adapters_of_a_pass_of_experts_get_what_they_get_alone() {
    equals_one_rank(Case::experts(2, 1));
    equals_one_rank(Case::experts(2, 2));
}

#[test]
fn mpi_adapters_of_a_pass_over_nccl_get_what_they_get_alone() {
    equals_one_rank(Case { stand_in: true, ..Case::dense(2) });
    equals_one_rank(Case { stand_in: true, ..Case::experts(2, 2) });
}

#[test]
#[ignore = "needs a GPU: tests/gpu.sh runs it with XORL_TEST_DEVICE=cuda"]
fn gpu_adapters_of_a_pass_get_what_they_get_alone() {
    run(&Case::dense(1));
    run(&Case::experts(1, 1));
}
