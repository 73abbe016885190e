//! Losses over pairs of answers: what TRL trains, in any world and after a resume; pairs stay together in packs.

use crate::common::{failed, metrics, python, succeeded, xorl};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Cases of tests/oracle/preference.py with the loss and its parameters.
fn cases() -> [(&'static str, &'static str, Value); 6] {
    [
        ("dpo", "dpo", json!({})),
        ("norm", "dpo", json!({"loss_type": "sigmoid_norm", "beta": 0.5})),
        ("hinge", "dpo", json!({"loss_type": "hinge", "beta": 0.05})),
        ("ipo", "dpo", json!({"loss_type": "ipo", "beta": 0.3})),
        ("robust", "dpo", json!({"loss_type": "robust", "label_smoothing": 0.1})),
        ("simpo", "simpo", json!({"beta": 2.0})),
    ]
}

/// Numbers of a step by TRL's names.
const TOLD: [&str; 6] = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
];

/// The folder of the oracle, and the runs beside it.
struct Runs(tempfile::TempDir);

impl Runs {
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn oracle(&self, arguments: &[String]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/preference.py");
        let mut oracle = Command::new(python());
        succeeded(&oracle.arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output().unwrap());
    }

    /// A configuration of `loss` with `params`, from the oracle's adapter or a fresh one.
    fn config(&self, loss: &str, params: &Value, has_start: bool) -> String {
        let mut lora = json!({"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules":
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]});
        if has_start {
            lora["adapter_path"] = json!(self.at("start"));
        }
        let yaml = json!({
            "model": {"model_path": self.at("model")},
            "data": {"datasets": [{"path": self.at("rows.jsonl"), "type": "preference"}], "sample_packing_method": "none",
                "shuffle_merged_datasets": false, "shuffle_before_merging_datasets": false},
            "train": {"lr": 3e-3, "weight_decay": 0.0, "global_batch_size": 2, "enable_mixed_precision": false,
                "loss_fn": loss, "loss_fn_params": params, "save_steps": 10},
            "lora": lora,
        });
        let path = self.at(&format!("{loss}.yaml"));
        std::fs::write(&path, yaml.to_string()).unwrap();
        path.display().to_string()
    }

    /// The metrics of a run on `ranks` ranks.
    fn run(&self, config: &str, ranks: usize, out: &str, more: &[&str]) -> Vec<Value> {
        let out = self.at(out);
        let fixed = ["--config", config, "--train.output_dir", out.to_str().unwrap()];
        succeeded(&xorl(ranks, &[&fixed, more].concat()));
        metrics(&out)
    }
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}"))
}

fn close(one: &[Value], other: &[Value], name: &str, tolerance: f64) {
    assert_eq!(one.len(), other.len());
    for (step, (one, other)) in one.iter().zip(other).enumerate() {
        let (one, other) = (number(one, name), number(other, name));
        let apart = (one - other).abs();
        assert!(apart <= tolerance * other.abs().max(1.0), "step {step}: {name} {one}, not {other}");
    }
}

#[test]
fn mpi_python_pairs_train_as_in_trl() {
    let runs = Runs(tempfile::tempdir().unwrap());
    let folder = runs.at("").display().to_string();
    let chat = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat").display().to_string();
    runs.oracle(&["train".to_owned(), chat, folder.clone()]);

    let mut exports = Vec::new();
    for (name, loss, params) in cases() {
        let config = runs.config(loss, &params, true);
        let theirs = std::fs::read_to_string(runs.at(&format!("{name}.json"))).unwrap();
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        let losses: Vec<f64> = serde_json::from_value(theirs["losses"].clone()).unwrap();
        let losses: Vec<Value> = losses.iter().map(|loss| json!({"loss": loss})).collect();
        let rewards = theirs["rewards"].as_array().unwrap();
        // One micro-batch of both pairs, as TRL has it; the others cut the step.
        let one = runs.run(&config, 1, &format!("{name}-1"), &["--train.micro_batch_size", "2"]);
        close(&one, &losses, "loss", 1e-4);
        for told in TOLD.into_iter().filter(|told| rewards[0].get(told).is_some()) {
            close(&one, rewards, told, 1e-3);
        }
        exports.push(format!("{name}={}", runs.at(&format!("{name}-1/weights/run/step_20")).display()));
        if name == "dpo" {
            let two = runs.run(&config, 2, "dpo-2", &[]);
            for told in TOLD.iter().chain(&["loss", "grad_norm"]) {
                close(&two, &one, told, 1e-5);
            }
            goes_on_as_before(&runs, &config);
        }
    }
    runs.oracle(&["check".to_owned(), folder].into_iter().chain(exports).collect::<Vec<_>>());
    the_base_is_the_reference_of_a_fresh_adapter(&runs);
    pairs_stay_together_in_packs(&runs);
    pairs_that_validate_are_compared_too(&runs);
    other_rows_and_another_base_are_refused(&runs);
}

