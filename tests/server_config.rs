//! `server.yaml` as a user meets it: defaults, errors at the right place, overrides, xorl's other fields, and fields
//! that belong to `run.yaml`.

use std::path::{Path, PathBuf};
use xorl_dist::config::{self, ByteSize, CheckpointingMethod, Loaded, Override, RunConfig, ServerConfig};

const MINIMAL: &str = "model_path: m\n";

fn load(text: &str, flags: &[&str]) -> Result<Loaded<ServerConfig>, String> {
    let overrides = flags.iter().map(|flag| {
        let mut words = flag.split_whitespace().map(str::to_owned);
        Override { field: words.next().unwrap(), values: words.collect() }
    });
    let overrides: Vec<_> = overrides.collect();
    config::load_server_yaml(Path::new("server.yaml"), text, &overrides).map_err(|error| error.to_string())
}

fn resolved(text: &str, flags: &[&str]) -> ServerConfig {
    load(text, flags).unwrap_or_else(|error| panic!("{error}\n{text}{flags:?}")).config
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = resolved(MINIMAL, &[]);
    assert_eq!((config.api_host.as_str(), config.api_port), ("127.0.0.1", 5555));
    assert_eq!((config.lora_rank, config.lora_alpha, config.max_lora_rank), (16, 32.0, None));
    assert_eq!((config.lr, config.weight_decay, config.max_grad_norm), (1e-5, 0.01, 1.0));
    assert_eq!((config.adam_beta1, config.adam_beta2, config.adam_epsilon), (0.9, 0.95, 1e-8));
    assert_eq!(config.idle_session_timeout, Some(7200.0));
    assert_eq!(config.storage_limit, Some(ByteSize(10 << 40)));
    assert_eq!((config.model_ids.len(), config.api_keys_file.clone()), (0, None));
    assert_eq!(config.base_model(), "m");
    assert_eq!(config.model.files().unwrap().tokenizer, PathBuf::from("m"));
    // The fields that a run has too have a run's defaults.
    assert_eq!(config.compute, RunConfig::default().train.compute);
    assert_eq!(config.seed, RunConfig::default().train.seed);
}

#[test]
fn a_file_sets_every_kind_of_field() {
    let text = "model_path: /models/q\nbase_model_name: Qwen/Qwen3-8B\nmodel_ids: [policy_v1, 'a:train:0']\n\
                storage_limit: 500GB\nmax_request_bytes: 1048576\nidle_session_timeout: null\napi_port: 0\n\
                lora_target_modules: [qkv_proj, o_proj]\nmax_lora_rank: 64\nexpert_parallel_size: 4\nmerge_qkv: no\n\
                gradient_checkpointing_method: selective\nreshard_after_forward: null\n";
    let config = resolved(text, &[]);
    assert_eq!(config.base_model(), "Qwen/Qwen3-8B");
    assert_eq!(config.model_ids, ["policy_v1", "a:train:0"]);
    assert_eq!(config.storage_limit, Some(ByteSize(500 << 30)));
    assert_eq!(config.max_request_bytes, ByteSize(1 << 20));
    assert_eq!((config.idle_session_timeout, config.api_port), (None, 0));
    assert_eq!(config.max_lora_rank, Some(64));
    assert_eq!(config.compute.expert_parallel_size, 4);
    assert_eq!(config.compute.checkpointing(), CheckpointingMethod::Selective);
    assert!(config.compute.reshard_after_forward && !config.model.merge_qkv);
    // JSON is a subset.
    let json = resolved("{\"model_path\": \"m\", \"storage_limit\": null, \"lora_alpha\": 8}", &[]);
    assert_eq!((json.storage_limit, json.lora_alpha), (None, 8.0));
}

