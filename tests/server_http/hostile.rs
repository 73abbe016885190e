//! Clients that mean harm or are broken: paths that lead out, floods, malformed HTTP, connections that end in the
//! middle, and more bytes than memory has.

use super::server::{Server, datum, detail, forward_backward};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    os::unix::fs::symlink,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use xorl_dist::server::keys::Keys;

const MIB: usize = 1 << 20;

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// Everything that a server answers to raw bytes until it closes, or is silent for a while.
fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = connect(server);
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    // The server may close before it has read all.
    let _ = stream.write_all(bytes);
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = stream.read(&mut part) {
        answer.extend_from_slice(&part[..read]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn statuses(answer: &str) -> Vec<u16> {
    let lines = answer.match_indices("HTTP/1.1 ").map(|(at, _)| &answer[at + 9..at + 12]);
    lines.map(|status| status.parse().unwrap()).collect()
}

/// The value of a line of `/metrics`.
fn metric(server: &Server, name: &str) -> f64 {
    let (_, text) = server.get("/metrics");
    let line = text.as_str().unwrap().lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name}")).trim().parse().unwrap()
}

/// Resident bytes of this process, in which the server runs.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Keys `tml-NAME` of these tenants.
pub fn keys(names: &[&str]) -> Keys {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let line = |name: &&str| format!("{:x} {name}\n", Sha256::digest(format!("tml-{name}")));
    fs::write(&path, names.iter().map(line).collect::<String>()).unwrap();
    Keys::read(&path).unwrap()
}

#[test]
fn no_url_leads_out_of_the_calls() {
    let server = Server::start();
    let (status, reply) = server.get("/api/v1/session_info?model_id=../../etc/passwd");
    assert!(status == 400 && detail(&reply).starts_with("model_id"), "{reply}");
    for query in ["%00", "..%2f..", "%ff", "a%5cb", "%ef%bc%8e%ef%bc%8e", "a/b"] {
        assert_eq!(server.get(&format!("/api/v1/session_info?model_id={query}")).0, 400, "{query}");
    }
    for path in [
        "/../../etc/passwd",
        "/api/v1/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/v1/..%2f..%2f..%2fetc%2fpasswd",
        "/api/v1/%2e%2e%2fhealth",
        "//etc/passwd",
        "//health",
        "/api/v1//healthz",
        "/api/v1/health",
        "/api/v1/optim_step/",
        "/api/v1/optim_step/..",
        "/api/v1/optim_step%00",
        "/api/v1/optim_step\\..\\x",
        "/API/V1/optim_step",
        "/api/v1/%6fptim_step",
        "/api/v1/optim_step;x=1",
        "/api%2fv1%2foptim_step",
        "/file:///etc/passwd",
        "/health/../openapi.json",
        "http://elsewhere/etc/passwd",
        "*",
        "",
    ] {
        for method in ["GET", "POST"] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
            );
            let answer = raw(&server, request.as_bytes());
            let status = statuses(&answer);
            assert!(matches!(status[..], [400 | 404]), "{method} {path}: {answer}");
            assert!(!answer.contains("root:"), "{path}");
        }
    }
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn no_field_leads_out_of_the_folder() {
    let server = Server::start();
    server.call("create_model", &json!({"model_id": "a"}));
    let before = fs::read_dir(server.output.path()).unwrap().count();
    let long = "a/".repeat(400);
    for path in [
        "..",
        "../a",
        "/etc/passwd",
        "//etc",
        "a/../../b",
        "./a",
        "a/./b",
        "..\\a",
        "a\\..\\..\\b",
        "C:\\a",
        "a\u{0}",
        "\u{0}",
        "%2e%2e/a",
        "%252e%252e/a",
        "..%c0%af..",
        "\u{ff0e}\u{ff0e}/a",
        "\u{2024}\u{2024}/a",
        "a\u{202e}b",
        "~root",
        "$HOME",
        "file:///etc/passwd",
        "xorl:///etc/passwd",
        "xorl://../weights/a",
        "xorl://a/weights/..",
        "xorl://a/../../a",
        "tinker://a/weights/../b",
        "weights/../../a",
        "sampler_weights/..",
        "tenants/one/a",
        ".hidden",
        "a\nb",
        "",
        " ",
        long.as_str(),
    ] {
        for (call, field) in [
            ("save_weights", "path"),
            ("save_weights_for_sampler", "name"),
            ("save_weights_for_sampler", "path"),
            ("save_full_weights_safetensors", "name"),
            ("load_weights", "path"),
            ("delete_checkpoint", "checkpoint_id"),
            ("delete_checkpoint", "path"),
            ("weights_info", "xorl_path"),
            ("weights_info", "path"),
        ] {
            // An empty path is that of a save without a name.
            if (call, path) == ("save_weights", "") {
                continue;
            }
            let (status, reply) = server.post(call, &json!({"model_id": "a", field: path}));
            assert_eq!(status, 400, "{call} {field} {path:?}: {reply}");
            assert!(!detail(&reply).contains(&*server.output.path().to_string_lossy()), "{reply}");
        }
        for call in [
            "create_model",
            "forward",
            "optim_step",
            "save_weights",
            "list_checkpoints",
            "get_info",
            "kill_session",
        ] {
            for field in ["model_id", "session_id"] {
                let data = json!([{"input_ids": [1, 2]}]);
                let (status, reply) = server.post(call, &json!({field: path, "batches": data}));
                assert_eq!(status, 400, "{call} {field} {path:?}: {reply}");
            }
        }
    }
    assert_eq!(fs::read_dir(server.output.path()).unwrap().count(), before);
}

