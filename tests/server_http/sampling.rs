//! The calls that sample, of `tinker` and of `xorl-client`, by hand.

use super::{
    clients::keys,
    server::{LOG_PROB, Server, detail, double_token},
    tinker::start,
};
use prost::Message;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    sync::MutexGuard,
    thread,
    time::{Duration, Instant},
};
use xorl_dist::server::{
    keys::Keys,
    request::{ModelId, Source, Task},
    wire::tinker::proto::{Encoding, SampleResponse},
};

/// Sends a POST, and returns its body as bytes.
fn post_for_bytes(server: &Server, path: &str, headers: &str, body: &Value) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    bytes.split_off(end + 4)
}

/// The result of a request as protobuf.
fn result(server: &Server, id: &str) -> SampleResponse {
    let accept = "Accept: application/x-protobuf\r\n";
    let bytes = post_for_bytes(server, "/api/v1/retrieve_future", accept, &json!({"request_id": id}));
    SampleResponse::decode(&bytes[..]).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&bytes)))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect()
}

fn ids(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks::<4>().0.iter().map(|&four| i32::from_le_bytes(four).into()).collect()
}

/// A session with a sampler of the base.
fn base_sampler(server: &Server) -> (String, String) {
    let (session, _) = start(server);
    let body = json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/base",
        "type": "create_sampling_session"});
    let (status, reply) = server.post("create_sampling_session", &body);
    assert_eq!(status, 200, "{reply}");
    (session, reply["sampling_session_id"].as_str().unwrap().to_owned())
}

/// A request for 2 continuations of 3 tokens.
fn sample(sampler: &str, seq_id: i64) -> Value {
    json!({"sampling_session_id": sampler, "seq_id": seq_id, "num_samples": 2, "type": "sample",
        "prompt": {"chunks": [{"tokens": [5, 6], "type": "encoded_text"}, {"tokens": [7]}]},
        "sampling_params": {"max_tokens": 3, "temperature": 1.0, "top_k": -1, "top_p": 1.0}})
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    match field.split_once('.') {
        Some((outer, inner)) => body[outer][inner] = value,
        None => body[field] = value,
    }
    body
}

fn refused(server: &Server, name: &str, body: &Value, status: u16, words: &str) {
    let (got, reply) = server.post(name, body);
    assert_eq!(got, status, "{name} {body}: {reply}");
    assert!(detail(&reply).contains(words), "{name} {body}: {reply}");
}

