//! The way over NCCL without a GPU: a library of ours stands in for CUDA's driver and NCCL (tests/stand_in), tensors
//! stay in host memory, operations are those of devices. All else is what runs on GPUs: the communicator, its streams
//! and events, the trainer, the watchdog.

use crate::common::{
    failed, is_mpich, relative, stand_in, succeeded,
    tiny::{TinyRun, adapter},
    topology::{self, Case, compare, equals_one_rank, run_all},
};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};
use xorl_dist::config::{
    CheckpointingMethod::RecomputeFullLayer, QuantFormat::Nf4, ReduceGradients::MicroBatch,
};

fn over_nccl() -> Case {
    Case { stand_in: true, world: 2, micro_batch_rows: 2, ..Case::one() }
}

#[test]
fn mpi_two_ranks_equal_one() {
    equals_one_rank(over_nccl());
}

#[test]
fn mpi_one_slot_equals_one_rank() {
    equals_one_rank(Case { slots: 1, checkpointing: RecomputeFullLayer, reduce: MicroBatch, ..over_nccl() });
}

#[test]
fn mpi_two_replicas_of_two_shards_equal_one() {
    equals_one_rank(Case { world: 4, replicas: 2, slots: 3, ..over_nccl() });
}

#[test]
fn mpi_experts_over_two_and_four_ranks_equal_one() {
    let experts = Case { moe: true, micro_batch_rows: 1, ..over_nccl() };
    equals_one_rank(Case { experts_over: 2, world: 4, hybrid: true, ..experts.clone() });
    equals_one_rank(Case { experts_over: 4, world: 4, data: topology::Data::OddRowsSilent, ..experts });
}

/// Packed bytes are what is gathered: each rank holds its ledger against the plan. Weights are decoded as on a device.
#[test]
fn mpi_two_ranks_equal_one_on_a_quantised_base() {
    let dense = Case { quant: Some(Nf4), ..over_nccl() };
    let cases = [dense.clone(), Case { moe: true, experts_over: 2, ..dense }];
    let alone = run_all(&cases.clone().map(|case| case.on_one_rank()));
    for ((case, ranks), alone) in cases.iter().zip(run_all(&cases)).zip(alone) {
        compare(case, &ranks, &alone[0]);
    }
}

/// A run of the program, and what the stand-in was called for.
struct Seen {
    run: TinyRun,
    output: Output,
    seconds: f64,
}

/// The same on any number of ranks.
const BATCH: [&str; 2] = ["--train.global_batch_size", "8"];

/// Runs the program on `ranks` devices that do `fault`.
fn train(run: TinyRun, ranks: usize, fault: &str, more: &[&str]) -> Seen {
    let mut command = run.command(ranks, "out", &[&["--device", "stand-in"], &BATCH[..], more].concat());
    stand_in(&mut command, &run.at(""));
    let begin = Instant::now();
    let output = command.env("XORL_STAND_IN_FAULT", fault).output().unwrap();
    Seen { run, output, seconds: begin.elapsed().as_secs_f64() }
}

impl Seen {
    /// The calls of `rank`, each as its words.
    fn journal(&self, rank: usize) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.run.at(&format!("journal-{rank}"))).unwrap();
        text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
    }
}

/// The one `error:` line of ranks that the watchdog has ended. MPICH's launcher may report the signal that it sent the
/// last.
fn ended(output: &Output) -> String {
    let code = output.status.code();
    failed(output, if is_mpich() && code != Some(0) { code.unwrap_or(1) } else { 1 })
}

/// Losses of a run, and its last adapter.
fn story(run: &TinyRun, out: &str) -> (Vec<f64>, BTreeMap<String, Vec<f32>>) {
    let losses = run.story(out).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    (losses, adapter(&run.step(out, crate::common::tiny::STEPS)))
}

fn near(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs())
}

#[test]
fn mpi_the_program_trains_saves_and_resumes() {
    let run = TinyRun::of_experts();
    succeeded(&run.run(1, "alone", &BATCH));
    let expected = story(&run, "alone");
    let seen = train(run, 4, "", &["--train.expert_parallel_size", "2"]);
    succeeded(&seen.output);
    let (losses, values) = story(&seen.run, "out");
    assert!(near(&losses, &expected.0), "{losses:?} {:?}", expected.0);
    for (name, values) in &values {
        let apart = relative(values, &expected.1[name]);
        assert!(apart <= 1e-4, "{name}: {apart} apart");
    }
    let line = crate::common::metrics(&seen.run.at("out")).remove(0);
    assert_eq!(line["device_memory_bytes"].as_u64(), Some(1 << 30), "what the stand-in says is used");

    // The same steps again from the tenth, to the bit.
    seen.run.interrupted("out", "again", 10);
    let auto =
        ["--device", "stand-in", "--train.expert_parallel_size", "2", "--train.load_checkpoint_path", "auto"];
    let mut command = seen.run.command(4, "again", &[&auto[..], &BATCH].concat());
    let folder = seen.run.at("second");
    stand_in(&mut command, &folder);
    succeeded(&command.output().unwrap());
    assert_eq!(story(&seen.run, "again"), (losses, values));
}

