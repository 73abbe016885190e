//! Whatever a user gets wrong in a config, a model or a data file: exit code 2, one line that names the place, and
//! nothing written.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod common;

use common::python;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A run that works, in a folder of its own: `run.yaml`, `model/` (tiny Llama, by transformers), `rows.jsonl`,
/// `chats.jsonl`.
struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    fn new(pristine: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("model")).unwrap();
        for entry in fs::read_dir(pristine).unwrap().flatten() {
            fs::copy(entry.path(), folder.path().join("model").join(entry.file_name())).unwrap();
        }
        let it = Self { folder };
        it.write("rows.jsonl", &"{\"input_ids\": [1, 2, 3, 4]}\n".repeat(4));
        let chat =
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        it.write("chats.jsonl", &format!("{chat}\n"));
        it.write(
            "run.yaml",
            "model:\n  model_path: model\ndata:\n  datasets:\n    - path: rows.jsonl\n      type: tokenized\n  \
             sample_packing_method: none\ntrain:\n  output_dir: out\n  max_steps: 1\nlora:\n  lora_rank: 2\n",
        );
        it
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
    }

    /// Replaces `from`, which must be there, in a file.
    fn edit(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.at(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        self.write(name, &text.replacen(from, to, 1));
    }

    fn set_model(&self, field: &str, value: Value) {
        let mut config: Value =
            serde_json::from_str(&fs::read_to_string(self.at("model/config.json")).unwrap()).unwrap();
        config[field] = value;
        self.write("model/config.json", &config.to_string());
    }

    /// Rewrites the weights with the tensor `name` as `change` says: kept under another name or shape, or dropped.
    fn change_tensor(&self, name: &str, change: impl Fn(&str, Vec<usize>) -> Option<(String, Vec<usize>)>) {
        let path = self.at("model/model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let kept = file.tensors().into_iter().filter_map(|(key, view)| {
            let (key, shape) =
                if key == name { change(&key, view.shape().to_vec())? } else { (key, view.shape().to_vec()) };
            let data = &view.data()[..shape.iter().product::<usize>() * 4];
            Some((key, safetensors::tensor::TensorView::new(view.dtype(), shape, data).unwrap()))
        });
        let new = safetensors::serialize(kept.collect::<Vec<_>>(), None).unwrap();
        fs::write(&path, new).unwrap();
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        let list = |folder: PathBuf| fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
        list(self.at(".")).chain(list(self.at("model"))).collect()
    }

    /// Runs `xorl-dist --config run.yaml`: exit code and stderr.
    fn run(&self) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_xorl-dist"))
            .args(["--config", "run.yaml"])
            .current_dir(self.folder.path())
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn pristine_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let script = "import sys, torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\ntorch.manual_seed(3)\n\
        c = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, \
        num_attention_heads=2, num_key_value_heads=1)\nLlamaForCausalLM(c).float().save_pretrained(sys.argv[1])";
    let made = Command::new(python()).args(["-c", script]).arg(folder.path()).status();
    assert!(made.expect("launch/setup.sh makes .venv").success());
    folder
}