#[test]
fn a_sample_is_answered_in_protobuf_and_json_with_ids_of_its_continuations() {
    let server = Server::start();
    let (_, sampler) = base_sampler(&server);
    let (status, reply) = server.post("asample", &sample(&sampler, 0));
    assert_eq!(status, 200, "{reply}");
    let names: BTreeSet<&str> =
        reply["sample_sequence_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    assert_eq!(names.len(), 2);
    let id = reply["request_id"].as_str().unwrap();
    let told = result(&server, id);
    for (n, one) in told.sequences.iter().enumerate() {
        let expected: Vec<i64> = (0..3).map(|i| double_token(&[5], n, i)).collect();
        assert_eq!((ids(&one.tokens), one.stop_reason), (expected, 1));
        assert_eq!(floats(one.logprobs.as_ref().unwrap()), [LOG_PROB; 3]);
    }
    assert!(told.prompt_logprobs.is_none() && told.topk_prompt_logprobs.is_none());
    let (_, told) = server.retrieve(id);
    assert_eq!(
        told["sequences"][1],
        json!({"stop_reason": "length", "tokens": [6, 7, 8], "logprobs": [-0.5, -0.5, -0.5]})
    );
    let (source, request) = server.engine.sampled.lock().unwrap()[0].clone();
    assert_eq!((source, request.prompt, request.count), (Source::Base, vec![5, 6, 7], 2));
    // Without `stop`, the model's end tokens end it.
    assert_eq!((request.stop.ids, request.max_new_tokens), (vec![99], 3));
}

#[test]
fn a_sample_is_carried_out_once_whatever_the_order_of_its_number() {
    let server = Server::start();
    let (_, sampler) = base_sampler(&server);
    let numbers = [1_000_000_000_000_000_000, 3, 0, 2_000_000_000];
    let first: Vec<String> = numbers.map(|number| server.submit("asample", &sample(&sampler, number))).into();
    let again: Vec<String> = numbers.map(|number| server.submit("asample", &sample(&sampler, number))).into();
    assert_eq!(first, again);
    assert_eq!(server.engine.sampled.lock().unwrap().len(), 4);
    let other = with(sample(&sampler, 3), "num_samples", json!(1));
    refused(&server, "asample", &other, 400, "seq_id 3 was sent before with another body");
    refused(&server, "asample", &sample(&sampler, -1), 400, "seq_id: expected a number, 0 or more");
    let without = with(sample(&sampler, 0), "seq_id", Value::Null);
    refused(&server, "asample", &without, 400, "beside sampling_session_id");
    // Without a seed no two requests have the same.
    let seeds: BTreeSet<u64> =
        server.engine.sampled.lock().unwrap().iter().map(|(_, request)| request.seed).collect();
    assert_eq!(seeds.len(), 4);
}

#[test]
fn each_parameter_reaches_the_engine_or_is_refused_by_name() {
    let server = Server::start();
    let (_, sampler) = base_sampler(&server);
    let mut number = 0;
    let mut asked = |field: &str, value: Value| {
        number += 1;
        server.submit("asample", &with(sample(&sampler, number), field, value));
        server.engine.sampled.lock().unwrap().last().unwrap().1.clone()
    };
    let params = json!({"max_tokens": 4, "seed": -7, "temperature": 0.25, "top_p": 0.5, "top_k": 9, "stop": ["a", "b"]});
    let request = asked("sampling_params", params);
    assert_eq!((request.max_new_tokens, request.seed), (4, (-7_i64).cast_unsigned()));
    assert_eq!(
        (request.choice.temperature, request.choice.top_p, request.choice.top_k),
        (0.25, 0.5, Some(9))
    );
    assert_eq!((request.stop.texts, request.stop.ids), (vec!["a".to_owned(), "b".to_owned()], vec![]));
    assert_eq!(asked("sampling_params.stop", json!("x")).stop.texts, ["x"]);
    assert_eq!(asked("sampling_params.stop", json!([3, 4])).stop.ids, [3, 4]);
    let nothing = asked("sampling_params.stop", json!([])).stop;
    assert!(nothing.ids.is_empty() && nothing.texts.is_empty());
    // As many tokens as the context leaves.
    assert_eq!(asked("sampling_params.max_tokens", Value::Null).max_new_tokens, 997);
    asked("record_stability_info", json!(true));
    asked("a_field_of_a_later_client", json!({"a": 1}));

    let image = json!({"chunks": [{"type": "image", "data": "", "format": "png"}]});
    let long = json!({"chunks": [{"tokens": vec![1; 1000]}]});
    for (field, value, words) in [
        ("prompt", image, "prompt.chunks[0] is image"),
        ("prompt", json!({"chunks": []}), "prompt: expected at least one token"),
        ("prompt", json!({"chunks": [{"tokens": [1, 100]}]}), "token 1 is 100: the vocabulary has 100 ids"),
        ("prompt", long, "prompt: 1000 tokens and one to sample are more than the 1000"),
        ("num_samples", json!(0), "num_samples: expected 1 to 1024, got 0"),
        ("num_samples", json!(1025), "num_samples: expected 1 to 1024"),
        ("sampling_params.max_tokens", json!(998), "sampling_params.max_tokens: expected 1 to 997"),
        ("sampling_params.max_tokens", json!(0), "sampling_params.max_tokens: expected 1 to"),
        ("sampling_params.temperature", json!(-0.1), "temperature: expected a number, 0 or more"),
        ("sampling_params.top_p", json!(0.0), "top_p: expected a number above 0"),
        ("sampling_params.top_k", json!(-2), "top_k: expected a positive number"),
        ("sampling_params.stop", json!([""]), "sampling_params.stop: expected texts of 1 to"),
        ("sampling_params.stop", json!([1.5]), "expected a text, a list of texts, or a list of token ids"),
        ("sampling_params.stop", json!([100]), "sampling_params.stop: token 0 is 100"),
        ("topk_prompt_logprobs", json!(129), "topk_prompt_logprobs: expected at most 128, got 129"),
        ("topk_sample_logprobs", json!(129), "topk_sample_logprobs: expected at most 128"),
        ("prompt_alt_tokens_k", json!(2), "prompt_alt_tokens_k: tokens are not drawn"),
        ("prompt_logprobs_last_n", json!(1), "beside prompt_logprobs"),
        ("sampling_session_id", json!("sess-1:sample:0"), "is not known: its session has ended"),
    ] {
        let body = with(sample(&sampler, 77), field, value);
        let status = if field == "sampling_session_id" { 404 } else { 400 };
        refused(&server, "asample", &body, status, words);
    }
    // A refused request has not used its number.
    server.submit("asample", &sample(&sampler, 77));
    let large = with(sample(&sampler, 78), "sampling_params.max_tokens", json!(900));
    let large = with(with(large, "num_samples", json!(1024)), "topk_sample_logprobs", json!(128));
    refused(&server, "asample", &large, 400, "more than the 16777216 tokens of one result");
}

#[test]
fn scores_of_a_prompt_are_told_where_they_are_wanted() {
    let server = Server::start();
    let (_, sampler) = base_sampler(&server);
    let scored = |seq_id: i64, more: Value| {
        let mut body = sample(&sampler, seq_id);
        body["prompt_logprobs"] = json!(true);
        body["topk_prompt_logprobs"] = json!(2);
        body["topk_sample_logprobs"] = json!(3);
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        server.submit("asample", &body)
    };
    let told = result(&server, &scored(0, json!({})));
    let prompt = floats(told.prompt_logprobs.as_ref().unwrap());
    assert!(prompt[0].is_nan() && prompt[1..] == [LOG_PROB; 2], "{prompt:?}");
    let top = told.topk_prompt_logprobs.unwrap();
    assert_eq!((top.k, top.length, ids(&top.token_ids)), (2, 3, vec![0, 0, 0, 1, 0, 1]));
    assert_eq!(floats(&top.logprobs), [-99999.0, -99999.0, LOG_PROB, LOG_PROB, LOG_PROB, LOG_PROB]);
    let new = told.sequences[0].topk_sampled_logprobs.as_ref().unwrap();
    assert_eq!((new.k, new.length, &ids(&new.token_ids)[..3]), (3, 3, &[0, 1, 2][..]));

    let id = scored(1, json!({"prompt_logprobs_last_n": 1}));
    let prompt = floats(result(&server, &id).prompt_logprobs.as_ref().unwrap());
    assert!(prompt[..2].iter().all(|value| value.is_nan()) && prompt[2] == LOG_PROB, "{prompt:?}");
    let (_, told) = server.retrieve(&id);
    assert_eq!(told["prompt_logprobs"], json!([null, null, -0.5]));
    assert_eq!(told["topk_prompt_logprobs"], json!([null, null, [[0, -0.5], [1, -0.5]]]));

    // Dense targets are answered dense, and CSR as CSR; -1 asks for nothing.
    let dense = json!({"data": [4, -1, 5, 6], "dtype": "int64", "shape": [2, 2]});
    let told =
        result(&server, &scored(2, json!({"target_prompt_logprobs": dense}))).target_prompt_logprobs.unwrap();
    let Some(Encoding::Dense(values)) = &told.encoding else { panic!("{told:?}") };
    assert_eq!((floats(values), told.shape), (vec![LOG_PROB, 0.0, LOG_PROB, LOG_PROB], vec![2, 2]));
    let csr = json!({"data": [7, 8], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 0, 2],
        "sparse_col_indices": [0, 2]});
    let told =
        result(&server, &scored(3, json!({"target_prompt_logprobs": csr}))).target_prompt_logprobs.unwrap();
    let Some(Encoding::SparseCsr(values)) = &told.encoding else { panic!("{told:?}") };
    assert_eq!(
        (floats(&values.values), values.col_indices.len(), told.shape),
        (vec![LOG_PROB; 2], 16, vec![2, 3])
    );
    let sampled = server.engine.sampled.lock().unwrap();
    let targets = |index: usize| sampled[index].1.wanted.prompt_targets.clone().unwrap();
    assert_eq!((targets(2).ids, targets(2).k), (vec![4, -1, 5, 6], 2));
    assert_eq!((targets(3).ids, targets(3).k), (vec![-1, -1, -1, 7, -1, 8], 3));
    drop(sampled);
    for (data, shape, words) in [
        (json!([1, 2, 3]), json!([3, 1]), "expected a shape of two sizes, [2, k]"),
        (json!([1, 2]), json!([2]), "expected a shape of two sizes, [2, k]"),
        (json!([-1, -1]), json!([2, 1]), "target_prompt_logprobs: no id"),
        (json!([1, 100]), json!([2, 1]), "target_prompt_logprobs: token 1 is 100"),
        (json!([]), json!([2, 129]), "129 ids at a position, at most 128"),
    ] {
        let targets = json!({"data": data, "dtype": "int64", "shape": shape});
        refused(
            &server,
            "asample",
            &with(sample(&sampler, 9), "target_prompt_logprobs", targets),
            400,
            words,
        );
    }
}

