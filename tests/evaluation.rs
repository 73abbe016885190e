//! Evaluation during training and by the command `eval`: the loss is PEFT's in any topology, rows that validate are
//! never trained on, training stays as it is to the bit, and the best step is kept over prunes and resumes.

use crate::common::{
    failed, metrics, python, signal, started, succeeded,
    tiny::{STEPS, TinyRun, differences},
    wait_for, xorl,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};
use xorl_dist::{
    checkpoint::steps,
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod},
    data::Dataset,
    rng::Stream,
};

const AUTO: [&str; 2] = ["--train.load_checkpoint_path", "auto"];

/// `number` rows of token ids below 503 that [`crate::common::make_rows`] has not, the first two tokens of each without
/// a label.
fn held_out(path: &Path, number: u64) -> String {
    let row = |i: u64| {
        let stream = Stream::new(12, &format!("row {i}"));
        let ids: Vec<u64> = (0..4 + i % 7).map(|j| stream.below(j, 503)).collect();
        let labels: Vec<i64> =
            ids.iter().enumerate().map(|(j, &id)| if j < 2 { -100 } else { id as i64 }).collect();
        json!({"input_ids": ids, "labels": labels}).to_string() + "\n"
    };
    fs::write(path, (0..number).map(row).collect::<String>()).unwrap();
    json!([{"path": path, "type": "tokenized"}]).to_string()
}

/// Steps with their evaluation's loss.
fn eval_losses(output: &Path) -> Vec<(u64, f64)> {
    let of = |row: &Value| Some((row["step"].as_u64()?, row["eval_loss"].as_f64()?));
    metrics(output).iter().filter_map(of).collect()
}

fn close(ours: f64, theirs: f64, what: &str) {
    assert!((ours - theirs).abs() < 1e-5 * theirs, "{what}: {ours}, expected {theirs}");
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The JSON that `eval --json` prints.
fn scores(ranks: usize, arguments: &[&str]) -> Value {
    let output = xorl(ranks, &[&["eval", "--json"], arguments].concat());
    succeeded(&output);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A tiny model of `architecture` made by transformers in each of the folders.
fn make_models(models: &[(PathBuf, &str, &str)]) {
    let model = |(folder, architecture, fields): &(PathBuf, &str, &str)| {
        format!(
            "torch.manual_seed(3)\nc = transformers.{architecture}Config(vocab_size=503, hidden_size=48, intermediate_size=80, \
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15, {fields})\n\
            transformers.{architecture}ForCausalLM(c).float().save_pretrained({folder:?})\n"
        )
    };
    let script = format!("import torch, transformers\n{}", models.iter().map(model).collect::<String>());
    succeeded(&Command::new(python()).args(["-c", &script]).output().unwrap());
}

#[test]
fn mpi_eval_loss_is_peft_s_in_every_topology() {
    let run = TinyRun::new();
    let experts = "num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]";
    let models = [(run.at("dense"), "Qwen3", ""), (run.at("experts"), "Qwen3Moe", experts)];
    make_models(&models);
    let rows = run.at("held_out.jsonl");
    let test = held_out(&rows, 7);
    let arguments = |model: &Path| -> Vec<String> {
        let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned);
        let fixed = ["--model.model_path", model.to_str().unwrap(), "--model.config_path", "null"];
        let fixed = fixed.into_iter().chain(["--data.test_datasets", &test, "--train.eval_on_start", "true"]);
        let fixed = fixed.chain(["--train.global_batch_size", "4"]);
        let fixed = fixed.chain(["--train.max_steps", "4", "--train.eval_steps", "2"]);
        let fixed = fixed.chain(["--lora.lora_b_init_std", "0", "--lora.lora_target_modules"]);
        fixed.map(str::to_owned).chain(targets).collect()
    };
    let mut peft = Command::new(python());
    peft.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/peft_loss.py"));
    let mut ours = Vec::new();
    for (model, over) in models.iter().zip([&[(2, "1"), (3, "1"), (4, "1")][..], &[(2, "2"), (4, "2")]]) {
        let name = model.0.file_name().unwrap().to_str().unwrap();
        let arguments = arguments(&model.0);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let one = format!("{name} 1");
        succeeded(&run.run(1, &one, &arguments));
        let expected = eval_losses(&run.at(&one));
        assert_eq!(expected.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 2, 4]);
        for (ranks, experts) in over {
            let out = format!("{name} {ranks}");
            let over = ["--train.expert_parallel_size", experts];
            succeeded(&run.run(*ranks, &out, &[&arguments[..], &over].concat()));
            for ((step, seen), (_, expected)) in eval_losses(&run.at(&out)).iter().zip(&expected) {
                close(*seen, *expected, &format!("{name} over {ranks}, step {step}"));
            }
        }
        let step = run.step(&one, 4);
        peft.args([&model.0, &step, &rows, &run.at(&format!("{name}.logits"))]);
        ours.push((model.0.clone(), step, expected));
    }
    let output = peft.output().unwrap();
    succeeded(&output);
    let theirs: Vec<f64> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(theirs.len(), 2);
    for ((model, step, expected), theirs) in ours.iter().zip(theirs) {
        close(expected[2].1, theirs, "PEFT");
        // The command on the step's own base, and over ranks. Before the first step B was zero.
        let [adapter, model, data] = [step, model, &rows].map(|path| path.to_str().unwrap());
        for ranks in [1, 3] {
            let seen = scores(ranks, &["--adapter", adapter, "--data", data, "--model", model]);
            close(seen["with_adapter"]["loss"].as_f64().unwrap(), theirs, "eval");
            close(seen["base"]["loss"].as_f64().unwrap(), expected[0].1, "base");
            assert_eq!((&seen["rows"], &seen["base"]["exact_match"]), (&json!(7), &Value::Null));
            let perplexity = seen["with_adapter"]["perplexity"].as_f64().unwrap();
            close(perplexity, theirs.exp(), "perplexity");
        }
    }
    // Of a run: its rows, its newest step, and its best by name.
    let out = run.at("dense 1");
    let config = out.join("config.yaml").display().to_string();
    let seen = scores(1, &["--config", &config]);
    assert_eq!(seen["adapter"], run.step("dense 1", 4).display().to_string());
    close(seen["with_adapter"]["loss"].as_f64().unwrap(), ours[0].2[2].1, "of a run");
    let best = run.run_dir("dense 1").join("best").display().to_string();
    let seen = scores(1, &["--config", &config, "--adapter", &best]);
    let lowest = ours[0].2[1..].iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(
        seen["adapter"],
        run.step("dense 1", lowest.0 as usize).display().to_string(),
        "{:?}",
        ours[0].2
    );
    let output = xorl(1, &["eval", "--config", &config]);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("perplexity") && table.lines().last().unwrap().starts_with("adapter"), "{table}");
}

