//! `check` tells what a run would find wrong and what it would cost, without training and without writing anything;
//! what it says of memory is what a run then takes.

use crate::common::{failed, succeeded, xorl};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A run of random rows of 512 tokens; `model` is the model section.
fn write_run(folder: &Path, model: &str, extra: &str) -> PathBuf {
    let path = folder.join("run.yaml");
    let text = format!(
        "model:\n  {model}\ndata:\n  datasets:\n    - path: dummy\n      num_samples: 64\n  max_seq_len: 512\n  \
         sample_packing_method: none\ntrain:\n  output_dir: {}\n  max_steps: 3\n  micro_batch_size: 2\n{extra}",
        folder.join("out").display()
    );
    fs::write(&path, text).unwrap();
    path
}

/// The number behind `name` in a report.
fn figure(report: &str, name: &str) -> u64 {
    let line = report.lines().find_map(|line| line.trim_start().strip_prefix(name));
    let word =
        line.and_then(|rest| rest.split_whitespace().next()).unwrap_or_else(|| panic!("{name}: {report}"));
    word.parse().unwrap()
}

fn check(path: &Path, ranks: usize, arguments: &[&str]) -> String {
    let ranks = ranks.to_string();
    let mut all = vec!["check", "--config", path.to_str().unwrap(), "--ranks", &ranks];
    all.extend(arguments);
    let output = xorl(1, &all);
    succeeded(&output);
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn models_of_8b_and_70b_on_8_ranks_from_their_configuration_alone() {
    for (name, frozen, trainable, largest_layer) in [
        // Meta's own counts, and PEFT's for rank 16 on all linear layers.
        ("llama3_8b", 8_030_261_248u64, 41_943_040u64, 436_240_384u64),
        ("llama3_70b", 70_553_706_496, 207_093_760, 1_711_341_568),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let config = root().join("tests/fixtures").join(name);
        let model = format!("config_path: {}", config.display());
        let report = check(&write_run(folder.path(), &model, ""), 8, &[]);
        assert!(report.contains(&format!("parameters: {frozen} frozen, {trainable} trainable")), "{report}");
        assert!(report.contains("mesh: 8 ranks = replicate 1 × shard 8"), "{report}");
        assert!(report.contains("lora_alpha: 32"), "the resolved configuration is missing: {report}");
        // bf16, an eighth a rank; norms are fp32 and regions are padded to lines.
        let base = figure(&report, "base shards");
        let least = frozen * 2 / 8;
        assert!(base >= least && base < least + least / 1000, "{base}, at least {least}");
        // Two layers and half a gigabyte of vocabulary are whole at a time.
        let slots = figure(&report, "gathered layers and vocabulary");
        let expected = 2 * largest_layer + (512 << 20);
        assert!(slots.abs_diff(expected) < expected / 1000, "{slots}, expected {expected}");
        assert_eq!(figure(&report, "adapter masters and moments"), trainable * 12 / 8);
        assert_eq!(figure(&report, "reduce_scatter/shard"), trainable * 4 / 8 * 7);
        assert!(!folder.path().join("out").exists(), "something was written");
    }
}

/// Qwen3-30B-A3B with 16 experts on each of 8 ranks.
#[test]
fn experts_over_8_ranks_from_their_configuration_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = format!("config_path: {}", root().join("tests/fixtures/qwen3_30b_a3b").display());
    let extra = "  expert_parallel_size: 8\n  gradient_checkpointing_method: recompute_full_layer\n";
    let run = write_run(folder.path(), &model, extra);
    let report = check(&run, 8, &[]);
    // Qwen's own count. An expert has three matrices of 768 × 2048; of 16 on all linear layers each has three adapters.
    let (frozen, of_expert, adapters) = (30_532_122_624u64, 3 * 768 * 2048, 3 * 16 * (768 + 2048));
    let attention = 16 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048));
    let (experts, attentions) = (48 * 128 * adapters, 48 * attention);
    let trainable = experts + attentions;
    assert!(report.contains(&format!("parameters: {frozen} frozen, {trainable} trainable")), "{report}");
    assert!(report.contains("experts over 8"), "{report}");
    // bf16, an eighth a rank.
    let base = figure(&report, "base shards");
    let least = frozen * 2 / 8;
    assert!(base >= least && base < least + least / 1000, "{base}, at least {least}");
    // Of two layers only what is no expert is gathered; the experts of a layer that a rank has are its own.
    let layer = 2 * ((frozen - 2 * 151_936 * 2048) / 48 - 128 * of_expert);
    let slots = figure(&report, "gathered layers and vocabulary");
    let expected = 2 * layer + (512 << 20);
    assert!(slots.abs_diff(expected) < expected / 100, "{slots}, expected {expected}");
    assert_eq!(figure(&report, "adapter masters and moments"), trainable * 12 / 8);
    // Gradients of experts are where they belong already.
    assert_eq!(figure(&report, "reduce_scatter/shard"), attentions * 4 / 8 * 7);
    assert!(!report.contains("expert_shard"), "{report}");
    // 1024 tokens of 8 choices, seven eighths of which travel: there x (twice, as it is computed again) and dy, back y
    // and dx; with a weight and its gradient.
    let rows = 48 * 1024 * 8 / 8 * 7;
    assert_eq!(figure(&report, "all_to_all/expert"), rows * (5 * 2 * 2048 + 3 * 4));
}