#[test]
fn a_link_that_takes_the_place_of_a_save_is_not_followed() {
    let server = Server::start();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("manifest.json"), r#"{"adapter": {"size": 6, "sha256": ""}}"#).unwrap();
    fs::write(outside.path().join("adapter"), "secret").unwrap();
    server.call("create_model", &json!({"model_id": "a"}));
    let save = |path: &str| server.call("save_weights", &json!({"model_id": "a", "path": path}));
    let replace = |folder: &Path| {
        fs::rename(folder, folder.with_extension("real")).unwrap();
        symlink(outside.path(), folder).unwrap();
    };
    let is_refused = |paths: &[&str]| {
        for path in paths {
            for (call, field) in [
                ("load_weights", "path"),
                ("delete_checkpoint", "checkpoint_id"),
                ("weights_info", "xorl_path"),
            ] {
                let (status, reply) = server.post(call, &json!({"model_id": "a", field: path}));
                assert!((400..500).contains(&status), "{call} {path}: {reply}");
            }
            let (status, reply) =
                server.post("save_weights", &json!({"model_id": "a", "path": path, "overwrite": true}));
            assert!(status == 400 && detail(&reply).contains("a link is on the way"), "{path}: {reply}");
        }
        let (_, list) = server.post("list_checkpoints", &json!({"model_id": "a"}));
        assert!(!list.to_string().contains("\"size_bytes\":6"), "{list}");
        assert_eq!(
            fs::read_dir(outside.path()).unwrap().count(),
            2,
            "something was written or deleted outside"
        );
    };
    let output = server.output.path();
    // The save itself, then the folder of its model, then that of all models.
    save("one");
    replace(&output.join("weights/a/one"));
    is_refused(&["one", "weights/a/one", "xorl://a/weights/one"]);
    save("two");
    replace(&output.join("weights/a"));
    is_refused(&["two", "new"]);
    fs::remove_file(output.join("weights/a")).unwrap();
    save("three");
    replace(&output.join("weights"));
    is_refused(&["three"]);
    save_elsewhere(&server, &outside);
}