#[test]
fn mpi_evaluation_changes_no_bit_of_training() {
    let run = TinyRun::new();
    let common =
        ["--data.val_set_size", "0.2", "--train.metric_for_best", "null", "--lora.lora_dropout", "0.1"];
    let seldom = ["--train.eval_steps", "1000"];
    let often = ["--train.eval_steps", "3", "--train.eval_on_start", "true"];
    for (ranks, more) in [(1, &[][..]), (2, &["--train.global_batch_size", "5"])] {
        let [without, with] = ["without", "with"].map(|name| format!("{name} {ranks}"));
        succeeded(&run.run(ranks, &without, &[&common[..], &seldom, more].concat()));
        succeeded(&run.run(ranks, &with, &[&common[..], &often, more].concat()));
        let evaluated: Vec<u64> = eval_losses(&run.at(&with)).iter().map(|(step, _)| *step).collect();
        assert_eq!(evaluated, [0, 3, 6, 9, 12, 15, 18, 20]);
        assert_eq!(eval_losses(&run.at(&without)).len(), 1, "after the last step");
        for step in [5, 10, 15, 20] {
            let different = differences(&run.step(&without, step), &run.step(&with, step));
            assert!(different.is_empty(), "{ranks} ranks, step {step}: {different:?}");
        }
        let trained = |out: &str| -> Vec<Value> {
            let mut rows = run.story(out);
            rows.retain(|row| row["step"] != 0);
            for row in rows.iter_mut().map(|row| row.as_object_mut().unwrap()) {
                row.retain(|key, _| !key.starts_with("eval_") && key != "comm_bytes");
            }
            rows
        };
        assert_eq!(trained(&without), trained(&with), "{ranks} ranks");
    }
}