/// Each configuration of a quantised base, with the model's config.json in place of its files.
#[test]
fn every_quantised_base_is_planned_with_the_bytes_of_its_format() {
    let models = ["llama3_8b", "qwen3_8b", "qwen3_32b", "qwen3_30b_a3b", "qwen3_235b_a22b"];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut seen = 0;
    for path in fs::read_dir(root().join("configs/local")).unwrap().map(|entry| entry.unwrap().path()) {
        let name = path.file_stem().unwrap().to_str().unwrap();
        if !name.contains("qlora") {
            continue;
        }
        let model = models.into_iter().find(|model| name.starts_with(model)).unwrap();
        let model = root().join("tests/fixtures").join(model);
        let text = fs::read_to_string(&path).unwrap();
        let ranks = text.split_once("mpirun -n ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
        let report = check(
            &path,
            ranks,
            &[
                "--model.model_path",
                "null",
                "--model.config_path",
                model.to_str().unwrap(),
                "--data.datasets",
                r#"[{"path": "dummy", "num_samples": 64}]"#,
                "--train.output_dir",
                out.to_str().unwrap(),
            ],
        );
        let numbers: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
        let [vocabulary, hidden] =
            ["vocab_size", "hidden_size"].map(|field| numbers[field].as_f64().unwrap());
        let frozen = figure(&report, "parameters:") as f64;
        // 1024 weights in 512 bytes of codes and 64 of scales; 128 × 128 in one byte each and a line with their scale.
        let bytes = if text.contains("block_fp8") { 16448.0 / 16384.0 } else { 576.0 / 1024.0 };
        // Embedding and head are bf16, as are norms and routers, which are less than a hundredth.
        let outside = 2.0 * vocabulary * hidden;
        let expected = (outside * 2.0 + (frozen - outside) * bytes) / ranks as f64;
        let base = figure(&report, "base shards") as f64;
        assert!((base / expected - 1.0).abs() < 0.01, "{name}: {base}, expected {expected}");
        seen += 1;
    }
    assert_eq!(seen, 11);
    assert!(!out.exists(), "something was written");
}

#[test]
fn each_way_to_recompute_is_told_with_its_bytes_and_the_choice_fits() {
    let folder = tempfile::tempdir().unwrap();
    let model = format!("config_path: {}", root().join("tests/fixtures/llama3_70b").display());
    let run = write_run(folder.path(), &model, "");
    let methods = ["no_recompute", "selective", "recompute_full_layer"];
    let report = check(&run, 8, &[]);
    let [none, selective, full] = methods.map(|method| figure(&report, &format!("{method} ")));
    assert!(none > selective && selective > full, "{report}");
    let free = figure(&report, "free for each rank ");
    assert!(report.contains("   with 8 on this host\n"), "{report}");
    let choice = report.lines().find(|line| line.starts_with("recompute: ")).unwrap();
    assert_eq!(choice.starts_with("recompute: no_recompute; "), none <= free, "{report}");
    assert_eq!(choice.contains(", and even so a rank may need"), full > free, "{report}");
    for (method, expected) in methods.into_iter().zip([none, selective, full]) {
        let report = check(&run, 8, &["--train.gradient_checkpointing_method", method]);
        let planned = figure(&report, "sum ") + figure(&report, "copies while a step is saved ");
        assert!(expected.abs_diff(planned * 115 / 100) < 10, "{method}: {expected}, {planned} planned");
        assert!(report.contains(&format!("recompute: {method}, as the configuration says")), "{report}");
    }
}

#[test]
fn a_dry_run_says_what_check_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = format!("config_path: {}", root().join("tests/fixtures/llama3_8b").display());
    let run = write_run(folder.path(), &model, "");
    // What is chosen may change with free memory.
    let given = ["--train.gradient_checkpointing_method", "selective"];
    let output = xorl(1, &[&["--config", run.to_str().unwrap(), "--dry-run"], &given[..]].concat());
    succeeded(&output);
    let lasting = |report: &str| {
        let changing = |line: &&str| !line.contains("free for each");
        report.lines().filter(changing).map(str::to_owned).collect::<Vec<_>>()
    };
    let dry = String::from_utf8(output.stdout).unwrap();
    assert_eq!(lasting(&dry), lasting(&check(&run, 1, &given)));
    assert!(!folder.path().join("out").exists(), "something was written");
}

