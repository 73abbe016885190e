//! The calls of `tinker` by hand: sessions, order, repeats, downloads, tenants.

use super::{
    clients::keys,
    server::{Double, Server, detail, settings},
};
use prost::Message;
use serde_json::{Value, json};
use std::{
    thread,
    time::{Duration, Instant},
};
use xorl_dist::server::{
    app::{App, Submission},
    futures::{Body, Render},
    keys::Keys,
    order::BodyHash,
    registry::Tenant,
    request::{ModelId, Task},
    wire::tinker::proto::{Chunk, ChunkKind, Datum, EncodedTextChunk, ForwardBackwardRequest},
};

/// A session with one model of rank 8.
pub fn start(server: &Server) -> (String, String) {
    let (status, session) = server.post("create_session", &json!({"tags": [], "type": "create_session"}));
    assert_eq!(status, 200, "{session}");
    let session = session["session_id"].as_str().unwrap().to_owned();
    let model = server.call("create_model", &create(&session, 0, 8));
    let model = model["model_id"].as_str().unwrap().to_owned();
    assert_eq!(model, format!("{session}:train:0"));
    (session, model)
}

fn create(session: &str, number: u64, rank: u64) -> Value {
    let lora = json!({"rank": rank, "train_unembed": true});
    json!({"session_id": session, "model_seq_id": number, "base_model": "org/base", "lora_config": lora})
}

/// A pass whose one datum has `tokens` tokens.
fn pass(model: &str, seq_id: u64, tokens: usize) -> Value {
    let (ids, targets) = (vec![1; tokens], vec![2; tokens]);
    let datum = json!({
        "model_input": {"chunks": [{"tokens": ids, "type": "encoded_text"}]},
        "loss_fn_inputs": {"target_tokens": {"data": targets, "dtype": "int64", "shape": [tokens]}},
    });
    let input = json!({"data": [datum], "loss_fn": "cross_entropy"});
    json!({"model_id": model, "seq_id": seq_id, "forward_backward_input": input})
}

/// Tokens of the passes that the engine was asked for, in order.
fn passes(server: &Server) -> Vec<usize> {
    let asked = server.engine.asked();
    let passes = asked.iter().filter_map(|asked| match &asked.task {
        Task::Pass(pass) => Some(pass.data[0].ids.len()),
        _ => None,
    });
    passes.collect()
}

fn with_gap(gap: Duration) -> Server {
    Server::with(Keys::default(), |settings| settings.futures.gap = gap)
}

const LONG: Duration = Duration::from_secs(600);

#[test]
fn requests_run_by_number_whatever_their_order_of_arrival() {
    let server = with_gap(LONG);
    let (_, model) = start(&server);
    let early: Vec<String> =
        [3, 2].map(|number| server.submit("forward_backward", &pass(&model, number, number as usize))).into();
    let (status, waits) = server.retrieve(&early[0]);
    assert_eq!((status, waits["queue_state"].as_str()), (408, Some("active")));
    let reason = waits["queue_state_reason"].as_str().unwrap();
    assert!(reason.contains(&format!("it waits for seq_id 1 of {model}, which has not arrived")), "{reason}");
    assert!(passes(&server).is_empty());
    server.call("forward_backward", &pass(&model, 1, 1));
    for id in &early {
        assert_eq!(server.retrieve(id).0, 200);
    }
    assert_eq!(passes(&server), [1, 2, 3]);
}

#[test]
fn a_request_that_never_comes_is_given_up_after_a_time() {
    let server = with_gap(Duration::from_millis(700));
    let (_, model) = start(&server);
    let began = Instant::now();
    let id = server.submit("forward_backward", &pass(&model, 2, 2));
    while server.retrieve(&id).0 == 408 {}
    let took = began.elapsed();
    assert!((Duration::from_millis(700)..Duration::from_secs(10)).contains(&took), "{took:?}");
    let (status, late) = server.post("forward_backward", &pass(&model, 1, 1));
    assert_eq!(status, 400);
    assert!(detail(&late).contains("seq_id 1 comes too late"), "{late}");
    assert_eq!(passes(&server), [2]);
}