#[test]
fn rows_that_validate_are_never_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    // Every fourth row is there twice.
    let row = |i: usize| json!({"input_ids": [i, i + 1, 7]}).to_string() + "\n";
    let rows = (0..80).map(row).chain((0..80).step_by(4).map(row)).collect::<String>();
    fs::write(&path, rows).unwrap();
    let entry = |path: &Path| DatasetArgs {
        path: path.into(),
        kind: DatasetType::Tokenized,
        ..DatasetArgs::default()
    };
    let args = |size, method| DataArgs {
        datasets: vec![entry(&path)],
        val_set_size: size,
        sample_packing_method: method,
        sample_packing_sequence_len: 12,
        pad_to_multiple_of: None,
        ..DataArgs::default()
    };
    let first_tokens = |rows: Vec<xorl_dist::data::Row>| -> BTreeSet<i64> {
        rows.iter().flat_map(|row| row.input_ids.chunks(3).map(|sample| sample[0])).collect()
    };
    let sides = |args: &DataArgs, seed| {
        let data = Dataset::open(args, None, 1000, 0, seed).unwrap();
        let trained = (0..data.rows()).map(|at| data.row_at(0, at).unwrap()).collect();
        let validated = (0..data.validation_rows()).map(|at| data.validation_row(at).unwrap()).collect();
        [first_tokens(trained), first_tokens(validated)]
    };
    for method in [PackingMethod::None, PackingMethod::Sequential, PackingMethod::Multipack] {
        for (size, count) in [(0.25, 20), (5.0, 5), (1.0, 1)] {
            let [trained, validated] = sides(&args(Some(size), method), 1);
            assert!(trained.is_disjoint(&validated), "{method:?} {size}");
            assert_eq!((validated.len(), trained.len()), (count, 80 - count), "{method:?} {size}");
        }
    }
    let quarter = args(Some(0.25), PackingMethod::None);
    assert_ne!(sides(&quarter, 1), sides(&quarter, 2), "drawn by the seed");
    // Prepared rows are the same ones, and other sizes are other files.
    let kept = DataArgs { dataset_prepared_path: Some(folder.path().join("kept")), ..quarter.clone() };
    for _ in 0..2 {
        assert_eq!(sides(&kept, 1), sides(&quarter, 1));
        let all = DataArgs { val_set_size: None, ..kept.clone() };
        assert_eq!(sides(&all, 1)[0].len(), 80);
    }
    // Data sets of their own leave training and its fingerprint alone.
    let other = folder.path().join("other.jsonl");
    fs::write(&other, row(500)).unwrap();
    let all = args(None, PackingMethod::None);
    let beside = DataArgs { test_datasets: Some(vec![entry(&other)]), ..all.clone() };
    assert_eq!(sides(&beside, 1), [sides(&all, 1)[0].clone(), [500].into()]);
    let open = |args: &DataArgs| Dataset::open(args, None, 1000, 0, 1);
    let [with, without] = [open(&beside), open(&all)].map(Result::unwrap);
    assert_eq!(with.fingerprint(), without.fingerprint());
    assert_ne!(with.validation_fingerprint(), without.validation_fingerprint());
    for size in [80.0, 0.999] {
        let error = open(&args(Some(size), PackingMethod::None)).unwrap_err().to_string();
        assert!(
            error.contains("data.val_set_size: ") && error.contains("of 80 different samples"),
            "{error}"
        );
    }
}

#[test]
fn mpi_best_step_and_patience_are_kept_over_a_resume() {
    let run = TinyRun::new();
    let evaluated =
        ["--data.val_set_size", "0.3", "--train.eval_steps", "2", "--train.global_batch_size", "4"];
    for ranks in [1, 2] {
        let [whole, half] = ["whole", "half"].map(|name| format!("{name} {ranks}"));
        succeeded(&run.run(ranks, &whole, &evaluated));
        run.interrupted(&whole, &half, 10);
        succeeded(&run.run(ranks, &half, &[&AUTO[..], &evaluated].concat()));
        assert_eq!(run.story(&whole), run.story(&half));
        assert_eq!(differences(&run.step(&whole, STEPS), &run.step(&half, STEPS)), Vec::<PathBuf>::new());
        let losses = eval_losses(&run.at(&whole));
        assert_eq!(losses.len(), 10);
        let lowest = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0 as usize;
        for out in [&whole, &half] {
            assert_eq!(steps::best(&run.run_dir(out)), Some(run.step(out, lowest)), "{losses:?}");
        }
    }
    // Every step that was the best when it was made is saved; of them one stays.
    let limit = ["--train.save_total_limit", "1", "--train.save_steps", "0"];
    let output = run.run(1, "pruned", &[&evaluated[..], &limit].concat());
    succeeded(&output);
    let best = steps::best(&run.run_dir("pruned")).unwrap();
    let best = steps::number(&best).unwrap();
    let kept: BTreeSet<usize> = [best, STEPS].into();
    assert_eq!(run.steps("pruned"), kept.into_iter().collect::<Vec<_>>());
    // Without the rows that it took away the data are others; other rows of their own begin anew.
    run.interrupted("whole 1", "others", 10);
    let [first, second] = [3, 4].map(|n| held_out(&run.at(&format!("held_out {n}.jsonl")), n));
    let sets = |test| ["--data.test_datasets", test, "--train.max_steps", "12"];
    let output = run.run(1, "others", &[&AUTO[..], &sets(&first)].concat());
    assert!(failed(&output, 2).contains("its data are others"), "{}", said(&output));
    succeeded(&run.run(1, "sets", &[&sets(&first)[..], &["--train.max_steps", "10"]].concat()));
    let output = run.run(1, "sets", &[&AUTO[..], &sets(&second)].concat());
    succeeded(&output);
    assert!(said(&output).contains("the best step before is forgotten"), "{}", said(&output));
    assert_eq!(steps::best(&run.run_dir("sets")), Some(run.step("sets", 12)));
}

