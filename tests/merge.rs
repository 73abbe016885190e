//! `xorl-dist merge`: a merged model is base and adapter, says what rounding lost, and is there whole or not at all.

use crate::common::{
    failed, python, ranks_of, succeeded,
    tiny::{TinyRun, differences},
    xorl,
};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use xorl_dist::checkpoint::publish;

#[derive(Deserialize)]
struct Case {
    name: String,
    model: PathBuf,
    adapter: PathBuf,
}

fn oracle(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/merge.py");
    let output =
        Command::new(python()).arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output().unwrap();
    succeeded(&output);
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Merges into `out`, and returns stdout and stderr.
fn merge(ranks: usize, adapter: &Path, out: &Path, more: &[&str]) -> [String; 2] {
    let output = xorl(ranks, &[&["merge", "--adapter", &text(adapter), "--out", &text(out)], more].concat());
    succeeded(&output);
    publish::verify(out).unwrap();
    [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap())
}

/// The part of all deltas that was lost.
fn share(said: &str) -> f64 {
    let (before, _) = said.split_once(" of all deltas together").unwrap();
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

fn refused(code: i32, arguments: &[&str]) -> String {
    failed(&xorl(1, &[&["merge"], arguments].concat()), code)
}

#[test]
fn mpi_python_a_merged_model_is_base_and_adapter_of_peft() {
    let folder = tempfile::tempdir().unwrap();
    let root = text(folder.path());
    oracle(&["make", &root]);
    let cases: Vec<Case> =
        serde_json::from_str(&fs::read_to_string(folder.path().join("cases.json")).unwrap()).unwrap();
    let mut pairs = Vec::new();
    for Case { name, model, adapter } in &cases {
        let at = |kind: &str| folder.path().join(format!("{name}_{kind}"));
        let [one, two] = ["one", "two"].map(at);
        let [said, warned] = merge(1, adapter, &one, &["--model", &text(model)]);
        assert!(
            said.contains(&format!("onto {}, the base that it was trained on", model.display())),
            "{said}"
        );
        merge(2, adapter, &two, &["--model", &text(model)]);
        assert_eq!(differences(&one, &two), Vec::<PathBuf>::new(), "{name}: 2 ranks");
        if name == "tiny" {
            // Attention and MLP of both layers: bf16 has no room for such a delta, and fp32 has.
            assert!(share(&said) > 0.99 && said.contains("  1.000  model.layers."), "{said}");
            assert!(warned.contains("more than half of the delta in 14 tensors"), "{warned}");
            let [said, warned] =
                merge(1, adapter, &at("fp32"), &["--model", &text(model), "--dtype", "float32"]);
            assert!(share(&said) < 0.05 && !warned.contains("rounding loses"), "{said}{warned}");
            pairs.extend([name.clone(), text(&at("fp32"))]);
        } else {
            assert!(!warned.contains("rounding loses"), "{warned}");
            pairs.extend([name.clone(), text(&one)]);
        }
        for file in ["generation_config.json", "tokenizer.json", "chat_template.jinja"] {
            assert_eq!(fs::read(one.join(file)).unwrap(), fs::read(model.join(file)).unwrap(), "{file}");
        }
    }
    // fp32 weights in bf16, and a config that says so.
    let half = folder.path().join("to_bf16");
    merge(2, &cases[0].adapter, &half, &["--model", &text(&cases[0].model), "--dtype", "bfloat16"]);
    pairs.extend([cases[0].name.clone(), text(&half)]);
    let found =
        oracle(&[&["compare", &root], &pairs.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
    let found: Vec<Value> = found.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(found.len(), cases.len() + 1);
    for (found, path) in found.iter().zip(pairs.iter().skip(1).step_by(2)) {
        let number = |field: &str| found[field].as_f64().unwrap();
        let is_half = path.ends_with("bf16") || path.ends_with("bf16_one");
        assert_eq!(found["dtype"], if is_half { "torch.bfloat16" } else { "torch.float32" }, "{path}");
        if is_half {
            assert!(number("steps") <= 1.001 && number("steps") > 0.1, "{path}: {found}");
        } else {
            assert!(
                number("logits") < 1e-5 * number("largest").max(1.0) && number("steps") < 1e-2,
                "{path}: {found}"
            );
        }
    }
}

/// The tensors of the weight files in `folder` by name, as bytes.
fn weights(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
}

#[test]
fn every_format_of_experts_makes_the_same_model() {
    let run = TinyRun::of_experts();
    let step = |format: &str| {
        let more = format!(
            "--train.max_steps 1 --lora.save_lora_only false --lora.lora_target_modules q_proj gate_proj up_proj \
             down_proj --lora.moe_hybrid_shared_lora true --lora.lora_export_format {format}"
        );
        succeeded(&run.run(1, format, &more.split_whitespace().collect::<Vec<_>>()));
        run.step(format, 1)
    };
    let merged = |format: &str| {
        let (step, out) = (step(format), run.at(&format!("{format}-merged")));
        let [said, _] = merge(1, &step, &out, &[]);
        assert!(
            said.contains(&format!("onto {}/model, the base that it was trained on", step.display())),
            "{said}"
        );
        let (base, merged) = (weights(&step.join("model")), weights(&out));
        let changed = |part: &str| {
            base.iter().filter(|(name, bytes)| name.contains(part) && merged[*name] != **bytes).count()
        };
        // 12 experts of one layer, the MLP of the other, and q of both.
        assert_eq!((changed("experts"), changed("")), (36, 36 + 3 + 2));
        merged
    };
    let peft = merged("peft");
    for format in ["per_expert", "sglang_shared_outer"] {
        assert!(merged(format) == peft, "{format}");
    }
}

/// An adapter whose delta lies far below the steps of 4-bit codes: as good as nothing of it is left, and the report
/// says so by tensor. In fp32 all of it is.
#[test]
fn a_small_delta_is_erased_by_four_bits_and_said_to_be() {
    let run = TinyRun::new();
    let tiny = "--train.max_steps 1 --train.lr_min 0 --train.lr 1e-9 --lora.lora_b_init_std 1e-6 --lora.save_lora_only false \
                --lora.enable_qlora true --lora.quant_format nf4";
    succeeded(&run.run(1, "out", &tiny.split_whitespace().collect::<Vec<_>>()));
    let step = run.step("out", 1);
    let [said, warned] = merge(1, &step, &run.at("nf4"), &[]);
    assert!(share(&said) > 0.9 && said.contains("in nf4"), "{said}");
    assert!(said.lines().filter(|line| line.contains("  model.layers.")).count() == 5, "{said}");
    assert!(warned.contains("more than half of the delta in"), "{warned}");
    let [said, warned] = merge(2, &step, &run.at("fp32"), &["--dtype", "float32"]);
    assert!(share(&said) < 0.1 && !warned.contains("rounding loses"), "{said}{warned}");
    // Hardly any code is another one than before: those of the largest elements, which change the scale of a block.
    let untouched = run.at("untouched");
    let zero = "--train.max_steps 1 --train.lr_min 0 --train.lr 1e-30 --lora.lora_b_init_std 0 --lora.save_lora_only false \
                --lora.enable_qlora true --lora.quant_format nf4";
    succeeded(&run.run(1, "zero", &zero.split_whitespace().collect::<Vec<_>>()));
    merge(1, &run.step("zero", 1), &untouched, &[]);
    let [before, after] = [untouched, run.at("nf4")].map(|folder| weights(&folder));
    let codes = |name: &str| name.ends_with("_proj.weight");
    for (name, bytes) in before.iter().filter(|(name, _)| codes(name)) {
        let other = bytes.iter().zip(&after[name]).filter(|(a, b)| a != b).count();
        assert!(other * 1000 <= bytes.len(), "{name}: {other} of {} bytes", bytes.len());
    }
}

fn with<'a>(first: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [first, more].concat()
}

#[test]
fn what_cannot_be_merged_is_refused_and_nothing_is_written() {
    let run = TinyRun::new();
    let saving = ["--train.max_steps", "1", "--lora.save_lora_only", "false"];
    succeeded(&run.run(1, "out", &saving));
    succeeded(&run.run(1, "other", &[&saving[..], &["--train.seed", "7"]].concat()));
    let step = run.step("out", 1);
    let (adapter, out) = (text(&run.at("out")), text(&run.at("merged")));
    let other = text(&run.step("other", 1).join("model"));
    let of_step = ["--adapter", &adapter, "--out", &out];
    // The step has its base, so --model counts only when the original is asked for.
    let [said, _] = merge(1, &step, &run.at("own"), &["--model", &other]);
    assert!(said.contains(&format!("onto {}/model", step.display())), "{said}");
    let [said, warned] = merge(1, &step, &run.at("there"), &["--model", &other, "--onto", "original"]);
    assert!(said.contains(&format!("onto {other}, the original base")), "{said}");
    assert!(warned.contains("was trained on another base"), "{warned}");
    fs::rename(step.join("model"), run.at("base")).unwrap();
    let base = text(&run.at("base"));
    for (arguments, words) in [
        (with(&of_step, &["--model", &other]), "was trained on another base than"),
        (with(&of_step, &["--model", &adapter]), "config.json"),
        (with(&of_step, &[]), "which is no folder here; give --model DIR"),
        (with(&of_step, &["--onto", "original"]), "--onto original goes with --model"),
        (with(&of_step, &["--model", &base, "--device", "cuda"]), "merge computes on the CPU"),
        (vec!["--adapter", "nowhere", "--model", &base], "no such folder"),
        (vec!["--adapter", &adapter, "--model", &base, "--out", &base], "exists already"),
    ] {
        let line = refused(2, &arguments);
        assert!(line.contains(words), "{line}");
    }
    // Files that may grow no more, as on a full disk.
    let mut command = ranks_of(Path::new("bash"), 1);
    command.args([
        "-c",
        "trap '' XFSZ; ulimit -f 100; exec \"$@\"",
        "--",
        env!("CARGO_BIN_EXE_xorl-dist"),
        "merge",
    ]);
    let line = failed(&command.args(with(&of_step, &["--model", &base])).output().unwrap(), 1);
    assert!(line.contains("model.safetensors: File too large"), "{line}");
    let left: Vec<_> = fs::read_dir(run.at("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|name| name == "merged" || name.to_string_lossy().starts_with(".tmp")),
        "{left:?}"
    );
    let [said, _] = merge(1, &step, Path::new(&out), &["--model", &base]);
    assert!(said.contains("the base that it was trained on"), "{said}");
}
