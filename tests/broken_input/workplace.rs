//! A folder with a run that works, and the ways in which cases break it.

use crate::common::{python, tiny::copy_tree};
use flate2::{Compression, write::GzEncoder};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// Seconds after which a command that should have been refused is ended: it may serve by then.
const LIMIT: &str = "60";
/// The step that the run of the fixtures has saved.
const STEP: &str = "out/weights/run/step_1";

/// A tensor of a file: name, dtype, shape and bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// The files that all workplaces begin with: `model/` (a tiny Llama by transformers, without a tokenizer), `tok/` (a
/// tokenizer of four words and a template), `moe/` (the config of a model of four experts), `run.yaml`, `rows.jsonl`,
/// `chats.jsonl`; and apart from them `out/`, what the run leaves.
pub struct Fixtures {
    start: TempDir,
    trained: TempDir,
}

impl Fixtures {
    pub fn new() -> Self {
        let it = Self { start: tempfile::tempdir().unwrap(), trained: tempfile::tempdir().unwrap() };
        let script = "import sys, torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\ntorch.manual_seed(3)\n\
            c = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, \
            num_attention_heads=2, num_key_value_heads=1)\n\
            LlamaForCausalLM(c).float().save_pretrained(sys.argv[1])";
        let made = Command::new(python()).args(["-c", script]).arg(it.start.path().join("model")).status();
        assert!(made.expect("launch/setup.sh makes .venv").success());

        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "</s>")], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, "unk_token": "<unk>"}});
        let experts = json!({"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false, "num_experts": 4,
            "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 8, "mlp_only_layers": [],
            "decoder_sparse_step": 1});
        let chat =
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        let files = [
            ("tok/tokenizer.json", tokenizer.to_string()),
            ("tok/tokenizer_config.json", json!({"eos_token": "</s>"}).to_string()),
            (
                "tok/chat_template.jinja",
                "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}".to_owned(),
            ),
            ("moe/config.json", experts.to_string()),
            ("rows.jsonl", "{\"input_ids\": [1, 2, 3, 4]}\n".repeat(4)),
            ("chats.jsonl", format!("{chat}\n")),
            (
                "run.yaml",
                "model:\n  model_path: model\ndata:\n  datasets:\n    - path: rows.jsonl\n      type: tokenized\n  \
                 sample_packing_method: none\ntrain:\n  output_dir: out\n  max_steps: 1\nlora:\n  lora_rank: 2\n"
                    .to_owned(),
            ),
        ];
        for (name, text) in files {
            let path = it.start.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        it
    }

    /// Keeps what the run in `workplace` has left.
    pub fn keep_run(&mut self, workplace: &Workplace) {
        copy_tree(&workplace.at("out"), &self.trained.path().join("out"));
    }
}

/// A case's own copy of the fixtures.
pub struct Workplace {
    folder: TempDir,
    trained: PathBuf,
}