#[test]
fn mpi_a_run_stops_early_on_all_ranks_and_one_row_suffices() {
    let run = TinyRun::new();
    // A rate at which the one row that validates soon gets worse.
    let settings = "--data.val_set_size 1 --train.eval_steps 1 --train.early_stopping_patience 2 --train.lr 0.2 \
        --train.save_steps 0 --train.lr_warmup_ratio 0 --train.global_batch_size 4";
    let settings: Vec<&str> = settings.split_whitespace().collect();
    let output = run.run(4, "out", &settings);
    succeeded(&output);
    let (losses, text) = (eval_losses(&run.at("out")), said(&output));
    let made = losses.len();
    assert!(made < STEPS, "{losses:?}");
    let [.., best, after, last] = losses[..] else { panic!("{losses:?}") };
    assert!(after.1 >= best.1 && last.1 >= best.1, "{losses:?}");
    let words = "stopped early: no better eval_loss in 2 evaluations (train.early_stopping_patience); the best is step_";
    assert_eq!(text.matches(words).count(), 1, "{text}");
    assert_eq!(run.steps("out").last(), Some(&made), "the last step is saved");
    assert_eq!(steps::best(&run.run_dir("out")), Some(run.step("out", best.0 as usize)));
    // Neither a resume nor another world goes on; more patience does.
    for ranks in [4, 1] {
        let output = run.run(ranks, "out", &[&settings[..], &AUTO].concat());
        succeeded(&output);
        assert!(said(&output).contains(words), "{}", said(&output));
        assert_eq!(metrics(&run.at("out")).len(), made);
    }
    let more = ["--train.early_stopping_patience", "100", "--train.max_steps", &(made + 1).to_string()];
    succeeded(&run.run(2, "out", &[&settings[..], &AUTO, &more].concat()));
    assert_eq!(metrics(&run.at("out")).len(), made + 1);
}

/// Sends a signal in the evaluation after step 1, `rounds` times: it is left, and a resume begins with it.
fn stops_in_an_evaluation(ranks: usize, rounds: usize) {
    let run = TinyRun::new();
    let test = held_out(&run.at("held_out.jsonl"), 400);
    let settings = "--train.eval_steps 1 --train.save_steps 0 --train.max_steps 3 --train.use_tensorboard true \
        --train.global_batch_size 4";
    let settings: Vec<&str> =
        settings.split_whitespace().chain(["--data.test_datasets", &test]).chain(AUTO).collect();
    succeeded(&run.run(ranks, "whole", &settings));
    let course = |out: &str| {
        let mut lines = run.story(out);
        lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("comm_bytes")));
        lines
    };
    for round in 0..rounds {
        let out = format!("out {round}");
        let child = started(run.command(ranks, &out, &settings));
        let events = run.at(&out).join("tensorboard/run");
        wait_for("the run", || fs::read_dir(&events).ok()?.next()?.ok().map(drop));
        // Steps take milliseconds here, an evaluation most of a second.
        std::thread::sleep(Duration::from_millis(100 + 13 * round as u64));
        signal(child.id(), libc::SIGUSR1);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", said(&output));
        let text = fs::read_to_string(run.at(&out).join("metrics.jsonl")).unwrap();
        let made = text.lines().count();
        assert_eq!(run.steps(&out).last(), Some(&made), "{text}");
        assert_eq!(eval_losses(&run.at(&out)).len(), made - 1, "{}", said(&output));
        assert!(said(&output).contains("its evaluation was put off: it is saved"), "{}", said(&output));
        succeeded(&run.run(ranks, &out, &settings));
        assert_eq!(course(&out), course("whole"));
        assert_eq!(
            steps::best(&run.run_dir(&out)).map(|step| step.file_name().unwrap().to_owned()),
            steps::best(&run.run_dir("whole")).map(|step| step.file_name().unwrap().to_owned())
        );
        assert_eq!(differences(&run.step("whole", 3), &run.step(&out, 3)), Vec::<PathBuf>::new());
    }
}