/// What every rank does with every communicator, and in what order beside libtorch.
#[test]
fn mpi_collectives_come_in_one_order_and_beside_what_is_computed() {
    let layers = 6;
    let run = TinyRun::new();
    let config = fs::read_to_string(run.at("config.json")).unwrap();
    let deep = config.replace("\"num_hidden_layers\":2", &format!("\"num_hidden_layers\":{layers}"));
    assert_ne!(deep, config);
    fs::write(run.at("config.json"), deep).unwrap();
    let seen = train(run, 2, "", &["--train.max_steps", "1"]);
    succeeded(&seen.output);
    let journals: Vec<_> = (0..2).map(|rank| seen.journal(rank)).collect();

    // Each rank has its device, and what is locked is given back.
    let of = |journal: &[Vec<String>], word: &str| -> Vec<Vec<String>> {
        journal.iter().filter(|words| words[0] == word).cloned().collect()
    };
    for (rank, journal) in journals.iter().enumerate() {
        assert_eq!(of(journal, "device"), [["device".to_owned(), rank.to_string()]]);
        assert!(!of(journal, "lock").is_empty());
        assert_eq!(of(journal, "lock").len(), of(journal, "unlock").len());
        assert!(of(journal, "stream").iter().all(|words| words[2] == "non-blocking"));
        // Of all groups those that move tensors, and one stream for all.
        assert_eq!((of(journal, "init").len(), of(journal, "stream").len()), (1, 1));
    }
    // Counts, kinds and numbers are the same on all, stream aside.
    let collectives = |journal: &[Vec<String>]| -> Vec<Vec<String>> {
        let is = |word: &str| ["all_gather", "reduce_scatter", "all_reduce"].contains(&word);
        journal.iter().filter(|words| is(&words[0])).map(|words| words[..6].to_vec()).collect()
    };
    assert_eq!(collectives(&journals[0]), collectives(&journals[1]));

    // Every collective comes after what was computed, and has an event of its own after it:
    //   record A 0, wait STREAM A, call on STREAM, record B STREAM; and later: wait 0 B.
    let journal: Vec<&Vec<String>> = journals[0]
        .iter()
        .filter(|words| !["lock", "unlock", "device", "stream", "init"].contains(&words[0].as_str()))
        .collect();
    let mut events = Vec::new();
    for (i, words) in journal.iter().enumerate().filter(|(_, words)| words.contains(&"on".to_owned())) {
        let stream = words.last().unwrap();
        let [before, wait, after] = [journal[i - 2], journal[i - 1], journal[i + 1]];
        assert_eq!((before[0].as_str(), before[2].as_str()), ("record", "0"), "{words:?}");
        assert_eq!(wait[..], ["wait".to_owned(), stream.clone(), before[1].clone()], "{words:?}");
        assert_eq!((after[0].as_str(), &after[2]), ("record", stream), "{words:?}");
        let joined = journal[i + 1..]
            .iter()
            .position(|later| later[..] == ["wait", "0", &after[1]].map(str::to_owned));
        events.push((i, joined.map(|at| i + 1 + at), words[0].clone()));
    }
    // While a layer computes, the gather of the next is under way: between the wait for one layer and the wait for the
    // next that one is started, and nothing is waited for at once but what is needed at once.
    let started = |name: &str| events.iter().filter(|(_, _, call)| call == name).collect::<Vec<_>>();
    let beside = |&&(start, joined, _): &&(usize, Option<usize>, String)| {
        let joined = joined.expect("every gather is waited for");
        let others = |words: &&&Vec<String>| words.contains(&"on".to_owned());
        journal[start + 1..joined].iter().filter(others).count() + usize::from(joined > start + 2)
    };
    let gathers = started("all_gather");
    let ahead = gathers.iter().filter(|gather| beside(gather) > 0).count();
    // Two micro-batches, forward and backward, base and adapter; the first of each pass has nobody to hide behind, and
    // in backward the last K - 1 = 1 layers are still there.
    let per_pass = 2 * ((layers - 1) + (layers - 2));
    assert!(ahead >= 2 * (per_pass - 2), "{ahead} of {} gathers were started ahead", gathers.len());
    // A reduction is waited for at once.
    assert!(started("reduce_scatter").iter().all(|&&(start, joined, _)| joined == Some(start + 2)));
}

