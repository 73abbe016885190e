//! `run.yaml` as a user meets it: every shipped file loads, broken ones are refused in one line at the right
//! place, the command line wins, and what is written reads back.

use proptest::prelude::*;
use std::path::{Path, PathBuf};
use xorl_dist::config::{
    self, DatasetArgs, DatasetType, LoadCheckpoint, Loaded, LrDecayStyle, Override, PackingMethod, RunConfig,
};

const MINIMAL: &str = "model:\n  model_path: m\ndata:\n  datasets: [{path: dummy}]\n";

fn load(text: &str, flags: &[&str]) -> Result<Loaded, String> {
    let overrides = flags.iter().map(|flag| {
        let mut words = flag.split(' ').filter(|word| !word.is_empty()).map(str::to_owned);
        Override { field: words.next().unwrap(), values: words.collect() }
    });
    config::load_yaml(Path::new("run.yaml"), text, &overrides.collect::<Vec<_>>()).map_err(|e| e.to_string())
}

fn resolved(text: &str, flags: &[&str]) -> RunConfig {
    load(text, flags).unwrap_or_else(|error| panic!("{error}\n{text}{flags:?}")).config
}

/// A complete file with `lines` (with their section) in place of nothing.
fn with(section: &str, lines: &str) -> String {
    let body: String = lines.lines().map(|line| format!("  {line}\n")).collect();
    match section {
        "model" => format!("model:\n  model_path: m\n{body}data:\n  datasets: [{{path: dummy}}]\n"),
        "data" => format!("model:\n  model_path: m\ndata:\n{body}"),
        _ => format!("{MINIMAL}{section}:\n{body}"),
    }
}

