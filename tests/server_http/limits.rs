//! Keys and tenants, limits, slow and broken clients, and the end of the server.

use super::server::{Double, Server, detail, forward_backward, model_state, settings};
use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use xorl_dist::server::{
    app::{App, Submission},
    futures::Body,
    keys::Keys,
    registry::{Loss, Tenant},
    request::{AdapterSpec, Engine, ModelId, Reply, Task},
};

#[test]
fn tenants_see_only_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let hash = |key: &str| format!("{:x}", Sha256::digest(key));
    fs::write(&path, format!("{} one\n{} two\n", hash("tml-one"), hash("tml-two"))).unwrap();
    let server = Server::with(Keys::read(&path).unwrap(), |_| {});
    let post = |header: (&str, &str), name: &str, body: &Value| {
        server.send("POST", &format!("/api/v1/{name}"), &[header], body.to_string().as_bytes())
    };
    let (one, two) = (("X-API-Key", "tml-one"), ("Authorization", "Bearer tml-two"));
    for header in [("X-API-Key", "tml-three"), ("Authorization", "Bearer x"), ("Cookie", "tml-one")] {
        let (status, reply) = post(header, "list_checkpoints", &json!({}));
        assert_eq!(status, 401);
        assert!(detail(&reply).contains("X-API-Key"));
    }
    assert_eq!(
        (server.get("/metrics").0, server.get("/health").0, server.get("/api/v1/healthz").0),
        (401, 200, 200)
    );
    let body = json!({"model_id": "a"});
    let id = post(one, "create_model", &body).1["request_id"].clone();
    let future = json!({"request_id": id});
    assert_eq!(
        (post(one, "retrieve_future", &future).0, post(two, "retrieve_future", &future).0),
        (200, 404)
    );
    assert_eq!(post(two, "optim_step", &body).0, 400, "another tenant's adapter is unknown");
    let save = json!({"model_id": "a", "path": "n"});
    let saved = post(one, "save_weights", &save).1["request_id"].clone();
    post(one, "retrieve_future", &json!({"request_id": saved}));
    assert!(server.output.path().join("tenants/one/weights/a/n/manifest.json").is_file());
    let listed = |header| post(header, "list_checkpoints", &body).1["checkpoints"].as_array().unwrap().len();
    assert_eq!((listed(one), listed(two)), (1, 0));
    for path in ["xorl://a/weights/n", "a/n", "tenants/one/weights/a/n", "../one/weights/a/n"] {
        assert_ne!(post(two, "weights_info", &json!({"xorl_path": path})).0, 200, "{path}");
        assert_ne!(post(two, "delete_checkpoint", &json!({"checkpoint_id": path})).0, 200, "{path}");
    }
    let runs = |header| {
        server.send("GET", "/api/v1/training_runs", &[header], b"").1["cursor"]["total_count"].clone()
    };
    assert_eq!((runs(one), runs(two)), (json!(1), json!(0)));
    // Each has its own adapter of one name.
    post(two, "create_model", &json!({"model_id": "a", "lora_config": {"rank": 4}}));
    let names: Vec<String> = server.engine.state().models.into_keys().collect();
    assert!(names.contains(&"one:a".to_owned()), "{names:?}");
}

