//! Every topology trains what one rank trains: same losses, norms and adapters; and receives exactly the
//! bytes that the plan says.
//!
//! Each case starts this very test binary under mpirun; its ranks run [`mpi_worker`], which trains a tiny random
//! model in fp32 and leaves what it saw in a file.

mod common;

use common::ranks_of;
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tch::Device;
use xorl_dist::{
    comm::{Received, World},
    config::{Optimizer as OptimizerKind, ReduceGradients, TrainArgs},
    dtype::DType,
    lora::{Site, targets::resolve},
    model::{
        ModelSpec, MoeNames, MoeSpec, QkNorm, RopeScaling, RopeSpec,
        blueprint::{Blueprint, LoraShape, Options, all_projections},
        source::RandomSource,
        transformer::{Batch, Transformer},
    },
    optim::{Optimizer, Schedule, Settings},
    plan::Traffic,
    rng::Stream,
    train::{Trainer, metrics::received_since},
};

const STEPS: usize = 20;
const ROWS: usize = 6;
const VOCAB: usize = 1003;

/// A Qwen3-like model whose sizes divide by nothing convenient; with experts in all layers but the first.
fn spec(moe: bool) -> ModelSpec {
    let names = MoeNames { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };
    let moe = moe.then(|| MoeSpec {
        layers: vec![false, true, true],
        experts: 6,
        top_k: 2,
        normalise: true,
        width: 28,
        shared_width: Some(36),
        names,
    });
    ModelSpec {
        vocab_size: VOCAB,
        hidden_size: 40,
        intermediate_size: 72,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-6,
        rope: RopeSpec { theta: 10000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        qk_norm: Some(QkNorm::Head),
        clip_qkv: None,
        moe,
        layer_windows: vec![None, Some(5), None],
        initializer_range: 0.2,
    }
}

/// Row `row` of step `step`: ids, labels and document lengths, the same in every topology. Lengths differ, so
/// ranks get unequal numbers of tokens.
fn row(step: usize, row: usize) -> (Vec<i64>, Vec<i64>, Vec<usize>) {
    let stream = Stream::new(5, &format!("row {step} {row}"));
    let lengths = vec![3 + (row * 5 + step) % 7, 1 + row % 4];
    let n: usize = lengths.iter().sum();
    let ids: Vec<i64> = (0..n).map(|i| stream.below(i as u64, VOCAB as u64) as i64).collect();
    let labels =
        ids.iter().enumerate().map(|(i, &id)| if (i + row).is_multiple_of(3) { -100 } else { id }).collect();
    (ids, labels, lengths)
}

fn batch(step: usize, rows: &[usize]) -> Batch {
    let (mut ids, mut labels, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for &index in rows {
        let (i, l, d) = row(step, index);
        ids.extend(i);
        labels.extend(l);
        lengths.extend(d);
    }
    Batch::new(&ids, &labels, &lengths, Device::Cpu)
}

/// One rank of a case. Does nothing unless a case started it.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Value = serde_json::from_str(&case).unwrap();
    let number = |key: &str| case[key].as_u64().unwrap() as usize;
    let world = World::start().unwrap();
    let (rank, size, replicas) = (world.rank(), world.size(), number("replicas"));
    let block = size / replicas;
    let everyone = world.group("world", 0);
    let shard = world.group("shard", rank / block);
    let replicate = world.group("replicate", rank % block);

    let spec = spec(case["moe"].as_bool().unwrap());
    let options = Options {
        compute: DType::F32,
        merge: case["merge"].as_bool().unwrap(),
        slots: number("slots"),
        vocab_chunk_rows: number("vocab_chunk_rows"),
        loss_chunk_tokens: 7,
        checkpointing: serde_json::from_value(case["checkpointing"].clone()).unwrap(),
        reduce: if case["reduce"] == "step" { ReduceGradients::Step } else { ReduceGradients::MicroBatch },
    };
    let targets: Vec<String> =
        case["targets"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().into()).collect();
    let mut sites = resolve(&all_projections(&spec), Some(&targets), &[]).unwrap();
    if case["hybrid"].as_bool().unwrap() {
        sites = sites.into_iter().map(Site::hybrid).collect();
    }
    let lora = LoraShape { rank: 3, alpha: 6.0 };
    let mut model = Transformer::new(spec.clone(), &sites, lora, options, &shard, &replicate, Device::Cpu);
    model.load(&RandomSource::new(spec.tensors(), spec.initializer_range, 1)).unwrap();
    model.init_adapter(3, 0.05).unwrap();
    let initial = digest(&model);
    let optimizer = Optimizer::new(Settings::new(OptimizerKind::Adamw, 0.01), &model.adapter);
    let args = TrainArgs { lr: 2e-3, ..TrainArgs::default() };
    let schedule = Schedule::new(&args, STEPS);
    let mut trainer = Trainer { model, optimizer, schedule, max_grad_norm: 0.5, world: everyone };

    // What every step has to receive: base and adapter regions as the ring needs them, and of gradients only the
    // adapter's. The first step finds empty slots.
    let regions = Blueprint::new(&spec, &sites, lora, &options, block).regions;
    let traffic = Traffic { spec: &spec, options: &options, regions: &regions, replicas };
    let micro = number("micro_batch_rows");
    let mut received = Received::new();
    let mut reports = Vec::new();
    for step in 0..STEPS {
        // Rows in turn to the ranks, then cut into micro-batches: as many on every rank.
        let own: Vec<usize> = (0..ROWS).filter(|row| row % size == rank).collect();
        let count = ROWS.div_ceil(size).div_ceil(micro);
        let batches: Vec<Batch> = (0..count)
            .map(|m| batch(step, own.get(m * micro..(m * micro + micro).min(own.len())).unwrap_or(&[])))
            .collect();
        let before = world.ledger().totals();
        let report = trainer.step(&batches, step).unwrap();
        let seen = received_since(&before, world.ledger());
        assert_eq!(seen, traffic.step(count, step > 0), "rank {rank}, step {step}");
        for (key, bytes) in seen {
            *received.entry(key).or_default() += bytes;
        }
        reports.push(json!([report.loss.unwrap(), report.grad_norm, report.valid_tokens]));
    }
    let adapter: Vec<Value> =
        trainer.model.whole_adapter().unwrap().into_iter().map(|(p, v)| json!([p.name, v])).collect();
    let received: BTreeMap<&str, u64> = received.iter().map(|((op, _), bytes)| (op.name(), *bytes)).collect();
    let seen = json!({"initial": initial, "steps": reports, "adapter": adapter, "received": received});
    let out = case["out"].as_str().unwrap();
    std::fs::write(Path::new(out).join(format!("{rank}.json")), seen.to_string()).unwrap();
}

/// SHA-256 over the bits of all adapter parameters.
fn digest(model: &Transformer) -> String {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    for (parameter, values) in model.whole_adapter().unwrap() {
        hash.update(parameter.name.as_bytes());
        hash.update(bytemuck::cast_slice::<f32, u8>(&values));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A named topology and how it computes.
#[derive(Clone)]
struct Case {
    world: usize,
    replicas: usize,
    slots: usize,
    micro_batch_rows: usize,
    vocab_chunk_rows: usize,
    checkpointing: &'static str,
    merge: bool,
    reduce: &'static str,
    targets: &'static [&'static str],
    moe: bool,
    hybrid: bool,
}

const SPLIT: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const FUSED: &[&str] = &["qkv_proj", "o_proj", "gate_up_proj", "layers.[0-1].mlp.down_proj"];

const ONE: Case = Case {
    world: 1,
    replicas: 1,
    slots: 2,
    micro_batch_rows: ROWS,
    vocab_chunk_rows: VOCAB,
    checkpointing: "no_recompute",
    merge: true,
    reduce: "step",
    targets: SPLIT,
    moe: false,
    hybrid: false,
};

/// What every rank of a case saw.
fn run(case: &Case) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let spec = json!({
        "replicas": case.replicas, "slots": case.slots, "micro_batch_rows": case.micro_batch_rows,
        "vocab_chunk_rows": case.vocab_chunk_rows, "checkpointing": case.checkpointing, "merge": case.merge,
        "reduce": case.reduce, "targets": case.targets, "moe": case.moe,
        "hybrid": case.hybrid, "out": directory.path(),
    });
    let program = std::env::current_exe().unwrap();
    let mut command = ranks_of(&program, case.world);
    command.args(["--exact", "mpi_worker", "--nocapture", "--test-threads=1"]);
    command.env("XORL_TEST_CASE", spec.to_string());
    let output = command.output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "world {}: {text}", case.world);
    let read = |rank: usize| std::fs::read_to_string(directory.path().join(format!("{rank}.json"))).unwrap();
    (0..case.world).map(|rank| serde_json::from_str(&read(rank)).unwrap()).collect()
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs()
}