/// A resume is bit-identical, and refused where the reference is another one.
fn goes_on_as_before(runs: &Runs, config: &str) {
    let both = ["--train.micro_batch_size", "2"];
    runs.run(config, 1, "half", &[&both[..], &["--train.max_steps", "10"]].concat());
    let goes_on = ["--train.load_checkpoint_path", "auto"];
    runs.run(config, 1, "half", &[&both[..], &goes_on].concat());
    let file = |out: &str| {
        let step = runs.at(out).join("weights/run/step_20/adapter_model.safetensors");
        std::fs::read(step).unwrap()
    };
    assert!(file("dpo-1") == file("half"), "the adapter of the resumed run");
    let half = runs.at("half");
    let other =
        ["--config", config, "--train.output_dir", half.to_str().unwrap(), "--lora.adapter_path", "null"];
    let line = failed(&xorl(1, &[&other[..], &goes_on].concat()), 2);
    assert!(line.contains("compares with another reference; give the lora.adapter_path"), "{line}");
}

/// A fresh adapter gives what one of the same values does that was given, and 2 ranks give what one does.
fn the_base_is_the_reference_of_a_fresh_adapter(runs: &Runs) {
    let config = runs.config("dpo", &json!({}), false);
    let fresh = runs.run(&config, 1, "fresh", &[]);
    assert!((number(&fresh[0], "loss") - 2f64.ln()).abs() < 1e-6, "{}", fresh[0]);
    assert!(number(&fresh[19], "rewards/margins") != 0.0);
    close(&runs.run(&config, 2, "fresh-2", &[]), &fresh, "loss", 1e-5);
    // The values before the first step, of a run that cannot move.
    runs.run(&config, 1, "still", &["--train.lr", "1e-30", "--train.lr_min", "0", "--train.max_steps", "1"]);
    let start = runs.at("still/weights/run/step_1").display().to_string();
    let given = runs.run(&config, 1, "given", &["--lora.adapter_path", &start]);
    close(&given, &fresh, "loss", 1e-6);
    let free = runs.run(&config, 1, "free", &["--train.loss_fn_params", "{\"reference_free\": true}"]);
    assert!((number(&free[0], "loss") - 2f64.ln()).abs() > 1e-3, "{}", free[0]);
}

/// Packs hold whole pairs and padding, and every pair counts once.
fn pairs_stay_together_in_packs(runs: &Runs) {
    let config = runs.config("dpo", &json!({}), false);
    let packed = ["--data.sample_packing_method", "sequential", "--data.sample_packing_sequence_len", "256"];
    let one = runs.run(&config, 1, "packed", &packed);
    let pairs: f64 = one.iter().map(|line| number(line, "tokens")).sum();
    assert_eq!(pairs, 40.0);
    assert!(one.len() < 20, "{} steps", one.len());
    close(&runs.run(&config, 2, "packed-2", &packed), &one, "loss", 1e-5);
}

#[test]
fn mpi_python_other_data_and_merges_are_refused() {}

/// The loss of pairs that validate before the first step is that of a model equal to its reference; 2 ranks agree.
fn pairs_that_validate_are_compared_too(runs: &Runs) {
    let config = runs.config("dpo", &json!({}), false);
    let validates = ["--data.val_set_size", "5", "--train.eval_on_start", "true"];
    let one = runs.run(&config, 1, "validates", &validates);
    assert!((number(&one[0], "eval_loss") - 2f64.ln()).abs() < 1e-6, "{}", one[0]);
    let last = one.last().unwrap();
    assert_eq!(number(last, "eval_tokens"), 5.0);
    assert!(number(last, "eval_rewards/margins") != 0.0, "{last}");
    let two = runs.run(&config, 2, "validates-2", &validates);
    let apart = number(two.last().unwrap(), "eval_loss") - number(last, "eval_loss");
    assert!(apart.abs() < 1e-5, "{apart}");
}

fn other_rows_and_another_base_are_refused(runs: &Runs) {
    let config = runs.config("dpo", &json!({}), false);
    let out = runs.at("refused");
    let refused = |more: &[&str], words: &str| {
        let fixed = ["--config", &config, "--train.output_dir", out.to_str().unwrap()];
        let line = failed(&xorl(1, &[&fixed, more].concat()), 2);
        assert!(line.contains(words), "{line}");
    };
    let plain = ["--train.loss_fn", "cross_entropy", "--train.loss_fn_params", "null"];
    refused(
        &plain,
        "its rows are of type preference: train.loss_fn dpo and simpo read rows of type preference",
    );
    refused(&["--lora.merge_lora_interval", "5"], "lora.merge_lora_interval: a merge changes the base");
    refused(&["--lora.init_lora_weights", "pissa"], "lora.init_lora_weights: pissa takes the start");
    refused(
        &["--train.loss_fn_params", "{\"loss_type\": \"kto\"}"],
        "expected sigmoid | sigmoid_norm | hinge | ipo | robust",
    );
    assert!(!out.exists());
}