#[test]
fn limits_are_answered_with_their_status() {
    let server = Server::with(Keys::default(), |settings| {
        settings.http.body = 3 << 20;
        settings.futures.pending = 2;
    });
    let post = |headers: &[(&str, &str)], body: &[u8]| {
        server.send("POST", "/api/v1/forward_backward", headers, body)
    };
    assert_eq!(post(&[], &vec![b' '; 4 << 20]).0, 413);
    let bomb = zstd::encode_all(&vec![b' '; 50 << 20][..], 3).unwrap();
    let zstd = [("Content-Encoding", "zstd")];
    assert_eq!(post(&zstd, &bomb).0, 413);
    let (status, reply) = post(&zstd, b"not zstd at all");
    assert!(status == 400 && detail(&reply).contains("not whole zstd"), "{reply}");
    assert_eq!(post(&[("Content-Encoding", "br")], b"{}").0, 415);
    let nested = "[".repeat(100_000);
    for body in [nested.clone(), format!("{{\"batches\": {nested}"), format!("{{\"x\": {nested}")] {
        let (status, reply) = post(&[], body.as_bytes());
        assert!(status == 400 && detail(&reply).starts_with("body: "), "{status}: {reply}");
    }
    let large = json!({"x": "a".repeat(2 << 20)});
    assert_eq!(server.post("optim_step", &large).0, 413);
    let long = json!({"batches": [{"input_ids": vec![1; 1001]}]});
    let (status, reply) = server.post("forward_backward", &long);
    assert!(status == 400 && detail(&reply).contains("1001 tokens are more than the 1000"), "{reply}");
    let packed = zstd::encode_all(forward_backward(1).to_string().as_bytes(), 3).unwrap();
    let (status, reply) = post(&zstd, &packed);
    assert_eq!(status, 200, "{reply}");
    server.retrieve(reply["request_id"].as_str().unwrap());

    let gate = server.engine.gate.lock().unwrap();
    for _ in 0..2 {
        server.submit("optim_step", &json!({}));
    }
    let (status, reply) = server.post("optim_step", &json!({}));
    assert!(status == 429 && detail(&reply).contains("2 requests wait already"), "{reply}");
    drop(gate);
    assert_eq!(server.get("/api/v1/nothing").0, 404);
    assert_eq!(server.get("/api/v1/optim_step").0, 405);
    assert_eq!(server.send("DELETE", "/api/v1/training_runs", &[], b"").0, 405);
}