/// Holds `case` against one rank with the same targets.
fn equals_one_rank(case: Case) {
    let one = run(&Case { targets: case.targets, moe: case.moe, hybrid: case.hybrid, ..ONE }).remove(0);
    let ranks = run(&case);
    for seen in &ranks {
        assert_eq!(seen["initial"], one["initial"], "initial adapters differ in their bits");
        for step in 0..STEPS {
            for (column, what) in ["loss", "grad norm"].iter().enumerate() {
                let (ours, theirs) = (
                    seen["steps"][step][column].as_f64().unwrap(),
                    one["steps"][step][column].as_f64().unwrap(),
                );
                assert!(relative(ours, theirs) < 1e-5, "{what} of step {step}: {ours}, one rank {theirs}");
            }
            assert_eq!(seen["steps"][step][2], one["steps"][step][2], "valid tokens of step {step}");
        }
        let (ours, theirs) = (seen["adapter"].as_array().unwrap(), one["adapter"].as_array().unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours[0], theirs[0]);
            let floats = |v: &Value| -> Vec<f64> {
                v[1].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
            };
            let (a, b) = (floats(ours), floats(theirs));
            let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
            let difference: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            assert!(norm(&difference) / norm(&b) < 1e-4, "{}: {}", ours[0], norm(&difference) / norm(&b));
        }
    }
    // Clipping was active, or the test would not see a wrong norm.
    assert!(one["steps"][0][1].as_f64().unwrap() > 0.5, "norm {}", one["steps"][0][1]);
    // Each rank has held its ledger against the formula; a single rank moves nothing.
    assert_eq!(one["received"], json!({}));
    for seen in &ranks {
        assert_eq!(seen["received"]["reduce_scatter"].is_u64(), case.world > 1);
        assert_eq!(seen["received"]["all_gather"].is_u64(), case.world > 1);
        assert_eq!(seen["received"]["all_reduce"].is_u64(), case.replicas > 1);
    }
}