/// A folder of the client's choice.
fn save_elsewhere(server: &Server, outside: &tempfile::TempDir) {
    fs::remove_file(server.output.path().join("weights")).unwrap();
    server.call("save_weights", &json!({"model_id": "a", "path": "own/folder"}));
    fs::rename(server.output.path().join("own"), server.output.path().join("moved")).unwrap();
    symlink(outside.path(), server.output.path().join("own")).unwrap();
    for path in ["own/folder", "folder"] {
        let (status, reply) =
            server.post("delete_checkpoint", &json!({"model_id": "a", "checkpoint_id": path}));
        assert!((400..500).contains(&status), "{path}: {reply}");
    }
    assert!(outside.path().join("adapter").exists());
}

#[test]
fn a_wrong_key_is_refused_alike_whatever_it_is() {
    let server = Server::with(keys(&["one"]), |_| {});
    let hash = format!("{:x}", Sha256::digest("tml-one"));
    let long = "k".repeat(20_000);
    let mut answers = Vec::new();
    for header in [
        "X-API-Key: tml-on",
        "X-API-Key: tml-one2",
        "X-API-Key: TML-ONE",
        "X-API-Key:",
        "X-API-Key: \u{e9}",
        "X-API-Key: one",
        "X-API-Key: tml-one, tml-one",
        "X-API-Key: wrong\r\nX-API-Key: tml-one",
        "X-API-Key: wrong\r\nAuthorization: Bearer tml-one",
        "Authorization: tml-one",
        "Authorization: Basic dG1sLW9uZQ==",
        "Authorization: Bearer",
        "Authorization: Bearer\ttml-one",
        "Cookie: X-API-Key=tml-one",
        &format!("X-API-Key: {hash}"),
        &format!("X-API-Key: {long}"),
        "Host: x",
    ] {
        let request = format!(
            "GET /metrics?key=tml-one HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"
        );
        let answer = raw(&server, request.as_bytes());
        assert_eq!(statuses(&answer), [401], "{header}: {answer}");
        answers.push(answer.split_once("\r\n\r\n").unwrap().1.to_owned());
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(server.send("GET", "/metrics", &[("X-API-Key", "tml-one")], b"").0, 200);
}

#[test]
fn a_flood_of_headers_ends_its_connection_alone() {
    let server = Server::start();
    let before = resident();
    let many: String = (0..5000).map(|i| format!("h{i}: x\r\n")).collect();
    let large = format!("h: {}\r\n", "x".repeat(MIB));
    for headers in [many, large] {
        let answer =
            raw(&server, format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").as_bytes());
        assert!(matches!(statuses(&answer)[..], [] | [431]), "{answer}");
    }
    let long = format!("GET /health?{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(MIB));
    assert!(matches!(statuses(&raw(&server, long.as_bytes()))[..], [] | [414 | 431]));
    // Heads that never end, on many connections at once: each holds little.
    let part = vec![b'x'; MIB];
    let streams: Vec<TcpStream> = (0..64)
        .map(|_| {
            let mut stream = connect(&server);
            stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nh: ").unwrap();
            let _ = stream.write_all(&part);
            stream
        })
        .collect();
    let grown = resident().saturating_sub(before);
    assert!(grown < 24 * MIB, "{} MiB for {} heads", grown / MIB, streams.len());
    assert_eq!(server.get("/health").0, 200);
}

#[test]
fn malformed_http_is_a_refusal_or_a_close() {
    let server = Server::start();
    let body = r#"{"model_id": "default"}"#;
    let post = |headers: &str, body: &str| {
        format!("POST /api/v1/optim_step HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n{body}").into_bytes()
    };
    let cases: Vec<Vec<u8>> = vec![
        b"\0\0\0\0\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"GET /health\r\n\r\n".to_vec(),
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n".to_vec(),
        b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        b"GET /health HTTP/1.1\r\nHost x\r\n\r\n".to_vec(),
        b"GET /health HTTP/1.1\r\nHo st: x\r\n\r\n".to_vec(),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: y\r\n\r\n".to_vec(),
        b"GET /health HTTP/1.1\r\nHost: \0\r\n\r\n".to_vec(),
        b"GET /he\xffalth HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        b"G\xc3\xa9T /health HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        post("Content-Length: -1", body),
        post("Content-Length: +5", body),
        post("Content-Length: 0x17", body),
        post("Content-Length: 99999999999999999999", body),
        post("Content-Length: 23\r\nContent-Length: 5", body),
        post("Content-Length: 23, 5", body),
        post("Transfer-Encoding: gzip, identity", body),
        post("Transfer-Encoding: chunked, gzip", body),
        post("Transfer-Encoding: chunked", "zz\r\n{}\r\n0\r\n\r\n"),
        post("Transfer-Encoding: chunked", "ffffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
        post("Transfer-Encoding: chunked", "-2\r\n{}\r\n0\r\n\r\n"),
        post("Transfer-Encoding: chunked", "2\r\n{}xx0\r\n\r\n"),
        post("Content-Length: 3\r\nContent-Encoding: zstd", "abc"),
        post("Content-Length: 2\r\nContent-Encoding: zstd, zstd", "{}"),
        post("Content-Length: 2\r\nContent-Encoding: \u{e9}", "{}"),
    ];
    for bytes in cases {
        let answer = raw(&server, &bytes);
        let shown = String::from_utf8_lossy(&bytes);
        assert!(statuses(&answer).iter().all(|status| (400..500).contains(status)), "{shown}: {answer}");
    }
    assert_eq!(server.get("/health").0, 200);
    assert!(server.engine.asked().iter().all(|asked| !format!("{:?}", asked.task).contains("OptimStep")));
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let server = Server::start();
    let mut requests = Vec::new();
    for i in 0..200 {
        let body = json!({"request_id": format!("number-{i}")}).to_string();
        requests.extend(
            format!(
                "POST /api/v1/retrieve_future HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .bytes(),
        );
    }
    requests.extend(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut stream = connect(&server);
    stream.write_all(&requests).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let numbers: Vec<&str> = answer
        .match_indices("number-")
        .map(|(at, _)| answer[at + 7..].split(['\\', '"']).next().unwrap())
        .collect();
    assert_eq!(numbers, (0..200).map(|i| i.to_string()).collect::<Vec<_>>());
    assert_eq!(statuses(&answer).last(), Some(&200));
}

#[test]
fn connections_that_end_in_the_middle_leave_nothing_behind() {
    let server = Server::start();
    let body = forward_backward(1).to_string();
    let packed = zstd::encode_all(body.as_bytes(), 1).unwrap();
    let head = |length: usize, more: &str| {
        format!("POST /api/v1/forward_backward HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{more}\r\n")
            .into_bytes()
    };
    let whole = [head(body.len(), ""), body.into_bytes()].concat();
    let whole_packed = [head(packed.len(), "Content-Encoding: zstd\r\n"), packed].concat();
    let large = [head(8 * MIB, ""), vec![b'['; MIB]].concat();
    let mut cuts = 0;
    for bytes in [&whole[..], &whole_packed, &large] {
        for cut in (1..bytes.len()).step_by(bytes.len() / 40 + 1) {
            let mut stream = connect(&server);
            stream.write_all(&bytes[..cut]).unwrap();
            cuts += 1;
        }
        // The answer is never read, so the connection is reset.
        connect(&server).write_all(bytes).unwrap();
    }
    assert!(cuts > 100, "{cuts}");
    let ends = Instant::now() + Duration::from_secs(10);
    while metric(&server, "xorl_http_body_bytes") > 0.0 {
        assert!(Instant::now() < ends, "bytes of bodies are held though their clients are gone");
        thread::sleep(Duration::from_millis(20));
    }
    // A pass whose client is gone is carried out all the same, once.
    assert_eq!(
        server.submit("forward_backward", &forward_backward(1)),
        server.submit("forward_backward", &forward_backward(1))
    );
    assert_eq!(metric(&server, "xorl_futures_pending"), 0.0);
}

#[test]
fn a_bomb_of_several_frames_is_refused_at_the_limit() {
    let server = Server::with(Keys::default(), |settings| settings.http.body = 4 * MIB);
    let before = resident();
    let frame = zstd::encode_all(&vec![b' '; 2 * MIB][..], 19).unwrap();
    let frames = frame.repeat(1000);
    // A skippable frame says how long it is: longer than the body.
    let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &u32::MAX.to_le_bytes(), b"x"].concat();
    let mut claims = frame.clone();
    // The size that a frame claims to have, in its header.
    claims[5..9].copy_from_slice(&[0xff; 4]);
    let cut = &frame[..frame.len() - 3];
    for (body, status) in [(&frames[..], 413), (&skippable, 400), (&claims, 400), (cut, 400), (b"", 400)] {
        let headers = [("Content-Encoding", "zstd")];
        let (got, reply) = server.send("POST", "/api/v1/optim_step", &headers, body);
        assert_eq!(got, status, "{} bytes: {reply}", body.len());
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 40 * MIB, "{} MiB", grown / MIB);
}

#[test]
fn bodies_share_a_bound_and_who_finds_no_room_is_told_to_come_back() {
    let server = Server::with(Keys::default(), |settings| {
        settings.http.body = MIB;
        settings.http.bodies = 4 * MIB;
        settings.http.room_time = Duration::from_millis(300);
    });
    let before = resident();
    let part = vec![b' '; MIB - 1];
    let head =
        format!("POST /api/v1/optim_step HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MIB}\r\n\r\n");
    let connected = || {
        let mut stream = connect(&server);
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        // All but the last byte.
        let _ = stream.write_all(&part);
        stream
    };
    // Four bodies fill the room; for a hundred more there is none.
    let mut slow: Vec<TcpStream> = (0..4).map(|_| connected()).collect();
    let ends = Instant::now() + Duration::from_secs(10);
    while metric(&server, "xorl_http_body_bytes") < 4.0 * MIB as f64 {
        assert!(Instant::now() < ends, "{} bytes are held", metric(&server, "xorl_http_body_bytes"));
        thread::sleep(Duration::from_millis(10));
    }
    slow.extend((0..100).map(|_| connected()));
    let grown = resident().saturating_sub(before);
    assert!(grown < 40 * MIB, "{} MiB for {} bodies", grown / MIB, slow.len());
    let body = "x".repeat(300_000);
    let request = format!(
        "POST /api/v1/optim_step HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = connect(&server);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(statuses(&answer), [503], "{answer}");
    assert!(answer.to_lowercase().contains("retry-after: 2"), "{answer}");
    // Requests without a body are answered meanwhile, and all are once the slow ones are gone.
    assert_eq!(server.get("/health").0, 200);
    drop(slow);
    let ends = Instant::now() + Duration::from_secs(10);
    while server.post("optim_step", &json!({"x": body})).0 != 200 {
        assert!(Instant::now() < ends, "no room after all were gone");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn results_that_nobody_fetches_are_bounded() {
    let server = Server::with(Keys::default(), |settings| {
        settings.futures.kept = 100_000;
        settings.futures.bytes = 2 * MIB;
        settings.max_tokens = 5000;
    });
    let mut data = datum();
    data["model_input"]["input_ids"] = json!(vec![1; 5000]);
    data["loss_fn_inputs"] = json!({"target_tokens": vec![1; 5000]});
    let body = json!({"forward_backward_input": {"data": [data]}});
    let first = server.submit("forward", &body);
    server.retrieve(&first);
    let before = resident();
    let all: Vec<_> = (0..500).map(|_| server.submit("forward", &body)).collect();
    let last = all.last().unwrap().clone();
    assert_eq!(server.retrieve(&last).0, 200);
    assert_eq!(server.retrieve(&first).0, 404, "the oldest result is gone");
    let kept = metric(&server, "xorl_futures_kept_bytes");
    assert!(kept <= 2.0 * MIB as f64, "{kept}");
    // The double's notes of requests are not the server's.
    let noted = 500 * 5000 * 16;
    let grown = resident().saturating_sub(before);
    assert!(grown < 40 * MIB + noted, "{} MiB", grown / MIB);
}

#[test]
fn data_that_waits_is_bounded() {
    let server = Server::with(Keys::default(), |settings| settings.futures.pending_bytes = 30_000);
    let mut data = datum();
    data["model_input"]["input_ids"] = json!(vec![1; 500]);
    data["loss_fn_inputs"] = json!({"target_tokens": vec![1; 500]});
    let body = json!({"forward_backward_input": {"data": [data]}});
    let gate = server.engine.gate.lock().unwrap();
    let taken: Vec<u16> = (0..6).map(|_| server.post("forward", &body).0).collect();
    assert_eq!(taken, [200, 200, 200, 429, 429, 429]);
    let (_, reply) = server.post("forward", &body);
    assert!(detail(&reply).contains("bytes of data"), "{reply}");
    assert_eq!(server.post("optim_step", &json!({})).0, 200, "a request without data is taken");
    drop(gate);
    server.call("abort_gradient_epoch", &json!({}));
    server.call("forward", &body);
}

#[test]
fn slow_bodies_hold_up_nobody_else() {
    let server = Server::with(Keys::default(), |settings| {
        settings.http.body_time = Duration::from_millis(700);
    });
    let mut slow: Vec<TcpStream> = (0..100)
        .map(|i| {
            let mut stream = connect(&server);
            let framing = ["Content-Length: 1000", "Transfer-Encoding: chunked"][i % 2];
            let head =
                format!("POST /api/v1/forward_backward HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1200) {
        for (i, stream) in slow.iter_mut().enumerate() {
            let _ = stream.write_all([&b"{"[..], b"1\r\n \r\n"][i % 2]);
        }
        let asked = Instant::now();
        server.submit("optim_step", &json!({}));
        assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(50));
    }
    for stream in &mut slow {
        let mut answer = [0; 12];
        match stream.read_exact(&mut answer) {
            Ok(()) => assert_eq!(&answer, b"HTTP/1.1 408"),
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof))
            }
        }
    }
}

#[test]
fn a_result_that_is_read_slowly_comes_whole() {
    let server = Server::with(Keys::default(), |settings| {
        // A kernel takes more only when a third of its buffer, of up to 4 MiB, is free again: 0.3 s at this rate.
        settings.http.idle_time = Duration::from_millis(1500);
        settings.http.head_time = Duration::from_millis(400);
        settings.max_tokens = 4_000_000;
    });
    let rows = json!([{"input_ids": vec![1; 2_000_000]}]);
    let id = server.submit("forward", &json!({"batches": rows}));
    while server.retrieve(&id).0 == 408 {}
    let body = json!({"request_id": id}).to_string();
    let mut stream = connect(&server);
    let head = format!(
        "POST /api/v1/retrieve_future HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let (mut answer, mut part, started) = (Vec::new(), vec![0; MIB / 4], Instant::now());
    while started.elapsed() < Duration::from_millis(3000) {
        thread::sleep(Duration::from_millis(50));
        let read = stream.read(&mut part).unwrap();
        answer.extend_from_slice(&part[..read]);
    }
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8(answer).unwrap();
    let (_, json) = text.split_once("\r\n\r\n").unwrap();
    let result: Value = serde_json::from_str(json).unwrap();
    assert_eq!(result["loss_fn_outputs"][0]["logprobs"]["shape"], json!([2_000_000]));
}