#[test]
fn a_body_that_is_too_large_or_broken_has_used_up_the_number_in_its_first_bytes() {
    let server = Server::with(Keys::default(), |settings| {
        settings.futures.gap = LONG;
        settings.http.body = 1 << 20;
    });
    let (_, model) = start(&server);
    // Random bytes, since zstd would take the block of equal ones whole.
    let datum = |bytes: usize| {
        let tokens =
            (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>();
        let text = EncodedTextChunk { tokens: tokens.into() };
        let chunk = Chunk { kind: Some(ChunkKind::EncodedText(text)) };
        Datum { model_input: vec![chunk], ..Datum::default() }
    };
    let pass_of = |seq_id: i32, bytes: usize| {
        let model_id = model.clone();
        let pass =
            ForwardBackwardRequest { model_id, seq_id, data: vec![datum(bytes)], ..Default::default() };
        pass.encode_to_vec()
    };
    let send = |headers: &[(&str, &str)], body: &[u8]| {
        let kind = ("Content-Type", "application/x-protobuf");
        server.send("POST", "/api/v1/forward_backward", &[&[kind], headers].concat(), body).0
    };
    let waiting = server.submit("forward_backward", &pass(&model, 4, 4));
    let zstd = [("Content-Encoding", "zstd")];
    assert_eq!(send(&[], &pass_of(1, 2 << 20)), 413);
    assert_eq!(
        send(&zstd, &zstd::encode_all(&[pass_of(2, 0), vec![0; 4 << 20]].concat()[..], 3).unwrap()),
        413
    );
    assert_eq!(server.retrieve(&waiting).0, 408);
    let packed = zstd::encode_all(&pass_of(3, 1 << 19)[..], 3).unwrap();
    assert_eq!(send(&zstd, &packed[..packed.len() - 100]), 400);
    assert_eq!(server.retrieve(&waiting).0, 200);
    assert_eq!(passes(&server), [4]);
}

#[test]
fn a_refused_request_has_used_up_its_number() {
    let server = with_gap(LONG);
    let (_, model) = start(&server);
    let mut bad = pass(&model, 1, 1);
    bad["forward_backward_input"]["data"][0]["model_input"]["chunks"][0]["tokens"] = json!([100]);
    let (status, reply) = server.post("forward_backward", &bad);
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("the vocabulary has 100 ids"), "{reply}");
    let step = |seq_id: u64, lr: f64| json!({"model_id": model, "seq_id": seq_id, "type": "optim_step", "adam_params": {"learning_rate": lr}});
    assert_eq!(server.call("optim_step", &step(2, 0.1))["metrics"]["step"], 1.0);
    assert_eq!(server.post("optim_step", &step(3, -1.0)).0, 400);
    let (status, reply) = server
        .post("load_weights", &json!({"model_id": model, "seq_id": 4, "path": "../x", "optimizer": true}));
    assert_eq!(status, 400, "{reply}");
    // One that is refused when it waits leaves its number, too.
    let waiting = server.submit("forward_backward", &pass(&model, 6, 6));
    let sampler = json!({"model_id": model, "seq_id": 5});
    let (status, reply) = server.post("save_weights_for_sampler", &sampler);
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("expected either path"), "{reply}");
    assert_eq!(server.retrieve(&waiting).0, 200);
    let (status, reply) = server.post("forward_backward", &pass(&model, 3, 1));
    assert_eq!(status, 400, "{reply}");
    assert_eq!(passes(&server), [6]);
}

#[test]
fn a_repeat_gets_the_first_future_and_another_body_an_error() {
    let server = with_gap(LONG);
    let (session, model) = start(&server);
    let first = server.submit("forward_backward", &pass(&model, 2, 2));
    assert_eq!(server.submit("forward_backward", &pass(&model, 2, 2)), first);
    server.call("forward_backward", &pass(&model, 1, 1));
    assert_eq!(server.submit("forward_backward", &pass(&model, 2, 2)), first);
    for (name, body) in [("forward_backward", pass(&model, 2, 3)), ("forward", pass(&model, 2, 2))] {
        let (status, reply) = server.post(name, &body);
        assert_eq!(status, 400);
        assert!(detail(&reply).contains("seq_id 2 was sent before with another body"), "{reply}");
    }
    assert_eq!(passes(&server), [1, 2]);
    // Models of a session, too.
    let model = server.submit("create_model", &create(&session, 1, 8));
    assert_eq!(server.submit("create_model", &create(&session, 1, 8)), model);
    let (status, reply) = server.post("create_model", &create(&session, 1, 16));
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("model_seq_id 1 was sent before with another body"), "{reply}");
}