type Case = (&'static str, &'static [&'static str], fn(&Workplace));

/// What is broken, the words that the one line must hold, and the breaking.
const CASES: &[Case] = &[
    // The run's file.
    ("a field that is none", &["run.yaml:10", "train.max_stepz", "max_steps"], |w| {
        w.edit("run.yaml", "max_steps", "max_stepz")
    }),
    ("a section that is none", &["run.yaml:", "trian"], |w| w.edit("run.yaml", "train:", "trian:")),
    ("a number that is none", &["run.yaml:10", "train.max_steps", "many"], |w| {
        w.edit("run.yaml", "max_steps: 1", "max_steps: many")
    }),
    ("a rank of zero", &["run.yaml:12", "lora.lora_rank"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "lora_rank: 0")
    }),
    ("a field twice", &["run.yaml:", "output_dir"], |w| {
        w.edit("run.yaml", "  max_steps: 1", "  output_dir: b")
    }),
    ("yaml that is none", &["run.yaml:"], |w| w.edit("run.yaml", "lora:\n", "lora: [\n")),
    ("no dataset", &["data.datasets"], |w| {
        w.edit("run.yaml", "    - path: rows.jsonl\n      type: tokenized\n", "    []\n")
    }),
    ("a dataset type that is none", &["run.yaml:6", "tokenised"], |w| {
        w.edit("run.yaml", "tokenized", "tokenised")
    }),
    ("a run_id with a slash", &["run.yaml:10", "train.run_id"], |w| {
        w.edit("run.yaml", "max_steps: 1", "run_id: a/b")
    }),
    ("an output_dir that is a file", &["run.yaml:9", "train.output_dir", "rows.jsonl: a file"], |w| {
        w.edit("run.yaml", "output_dir: out", "output_dir: rows.jsonl/out")
    }),
    ("full fine-tuning", &["run.yaml:12", "enable_lora"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "enable_lora: false")
    }),
    ("a target that matches nothing", &["run.yaml:12", "lora.lora_target_modules", "w1"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "lora_target_modules: [w1]")
    }),
    ("a leaf that is adapted twice", &["run.yaml:12", "lora.lora_target_modules", "qkv_proj"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "lora_target_modules: [q_proj, qkv_proj]");
    }),
    ("more ranks than there are", &["data_parallel_shard_size", "2"], |w| {
        w.edit("run.yaml", "max_steps: 1", "data_parallel_shard_size: 2");
    }),
    ("an adapter that is not there", &["run.yaml:12", "lora.adapter_path", "nowhere"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "adapter_path: nowhere");
    }),
    // The model.
    ("no model", &["nowhere"], |w| w.edit("run.yaml", "model_path: model", "model_path: nowhere")),
    ("a model config that is no JSON", &["model/config.json"], |w| w.write("model/config.json", "{")),
    ("a family that is not built", &["model/config.json", "gpt2"], |w| {
        w.set_model("model_type", json!("gpt2"))
    }),
    ("an activation that is not built", &["model/config.json", "hidden_act"], |w| {
        w.set_model("hidden_act", json!("gelu"))
    }),
    ("a field that may change the maths", &["model/config.json", "logit_softcap"], |w| {
        w.set_model("logit_softcap", json!(30))
    }),
    ("heads that do not divide", &["model/config.json", "num_key_value_heads"], |w| {
        w.set_model("num_key_value_heads", json!(3))
    }),
    ("a size that is no number", &["model/config.json", "hidden_size"], |w| {
        w.set_model("hidden_size", json!("big"))
    }),
    ("no weights", &["model", "safetensors"], |w| fs::remove_file(w.at("model/model.safetensors")).unwrap()),
    ("weights cut short", &["model/model.safetensors"], |w| {
        let bytes = fs::read(w.at("model/model.safetensors")).unwrap();
        fs::write(w.at("model/model.safetensors"), &bytes[..bytes.len() - 7]).unwrap();
    }),
    ("a tensor that is missing", &["model.norm.weight"], |w| {
        w.change_tensor("model.norm.weight", |_, _| None)
    }),
    ("a tensor too many", &["model.norm.weights"], |w| {
        w.change_tensor("model.norm.weight", |_, shape| Some(("model.norm.weights".into(), shape)));
    }),
    ("a tensor of another shape", &["model.norm.weight", "[8]", "[16]"], |w| {
        w.change_tensor("model.norm.weight", |name, _| Some((name.into(), vec![8])));
    }),
    ("an index without its file", &["model-00001-of-00002.safetensors"], |w| {
        fs::remove_file(w.at("model/model.safetensors")).unwrap();
        let map = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
        w.write("model/model.safetensors.index.json", &map.to_string());
    }),
    // The data.
    ("a line that is no JSON", &["rows.jsonl:3"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1, 2]}\n\n{\"input_ids\": [1,\n")
    }),
    ("a line without tokens", &["rows.jsonl:1", "input_ids"], |w| w.write("rows.jsonl", "{\"ids\": [1]}\n")),
    ("a token that is none", &["rows.jsonl:2", "input_ids[1]", "64"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [1, 64]}\n");
    }),
    ("labels that do not align", &["rows.jsonl:1", "labels"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1, 2], \"labels\": [1]}\n")
    }),
    ("a token that is a text", &["rows.jsonl:1", "input_ids"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [\"a\"]}\n")
    }),
    (
        "a fault of every line",
        &["rows.jsonl:1", "`input_ids`, found `text`; type text reads `text`; 29 more lines are wrong too"],
        |w| {
            w.write("rows.jsonl", &"{\"text\": \"a\"}\n".repeat(30));
        },
    ),
    ("a file without a line", &["rows.jsonl", "write a JSON object in each line"], |w| {
        w.write("rows.jsonl", "")
    }),
    ("a file that is not there", &["rows.jsonl"], |w| fs::remove_file(w.at("rows.jsonl")).unwrap()),
    (
        "a file whose name is misspelt",
        &["run.yaml:5", "rosw.jsonl: no such file", "did you mean rows.jsonl?"],
        |w| w.edit("run.yaml", "rows.jsonl", "rosw.jsonl"),
    ),
    ("a model folder whose name is misspelt", &["run.yaml:2", "did you mean model?"], |w| {
        w.edit("run.yaml", "model_path: model", "model_path: modle")
    }),
    ("a table of other columns", &["rows.csv:2", "`input_ids`, found `question`, `answer`"], |w| {
        w.write("rows.csv", "question,answer\n1,2\n");
        w.edit("run.yaml", "rows.jsonl", "rows.csv");
    }),
    ("samples that are all too long", &["max_seq_len"], |w| {
        w.edit("run.yaml", "sample_packing_method: none", "sample_packing_method: none\n  max_seq_len: 2");
    }),
    ("chats without a tokenizer", &["model: no tokenizer.json", "set model.tokenizer_path"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat")
    }),
    ("a broken tokenizer", &["model/tokenizer.json"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat");
        w.write("model/chat_template.jinja", "{{ messages[0].content }}");
        w.write("model/tokenizer.json", "{}");
    }),
    ("a broken chat template", &["model/chat_template.jinja"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat");
        w.write("model/chat_template.jinja", "{% for m in messages %}");
    }),
];

#[test]
fn python_broken_input_is_named_in_one_line_and_nothing_is_written() {
    let pristine = pristine_model();
    let good = Workplace::new(pristine.path());
    let (code, stderr) = good.run();
    assert_eq!(code, Some(0), "what is broken below must be what stops it: {stderr}");

    let mut wrong = Vec::new();
    for (what, words, spoil) in CASES {
        let workplace = Workplace::new(pristine.path());
        spoil(&workplace);
        let before = workplace.files();
        let (code, stderr) = workplace.run();
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let others = stderr.lines().filter(|line| !line.contains("WARN") && !line.contains("INFO")).count();
        let named = errors.len() == 1 && words.iter().all(|word| errors[0].contains(word));
        if code != Some(2) || !named || others != 1 || workplace.files() != before {
            wrong.push(format!("{what}: expected {words:?}, exit {code:?}: {stderr}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
}
