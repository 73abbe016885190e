//! The calls of `xorl-client`: bodies, order, futures and paths.

use super::server::{Server, detail, forward_backward};
use serde_json::{Value, json};
use std::{
    fs,
    sync::PoisonError,
    time::{Duration, Instant},
};
use xorl_dist::server::request::{OptimStep, Task};

#[test]
fn a_refusal_names_no_folder_of_the_server() {
    let server = Server::start();
    let body = json!({"model_id": "policy_v1", "path": "runs/final"});
    server.call("save_weights", &body);
    let refused = server.call("save_weights", &body);
    assert_eq!(refused["error"], "runs/final exists; give overwrite or another name");
}

#[test]
fn the_loop_of_the_client_runs() {
    let server = Server::start();
    let config = json!({"rank": 32, "dropout": 0.0, "target_modules": null});
    let created = server.call(
        "create_model",
        &json!({"model_id": "default", "base_model": "org/base", "lora_config": config}),
    );
    assert_eq!(
        (created["model_id"].as_str(), created["type"].as_str()),
        (Some("default"), Some("create_model"))
    );
    let passed = server.call("forward_backward", &forward_backward(1));
    assert_eq!(
        passed["loss_fn_outputs"][0]["logprobs"],
        json!({"data": [-0.5, -0.5, -0.5], "dtype": "float32", "shape": [3]})
    );
    assert_eq!(passed["loss_fn_outputs"][0]["elementwise_loss"]["data"], json!([0.0, 0.5, 1.0]));
    assert_eq!(passed["metrics"]["loss:sum"], 1.5);
    assert_eq!(passed["metrics"]["valid_tokens:sum"], 3.0);
    let adam = json!({"learning_rate": 2e-4, "beta1": 0.8, "weight_decay": 0.1, "grad_clip_norm": 5.0});
    let stepped =
        server.call("optim_step", &json!({"model_id": "default", "seq_id": 2, "adam_params": adam}));
    assert_eq!(
        stepped["metrics"],
        json!({"grad_norm": 1.25, "learning_rate": 2e-4, "skipped": 0.0, "step": 1.0})
    );
    let saved = server.call("save_weights", &json!({"model_id": "default", "seq_id": 3, "path": "one"}));
    assert_eq!(saved["path"], "xorl://default/weights/one");
    let unnamed = server.call("save_weights", &json!({"model_id": "default", "seq_id": 4, "path": null}));
    assert!(unnamed["path"].as_str().unwrap().starts_with("xorl://default/weights/checkpoint-"));
    let sampler =
        server.call("save_weights_for_sampler", &json!({"model_id": "default", "seq_id": 5, "name": "s"}));
    assert_eq!(sampler["path"], "xorl://default/sampler_weights/s");
    let loaded =
        server.call("load_weights", &json!({"seq_id": 6, "path": saved["path"], "optimizer": false}));
    assert_eq!(loaded["path"], saved["path"]);

    let (_, info) = server.post("weights_info", &json!({"xorl_path": saved["path"]}));
    assert_eq!(
        (&info["lora_rank"], &info["base_model"], &info["is_lora"]),
        (&json!(32), &json!("org/base"), &json!(true))
    );
    let (_, list) = server.post("list_checkpoints", &json!({"model_id": "default"}));
    let ids: Vec<&str> = list["checkpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["checkpoint_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.contains(&"weights/one") && ids.contains(&"sampler_weights/s"), "{ids:?}");
    let (status, deleted) =
        server.post("delete_checkpoint", &json!({"model_id": "default", "checkpoint_id": "weights/one"}));
    assert_eq!((status, &deleted["success"]), (200, &json!(true)));
    assert!(!server.output.path().join("weights/default/one").exists());
    assert_eq!(server.post("delete_checkpoint", &json!({"checkpoint_id": "weights/one"})).0, 404);

    let (_, info) = server.post("get_info", &json!({"model_id": "default"}));
    assert_eq!(info["model_data"]["tokenizer_id"], "/models/base");
    let (_, runs) = server.get("/api/v1/training_runs?limit=1&offset=0&access_scope=owned");
    assert_eq!(runs["cursor"], json!({"offset": 0, "limit": 1, "total_count": 2}));
    assert_eq!(runs["training_runs"][0]["training_run_id"], "default");
    let (_, session) = server.get("/api/v1/session_info?model_id=default");
    assert_eq!((&session["step"], &session["lora_rank"]), (&json!(1), &json!(32)));
    let (_, killed) = server.post("kill_session", &json!({"model_id": "default", "save_checkpoint": true}));
    assert_eq!(killed["success"], true, "{killed}");
    assert!(killed["checkpoint_path"].as_str().unwrap().starts_with("xorl://default/weights/killed-"));

    let steps: Vec<OptimStep> = server
        .engine
        .asked()
        .iter()
        .filter_map(|asked| match asked.task {
            Task::OptimStep(step) => Some(step),
            _ => None,
        })
        .collect();
    let step = OptimStep {
        lr: 2e-4,
        betas: (0.8, 0.95),
        eps: 1e-12,
        weight_decay: 0.1,
        max_grad_norm: 5.0,
        divide: true,
    };
    assert_eq!(steps, [step]);
    assert_eq!(server.engine.asked().last().unwrap().task, Task::Unload);
}