#[test]
fn requests_that_wait_hold_no_thread_and_are_refused_when_the_server_stops() {
    let mut server = Server::with(Keys::default(), |settings| {
        settings.futures.gap = LONG;
        settings.http.linger = Duration::from_secs(3);
    });
    let (_, model) = start(&server);
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads();
    let ids: Vec<String> =
        (2..502).map(|number| server.submit("forward_backward", &pass(&model, number, 1))).collect();
    assert!(threads() < before + 50, "{before} threads, and then {}", threads());
    assert!(passes(&server).is_empty());
    let began = Instant::now();
    server.shutdown.begin();
    while server.retrieve(&ids[0]).0 == 408 {}
    let (_, reply) = server.retrieve(&ids[499]);
    assert_eq!(reply["category"], "server", "{reply}");
    assert!(reply["error"].as_str().unwrap().contains("it was not carried out"), "{reply}");
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_session_tells_what_differs_and_ends() {
    let server = Server::start();
    let (status, created) =
        server.post("create_session", &json!({"user_metadata": {"n": 1}, "display_name": "d"}));
    assert_eq!(status, 200);
    assert!(created["info_message"].as_str().unwrap().contains("alpha 32"), "{created}");
    assert!(created["warning_message"].as_str().unwrap().contains("train_unembed is ignored"), "{created}");
    let session = created["session_id"].as_str().unwrap();
    let model = server.call("create_model", &create(session, 0, 8));
    assert!(model["warning_message"].as_str().unwrap().contains("train_unembed is ignored"), "{model}");
    let heartbeat = json!({"session_id": session, "type": "session_heartbeat"});
    assert_eq!(server.post("session_heartbeat", &heartbeat).0, 200);
    let (_, shown) = server.get(&format!("/api/v1/sessions/{session}"));
    assert_eq!(shown["training_run_ids"], json!([format!("{session}:train:0")]));
    assert_eq!((&shown["user_metadata"], &shown["display_name"]), (&json!({"n": "1"}), &json!("d")));
    let finish = format!("sessions/{session}/finish");
    assert_eq!(server.post(&finish, &json!({"reason": {"type": "success"}})).0, 200);
    let (status, ended) = server.post("session_heartbeat", &heartbeat);
    assert_eq!(status, 410, "{ended}");
    let (status, reply) = server.post("create_model", &create(session, 1, 8));
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("has ended"), "{reply}");
    assert_eq!(server.post("sessions/none/finish", &json!({})).0, 200);
    assert_eq!(server.get("/api/v1/sessions/none").0, 404);
}

#[test]
fn calls_of_accounts_are_refused_at_once_with_the_reason() {
    let server = Server::start();
    for (method, path, words) in [
        ("GET", "auth/apikey/me", "no accounts"),
        ("POST", "sessions/search", "not searched"),
        ("GET", "training_runs/a/checkpoints/weights/b/archive", "archives are not made"),
    ] {
        let (status, reply) =
            server.send(method, &format!("/api/v1/{path}"), &[("x-stainless-lang", "python")], b"{}");
        assert_eq!(status, 400, "{path}: {reply}");
        assert!(detail(&reply).contains(words), "{path}: {reply}");
    }
    let (status, reply) =
        server.send("PUT", "/api/v1/training_runs/a/checkpoints/weights/b/publish", &[], b"");
    assert_eq!(status, 405, "{reply}");
    assert!(detail(&reply).contains("takes POST, DELETE, got PUT"), "{reply}");
    let (status, reply) = server.get("/api/v1/training_runs/a/other");
    assert_eq!(status, 404, "{reply}");
}

