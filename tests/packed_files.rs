//! Checkpoints that tools have quantised train as the same in plain numbers; what was trained on packed numbers is
//! merged into them, continues on them, and is a model that transformers reads.

use crate::common::{metrics, python, succeeded, xorl};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use xorl_dist::{checkpoint::publish, rng::Stream};

/// Formats, and the methods that files in them name.
const FORMATS: [(&str, &str); 3] = [("nf4", "bitsandbytes"), ("block_fp8", "fp8"), ("nvfp4", "modelopt")];
const STEPS: usize = 4;

struct Files(tempfile::TempDir);

impl Files {
    fn at(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn oracle(words: &[&str]) -> Vec<Value> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/packed.py");
        let mut command = Command::new(python());
        command.arg(script).args(words).env("HF_HUB_OFFLINE", "1").env("TRANSFORMERS_VERBOSITY", "error");
        let output = command.output().unwrap();
        succeeded(&output);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        Self::oracle(&["make", &files.at("")]);
        let row = |i: u64| {
            let stream = Stream::new(11, &format!("row {i}"));
            let ids: Vec<u64> = (0..6 + i % 9).map(|j| stream.below(j, 503)).collect();
            json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
        };
        fs::write(files.at("rows.jsonl"), (0..4 * STEPS as u64).map(row).collect::<String>()).unwrap();
        let yaml = format!(
            "data:\n  datasets: [{{path: {}, type: tokenized}}]\n  sample_packing_method: none\ntrain: {{max_steps: {STEPS}, \
             global_batch_size: 4, micro_batch_size: 2, lr: 1e-2, enable_mixed_precision: false, lr_decay_style: constant}}\n\
             lora: {{lora_rank: 4, lora_alpha: 8, lora_b_init_std: 0.05, lora_target_modules: [q_proj, v_proj, o_proj, \
             gate_up_proj, down_proj]}}\n",
            files.at("rows.jsonl")
        );
        fs::write(files.at("run.yaml"), yaml).unwrap();
        files
    }

    /// Loss and gradient norm of each step of a run on the base `model` into `out`.
    fn train(&self, model: &str, out: &str, more: &[&str]) -> Vec<[f64; 2]> {
        let (config, model, to) = (self.at("run.yaml"), self.at(model), self.at(out));
        let fixed = ["--config", &config, "--model.model_path", &model, "--train.output_dir", &to];
        succeeded(&xorl(1, &[&fixed[..], more].concat()));
        let number = |line: &Value, field: &str| line[field].as_f64().unwrap();
        metrics(Path::new(&to))
            .iter()
            .map(|line| ["loss", "grad_norm"].map(|field| number(line, field)))
            .collect()
    }

    fn step(&self, out: &str) -> String {
        self.at(&format!("{out}/weights/run/step_{STEPS}"))
    }

    /// Merges the adapter of a run into `out`, and returns stdout and stderr.
    fn merge(&self, ranks: usize, run: &str, out: &str, more: &[&str]) -> String {
        let (adapter, out) = (self.step(run), self.at(out));
        let output = xorl(ranks, &[&["merge", "--adapter", &adapter, "--out", &out], more].concat());
        succeeded(&output);
        publish::verify(Path::new(&out)).unwrap();
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
    }

    /// stdout and stderr of a continuation by the adapter of a run.
    fn generate(&self, run: &str, more: &[&str]) -> [String; 2] {
        let adapter = self.step(run);
        let prompt = ["--prompt", "w5 w90 w17 w300", "--max-new-tokens", "24", "--dtype", "float32"];
        let output = xorl(1, &[&["generate", "--adapter", &adapter], &prompt[..], more].concat());
        succeeded(&output);
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap())
    }

    /// The tensors of the weight file in `folder` by name.
    fn weights(&self, folder: &str) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
        let bytes = fs::read(PathBuf::from(self.at(folder)).join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
            (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))
        };
        file.iter().map(tensor).collect()
    }
}

fn near(a: &[[f64; 2]], b: &[[f64; 2]], what: &str) {
    assert_eq!((a.len(), b.len()), (STEPS, STEPS), "{what}");
    for (step, (a, b)) in a.iter().flatten().zip(b.iter().flatten()).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b, "{what}, step {}: {a}, expected {b}", step / 2 + 1);
    }
}

#[test]
fn mpi_python_quantised_checkpoints_train_merge_and_generate_as_their_numbers_do() {
    let files = Files::new();
    let mut triples = Vec::new();
    for (format, _) in FORMATS {
        let of = |kind: &str| format!("{format}_{kind}");
        let packing = ["--lora.enable_qlora", "true", "--lora.quant_format", format];
        let plain = files.train(&of("plain"), &of("run_plain"), &[]);
        near(&files.train(format, &of("run_files"), &packing), &plain, &format!("{format} files"));
        near(&files.train("plain", &of("run"), &packing), &plain, &format!("{format} while loading"));

        // Into the numbers that it was trained on, packed again and not; of a base that is packed in its files, too.
        let said = files.merge(1, &of("run"), &of("base"), &[]);
        assert!(said.contains(&format!("the base that it was trained on, in {format}")), "{said}");
        files.merge(2, &of("run_files"), &of("base_files"), &[]);
        assert!(files.weights(&of("base")) == files.weights(&of("base_files")), "{format}");
        files.merge(2, &of("run"), &of("fp32"), &["--dtype", "float32"]);
        // The base of its files in plain numbers is another one.
        let original = ["--onto", "original", "--model", &files.at("plain"), "--dtype", "float32"];
        let said = files.merge(1, &of("run"), &of("original"), &original);
        assert!(
            said.contains(&format!("has in {format}; the sum with those of its files was never trained")),
            "{said}"
        );
        assert!(files.weights(&of("original")) != files.weights(&of("fp32")), "{format}");
        for merged in ["base", "fp32"] {
            triples.extend([format.to_owned(), files.step(&of("run")), files.at(&of(merged))]);
        }

        let [packed, _] = files.generate(&of("run"), &[]);
        let [expected, warned] = files.generate(&of("run"), &["--model", &files.at(&of("plain"))]);
        assert_eq!(packed, expected, "{format}: generate");
        assert!(warned.contains("was trained on another base, packed"), "{warned}");
    }
    let root = files.at("");
    let words = [vec!["compare", &root], triples.iter().map(String::as_str).collect()].concat();
    let found = Files::oracle(&words);
    assert_eq!(found.len(), 2 * FORMATS.len());
    for (pair, (format, method)) in found.chunks(2).zip(FORMATS) {
        for (line, method) in pair.iter().zip([json!(method), Value::Null]) {
            assert_eq!(line["method"], method, "{format}");
            let [apart, largest] = ["apart", "largest"].map(|field| line[field].as_f64().unwrap());
            let others = line["others"].as_u64().unwrap();
            assert!(
                others <= 3 && (others > 0 || apart < 1e-5 * largest.max(1.0)),
                "{format} {method}: {line}"
            );
        }
    }
}
