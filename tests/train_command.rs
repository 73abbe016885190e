//! The program as users start it: two ranks leave what one leaves, PEFT loads it and computes our loss, and what
//! is wrong ends every rank with exit code 2, one line, and nothing written.

mod common;

use common::{failed, make_rows, metrics, python, succeeded, xorl};
use serde_json::json;
use std::{path::Path, process::Command};

/// A tiny random Qwen3 model made by ours is not independent; transformers makes this one.
fn make_model(directory: &Path) {
    let script = "import sys, torch\nfrom transformers import Qwen3Config, Qwen3ForCausalLM\ntorch.manual_seed(3)\n\
        c = Qwen3Config(vocab_size=503, hidden_size=48, intermediate_size=80, num_hidden_layers=2, \
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15)\n\
        Qwen3ForCausalLM(c).float().save_pretrained(sys.argv[1])";
    let made = Command::new(python()).args(["-c", script]).arg(directory).status();
    assert!(made.expect("launch/setup.sh makes .venv").success());
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
    std::fs::write(&path, yaml).unwrap();
    path
}

#[test]
fn mpi_trains_saves_and_peft_computes_our_loss() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    make_model(&folder.path().join("model"));
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
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/peft_loss.py");
    let peft =
        // The base that was saved beside the adapter is the one that transformers loads here.
        Command::new(python()).arg(script).args([&format!("{step}/model"), &step, &at("rows.jsonl")]).output().unwrap();
    succeeded(&peft);
    let theirs: f64 = String::from_utf8_lossy(&peft.stdout).trim().parse().unwrap();
    assert!((ours - theirs).abs() < 1e-5 * theirs, "ours {ours}, PEFT {theirs}");

    // A run directory with steps is never trained over.
    let again = xorl(2, &["--config", &packed]);
    assert!(failed(&again, 2).contains("holds steps of an earlier run"));
}

#[test]
fn mpi_wrong_input_ends_all_ranks_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    make_model(&folder.path().join("model"));
    make_rows(&folder.path().join("rows.jsonl"));
    let good = config(folder.path(), "none");
    let broken_rows = folder.path().join("broken.jsonl");
    std::fs::write(&broken_rows, "{\"input_ids\": [1, 2], \"labels\": [1, 2]}\n{\"input_ids\": [1, 9999]}\n")
        .unwrap();
    let datasets = json!([{"path": broken_rows, "type": "tokenized"}]).to_string();
    let cases: &[(&[&str], &str)] = &[
        (&["--model.model_path", "/nowhere"], "/nowhere"),
        (&["--lora.lora_target_modules", "w1"], "w1 matches nothing"),
        (&["--train.data_parallel_shard_size", "3"], "3"),
        (&["--train.lr", "fast"], "fast"),
        (&["--train.laerning_rate", "1"], "laerning_rate"),
        (&["--data.datasets", &datasets], "broken.jsonl:2"),
        (&["--lora.adapter_path", "/nowhere"], "/nowhere"),
        (&["--train.load_checkpoint_path", "/nowhere"], "/nowhere is not a whole step"),
        (&["--device", "cuda"], "not built yet"),
    ];
    for (arguments, word) in cases {
        let output = xorl(2, &[&["--config", &good], *arguments].concat());
        let line = failed(&output, 2);
        assert!(line.contains(word), "{arguments:?}: {line}");
        assert!(!folder.path().join("out").exists(), "{arguments:?} wrote something");
    }
}
