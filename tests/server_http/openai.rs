//! The calls of OpenAI's clients: by hand, and by the `openai` package.

use super::{
    clients::keys,
    server::{Server, detail},
};
use crate::common::client_python;
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use xorl_dist::{
    data::Tokenizer,
    infer::request::{Choice, SampleRequest},
    server::{
        app::Settings,
        keys::Keys,
        request::{ModelId, Source, Ticket},
    },
};

/// A server whose double knows texts: its tokens follow each other, those of a chat from `8` on.
struct Texts(Server);

impl Texts {
    fn start() -> Self {
        Self::with(Keys::default(), |_| {})
    }

    fn with(keys: Keys, change: impl FnOnce(&mut Settings)) -> Self {
        Self(Server::with_texts(keys, change))
    }

    fn post(&self, call: &str, body: &Value) -> (u16, Value) {
        self.0.send("POST", &format!("/v1/{call}"), &[], body.to_string().as_bytes())
    }

    /// The answer to a request that is in order.
    fn ask(&self, call: &str, body: &Value) -> Value {
        let (status, answer) = self.post(call, body);
        assert_eq!(status, 200, "{body}: {answer}");
        answer
    }

    fn complete(&self, more: Value) -> Value {
        self.ask("completions", &with(json!({"model": "org/base", "prompt": "A"}), more))
    }

    fn chat(&self, more: Value) -> Value {
        self.ask("chat/completions", &with(chat(), more))
    }

    /// The error of a request that is refused.
    fn refused(&self, call: &str, body: &Value) -> (u16, Value) {
        let (status, answer) = self.post(call, body);
        let error = answer["error"].clone();
        assert!(status >= 400 && error["message"].is_string(), "{body}: {status} {answer}");
        (status, error)
    }

    /// The last request to sample.
    fn sampled(&self) -> (Source, SampleRequest) {
        self.0.engine.sampled.lock().unwrap().last().unwrap().clone()
    }

