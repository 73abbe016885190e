//! The program as users start it: two ranks leave what one leaves, PEFT loads it and computes our loss, and what
//! is wrong ends every rank with exit code 2, one line, and nothing written.

use crate::common::{failed, floats, make_rows, metrics, python, relative, succeeded, tiny::TinyRun, xorl};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tch::{Device, Tensor};
use xorl_dist::{
    checkpoint::peft::AdapterFolder,
    comm::World,
    model::{
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        transformer::{Batch, Transformer},
    },
    shard::ProcessGroups,
    weights::SafetensorsSource,
};

/// PEFT's, in the folder of a step.
const LOGITS: &str = "logits.safetensors";

/// A tiny random model made by ours is not independent; transformers makes these, each of an architecture with more of
/// its config's fields.
fn make_models(models: &[(PathBuf, &str, &str)]) {
    let model = |(directory, architecture, fields): &(PathBuf, &str, &str)| {
        format!(
            "torch.manual_seed(3)\nc = transformers.{architecture}Config(vocab_size=503, hidden_size=48, intermediate_size=80, \
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, {fields})\n\
            transformers.{architecture}ForCausalLM(c).float().save_pretrained({directory:?})\n"
        )
    };
    let script = format!("import torch, transformers\n{}", models.iter().map(model).collect::<String>());
    let made = Command::new(python()).args(["-c", &script]).status();
    assert!(made.expect("launch/setup.sh makes .venv").success());
}

fn make_qwen3(directory: &Path) {
    make_models(&[(directory.to_owned(), "Qwen3", "head_dim=16")]);
}

fn config(folder: &Path, packing: &str) -> String {
    let folder = folder.display();
    let yaml = format!(
        "model:\n  model_path: {folder}/model\ndata:\n  datasets:\n    - path: {folder}/rows.jsonl\n      type: tokenized\n\
        \x20 sample_packing_method: {packing}\n  sample_packing_sequence_len: 32\ntrain:\n  output_dir: {folder}/out\n\
        \x20 lr: 2e-3\n  global_batch_size: 5\n  micro_batch_size: 2\n  enable_mixed_precision: false\nlora:\n\
        \x20 lora_rank: 4\n  lora_alpha: 8\n  lora_b_init_std: 0.05\n  lora_target_modules: [qkv_proj, o_proj, gate_up_proj, down_proj]\n"
    );
    let path = format!("{folder}/{packing}.yaml");
    fs::write(&path, yaml).unwrap();
    path
}

/// A folder with `model` and `rows.jsonl`, the base that PEFT takes, and a step.
type Judged = (PathBuf, PathBuf, PathBuf);

/// The mean loss of each folder's rows with the adapter of the step on the base, by PEFT, which leaves its logits in
/// the step; and holds our logits to them.
fn peft_losses(judged: &[Judged]) -> Vec<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/peft_loss.py");
    let mut peft = Command::new(python());
    peft.arg(script);
    for (folder, base, step) in judged {
        peft.args([base, step, &folder.join("rows.jsonl"), &step.join(LOGITS)]);
    }
    let output = peft.output().unwrap();
    succeeded(&output);
    judged.iter().for_each(|(folder, _, step)| our_logits_are_theirs(folder, step));
    let losses = String::from_utf8_lossy(&output.stdout).lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(Vec::len(&losses), judged.len());
    losses
}