#[test]
fn a_sampler_is_of_a_model_as_it_was_at_its_number() {
    let server = Server::start();
    let (session, model) = start(&server);
    let freeze = json!({"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0, "kind": "snapshot",
        "type": "save_weights_for_sampler"});
    let waiting = server.submit("save_weights_for_sampler", &freeze);
    assert_eq!(server.retrieve(&waiting).0, 408, "it waits for number 1");
    let step = |seq_id: u64| json!({"model_id": model, "seq_id": seq_id, "type": "optim_step"});
    server.call("optim_step", &step(1));
    server.call("optim_step", &step(3));
    let (status, reply) = server.retrieve(&waiting);
    let sampler = format!("{session}:sample:0");
    assert_eq!((status, &reply["sampling_session_id"]), (200, &json!(sampler)), "{reply}");
    assert!(reply.get("path").is_none());
    let name = ModelId::new(sampler.as_str()).unwrap();
    let tasks: Vec<Task> = server.engine.asked().into_iter().map(|asked| asked.task).collect();
    let frozen = tasks.iter().position(|task| *task == Task::Freeze(name.clone())).unwrap();
    assert!(
        matches!(tasks[frozen - 1], Task::OptimStep(_)) && matches!(tasks[frozen + 1], Task::OptimStep(_))
    );
    assert!(!server.output.path().join("sampler_weights").exists(), "nothing is written");
    // A repeat finds it, and its number is used.
    assert_eq!(server.submit("save_weights_for_sampler", &freeze), waiting);
    let again = with(with(freeze, "seq_id", json!(4)), "kind", json!("inflight"));
    refused(&server, "save_weights_for_sampler", &again, 400, "sampling_session_seq_id 0 was sent before");
    server.call("optim_step", &step(5));
    assert_eq!(server.call("asample", &sample(&sampler, 0))["sequences"][0]["tokens"], json!([5, 6, 7]));
    assert_eq!(server.engine.sampled.lock().unwrap()[0].0, Source::Adapter(name));
    let (_, told) = server.get(&format!("/api/v1/samplers/{sampler}"));
    assert_eq!(told, json!({"sampler_id": sampler, "base_model": "org/base"}));
}