    /// The events of a stream, the last one `[DONE]`.
    fn events(&self, call: &str, body: Value) -> Vec<Value> {
        let Value::String(text) = self.ask(call, &with(body, json!({"stream": true}))) else {
            panic!("no stream")
        };
        let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (last, events) = data.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    fn encode(&self, text: &str) -> Vec<i64> {
        Tokenizer::load(self.0.tokenizer.as_ref().unwrap().path()).unwrap().encode(text).unwrap()
    }
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat() -> Value {
    json!({"model": "org/base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3})
}

/// A field of every choice.
fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[test]
fn a_chat_is_rendered_by_the_models_template_and_answered() {
    let server = Texts::start();
    let answer = server.chat(json!({}));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "89:"}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("length"), &Value::Null));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("org/base")));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-") && answer["created"].is_u64());
    let prompt = "<|im_start|>system\nYou answer briefly.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n\
                  <|im_start|>assistant\n";
    let (source, request) = server.sampled();
    assert_eq!((source, &request.prompt), (Source::Base, &server.encode(prompt)));
    let tokens = request.prompt.len();
    let usage = json!({"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3});
    assert_eq!(answer["usage"], usage);
    // A chat may fill the context.
    let mut body = chat();
    body.as_object_mut().unwrap().remove("max_tokens");
    server.ask("chat/completions", &body);
    assert_eq!(server.sampled().1.max_new_tokens, 1000 - tokens);
    let newer = server.chat(json!({"max_completion_tokens": 2}));
    assert_eq!(newer["choices"][0]["message"]["content"], "89");
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    server.chat(json!({"messages": parts}));
    assert_eq!(server.sampled().1.prompt, request.prompt);
}

#[test]
fn every_field_reaches_the_engine() {
    let server = Texts::start();
    server.complete(json!({}));
    let (_, request) = server.sampled();
    assert_eq!((request.max_new_tokens, request.count, &request.prompt[..]), (16, 1, &[32][..]));
    assert_eq!(request.choice, Choice { temperature: 1.0, top_p: 1.0, top_k: None });
    assert_eq!((&request.stop.ids[..], request.stop.texts.len()), (&[99][..], 0));
    server.complete(json!({"max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 7, "n": 2, "best_of": 2, "seed": -3,
        "stop": ["x", "y"], "stop_token_ids": [50], "logprobs": 3, "user": "me", "metadata": {"a": "b"}, "store": false,
        "presence_penalty": 0, "logit_bias": {}, "suffix": null, "new_field": [1]}));
    let (_, request) = server.sampled();
    assert_eq!((request.max_new_tokens, request.count, request.seed), (5, 2, (-3_i64).cast_unsigned()));
    assert_eq!(request.choice, Choice { temperature: 0.0, top_p: 0.5, top_k: Some(7) });
    assert_eq!(
        (&request.stop.ids[..], &request.stop.texts[..]),
        (&[50, 99][..], &["x".into(), "y".into()][..])
    );
    assert_eq!((request.wanted.new_top, request.wanted.prompt), (3, false));
    server.complete(json!({"top_k": -1, "stop": "z"}));
    let (_, other) = server.sampled();
    assert_eq!((other.choice.top_k, &other.stop.texts[..]), (None, &["z".to_owned()][..]));
    server.complete(json!({}));
    assert_ne!(other.seed, server.sampled().1.seed, "without a seed each request has its own");
}

#[test]
fn prompts_of_every_form_are_continued_in_order() {
    let server = Texts::start();
    for (prompt, expected) in [
        (json!("A"), vec!["AB", "BC"]),
        (json!(["A", "a"]), vec!["AB", "BC", "ab", "bc"]),
        (json!([32, 5]), vec!["AB", "BC"]),
        (json!([[64], [32, 1]]), vec!["ab", "bc", "AB", "BC"]),
    ] {
        let answer = server.complete(json!({"prompt": prompt, "n": 2, "max_tokens": 2}));
        assert_eq!(texts(&answer), expected, "{prompt}");
        let choices = answer["choices"].as_array().unwrap().iter();
        let indices: Vec<u64> = choices.map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, (0..expected.len() as u64).collect::<Vec<_>>());
        assert_eq!(answer["usage"]["completion_tokens"], 2 * expected.len());
    }
    let usage = server.complete(json!({"prompt": [[1, 2], [3]], "n": 3, "max_tokens": 1}))["usage"].clone();
    assert_eq!(usage, json!({"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}));
}

#[test]
fn text_ends_before_what_ends_it() {
    let server = Texts::start();
    let ended = |more: Value| {
        let answer = server.complete(more);
        let reason = answer["choices"][0]["finish_reason"].as_str().unwrap().to_owned();
        (texts(&answer)[0].to_owned(), reason, answer["usage"]["completion_tokens"].as_u64().unwrap())
    };
    let stop = |text: &str, tokens| (text.to_owned(), "stop".to_owned(), tokens);
    assert_eq!(ended(json!({"max_tokens": 4})), ("ABCD".into(), "length".into(), 4));
    assert_eq!(ended(json!({"stop_token_ids": [35]})), stop("ABC", 4));
    assert_eq!(ended(json!({"stop": "CD", "max_tokens": 6})), stop("AB", 6));
    assert_eq!(ended(json!({"stop": ["x", "EF", "DE"], "max_tokens": 6})), stop("ABC", 6));
    // The double's tokens 94 to 98 are bytes within characters, and 99 is the end token.
    let (text, reason, tokens) = ended(json!({"prompt": "|"}));
    assert!(
        text.starts_with("|}~") && text.chars().skip(3).all(|c| c == char::REPLACEMENT_CHARACTER),
        "{text}"
    );
    assert_eq!((reason.as_str(), tokens), ("stop", 9));
}

#[test]
fn log_probabilities_have_the_forms_of_both_calls() {
    let server = Texts::start();
    let told = |answer: &Value| answer["choices"][0]["logprobs"].clone();
    let answer = server.complete(json!({"max_tokens": 2, "logprobs": 2}));
    // The double names the tokens 0 and 1 at each position; the chosen one is added.
    let top = |chosen: &str| json!({"!": -0.5, "\"": -0.5, chosen: -0.5});
    assert_eq!(
        told(&answer),
        json!({"tokens": ["A", "B"], "token_logprobs": [-0.5, -0.5], "top_logprobs": [top("A"), top("B")],
            "text_offset": [0, 1]})
    );
    let echoed = server.complete(json!({"prompt": "Aé b", "max_tokens": 1, "logprobs": 0, "echo": true}));
    assert_eq!(texts(&echoed), ["Aé bA"]);
    let scores = told(&echoed);
    let tokens = server.encode("Aé b").len();
    assert_eq!(scores["tokens"].as_array().unwrap().len(), tokens + 1);
    assert_eq!((&scores["token_logprobs"][0], &scores["token_logprobs"][1]), (&Value::Null, &json!(-0.5)));
    assert_eq!((&scores["top_logprobs"], &scores["text_offset"][tokens]), (&Value::Null, &json!(4)));
    let scored = server.complete(json!({"prompt": "AB", "max_tokens": 0, "logprobs": 1, "echo": true}));
    assert_eq!((texts(&scored), &scored["usage"]["completion_tokens"]), (vec!["AB"], &json!(0)));
    assert_eq!(told(&scored)["top_logprobs"], json!([null, {"!": -0.5, "B": -0.5}]));
    assert!(server.sampled().1.wanted.prompt && server.sampled().1.max_new_tokens == 0);
    assert_eq!(texts(&server.complete(json!({"echo": true, "max_tokens": 1}))), ["AA"]);
    assert!(!server.sampled().1.wanted.prompt);

    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 1, "max_tokens": 2}));
    let token = |text: &str, byte: u8| {
        json!({"token": text, "logprob": -0.5, "bytes": [byte],
            "top_logprobs": [{"token": "!", "logprob": -0.5, "bytes": [33]}]})
    };
    assert_eq!(told(&answer), json!({"content": [token("8", 56), token("9", 57)]}));
    let answer = server.chat(json!({"logprobs": true, "max_tokens": 5, "stop": "9:"}));
    assert_eq!(told(&answer)["content"].as_array().unwrap().len(), 1, "tokens of a stop text are not told");
    let part = server.complete(json!({"prompt": [98], "max_tokens": 1, "logprobs": 1}));
    assert_eq!(told(&part)["tokens"], json!(["\u{FFFD}"]));
}