#[test]
fn broken_files_are_refused_at_the_right_place() {
    let train = |lines: &str| with("train", lines);
    let lora = |lines: &str| with("lora", lines);
    let model = |lines: &str| with("model", lines);
    let data = |lines: &str| with("data", lines);
    let dummy = "datasets: [{path: dummy}]\n";
    for (text, place, words) in [
        // Types and ranges.
        (train("seed: 1\nlr: fast"), "run.yaml:7: train.lr:", "expected a positive number, got \"fast\""),
        (train("lr: -1e-4"), "run.yaml:6: train.lr:", "expected a positive number, got -1e-4"),
        (train("lr: .inf"), "run.yaml:6: train.lr:", "expected a positive number, got \".inf\""),
        (train("lr:"), "run.yaml:6: train.lr:", "expected a positive number, got null"),
        (train("lr: [1, 2]"), "run.yaml:6: train.lr:", "got a list"),
        (
            train("lr_warmup_ratio: 1.5"),
            "run.yaml:6: train.lr_warmup_ratio:",
            "a number from 0 to 1, got 1.5",
        ),
        (
            train("adam_beta1: 1"),
            "run.yaml:6: train.adam_beta1:",
            "expected a number from 0 to below 1, got 1",
        ),
        (train("adam_beta2: -0.1"), "run.yaml:6: train.adam_beta2:", "from 0 to below 1, got -0.1"),
        (train("adam_epsilon: 0"), "run.yaml:6: train.adam_epsilon:", "a positive number, got 0"),
        (train("adam_epsilon: 1e-60"), "run.yaml:6: train.adam_epsilon:", "1e-60 is 0 in fp32"),
        (
            train("max_steps: 0"),
            "run.yaml:6: train.max_steps:",
            "a whole number of at least 1, or null, got 0",
        ),
        (train("ring_slots: 0"), "run.yaml:6: train.ring_slots:", "at least 1, got 0"),
        (train("micro_batch_size: 1.5"), "run.yaml:6: train.micro_batch_size:", "a whole number"),
        (
            train("data_parallel_shard_size: 0"),
            "run.yaml:6: train.data_parallel_shard_size:",
            "or -1 for the rest",
        ),
        (
            train("save_epochs: 0.25"),
            "run.yaml:6: train.save_epochs:",
            "a whole number of at least 0, got 0.25",
        ),
        (train("overwrite: maybe"), "run.yaml:6: train.overwrite:", "expected true or false, got \"maybe\""),
        (train("run_id: ../up"), "run.yaml:6: train.run_id:", "letters, digits"),
        (train("run_id: ''"), "run.yaml:6: train.run_id:", "got \"\""),
        (train("lr_decay_style: step"), "run.yaml:6: train.lr_decay_style:", "constant, linear or cosine"),
        (
            train("gradient_checkpointing_method: some"),
            "run.yaml:6: train.gradient_checkpointing_method:",
            "expected auto, recompute_full_layer, selective or no_recompute",
        ),
        (lora("lora_rank: 9223372036854775807"), "run.yaml:6: lora.lora_rank:", "at most 1048576, got 9223"),
        (
            train("loss_chunk_tokens: 18446744073709551615"),
            "run.yaml:6: train.loss_chunk_tokens:",
            "expected a whole number of at most 2147483647, got 18446744073709551615",
        ),
        (train("lr_warmup_steps: 9000000000"), "run.yaml:6: train.lr_warmup_steps:", "at most 2147483647"),
        (train("micro_batch_size: 9999999"), "run.yaml:6: train.micro_batch_size:", "at most 1048576"),
        (
            data(&format!("{dummy}pad_to_multiple_of: 100000000000")),
            "run.yaml:5: data.pad_to_multiple_of:",
            "at most 1048576",
        ),
        (lora("lora_rank: 0"), "run.yaml:6: lora.lora_rank:", "at least 1, got 0"),
        (lora("lora_alpha: 0"), "run.yaml:6: lora.lora_alpha:", "a positive number"),
        (
            lora("lora_target_modules: []"),
            "run.yaml:6: lora.lora_target_modules:",
            "a non-empty list of names, or null",
        ),
        (
            lora("lora_target_modules:\n- q_proj\n- {a: b}"),
            "run.yaml:8: lora.lora_target_modules[1]:",
            "expected text, got a mapping",
        ),
        // Names.
        (train("lrr: 1"), "run.yaml:6: train.lrr:", "unknown field; did you mean train.lr"),
        (train("max_step: 1"), "run.yaml:6: train.max_step:", "did you mean train.max_steps?"),
        (train("lora_rank: 8"), "run.yaml:6: train.lora_rank:", "did you mean lora.lora_rank?"),
        (train("zzz: 8"), "run.yaml:6: train.zzz:", "unknown field"),
        (with("trian", "lr: 1"), "run.yaml:5: trian:", "unknown section; did you mean train?"),
        (format!("{MINIMAL}lr: 1\n"), "run.yaml:5: lr:", "unknown section; did you mean train.lr?"),
        (train("lr: 1\nseed: 2\nlr: 3"), "run.yaml:8:", "\"lr\" is given twice, first on line 6"),
        // Syntax and shape.
        (train("lr: [1"), "run.yaml:", "not valid YAML"),
        (train("lr: *peak"), "run.yaml:6:", "not valid YAML"),
        ("- a\n- b\n".into(), "run.yaml:1:", "expected sections model, data, train, lora, got a list"),
        (format!("{MINIMAL}train: 3\n"), "run.yaml:5:", "train: expected fields, got 3"),
        // What a run cannot do without.
        ("data:\n  datasets: [{path: dummy}]\n".into(), "run.yaml:1: model.model_path:", "missing:"),
        ("model:\n  model_path: m\ndata:\n".into(), "run.yaml:3: data.datasets:", "missing: at least one"),
        (data("datasets: []"), "run.yaml:4: data.datasets:", "a non-empty list of data sets"),
        (data("datasets:\n- type: chat"), "run.yaml:5: data.datasets[0].path:", "missing:"),
        (
            data("datasets:\n- {path: dummy}\n- path: a.jsonl\n  type: texts"),
            "run.yaml:7: data.datasets[1].type:",
            "expected auto, tokenized, chat, alpaca, completion, text or preference, got \"texts\"",
        ),
        (
            data("datasets:\n- path: a.jsonl\n  type: chat\n  num_sample: 3"),
            "run.yaml:7: data.datasets[0].num_sample:",
            "unknown field; did you mean num_samples?",
        ),
        (
            data("datasets:\n- path: a.jsonl\n  columns: {promt: a}"),
            "run.yaml:6: data.datasets[0].columns:",
            "promt is no field of a type; those are messages, tools,",
        ),
        (
            data("datasets:\n- path: a.jsonl\n  type: text\n  roles: {user: [human]}"),
            "run.yaml:7: data.datasets[0].roles:",
            "type text has no messages",
        ),
        (
            data("datasets:\n- path: dummy\n  split: train"),
            "run.yaml:6: data.datasets[0].split:",
            "dummy data has no files",
        ),
        (
            data("datasets: [{path: s3://b/x, type: chat}]"),
            "run.yaml:4: data.datasets[0].path:",
            "local files only",
        ),
        (
            data("datasets: [{path: d, type: chat, split: 'train[:10%]'}]"),
            "run.yaml:4: data.datasets[0].split:",
            "a split is a name alone",
        ),
        // Contradictions.
        (
            data(&format!("{dummy}pad_to_multiple_of: 8\nsample_packing_method: none")),
            "run.yaml:5: data.pad_to_multiple_of:",
            "sample_packing_method is none",
        ),
        (
            train("lr_decay_style: linear\nlr_min: 1"),
            "run.yaml:7: train.lr_min:",
            "1.0 is above train.lr 5e-5",
        ),
        (train("lr_warmup_ratio: 0.1\nlr_start: 1"), "run.yaml:7: train.lr_start:", "is above train.lr"),
        (train("lr_start: 1\nlr_warmup_steps: 2"), "run.yaml:6: train.lr_start:", "is above train.lr"),
        (
            train("lr_warmup_ratio: 0.1\nlr_warmup_steps: 2"),
            "run.yaml:7: train.lr_warmup_steps:",
            "remove one of them",
        ),
        (lora("merge_warmup_steps: 3"), "run.yaml:6: lora.merge_warmup_steps:", "start the optimizer anew"),
        (
            lora("merge_lora_interval: 3\nreset_optimizer_on_merge: true\nmerge_warmup_steps: 3"),
            "run.yaml:8: lora.merge_warmup_steps:",
            "is not below lora.merge_lora_interval",
        ),
        (lora("rank_pattern: {q_proj: 0}"), "run.yaml:6: lora.rank_pattern.q_proj:", "at least 1"),
        (lora("alpha_pattern: [8]"), "run.yaml:6: lora.alpha_pattern:", "a mapping of numbers"),
        (lora("lora_target_modules: [lm_head]"), "run.yaml:6: lora.lora_target_modules:", "head are frozen"),
        // Not built.
        (lora("enable_lora: false"), "run.yaml:6: lora.enable_lora:", "frozen by design"),
        (
            lora("enable_qlora: true\nquant_format: nf4\nquant_group_size: 16"),
            "run.yaml:8: lora.quant_group_size:",
            "16 is no group size of nf4, which has 64",
        ),
        (
            lora("enable_aqn: true"),
            "run.yaml:6: lora.enable_aqn:",
            "is noise of a quantised base: set lora.enable_qlora",
        ),
        (
            lora("lora_target_manifest: {a: 1}"),
            "run.yaml:6: lora.lora_target_manifest:",
            "a mapping is refused",
        ),
        (train("tensor_parallel_size: 2"), "run.yaml:6: train.tensor_parallel_size:", "2 is refused"),
        (train("ulysses_parallel_size: 4"), "run.yaml:6: train.ulysses_parallel_size:", "4 is refused"),
        (train("expert_parallel_size: 0"), "run.yaml:6: train.expert_parallel_size:", "at least 1"),
        (
            train("optimizer: distsignsgd"),
            "run.yaml:6: train.optimizer:",
            "distsignsgd is refused: signs that each rank gives would make the result depend",
        ),
        (
            train("optimizer: lion"),
            "run.yaml:6: train.optimizer:",
            "expected adamw, anyprecision_adamw, sgd, signsgd or muon, got \"lion\"",
        ),
        (train("muon_ns_steps: 100"), "run.yaml:6: train.muon_ns_steps:", "100 is above 99"),
        (train("optimizer_dtype: fp16"), "run.yaml:6: train.optimizer_dtype:", "expected fp32 or bf16"),
        (train("loraplus_lr_ratio: 0"), "run.yaml:6: train.loraplus_lr_ratio:", "a positive number"),
        (train("use_wandb: true"), "run.yaml:6: train.use_wandb:", "metrics.jsonl"),
        (train("load_weights_mode: skip"), "run.yaml:6: train.load_weights_mode:", "\"skip\" is refused"),
        (model("train_router: yes"), "run.yaml:3: model.train_router:", "frozen base"),
        (
            with("distill", "enable_distillation: true"),
            "run.yaml:6: distill.enable_distillation:",
            "not built",
        ),
    ] {
        let error = load(&text, &[]).expect_err(&text);
        assert!(error.starts_with(place) && error.contains(words), "{text}\n{error}\n{place} … {words}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn all_errors_are_told_in_the_order_of_the_file() {
    let text = "modle:\n  model_path: m\ndata:\n  datasets:\n    - {path: a.jsonl, kind: chat}\n    - {type: chat}\n  \
                pad_to_multiple_of: 8\n  sample_packing_method: none\ntrain:\n  lr: fast\n  lr_min: 1\n  \
                lr_decay_style: linear\n  seed: 1\n  seed: 2\n  use_wandb: true\nlora: 3\n";
    let error = load(text, &["train.max_step 3", "train.seed -1"]).unwrap_err();
    let told: Vec<&str> = error.lines().collect();
    let expected = [
        // No missing model_path: that is what `modle` was for.
        ("run.yaml:1: modle: ", "did you mean model?"),
        ("run.yaml:5: data.datasets[0].kind: ", "unknown field"),
        ("run.yaml:6: data.datasets[1].path: ", "missing"),
        ("run.yaml:7: data.pad_to_multiple_of: ", "sample_packing_method is none"),
        // No rule compares lr_min with a learning rate that was not read.
        ("run.yaml:10: train.lr: ", "a positive number"),
        ("run.yaml:14:", "\"seed\" is given twice, first on line 13"),
        ("run.yaml:15: train.use_wandb: ", "not built"),
        ("run.yaml:16:", "lora: expected fields, got 3"),
        ("--train.max_step: ", "did you mean train.max_steps?"),
        ("--train.seed: ", "got -1"),
    ];
    assert_eq!(told.len(), expected.len(), "{error}");
    for (told, (place, words)) in told.iter().zip(expected) {
        assert!(told.starts_with(place) && told.contains(words), "{told}\n{place} … {words}");
    }
}

/// Configurations as other trainers' documentation has them, flat, and keys of the adapter under `lora`.
#[test]
fn names_of_other_trainers_are_met_with_their_equivalents() {
    for (trainer, lines, section) in [
        (
            "axolotl",
            "base_model sequence_len sample_packing pad_to_sequence_len adapter lora_r \
             lora_target_linear lora_modules_to_save peft_use_rslora num_epochs learning_rate lr_scheduler warmup_steps \
             warmup_ratio bf16 fp16 tf32 gradient_checkpointing flash_attention saves_per_epoch evals_per_epoch \
             load_in_4bit load_in_8bit strict special_tokens chat_template deepspeed fsdp fsdp_config \
             resume_from_checkpoint auto_resume_from_checkpoints group_by_length \
             cosine_min_lr_ratio neftune_noise_alpha hub_model_id model_type tokenizer_type trust_remote_code",
            "",
        ),
        (
            "LLaMA-Factory",
            "model_name_or_path adapter_name_or_path stage do_train finetuning_type lora_target dataset dataset_dir \
             template cutoff_len max_samples overwrite_cache preprocessing_num_workers overwrite_output_dir plot_loss \
             save_only_model per_device_train_batch_size lr_scheduler_type ddp_timeout val_size eval_strategy \
             quantization_bit packing neat_packing mask_history train_on_prompt pure_bf16 flash_attn \
             enable_liger_kernel use_unsloth report_to additional_target create_new_adapter pissa_init",
            "",
        ),
        (
            "torchtune",
            "checkpointer tokenizer dataset batch_size epochs max_steps_per_epoch lora_attn_modules apply_lora_to_mlp \
             apply_lora_to_output num_warmup_steps loss compile enable_activation_checkpointing \
             enable_activation_offloading clip_grad_norm metric_logger log_every_n_steps log_peak_memory_stats device \
             dtype save_adapter_weights_only shuffle profiler custom_sharded_layers data_parallel_shard_dim",
            "",
        ),
        (
            "TRL",
            "max_length assistant_only_loss completion_only_loss padding_free dataset_text_field eval_packing \
             packing_strategy optim run_name save_strategy evaluation_strategy push_to_hub use_peft loss_type \
             remove_unused_columns disable_tqdm torch_dtype data_seed label_smoothing_factor use_liger_kernel",
            "train",
        ),
        (
            "PEFT",
            "r target_modules bias modules_to_save \
             layers_to_transform layers_pattern fan_in_fan_out task_type peft_type target_parameters \
             inference_mode base_model_name_or_path loftq_config trainable_token_indices layer_replication \
             megatron_config eva_config corda_config use_qalora",
            "lora",
        ),
    ] {
        for name in lines.split_whitespace() {
            let text = match section {
                "" => format!("{MINIMAL}{name}: 1\n"),
                section => with(section, &format!("{name}: 1")),
            };
            let error = load(&text, &[]).expect_err(name);
            assert_eq!(error.lines().count(), 1, "{trainer}: {error}");
            let hints = [" is not built: ", " is not needed: "].iter().any(|words| error.contains(words));
            let is_ours = error.contains(&format!("{name} is ")) && error.contains(" here");
            assert!(hints || is_ours, "{trainer}: {error}");
            assert!(!error.contains("did you mean"), "{trainer}: {error}");
        }
    }
    // Another spelling, and one that is misspelt.
    for (name, words) in [
        ("Learning-Rate", "learning_rate is train.lr here"),
        ("laerning_rate", "learning_rate is train.lr here"),
        ("per_device_train_batchsize", "per_device_train_batch_size is train.micro_batch_size here"),
    ] {
        let error = load(&with("train", &format!("{name}: 1")), &[]).unwrap_err();
        assert!(error.ends_with(words), "{error}");
    }
    // Of data sets.
    for (entry, words) in [
        (
            "path: a, type: chat, message_field_role: m",
            "datasets[0].message_field_role: unknown field; message_field_role is message_property_mappings here: {role",
        ),
        ("path: a, type: chat, conversation: c", "conversation is not needed: the model's own chat template"),
        ("file_name: a, type: chat", "file_name is path here"),
        ("path: a, max_samples: 3", "max_samples is num_samples here"),
        ("path: a, type: json", "the format is seen from the file; type says what a row holds"),
    ] {
        let error = load(&with("data", &format!("datasets: [{{{entry}}}]")), &[]).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    // Names that are taken as they are.
    for (name, kind) in [
        ("sharegpt", DatasetType::Chat),
        ("chat_template", DatasetType::Chat),
        ("prompt_completion", DatasetType::Completion),
        ("pretrain", DatasetType::Text),
    ] {
        let text = with("data", &format!("datasets: [{{path: a, type: {name}, field_messages: m}}]"));
        let data = load(&text, &[]).unwrap().config.data;
        assert_eq!((data.datasets[0].kind, data.datasets[0].columns["messages"].as_str()), (kind, "m"));
    }
}

/// A name that is like none of ours gets no suggestion, and a suggestion differs by a letter or two.
#[test]
fn no_nearest_name_misleads() {
    for name in ["tokens", "lora", "steps", "output", "size", "checkpoint", "weights", "rows", "xy", "wandb"]
    {
        let error = load(&with("train", &format!("{name}: 1")), &[]).unwrap_err();
        assert!(error.ends_with("unknown field"), "{error}");
    }
}

/// The fields of PEFT's and transformers' own classes: each is known by some name, or gets no nearest name that is
/// another word.
#[test]
fn python_fields_of_peft_and_transformers_are_met_without_misleading() {
    let script = "import dataclasses, json, peft, transformers\n\
                  names = lambda c: [f.name for f in dataclasses.fields(c)]\n\
                  print(json.dumps([names(peft.LoraConfig), names(transformers.TrainingArguments)]))";
    let output = std::process::Command::new(crate::common::python()).args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let [lora, training]: [Vec<String>; 2] = serde_json::from_slice(&output.stdout).unwrap();
    let told = |section: &str, name: &str| load(&with(section, &format!("{name}: 1")), &[]).err();
    for name in &lora {
        if let Some(error) = told("lora", name) {
            let answers = ["unknown field; ", "is refused: ", "expected ", ", or remove it"];
            let known = answers.iter().any(|words| error.contains(words));
            assert!(known, "PEFT's {name} is not in the list: {error}");
        }
    }
    let mut hints = 0;
    for name in training.iter().chain(&lora) {
        let Some(error) = told("train", name) else { continue };
        hints += usize::from(error.contains("unknown field; ") && !error.contains("did you mean"));
        if let Some((_, nearest)) = error.split_once("did you mean ") {
            let nearest = nearest.trim_end_matches('?').rsplit('.').next().unwrap();
            assert_eq!(nearest, name, "{error}");
        }
    }
    assert!(hints >= 60, "{hints} hints");
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = resolved(MINIMAL, &[]);
    let expected = RunConfig {
        model: config::ModelArgs { model_path: Some("m".into()), ..Default::default() },
        data: config::DataArgs {
            datasets: vec![DatasetArgs { path: "dummy".into(), ..Default::default() }],
            ..Default::default()
        },
        ..Default::default()
    };
    assert_eq!(config, expected);
    assert_eq!((config.lora.lora_rank, config.lora.lora_alpha), (16, 32.0));
    assert_eq!((config.train.lr, config.train.seed, config.train.compute.ring_slots), (5e-5, 42, 2));
    assert_eq!((config.data.sample_packing_sequence_len, config.train.save_total_limit), (2048, Some(3)));
}

#[test]
fn a_file_sets_every_kind_of_field() {
    let text = "model: {config_path: c.json, merge_qkv: no}\n\
                data:\n  datasets:\n    - {path: a.jsonl, type: chat}\n    - {path: dummy, num_samples: 7}\n  \
                sample_packing_method: none\n\
                train: {lr: 1e-5, max_steps: 20, global_batch_size: null, lr_decay_style: cosine, run_id: 007, \
                reshard_after_forward: null, load_checkpoint_path: auto, output_dir: \"out dir\"}\n\
                lora: {lora_target_modules: all-linear, adapter_path: ~}\n";
    let config = resolved(text, &[]);
    assert_eq!(config.model.config_path, Some("c.json".into()));
    assert!(!config.model.merge_qkv);
    assert_eq!(config.data.datasets.len(), 2);
    assert_eq!(config.data.datasets[0].kind, DatasetType::Chat);
    assert_eq!(config.data.datasets[1].num_samples, Some(7));
    assert_eq!(config.data.sample_packing_method, PackingMethod::None);
    assert_eq!(config.data.pad_to_multiple_of, None, "the default does not apply to unpacked rows");
    assert_eq!(config.train.lr, 1e-5);
    assert_eq!(config.train.max_steps, Some(20));
    assert_eq!(config.train.lr_decay_style, LrDecayStyle::Cosine);
    assert_eq!(config.train.run_id, "007");
    assert!(config.train.compute.reshard_after_forward);
    assert_eq!(config.train.load_checkpoint_path, Some(LoadCheckpoint::Auto));
    assert_eq!(config.train.output_dir, PathBuf::from("out dir"));
    assert_eq!(config.lora.lora_target_modules, Some(vec!["all-linear".to_owned()]));
}

#[test]
fn the_command_line_wins_over_the_file() {
    let text = with("train", "lr: fast\nmax_steps: 5\nsave_total_limit: 3\noverwrite: true");
    let config = resolved(&text, &["train.lr 2e-5", "train.max_steps None", "train.overwrite f"]);
    assert_eq!(config.train.lr, 2e-5);
    assert_eq!(config.train.max_steps, None);
    assert_eq!(config.train.save_total_limit, Some(3));
    assert!(!config.train.overwrite);
}

#[test]
fn flags_take_bools_lists_nulls_and_json() {
    for word in ["train.overwrite", "train.overwrite true", "train.overwrite YES", "train.overwrite 1"] {
        assert!(resolved(MINIMAL, &[word]).train.overwrite, "{word}");
    }
    for word in ["t", "y", "True", "on"] {
        assert!(resolved(MINIMAL, &[&format!("train.overwrite {word}")]).train.overwrite, "{word}");
    }
    let targets = |flag: &str| resolved(MINIMAL, &[flag]).lora.lora_target_modules;
    let two = Some(vec!["q_proj".to_owned(), "layers.[0-7].*.o_proj".to_owned()]);
    assert_eq!(targets("lora.lora_target_modules q_proj layers.[0-7].*.o_proj"), two);
    assert_eq!(targets("lora.lora_target_modules [\"q_proj\",\"layers.[0-7].*.o_proj\"]"), two);
    assert_eq!(targets("lora.lora_target_modules [qk]_proj"), Some(vec!["[qk]_proj".to_owned()]));
    assert_eq!(targets("lora.lora_target_modules null"), None);

    let null = Override { field: "data.max_seq_len".into(), values: vec![String::new()] };
    let text = with("data", "datasets: [{path: dummy}]\nmax_seq_len: 9");
    let loaded = config::load_yaml(Path::new("run.yaml"), &text, &[null]).unwrap();
    assert_eq!(loaded.config.data.max_seq_len, None);

    let sets =
        resolved("model: {model_path: m}", &["data.datasets [{\"path\":\"a.jsonl\",\"type\":\"chat\"}]"]);
    assert_eq!(sets.data.datasets[0].path, PathBuf::from("a.jsonl"));
    assert_eq!(
        resolved(MINIMAL, &["train.data_parallel_shard_size -1"]).train.compute.data_parallel_shard_size,
        -1
    );
}

#[test]
fn broken_flags_are_named() {
    for (flag, expected) in [
        ("train.lr fast", "--train.lr: expected a positive number, got \"fast\""),
        ("train.lr", "--train.lr: expected a positive number, got no value"),
        ("train.lr 1 2", "--train.lr: expected a positive number, got a list"),
        ("train.lrr 1", "--train.lrr: unknown field; did you mean train.lr?"),
        ("trian.lr 1", "--trian.lr: unknown section; did you mean train?"),
        ("train.lora_rank 1", "--train.lora_rank: unknown field; did you mean lora.lora_rank?"),
        ("train.ep_outside", "--train.ep_outside: true is refused: experts are divided over ranks"),
        ("data.datasets [{\"type\":\"chat\"}]", "--data.datasets[0].path: missing: a file, a folder, a glob"),
        ("data.datasets x", "--data.datasets: expected a non-empty list of data sets"),
    ] {
        let error = load(MINIMAL, &[flag]).expect_err(flag);
        assert!(error.starts_with(expected), "{flag}\n{error}\n{expected}");
    }
}

#[test]
fn fields_that_only_hint_are_accepted_with_one_line_each() {
    let text = "model:\n  model_path: m\n  attn_implementation: flash_attention_3\n\
                data:\n  datasets: [{path: dummy}]\n  dataloader_num_workers: 4\n\
                train:\n  init_device: meta\n  load_weights_mode: grouped\n  data_parallel_mode: fsdp2\n  \
                tensor_parallel_size: 1\n  fsdp_reduce_dtype: fp32\n\
                lora:\n  enable_aqn: false\n  merge_lora_interval: 0\n";
    let warnings = load(text, &["train.gc_steps 5"]).unwrap().warnings;
    assert_eq!(warnings.len(), 6, "{warnings:#?}");
    assert!(warnings[0].starts_with("run.yaml:3: model.attn_implementation: ignored: "), "{}", warnings[0]);
    assert!(warnings[5].starts_with("--train.gc_steps: ignored: "), "{}", warnings[5]);
}

#[test]
fn later_rooms_learn_where_a_field_came_from() {
    let places = load(&with("lora", "lora_target_modules: [x]"), &["train.lr 1e-4"]).unwrap().places;
    assert_eq!(places.of("lora.lora_target_modules").to_string(), "run.yaml:6: lora.lora_target_modules");
    assert_eq!(places.of("train.lr").to_string(), "--train.lr");
    assert_eq!(places.of("data.max_seq_len").to_string(), "run.yaml:3: data.max_seq_len");
    assert!(places.is_given("train.lr") && !places.is_given("train.seed"));
}

#[test]
fn every_shipped_file_loads_without_a_warning() {
    let mut seen = 0;
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/local")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else {
                let loaded = config::load(&entry, &[]).unwrap_or_else(|error| panic!("{error}"));
                assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
                seen += 1;
            }
        }
    }
    assert!(seen >= 4, "{seen} files");
    let servers = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/server");
    let servers = std::fs::read_dir(servers).unwrap().map(|entry| entry.unwrap().path());
    let mut seen = 0;
    for file in servers.filter(|file| file.extension().is_some_and(|ending| ending == "yaml")) {
        let loaded = config::load_server_yaml(&file, &std::fs::read_to_string(&file).unwrap(), &[]);
        let loaded = loaded.unwrap_or_else(|error| panic!("{error}"));
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        seen += 1;
    }
    assert!(seen >= 4, "{seen} files");
}

