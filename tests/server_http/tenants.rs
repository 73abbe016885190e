//! Tenants: what belongs to one is not seen, taken, changed or used by another.

use super::{
    hostile::keys,
    sampling::stop,
    server::{Server, detail},
};
use serde_json::{Value, json};
use std::fs;
use xorl_dist::server::request::{Contents, Task};

#[test]
fn no_call_reaches_what_another_tenant_has() {
    let server = Server::with(keys(&["one", "two"]), |_| {});
    let post = |key: &str, call: &str, body: &Value| {
        server.send("POST", &format!("/api/v1/{call}"), &[("X-API-Key", key)], body.to_string().as_bytes())
    };
    let ids: Vec<Value> = ["create_model", "forward", "save_weights", "save_weights_for_sampler"]
        .iter()
        .map(|call| {
            let body = json!({"model_id": "a", "path": "n", "batches": [{"input_ids": [1, 2]}]});
            let (status, reply) = post("tml-one", call, &body);
            assert_eq!(status, 200, "{reply}");
            reply["request_id"].clone()
        })
        .collect();
    for id in &ids {
        assert_eq!(post("tml-one", "retrieve_future", &json!({"request_id": id})).0, 200);
        let (status, reply) = post("tml-two", "retrieve_future", &json!({"request_id": id}));
        assert_eq!(status, 404, "{reply}");
    }
    let tree = |folder: &str| {
        let root = server.output.path().join("tenants").join(folder);
        fs::read_dir(root.join("weights/a")).map(Iterator::count).unwrap_or(0)
    };
    let document = server.get("/openapi.json").1;
    let calls =
        document["paths"].as_object().unwrap().keys().filter_map(|path| path.strip_prefix("/api/v1/"));
    let mut asked = 0;
    for call in calls {
        for (model, path) in [
            ("a", "n"),
            ("one:a", "n"),
            ("a", "xorl://a/weights/n"),
            ("a", "tenants/one/weights/a/n"),
            ("a", "one/n"),
            ("../one/a", "../../one/weights/a/n"),
        ] {
            let body = json!({"model_id": model, "path": path, "batches": [{"input_ids": [1, 2]}],
                "request_id": ids[0]});
            let (status, reply) = post("tml-two", call, &body);
            let is_empty = [json!({"checkpoints": []}), json!({})].contains(&reply);
            let is_nothing = (400..500).contains(&status) || is_empty;
            // A new adapter or session of its own, lists of its own, and what the server tells everybody.
            let is_own = [
                "client/config",
                "client/dynamic_config",
                "create_model",
                "create_session",
                "get_server_capabilities",
                "healthz",
                "session_info",
                "telemetry",
                "training_runs",
            ]
            .contains(&call);
            assert!(is_nothing || is_own, "{call} {model} {path}: {status} {reply}");
            asked += 1;
            if call == "create_model" && status == 200 {
                post("tml-two", "unload_model", &json!({"model_id": model}));
            }
        }
        let path = format!("/api/v1/{call}?model_id=a");
        let (_, reply) = server.send("GET", &path, &[("X-API-Key", "tml-two")], b"");
        assert!(!reply.to_string().contains("weights/n"), "{reply}");
    }
    assert!(asked >= 90, "{asked}");
    assert_eq!((tree("one"), tree("two")), (1, 0));
    assert!(server.engine.state.lock().unwrap().models.contains_key("one:a"));
}