/// Holds our logits of every row with the adapter of `step` to PEFT's.
fn our_logits_are_theirs(folder: &Path, step: &Path) {
    let directory = folder.join("model");
    let spec = HfModel::open(&directory).unwrap().spec;
    let stored = AdapterFolder::open(step).unwrap().adapter(&all_projections(&spec)).unwrap();
    let options = Options { slots: 1, vocab_chunk_rows: 100, ..Options::default() };
    let groups = ProcessGroups::one_block(&World::start().unwrap());
    let mut model = Transformer::new(spec, options, &groups).unwrap();
    let mut adapter = model.new_adapter(&stored.sites, stored.shapes);
    model.load(&SafetensorsSource::open(&directory).unwrap()).unwrap();
    adapter.set(|parameter, range| stored.values[&parameter.name][range].to_vec()).unwrap();
    let bytes = fs::read(step.join(LOGITS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (index, line) in fs::read_to_string(folder.join("rows.jsonl")).unwrap().lines().enumerate() {
        let row: Value = serde_json::from_str(line).unwrap();
        let ids: Vec<i64> =
            row["input_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
        let ours =
            model.logits(&Batch::new(&ids, &ids, &[ids.len()], Device::Cpu), &mut [&mut adapter]).unwrap();
        let theirs = floats(&file, &index.to_string());
        let theirs = Tensor::from_slice(&theirs).view([ids.len() as i64, -1]);
        let furthest = (ours - theirs).abs().max().double_value(&[]);
        assert!(furthest < 1e-4, "{}, row {index}: {furthest}", step.display());
    }
}

#[test]
fn python_packed_and_unpacked_documents_give_the_same_gradient() {
    let folder = tempfile::tempdir().unwrap();
    make_qwen3(&folder.path().join("model"));
    make_rows(&folder.path().join("rows.jsonl"));
    // One step of plain gradient descent over all documents, so long that the start is lost in it.
    let trained = |packing: &str| {
        let (config, out) = (config(folder.path(), packing), folder.path().join(format!("out-{packing}")));
        let all = ["--train.max_steps", "1", "--train.global_batch_size", "30", "--train.max_grad_norm", "0"];
        let descent = ["--train.optimizer", "sgd", "--train.lr", "1e4", "--train.weight_decay", "0"];
        let out_dir = ["--train.output_dir", out.to_str().unwrap()];
        succeeded(&xorl(1, &[&["--config", &config], &all[..], &descent[..], &out_dir[..]].concat()));
        let bytes = fs::read(out.join("weights/run/step_1/adapter_model.safetensors")).unwrap();
        (metrics(&out).remove(0), bytes)
    };
    let (unpacked, expected) = trained("none");
    let expected = SafeTensors::deserialize(&expected).unwrap();
    for packing in ["sequential", "multipack"] {
        let (packed, adapter) = trained(packing);
        assert_eq!(packed["tokens"], unpacked["tokens"], "{packing}");
        for field in ["loss", "grad_norm"] {
            let (a, b) = (packed[field].as_f64().unwrap(), unpacked[field].as_f64().unwrap());
            assert!((a - b).abs() < 1e-5 * b, "{packing} {field}: {a}, unpacked {b}");
        }
        let adapter = SafeTensors::deserialize(&adapter).unwrap();
        for name in expected.names() {
            let apart = relative(&floats(&adapter, name), &floats(&expected, name));
            assert!(apart < 1e-4, "{packing} {name}: {apart} apart");
        }
    }
}

/// What is read of adapters on experts, on dense layers among them and on shared experts, is what was trained: every
/// way in which a target can meet them, in every format, by PEFT where it knows that.
#[test]
fn mpi_experts_are_trained_and_peft_computes_our_logits() {
    let shared =
        "num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40";
    let some_dense =
        "head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]";
    let (olmoe, mixtral) =
        ("num_experts=4, num_experts_per_tok=3", "num_local_experts=4, num_experts_per_tok=1");
    let (outer, apart) = ("sglang_shared_outer", "per_expert");
    // The last are the tensors of the file: in PEFT's format, and in others.
    type Case<'a> = (&'a str, &'a str, &'a str, &'a str, usize, &'a [(&'a str, usize)]);
    let cases: [Case; 6] = [
        ("Qwen3Moe", some_dense, "false", "null", 2 * 2 * 4 + 2 * 3 + 4, &[]),
        ("Qwen3Moe", some_dense, "true", "null", 26, &[(apart, 22 + 2 * 3 * 4), (outer, 22 + 2 * 3)]),
        ("Qwen2Moe", shared, "true", "[q_proj, gate_up_proj, down_proj]", 24, &[(outer, 16 + 2 * 2 * 3)]),
        ("Qwen2Moe", shared, "false", "[up_proj, layers.1.*.down_proj]", 12, &[(apart, 6 + 2 * 3 * 6)]),
        ("Mixtral", mixtral, "false", "[gate_proj]", 2 * 2, &[(apart, 2 * 2 * 4)]),
        ("Olmoe", olmoe, "false", "['*.experts.gate_up_proj', o_proj]", 2 * (2 + 2), &[]),
    ];
    let all = tempfile::tempdir().unwrap();
    let folder = |i: usize| all.path().join(i.to_string());
    let models = cases.iter().enumerate().map(|(i, case)| (folder(i).join("model"), case.0, case.1));
    make_models(&models.collect::<Vec<_>>());
    // What PEFT has to load, and what names it.
    let (mut judged, mut names): (Vec<Judged>, Vec<(&str, &str)>) = (Vec::new(), Vec::new());
    for (i, (architecture, _, hybrid, targets, trained, formats)) in cases.into_iter().enumerate() {
        let folder = folder(i);
        make_rows(&folder.join("rows.jsonl"));
        let config = config(&folder, "none");
        let yaml = fs::read_to_string(&config).unwrap();
        fs::write(&config, yaml.replace("[qkv_proj, o_proj, gate_up_proj, down_proj]", targets)).unwrap();
        let two = folder.join("two");
        let arguments =
            ["--config", &config, "--train.max_steps", "4", "--lora.moe_hybrid_shared_lora", hybrid];
        succeeded(&xorl(1, &arguments));
        let over_two = ["--train.output_dir", two.to_str().unwrap(), "--train.expert_parallel_size", "2"];
        succeeded(&xorl(2, &[&arguments[..], &over_two].concat()));
        for (one, two) in metrics(&folder.join("out")).iter().zip(metrics(&two)) {
            for field in ["loss", "grad_norm"] {
                let (a, b) = (one[field].as_f64().unwrap(), two[field].as_f64().unwrap());
                assert!((a - b).abs() < 1e-5 * a, "{architecture} {field}: one rank {a}, two {b}");
            }
            assert_eq!(one["router"]["entropy"], two["router"]["entropy"], "{architecture}");
            assert!(one["router"]["max_over_mean"].as_f64().unwrap() >= 1.0);
        }
        let mut to_be_read = |step: &Path, tensors: usize, format| {
            let bytes = fs::read(step.join("adapter_model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.len(), tensors, "{architecture} {targets} {step:?}");
            // What keeps them apart calls them what the model's files do.
            let named = file.names().iter().any(|key| key.contains(".block_sparse_moe.experts.3.w1.lora_A."));
            assert_eq!(named, architecture == "Mixtral" && tensors > trained, "{step:?}");
            judged.push((folder.clone(), folder.join("model"), step.to_owned()));
            names.push((architecture, format));
        };
        to_be_read(&two.join("weights/run/step_4"), trained, "peft");
        for (format, tensors) in formats {
            let out = folder.join(format);
            let more = ["--train.output_dir", out.to_str().unwrap(), "--lora.lora_export_format", format];
            succeeded(&xorl(2, &[&arguments[..], &more].concat()));
            let step = out.join("weights/run/step_4");
            to_be_read(&step, *tensors, format);
            // A run that starts from it begins where that one ended.
            let from = ["--lora.adapter_path", step.to_str().unwrap(), "--train.output_dir"];
            let next = folder.join("next");
            succeeded(&xorl(
                1,
                &[&arguments[..], &from, &[next.to_str().unwrap(), "--train.overwrite", "true"]].concat(),
            ));
            assert!(metrics(&next)[0]["loss"].as_f64().unwrap() < metrics(&out)[0]["loss"].as_f64().unwrap());
        }
        let over_five = ["check", "--config", &config, "--ranks", "5", "--train.expert_parallel_size", "5"];
        let line = failed(&xorl(1, &over_five), 2);
        assert!(line.contains("5 does not divide the model's"), "{architecture}: {line}");
    }
    let mut in_its_own = f64::NAN;
    for ((architecture, format), loss) in names.into_iter().zip(peft_losses(&judged)) {
        if format == "peft" {
            in_its_own = loss;
        }
        let apart = (loss - in_its_own).abs();
        assert!(apart < 1e-5 * loss, "{architecture} {format}: {loss}, in PEFT's format {in_its_own}");
    }
}

#[test]
fn mpi_trains_saves_and_peft_computes_our_loss() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    make_qwen3(&folder.path().join("model"));
    make_rows(&folder.path().join("rows.jsonl"));
    let packed = config(folder.path(), "multipack");
    succeeded(&xorl(1, &["--config", &packed]));
    let base_too = ["--lora.save_lora_only", "false"];
    succeeded(&xorl(
        2,
        &[&["train", "--config", &packed, "--train.output_dir", &at("two")][..], &base_too].concat(),
    ));
    let (one, two) = (metrics(&folder.path().join("out")), metrics(&folder.path().join("two")));
    assert_eq!(one.len(), two.len());
    for (one, two) in one.iter().zip(&two) {
        for field in ["loss", "grad_norm"] {
            let (a, b) = (one[field].as_f64().unwrap(), two[field].as_f64().unwrap());
            assert!((a - b).abs() < 1e-5 * a, "{field}: one rank {a}, two {b}");
        }
        for field in ["step", "epoch", "lr", "tokens", "tokens_total"] {
            assert_eq!(one[field], two[field], "{field}");
        }
    }

    // The adapter that two ranks saved, once by PEFT and once by ours: one step over all rows tells our loss.
    let last = two.last().unwrap()["step"].as_u64().unwrap();
    let step = at(&format!("two/weights/run/step_{last}"));
    let rows = config(folder.path(), "none");
    succeeded(&xorl(
        1,
        &[
            "--config",
            &rows,
            "--lora.adapter_path",
            &step,
            "--train.global_batch_size",
            "30",
            "--train.output_dir",
            &at("again"),
        ],
    ));
    let ours = metrics(&folder.path().join("again"))[0]["loss"].as_f64().unwrap();
    // The base that was saved beside the adapter is the one that transformers loads here.
    let step = PathBuf::from(step);
    let with_its_base = (folder.path().to_owned(), step.join("model"), step);

    // And with independent leaves, not all of them.
    let leaves = ["--lora.lora_target_modules", "q_proj", "v_proj", "gate_proj", "down_proj"];
    let short = ["--train.max_steps", "2", "--train.output_dir", &at("leaves")];
    succeeded(&xorl(2, &[&["--config", &packed], &leaves[..], &short[..]].concat()));
    let step = folder.path().join("leaves/weights/run/step_2");
    let of_leaves = (folder.path().to_owned(), folder.path().join("model"), step);
    let theirs = peft_losses(&[with_its_base, of_leaves])[0];
    assert!((ours - theirs).abs() < 1e-5 * theirs, "ours {ours}, PEFT {theirs}");

    // A run directory with steps is never trained over.
    let again = xorl(2, &["--config", &packed]);
    assert!(failed(&again, 2).contains("holds steps of an earlier run"));
}

#[test]
fn mpi_wrong_input_ends_all_ranks_with_one_line() {
    let run = TinyRun::new();
    let broken_rows = run.at("broken.jsonl");
    fs::write(&broken_rows, "{\"input_ids\": [1, 2], \"labels\": [1, 2]}\n{\"input_ids\": [1, 9999]}\n")
        .unwrap();
    let datasets = json!([{"path": broken_rows, "type": "tokenized"}]).to_string();
    let cases: &[(&[&str], &str)] = &[
        (&["--model.model_path", "/nowhere"], "/nowhere"),
        (&["--lora.lora_target_modules", "w1"], "w1 matches nothing"),
        (&["--train.data_parallel_shard_size", "3"], "3"),
        (&["--train.expert_parallel_size", "2"], "has no experts to divide"),
        (&["--train.lr", "fast"], "fast"),
        (&["--train.laerning_rate", "1"], "laerning_rate"),
        (&["--data.datasets", &datasets], "broken.jsonl:2"),
        (&["--lora.adapter_path", "/nowhere"], "/nowhere"),
        (&["--train.load_checkpoint_path", "/nowhere"], "/nowhere is not a whole step"),
    ];
    for (arguments, word) in cases {
        let line = failed(&run.run(2, "out", arguments), 2);
        assert!(line.contains(word), "{arguments:?}: {line}");
        assert!(!run.at("out").exists(), "{arguments:?} wrote something");
    }
}

#[test]
fn a_full_disk_behind_stdout_ends_no_training_and_fails_what_only_prints() {
    let run = TinyRun::new();
    let into_full = |arguments: Vec<String>| {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_xorl-dist")).args(arguments).stdout(full).output();
        program.unwrap()
    };
    succeeded(&into_full(run.arguments("out", &[])));
    assert_eq!(*run.steps("out").last().unwrap(), 20);
    let report = into_full(["check".to_owned()].into_iter().chain(run.arguments("other", &[])).collect());
    let line = failed(&report, 1);
    assert!(line.starts_with("error: stdout: No space left on device"), "{line}");
    let runs = into_full(vec!["runs".into(), run.at("out").display().to_string(), "--json".into()]);
    assert!(failed(&runs, 1).contains("not all was printed"));
}

/// With `log_format: progress_bar` (the default) a terminal shows a bar, and a pipe gets lines.
#[test]
fn a_terminal_shows_a_bar() {
    let run = TinyRun::new();
    let on_terminal = |out: &str, more: &[&str]| {
        let words = run.arguments(out, more);
        let line = std::iter::once(env!("CARGO_BIN_EXE_xorl-dist").to_owned()).chain(words);
        let mut script = Command::new("script");
        script.args(["-qec", &line.collect::<Vec<_>>().join(" "), "/dev/null"]).env("TERM", "xterm");
        let output = script.stdin(std::process::Stdio::null()).output().unwrap();
        succeeded(&output);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let seen = on_terminal("bar", &[]);
    assert!(seen.contains("20/20 [") && seen.contains("loss=") && !seen.contains("[STEP"), "{seen}");
    let seen = on_terminal("lines", &["--train.log_format", "structured"]);
    assert!(seen.contains("[STEP 20/20] loss="), "{seen}");
    let piped = run.run(1, "piped", &[]);
    assert!(String::from_utf8_lossy(&piped.stdout).contains("[STEP 20/20] loss="), "{piped:?}");
}