#[test]
fn files_are_told_apart_by_their_ending() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.json");
    let json = "{\n\t\"model\": {\"model_path\": \"m\"},\n\t\"data\": {\"datasets\": [{\"path\": \"dummy\"}]},\n\
                \t\"train\": {\n\t\t\"lr\": 1e-5,\n\t\t\"max_steps\": true\n\t}\n}\n";
    std::fs::write(&path, json).unwrap();
    let error = config::load(&path, &[]).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "run.json:6: train.max_steps: expected a whole number of at least 1, or null, got true"
        )
    );
    std::fs::write(&path, json.replace("true", "3")).unwrap();
    assert_eq!(config::load(&path, &[]).unwrap().config.train.max_steps, Some(3));

    let error = config::load(&folder.path().join("no.yaml"), &[]).unwrap_err().to_string();
    assert!(error.contains("no.yaml: cannot read the configuration: No such file"), "{error}");
    let error = config::load(Path::new("run.toml"), &[]).unwrap_err().to_string();
    assert_eq!(error, "run.toml: expected a .yaml, .yml or .json file");
}

#[test]
fn a_resolved_configuration_reads_back_the_same() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/local");
    let mut configs: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| config::load(&entry.unwrap().path(), &[]).unwrap().config)
        .collect();
    configs
        .push(resolved(MINIMAL, &["data.sample_packing_method none", "train.reshard_after_forward false"]));
    for config in configs {
        let again = load(&config.to_yaml(), &[]).unwrap_or_else(|e| panic!("{e}\n{}", config.to_yaml()));
        assert_eq!(again.config, config);
        assert!(again.warnings.is_empty());
    }
}