#[test]
fn what_would_stop_a_run_stops_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let model = format!("config_path: {}", root().join("tests/fixtures/llama3_8b").display());
    let run = write_run(folder.path(), &model, "  data_parallel_shard_size: 3\n");
    let run = run.to_str().unwrap();
    let output = xorl(1, &["check", "--config", run, "--ranks", "8"]);
    assert!(failed(&output, 2).contains('3'), "{output:?}");
    let arguments = ["check", "--config", run, "--ranks", "3", "--lora.adapter_path", "/nowhere"];
    assert!(failed(&xorl(1, &arguments), 2).contains("lora.adapter_path"));
    assert!(!folder.path().join("out").exists());
}

/// VmHWM of a run of one rank that saves its first step, less that of one that saves nothing before it.
#[test]
fn copies_of_a_save_are_what_check_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}"#;
    fs::write(folder.path().join("config.json"), model).unwrap();
    // 12 million parameters: 145 MB of masters and moments.
    let run = write_run(folder.path(), &format!("config_path: {}", folder.path().display()), "");
    let wide = ["--lora.lora_rank", "128", "--data.max_seq_len", "64", "--train.max_steps", "2"];
    let planned = figure(&check(&run, 1, &wide), "copies while a step is saved");
    let peak = |out: &str, save_steps: &str| {
        let out = folder.path().join(out);
        let more = ["--train.output_dir", out.to_str().unwrap(), "--train.save_steps", save_steps];
        succeeded(&xorl(1, &[&["--config", run.to_str().unwrap()], &wide[..], &more].concat()));
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        last["peak_rss_bytes"].as_f64().unwrap()
    };
    let ratio = (peak("saves", "1") - peak("does not", "0")) / planned as f64;
    println!("{planned} planned, {ratio:.3} of it used");
    assert!((0.8..1.2).contains(&ratio), "{planned} planned, {ratio} of it used");
}

#[test]
fn mpi_memory_is_what_check_said() {
    // What takes least, and one that keeps all; more rows take minutes in a debug build on a CPU without bf16.
    memory_is_what_check_said(&["recompute_full_layer", "no_recompute"].map(|method| ("1", method)));
}

#[test]
#[ignore = "minutes: ci/long.sh memory"]
fn mpi_memory_of_every_shape_is_what_check_said() {
    let methods = |rows| ["recompute_full_layer", "selective", "no_recompute"].map(|method| (rows, method));
    memory_is_what_check_said(&["1", "2", "4"].map(methods).concat());
}

/// VmHWM of SmolLM2's ranks, beside what `check` said, for rows of a micro-batch and methods of recompute.
fn memory_is_what_check_said(shapes: &[(&str, &str)]) {
    let model = format!("model_path: {}", root().join("models/smollm2").display());
    for &(rows, method) in shapes {
        let folder = tempfile::tempdir().unwrap();
        let run = write_run(folder.path(), &model, "");
        // The second step is as large as any that follow.
        let flag = ["--train.micro_batch_size", rows, "--train.gradient_checkpointing_method", method];
        let planned = figure(&check(&run, 2, &flag), "sum");
        let mut arguments = vec!["--config", run.to_str().unwrap()];
        arguments.extend(flag);
        arguments.extend(["--train.max_steps", "2"]);
        succeeded(&xorl(2, &arguments));
        let metrics = fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        let ratio = last["peak_rss_bytes"].as_f64().unwrap() / planned as f64;
        println!("{rows} × 512, {method}: {planned} planned, {ratio:.3} of it used");
        assert!(
            (0.85..1.15).contains(&ratio),
            "{rows} × 512, {method}: {planned} planned, {ratio} of it used"
        );
    }
}
