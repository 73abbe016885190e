//! A run that is interrupted and resumed is the run that was not: bit for bit in the same world, within tolerance in
//! another; and what cannot be resumed is refused in one line before anything is written.

use crate::common::{
    failed, relative, succeeded,
    tiny::{STEPS, TinyRun, adapter, copy_tree, differences, tamper, tree},
};
use serde_json::{Value, json};
use std::{fs, path::Path};

const AUTO: [&str; 2] = ["--train.load_checkpoint_path", "auto"];

/// Runs 20 steps on `ranks` ranks, and again from its step 10: nothing may differ.
fn second_half_is_bit_identical(ranks: usize, more: &[&str]) {
    second_half_of(&TinyRun::new(), ranks, more);
}

fn second_half_of(run: &TinyRun, ranks: usize, more: &[&str]) {
    succeeded(&run.run(ranks, "whole", more));
    run.interrupted("whole", "half", 10);
    succeeded(&run.run(ranks, "half", &[&AUTO[..], more].concat()));
    let (whole, half) = (run.story("whole"), run.story("half"));
    assert_eq!(whole.len(), STEPS);
    for (whole, half) in whole.iter().zip(&half) {
        assert_eq!(whole, half);
    }
    assert_eq!(half.len(), STEPS, "lines of steps after the resumed one were cut");
    assert!(
        whole[10]["loss"].as_f64().unwrap() < whole[0]["loss"].as_f64().unwrap(),
        "it has learnt something"
    );
    for step in [10, 15, 20] {
        let different = differences(&run.step("whole", step), &run.step("half", step));
        assert!(different.is_empty(), "step {step}: {different:?}");
    }
    let summary = |out: &str| fs::read_to_string(run.at(out).join("training_metrics.json")).unwrap();
    assert_eq!(summary("whole"), summary("half"), "the history goes on");
    assert_eq!(fs::read_to_string(run.run_dir("half").join("latest")).unwrap(), "step_20\n");
}

#[test]
fn resumed_on_one_rank_is_bit_identical() {
    second_half_is_bit_identical(1, &[]);
}

#[test]
fn resumed_sgd_is_bit_identical() {
    second_half_is_bit_identical(
        1,
        &["--train.optimizer", "sgd", "--train.lr", "0.5", "--train.lr_min", "0"],
    );
}

/// The border between the ranks cuts matrices of muon, and every expert has its own.
#[test]
fn mpi_resumed_with_other_optimizers_is_bit_identical() {
    let of = |name: &'static str| ["--train.optimizer", name, "--train.loraplus_lr_ratio", "2"];
    second_half_is_bit_identical(1, &of("anyprecision_adamw"));
    second_half_is_bit_identical(1, &of("signsgd"));
    let over = ["--train.expert_parallel_size", "2", "--train.data_parallel_replicate_size", "1"];
    second_half_of(&TinyRun::of_experts(), 2, &[&of("muon")[..], &over].concat());
}

#[test]
fn mpi_resumed_on_two_ranks_is_bit_identical() {
    second_half_is_bit_identical(2, &[]);
}