#[test]
fn serde_agrees_with_the_loader() {
    let config = resolved(MINIMAL, &["train.load_checkpoint_path auto", "lora.lora_target_modules a b"]);
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!(json["data"]["datasets"][0]["type"], "auto");
    assert_eq!(json["train"]["lr_decay_style"], "constant");
    assert_eq!(serde_json::from_value::<RunConfig>(json).unwrap(), config);
}

#[test]
fn the_schema_is_as_the_snapshot_says() {
    snapshot("schema.txt", &config::schema_table());
    for (section, field) in config::schema() {
        assert!(field.meaning.ends_with('.'), "{section}.{}: {:?} is no sentence", field.key, field.meaning);
    }
}

/// The manuals' tables of fields stand between two comments; `XORL_UPDATE_SNAPSHOTS=1` writes them anew.
#[test]
fn the_manuals_have_every_field_as_its_type_says() {
    const BEGIN: &str = "<!-- fields, made of the types in src/config -->\n\n";
    const END: &str = "\n<!-- end of fields -->";
    for (manual, table) in
        [("configs/README.md", config::reference()), ("configs/server/README.md", config::server_reference())]
    {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(manual);
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once(BEGIN).unwrap_or_else(|| panic!("{manual}: {BEGIN} is missing"));
        let (kept, after) = rest.split_once(END).unwrap_or_else(|| panic!("{manual}: {END} is missing"));
        if std::env::var_os("XORL_UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, [before, BEGIN, &table, END, after].concat()).unwrap();
        } else {
            let lines = kept.lines().zip(table.lines());
            let first = lines.map(|(kept, made)| format!("{kept}\n{made}")).find(|pair| {
                let (kept, made) = pair.split_once('\n').unwrap();
                kept != made
            });
            let differing = first.unwrap_or_else(|| "its length".into());
            assert!(kept == table, "{manual} differs; run again with XORL_UPDATE_SNAPSHOTS=1\n{differing}");
        }
    }
}