#[test]
fn mpi_streams_that_do_not_wait_are_noticed() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "alone", &BATCH));
    let expected = story(&run, "alone").0;
    let run = train(run, 2, "", &[]).run;
    assert!(near(&story(&run, "out").0, &expected));
    fs::remove_dir_all(run.at("libraries")).unwrap();
    fs::remove_dir_all(run.at("out")).unwrap();
    let seen = train(run, 2, "ignores_waits", &[]);
    // What is computed from half a layer may be anything, or no number at all.
    if seen.output.status.success() {
        let losses: Vec<Option<f64>> =
            seen.run.story("out").iter().map(|line| line["loss"].as_f64()).collect();
        let same = losses.iter().zip(&expected).all(|(a, b)| a.is_some_and(|a| near(&[a], &[*b])));
        assert!(!same, "events are what orders streams, and nobody missed them");
    }
}

#[test]
fn mpi_what_fails_behind_our_backs_ends_all_ranks() {
    let begin = Instant::now();
    let seen = train(TinyRun::new(), 4, "fails:2:40", &[]);
    let line = ended(&seen.output);
    assert!(line.starts_with("error: rank 2: ") && line.contains("ncclRemoteError of NCCL"), "{line}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{} s", seen.seconds);
    let aborted = |rank: usize| seen.journal(rank).iter().any(|words| words[0] == "abort");
    assert!((0..4).all(aborted), "what is under way is ended");
}

#[test]
fn mpi_a_device_that_stands_still_is_named_in_time() {
    let seen = train(TinyRun::new(), 2, "hangs:1:40", &["--train.comm_timeout_s", "3"]);
    let line = ended(&seen.output);
    assert!(line.contains("is not done on the device within 3 s"), "{line}");
    assert!(line.contains("over shard"), "{line}");
    assert!(seen.seconds < 25.0, "{} s", seen.seconds);
    assert!(seen.run.at("out/flight/rank_1.json").is_file());
}

/// The one line of a run that finds no device as it needs one.
fn refused(
    run: &TinyRun,
    ranks: usize,
    device: &str,
    libraries: Option<&Path>,
    visible: Option<&str>,
) -> String {
    let mut command = run.command(ranks, "out", &["--device", device]);
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries).env("XORL_STAND_IN", run.at(""));
    }
    if let Some(visible) = visible {
        command.env("CUDA_VISIBLE_DEVICES", visible);
    }
    let line = failed(&command.output().unwrap(), 2);
    assert!(!run.at("out").exists(), "{line}");
    line
}

#[test]
fn mpi_devices_that_cannot_be_had_are_refused_in_one_line() {
    let run = TinyRun::new();
    let mut unused = std::process::Command::new("true");
    stand_in(&mut unused, &run.at(""));
    let libraries = run.at("libraries");
    let libraries = libraries.as_path();

    let line = refused(&run, 2, "stand-in", Some(libraries), Some("0"));
    assert!(line.contains("2 ranks on ") && line.contains(", which has 1 GPUs for them"), "{line}");
    let line = refused(&run, 1, "stand-in", Some(libraries), Some(""));
    assert!(line.contains("no GPU that may be used; see CUDA_VISIBLE_DEVICES"), "{line}");

    // A launcher that counts the ranks of a host otherwise than MPI.
    let mut command = crate::common::ranks_of(Path::new("env"), 2);
    command.arg("OMPI_COMM_WORLD_LOCAL_RANK=3").arg(env!("CARGO_BIN_EXE_xorl-dist"));
    command.args(run.arguments("out", &["--device", "stand-in"]));
    command.env("LD_LIBRARY_PATH", libraries).env("XORL_STAND_IN", run.at(""));
    let line = failed(&command.output().unwrap(), 2);
    assert!(line.contains("OMPI_COMM_WORLD_LOCAL_RANK says that this is rank 3 of its host"), "{line}");

    // Some other library under NCCL's name, as an old one would be.
    fs::remove_file(libraries.join("libnccl.so")).unwrap();
    let other = fs::read_to_string("/proc/self/maps").unwrap();
    let other = other
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .find(|path| path.contains("/libm.so"));
    std::os::unix::fs::symlink(other.unwrap(), libraries.join("libnccl.so")).unwrap();
    let line = refused(&run, 2, "stand-in", Some(libraries), None);
    assert!(line.contains("NCCL is missing: it is too old, it has no ncclGetVersion"), "{line}");
    // A lone process needs none.
    let mut alone = run.command(1, "alone", &["--device", "stand-in", "--train.max_steps", "1"]);
    succeeded(&alone.env("LD_LIBRARY_PATH", libraries).env("XORL_STAND_IN", run.at("")).output().unwrap());
}