#[test]
fn a_model_that_cannot_be_loaded_is_not_made() {
    let server = Server::start();
    let (session, model) = start(&server);
    for name in ["good", "damaged"] {
        let number = if name == "good" { 1 } else { 2 };
        server.call("save_weights", &json!({"model_id": model, "seq_id": number, "path": name}));
    }
    let load = |number: u64, name: &str| {
        let path = format!("tinker://{model}/weights/{name}");
        json!({"session_id": session, "model_seq_id": number, "path": path, "optimizer": true})
    };
    let loaded = server.call("load_weights", &load(1, "good"));
    assert_eq!(loaded["model_id"], format!("{session}:train:1"));
    let refused = server.call("load_weights", &load(2, "damaged"));
    assert_eq!(refused["category"], "user", "{refused}");
    assert!(refused["error"].as_str().unwrap().contains("is damaged"), "{refused}");
    let gone = ModelId::new(format!("{session}:train:2")).unwrap();
    assert_eq!(server.post("get_info", &json!({"model_id": gone, "type": "get_info"})).0, 400);
    let asked = server.engine.asked();
    let last = asked.iter().rfind(|asked| asked.model == gone).unwrap();
    assert_eq!(last.task, Task::Unload);
    // The same request again has the same result, and an absent checkpoint is known at once.
    assert_eq!(server.call("load_weights", &load(2, "damaged")), refused);
    let (status, reply) = server.post("load_weights", &load(3, "absent"));
    assert_eq!(status, 404, "{reply}");
}

#[test]
fn a_pass_is_read_and_answered_as_its_headers_say() {
    let server = Server::start();
    let (_, model) = start(&server);
    let packed = zstd::encode_all(pass(&model, 1, 3).to_string().as_bytes(), 1).unwrap();
    let json = [("content-type", "application/json"), ("content-encoding", "zstd")];
    let (status, reply) = server.send("POST", "/api/v1/forward_backward", &json, &packed);
    assert_eq!(status, 200, "{reply}");
    let id = json!({"request_id": reply["request_id"]}).to_string();
    let retrieve =
        |accept: &str| server.send("POST", "/api/v1/retrieve_future", &[("accept", accept)], id.as_bytes()).1;
    assert_eq!(retrieve("application/json")["metrics"]["loss:sum"], 1.5);
    // Results stay, in either form.
    assert!(retrieve("application/x-protobuf").as_str().unwrap().contains("loss:sum"));
    assert_eq!(retrieve("application/json")["metrics"]["loss:sum"], 1.5);
    let protobuf = [("content-type", "application/x-protobuf")];
    let (status, reply) = server.send("POST", "/api/v1/forward_backward", &protobuf, b"\xff\xff");
    assert_eq!(status, 400);
    assert!(detail(&reply).starts_with("body: "), "{reply}");
}