#[test]
fn broken_files_are_refused_at_the_right_place() {
    for (lines, place, words) in [
        // Types and ranges.
        ("api_port: 70000", "server.yaml:2: api_port:", "expected a port from 0 to 65535, got 70000"),
        ("lora_rank: 0", "server.yaml:2: lora_rank:", "a whole number of at least 1, got 0"),
        ("seed: 1\nlr: fast", "server.yaml:3: lr:", "expected a positive number, got \"fast\""),
        (
            "storage_limit: lots",
            "server.yaml:2: storage_limit:",
            "such as 500MB or 10TB, or null, got \"lots\"",
        ),
        ("max_request_bytes: 0", "server.yaml:2: max_request_bytes:", "a number of bytes of at least 1"),
        (
            "idle_session_timeout: 0",
            "server.yaml:2: idle_session_timeout:",
            "a positive number, or null, got 0",
        ),
        ("model_ids: [ok, ../up]", "server.yaml:2: model_ids[1]:", "starts with a letter or digit"),
        ("model_ids:\n- ok\n- a/b", "server.yaml:4: model_ids[1]:", "got \"a/b\""),
        ("reduce_gradients: never", "server.yaml:2: reduce_gradients:", "expected step or micro_batch"),
        // Names.
        ("lora_rnk: 8", "server.yaml:2: lora_rnk:", "unknown field; did you mean lora_rank?"),
        ("zzz: 8", "server.yaml:2: zzz:", "unknown field"),
        ("lr: 1\nlr: 2", "server.yaml:3:", "\"lr\" is given twice, first on line 2"),
        ("model_name: q", "server.yaml:2: model_name:", "model_name is base_model_name here"),
        ("adam_betas: [0.9, 0.99]", "server.yaml:2: adam_betas:", "adam_beta1 and adam_beta2 here"),
        ("learning_rate: 1", "server.yaml:2: learning_rate:", "learning_rate is lr here"),
        // Fields of a run.
        (
            "train:\n  lr: 1",
            "server.yaml:2: train:",
            "train is a section of run.yaml; the fields of server.yaml",
        ),
        ("server:\n  lr: 1", "server.yaml:2: server:", "stand at its top, without a section"),
        ("max_steps: 3", "server.yaml:2: max_steps:", "max_steps is of run.yaml; a server has no such field"),
        ("num_epochs: 3", "server.yaml:2: num_epochs:", "num_epochs is train.num_train_epochs of run.yaml"),
        // Rules between fields.
        ("api_host: 0.0.0.0", "server.yaml:2: api_host:", "needs api_keys_file"),
        ("api_host: gpu7.example.org", "server.yaml:2: api_host:", "needs api_keys_file"),
        ("max_lora_rank: 8", "server.yaml:1: lora_rank:", "16 is above max_lora_rank 8"),
        ("adam_epsilon: 1e-60", "server.yaml:2: adam_epsilon:", "1e-60 is 0 in fp32"),
        ("lora_target_modules: [lm_head]", "server.yaml:2: lora_target_modules:", "head are frozen"),
        // Not built.
        ("enable_lora: false", "server.yaml:2: enable_lora:", "frozen by design"),
        ("ulysses_parallel_size: 4", "server.yaml:2: ulysses_parallel_size:", "4 is refused"),
        (
            "quant_group_size: 64",
            "server.yaml:2: quant_group_size:",
            "64 is no group size of nvfp4, which has 16",
        ),
        ("block_fp8_qlora_training: true", "server.yaml:2: block_fp8_qlora_training:", "quant_format"),
        ("merge_lora_interval: 10", "server.yaml:2: merge_lora_interval:", "10 is refused"),
        ("train_router: true", "server.yaml:2: train_router:", "the router is part of the frozen base"),
        ("freeze_router: false", "server.yaml:2: freeze_router:", "the router is part of the frozen base"),
        (
            "optimizer: distsignsgd",
            "server.yaml:2: optimizer:",
            "distsignsgd is refused: signs that each rank",
        ),
        ("muon_ns_steps: 100", "server.yaml:2: muon_ns_steps:", "100 is above 99"),
        (
            "sample_packing_on_oversized: truncate",
            "server.yaml:2: sample_packing_on_oversized:",
            "is refused",
        ),
        ("tensor_parallel_size: 2", "server.yaml:2: tensor_parallel_size:", "2 is refused"),
        ("load_weights_mode: skip", "server.yaml:2: load_weights_mode:", "\"skip\" is refused"),
        ("load_checkpoint_path: x", "server.yaml:2: load_checkpoint_path:", "clients load what was saved"),
        (
            "gradient_checkpointing_method: recompute_before_dispatch",
            "server.yaml:2: gradient_checkpointing_method:",
            "not built; use recompute_full_layer",
        ),
    ] {
        let text = format!("{MINIMAL}{lines}\n");
        let error = load(&text, &[]).expect_err(&text);
        assert!(error.starts_with(place) && error.contains(words), "{text}\n{error}\n{place} … {words}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let error = load("api_port: 1\n", &[]).unwrap_err();
    assert!(error.starts_with("server.yaml:1: model_path: missing: an HF model directory"), "{error}");
    let error = load("- a\n", &[]).unwrap_err();
    assert_eq!(error, "server.yaml:1: expected fields, such as model_path: …, got a list");
}

#[test]
fn all_errors_are_told_in_the_order_of_the_file() {
    let text = "modle_path: m\nlora_rank: many\nmax_lora_rank: 8\nseed: 1\nseed: 2\napi_host: '::'\ntrain: {lr: 1}\n";
    let error = load(text, &["server.api_prot 1", "server.lr 0"]).unwrap_err();
    let told: Vec<&str> = error.lines().collect();
    let expected = [
        // No missing model_path: that is what `modle_path` was for.
        ("server.yaml:1: modle_path: ", "did you mean model_path?"),
        // No rule compares max_lora_rank with a rank that was not read.
        ("server.yaml:2: lora_rank: ", "got \"many\""),
        ("server.yaml:5:", "\"seed\" is given twice, first on line 4"),
        ("server.yaml:6: api_host: ", "needs api_keys_file"),
        ("server.yaml:7: train: ", "a section of run.yaml"),
        ("--server.api_prot: ", "did you mean server.api_port?"),
        ("--server.lr: ", "expected a positive number, got 0"),
    ];
    assert_eq!(told.len(), expected.len(), "{error}");
    for (told, (place, words)) in told.iter().zip(expected) {
        assert!(told.starts_with(place) && told.contains(words), "{told}\n{place} … {words}");
    }
}

#[test]
fn the_command_line_wins_over_the_file() {
    let text = "model_path: m\nlr: fast\nmodel_ids: [a]\nstorage_limit: 1GB\nenable_mixed_precision: true\n";
    let flags = [
        "server.lr 2e-5",
        "server.model_ids b c",
        "server.storage_limit null",
        "server.enable_mixed_precision f",
    ];
    let config = resolved(text, &flags);
    assert_eq!((config.lr, config.storage_limit), (2e-5, None));
    assert_eq!(config.model_ids, ["b", "c"]);
    assert!(!config.compute.enable_mixed_precision);
    for (flag, expected) in [
        ("train.lr 1", "--train.lr: unknown field; train.lr is of run.yaml; the server's is server.lr"),
        (
            "train.max_steps 1",
            "--train.max_steps: unknown field; max_steps is of run.yaml; a server has no such field",
        ),
        ("sever.lr 1", "--sever.lr: unknown section; did you mean server.lr?"),
        ("server.lrr 1", "--server.lrr: unknown field; did you mean server.lr?"),
        ("server.enable_qarl", "--server.enable_qarl: true is refused: the base is computed in bf16"),
        ("server.api_host 10.0.0.7", "--server.api_host: \"10.0.0.7\" lets other machines in"),
    ] {
        let error = load(MINIMAL, &[flag]).expect_err(flag);
        assert!(error.starts_with(expected), "{flag}\n{error}\n{expected}");
    }
}

#[test]
fn another_address_than_this_machines_needs_keys() {
    for host in ["127.0.0.1", "localhost", "'::1'"] {
        resolved(&format!("{MINIMAL}api_host: {host}\n"), &[]);
    }
    let config = resolved(&format!("{MINIMAL}api_host: 0.0.0.0\napi_keys_file: keys\n"), &[]);
    assert_eq!(config.api_keys_file, Some("keys".into()));
}

/// A file with all that the reference's LoRA servers give beyond the fields here.
#[test]
fn fields_of_xorl_that_change_nothing_are_ignored_with_one_line_each() {
    let text = "model_path: m\nattn_implementation: flash_attention_3\ndata_parallel_mode: fsdp2\nenable_full_shard: true\n\
                enable_activation_offload: false\ninit_device: meta\nload_checkpoint_path: \"\"\nckpt_manager: dcp\n\
                log_level: INFO\nworker_connection_timeout: 60.0\nsample_packing_sequence_len: 128000\n\
                enable_packing: true\nskip_initial_checkpoint: true\nce_mode: compiled\nfreeze_router: true\n\
                optimizer: adamw\nenable_qarl: false\nmerge_lora_interval: 0\n";
    let warnings = load(text, &[]).unwrap().warnings;
    assert_eq!(warnings.len(), 12, "{warnings:#?}");
    assert_eq!(warnings[0], "server.yaml:2: attn_implementation: ignored: kernels are chosen by the device");
    assert!(warnings.iter().all(|line| line.starts_with("server.yaml:") && line.contains(": ignored: ")));
}

#[test]
fn a_resolved_configuration_reads_back_the_same() {
    let text =
        "config_path: c\nmodel_ids: [a]\nstorage_limit: 1.5GB\nvocab_chunk_rows: 7\nlora_b_init_std: 0.5\n";
    for config in [resolved(MINIMAL, &[]), resolved(text, &[])] {
        let yaml = config.to_yaml();
        let again = load(&yaml, &[]).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
        assert_eq!(again.config, config);
        assert!(again.warnings.is_empty(), "{:?}", again.warnings);
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<ServerConfig>(json).unwrap(), config);
        // Written in the order of the schema.
        let keys: Vec<_> =
            yaml.lines().filter(|l| !l.starts_with('-')).map(|l| l.split(':').next().unwrap()).collect();
        let schema: Vec<_> = config::server_schema().into_iter().map(|(_, field)| field.key).collect();
        assert_eq!(keys, schema);
    }
}

#[test]
fn paths_have_to_lead_to_what_their_fields_read() {
    let folder = tempfile::tempdir().unwrap();
    let (file, keys) = (folder.path().join("server.yaml"), folder.path().join("keys"));
    let text = format!("model_path: {}\napi_keys_file: {}\n", folder.path().display(), keys.display());
    std::fs::write(&file, text).unwrap();
    let error = config::load_server(&file, &[]).unwrap_err().to_string();
    let words =
        format!("server.yaml:2: api_keys_file: {}: no such file; expected a file with", keys.display());
    assert!(error.contains(&words), "{error}");
    std::fs::write(&keys, "").unwrap();
    assert_eq!(config::load_server(&file, &[]).unwrap().config.api_keys_file, Some(keys));
    let named = Override { field: "server.model_path".into(), values: vec!["nowhere".into()] };
    let error = config::load_server(&file, &[named]).unwrap_err().to_string();
    assert!(
        error.starts_with("--server.model_path: nowhere: no such folder; expected an HF model"),
        "{error}"
    );
    // The hub says later whether it has a model of this id.
    let named = Override { field: "server.model_path".into(), values: vec!["Qwen/Qwen3-8B".into()] };
    assert!(config::load_server(&file, &[named]).is_ok());
}

#[test]
fn help_and_schema_are_as_the_snapshots_say() {
    for (name, text) in
        [("server_schema.txt", config::server_schema_table()), ("server_help.txt", config::server_help())]
    {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
        if std::env::var_os("XORL_UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(
            kept == text,
            "{name} changed; if that is meant, run again with XORL_UPDATE_SNAPSHOTS=1\n{text}"
        );
    }
    for (_, field) in config::server_schema() {
        assert!(field.meaning.ends_with('.'), "{}: {:?} is no sentence", field.key, field.meaning);
    }
}