#[test]
fn a_sampler_of_a_path_is_made_once_and_again_after_a_failure() {
    let server = Server::start();
    let (session, model) = start(&server);
    let named = json!({"model_id": model, "seq_id": 1, "path": "one"});
    let path = server.call("save_weights_for_sampler", &named)["path"].as_str().unwrap().to_owned();
    let create = |number: u64, path: &str| {
        json!({"session_id": session, "sampling_session_seq_id": number, "model_path": path,
            "type": "create_sampling_session"})
    };
    let made = server.post("create_sampling_session", &create(0, &path));
    assert_eq!(made, server.post("create_sampling_session", &create(0, &path)));
    let sampler = made.1["sampling_session_id"].as_str().unwrap();
    let (_, told) = server.get(&format!("/api/v1/samplers/{sampler}"));
    assert_eq!(told, json!({"sampler_id": sampler, "base_model": "org/base", "model_path": path}));
    server.call("asample", &sample(sampler, 0));
    let (_, shown) = server.get(&format!("/api/v1/sessions/{session}"));
    assert_eq!(shown["sampler_ids"], json!([sampler]));

    let absent = format!("tinker://{model}/sampler_weights/two");
    refused(&server, "create_sampling_session", &create(0, &absent), 404, "no such checkpoint");
    refused(&server, "create_sampling_session", &create(1, &absent), 404, "no such checkpoint");
    // The same number works once the save is there.
    server.call("save_weights_for_sampler", &with(with(named, "seq_id", json!(2)), "path", json!("two")));
    assert_eq!(server.post("create_sampling_session", &create(1, &absent)).0, 200);
    let other = with(create(1, &path), "session_id", json!("sess-0"));
    refused(&server, "create_sampling_session", &other, 400, "session sess-0 has ended");
    refused(
        &server,
        "create_sampling_session",
        &create(1, &path),
        400,
        "sampling_session_seq_id 1 was sent before",
    );
    let none = with(create(3, &path), "model_path", Value::Null);
    refused(&server, "create_sampling_session", &none, 400, "expected model_path with");
    let base = with(none, "base_model", json!("org/other"));
    refused(&server, "create_sampling_session", &base, 400, "this server samples from \"org/base\" only");
}