#[test]
fn the_two_bodies_of_the_lora_page_work_as_written() {
    let server = Server::start();
    let rows =
        json!([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]);
    let passed = server.call(
        "forward_backward",
        &json!({"batches": rows, "loss_fn": "causallm_loss", "model_id": "policy_v1"}),
    );
    assert_eq!(passed["metrics"]["valid_tokens:sum"], 3.0);
    let asked = server.engine.asked();
    let Task::Pass(pass) = &asked.last().unwrap().task else { panic!("{asked:?}") };
    assert_eq!((&pass.data[0].targets[..], &pass.data[1].targets[..]), (&[2, 3, -100][..], &[5, -100][..]));
    assert!(pass.backward && pass.loss.name == "causallm_loss");

    let body = json!({"path": "outputs/adapters/policy_v1", "model_id": "policy_v1"});
    let saved = server.call("save_weights", &body);
    assert_eq!(saved["path"], "xorl://policy_v1/weights/policy_v1");
    assert!(server.output.path().join("outputs/adapters/policy_v1/manifest.json").is_file());
    // The folder is listed, loads by either name, and is not silently replaced.
    let (_, list) = server.post("list_checkpoints", &json!({"model_id": "policy_v1"}));
    assert_eq!(list["checkpoints"][0]["path"], saved["path"]);
    for path in ["outputs/adapters/policy_v1", "xorl://policy_v1/weights/policy_v1"] {
        assert_eq!(server.call("load_weights", &json!({"path": path, "model_id": "policy_v1"}))["step"], 3);
    }
    let again = server.call("save_weights", &body);
    assert_eq!(again["category"], "user", "{again}");

    let (status, unknown) =
        server.post("forward_backward", &json!({"batches": rows, "model_id": "policy_v2"}));
    assert_eq!(status, 400);
    assert!(detail(&unknown).contains("policy_v2 does not exist; make it with POST /api/v1/create_model"));
}

#[test]
fn a_repeat_gets_the_same_future_and_another_body_an_error() {
    let server = Server::start();
    let first = server.submit("forward_backward", &forward_backward(1));
    assert_eq!(server.submit("forward_backward", &forward_backward(1)), first);
    let (status, reply) = server.post("forward", &forward_backward(1));
    assert_eq!(status, 400, "another call with the number: {reply}");
    assert!(detail(&reply).contains("seq_id 1 was used for another request"));
    // A gap is no matter, and a body without a number is never a repeat.
    server.call("forward_backward", &forward_backward(7));
    let unnumbered = json!({"batches": [{"input_ids": [1, 2]}]});
    assert_ne!(
        server.submit("forward_backward", &unnumbered),
        server.submit("forward_backward", &unnumbered)
    );
    // create_model opens an epoch: the numbers start again.
    server.call("create_model", &json!({"model_id": "default", "lora_config": {"rank": 16}}));
    let second = server.submit("forward_backward", &forward_backward(1));
    assert_ne!(second, first);
    server.retrieve(&second);
    let passes = server.engine.asked().iter().filter(|asked| matches!(asked.task, Task::Pass(_))).count();
    assert_eq!(passes, 5);
}

#[test]
fn a_poll_that_takes_long_is_a_408_with_cause_and_place() {
    let server = Server::start();
    server.call("forward_backward", &forward_backward(1));
    let gate = server.engine.gate.lock().unwrap();
    let first = server.submit("forward_backward", &forward_backward(2));
    let second = server.submit("optim_step", &json!({"seq_id": 3}));
    let started = Instant::now();
    let (status, waiting) = server.retrieve(&second);
    assert!(started.elapsed() >= Duration::from_millis(300), "answered early");
    assert_eq!((status, &waiting["queue_state"]), (408, &json!("active")));
    let reason = waiting["queue_state_reason"].as_str().unwrap();
    assert!(
        reason.starts_with("number 2 in the queue") && reason.ends_with("behind forward_backward of default"),
        "{reason}"
    );
    drop(gate);
    for id in [&first, &second, &second] {
        assert_eq!(server.retrieve(id).0, 200, "a result stays");
    }
    for id in ["future_1", "", "x", &first.replace("future_", "future_0")] {
        let (status, reply) = server.retrieve(id);
        assert_eq!(status, 404);
        assert!(detail(&reply).contains("is not known"));
    }
}