#[test]
fn mpi_two_ranks_equal_one() {
    equals_one_rank(Case { world: 2, micro_batch_rows: 2, ..ONE });
}

#[test]
fn mpi_three_ranks_that_divide_nothing_equal_one() {
    equals_one_rank(Case {
        world: 3,
        micro_batch_rows: 1,
        slots: 1,
        checkpointing: "recompute_full_layer",
        vocab_chunk_rows: 100,
        ..ONE
    });
}

#[test]
fn mpi_four_ranks_of_which_some_are_idle_equal_one() {
    equals_one_rank(Case {
        world: 4,
        micro_batch_rows: 1,
        slots: 3,
        checkpointing: "selective",
        reduce: "micro_batch",
        ..ONE
    });
}

#[test]
fn mpi_two_replicas_of_two_shards_equal_one() {
    equals_one_rank(Case {
        world: 4,
        replicas: 2,
        micro_batch_rows: 1,
        checkpointing: "recompute_full_layer",
        ..ONE
    });
}

#[test]
fn mpi_fused_targets_and_split_gemms_equal_one() {
    equals_one_rank(Case {
        world: 2,
        merge: false,
        reduce: "micro_batch",
        targets: FUSED,
        vocab_chunk_rows: 334,
        ..ONE
    });
}

#[test]
fn mpi_micro_batches_on_one_rank_equal_one_batch() {
    equals_one_rank(Case {
        micro_batch_rows: 1,
        checkpointing: "recompute_full_layer",
        merge: false,
        vocab_chunk_rows: 17,
        ..ONE
    });
}

#[test]
fn mpi_experts_on_two_ranks_equal_one() {
    equals_one_rank(Case { world: 2, micro_batch_rows: 2, moe: true, checkpointing: "selective", ..ONE });
}

#[test]
fn mpi_experts_on_three_ranks_equal_one() {
    equals_one_rank(Case {
        world: 3,
        micro_batch_rows: 1,
        slots: 1,
        checkpointing: "recompute_full_layer",
        reduce: "micro_batch",
        moe: true,
        ..ONE
    });
}

#[test]
fn mpi_experts_that_share_factors_over_replicas_equal_one() {
    equals_one_rank(Case {
        world: 4,
        replicas: 2,
        micro_batch_rows: 1,
        checkpointing: "recompute_full_layer",
        merge: false,
        targets: FUSED,
        moe: true,
        hybrid: true,
        ..ONE
    });
}