#[test]
fn a_sample_names_weights_without_a_session_as_older_clients_do() {
    let server = Server::start();
    let (_, model) = start(&server);
    let named = json!({"model_id": model, "seq_id": 1, "path": "one"});
    let path = server.call("save_weights_for_sampler", &named)["path"].clone();
    let body = |field: &str, value: &Value| {
        let mut body = sample("", 0);
        let fields = body.as_object_mut().unwrap();
        fields.remove("sampling_session_id");
        fields.remove("seq_id");
        body[field] = value.clone();
        body
    };
    for (field, value) in [("base_model", &json!("org/base")), ("model_path", &path), ("model_path", &path)] {
        server.call("asample", &body(field, value));
    }
    let sources: Vec<Source> =
        server.engine.sampled.lock().unwrap().iter().map(|(source, _)| source.clone()).collect();
    assert!(sources[0] == Source::Base && sources[1] == sources[2] && sources[1] != Source::Base);
    let opened =
        server.engine.asked().iter().filter(|asked| matches!(asked.task, Task::OpenSampler { .. })).count();
    assert_eq!(opened, 1, "one sampler of a path");
    let other = body("base_model", &json!("org/other"));
    refused(&server, "asample", &other, 400, "this server samples from \"org/base\" only");
}

#[test]
fn a_sampler_that_cannot_be_made_is_refused_with_the_path_that_its_client_knows() {
    let server = Server::start();
    let (session, model) = start(&server);
    let named = json!({"model_id": model, "seq_id": 1, "path": "damaged"});
    let path = server.call("save_weights_for_sampler", &named)["path"].clone();
    let body = json!({"session_id": session, "sampling_session_seq_id": 0, "model_path": path,
        "type": "create_sampling_session"});
    let (status, reply) = server.post("create_sampling_session", &body);
    assert_eq!(status, 400, "{reply}");
    let text = detail(&reply);
    assert!(text.starts_with("sampler_weights/") && text.ends_with("/damaged is damaged"), "{text}");
}

/// Stops the engine before its next token.
pub fn stop(server: &Server) -> MutexGuard<'_, ()> {
    server.engine.gate.lock().unwrap()
}

#[test]
fn a_sample_that_is_cancelled_ends_and_training_does_not() {
    let server = Server::start();
    let (session, model) = start(&server);
    let body = json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/base",
        "type": "create_sampling_session"});
    let sampler =
        server.post("create_sampling_session", &body).1["sampling_session_id"].as_str().unwrap().to_owned();
    let gate = stop(&server);
    let id = server.submit("asample", &sample(&sampler, 0));
    let step = json!({"model_id": model, "seq_id": 1, "type": "optim_step"});
    let trains = server.submit("optim_step", &step);
    let cancel = |id: &str| server.post("cancel_future", &json!({"request_id": id, "type": "cancel_future"}));
    assert_eq!(cancel(&id), (200, json!({})));
    assert_eq!(cancel("future_1"), (200, json!({})), "one that is not known");
    let (status, reply) = cancel(&trains);
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("only those that sample"), "{reply}");
    drop(gate);
    let (status, reply) = server.retrieve(&id);
    assert_eq!((status, &reply["error"]), (200, &json!("cancelled")), "{reply}");
    assert_eq!(server.retrieve(&trains).1["metrics"]["step"], 1.0);
    // One that has its result keeps it.
    let id = server.submit("asample", &sample(&sampler, 1));
    let told = server.retrieve(&id);
    assert_eq!((cancel(&id).0, server.retrieve(&id)), (200, told));
}

