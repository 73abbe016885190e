//! A tiny run of a random model that needs no Python: what the tests of resuming and saving start, kill and compare.

use super::{floats, make_rows, metrics, ranks_of, xorl};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

pub const STEPS: usize = 20;

/// A folder with a model's config, rows and run.yaml.
pub struct TinyRun {
    folder: TempDir,
}

impl TinyRun {
    /// 20 steps of 4 rows over three epochs of 30 rows, a step saved every 5: everything that a resume has to keep is
    /// in use.
    pub fn new() -> Self {
        Self::of(&json!({"model_type": "qwen3"}), "layers.1.mlp.down_proj")
    }

    /// The same with 12 experts in the second of two layers.
    pub fn of_experts() -> Self {
        let model = json!({"model_type": "qwen3_moe", "num_experts": 12, "num_experts_per_tok": 2, "norm_topk_prob": true,
            "moe_intermediate_size": 24, "mlp_only_layers": [0], "decoder_sparse_step": 1});
        Self::of(&model, "down_proj")
    }

    fn of(more: &Value, last_target: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut model = json!({ "vocab_size": 503, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.15, "tie_word_embeddings": false});
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fs::write(folder.path().join("config.json"), model.to_string()).unwrap();
        make_rows(&folder.path().join("rows.jsonl"));
        let at = folder.path().display();
        let yaml = format!(
            "model:\n  config_path: {at}\ndata:\n  datasets: [{{path: {at}/rows.jsonl, type: tokenized}}]\n\
            \x20 sample_packing_method: none\ntrain:\n  output_dir: {at}/out\n  num_train_epochs: 9\n\
            \x20 max_steps: {STEPS}\n  micro_batch_size: 2\n  gradient_accumulation_steps: 2\n  save_steps: 5\n\
            \x20 save_epochs: 0\n  lr: 5e-3\n  lr_decay_style: cosine\n  lr_warmup_ratio: 0.2\n  weight_decay: 0.01\n\
            \x20 max_grad_norm: 0.5\n  enable_mixed_precision: false\n  save_total_limit: null\nlora:\n  lora_rank: 4\n  lora_alpha: 8\n\
            \x20 lora_b_init_std: 0.05\n  lora_target_modules: [q_proj, v_proj, o_proj, gate_up_proj, {last_target}]\n"
        );
        fs::write(folder.path().join("run.yaml"), yaml).unwrap();
        Self { folder }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run into the output directory `out`.
    pub fn run(&self, ranks: usize, out: &str, more: &[&str]) -> Output {
        let arguments = self.arguments(out, more);
        xorl(ranks, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The same, to be started by the caller.
    pub fn command(&self, ranks: usize, out: &str, more: &[&str]) -> Command {
        let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), ranks);
        command.args(self.arguments(out, more));
        command
    }

    pub fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let fixed = [
            "--config".to_owned(),
            self.at("run.yaml").display().to_string(),
            "--train.output_dir".to_owned(),
            self.at(out).display().to_string(),
        ];
        fixed.into_iter().chain(more.iter().map(|word| word.to_string())).collect()
    }

    pub fn step(&self, out: &str, step: usize) -> PathBuf {
        self.run_dir(out).join(format!("step_{step}"))
    }

    pub fn run_dir(&self, out: &str) -> PathBuf {
        self.at(out).join("weights/run")
    }

    /// The numbers of the steps in `out`.
    pub fn steps(&self, out: &str) -> Vec<usize> {
        xorl_dist::checkpoint::steps::published(&self.run_dir(out))
    }

    /// `to` becomes what `from` would be if the run had been killed after publishing `step` and making a few more.
    pub fn interrupted(&self, from: &str, to: &str, step: usize) {
        let (from, to) = (self.at(from), self.at(to));
        copy_tree(&from, &to);
        let run = to.join("weights/run");
        for later in xorl_dist::checkpoint::steps::published(&run).into_iter().filter(|&s| s > step) {
            fs::remove_dir_all(run.join(format!("step_{later}"))).unwrap();
        }
        fs::write(run.join("latest"), format!("step_{step}\n")).unwrap();
        fs::remove_file(to.join("training_metrics.json")).unwrap();
        let lines = fs::read_to_string(to.join("metrics.jsonl")).unwrap();
        let kept: String = lines.split_inclusive('\n').take(step + 3).collect();
        fs::write(to.join("metrics.jsonl"), kept + "{\"step\": 1").unwrap();
    }

    /// Every metric but times, memory and the length of the run, a line a step.
    pub fn story(&self, out: &str) -> Vec<Value> {
        let mut lines = metrics(&self.at(out));
        for line in &mut lines {
            let of_the_machine = [
                "tokens_per_second",
                "step_seconds",
                "eval_seconds",
                "phase_seconds",
                "peak_rss_bytes",
                "device_memory_bytes",
                // A run that goes on may be longer.
                "total_steps",
            ];
            for field in of_the_machine {
                line.as_object_mut().unwrap().remove(field);
            }
        }
        lines
    }
}

pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, target) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Every file below `folder` with its bytes, but the lock.
pub fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(tree(&path));
        } else if !path.ends_with(".lock") {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// The names of files in which two folders differ.
pub fn differences(a: &Path, b: &Path) -> Vec<PathBuf> {
    let relative = |folder: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        let files = tree(folder).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(folder).unwrap().to_owned(), bytes)).collect()
    };
    let (a, b) = (relative(a), relative(b));
    a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).cloned().collect()
}

/// Writes `bytes` over a file of a step, and, if `consistent`, the manifest too: as if it had been published so.
pub fn tamper(step: &Path, file: &str, bytes: &[u8], consistent: bool) {
    fs::write(step.join(file), bytes).unwrap();
    if consistent {
        let path = step.join("manifest.json");
        let mut manifest: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let hash = format!("{:x}", Sha256::digest(bytes));
        manifest[file] = json!({"size": bytes.len(), "sha256": hash});
        fs::write(&path, manifest.to_string()).unwrap();
    }
}

/// The tensors of a step's adapter.
pub fn adapter(step: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(step.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.names().into_iter().map(|name| (name.to_owned(), floats(&file, name))).collect()
}