#[test]
fn mpi_resumed_in_bf16_with_gathered_layers_kept_is_bit_identical() {
    let more = "--train.enable_mixed_precision true --train.reshard_after_forward false \
        --train.reduce_gradients micro_batch --train.vocab_chunk_rows 100";
    second_half_is_bit_identical(2, &more.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn mpi_resumed_with_replicas_is_bit_identical() {
    let more = ["--train.data_parallel_replicate_size", "2", "--train.global_batch_size", "7"];
    second_half_is_bit_identical(4, &more);
}

#[test]
fn mpi_resumed_with_experts_over_ranks_is_bit_identical() {
    let over = ["--train.expert_parallel_size", "2", "--lora.moe_hybrid_shared_lora", "true"];
    let more = [&over[..], &["--train.global_batch_size", "7"]].concat();
    second_half_of(&TinyRun::of_experts(), 4, &more);
}

/// The end of `out` agrees with that of `reference` as two topologies of one run do.
fn within_tolerance(run: &TinyRun, reference: &str, out: &str) {
    let (expected, found) = (run.story(reference), run.story(out));
    assert_eq!(found.len(), STEPS);
    for (expected, found) in expected.iter().zip(&found) {
        for field in ["step", "epoch", "lr", "tokens", "tokens_total"] {
            assert_eq!(expected[field], found[field], "{out} {field}: {expected} {found}");
        }
        for field in ["loss", "grad_norm"] {
            let (a, b) = (expected[field].as_f64().unwrap(), found[field].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-5 * a.abs(), "{out} {field}: {expected} {found}");
        }
    }
    let (expected, found) = (adapter(&run.step(reference, STEPS)), adapter(&run.step(out, STEPS)));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        let apart = relative(&found[name], expected);
        assert!(apart <= 1e-4, "{out} {name}: {apart} apart");
    }
}

#[test]
fn mpi_resumed_in_another_world_is_the_same_run() {
    let run = TinyRun::new();
    // What a step consumes depends on the world where nothing says it: the stored 4 rows rule on a resume.
    let rows = ["--train.global_batch_size", "4"];
    succeeded(&run.run(1, "one", &rows));
    succeeded(&run.run(2, "two", &rows));
    succeeded(&run.run(4, "replicas", &[&rows[..], &["--train.data_parallel_replicate_size", "2"]].concat()));
    for (from, ranks, out, more) in [
        ("two", 1, "two to one", &[][..]),
        ("one", 3, "one to three", &[]),
        ("replicas", 3, "two replicas of two to three", &[]),
        ("one", 1, "fused to split", &["--model.merge_qkv", "false", "--train.ring_slots", "1"]),
    ] {
        run.interrupted(from, out, 10);
        succeeded(&run.run(ranks, out, &[&AUTO[..], more].concat()));
        within_tolerance(&run, "one", out);
    }
}

#[test]
fn mpi_experts_resumed_over_other_ranks_are_the_same_run() {
    let run = TinyRun::of_experts();
    let rows = ["--train.global_batch_size", "4"];
    succeeded(&run.run(1, "one", &rows));
    let over = |over| ["--train.expert_parallel_size", over];
    for (from, ranks, experts_over) in [("four", 4, "2"), ("three", 3, "3")] {
        succeeded(&run.run(ranks, from, &[&rows[..], &over(experts_over)].concat()));
        within_tolerance(&run, "one", from);
    }
    for (from, ranks, experts_over) in
        [("one", 4, "2"), ("four", 3, "3"), ("three", 4, "4"), ("four", 1, "1")]
    {
        let out = format!("{from} to {ranks}");
        run.interrupted(from, &out, 10);
        succeeded(&run.run(ranks, &out, &[&AUTO[..], &over(experts_over)].concat()));
        within_tolerance(&run, "one", &out);
    }
}

/// Ranks and the ranks that experts go over.
type Topology = (usize, usize);

/// Interrupted in the middle of the second epoch in each of `topologies` and resumed in each: the rows of every step,
/// losses, norms and the last adapter are those of one rank. `more` is given to all.
fn resumes_in_every_other(run: &TinyRun, topologies: &[Topology], more: &[&str]) {
    let name = |(ranks, over): Topology| format!("{ranks} over {over}");
    let flags = |(_, over): Topology, first: &[&str]| {
        let over = ["--train.expert_parallel_size".to_owned(), over.to_string()];
        let given = [first, more].concat().into_iter().map(str::to_owned);
        given.chain(over.into_iter().filter(|_| topologies.iter().any(|t| t.1 > 1))).collect::<Vec<_>>()
    };
    let start = |topology: Topology, out: &str, first: &[&str]| {
        let flags = flags(topology, first);
        succeeded(&run.run(topology.0, out, &flags.iter().map(String::as_str).collect::<Vec<_>>()));
    };
    for &from in topologies {
        start(from, &name(from), &[]);
        within_tolerance(run, &name(topologies[0]), &name(from));
    }
    let mut pairs = 0;
    for &from in topologies {
        for &to in topologies {
            let out = format!("{} to {}", name(from), name(to));
            run.interrupted(&name(from), &out, 10);
            start(to, &out, &AUTO);
            within_tolerance(run, &name(topologies[0]), &out);
            fs::remove_dir_all(run.at(&out)).unwrap();
            pairs += 1;
        }
    }
    println!("{pairs} pairs of topologies, {more:?}");
}

/// ci/long.sh reshard: dense models and experts, rows by themselves and packed.
#[test]
#[ignore = "minutes: ci/long.sh reshard"]
fn mpi_every_topology_resumes_in_every_other() {
    let dense: Vec<Topology> = (1..=4).map(|ranks| (ranks, 1)).collect();
    let experts = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)];
    let rows = ["--train.global_batch_size", "4"];
    let packed = ["--data.sample_packing_method", "sequential", "--data.sample_packing_sequence_len", "20"];
    for more in [rows.to_vec(), [&rows[..], &packed].concat()] {
        resumes_in_every_other(&TinyRun::new(), &dense, &more);
        resumes_in_every_other(&TinyRun::of_experts(), &experts, &more);
    }
}