#[test]
fn tenants_see_their_own_runs_and_downloads_need_no_key() {
    let server = Server::with(keys(), |_| {});
    let send = |key: &str, method: &str, path: &str, body: &Value| {
        let headers = [("x-api-key", key), ("x-stainless-lang", "python")];
        server.send(method, &format!("/api/v1/{path}"), &headers, body.to_string().as_bytes())
    };
    let post = |path: &str, body: &Value| send("tml-one", "POST", path, body).1;
    let session = post("create_session", &json!({}))["session_id"].as_str().unwrap().to_owned();
    let call = |path: &str, body: &Value| {
        let id = post(path, body)["request_id"].clone();
        post("retrieve_future", &json!({"request_id": id}))
    };
    call("create_model", &create(&session, 0, 8));
    let run = format!("{session}:train:0");
    let saved = call("save_weights_external", &json!({"model_id": run, "seq_id": 1, "path": "out"}));
    assert_eq!(saved["path"], format!("tinker://{run}/external_weights/out"), "{saved}");
    let urls = format!("training_runs/{run}/checkpoints/external_weights/out/external_weights_urls");
    let (status, answer) = send("tml-one", "GET", &urls, &json!({}));
    assert_eq!(status, 200, "{answer}");
    let url = answer["urls"]["adapter_config.json"].as_str().unwrap();
    let path = url.strip_prefix("http://localhost").unwrap();
    let (status, file) = server.get(path);
    assert_eq!((status, &file["peft_type"]), (200, &json!("LORA")));
    for bad in [path.replace("adapter_config", "manifest"), path.replace("/lab/", "/other/")] {
        assert_eq!(server.get(&bad).0, 403, "{bad}");
    }
    assert_eq!(server.get("/api/v1/external_weights/../../x").0, 403);
    // Another tenant.
    let of_run = format!("training_runs/{run}");
    for (method, path) in [
        ("GET", of_run.clone()),
        ("GET", format!("{of_run}/checkpoints")),
        ("GET", urls),
        ("DELETE", format!("{of_run}/checkpoints/external_weights/out")),
        ("GET", format!("sessions/{session}")),
    ] {
        let (status, reply) = send("two", method, &path, &json!({}));
        assert_eq!(status, 404, "{path}: {reply}");
    }
    let (_, none) = send("two", "GET", "training_runs", &json!({}));
    assert_eq!(none["cursor"]["total_count"], 0);
    assert_eq!(send("two", "POST", "session_heartbeat", &json!({"session_id": session})).0, 410);
    assert_eq!(send("two", "POST", "create_model", &create(&session, 1, 8)).0, 400);
    assert_eq!(send("tml-two", "GET", "training_runs", &json!({})).0, 401);
    let (status, _) =
        send("tml-one", "DELETE", &format!("{of_run}/checkpoints/external_weights/out"), &json!({}));
    assert_eq!(status, 204);
    assert_eq!(server.get(path).0, 404);
}

#[test]
fn a_server_that_was_restarted_goes_on_behind_the_last_number() {
    let (engine, output) = (Double::start(), tempfile::tempdir().unwrap());
    let app = || App::new(engine.clone(), settings(output.path()), Keys::default());
    let (tenant, model) = (Tenant::everyone(), ModelId::new("sess-1:train:0").unwrap());
    let render = || -> Render { Box::new(|_, _| Body::json(&json!({}))) };
    let send = |app: &App, number: i64| {
        app.submit_in_order(Submission {
            tenant: &tenant,
            model: &model,
            call: "abort",
            number: Some((number, BodyHash::of(b""))),
            task: Task::AbortGradients,
            render: render(),
        })
    };
    let asked = |count: usize| {
        while engine.asked().len() < count {
            thread::sleep(Duration::from_millis(5));
        }
        engine.asked().len()
    };
    let first = app();
    first.create(&tenant, &model, settings(output.path()).adapter, render()).unwrap();
    first.begin_order(&tenant, &model);
    for number in [1, 2, 4] {
        send(&first, number).unwrap();
    }
    assert_eq!(asked(3), 3);
    first.drain();
    assert_eq!(first.last_numbers()[&model], 4, "what was held back is given up");
    let second = app();
    second.resume_numbers(&first.last_numbers());
    for number in [2, 3, 4] {
        assert!(send(&second, number).unwrap_err().detail.contains("comes too late"), "{number}");
    }
    send(&second, 5).unwrap();
    assert_eq!(asked(4), 4);
}

#[test]
fn two_clients_that_send_at_once_keep_their_own_orders() {
    let server = with_gap(LONG);
    let models: Vec<String> = (0..2).map(|_| start(&server).1).collect();
    thread::scope(|scope| {
        for model in &models {
            for number in [4, 3, 2, 1] {
                let server = &server;
                scope.spawn(move || server.call("forward_backward", &pass(model, number, number as usize)));
            }
        }
    });
    for model in &models {
        let asked = server.engine.asked();
        let own = asked.iter().filter(|asked| asked.model.as_str() == model);
        let tokens: Vec<usize> = own
            .filter_map(
                |asked| if let Task::Pass(pass) = &asked.task { Some(pass.data[0].ids.len()) } else { None },
            )
            .collect();
        assert_eq!(tokens, [1, 2, 3, 4]);
    }
}
