//! The page at `/`: the call that feeds it, its files, and the page itself in headless Chromium.

pub mod browser;

use crate::common::wait_for_at_most;
use crate::server_http::server::{Server, forward_backward};
use browser::Browser;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};
use xorl_dist::server::{
    keys::Keys,
    request::{ModelId, Source},
};

fn post(server: &Server, key: &str, name: &str, body: &Value) -> (u16, Value) {
    server.send("POST", &format!("/api/v1/{name}"), &[("X-API-Key", key)], body.to_string().as_bytes())
}

/// Submits as the owner of a key, and waits for the result.
fn call(server: &Server, key: &str, name: &str, body: &Value) -> Value {
    let (status, submitted) = post(server, key, name, body);
    assert_eq!(status, 200, "{name}: {submitted}");
    let (status, result) =
        post(server, key, "retrieve_future", &json!({"request_id": submitted["request_id"]}));
    assert_eq!(status, 200, "{name}: {result}");
    result
}

fn overview(server: &Server, key: &str, adapter: &str) -> Value {
    let path = format!("/api/v1/overview?adapter={adapter}");
    let (status, overview) = server.send("GET", &path, &[("X-API-Key", key)], b"");
    assert_eq!(status, 200, "{overview}");
    overview
}

/// Two updates of an adapter, the second by two passes.
fn train(server: &Server, key: &str, model: &str) {
    for (number, passes) in [(1, 1), (3, 2)] {
        for seq_id in number..number + passes {
            let mut body = forward_backward(seq_id);
            body["model_id"] = json!(model);
            call(server, key, "forward_backward", &body);
        }
        call(server, key, "optim_step", &json!({"model_id": model, "learning_rate": 0.25}));
    }
}

fn keys() -> Keys {
    let folder = tempfile::tempdir().unwrap();
    let hash = |key: &str| format!("{:x}", Sha256::digest(key));
    std::fs::write(folder.path().join("keys"), format!("{} one\n{} two\n", hash("tml-one"), hash("tml-two")))
        .unwrap();
    Keys::read(&folder.path().join("keys")).unwrap()
}

#[test]
fn the_overview_has_the_curves_and_the_memory_of_an_adapter() {
    let server = Server::start();
    train(&server, "", "policy_v1");
    let mut state = server.engine.state.lock().unwrap();
    state.peak_rss_bytes = vec![5, 7];
    state.usage.memory_limit = Some(4000);
    drop(state);
    let found = overview(&server, "", "policy_v1");
    let adapter = &found["adapters"][0];
    assert_eq!(adapter["model_id"], "policy_v1");
    assert_eq!((&adapter["step"], &adapter["tokens"], &adapter["rank"]), (&json!(2), &json!(9), &json!(16)));
    // The double's loss is 0.5 a target.
    let curve = |name: &str| adapter["curves"][name].clone();
    assert_eq!(curve("loss"), json!({"steps": [1, 2], "values": [0.5, 0.5]}));
    assert_eq!(curve("grad_norm"), json!({"steps": [1, 2], "values": [1.25, 1.25]}));
    assert_eq!(curve("learning_rate")["values"], json!([0.25, 0.25]));
    assert_eq!(overview(&server, "", "")["adapters"][0]["curves"].as_object().unwrap().len(), 1);
    let memory = &found["memory"];
    assert_eq!((&memory["peak_rss"], &memory["adapters_limit"]), (&json!([5, 7]), &json!(4000)));
    assert_eq!(
        (&found["server"]["base_model"], &found["server"]["healthy"]),
        (&json!("org/base"), &json!(true))
    );
    // A pass that waits is in the queue.
    let gate = server.engine.gate.lock().unwrap();
    server.submit("optim_step", &json!({"model_id": "policy_v1", "learning_rate": 0.25}));
    let queue = overview(&server, "", "")["queue"].clone();
    assert_eq!((&queue["pending"], &queue["own"][0]["work"]), (&json!(1), &json!("optim_step of policy_v1")));
    drop(gate);
}