#[test]
fn ends_of_samples_are_told_to_each_client_of_a_session() {
    let server = Server::start();
    let (_, sampler) = base_sampler(&server);
    let (_, joined) = server.post("join_sampling_session", &json!({"sampling_session_id": sampler}));
    assert_eq!(joined["client_counter"], 1);
    let (_, joined) = server.post("join_sampling_session", &json!({"sampling_session_id": sampler}));
    assert_eq!(joined["client_counter"], 2);
    let poll = |client: u64, cursor: &Value, timeout: Value| {
        let target =
            json!({"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": client});
        let body =
            json!({"target": target, "prev_cursor": cursor, "timeout": timeout, "retrieved_request_ids": []});
        let (status, reply) = server.post("retrieve_futures", &body);
        assert_eq!(status, 200, "{reply}");
        reply
    };
    let gate = stop(&server);
    let first = server.submit("asample", &sample(&sampler, 0));
    let cancelled = server.submit("asample", &sample(&sampler, 1));
    let of_other = server.submit("asample", &sample(&sampler, 2_000_000_005));
    server.post("cancel_future", &json!({"request_id": cancelled}));
    let began = Instant::now();
    assert_eq!(poll(0, &json!(0), json!(0)), json!({"cursor": 0, "completions": []}));
    assert!(began.elapsed() < Duration::from_millis(250), "it waited");
    drop(gate);
    let (mut cursor, mut ended) = (json!(0), BTreeSet::new());
    while ended.len() < 2 {
        let reply = poll(0, &cursor, Value::Null);
        for one in reply["completions"].as_array().unwrap() {
            ended.insert((
                one["request_id"].as_str().unwrap().to_owned(),
                one["state"].as_str().unwrap().to_owned(),
            ));
        }
        cursor = reply["cursor"].clone();
    }
    let expected = [(first, "finished".to_owned()), (cancelled, "failed".to_owned())];
    assert_eq!(ended, expected.into());
    assert_eq!(poll(0, &cursor, json!(0))["completions"], json!([]), "what is known is not told again");
    assert_eq!(poll(2, &json!(0), Value::Null)["completions"][0]["request_id"], json!(of_other));
    let none = json!({"target": {"sampling_session_id": "none"}});
    refused(&server, "retrieve_futures", &none, 404, "is not known");
    refused(&server, "join_sampling_session", &json!({"sampling_session_id": "none"}), 404, "is not known");
    let wrong = json!({"target": {"sampling_session_id": sampler}, "timeout": -1});
    refused(&server, "retrieve_futures", &wrong, 400, "timeout: expected seconds");
}

#[test]
fn samplers_end_with_their_session_and_are_of_their_tenant_alone() {
    let server = Server::with(keys(), |_| {});
    let post = |key: &str, name: &str, body: &Value| {
        let headers = [("X-API-Key", key), ("X-Stainless-Lang", "python")];
        server.send("POST", &format!("/api/v1/{name}"), &headers, body.to_string().as_bytes())
    };
    let (mine, theirs) = ("tml-one", "two");
    let (_, session) = post(mine, "create_session", &json!({}));
    let session = session["session_id"].as_str().unwrap();
    let create = json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/base"});
    let (status, made) = post(mine, "create_sampling_session", &create);
    assert_eq!(status, 200, "{made}");
    let sampler = made["sampling_session_id"].as_str().unwrap();
    let (status, taken) = post(mine, "asample", &sample(sampler, 0));
    assert_eq!(status, 200, "{taken}");
    for (name, body) in [
        ("asample", sample(sampler, 1)),
        ("join_sampling_session", json!({"sampling_session_id": sampler})),
        ("retrieve_futures", json!({"target": {"sampling_session_id": sampler}, "timeout": 0})),
        ("retrieve_future", json!({"request_id": taken["request_id"]})),
    ] {
        assert_eq!(post(theirs, name, &body).0, 404, "{name}");
    }
    assert_eq!(post(theirs, "create_sampling_session", &create).0, 400, "another's session");
    let get =
        |key: &str| server.send("GET", &format!("/api/v1/samplers/{sampler}"), &[("X-API-Key", key)], b"").0;
    assert_eq!((get(mine), get(theirs)), (200, 404));
    let count = || server.engine.sampled.lock().unwrap().len();
    assert_eq!(count(), 1);
    // Another's finish ends nothing.
    post(theirs, &format!("sessions/{session}/finish"), &json!({}));
    assert_eq!(get(mine), 200);
    post(mine, &format!("sessions/{session}/finish"), &json!({}));
    assert_eq!(get(mine), 404);
    let (status, reply) = post(mine, "asample", &sample(sampler, 2));
    assert_eq!(status, 404);
    assert!(detail(&reply).contains("make another sampling client"), "{reply}");
    assert_eq!(count(), 1);
}

