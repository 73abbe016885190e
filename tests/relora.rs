//! Adapters that are merged into the base during training: as PEFT does it, in any topology, and over a resume.

use crate::common::{
    failed, metrics, python, relative, succeeded,
    tiny::{TinyRun, adapter, differences},
    xorl,
};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};
use xorl_dist::{
    checkpoint::publish,
    dtype::DType,
    rng::Stream,
    weights::{SafetensorsSource, WeightSource},
};

const STEPS: usize = 20;

/// Every value of the model in `folder`, tensor by tensor.
fn base(folder: &Path) -> Vec<(String, Vec<f32>)> {
    let source = SafetensorsSource::open(folder).unwrap();
    let read = |name: String| {
        let mut values = vec![0f32; source.meta(&name).unwrap().shape.iter().product()];
        source.read(&name, 0..values.len(), DType::F32, bytemuck::cast_slice_mut(&mut values)).unwrap();
        (name, values)
    };
    source.names().into_iter().map(read).collect()
}

/// A model of transformers with an adapter of PEFT, and the runs that train it.
struct Case {
    folder: tempfile::TempDir,
    targets: &'static str,
}

impl Case {
    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn oracle(arguments: &[String]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/peft_reference.py");
        let output = Command::new(python()).arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output();
        succeeded(&output.unwrap());
    }