#[test]
fn a_whole_model_is_its_tenants_own_and_no_adapter() {
    let server = Server::with(keys(&["one", "two"]), |_| {});
    let send = |key: &str, more: &[(&str, &str)], method: &str, call: &str, body: &Value| {
        let headers: Vec<_> = [("X-API-Key", key)].into_iter().chain(more.iter().copied()).collect();
        server.send(method, &format!("/api/v1/{call}"), &headers, body.to_string().as_bytes())
    };
    let post = |key: &str, call: &str, body: &Value| send(key, &[], "POST", call, body);
    let save = |key: &str, body: Value| post(key, "save_full_weights_safetensors", &body);
    for key in ["tml-one", "tml-two"] {
        assert_eq!(post(key, "create_model", &json!({"model_id": "a"})).0, 200);
    }
    let (status, saved) = save("tml-one", json!({"model_id": "a", "name": "n", "dtype": "base"}));
    let folder = server.output.path().canonicalize().unwrap().join("tenants/one/full_weights/a/n");
    assert_eq!((status, saved["path"].as_str()), (200, folder.to_str()), "{saved}");
    assert_eq!((&saved["dtype"], &saved["num_shards"]), (&json!("base"), &json!(1)));
    assert_eq!(saved["xorl_path"], "xorl://a/full_weights/n");
    let asked = server.engine.asked();
    let Task::Save(last) = &asked.last().unwrap().task else { panic!("{asked:?}") };
    assert_eq!((last.contents, last.overwrite), (Contents::Merged { dtype: None }, false));
    assert_eq!(last.metadata["model_id"], "a");

    // Its own tenant sees it, and is told that it is no adapter.
    let (_, list) = post("tml-one", "list_checkpoints", &json!({"model_id": "a"}));
    let [listed] = &list["checkpoints"].as_array().unwrap()[..] else { panic!("{list}") };
    assert_eq!(
        (&listed["checkpoint_id"], &listed["checkpoint_type"]),
        (&json!("full_weights/n"), &json!("full"))
    );
    let path = "xorl://a/full_weights/n";
    for (call, body) in [
        ("load_weights", json!({"model_id": "a", "path": path})),
        ("load_weights", json!({"model_id": "a", "path": "full_weights/n"})),
        ("weights_info", json!({"model_id": "a", "xorl_path": path})),
        ("create_sampling_session", json!({"model_path": path})),
        ("save_weights", json!({"model_id": "a", "path": path})),
    ] {
        let (status, reply) = post("tml-one", call, &body);
        let is_told = detail(&reply).contains("is a whole model") || call == "save_weights";
        assert!(status == 400 && is_told, "{call}: {status} {reply}");
    }
    // No version of tinker's client has a word for it.
    let tinker = [("x-stainless-package-version", "0.38.0"), ("x-stainless-lang", "python")];
    let of_run =
        |more: &[(&str, &str)]| send("tml-one", more, "GET", "training_runs/a/checkpoints", &json!({})).1;
    assert_eq!(of_run(&tinker)["checkpoints"], json!([]));
    assert_eq!(of_run(&[])["checkpoints"][0]["checkpoint_type"], "full");

    // The other tenant has none, and cannot reach it by any name.
    assert_eq!(post("tml-two", "list_checkpoints", &json!({"model_id": "a"})).1["checkpoints"], json!([]));
    let paths =
        [path, "full_weights/n", "full_weights/a/n", "tenants/one/full_weights/a/n", "one:a/full_weights/n"];
    for path in paths {
        let body = json!({"model_id": "a", "checkpoint_id": path});
        let (status, reply) = post("tml-two", "delete_checkpoint", &body);
        assert!([400, 404].contains(&status), "{path}: {status} {reply}");
    }
    for path in paths {
        let (status, reply) = save("tml-two", json!({"model_id": "a", "name": path, "overwrite": true}));
        let own = server.output.path().canonicalize().unwrap().join("tenants/two/full_weights/a/n");
        assert!(status == 400 || reply["path"].as_str() == own.to_str(), "{path}: {status} {reply}");
        let (_, list) = post("tml-one", "list_checkpoints", &json!({"model_id": "a"}));
        assert_eq!(list["checkpoints"], json!([listed]), "{path}");
    }
    for name in ["n", "xorl://a/weights/n", "own/folder"] {
        let (status, reply) = save("tml-one", json!({"model_id": "a", "name": name}));
        assert_eq!(status, 400, "{name}: {reply}");
    }
    let gone =
        post("tml-one", "delete_checkpoint", &json!({"model_id": "a", "checkpoint_id": "full_weights/n"}));
    assert!(gone.0 == 200 && !folder.exists(), "{gone:?}");
}