#[test]
fn without_a_driver_gpus_are_refused_and_the_cpu_is_found() {
    if Path::new("/dev/nvidiactl").exists() {
        return;
    }
    let run = TinyRun::new();
    let line = refused(&run, 1, "cuda", None, None);
    assert!(line.contains("CUDA's driver is missing: libcuda.so.1 cannot be loaded"), "{line}");
    succeeded(&run.run(1, "out", &["--device", "auto", "--train.max_steps", "1"]));
}

#[test]
fn check_says_whether_the_device_has_room() {
    let run = TinyRun::new();
    let mut command = run.command(1, "out", &["--device", "stand-in"]);
    stand_in(&mut command, &run.at(""));
    let mut arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    arguments.insert(0, "check".into());
    let mut check = std::process::Command::new(command.get_program());
    check.args(arguments).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = check.output().unwrap();
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().last().unwrap();
    assert!(line.starts_with("memory of rank 0's device: 8589934592 bytes, 1073741824 in use; "), "{line}");
    let number = |word: &str| -> u64 { word.split_whitespace().last().unwrap().parse().unwrap() };
    let needed = line.split_once("a rank needs ").unwrap().1.split_once(" bytes").unwrap().0;
    let part = |name: &str| number(said.lines().find(|line| line.trim_start().starts_with(name)).unwrap());
    let sum = said.lines().find(|line| line.trim_start().starts_with("sum ")).unwrap();
    let sum: u64 = sum.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(needed.parse::<u64>().unwrap(), sum - part("libraries"));
    assert!(line.ends_with("which is free"), "{line}");
}

/// `tests/gpu.sh` as it is without GPUs, and its own logic on devices that the stand-in makes.
#[test]
fn mpi_the_table_of_gpus() {
    let script = |run: &TinyRun, gpus: &str| {
        let mut command =
            std::process::Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu.sh"));
        command.env("XORL_DIST", env!("CARGO_BIN_EXE_xorl-dist")).env("GPUS", gpus).env("DEVICE", "stand-in");
        stand_in(&mut command, &run.at(""));
        let output = command.env("TMPDIR", run.at("")).env("OMP_NUM_THREADS", "1").output().unwrap();
        succeeded(&output);
        let rows = String::from_utf8_lossy(&output.stdout).into_owned();
        let cut = |row: &str| (row[..64].to_owned(), row[64..].trim().to_owned());
        rows.lines().map(cut).collect::<Vec<_>>()
    };
    let losses = "equal: 8 losses";
    let expected = [
        ("experts on 1 GPU = on the CPU, fp32", losses),
        ("experts on 1 GPU = on the CPU, bf16", "not run"),
        ("quantised matrices decoded on 1 GPU = on the CPU", "not run"),
        ("quantised bases on 1 GPU = on the CPU, fp32", losses),
        ("quantised bases on 1 GPU = on the CPU, bf16", "not run"),
        ("flash attention", "not run"),
        ("adapters of one pass", "not run"),
        ("losses by token", "not run"),
        ("nccl: 2 ranks on 2 GPUs = 1 GPU, experts gathered", losses),
        ("nccl: 2 ranks on 2 GPUs = 1 GPU, experts over 2, fp32", losses),
        ("nccl: 2 ranks on 2 GPUs = 1 GPU, experts over 2, bf16", "not run"),
        ("nccl: 2 ranks on 2 GPUs = 1 GPU, nf4 gathered packed", losses),
        ("resume", "equal: 3 files of step 8"),
        ("stopped", "gone in"),
        ("generate", "not run"),
        ("memory", "not run"),
        ("speed beside FSDP2 + PEFT: SmolLM2", "not run"),
        ("speed beside FSDP2 + PEFT: qwen3-2gb", "not run"),
        ("speed beside FSDP2 + PEFT: qwen3-moe-0.23b", "not run"),
        ("speed beside FSDP2 + PEFT: qwen3-moe-2.8b", "not run"),
        ("speed of quantised bases beside bf16: qwen3-2gb", "not run"),
    ];
    let none = script(&TinyRun::new(), "0");
    let some = script(&TinyRun::new(), "2");
    assert_eq!((none.len(), some.len()), (expected.len(), expected.len()), "{some:?}");
    for (i, (name, said)) in expected.into_iter().enumerate() {
        assert!(none[i].0.starts_with(&name.replace("2 ranks on 2", "0 ranks on 0")), "{none:?}");
        assert!(some[i].0.starts_with(name), "{some:?}");
        assert!(none[i].1 == "not run" && some[i].1.starts_with(said), "{some:?}");
    }
}