#[test]
fn a_finished_session_unloads_its_samplers() {
    let server = Server::start();
    let (session, model) = start(&server);
    let freeze =
        |seq_id: u64| json!({"model_id": model, "seq_id": seq_id, "sampling_session_seq_id": seq_id});
    for seq_id in [1, 2] {
        server.call("save_weights_for_sampler", &freeze(seq_id));
    }
    let samplers = || server.engine.state.lock().unwrap().samplers.len();
    assert_eq!(samplers(), 2);
    server.post(&format!("sessions/{session}/finish"), &json!({}));
    let until = Instant::now() + Duration::from_secs(20);
    while samplers() > 0 {
        assert!(Instant::now() < until, "they stay");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A server with a tokenizer.
fn with_texts() -> Server {
    Server::with(Keys::default(), |settings| {
        settings.tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat/byte_level");
        settings.vocab_size = 437;
    })
}

/// `POST /generate`
fn generate(server: &Server, body: &Value) -> (u16, Value) {
    server.send("POST", "/generate", &[], body.to_string().as_bytes())
}

#[test]
fn generate_answers_as_sglang_does() {
    let server = with_texts();
    let params = json!({"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "n": 1, "seed": 1, "sampling_seed": 2,
        "stop": ["zzz"], "stop_token_ids": [42]});
    let body =
        json!({"input_ids": [40, 9], "sampling_params": params, "return_logprob": true, "model": "router"});
    let (status, reply) = generate(&server, &body);
    assert_eq!(status, 200, "{reply}");
    let request = server.engine.sampled.lock().unwrap()[0].1.clone();
    assert_eq!((request.seed, request.choice.top_k, request.prompt), (2, Some(7), vec![40, 9]));
    assert_eq!((request.stop.ids, request.stop.texts), (vec![42, 99], vec!["zzz".to_owned()]));
    assert_eq!(reply["output_ids"], json!([40, 41, 42]));
    assert_eq!(
        reply["meta_info"]["output_token_logprobs"],
        json!([[-0.5, 40, null], [-0.5, 41, null], [-0.5, 42, null]])
    );
    let meta = &reply["meta_info"];
    assert_eq!(
        (&meta["finish_reason"], &meta["prompt_tokens"], &meta["completion_tokens"]),
        (&json!("stop"), &json!(2), &json!(3))
    );
    // The token that ended it is no part of the text.
    let (_, longer) =
        generate(&server, &json!({"input_ids": [40], "sampling_params": {"max_new_tokens": 2}}));
    assert_eq!((&longer["text"], &longer["meta_info"]["finish_reason"]), (&reply["text"], &json!("length")));
    assert!(longer["meta_info"].get("output_token_logprobs").is_none());
    let (_, many) =
        generate(&server, &json!({"text": "hello", "sampling_params": {"n": 3, "max_new_tokens": 2}}));
    assert_eq!(many.as_array().unwrap().len(), 3);
    let prompt = server.engine.sampled.lock().unwrap().last().unwrap().1.prompt.clone();
    assert!(prompt.len() > 1 && prompt[0] > 0, "{prompt:?}");
}

#[test]
fn generate_samples_from_a_saved_adapter_by_its_name() {
    let server = with_texts();
    for (model, name) in [("default", "s"), ("policy_v1", "s")] {
        let body = json!({"model_id": model, "name": name});
        server.call("save_weights_for_sampler", &body);
    }
    let open = |path: &str| server.post("create_sampling_session", &json!({"model_path": path}));
    let body =
        |lora: &str| json!({"input_ids": [1], "lora_path": lora, "sampling_params": {"max_new_tokens": 1}});
    let (status, reply) = generate(&server, &body("s"));
    assert_eq!(status, 404);
    assert!(detail(&reply).contains("create_sampling_session"), "{reply}");
    let path = "xorl://default/sampler_weights/s";
    for path in [path, "sampler_weights/s", path] {
        let (status, reply) = open(path);
        assert_eq!(
            (status, &reply["success"], &reply["lora_name"]),
            (200, &json!(true), &json!("s")),
            "{reply}"
        );
    }
    assert_eq!(generate(&server, &body("s")).0, 200);
    assert_eq!(generate(&server, &body(path)).0, 200);
    let sources: Vec<Source> =
        server.engine.sampled.lock().unwrap().iter().map(|(source, _)| source.clone()).collect();
    assert!(sources[0] == sources[1] && sources[0] != Source::Base);
    // Another's weights do not come under the name in silence.
    let other = "xorl://policy_v1/sampler_weights/s";
    let (status, reply) = open(other);
    assert_eq!(status, 400);
    assert!(
        detail(&reply).contains("lora_path s is the name of xorl://default/sampler_weights/s"),
        "{reply}"
    );
    server.post("delete_checkpoint", &json!({"checkpoint_id": "sampler_weights/s"}));
    assert_eq!(open(other).0, 200);
    assert_eq!(generate(&server, &body("s")).0, 200);
    assert_ne!(server.engine.sampled.lock().unwrap()[2].0, sources[0]);
    let (status, reply) = open("xorl://default/sampler_weights/absent");
    assert_eq!(status, 404, "{reply}");
}

#[test]
fn generate_refuses_what_is_not_built_by_name() {
    let server = Server::start();
    let body = |field: &str, value: &Value| {
        with(json!({"input_ids": [1], "sampling_params": {}}), field, value.clone())
    };
    for (field, value) in [
        ("return_routed_experts", json!(true)),
        ("stream", json!(true)),
        ("image_data", json!(["x"])),
        ("logprob_start_len", json!(0)),
        ("sampling_params.min_p", json!(0.1)),
        ("sampling_params.repetition_penalty", json!(1.1)),
        ("sampling_params.json_schema", json!("{}")),
    ] {
        let (status, reply) = generate(&server, &body(field, &value));
        assert_eq!(status, 400, "{field}: {reply}");
        assert!(detail(&reply).starts_with(&format!("{field} is not served here")), "{reply}");
    }
    for (field, value) in [
        ("return_routed_experts", json!(false)),
        ("logprob_start_len", json!(-1)),
        ("sampling_params.min_p", json!(0)),
        ("sampling_params.repetition_penalty", json!(1.0)),
        ("rid", json!("x")),
    ] {
        let (status, reply) = generate(&server, &body(field, &value));
        assert_eq!(status, 200, "{field}: {reply}");
        assert!(reply.get("text").is_none(), "a server without a tokenizer: {reply}");
    }
    let (status, reply) = generate(&server, &json!({"text": "a"}));
    assert_eq!(status, 400);
    assert!(detail(&reply).contains("/models/base"), "{reply}");
    for body in [json!({}), json!({"text": "a", "input_ids": [1]})] {
        assert!(detail(&generate(&server, &body).1).contains("expected either text or input_ids"));
    }
}

#[test]
fn a_client_that_leaves_ends_its_generate() {
    let server = Server::start();
    let gate = stop(&server);
    let mut stream = TcpStream::connect(server.address).unwrap();
    let body = json!({"input_ids": [1], "sampling_params": {"max_new_tokens": 5}}).to_string();
    let head =
        format!("POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        while !is_so() {
            assert!(Instant::now() < until, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    wait("it was not asked for", &|| server.engine.sampled.lock().unwrap().len() == 1);
    assert!(server.engine.cancelled.lock().unwrap().is_empty());
    drop(stream);
    wait("it was not cancelled", &|| server.engine.cancelled.lock().unwrap().len() == 1);
    drop(gate);
}