#[test]
fn stored_batch_rules_unless_another_is_given() {
    let run = TinyRun::new();
    let output = run.run(1, "out", &["--train.max_steps", "10"]);
    succeeded(&output);
    let more = ["--train.micro_batch_size", "3", "--train.max_steps", "12"];
    let resumed = |out: &str, given: &[&str]| {
        copy_tree(&run.at("out"), &run.at(out));
        succeeded(&run.run(1, out, &[&AUTO[..], &more, given].concat()));
        let state = fs::read_to_string(run.step(out, 12).join("training_state/trainer_state.json")).unwrap();
        let state: Value = serde_json::from_str(&state).unwrap();
        (state["global_batch_size"].clone(), state["position"].clone())
    };
    // 8 steps an epoch: step 10 has consumed 8 rows of the second.
    assert_eq!(resumed("stored", &[]), (json!(4), json!({"epoch": 1, "row": 16})));
    let given = ["--train.global_batch_size", "11"];
    assert_eq!(resumed("given", &given), (json!(11), json!({"epoch": 2, "row": 0})));
    // The default batch of this command has more rows than there are, and drop_last drops it.
    let large = ["--train.micro_batch_size", "1000", "--data.dataloader_drop_last", "true"];
    assert_eq!(resumed("dropped", &large).0, json!(4));
    let line = failed(&run.run(1, "fresh", &large), 2);
    assert!(
        line.contains("data: ")
            && line.contains("make no step of 2000 rows; set train.global_batch_size to at most"),
        "{line}"
    );
}

#[test]
fn auto_skips_a_damaged_newest_step_and_replaces_it() {
    let run = TinyRun::new();
    // Where there is nothing, auto starts afresh.
    let output = run.run(1, "whole", &AUTO);
    succeeded(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("starting afresh"));
    copy_tree(&run.at("whole"), &run.at("hurt"));
    fs::remove_file(run.step("hurt", 20).join("manifest.json")).unwrap();
    tamper(&run.step("hurt", 15), "adapter_config.json", b"{}", false);
    let output = run.run(1, "hurt", &AUTO);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    for words in [
        "step_20 is not a whole step: manifest.json",
        "step_15 is not a whole step: adapter_config.json has 2",
    ] {
        assert!(said.contains(words), "{words} in {said}");
    }
    assert!(said.contains("on from") && said.contains("step_10"), "{said}");
    for step in [15, 20] {
        assert_eq!(differences(&run.step("whole", step), &run.step("hurt", step)), Vec::<&Path>::new());
    }
}

#[test]
fn auto_replaces_no_steps_of_which_none_is_whole_unasked() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &[]));
    for step in run.steps("out") {
        fs::remove_file(run.step("out", step).join("manifest.json")).unwrap();
    }
    let before = tree(&run.at("out"));
    let line = failed(&run.run(1, "out", &AUTO), 2);
    for words in ["holds steps, none of which is whole", "step_20", "manifest.json", "--train.overwrite true"]
    {
        assert!(line.contains(words), "{words} in {line}");
    }
    assert!(before == tree(&run.at("out")));
    succeeded(&run.run(1, "out", &[&AUTO[..], &["--train.overwrite", "true"]].concat()));
}

#[test]
fn a_finished_run_stays_as_it_is() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &[]));
    let before = tree(&run.at("out"));
    let output = run.run(1, "out", &AUTO);
    succeeded(&output);
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is left to train"));
    let ours = |files: std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>| {
        files.into_iter().filter(|(path, _)| !path.ends_with("config.yaml")).collect::<Vec<_>>()
    };
    assert!(ours(before) == ours(tree(&run.at("out"))));
}

