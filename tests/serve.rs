//! The server as users start it: over real HTTP it trains what the local trainer trains, it stops and goes on with
//! every adapter, and what is wrong ends it in one line.

use crate::common::{
    engine::model_folder,
    failed, make_rows, metrics, python, rank_process, relative,
    serving::{Serving, command, exchange},
    signal, succeeded,
    tiny::{adapter, differences},
    wait_for_at_most, xorl,
};
use axum::http::{HeaderName, HeaderValue};
use serde_json::{Value, json};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tempfile::TempDir;
use xorl_dist::server::{keys::Keys, registry::Tenant};

const STEPS: usize = 3;
const ROWS: usize = 10;

/// A folder with a model, rows, run.yaml and server.yaml that say the same.
struct Place {
    folder: TempDir,
    model: TempDir,
}

impl Place {
    fn new() -> Self {
        let (folder, model) = (tempfile::tempdir().unwrap(), model_folder());
        make_rows(&folder.path().join("rows.jsonl"));
        let (at, path) = (folder.path().display(), model.path().display());
        let run = format!(
            "model:\n  model_path: {path}\ndata:\n  datasets: [{{path: {at}/rows.jsonl, type: tokenized}}]\n\
             \x20 sample_packing_method: none\n  shuffle_merged_datasets: false\n\
             \x20 shuffle_before_merging_datasets: false\ntrain:\n  output_dir: {at}/run\n  max_steps: {STEPS}\n\
             \x20 global_batch_size: {ROWS}\n  micro_batch_size: {ROWS}\n  lr: 2e-3\n  lr_decay_style: constant\n\
             \x20 lr_warmup_ratio: 0\n  weight_decay: 0.01\n  max_grad_norm: 0.5\n  enable_mixed_precision: false\n\
             lora:\n  lora_rank: 4\n  lora_alpha: 8\n  lora_b_init_std: 0.05\n\
             \x20 lora_target_modules: [q_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\n"
        );
        fs::write(folder.path().join("run.yaml"), run).unwrap();
        let server = format!(
            "model_path: {path}\noutput_dir: {at}/out\nmodel_ids: [policy_v1]\nlora_rank: 4\nlora_alpha: 8\n\
             lora_b_init_std: 0.05\nlora_target_modules: [q_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\n\
             lr: 2e-3\nweight_decay: 0.01\nmax_grad_norm: 0.5\nenable_mixed_precision: false\n"
        );
        fs::write(folder.path().join("server.yaml"), server).unwrap();
        Self { folder, model }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, ranks: usize, out: &str) -> Serving {
        Serving::start(
            ranks,
            &self.at("server.yaml"),
            &["--server.output_dir", self.at(out).to_str().unwrap()],
        )
    }