#[test]
fn slow_clients_lose_their_connections_and_others_do_not_wait() {
    let server = Server::with(Keys::default(), |settings| {
        settings.http.head_time = Duration::from_millis(300);
        settings.http.body_time = Duration::from_millis(300);
        settings.http.idle_time = Duration::from_millis(900);
        settings.futures.poll = Duration::from_millis(1500);
    });
    let connect = || {
        let stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    };
    // A head that comes byte by byte.
    let mut slow = connect();
    let started = Instant::now();
    let text =
        "GET /health HTTP/1.1\r\nHost: localhost\r\nName: a-name-that-is-long-enough-to-take-its-time\r\n";
    let sent = text.bytes().take_while(|&byte| {
        thread::sleep(Duration::from_millis(50));
        slow.write_all(&[byte]).is_ok()
    });
    assert!(sent.count() < text.len(), "the connection was not closed");
    assert!(started.elapsed() < Duration::from_secs(3));
    // A body that does not come.
    let mut slow = connect();
    slow.write_all(b"POST /api/v1/optim_step HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        .unwrap();
    let mut answer = [0; 400];
    let read = slow.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    // A connection that says nothing.
    let started = Instant::now();
    assert_eq!(connect().read(&mut [0; 10]).unwrap_or(0), 0);
    assert!(started.elapsed() < Duration::from_secs(5));
    // A long poll is no slow client, even when it outlasts all limits.
    let gate = server.engine.gate.lock().unwrap();
    let id = server.submit("optim_step", &json!({}));
    assert_eq!(server.retrieve(&id).0, 408);
    drop(gate);
    assert_eq!(server.retrieve(&id).0, 200);
}

#[test]
fn one_connection_serves_many_requests() {
    let server = Server::start();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let started = Instant::now();
    for _ in 0..50 {
        stream.write_all(b"GET /api/v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut bytes = [0; 300];
        let read = stream.read(&mut bytes).unwrap();
        assert!(bytes[..read].ends_with(b"{\"status\":\"ok\"}"));
    }
    // 40 ms a request would be Nagle's.
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn calls_that_are_not_served_say_so_by_name() {
    let server = Server::start();
    for path in [
        "/sync_inference_weights",
        "/add_inference_endpoint",
        "/api/v1/wake_up",
        "/api/v1/update_serverless_weights",
    ] {
        let (status, reply) = server.send("POST", path, &[], b"{}");
        let name = path.rsplit('/').next().unwrap();
        assert!(
            status == 400 && detail(&reply).starts_with(&format!("{name} is not served: ")),
            "{path}: {reply}"
        );
    }
}

#[test]
fn unknown_fields_and_parameters_are_ignored() {
    let server = Server::start();
    let body = json!({"model": "x", "new": {"a": [1, {"b": null}]}, "batches": [{"input_ids": [1, 2], "text": "a"}],
        "loss_fn_params": {"a": 1, "b": "x", "c": true, "d": null}, "other": [[1], "a"]});
    let (status, reply) =
        server.send("POST", "/api/v1/forward_backward?beta=1&x", &[], body.to_string().as_bytes());
    assert_eq!(status, 200, "{reply}");
    assert_eq!(server.get("/api/v1/session_info?%zz=1&model_id=default").0, 200);
    let (status, text) = server.get("/metrics");
    assert_eq!(status, 200);
    let text = text.as_str().unwrap();
    for line in
        ["xorl_http_requests_total{call=\"forward_backward\",status=\"200\"} 1", "xorl_engine_healthy 1"]
    {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn what_was_taken_is_carried_out_before_the_server_ends() {
    let mut server = Server::start();
    server.call("forward_backward", &forward_backward(1));
    let gate = server.engine.gate.clone();
    let held = gate.lock().unwrap();
    let id = server.submit("optim_step", &json!({"seq_id": 2}));
    server.shutdown.begin();
    // New requests are refused; the future is still there for its client.
    let refused = (0..100).find_map(|_| {
        thread::sleep(Duration::from_millis(10));
        Some(server.post("abort_gradient_epoch", &json!({}))).filter(|(status, _)| *status == 503)
    });
    assert!(detail(&refused.unwrap().1).contains("the server is stopping"));
    assert_eq!(server.retrieve(&id).0, 408);
    drop(held);
    assert_eq!(server.retrieve(&id).1["metrics"]["step"], 1.0);
    server.stop();
    assert!(TcpStream::connect(server.address).is_err(), "the port is closed");
}

#[test]
fn a_server_that_stops_says_so() {
    let mut server = Server::start();
    let gate = server.engine.gate.clone();
    let held = gate.lock().unwrap();
    server.submit("create_model", &json!({"model_id": "a"}));
    server.shutdown.begin();
    let stopping = (0..200).find_map(|_| {
        thread::sleep(Duration::from_millis(10));
        Some(server.get("/health")).filter(|(status, _)| *status != 200)
    });
    let (status, health) = stopping.unwrap();
    assert_eq!(
        (status, &health["status"], &health["engine_running"]),
        (503, &json!("stopping"), &json!(true))
    );
    drop(held);
    server.stop();
}

#[test]
fn pages_of_other_sites_and_names_that_lead_here_are_refused() {
    let server = Server::start();
    let own = format!("http://{}", server.address);
    let send = |host: &str, origin: &str, method: &str, path: &str| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{origin}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    let here = server.address.to_string();
    for origin in [String::new(), format!("Origin: {own}\r\n")] {
        assert!(send(&here, &origin, "GET", "/").starts_with("HTTP/1.1 200"), "{origin}");
        assert!(send(&here, &origin, "POST", "/api/v1/list_checkpoints").starts_with("HTTP/1.1 200"));
    }
    for path in ["/api/v1/list_checkpoints", "/v1/completions", "/create_model"] {
        let answer = send(&here, "Origin: https://evil.example\r\n", "POST", path);
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("pages of other sites"), "{answer}");
        let answer = send("evil.example:80", "Origin: http://evil.example:80\r\n", "POST", path);
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("api_host"), "{answer}");
    }
    assert!(server.engine.asked().iter().all(|request| request.model.as_str() == "policy_v1"));
    for path in ["/health", "/api/v1/healthz", "/metrics", "/openapi.json", "/"] {
        assert!(send(&here, "", "POST", path).starts_with("HTTP/1.1 405"), "{path}");
    }
}

#[test]
fn a_lost_adapter_that_is_unloaded_is_forgotten() {
    let output = tempfile::tempdir().unwrap();
    let app = App::new(Double::start(), settings(output.path()), Keys::default());
    let (tenant, model) = (Tenant::everyone(), ModelId::new("old").unwrap());
    let tell = |_: &Path, _: &ModelId| "it is lost".to_owned();
    app.registry().lose(tenant.clone(), model.clone(), Loss { root: output.path().into(), tell });
    let submit = |task| {
        let render = Box::new(|_: &Reply, _| Body::json(&json!({})));
        app.submit(Submission { tenant: &tenant, model: &model, call: "x", number: None, task, render })
    };
    assert_eq!(submit(Task::AbortGradients).unwrap_err().detail, "it is lost");
    submit(Task::Unload).unwrap();
    assert!(submit(Task::AbortGradients).unwrap_err().detail.contains("does not exist"));
    assert!(!app.registry().is_lost(&tenant, &model));
}

#[test]
fn adapters_of_the_engine_are_there_after_a_restart() {
    let output = tempfile::tempdir().unwrap();
    let engine = Double::start();
    let spec = AdapterSpec { rank: 7, ..settings(output.path()).adapter };
    let state = model_state(spec, 5, 1);
    engine.state.lock().unwrap().models.insert("old".into(), state);
    let app = App::new(engine, settings(output.path()), Keys::default());
    let old = ModelId::new("old").unwrap();
    assert_eq!(app.spec(&Tenant::everyone(), &old).unwrap().rank, 7);
}

/// A body of the client with parts cut out, doubled and replaced.
fn broken() -> impl Strategy<Value = Vec<u8>> {
    let bodies = [
        forward_backward(1).to_string(),
        json!({"batches": [{"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]}]}).to_string(),
        json!({"model_id": "a", "seq_id": 1, "path": "xorl://a/weights/n", "request_id": "future_1"})
            .to_string(),
        json!({"checkpoint_id": "weights/n", "xorl_path": "a/n", "lora_config": {"rank": 8}}).to_string(),
    ];
    let pieces = "{ } [ ] , : \" null 1e999 -1 18446744073709551616 \\u0000 \u{0} 1.5".split(' ');
    let edits = prop::collection::vec(
        (any::<prop::sample::Index>(), 0usize..6, prop::sample::select(pieces.collect::<Vec<_>>())),
        0..5,
    );
    (prop::sample::select(bodies.to_vec()), edits).prop_map(|(body, edits)| {
        let mut bytes = body.into_bytes();
        for (at, cut, piece) in edits {
            let at = at.index(bytes.len());
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, piece.bytes());
            bytes.push(b' ');
        }
        bytes
    })
}

#[test]
fn broken_bodies_are_faults_of_the_client() {
    let server = Server::with(Keys::default(), |settings| settings.futures.pending = 100_000);
    let names = [
        "forward_backward",
        "forward",
        "optim_step",
        "create_model",
        "save_weights",
        "load_weights",
        "delete_checkpoint",
        "weights_info",
        "list_checkpoints",
        "retrieve_future",
        "get_info",
        "unload_model",
    ];
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
    let sent = (broken(), prop::sample::select(names.to_vec()), any::<bool>(), 0usize..12);
    proptest!(config, |((body, name, pack, cut) in sent)| {
        let headers: &[(&str, &str)] = if pack { &[("Content-Encoding", "zstd")] } else { &[] };
        let mut sent = if pack { zstd::encode_all(&body[..], 1).unwrap() } else { body };
        sent.truncate(sent.len() - cut.saturating_sub(6).min(sent.len()));
        let (status, reply) = server.send("POST", &format!("/api/v1/{name}"), headers, &sent);
        prop_assert!((200..500).contains(&status) && status != 409, "{} {}: {}", name, status, reply);
        if status != 200 && status != 408 {
            prop_assert!(reply["detail"].is_string(), "{} {}: {}", name, status, reply);
        }
    });
}