#[test]
fn a_stream_adds_up_to_the_whole_answer() {
    let server = Texts::start();
    let body = with(
        chat(),
        json!({"stream_options": {"include_usage": true}, "n": 2, "logprobs": true, "stop": "::"}),
    );
    let events = server.events("chat/completions", body.clone());
    let whole = server.ask("chat/completions", &body);
    let (usage, events) = events.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    for index in 0..2 {
        let own: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(own[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = own.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, whole["choices"][index]["message"]["content"].as_str().unwrap());
        assert!(own.len() >= 4, "text comes in parts: {own:?}");
        let scores = own.iter().filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten();
        let scores: Vec<&Value> = scores.collect();
        assert_eq!(json!(scores), whole["choices"][index]["logprobs"]["content"]);
        let reasons: Vec<&Value> = own.iter().map(|choice| &choice["finish_reason"]).collect();
        let (last, before) = reasons.split_last().unwrap();
        assert!(**last == "length" && before.iter().all(|reason| reason.is_null()), "{reasons:?}");
        assert_eq!(own.last().unwrap()["delta"], json!({}));
    }
    let ids: Vec<&Value> = events.iter().map(|event| &event["id"]).collect();
    assert!(ids.iter().all(|id| **id == usage["id"]) && events[0]["object"] == "chat.completion.chunk");
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    for body in [
        json!({"model": "org/base", "prompt": ["A", "xyz"], "max_tokens": 9, "echo": true}),
        json!({"model": "org/base", "prompt": "A", "max_tokens": 9, "stop": ["EFG", "Fx"], "logprobs": 1}),
        json!({"model": "org/base", "prompt": "|", "n": 2}),
    ] {
        let whole = server.ask("completions", &body);
        let mut told = vec![String::new(); whole["choices"].as_array().unwrap().len()];
        for event in server.events("completions", body.clone()) {
            let choice = &event["choices"][0];
            told[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
        assert_eq!(told, texts(&whole), "{body}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_the_name_of_its_field() {
    let server = Texts::start();
    let long = "A".repeat(1100);
    for (call, more, param) in [
        ("completions", json!({"temperature": -1}), "temperature"),
        ("completions", json!({"top_p": 0}), "top_p"),
        ("completions", json!({"top_p": 1.5}), "top_p"),
        ("completions", json!({"top_k": -2}), "top_k"),
        ("completions", json!({"n": 0}), "n"),
        ("completions", json!({"n": 129}), "n"),
        ("completions", json!({"n": 2, "best_of": 3}), "best_of"),
        ("completions", json!({"logprobs": 21}), "logprobs"),
        ("completions", json!({"logprobs": true}), "logprobs"),
        ("completions", json!({"max_tokens": 0}), "max_tokens"),
        ("completions", json!({"max_tokens": -1}), "max_tokens"),
        ("completions", json!({"max_tokens": 1000}), "max_tokens"),
        ("completions", json!({"prompt": long}), "prompt"),
        ("completions", json!({"prompt": []}), "prompt"),
        ("completions", json!({"prompt": ""}), "prompt"),
        ("completions", json!({"prompt": [[1], []]}), "prompt"),
        ("completions", json!({"prompt": [437]}), "prompt"),
        ("completions", json!({"prompt": [-1]}), "prompt"),
        ("completions", json!({"stop": ""}), "stop"),
        ("completions", json!({"stop": vec!["a"; 65]}), "stop"),
        ("completions", json!({"stop_token_ids": [437]}), "stop_token_ids"),
        ("completions", json!({"echo": true, "logprobs": 1, "stream": true}), "echo"),
        ("completions", json!({"suffix": "a"}), "suffix"),
        ("completions", json!({"presence_penalty": 0.5}), "presence_penalty"),
        ("completions", json!({"frequency_penalty": 0.5}), "frequency_penalty"),
        ("completions", json!({"logit_bias": {"50256": -100}}), "logit_bias"),
        ("chat/completions", json!({"messages": []}), "messages"),
        ("chat/completions", json!({"messages": [{"role": "user", "content": long}]}), "messages"),
        (
            "chat/completions",
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}),
            "messages[0].content[0].type",
        ),
        ("chat/completions", json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
        ("chat/completions", json!({"messages": [{"content": "a"}]}), "messages[0]"),
        ("chat/completions", json!({"response_format": {"type": "json_object"}}), "response_format"),
        ("chat/completions", json!({"tool_choice": "required"}), "tool_choice"),
        ("chat/completions", json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        ("chat/completions", json!({"audio": {"voice": "a"}}), "audio"),
        ("chat/completions", json!({"top_logprobs": 2}), "top_logprobs"),
        ("chat/completions", json!({"max_tokens": 0}), "max_tokens"),
        ("chat/completions", json!({"max_completion_tokens": 1000}), "max_completion_tokens"),
    ] {
        let base = if call == "completions" { json!({"model": "org/base", "prompt": "A"}) } else { chat() };
        let (status, error) = server.refused(call, &with(base, more.clone()));
        assert_eq!((status, &error["type"]), (400, &json!("invalid_request_error")), "{more}: {error}");
        assert_eq!(error["param"], param, "{more}: {error}");
        let is_length = error["code"] == "context_length_exceeded";
        assert_eq!(
            is_length,
            more.to_string().contains("1000") || more.to_string().contains("AAAA"),
            "{error}"
        );
    }
    assert!(server.0.engine.sampled.lock().unwrap().is_empty());
}

#[test]
fn errors_have_a_status_and_the_clients_form() {
    let server = Texts::start();
    let body = |model: &str| json!({"model": model, "prompt": "A"});
    for model in ["nothing", "org/other", "a b", "tinker://default/sampler_weights/none", "xorl://../x/y"] {
        let (status, error) = server.refused("completions", &body(model));
        assert_eq!(
            (status, &error["code"], &error["param"]),
            (404, &json!("model_not_found"), &json!("model"))
        );
    }
    assert_eq!(server.refused("nothing", &json!({})).0, 404);
    assert_eq!(server.refused("models", &json!({})).0, 405);
    assert_eq!(server.0.send("GET", "/v1/completions", &[], b"").0, 405);
    assert!(
        server.refused("completions", &json!({"prompt": "A"})).1["message"]
            .as_str()
            .unwrap()
            .contains("model")
    );
    assert_eq!(server.refused("completions", &json!([1])).0, 400);
    let large = json!({"model": "org/base", "prompt": "a".repeat(2 << 20)});
    assert_eq!(server.refused("completions", &large).0, 413);
    let small = Texts::with(Keys::default(), |settings| settings.http.body = 1000);
    assert_eq!(
        small.refused("completions", &json!({"model": "org/base", "prompt": "a".repeat(2000)})).0,
        413
    );
    let none = Server::start();
    let (status, answer) = none.send("POST", "/v1/chat/completions", &[], chat().to_string().as_bytes());
    assert!(
        status == 400 && answer["error"]["message"].as_str().unwrap().contains("/models/base"),
        "{answer}"
    );
    // A server without a tokenizer still refuses other calls in their own form.
    assert!(detail(&none.post("optim_step", &json!({"model_id": "a b"})).1).contains("model_id"));

    let full = Texts::with(Keys::default(), |settings| settings.futures.pending = 2);
    let (status, error) =
        full.refused("completions", &json!({"model": "org/base", "prompt": ["a", "b", "c"]}));
    assert_eq!((status, &error["type"]), (429, &json!("rate_limit_error")));
    full.complete(json!({"prompt": ["a", "b"]}));
    full.0.engine.state.lock().unwrap().healthy = false;
    let (status, error) = full.refused("completions", &body("org/base"));
    assert_eq!((status, &error["type"]), (503, &json!("server_error")));
}

#[test]
fn models_are_the_base_and_the_tenants_own_adapters() {
    let server = Texts::with(keys(), |_| {});
    let (lab, other) = (("Authorization", "Bearer tml-one"), ("Authorization", "Bearer two"));
    let send = |method: &str, path: &str, header, body: &Value| {
        server.0.send(method, path, &[header], body.to_string().as_bytes())
    };
    let created = send("POST", "/api/v1/create_model", lab, &json!({"model_id": "mine"}));
    send("POST", "/api/v1/retrieve_future", lab, &json!({"request_id": created.1["request_id"]}));
    let ids = |header| {
        let (status, list) = send("GET", "/v1/models", header, &Value::Null);
        assert_eq!((status, &list["object"]), (200, &json!("list")));
        let ids =
            list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(
        (ids(lab), ids(other)),
        (
            vec!["org/base".to_owned(), "mine".into(), "policy_v1".into()],
            vec!["org/base".to_owned(), "policy_v1".into()],
        )
    );
    for name in ["org/base", "org%2Fbase", "mine"] {
        let (status, model) = send("GET", &format!("/v1/models/{name}"), lab, &Value::Null);
        assert_eq!((status, &model["object"]), (200, &json!("model")), "{name}");
    }
    assert_eq!(send("GET", "/v1/models/mine", other, &Value::Null).0, 404);
    let body = json!({"model": "mine", "prompt": "A", "max_tokens": 2});
    let (status, answer) = send("POST", "/v1/completions", lab, &body);
    assert_eq!((status, texts(&answer)), (200, vec!["AB"]));
    assert_eq!(server.sampled().0, Source::Adapter(ModelId::new("lab:mine").unwrap()));
    assert_eq!(send("POST", "/v1/completions", other, &body).0, 404);
    for header in [("X-API-Key", "wrong"), ("Cookie", "tml-one")] {
        let (status, answer) = send("POST", "/v1/completions", header, &body);
        let error = &answer["error"];
        assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")), "{answer}");
    }
}

#[test]
fn a_save_for_samplers_is_asked_by_its_path() {
    let server = Texts::start();
    server.0.call("create_model", &json!({"model_id": "a"}));
    let saved = server.0.call("save_weights_for_sampler", &json!({"model_id": "a", "name": "s"}));
    assert_eq!(saved["path"], "xorl://a/sampler_weights/s");
    let mut sources = Vec::new();
    for scheme in ["xorl", "tinker", "xorl"] {
        let model = format!("{scheme}://a/sampler_weights/s");
        let body = json!({"model": model, "prompt": "A", "max_tokens": 2});
        // The double opens and samples in threads of their own.
        let asked = std::iter::repeat_with(|| server.post("completions", &body)).take(50);
        let (status, answer) = asked
            .inspect(|_| thread::sleep(Duration::from_millis(20)))
            .find(|(status, _)| *status == 200)
            .unwrap();
        assert_eq!((status, texts(&answer), &answer["model"]), (200, vec!["AB"], &json!(model)));
        sources.push(server.sampled().0);
    }
    assert!(sources[0] != Source::Base && sources[0] == sources[2], "{sources:?}");
}

/// Waits until `is_so`.
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let ends = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < ends, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_goes_cancels_its_request() {
    let server = Texts::start();
    let engine = &server.0.engine;
    let send = |body: &Value| {
        let mut stream = TcpStream::connect(server.0.address).unwrap();
        let body = body.to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    };
    let pending = || server.0.get("/health").1["active_requests"].clone();
    // Before the first token; the double waits at its gate.
    for is_stream in [false, true] {
        let gate = engine.gate.lock().unwrap();
        let before = engine.sampled.lock().unwrap().len();
        let body = json!({"model": "org/base", "prompt": ["A", "B"], "max_tokens": 500, "stream": is_stream});
        let stream = send(&body);
        eventually("two requests are taken", || engine.sampled.lock().unwrap().len() == before + 2);
        assert_eq!(pending(), 2);
        drop(stream);
        let tickets = [before, before + 1].map(|ticket| Ticket(ticket as u64));
        eventually("both are cancelled", || {
            let cancelled = engine.cancelled.lock().unwrap();
            tickets.iter().all(|ticket| cancelled.contains(ticket))
        });
        eventually("their places are free", || pending() == 0);
        drop(gate);
    }
    // In the middle of a stream.
    let before = engine.sampled.lock().unwrap().len();
    let gate = engine.gate.lock().unwrap();
    let mut stream =
        send(&json!({"model": "org/base", "prompt": "A", "max_tokens": 900, "n": 128, "stream": true}));
    eventually("it is taken", || engine.sampled.lock().unwrap().len() == before + 1);
    drop(gate);
    let mut start = [0; 400];
    stream.read_exact(&mut start).unwrap();
    assert!(String::from_utf8_lossy(&start).contains("text/event-stream"));
    drop(stream);
    eventually("it is cancelled", || engine.cancelled.lock().unwrap().contains(&Ticket(before as u64)));
    eventually("its place is free", || pending() == 0);
    // One that ends by itself is not cancelled.
    let number = engine.cancelled.lock().unwrap().len();
    server.complete(json!({}));
    server.events("completions", json!({"model": "org/base", "prompt": "A"}));
    assert_eq!(engine.cancelled.lock().unwrap().len(), number);
}

#[test]
fn a_server_that_stops_answers_what_it_has_taken() {
    let mut server = Texts::start();
    let engine = server.0.engine.clone();
    let gate = engine.gate.lock().unwrap();
    let (address, body) = (server.0.address, json!({"model": "org/base", "prompt": "A"}).to_string());
    let asked = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    eventually("it is taken", || engine.sampled.lock().unwrap().len() == 1);
    server.0.shutdown.begin();
    // One that is taken before the server stops would wait at the gate.
    eventually("it stops", || server.0.get("/health").0 == 503);
    let refused = server.post("completions", &json!({"model": "org/base", "prompt": "A"}));
    assert_eq!(refused.0, 503, "{refused:?}");
    drop(gate);
    assert!(asked.join().unwrap().contains("ABC"));
    server.0.stop();
}

#[test]
fn python_the_openai_client_chats_and_streams() {
    let server = Texts::with(keys(), |_| {});
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/openai_client.py");
    let output = Command::new(client_python("XORL_OPENAI_PYTHON", ".venv-openai"))
        .arg(script)
        .args([&format!("http://{}/v1", server.0.address), "tml-one", "org/base"])
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.ends_with("done\n"), "{said}\n{errors}");
}