    /// `count` rows from the `first` on.
    fn rows(&self, first: usize, count: usize) -> Vec<Value> {
        let text = fs::read_to_string(self.at("rows.jsonl")).unwrap();
        text.lines().skip(first).take(count).map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Forward and backward of `rows` for `model`; returns Σ loss and valid tokens.
fn pass(server: &Serving, call: &str, model: &str, rows: &[Value]) -> (f64, f64) {
    let body = json!({"batches": rows, "loss_fn": "causallm_loss", "model_id": model});
    let metrics = server.call(call, &body)["metrics"].take();
    (metrics["loss:sum"].as_f64().unwrap(), metrics["valid_tokens:sum"].as_f64().unwrap())
}

fn step(server: &Serving, model: &str) -> Value {
    server.call("optim_step", &json!({"model_id": model}))["metrics"].take()
}

/// Steps and accumulated passes of an adapter.
fn standing(server: &Serving, model: &str) -> (u64, u64) {
    let (status, info) = server.get(&format!("/api/v1/session_info?model_id={model}"));
    assert_eq!(status, 200, "{info}");
    (info["step"].as_u64().unwrap(), info["accumulated_passes"].as_u64().unwrap())
}

/// The mean loss of all rows, by PEFT.
fn peft_loss(place: &Place, adapter: &Path) -> f64 {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/peft_loss.py");
    let mut peft = Command::new(python());
    peft.arg(script).args([place.model.path(), adapter, &place.at("rows.jsonl"), &place.at("logits")]);
    let peft = peft.output().unwrap();
    succeeded(&peft);
    String::from_utf8_lossy(&peft.stdout).trim().parse().unwrap()
}

/// The two bodies of the LoRA page, as written there, make the adapter that the local trainer makes of the same rows;
/// PEFT loads it and computes our loss.
#[test]
fn mpi_the_lora_pages_bodies_train_what_the_local_trainer_trains() {
    let place = Place::new();
    succeeded(&xorl(1, &["--config", place.at("run.yaml").to_str().unwrap()]));
    let expected = metrics(&place.at("run"));
    let local = adapter(&place.at(&format!("run/weights/run/step_{STEPS}")));
    for ranks in [1, 2] {
        let out = format!("out {ranks}");
        let server = place.start(ranks, &out);
        assert_eq!(server.get("/health").0, 200, "{}", server.said());
        for (number, expected) in expected.iter().enumerate() {
            let rows = place.rows(ROWS * number, ROWS);
            let (loss, valid) = pass(&server, "forward_backward", "policy_v1", &rows);
            let stepped = step(&server, "policy_v1");
            let pairs = [
                ("loss", loss / valid),
                ("tokens", valid),
                ("grad_norm", stepped["grad_norm"].as_f64().unwrap()),
            ];
            for (name, ours) in pairs {
                let theirs = expected[name].as_f64().unwrap();
                assert!(
                    (ours - theirs).abs() <= 1e-5 * theirs,
                    "{ranks} ranks, {name}: {ours}, local {theirs}"
                );
            }
            assert_eq!(stepped["step"], (number + 1) as f64);
        }
        let saved = server
            .call("save_weights", &json!({"path": "outputs/adapters/policy_v1", "model_id": "policy_v1"}));
        assert_eq!(saved["path"], "xorl://policy_v1/weights/policy_v1");
        let folder = place.at(&out).join("outputs/adapters/policy_v1");
        let served = adapter(&folder);
        assert_eq!(served.keys().collect::<Vec<_>>(), local.keys().collect::<Vec<_>>());
        for (name, ours) in &served {
            let apart = relative(ours, &local[name]);
            assert!(apart <= 1e-5, "{ranks} ranks, {name}: {apart} apart");
        }
        if ranks == 2 {
            let (loss, valid) = pass(&server, "forward", "policy_v1", &place.rows(0, 30));
            let (ours, theirs) = (loss / valid, peft_loss(&place, &folder));
            assert!((ours - theirs).abs() <= 1e-5 * theirs, "ours {ours}, PEFT {theirs}");
            // The base alone, by an adapter whose B is 0.
            let zero = json!({"model_id": "fresh", "lora_config": {"rank": 1}});
            server.call("create_model", &zero);
            assert!(pass(&server, "forward", "fresh", &place.rows(0, 30)).0 > loss, "it has learned");
        }
        let said =
            server.refused("forward_backward", &json!({"batches": place.rows(0, 1), "model_id": "nobody"}));
        assert!(said.contains("create_model"), "{said}");
    }
}

/// Adapters of one kind and another, with steps and gradients that wait.
fn train(server: &Serving, place: &Place) {
    server.call(
        "create_model",
        &json!({"model_id": "small", "lora_config": {"rank": 2, "alpha": 3.0, "seed": 9}}),
    );
    for (model, steps) in [("policy_v1", 2), ("small", 1), ("default", 1)] {
        for number in 0..steps {
            pass(server, "forward_backward", model, &place.rows(number, 3));
            step(server, model);
        }
    }
    pass(server, "forward_backward", "policy_v1", &place.rows(9, 4));
    // Taken, but nobody asks for its result.
    let rows = place.rows(4, 2);
    server.post("forward_backward", &json!({"batches": rows, "model_id": "small", "seq_id": 8}));
}

/// The training behind the point at which a server stops; where everything is saved.
fn go_on(server: &Serving, place: &Place) {
    // Sums over ranks that are made before a stop and after it differ in rounding: what was accumulated is used first.
    for model in ["policy_v1", "small"] {
        step(server, model);
    }
    for model in ["policy_v1", "small", "default"] {
        pass(server, "forward_backward", model, &place.rows(12, 3));
        step(server, model);
        server.call("save_weights", &json!({"model_id": model, "path": "end"}));
    }
}

#[test]
fn mpi_a_stopped_server_goes_on_bit_for_bit_and_a_killed_one_says_what_is_lost() {
    let place = Place::new();
    let whole = place.start(2, "whole");
    train(&whole, &place);
    go_on(&whole, &place);
    let (status, said) = whole.end(libc::SIGUSR1);
    assert_eq!(status.code(), Some(75), "{said}");

    let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/serve.sh"));
    script.args(["-n", "2"]).arg(place.at("server.yaml")).args(["--device", "cpu", "--server.api_port", "0"]);
    let program = env!("CARGO_BIN_EXE_xorl-dist");
    script
        .arg("--server.output_dir")
        .arg(place.at("parts"))
        .env("XORL_DIST", program)
        .env("OMP_NUM_THREADS", "1");
    let server = Serving::started(script);
    train(&server, &place);
    let (status, said) = server.end(libc::SIGTERM);
    assert_eq!(status.code(), Some(75), "{said}");
    assert!(
        said.contains("stopping: requests that were taken") && said.contains("3 adapters saved"),
        "{said}"
    );

    let server = place.start(2, "parts");
    assert!(server.said().contains("3 adapters brought back"), "{}", server.said());
    let repeated = json!({"model_id": "small", "seq_id": 8, "batches": place.rows(0, 1)});
    assert!(server.refused("forward_backward", &repeated).contains("a repeat cannot be told"));
    let standings = ["policy_v1", "small", "default"].map(|model| standing(&server, model));
    assert_eq!(standings, [(2, 1), (1, 1), (1, 0)]);
    let (_, listed) = server.post("list_checkpoints", &json!({"model_id": "small"}));
    assert_eq!(listed["checkpoints"], json!([]), "the server's own saves are no checkpoints");
    go_on(&server, &place);
    for model in ["policy_v1", "small", "default"] {
        let [ours, theirs] =
            ["parts", "whole"].map(|out| place.at(out).join("weights").join(model).join("end"));
        let different = differences(&ours, &theirs);
        assert!(different.is_empty() && ours.join("manifest.json").is_file(), "{model}: {different:?}");
    }
    let (status, said) = server.end(libc::SIGUSR1);
    assert_eq!(status.code(), Some(75), "{said}");

    // One process from here on: another world. One adapter changes, one never existed before.
    let mut server = place.start(1, "parts");
    assert_eq!(standing(&server, "policy_v1"), (4, 0));
    pass(&server, "forward_backward", "policy_v1", &place.rows(0, 2));
    step(&server, "policy_v1");
    for model in ["new", "untrained"] {
        server.call("create_model", &json!({"model_id": model}));
    }
    pass(&server, "forward_backward", "new", &place.rows(0, 1));
    server.call("unload_model", &json!({"model_id": "default", "type": "unload_model"}));
    signal(server.child.id(), libc::SIGKILL);
    server.ended();

    let server = place.start(1, "parts");
    let said = server.said();
    assert!(said.contains("adapters default, and 1 adapter brought back; lost new, policy_v1"), "{said}");
    assert_eq!(standing(&server, "small"), (3, 0));
    let body = json!({"batches": place.rows(0, 1), "model_id": "policy_v1"});
    for _ in 0..2 {
        let said = server.refused("forward_backward", &body);
        assert!(said.contains("its last saved state is step 4, xorl://policy_v1/weights/stop-"), "{said}");
    }
    let said = server.refused("optim_step", &json!({"model_id": "new"}));
    assert!(said.contains("nothing of it was saved"), "{said}");
    let said = server.refused("optim_step", &json!({"model_id": "untrained"}));
    assert!(said.contains("does not exist; make it with"), "{said}");
    assert_eq!(standing(&server, "default"), (0, 0), "it was unloaded");
    // A client that has understood goes on from there.
    let said = server.refused("forward_backward", &body);
    let path = said.split([' ', ';']).find(|word| word.starts_with("xorl://")).unwrap();
    server.call("create_model", &json!({"model_id": "policy_v1"}));
    let loaded = server.call("load_weights", &json!({"model_id": "policy_v1", "path": path}));
    assert_eq!((&loaded["step"], standing(&server, "policy_v1")), (&json!(4), (4, 0)));
    let (status, said) = server.end(libc::SIGINT);
    assert_eq!(status.code(), Some(75), "{said}");
}

/// A server on a quantised base writes the models that `merge` makes of its saves, counts their bytes before it writes
/// any, and leaves the adapter as it was.
#[test]
fn mpi_a_server_merges_what_the_command_merges_within_its_limit() {
    let place = Place::new();
    let (out, limit) = (place.at("merged"), "1060KB");
    let more =
        ["--server.enable_qlora", "true", "--server.quant_format", "nf4", "--server.storage_limit", limit];
    let fixed = ["--server.output_dir", out.to_str().unwrap()];
    let server = Serving::start(2, &place.at("server.yaml"), &[&fixed[..], &more].concat());
    pass(&server, "forward_backward", "default", &place.rows(0, 4));
    step(&server, "default");
    pass(&server, "forward_backward", "default", &place.rows(4, 2));
    let (before, standing_before) =
        (pass(&server, "forward", "default", &place.rows(0, 2)), standing(&server, "default"));
    server.call("save_weights", &json!({"path": "adapter"}));
    let merge = |dtype: &str, to: &Path| {
        let [model, adapter] = [place.model.path().to_owned(), out.join("weights/default/adapter")];
        let [model, adapter, to] = [&model, &adapter, to].map(|path| path.to_str().unwrap().to_owned());
        let arguments = ["merge", "--model", &model, "--adapter", &adapter, "--out", &to, "--dtype", dtype];
        succeeded(&xorl(1, &arguments));
    };
    let full = |name: &str, dtype: &str| {
        server.post("save_full_weights_safetensors", &json!({"name": name, "dtype": dtype}))
    };
    for dtype in ["base", "bfloat16"] {
        let (status, saved) = full(dtype, dtype);
        assert_eq!(status, 200, "{saved}");
        let (ours, theirs) = (PathBuf::from(saved["path"].as_str().unwrap()), place.at(dtype));
        assert_eq!(ours, out.canonicalize().unwrap().join("full_weights/default").join(dtype));
        merge(dtype, &theirs);
        let mut different = differences(&theirs, &ours);
        different.sort();
        different.dedup();
        assert_eq!(different, ["manifest.json", "metadata.json"].map(PathBuf::from), "{dtype}");
    }
    assert_eq!(pass(&server, "forward", "default", &place.rows(0, 2)), before);
    assert_eq!(standing(&server, "default"), standing_before);
    // All bytes of a model count before any is written.
    let (status, said) = full("single", "float32");
    let said = said["detail"].as_str().unwrap();
    assert!(status == 400 && said.contains("of the 1085440 that storage_limit allows"), "{status} {said}");
    assert!(!out.join("full_weights/default/single").exists());
    let (status, _) = server.post("delete_checkpoint", &json!({"checkpoint_id": "full_weights/bfloat16"}));
    assert_eq!(status, 200);
    let (status, saved) = full("single", "float32");
    assert_eq!(status, 200, "{saved}");
    let entries = fs::read_dir(out.join("full_weights/default")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["base", "single"]);
}

#[test]
fn mpi_wrong_input_ends_all_ranks_with_one_line_before_the_model_is_loaded() {
    let place = Place::new();
    let yaml = place.at("server.yaml").display().to_string();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    // The SHA-256 of `tml-one`.
    let hash = "37186f648184032ea0967255741152df482798b3ac1956d2fa5726c5722acc8e\n";
    let [keys, good] = [("keys", "tml-plain\n"), ("good", hash)].map(|(name, text)| {
        fs::write(place.at(name), text).unwrap();
        place.at(name).display().to_string()
    });
    // Ranks, arguments, words of the line.
    let cases: [(usize, &[&str], &str); 8] = [
        (2, &["--server.api_port", &port], "another program listens there"),
        (2, &["--server.api_keys_file", &keys], "keys:1: expected the SHA-256 of a key"),
        (2, &["--server.model_path", "/nowhere/model"], "/nowhere/model"),
        (
            1,
            &["--server.api_host", "192.0.2.1", "--server.api_keys_file", &good],
            "it is no address of this machine",
        ),
        (1, &["--server.model_ids", "a", "default"], "model_ids: default is there without being named"),
        (
            1,
            &["--server.tokenizer_path", "src"],
            "a folder without one; expected a directory with tokenizer.json",
        ),
        (2, &["--server.expert_parallel_size", "3"], "expert_parallel_size 3"),
        (1, &["--api_port", "1"], "fields of server.yaml are written --server.api_port"),
    ];
    for (ranks, more, words) in cases {
        let command = [&["serve", "--device", "cpu", "--config", &yaml], more].concat();
        let line = failed(&xorl(ranks, &command), 2);
        assert!(line.contains(words), "{more:?}: {line}");
        assert!(!place.at("out").exists(), "{more:?} wrote something");
        assert!(!line.contains("train."), "{line}");
    }
    let small = ["serve", "--device", "cpu", "--config", &yaml, "--server.adapter_memory", "1KB"];
    let ended = xorl(1, &small);
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(2), "{said}");
    assert!(said.contains("no adapter fits: lora_rank 4 needs more than the 0.000 GB"), "{said}");
    let line = failed(&xorl(1, &["check", "--config", &yaml]), 2);
    assert!(line.contains("is of a server, not of a run: xorl-dist serve --config"), "{line}");
    let server = place.start(1, "out");
    let out = ["--server.output_dir", place.at("out").to_str().unwrap()].map(str::to_owned);
    let line = failed(&command(2, &place.at("server.yaml"), &[&out[0], &out[1]]).output().unwrap(), 2);
    assert!(line.contains("output_dir") && line.contains("is in use by process"), "{line}");
    drop(server);
}

#[test]
fn mpi_a_lost_rank_turns_health_red_and_ends_the_server() {
    let place = Place::new();
    let out = place.at("out").display().to_string();
    let more = ["--server.output_dir", &out, "--server.comm_timeout_s", "2"];
    for number in [libc::SIGSTOP, libc::SIGKILL] {
        let mut server = Serving::start(2, &place.at("server.yaml"), &more);
        let process = rank_process(server.child.id(), 1).unwrap();
        assert_eq!(server.get("/health").0, 200);
        signal(process, number);
        let mut red = false;
        wait_for_at_most(Duration::from_secs(20), "the end of the server", || {
            let health = exchange(server.address, "GET", "/health", "");
            red |= health.is_ok_and(|(status, body)| status == 503 && body["engine_running"] == false);
            server.child.try_wait().unwrap()
        });
        signal(process, libc::SIGKILL);
        let (status, said) = server.ended();
        assert!(!status.success(), "{said}");
        // mpirun ends a server that has lost a rank, perhaps before the watchdog does.
        if number == libc::SIGSTOP {
            assert!(red, "{said}");
            let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
            assert!(lines.len() == 1 && lines[0].contains(&format!("rank 1 (process {process}")), "{said}");
        }
    }
}

/// The block of the manual that makes a key, as it is printed there.
#[test]
fn the_manuals_command_makes_a_key_that_the_server_knows() {
    let manual =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/server/README.md")).unwrap();
    let block = manual.split("```sh\n").find(|block| block.starts_with("key=")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut bash = Command::new("bash");
    let made = bash.args(["-euc", block.split("```").next().unwrap()]).current_dir(&folder).output().unwrap();
    succeeded(&made);
    let key = String::from_utf8(made.stdout).unwrap();
    let keys = Keys::read(&folder.path().join("keys")).unwrap();
    let tenant = |key: &str| {
        let value = HeaderValue::from_str(key).unwrap();
        keys.tenant(&[(HeaderName::from_static("x-api-key"), value)].into_iter().collect())
    };
    assert_eq!(tenant(key.trim()), Tenant::named("lab"));
    assert_eq!(tenant("tml-other"), None);
}