#[test]
fn a_tenant_sees_its_own_alone() {
    let server = Server::with(keys(), |_| {});
    call(&server, "tml-one", "create_model", &json!({"model_id": "secret"}));
    train(&server, "tml-one", "secret");
    let gate = server.engine.gate.lock().unwrap();
    post(&server, "tml-one", "optim_step", &json!({"model_id": "secret", "learning_rate": 0.25}));
    let (one, two) = (overview(&server, "tml-one", "secret"), overview(&server, "tml-two", "secret"));
    drop(gate);
    assert_eq!(
        (&one["adapters"][0]["model_id"], one["queue"]["own"].as_array().unwrap().len()),
        (&json!("secret"), 1)
    );
    assert_eq!((&one["server"]["tenant"], &one["server"]["has_keys"]), (&json!("one"), &json!(true)));
    assert!(!two.to_string().contains("secret"), "{two}");
    assert_eq!((&two["adapter_count"], &two["queue"]["pending"]), (&json!(0), &json!(1)));
    let rates = &two["throughput"]["tokens_per_second"];
    assert!(rates.as_array().unwrap().iter().all(|rate| *rate == 0.0), "{rates}");
    assert_eq!(server.get("/api/v1/overview").0, 401);
}

/// The head and the body of an answer.
fn fetch(server: &Server, path: &str, header: &str) -> (String, String) {
    let mut stream = TcpStream::connect(server.address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

#[test]
fn the_files_of_the_page_need_no_key_and_load_nothing_from_elsewhere() {
    let server = Server::with(keys(), |_| {});
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/page.js", "text/javascript; charset=utf-8"),
        ("/page/curves.js", "text/javascript; charset=utf-8"),
        ("/page/nodes.js", "text/javascript; charset=utf-8"),
        ("/page/theme.js", "text/javascript; charset=utf-8"),
        ("/page/try.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ] {
        let (head, body) = fetch(&server, path, "");
        assert!(head.starts_with("http/1.1 200"), "{head}");
        let line =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        assert_eq!(line("content-type:"), kind);
        let policy = line("content-security-policy:");
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"),
            "{policy}"
        );
        assert_eq!((line("x-content-type-options:"), line("cache-control:")), ("nosniff", "no-cache"));
        let elsewhere = body.replace("http://www.w3.org/", "");
        assert!(
            !elsewhere.contains("http:") && !elsewhere.contains("https:") && !body.contains("@import"),
            "{path}"
        );
        let tag = line("etag:");
        for (tags, status) in [(tag, "304"), (&*format!("\"x\", W/{tag}"), "304"), ("\"x\"", "200")] {
            let (again, body) = fetch(&server, path, &format!("If-None-Match: {tags}\r\n"));
            assert!(again.starts_with(&format!("http/1.1 {status}")), "{tags}: {again}");
            assert_eq!(body.is_empty(), status == "304");
        }
    }
    assert_eq!(server.get("/page/other.js").0, 401);
    assert_eq!(server.send("POST", "/", &[("X-API-Key", "tml-one")], b"").0, 405);
}

/// Opens the page, and waits for its first overview.
fn open(server: &Server, browser: &mut Browser) {
    browser.open(&format!("http://{}/", server.address));
    browser.wait("document.getElementById('health').dataset.state === 'fine'");
}

/// The points of the selected adapter's curve of the loss.
const POINTS: &str =
    "(document.querySelector('#curves .trace')?.getAttribute('d').match(/[ML]/g) ?? []).length";

#[test]
fn browser_the_page_shows_what_a_client_trains() {
    let server = Server::start();
    train(&server, "", "policy_v1");
    call(&server, "", "save_weights", &json!({"model_id": "policy_v1", "path": "n"}));
    server.engine.state.lock().unwrap().peak_rss_bytes = vec![5 << 20, 7 << 20];
    server.post("create_session", &json!({"type": "create_session"}));
    let mut browser = Browser::start();
    open(&server, &mut browser);
    browser.wait(&format!("{POINTS} === 2"));
    let row = browser.text("document.querySelector('#adapter-rows tr').innerText");
    for part in ["policy_v1", "0.5", "16 / 32", "memory"] {
        assert!(row.contains(part), "{part}: {row}");
    }
    assert!(browser.text("document.getElementById('memory').innerText").contains("7 MB"));
    browser.wait("document.querySelectorAll('#curves figure').length === 3");
    assert_eq!(browser.text("document.querySelector('#session-rows td').innerText"), "live");
    // Another update shows without a reload, and is there after one.
    call(&server, "", "forward_backward", &forward_backward_of("policy_v1", 9));
    call(&server, "", "optim_step", &json!({"model_id": "policy_v1", "learning_rate": 0.25}));
    browser.wait(&format!("{POINTS} === 3"));
    open(&server, &mut browser);
    browser.wait(&format!("{POINTS} === 3"));
    // The files of a checkpoint come without a key.
    browser.wait("document.querySelectorAll('#checkpoint-rows button').length === 1");
    browser.value("document.querySelector('#checkpoint-rows button').click()");
    browser.wait("document.querySelectorAll('#checkpoint-rows a[download]').length === 2");
    let address = browser.text("document.querySelector('#checkpoint-rows a').href");
    let file = browser.text(&format!("fetch('{address}').then((answer) => answer.text())"));
    assert!(file.contains("\"peft_type\":\"LORA\""), "{address}: {file}");
    // Nothing is wider than the window of a telephone.
    browser.resize(400);
    assert!(browser.value("document.documentElement.scrollWidth").as_u64().unwrap() <= 400);
}

fn forward_backward_of(model: &str, seq_id: u64) -> Value {
    let mut body = forward_backward(seq_id);
    body["model_id"] = json!(model);
    body
}

#[test]
fn browser_the_page_is_read_in_light_and_dark() {
    let server = Server::start();
    train(&server, "", "policy_v1");
    let mut browser = Browser::start();
    let ground = "getComputedStyle(document.body).backgroundColor";
    let mut grounds = Vec::new();
    for scheme in ["light", "dark"] {
        browser.prefer(scheme);
        open(&server, &mut browser);
        browser.wait(&format!("{POINTS} === 2"));
        let lowest = browser.lowest_contrast();
        assert!((4.5..22.0).contains(&lowest[0].as_f64().unwrap()), "{scheme}: {lowest}");
        grounds.push(browser.text(ground));
    }
    assert_ne!(grounds[0], grounds[1]);
    // The switch wins over the system, and is kept.
    browser.value("document.querySelector('input[value=light]').click()");
    assert_eq!(browser.text(ground), grounds[0]);
    open(&server, &mut browser);
    assert_eq!(browser.text(ground), grounds[0]);
    browser.value("document.querySelector('input[value=auto]').click()");
    assert_eq!(browser.text(ground), grounds[1]);
}

/// The element with focus: its id, else its label or text.
const FOCUS: &str = "(() => { const node = document.activeElement; \
                     return node.id || node.getAttribute('aria-label') || node.innerText || node.value; })()";

#[test]
fn browser_the_page_is_used_by_keyboard_and_screen_reader() {
    let server = Server::start();
    for model in ["a", "b"] {
        call(&server, "", "create_model", &json!({"model_id": model}));
        train(&server, "", model);
    }
    call(&server, "", "save_weights", &json!({"model_id": "a", "path": "n"}));
    let mut browser = Browser::start();
    open(&server, &mut browser);
    browser.wait("document.querySelectorAll('#checkpoint-rows button').length === 1");
    browser.wait("document.querySelectorAll('#adapter-rows button').length === 3");
    browser.wait("document.querySelectorAll('#curves figure').length === 3");
    browser.wait("document.getElementById('try').checkVisibility()");
    let mut order = Vec::new();
    while order.last().is_none_or(|last| last != "metrics-link") && order.len() < 30 {
        browser.press("Tab");
        order.push(browser.text(FOCUS));
        let outline = browser.text(
            "(() => { const node = document.activeElement; \
             return getComputedStyle(node.type === 'radio' ? node.nextElementSibling : node).outlineStyle; })()",
        );
        assert_eq!(outline, "solid", "{order:?}");
    }
    // This curve begins with its first interval.
    order.retain(|name| name != "Throughput over time");
    let expected = [
        "Skip to the adapters",
        "auto",
        "Table of adapters",
        "a",
        "b",
        "policy_v1",
        "Loss, mean of a target of a",
        "Gradient norm of a",
        "Learning rate of a",
        "The last values as a table",
        "try-adapter",
        "try-form",
        "try-tokens",
        "try-temperature",
        "try-prompt",
        "try-button",
        "Table of checkpoints",
        "Files of n of a",
        "Table of sessions",
        "Calls",
        "metrics-link",
    ];
    assert_eq!(order, expected);
    // Enter selects an adapter, and focus stays there while the page goes on.
    browser.value("[...document.querySelectorAll('.pick')].find((node) => node.innerText === 'b').focus()");
    browser.press("Enter");
    browser.wait("document.getElementById('detail-title').innerText === 'b'");
    let polls =
        "performance.getEntriesByType('resource').filter((one) => one.name.includes('overview')).length";
    let before = browser.value(polls).as_u64().unwrap();
    browser.wait(&format!("{polls} >= {}", before + 2));
    assert_eq!(browser.text(FOCUS), "b");
    assert_eq!(browser.text("document.activeElement.getAttribute('aria-pressed')"), "true");
    assert_eq!(browser.text("document.getElementById('news').innerText"), "Curves of b");
    // Arrows read a curve.
    browser.value("document.querySelector('#curves svg').focus()");
    browser.press("ArrowLeft");
    let read = browser.text("document.activeElement.getAttribute('aria-valuetext')");
    assert_eq!(read, "0.5 at update 1");
    assert!(browser.named_nodes(&["banner", "main", "contentinfo", "status"]) > 20);
}

#[test]
fn browser_the_page_tries_an_adapter_beside_the_base() {
    let server = Server::with_texts(keys(), |_| {});
    call(&server, "tml-one", "create_model", &json!({"model_id": "mine"}));
    let mut state = server.engine.state.lock().unwrap();
    state.sampling.running = 3;
    state.sampling.tokens = 70;
    drop(state);
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/", server.address));
    browser.wait("document.getElementById('key-dialog').open");
    browser.write("tml-one");
    browser.press("Enter");
    browser.wait("document.getElementById('try').checkVisibility()");
    let told = browser.text("document.getElementById('sampling').innerText");
    assert!(told.contains("3 continuations") && told.contains("70 tokens"), "{told}");
    let adapters = "[...document.getElementById('try-adapter').options].map((option) => option.value).join()";
    assert_eq!(browser.text(adapters), "mine,policy_v1");
    let text = |name: &str| format!("document.getElementById('try-{name}-text').innerText");
    let set = |browser: &mut Browser, id: &str, value: &str| {
        browser.value(&format!("document.getElementById('try-{id}').value = '{value}'"));
    };
    let news = "document.getElementById('news').innerText";
    // By keyboard: the button asks, and stops.
    for (form, prompt, expected) in [("text", "A", "ABCDE"), ("chat", "hi", "89:;<")] {
        set(&mut browser, "form", form);
        set(&mut browser, "tokens", "5");
        set(&mut browser, "prompt", prompt);
        browser.value("document.getElementById('try-button').focus()");
        browser.press("Enter");
        for name in ["base", "adapter"] {
            browser.wait(&format!("{} === '{expected}'", text(name)));
        }
        browser.wait(&format!("{news} === 'Both texts are complete'"));
    }
    let sampled: Vec<_> =
        server.engine.sampled.lock().unwrap().iter().map(|(source, _)| source.clone()).collect();
    let mine = Source::Adapter(ModelId::new("one:mine").unwrap());
    assert_eq!(sampled.iter().filter(|source| **source == Source::Base).count(), 2, "{sampled:?}");
    assert_eq!(sampled.iter().filter(|source| **source == mine).count(), 2, "{sampled:?}");
    // A refusal is told where the text would be.
    set(&mut browser, "tokens", "4096");
    browser.press("Enter");
    browser.wait(&format!("{}.includes('context')", text("base")));
    // Stopped, both requests are cancelled.
    set(&mut browser, "tokens", "500");
    let gate = server.engine.gate.lock().unwrap();
    browser.wait("document.getElementById('try-button').innerText === 'Ask both'");
    browser.press("Enter");
    browser.wait("document.getElementById('try-button').innerText === 'Stop'");
    wait_for_at_most(Duration::from_secs(20), "both are asked", || {
        (server.engine.sampled.lock().unwrap().len() == 6).then_some(())
    });
    browser.press("Enter");
    browser.wait("document.getElementById('try-button').innerText === 'Ask both'");
    wait_for_at_most(Duration::from_secs(20), "both are cancelled", || {
        (server.engine.cancelled.lock().unwrap().len() == 2).then_some(())
    });
    drop(gate);
}

#[test]
fn browser_the_page_asks_for_a_key_and_keeps_it_in_its_tab() {
    let server = Server::with(keys(), |_| {});
    for (key, model) in [("tml-one", "mine"), ("tml-two", "theirs")] {
        call(&server, key, "create_model", &json!({"model_id": model}));
        train(&server, key, model);
    }
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/", server.address));
    browser.wait("document.getElementById('key-dialog').open");
    assert_eq!(browser.text(FOCUS), "key");
    browser.write("tml-three");
    browser.press("Enter");
    browser.wait("document.getElementById('key-error').innerText.includes('does not know')");
    browser.write("tml-one");
    browser.press("Enter");
    browser.wait("document.querySelectorAll('#adapter-rows tr').length > 0");
    assert_eq!(browser.value("document.getElementById('key-dialog').open"), false);
    let body = browser.text("document.body.innerText");
    assert!(body.contains("mine") && body.contains("key of one") && !body.contains("theirs"), "{body}");
    open(&server, &mut browser);
    assert_eq!(
        browser.value("[sessionStorage.length, Object.values(localStorage).join().includes('tml')]"),
        json!([1, false])
    );
    // No key is in an address.
    let addresses = browser.text("performance.getEntriesByType('resource').map((one) => one.name).join()");
    assert!(addresses.contains("overview") && !addresses.contains("tml"), "{addresses}");
}