#[test]
fn steps_present_are_refused_resumed_or_overwritten_as_asked() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &[]));
    let before = tree(&run.at("out"));
    let line = failed(&run.run(1, "out", &[]), 2);
    assert!(line.contains("auto") && line.contains("--train.overwrite true"), "{line}");
    // An earlier step by name: later ones are in the way.
    let step = run.step("out", 5).display().to_string();
    let from_step = ["--train.load_checkpoint_path", &step];
    let line = failed(&run.run(1, "out", &from_step), 2);
    assert!(line.contains("step_20") && line.contains("--train.overwrite true"), "{line}");
    // Not even overwriting touches anything before all is known to be right.
    for wrong in [["--train.optimizer", "sgd"], ["--train.lr", "fast"], ["--lora.lora_rank", "5"]] {
        failed(&run.run(1, "out", &[&from_step[..], &wrong, &["--train.overwrite", "true"]].concat()), 2);
    }
    assert!(tree(&run.at("out")) == before, "a refused run changed something");

    let output = run.run(
        1,
        "out",
        &[&from_step[..], &["--train.overwrite", "true", "--train.max_steps", "12"]].concat(),
    );
    succeeded(&output);
    assert_eq!(run.steps("out"), [5, 10, 12]);
    assert_eq!(run.story("out").len(), 12);
    succeeded(&run.run(1, "out", &["--train.overwrite", "true", "--train.max_steps", "7"]));
    assert_eq!(run.steps("out"), [5, 7]);
    assert_eq!(run.story("out").len(), 7);
    // A step of another output directory and run_id: both go on under the name that the step has.
    let other = run.run(1, "other", &["--train.run_id", "mine", "--train.max_steps", "5"]);
    succeeded(&other);
    let step = run.at("other/weights/mine/step_5").display().to_string();
    succeeded(&run.run(1, "third", &["--train.load_checkpoint_path", &step, "--train.max_steps", "6"]));
    assert!(run.at("third/weights/mine/step_6/manifest.json").is_file());
}

#[test]
fn another_run_cannot_take_a_step_for_its_own() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &["--train.max_steps", "5"]));
    let before = tree(&run.at("out"));
    let config = |change: &dyn Fn(&mut Value)| {
        let text = fs::read_to_string(run.at("config.json")).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        change(&mut json);
        let folder = run.at("other model");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), json.to_string()).unwrap();
        folder.display().to_string()
    };
    let rows = fs::read_to_string(run.at("rows.jsonl")).unwrap();
    fs::write(run.at("fewer.jsonl"), rows.lines().take(20).collect::<Vec<_>>().join("\n")).unwrap();
    let data = json!([{"path": run.at("fewer.jsonl"), "type": "tokenized"}]).to_string();
    let cases: &[(&[&str], &str)] = &[
        (&["--lora.lora_rank", "8"], "it has lora_rank 4, the run 8"),
        (&["--lora.lora_alpha", "9"], "it has lora_alpha 8.0, the run 9.0"),
        (&["--lora.lora_target_modules", "q_proj"], "surplus"),
        (&["--lora.lora_target_modules", "all-linear"], "missing"),
        (&["--train.seed", "7"], "its train.seed is 42, the run's 7"),
        (&["--train.optimizer", "sgd"], "its train.optimizer is adamw, the run's sgd"),
        (&["--train.adam_beta1", "0.8"], "its train.adam_beta1 is 0.9, the run's 0.8"),
        (&["--train.adam_beta2", "0.999"], "its train.adam_beta2 is 0.95, the run's 0.999"),
        (&["--data.datasets", &data], "30 rows then, 20 now"),
        (&["--train.load_checkpoint_path", "/nowhere"], "there is no such directory"),
    ];
    for (arguments, words) in cases {
        let line = failed(&run.run(1, "out", &[&AUTO[..], *arguments].concat()), 2);
        assert!(line.contains(words), "{arguments:?}: {line}");
    }
    for (field, value, words) in [
        ("intermediate_size", json!(96), "expected"),
        ("num_hidden_layers", json!(3), "missing"),
        ("initializer_range", json!(0.1), "the base is another one"),
    ] {
        let model = config(&|json| json[field] = value.clone());
        let line = failed(&run.run(1, "out", &[&AUTO[..], &["--model.config_path", &model]].concat()), 2);
        assert!(line.contains(words), "{field}: {line}");
    }
    assert!(tree(&run.at("out")) == before, "a refused run changed something");
}