#[test]
fn a_permanent_failure_is_an_error_in_a_200() {
    let server = Server::start();
    let body = json!({"batches": [{"input_ids": [1, 2]}], "loss_fn": "stable_reinforce"});
    let failed = server.call("forward_backward", &body);
    assert_eq!(failed["category"], "user");
    assert!(failed["error"].as_str().unwrap().contains("importance_sampling"));
    let failed = server.call("load_weights", &json!({"path": "nothing"}));
    assert_eq!(failed["category"], "user");
    // An engine that ends answers what it has taken.
    let body = json!({"batches": [{"input_ids": [1, 2]}], "loss_fn": "panic"});
    let failed = server.call("forward_backward", &body);
    assert_eq!(failed["category"], "server");
    server.engine.state.lock().unwrap_or_else(PoisonError::into_inner).healthy = false;
    assert_eq!(server.get("/health").0, 503);
    assert_eq!(server.post("optim_step", &json!({})).0, 503);
}

#[test]
fn create_model_checks_base_rank_and_shape() {
    let server = Server::start();
    let create = |body: Value| server.post("create_model", &body);
    let config = json!({"lora_rank": 8, "lora_alpha": 4, "dropout": 0.1});
    let ok = json!({"model_id": "a", "base_model": "/models/base", "lora_config": config});
    let created = server.call("create_model", &ok);
    assert!(created["warning_message"].as_str().unwrap().contains("dropout 0.1 is ignored"));
    assert_eq!(create(ok).0, 200, "the same shape again");
    for (body, words) in [
        (json!({"model_id": "a", "lora_config": {"rank": 4}}), "model_id a exists with rank 8 and alpha 4"),
        (json!({"model_id": "b", "base_model": "org/other"}), "this server trains \"org/base\""),
        (json!({"model_id": "b", "lora_config": {"rank": 65}}), "more than this server's max_lora_rank, 64"),
        (
            json!({"model_id": "b", "lora_config": {"rank": 0}}),
            "lora_config.rank: expected an integer of at least 1, got 0",
        ),
        (json!({"model_id": "b", "lora_config": []}), "lora_config: invalid length 0"),
        (json!({"model_id": "../b"}), "model_id \"../b\": expected"),
        (json!({"model_id": 3}), "model_id: invalid type: integer `3`, expected a string"),
    ] {
        let (status, reply) = create(body.clone());
        assert_eq!(status, 400, "{body}");
        assert!(detail(&reply).contains(words), "{reply}");
    }
    let asked = server.engine.asked();
    let specs: Vec<(usize, f64)> = asked
        .iter()
        .filter(|asked| asked.model.as_str() == "a")
        .filter_map(|asked| match &asked.task {
            Task::Create(spec) => Some((spec.rank, spec.alpha)),
            _ => None,
        })
        .collect();
    assert_eq!(specs[0], (8, 4.0));
}

#[test]
fn an_adapter_that_is_unloaded_is_made_anew() {
    let server = Server::start();
    server.call("create_model", &json!({"model_id": "a"}));
    let body = json!({"model_id": "a", "type": "unload_model"});
    assert_eq!(server.call("unload_model", &body), json!({"model_id": "a", "type": "unload_model"}));
    let (status, reply) = server.post("optim_step", &json!({"model_id": "a"}));
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("create_model"));
    server.call("create_model", &json!({"model_id": "a", "lora_config": {"rank": 4}}));
    assert_eq!(server.call("optim_step", &json!({"model_id": "a"}))["metrics"]["step"], 1.0);
    assert_eq!(server.call("abort_gradient_epoch", &json!({"model_id": "a"}))["success"], true);
}

#[test]
fn paths_lead_nowhere_else() {
    let server = Server::start();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), server.output.path().join("link")).unwrap();
    server.call("create_model", &json!({"model_id": "a"}));
    for path in [
        "../x",
        "/tmp/x",
        "a/../../x",
        "%2e%2e/x",
        "..%2fx",
        "link/x",
        "weights/../x",
        "a\u{0}b",
        "xorl://a/../x",
        "weights/b/x",
    ] {
        let (status, reply) = server.post("save_weights", &json!({"model_id": "a", "path": path}));
        assert_eq!(status, 400, "{path}: {reply}");
        if path != "weights/b/x" {
            let (status, reply) = server.post("load_weights", &json!({"model_id": "a", "path": path}));
            assert_eq!(status, 400, "{path}: {reply}");
            assert!(server.post("weights_info", &json!({"xorl_path": path})).0 >= 400, "{path}");
            assert!(server.post("delete_checkpoint", &json!({"checkpoint_id": path})).0 >= 400, "{path}");
        }
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}
