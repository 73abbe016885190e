//! Variants of LoRA: what PEFT trains, the same in any world, however a step is cut and whatever is computed again, and
//! after a resume; PEFT loads what they leave.

use crate::common::{failed, metrics, python, succeeded, tiny::TinyRun, xorl};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Largest distance of two losses in bf16, relative to one of them.
const BF16: f64 = 4e-3;

/// A case of tests/oracle/variants.py.
struct Case {
    name: &'static str,
    /// Fields of section lora.
    fields: Value,
    /// The run starts from the adapter that the oracle made.
    has_start: bool,
    /// Fields of the export's adapter_config.json.
    exported: &'static [(&'static str, &'static str)],
    /// Computed in bf16, by both.
    in_bf16: bool,
}

fn cases() -> Vec<Case> {
    let dropout = Case {
        name: "dropout",
        fields: json!({"lora_dropout": 0.3}),
        has_start: true,
        exported: &[("lora_dropout", "0.3"), ("r", "4")],
        in_bf16: false,
    };
    let pissa = Case {
        name: "pissa",
        fields: json!({"init_lora_weights": "pissa"}),
        has_start: false,
        exported: &[("r", "8"), ("lora_alpha", "16.0")],
        in_bf16: false,
    };
    let dora = |name, in_bf16| Case {
        name,
        fields: json!({"use_dora": true}),
        has_start: true,
        exported: &[("use_dora", "true"), ("r", "4")],
        in_bf16,
    };
    vec![dropout, pissa, dora("dora", false), dora("dora_bf16", true)]
}

fn oracle(arguments: &[String]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/variants.py");
    let mut oracle = Command::new(python());
    let output = oracle.arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output().unwrap();
    succeeded(&output);
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

/// The folder of the oracle, and the runs beside it.
struct Runs(tempfile::TempDir);

impl Runs {
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn step(&self, case: &Case, out: &str) -> PathBuf {
        self.at(case.name).join(out).join("weights/run/step_20")
    }

    fn write_config(&self, case: &Case) {
        let mut lora = json!({"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules":
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]});
        lora.as_object_mut().unwrap().extend(case.fields.as_object().unwrap().clone());
        if case.has_start {
            lora["adapter_path"] = json!(self.at(case.name).join("start"));
        }
        let yaml = json!({
            "model": {"model_path": self.at("model")},
            "data": {"datasets": [{"path": self.at("rows.jsonl"), "type": "tokenized"}], "sample_packing_method": "none",
                "shuffle_merged_datasets": false, "shuffle_before_merging_datasets": false},
            "train": {"lr": if case.in_bf16 { 3e-4 } else { 3e-3 }, "weight_decay": 0.0, "global_batch_size": 2,
                "enable_mixed_precision": case.in_bf16,
                "save_steps": 10},
            "lora": lora,
        });
        std::fs::write(self.at(case.name).join("run.yaml"), yaml.to_string()).unwrap();
    }

    /// The losses of a run on `ranks` ranks.
    fn run(&self, case: &Case, ranks: usize, out: &str, more: &[&str]) -> Vec<f64> {
        let (config, out) = (self.at(case.name).join("run.yaml"), self.at(case.name).join(out));
        let fixed = ["--config", config.to_str().unwrap(), "--train.output_dir", out.to_str().unwrap()];
        succeeded(&xorl(ranks, &[&fixed, more].concat()));
        metrics(&out).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    fn equals_peft(&self, case: &Case) {
        self.write_config(case);
        let kept = ["--train.gradient_checkpointing_method", "no_recompute", "--train.micro_batch_size", "2"];
        let one = self.run(case, 1, "one", &kept);
        let theirs = std::fs::read_to_string(self.at(case.name).join("losses.json")).unwrap();
        let theirs: Vec<f64> = serde_json::from_str(&theirs).unwrap();
        assert_eq!(one.len(), theirs.len());
        for (step, (ours, theirs)) in one.iter().zip(&theirs).enumerate() {
            let apart = (ours - theirs).abs() / theirs;
            let limit = if case.in_bf16 { BF16 } else { 2e-5 };
            assert!(apart < limit, "{}, step {step}: {ours}, PEFT {theirs}", case.name);
        }
        let two = self.run(
            case,
            2,
            "two",
            &["--model.merge_qkv", "false", "--train.gradient_checkpointing_method", "recompute_full_layer"],
        );
        for (step, (one, two)) in one.iter().zip(&two).enumerate() {
            let limit = if case.in_bf16 { BF16 } else { 1e-5 };
            assert!((one - two).abs() < limit * one, "{}, step {step}: one rank {one}, two {two}", case.name);
        }
        self.run(case, 1, "half", &[&kept[..], &["--train.max_steps", "10"]].concat());
        self.run(case, 1, "half", &[&kept[..], &["--train.load_checkpoint_path", "auto"]].concat());
        let file = |out: &str, name: &str| std::fs::read(self.step(case, out).join(name)).unwrap();
        for name in ["adapter_model.safetensors", "adapter_config.json"] {
            assert_eq!(file("one", name), file("half", name), "{}: {name} of the resumed run", case.name);
        }
        let saved: Value = serde_json::from_slice(&file("one", "adapter_config.json")).unwrap();
        for (field, value) in case.exported {
            assert_eq!(saved[field].to_string(), *value, "{}: {field}", case.name);
        }
    }
}

#[test]
fn mpi_python_variants_equal_pefts() {
    let runs = Runs(tempfile::tempdir().unwrap());
    let folder = runs.at("").display().to_string();
    let cases = cases();
    let names = cases.iter().map(|case| case.name.to_owned());
    oracle(&["train".to_owned(), folder.clone()].into_iter().chain(names).collect::<Vec<_>>());
    cases.iter().for_each(|case| runs.equals_peft(case));
    let exports = cases.iter().map(|case| format!("{}={}", case.name, runs.step(case, "two").display()));
    oracle(&["check".to_owned(), folder].into_iter().chain(exports).collect::<Vec<_>>());
}

#[test]
fn variants_that_experts_cannot_have_are_refused() {
    let run = TinyRun::of_experts();
    for (field, value) in [("lora_dropout", "0.1"), ("init_lora_weights", "pissa"), ("use_dora", "true")] {
        let plain = ["--lora.lora_b_init_std", "0", "--train.enable_mixed_precision", "false"];
        let flag = format!("--lora.{field}");
        let line = failed(&run.run(1, "out", &[&plain[..], &[flag.as_str(), value]].concat()), 2);
        for part in [&format!("lora.{field}: "), "routed experts are adapted", "per_expert"] {
            assert!(line.contains(part), "{line}");
        }
    }
}