/// Compares with tests/snapshots/`name`; `XORL_UPDATE_SNAPSHOTS=1` writes it anew.
fn snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("XORL_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(kept == text, "{name} changed; if that is meant, run again with XORL_UPDATE_SNAPSHOTS=1\n{text}");
}

/// Text that looks like a configuration more often than noise does.
fn near_yaml() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("train"),
        Just("lora"),
        Just("data"),
        Just("model"),
        Just("lr"),
        Just("datasets"),
        Just("path"),
        Just("lora_target_modules"),
        Just(":"),
        Just(": "),
        Just("\n"),
        Just("\n  "),
        Just("\n  - "),
        Just("["),
        Just("]"),
        Just("{"),
        Just("}"),
        Just(", "),
        Just("\""),
        Just("'"),
        Just("|"),
        Just(">"),
        Just("&a"),
        Just("*a"),
        Just("!!str"),
        Just("---"),
        Just("..."),
        Just("#"),
        Just("%YAML"),
        Just("?"),
        Just("~"),
        Just("\t"),
        Just("\u{feff}"),
        Just("\r"),
        Just("é"),
        Just("1e400"),
        Just("-1"),
        Just("<<"),
        Just("\0"),
    ];
    prop::collection::vec(word, 0..40).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn no_text_makes_the_loader_panic(noise in any::<String>(), near in near_yaml()) {
        for text in [noise, near.clone(), format!("train:\n  {near}")] {
            if let Err(error) = load(&text, &[]) {
                prop_assert!(!error.is_empty());
            }
        }
    }

    #[test]
    fn any_text_and_number_survives_writing_and_reading(
        path in "[^\0]{1,40}", targets in prop::collection::vec(".{1,20}", 1..4), lr in 1e-300..1e300,
        alpha in proptest::num::f64::POSITIVE, seed: u64, steps in prop::option::of(1..=i32::MAX as usize),
    ) {
        let mut config = resolved(MINIMAL, &[]);
        config.model.model_path = Some(path.clone().into());
        config.model.tokenizer_path = Some(path.clone().into());
        config.lora.lora_target_modules = Some(targets);
        config.train.lr = lr;
        config.lora.lora_alpha = if alpha.is_finite() { alpha } else { 1.0 };
        config.train.seed = seed;
        config.train.max_steps = steps;
        let again = load(&config.to_yaml(), &[]);
        prop_assert_eq!(again.map(|loaded| loaded.config), Ok(config));
    }
}