#[test]
fn numbers_that_shape_no_state_may_change_on_a_resume() {
    let run = TinyRun::new();
    let settings =
        ["--train.adam_beta1", "0.8", "--train.adam_beta2", "0.99", "--train.adam_epsilon", "1e-6"];
    // A rate that does not depend on the last step.
    let constant = ["--train.lr_decay_style", "constant"];
    succeeded(&run.run(1, "out", &[&settings[..], &constant, &["--train.max_steps", "5"]].concat()));
    let resume = |out: &str, more: &[&str]| {
        copy_tree(&run.at("out"), &run.at(out));
        run.run(1, out, &[&AUTO[..], &settings[..4], &constant, &["--train.max_steps", "6"], more].concat())
    };
    let same = resume("same", &settings[4..]);
    succeeded(&same);
    let said = String::from_utf8_lossy(&same.stderr).into_owned();
    assert!(!said.contains("from here on"), "{said}");
    let other = resume("other", &["--train.weight_decay", "0.5"]);
    succeeded(&other);
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    for words in
        ["adam_epsilon: 1e-8 from here on, 1e-6 before", "weight_decay: 0.5 from here on, 0.01 before"]
    {
        assert!(said.contains(words), "{words} in {said}");
    }
    let adapters = ["same", "other"].map(|out| adapter(&run.step(out, 6)));
    assert_ne!(adapters[0], adapters[1]);
}

/// On two ranks, where the file of either may be the broken one, and on one, which reads both.
#[test]
fn mpi_broken_state_files_are_refused_in_one_line() {
    let run = TinyRun::new();
    succeeded(&run.run(2, "out", &["--train.max_steps", "5"]));
    let state = "training_state/trainer_state.json";
    let pieces = "training_state/optimizer-1-of-2.safetensors";
    let read = |file: &str| fs::read(run.step("out", 5).join(file)).unwrap();
    let stated = |from: &str, to: &str| {
        let text = String::from_utf8(read(state)).unwrap();
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1).into_bytes()
    };
    let cut = |file: &str| read(file)[..read(file).len() / 2].to_vec();
    let flipped = |file: &str| {
        let mut bytes = read(file);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        bytes
    };
    let cases = [
        (state, cut(state), false, "bytes,"),
        (state, cut(state), true, "EOF"),
        (state, b"[]".to_vec(), true, "no format"),
        (state, stated("\"format\": 4", "\"format\": 9"), true, "format 9"),
        (state, stated("\"shards\": 2", "\"shards\": 1"), true, "reaches past"),
        (state, stated("\"expert_groups\": 1", "\"expert_groups\": 3"), true, "3 groups of experts over 2"),
        (state, stated("\"updates\": 5", "\"updates\": -5"), true, "invalid value"),
        (state, stated("\"step\": 5", "\"step\": 6"), true, "the state of step 6"),
        (pieces, flipped(pieces), false, "SHA-256 differs"),
        (pieces, cut(pieces), true, "optimizer-1-of-2.safetensors: "),
        (pieces, Vec::new(), true, "optimizer-1-of-2.safetensors: "),
        (pieces, b"\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(), true, "optimizer-1-of-2.safetensors: "),
        (pieces, read(state), true, "optimizer-1-of-2.safetensors: "),
    ];
    for (index, (file, bytes, consistent, words)) in cases.iter().enumerate() {
        let out = format!("case {index}");
        copy_tree(&run.at("out"), &run.at(&out));
        tamper(&run.step(&out, 5), file, bytes, *consistent);
        let before = tree(&run.at(&out));
        let step = run.step(&out, 5).display().to_string();
        let line = failed(&run.run(1 + (index + 1) % 2, &out, &["--train.load_checkpoint_path", &step]), 2);
        assert!(line.contains(words), "{file} {index}: {line}");
        assert!(tree(&run.at(&out)) == before, "{file} {index}: something was written");
    }
}