    fn new(class: &str, fields: &str, made: &[&str], targets: &'static str) -> Self {
        let case = Self { folder: tempfile::tempdir().unwrap(), targets };
        let script = format!(
            "import torch, transformers\ntorch.manual_seed(3)\nc = transformers.{class}Config(vocab_size=503, \
             hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, \
             head_dim=16, initializer_range=0.15, {fields})\n\
             transformers.{class}ForCausalLM(c).float().save_pretrained({:?})\n",
            case.at("model")
        );
        succeeded(&Command::new(python()).args(["-c", &script]).output().unwrap());
        let make = [
            "make-adapter",
            &case.at("model"),
            &case.at("start"),
            "--rank",
            "4",
            "--alpha",
            "8",
            "--b-std",
            "0.05",
        ];
        Self::oracle(&make.iter().chain(made).map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let row = |i: u64| {
            let stream = Stream::new(11, &format!("row {i}"));
            let ids: Vec<u64> = (0..5 + i % 9).map(|j| stream.below(j, 503)).collect();
            json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
        };
        fs::write(case.at("rows.jsonl"), (0..4 * STEPS as u64).map(row).collect::<String>()).unwrap();
        let yaml = format!(
            "model: {{model_path: {}}}\ndata:\n  datasets: [{{path: {}, type: tokenized}}]\n  sample_packing_method: none\n\
             \x20 shuffle_merged_datasets: false\n  shuffle_before_merging_datasets: false\n\
             train: {{global_batch_size: 4, micro_batch_size: 2, lr: 3e-3, weight_decay: 0, \
             max_grad_norm: 1, enable_mixed_precision: false, save_steps: 5, save_total_limit: null, num_train_epochs: 1, \
             lr_decay_style: constant}}\n\
             lora: {{lora_rank: 4, lora_alpha: 8, adapter_path: {}, lora_target_modules: [{targets}], merge_lora_interval: 5}}\n",
            case.at("model"),
            case.at("rows.jsonl"),
            case.at("start")
        );
        fs::write(case.at("run.yaml"), yaml).unwrap();
        case
    }

    fn run(&self, ranks: usize, out: &str, more: &[&str]) -> Vec<Value> {
        let (config, out) = (self.at("run.yaml"), self.at(out));
        succeeded(&xorl(ranks, &[&["--config", &config, "--train.output_dir", &out], more].concat()));
        metrics(Path::new(&out))
    }

    fn step(&self, out: &str, step: usize) -> PathBuf {
        self.folder.path().join(out).join(format!("weights/run/step_{step}"))
    }

    /// Trains in several topologies `worlds` and in PEFT, and compares losses, norms and the merged base, which is
    /// `packed` in a format or plain.
    fn equals_peft(&self, worlds: &[(usize, &[&str])], reset: bool, packed: Option<&str>) {
        let name = |of: &str| format!("{}{of}", packed.unwrap_or_default());
        let packing = packed.map(|format| ["--lora.enable_qlora", "true", "--lora.quant_format", format]);
        let resetting = ["--lora.reset_optimizer_on_merge", "true", "--lora.merge_warmup_steps", "3"];
        let ours: Vec<Vec<Value>> = worlds
            .iter()
            .enumerate()
            .map(|(i, (ranks, more))| {
                let packing = packing.as_ref().map_or(&[][..], |words| &words[..]);
                let resetting = if reset { &resetting[..] } else { &[] };
                self.run(*ranks, &name(&i.to_string()), &[*more, resetting, packing].concat())
            })
            .collect();
        let rates: Vec<String> = ours[0].iter().map(|line| line["lr"].to_string()).collect();
        if reset {
            let of = |step: usize| rates[step].parse::<f64>().unwrap();
            assert!((of(5) * 3.0 - of(4)).abs() < 1e-12 && (of(7) - of(4)).abs() < 1e-12, "{rates:?}");
        }
        let out = self.at(&name("theirs"));
        let mut words: Vec<String> =
            ["train", &self.at("model"), &out, "--rows", &self.at("rows.jsonl"), "--adapter"]
                .map(str::to_owned)
                .to_vec();
        let fresh = self.step(&name("0"), 0).display().to_string();
        words.extend([
            self.at("start"),
            "--rows-per-step".into(),
            "4".into(),
            "--lr".into(),
            rates.join(","),
        ]);
        words.extend([
            "--merge-every".into(),
            "5".into(),
            "--fresh".into(),
            fresh.trim_end_matches('0').to_owned(),
        ]);
        words.extend(["--merged".into(), self.at(&name("merged"))]);
        words.extend(packed.into_iter().flat_map(|format| ["--packed".into(), format.to_owned()]));
        words.extend(reset.then(|| "--reset".to_owned()));
        Self::oracle(&words);
        let theirs: Value =
            serde_json::from_str(&fs::read_to_string(format!("{out}.json")).unwrap()).unwrap();
        let (start, expected) =
            (base(&PathBuf::from(self.at("model"))), base(&PathBuf::from(self.at(&name("merged")))));
        for (i, (lines, (ranks, more))) in ours.iter().zip(worlds).enumerate() {
            let place = format!("{} on {ranks} ranks {more:?} {packed:?}", self.targets);
            for (step, line) in lines.iter().enumerate() {
                for (field, theirs) in
                    [("loss", &theirs["losses"][step]), ("grad_norm", &theirs["grad_norms"][step])]
                {
                    let (a, b) = (line[field].as_f64().unwrap(), theirs.as_f64().unwrap());
                    // A number that lies between two codes may get the other one.
                    let limit = if packed.is_some() { 1e-4 } else { 1e-5 };
                    assert!((a - b).abs() <= limit * b, "{place}, step {}: {field} {a}, PEFT {b}", step + 1);
                }
            }
            let found = base(&self.step(&name(&i.to_string()), STEPS).join("model"));
            assert_eq!(found.len(), expected.len());
            let mut changed = 0;
            for (((name, found), (other, expected)), (_, start)) in found.iter().zip(&expected).zip(&start) {
                assert_eq!(name, other);
                let moved =
                    |values: &[f32]| values.iter().zip(start).map(|(a, b)| a - b).collect::<Vec<f32>>();
                if expected == start {
                    assert!(found == start, "{place}: {name} was not to change");
                    continue;
                }
                changed += 1;
                let apart = relative(&moved(found), &moved(expected));
                assert!(
                    apart < if packed.is_some() { 0.03 } else { 1e-4 },
                    "{place}: {name} is {apart} of its change apart"
                );
            }
            assert!(changed > 0);
            // B is zero after the last merge, so the model/ is what was trained.
            let last = adapter(&self.step(&name(&i.to_string()), STEPS));
            let is_zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
            assert!(last.iter().all(|(name, values)| is_zero(values) == name.contains("lora_B")));
        }
    }
}

#[test]
fn mpi_python_merges_of_dense_adapters_equal_those_of_peft() {
    let targets = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
    let case = Case::new("Qwen3", "tie_word_embeddings=False", &[], targets);
    let split = ["--lora.unfuse_for_lora", "true"];
    case.equals_peft(&[(1, &[]), (2, &[]), (2, &split)], true, None);
    case.equals_peft(&[(1, &[]), (2, &[])], false, Some("nvfp4"));
    // The last step answers without --model, and not on the base that it was not trained on.
    let step = case.step("0", STEPS).display().to_string();
    let line =
        failed(&xorl(1, &["generate", "--adapter", &step, "--model", &case.at("model"), "--prompt", "a"]), 2);
    assert!(line.contains("was trained on a base that merges have changed"), "{line}");
    let again = [
        "--config",
        &case.at("run.yaml"),
        "--train.output_dir",
        &case.at("again"),
        "--lora.adapter_path",
        &step,
    ];
    let line = failed(&xorl(1, &again), 2);
    assert!(line.contains("was trained on a base that merges have changed: give "), "{line}");
    let out = case.at("one");
    let merged = xorl(1, &["merge", "--adapter", &step, "--out", &out]);
    succeeded(&merged);
    assert!(String::from_utf8_lossy(&merged.stdout).contains("the adapter is zero: the model is the base"));
    assert_eq!(base(Path::new(&out)), base(&Path::new(&step).join("model")));
}

#[test]
fn mpi_python_merges_of_experts_equal_those_of_peft() {
    let fields = "num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, \
                  decoder_sparse_step=1, mlp_only_layers=[]";
    let made =
        ["--targets", "q_proj,o_proj", "--parameters", "mlp.experts.gate_up_proj,mlp.experts.down_proj"];
    let case = Case::new("Qwen3Moe", fields, &made, "q_proj, o_proj, gate_up_proj, down_proj");
    let divided = ["--train.expert_parallel_size", "2"];
    case.equals_peft(&[(1, &[]), (2, &[]), (2, &divided)], false, None);
    case.equals_peft(&[(1, &[]), (2, &divided)], true, Some("nf4"));
}

/// Runs 20 steps with merges at 6, 12 and 18 and after the last, and again from step 10, which is between two: nothing
/// may differ but the paths of the two runs.
fn second_half_is_bit_identical(run: &TinyRun, ranks: usize, more: &[&str]) {
    let merging = "--lora.merge_lora_interval 6 --lora.merge_at_end true --lora.reset_optimizer_on_merge true \
                   --lora.merge_warmup_steps 2";
    let more = [&merging.split_whitespace().collect::<Vec<_>>()[..], more].concat();
    succeeded(&run.run(ranks, "whole", &more));
    run.interrupted("whole", "half", 10);
    succeeded(&run.run(ranks, "half", &[&["--train.load_checkpoint_path", "auto"], &more[..]].concat()));
    assert_eq!(run.story("whole"), run.story("half"));
    for step in [5, 10, 15, 20] {
        publish::verify(&run.step("half", step)).unwrap();
        let mut different = differences(&run.step("whole", step), &run.step("half", step));
        // base_model_name_or_path has the output directory in it.
        different.retain(|file| !file.ends_with("adapter_config.json") && !file.ends_with("manifest.json"));
        assert!(different.is_empty(), "step {step}: {different:?}");
        assert_eq!(run.step("half", step).join("model").is_dir(), step > 5, "step {step}");
    }
}

#[test]
fn resumed_between_merges_is_bit_identical() {
    let run = TinyRun::new();
    second_half_is_bit_identical(
        &run,
        1,
        &["--lora.lora_target_modules", "q_proj", "v_proj", "gate_up_proj", "down_proj"],
    );
    // Steps between two merges share the files of their base.
    let more = ["--lora.merge_lora_interval", "5", "--train.save_steps", "2", "--train.max_steps", "8"];
    succeeded(&run.run(1, "links", &more));
    let inode =
        |step: usize| fs::metadata(run.step("links", step).join("model/model.safetensors")).unwrap().ino();
    assert_eq!(inode(6), inode(8));
    let config = fs::read_to_string(run.step("links", 8).join("adapter_config.json")).unwrap();
    assert!(config.contains(&run.step("links", 8).join("model").display().to_string()), "{config}");
}

#[test]
fn mpi_resumed_between_merges_in_bf16_over_experts_is_bit_identical() {
    let more = ["--train.enable_mixed_precision", "true", "--train.expert_parallel_size", "2"];
    let more =
        [&more[..], &["--lora.moe_hybrid_shared_lora", "true", "--train.global_batch_size", "7"]].concat();
    second_half_is_bit_identical(&TinyRun::of_experts(), 4, &more);
}

/// In every format a resume between merges gives the bytes of the uninterrupted run, on ranks whose borders cut
/// matrices; one rank has the same losses and the same base.
#[test]
fn mpi_merges_into_packed_bases_are_those_of_one_rank_and_resume_bit_identically() {
    for (format, has_experts) in [("nf4", false), ("block_fp8", true), ("nvfp4", true)] {
        let run = if has_experts { TinyRun::of_experts() } else { TinyRun::new() };
        // An expert's down_proj has 24 columns, which files in nvfp4 cannot hold.
        let fixed = ["--train.global_batch_size", "4", "--lora.enable_qlora", "true", "--lora.quant_format"];
        let all = [&fixed[..], &[format]].concat();
        let excluding = ["--lora.exclude_modules", "down_proj"];
        let packing = [&all[..], if format == "nvfp4" { &excluding } else { &[] }].concat();
        if format == "nvfp4" {
            let merging = ["--lora.merge_at_end", "true"];
            let line = failed(&run.run(1, "refused", &[&all[..], &merging].concat()), 2);
            let words = "layers.1.mlp.experts.down_proj has 24 columns, no multiple of 16";
            assert!(line.contains(words), "{line}");
        }
        let divided = ["--train.expert_parallel_size", "2"];
        let ranks = if has_experts { [&packing[..], &divided].concat() } else { packing.clone() };
        second_half_is_bit_identical(&run, 2, &ranks);
        let merging = "--lora.merge_lora_interval 6 --lora.merge_at_end true --lora.reset_optimizer_on_merge true \
                       --lora.merge_warmup_steps 2";
        let merging: Vec<&str> = merging.split_whitespace().collect();
        succeeded(&run.run(1, "one", &[&merging[..], &packing].concat()));
        for (one, two) in run.story("one").iter().zip(run.story("whole")) {
            let [a, b] = [one, &two].map(|line| line["loss"].as_f64().unwrap());
            assert!(
                (a - b).abs() <= 1e-4 * a,
                "{format}: {} of one rank, {} of two",
                one["loss"],
                two["loss"]
            );
        }
        let [one, two] = ["one", "whole"].map(|out| base(&run.step(out, STEPS).join("model")));
        let start = base(&run.step("one", 10).join("model"));
        let mut changed = 0;
        for (((name, one), (_, two)), (_, start)) in one.iter().zip(&two).zip(&start) {
            assert!(relative(one, two) < 2e-3, "{format}: {name} is {} apart", relative(one, two));
            changed += usize::from(one != start);
        }
        assert!(changed >= 8, "{format}: {changed} tensors are merged");
        let config: Value = serde_json::from_str(
            &fs::read_to_string(run.step("one", STEPS).join("model/config.json")).unwrap(),
        )
        .unwrap();
        let method = &config["quantization_config"]["quant_method"];
        assert_eq!(
            method,
            match format {
                "nf4" => "bitsandbytes",
                "block_fp8" => "fp8",
                _ => "modelopt",
            }
        );
    }
}