impl Workplace {
    pub fn new(fixtures: &Fixtures) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_tree(fixtures.start.path(), folder.path());
        Self { folder, trained: fixtures.trained.path().to_owned() }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Every file and folder.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        fn below(folder: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                if entry.path().is_dir() {
                    below(&entry.path(), found);
                }
                found.insert(entry.path());
            }
        }
        let mut found = BTreeSet::new();
        below(self.folder.path(), &mut found);
        found
    }

    /// Runs `xorl-dist` with `arguments` in the folder, with a hub that is offline and an empty cache: exit code and
    /// stderr.
    pub fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new("timeout")
            .args([LIMIT, env!("CARGO_BIN_EXE_xorl-dist")])
            .args(arguments)
            .current_dir(self.folder.path())
            .env("OMP_NUM_THREADS", "1")
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.at("hub"))
            .env_remove("HF_HUB_CACHE")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    // Files.

    /// Writes a file, and the folder that it lies in.
    pub fn write(&self, name: &str, text: &str) {
        self.write_bytes(name, text.as_bytes());
    }

    pub fn write_bytes(&self, name: &str, bytes: &[u8]) {
        fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
        fs::write(self.at(name), bytes).unwrap();
    }

    pub fn write_gz(&self, name: &str, text: &str) {
        let mut packed = GzEncoder::new(Vec::new(), Compression::default());
        packed.write_all(text.as_bytes()).unwrap();
        self.write_bytes(name, &packed.finish().unwrap());
    }

    /// Replaces `from`, which must be there, in a file.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.at(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        self.write(name, &text.replacen(from, to, 1));
    }

    /// Takes `bytes` from the end of a file.
    pub fn cut(&self, name: &str, bytes: usize) {
        let all = fs::read(self.at(name)).unwrap();
        self.write_bytes(name, &all[..all.len() - bytes]);
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.at(name)).unwrap();
    }

    /// Puts a pipe without a writer in place of a file.
    pub fn pipe(&self, name: &str) {
        self.remove(name);
        assert!(Command::new("mkfifo").arg(self.at(name)).status().unwrap().success());
    }

    /// Puts a link to `target` at `name`.
    pub fn link(&self, target: &str, name: &str) {
        std::os::unix::fs::symlink(target, self.at(name)).unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) {
        fs::rename(self.at(from), self.at(to)).unwrap();
    }

    /// Copies a folder.
    pub fn copy(&self, from: &str, to: &str) {
        copy_tree(&self.at(from), &self.at(to));
    }

    fn set_json(&self, name: &str, field: &str, value: Value) {
        let mut all: Value = serde_json::from_str(&fs::read_to_string(self.at(name)).unwrap()).unwrap();
        all[field] = value;
        self.write(name, &all.to_string());
    }

    // The run's file and the server's.

    /// Replaces `from` in run.yaml.
    pub fn set(&self, from: &str, to: &str) {
        self.edit("run.yaml", from, to);
    }

    /// Puts a field at the start of a section of run.yaml.
    pub fn add(&self, section: &str, field: &str) {
        self.set(&format!("{section}:\n"), &format!("{section}:\n  {field}\n"));
    }

    /// A base of experts with random weights.
    pub fn experts(&self) {
        self.set("model_path: model", "config_path: moe");
    }

    /// Has the base quantised.
    pub fn quantise(&self, format: &str) {
        self.add("lora", "enable_qlora: true");
        self.add("lora", &format!("quant_format: {format}"));
    }

    /// Trains by dpo with this parameter.
    pub fn loss(&self, parameter: &str) {
        self.add("train", "loss_fn: dpo");
        self.add("train", &format!("loss_fn_params: {{{parameter}}}"));
    }

    /// Writes `server.yaml` of the model with a line more.
    pub fn server(&self, line: &str) {
        self.write("server.yaml", &format!("model_path: model\noutput_dir: served\n{line}"));
    }

    // The model.

    pub fn set_model(&self, field: &str, value: Value) {
        self.set_json("model/config.json", field, value);
    }

    /// Rewrites the weights with what `change` makes of each tensor.
    fn rewrite(&self, change: impl Fn(&str, TensorView) -> Vec<Stored>) {
        let bytes = fs::read(self.at("model/model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let new: Vec<_> = file.tensors().into_iter().flat_map(|(name, view)| change(&name, view)).collect();
        let views = new.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let new = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        self.write_bytes("model/model.safetensors", &new);
    }

    /// Keeps the tensor `name` under another name or shape as `change` says, or drops it.
    pub fn change_tensor(
        &self,
        name: &str,
        change: impl Fn(&str, Vec<usize>) -> Option<(String, Vec<usize>)>,
    ) {
        self.rewrite(|key, view| {
            let shape = view.shape().to_vec();
            let kept = if key == name { change(key, shape) } else { Some((key.to_owned(), shape)) };
            let all = kept.map(|(key, shape)| {
                let bytes = shape.iter().product::<usize>() * 4;
                (key, view.dtype(), shape, view.data()[..bytes].to_vec())
            });
            all.into_iter().collect()
        });
    }

    /// Stores the weights as integers of four bytes.
    pub fn store_integers(&self) {
        self.rewrite(|key, view| {
            vec![(key.to_owned(), Dtype::I32, view.shape().to_vec(), view.data().to_vec())]
        });
    }

    /// Packs the projections as fp8 in blocks, all zero.
    pub fn pack_fp8(&self) {
        self.rewrite(|key, view| {
            let (name, shape) = (key.to_owned(), view.shape().to_vec());
            if !key.ends_with("_proj.weight") {
                return vec![(name, view.dtype(), shape, view.data().to_vec())];
            }
            let scale = (format!("{key}_scale_inv"), Dtype::F32, vec![1, 1], 1f32.to_le_bytes().to_vec());
            vec![(name, Dtype::F8_E4M3, shape, vec![0; view.data().len() / 4]), scale]
        });
        let blocks = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        self.set_model("quantization_config", blocks);
    }

    /// Another model of the same sizes.
    pub fn change_base(&self) {
        self.rewrite(|key, view| {
            let negated = view.data().iter().map(|byte| byte ^ 1).collect();
            vec![(key.to_owned(), view.dtype(), view.shape().to_vec(), negated)]
        });
    }

    // Data.

    /// A field more of the data set.
    pub fn entry(&self, field: &str) {
        self.set("path: rows.jsonl", &format!("path: rows.jsonl\n      {field}"));
    }

    /// Reads the data as rows of another type, with a tokenizer.
    fn kind(&self, kind: &str) {
        self.set("type: tokenized", &format!("type: {kind}"));
        self.add("model", "tokenizer_path: tok");
    }

    /// Rows of this type in a file.
    pub fn rows(&self, kind: &str, name: &str, text: &str) {
        self.write(name, text);
        self.set("rows.jsonl", name);
        self.kind(kind);
    }

    /// Rows that are chats.
    pub fn chats(&self) {
        self.set("rows.jsonl", "chats.jsonl");
        self.kind("chat");
    }

    /// Pairs to train on by dpo.
    pub fn pairs(&self, row: &str) {
        self.add("train", "loss_fn: dpo");
        self.rows("preference", "t.jsonl", row);
    }

    // What a run has left.

    /// `out/` of a run that has ended.
    pub fn trained(&self) {
        copy_tree(&self.trained.join("out"), &self.at("out"));
    }

    /// The same, to go on from.
    pub fn resume(&self, step: &str) {
        self.trained();
        self.add("train", &format!("load_checkpoint_path: {step}"));
    }

    /// `adapter/`, to start from.
    pub fn adapter(&self) {
        copy_tree(&self.trained.join(STEP), &self.at("adapter"));
        self.add("lora", "adapter_path: adapter");
    }

    /// The same with a field of its config changed.
    pub fn adapter_with(&self, field: &str, value: Value) {
        self.adapter();
        self.set_json("adapter/adapter_config.json", field, value);
    }
}