#[test]
fn samplers_and_samples_are_their_tenants_own() {
    let server = Server::with(keys(&["one", "two"]), |_| {});
    let send = |key: &str, method: &str, path: &str, body: &Value| {
        server.send(method, path, &[("X-API-Key", key)], body.to_string().as_bytes())
    };
    let post = |key: &str, call: &str, body: &Value| send(key, "POST", &format!("/api/v1/{call}"), body);
    // Repeats until the future has its result.
    let call = |key: &str, name: &str, body: &Value| -> (String, Value) {
        let (status, reply) = post(key, name, body);
        assert_eq!(status, 200, "{name}: {reply}");
        let id = reply["request_id"].as_str().unwrap().to_owned();
        loop {
            let (status, reply) = post(key, "retrieve_future", &json!({"request_id": id}));
            if status != 408 {
                assert_eq!(status, 200, "{name}: {reply}");
                return (id, reply);
            }
        }
    };
    let session = |key| {
        let (status, reply) = post(key, "create_session", &json!({"tags": []}));
        assert_eq!(status, 200, "{reply}");
        reply["session_id"].as_str().unwrap().to_owned()
    };
    let model_of = |key, session: &str| {
        let body = json!({"session_id": session, "model_seq_id": 0, "base_model": "org/base",
            "lora_config": {"rank": 8}});
        call(key, "create_model", &body).1["model_id"].as_str().unwrap().to_owned()
    };
    let of_path = |session: &str, number: u64, path: &str| {
        json!({"session_id": session, "sampling_session_seq_id": number, "model_path": path,
            "type": "create_sampling_session"})
    };
    let sample = |name: &str, value: &str| {
        json!({name: value, "seq_id": 0, "num_samples": 1, "type": "sample",
            "prompt": {"chunks": [{"tokens": [5], "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": 2, "temperature": 1.0}})
    };
    let (own, other) = (session("tml-one"), session("tml-two"));
    let model = model_of("tml-one", &own);
    let named = json!({"model_id": model, "seq_id": 1, "path": "n"});
    let path = call("tml-one", "save_weights_for_sampler", &named).1["path"].as_str().unwrap().to_owned();
    let (status, made) = post("tml-one", "create_sampling_session", &of_path(&own, 0, &path));
    assert_eq!(status, 200, "{made}");
    let sampler = made["sampling_session_id"].as_str().unwrap();
    let (request, _) = call("tml-one", "asample", &sample("sampling_session_id", sampler));

    let generate = |path: &str| json!({"input_ids": [1, 2], "lora_path": path});
    let complete = |name: &str| json!({"model": name, "prompt": "ab", "max_tokens": 2});
    let before = server.engine.sampled.lock().unwrap().len();
    for (call, body) in [
        ("asample", sample("sampling_session_id", sampler)),
        ("asample", sample("model_path", &path)),
        ("create_sampling_session", of_path(&other, 0, &path)),
        ("create_sampling_session", of_path(&own, 1, &path)),
        ("retrieve_future", json!({"request_id": request})),
        ("weights_info", json!({"tinker_path": path})),
    ] {
        let (status, reply) = post("tml-two", call, &body);
        assert!((400..500).contains(&status), "{call} {body}: {status} {reply}");
    }
    for name in [path.as_str(), sampler, &model, "one", &format!("one:{model}"), &format!("one:{sampler}")] {
        for (url, body) in [
            ("/generate", generate(name)),
            ("/v1/completions", complete(name)),
            ("/v1/chat/completions", json!({"model": name, "messages": [{"role": "user", "content": "a"}]})),
        ] {
            let (status, reply) = send("tml-two", "POST", url, &body);
            assert!((400..500).contains(&status), "{url} {name}: {status} {reply}");
        }
    }
    for url in [format!("/api/v1/samplers/{sampler}"), format!("/api/v1/sessions/{own}")] {
        assert_eq!(send("tml-two", "GET", &url, &json!({})).0, 404, "{url}");
    }
    let (_, listed) = send("tml-two", "GET", "/v1/models", &json!({}));
    assert!(!listed.to_string().contains(&own), "{listed}");
    let (_, several) = post("tml-two", "retrieve_futures", &json!({"request_ids": [request]}));
    assert!(!several.to_string().contains("sequences"), "{several}");
    assert_eq!(server.engine.sampled.lock().unwrap().len(), before, "nothing was sampled");

    // A request that waits goes on, whoever else asks to cancel it.
    let gate = stop(&server);
    let mut body = sample("sampling_session_id", sampler);
    body["seq_id"] = json!(1);
    let (_, waiting) = post("tml-one", "asample", &body);
    assert_eq!(
        post("tml-two", "cancel_future", &json!({"request_id": waiting["request_id"]})),
        (200, json!({}))
    );
    drop(gate);
    let (_, reply) = call("tml-one", "asample", &body);
    assert!(reply["sequences"].is_array(), "{reply}");
}