#[test]
fn mpi_a_signal_leaves_an_evaluation_with_which_a_resume_begins() {
    [1, 2].into_iter().for_each(|ranks| stops_in_an_evaluation(ranks, 1));
}

/// Run by `ci/long.sh signals`.
#[test]
#[ignore = "takes minutes"]
fn ten_signals_in_evaluations_stop_one_and_two_ranks() {
    for ranks in [1, 2] {
        stops_in_an_evaluation(ranks, 10);
        println!("evaluation, {ranks} ranks: 10 of 10");
    }
}

/// The answer that tests/generate.rs holds to transformers.
#[test]
fn mpi_exact_match_compares_the_last_turn_with_greedy_answers() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("chats.jsonl");
    let chat = |answer: &str| {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = [turn("user", "What is the capital of France?"), turn("assistant", answer)];
        json!({"messages": turns}).to_string() + "\n"
    };
    let answers =
        ["The capital of France is Paris.", "The capital of France is Rome.", "The capital of France is"];
    fs::write(&data, answers.map(chat).concat()).unwrap();
    let data = data.display().to_string();
    let arguments = ["--model", &model, "--data", &data, "--exact-match", "--dtype", "float32"];
    let seen = scores(2, &arguments);
    assert_eq!(seen["base"]["exact_match"], json!({"matched": 1, "of": 3}));
    assert_eq!((&seen["adapter"], &seen["with_adapter"]), (&Value::Null, &Value::Null));
}

#[test]
fn columns_of_the_data_may_have_names_of_their_own() {
    let run = TinyRun::new();
    let config = run.at("run.yaml").display().to_string();
    let (plain, renamed) = (run.at("held_out.jsonl"), run.at("renamed.jsonl"));
    held_out(&plain, 5);
    let text = fs::read_to_string(&plain).unwrap();
    fs::write(&renamed, text.replace("\"input_ids\"", "\"ids\"").replace("\"labels\"", "\"targets\""))
        .unwrap();
    let of = |path: &Path, more: &[&str]| {
        let path = path.display().to_string();
        scores(1, &[&["--config", &config, "--data", &path], more].concat())
    };
    let columns = ["--type", "tokenized", "--columns", "input_ids=ids", "labels=targets"];
    assert_eq!(of(&plain, &[]), of(&renamed, &columns));
}

#[test]
fn what_cannot_be_evaluated_is_one_line() {
    let run = TinyRun::new();
    let config = run.at("run.yaml").display().to_string();
    let rows = run.at("rows.jsonl").display().to_string();
    let test = held_out(&run.at("held_out.jsonl"), 3);
    for (arguments, words) in [
        (vec!["eval", "--config", &config], "nothing to evaluate on"),
        (vec!["eval", "--model", "/nowhere", "--data", &rows], "/nowhere"),
        (vec!["eval", "--model", "m"], "--data is missing"),
        (vec!["eval", "--data", &rows], "--config, --model or --adapter"),
        (vec!["eval", "--config", &config, "--data", &rows, "--dtype", "float32"], "goes without --config"),
        (vec!["eval", "--config", &config, "--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (vec!["eval", "--config", &config, "--data", &rows, "--exact-match"], "tokenizer"),
        (vec!["check", "--config", &config, "--train.eval_steps", "2"], "there is nothing to evaluate on"),
        (vec!["check", "--config", &config, "--data.val_set_size", "30"], "of 30 different samples"),
        (vec!["check", "--config", &config, "--data.val_set_size", "1.5"], "neither a share below 1"),
        (
            vec!["check", "--config", &config, "--data.val_set_size", "1", "--data.test_datasets", &test],
            "and so does data.test_datasets",
        ),
        (
            "--data.val_set_size 1 --train.metric_for_best null --train.early_stopping_patience 2"
                .split_whitespace()
                .fold(vec!["check", "--config", &config], |line, word| [&line[..], &[word]].concat()),
            "needs train.metric_for_best",
        ),
    ] {
        let line = failed(&xorl(1, &arguments), 2);
        assert!(line.contains(words), "{arguments:?}: {line}");
    }
    // `check` counts what validates.
    let output = xorl(1, &["check", "--config", &config, "--data.test_datasets", &test]);
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(report.contains("\nvalidation: 3 samples, 0 dropped as too long; 3 rows of at most"), "{report}");
}
