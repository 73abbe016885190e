//! A hub on a port of this machine: the calls by which a model is found and downloaded, as the Hugging Face hub answers
//! them, and what goes wrong with them.

use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

pub const NAME: &str = "tiny/model";
pub const DATA: &str = "tiny/rows";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The file that lies in a store of its own, as large files do.
pub const LARGE: &str = "model.safetensors";
const SHARD: &str = "model-00001-of-00001.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Faults; numbers count the answers that have them.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The large file ends in the middle.
    pub cuts: usize,
    /// Everything is unavailable after a cut.
    pub then_unavailable: bool,
    /// Ranges are not understood.
    pub no_ranges: bool,
    /// The large file has other bytes.
    pub wrong: usize,
    /// The hub answers 503.
    pub unavailable: usize,
    /// The weights are a shard with an index.
    pub shards: bool,
    /// The model has another name by now.
    pub renamed: bool,
    /// The answer to every request.
    pub status: u16,
    /// Files are for those whom the owner admits.
    pub gated: bool,
    /// Tokens are not accepted.
    pub token: bool,
    /// There are pickles alone.
    pub no_weights: bool,
    /// It is no hub.
    pub html: bool,
}

#[derive(Default)]
struct State {
    faults: Faults,
    was_cut: bool,
    /// `GET /path`, in the order of their coming.
    requests: Vec<String>,
    /// First bytes of the ranges that were asked for.
    ranges: Vec<u64>,
}

pub struct Hub {
    pub endpoint: String,
    files: Arc<BTreeMap<String, Vec<u8>>>,
    state: Arc<Mutex<State>>,
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent.
    sent: usize,
}

impl Hub {
    /// Serves the names and bytes of `files` as those of [`NAME`], and of `data` as those of [`DATA`], until the
    /// process ends.
    pub fn start(files: Vec<(String, Vec<u8>)>, data: Vec<(String, Vec<u8>)>, faults: Faults) -> Self {
        let mut files: BTreeMap<String, Vec<u8>> = files.into_iter().collect();
        if faults.shards {
            let weights = files.remove(LARGE).unwrap();
            let map: serde_json::Map<_, _> = safetensors::SafeTensors::deserialize(&weights)
                .unwrap()
                .names()
                .into_iter()
                .map(|name| (name.to_string(), json!(SHARD)))
                .collect();
            files.insert(INDEX.into(), json!({"metadata": {}, "weight_map": map}).to_string().into());
            files.insert(SHARD.into(), weights);
        }
        if faults.no_weights {
            files.retain(|name, _| !name.starts_with("model") && !name.starts_with("consolidated"));
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { faults, ..State::default() }));
        let hub = Self { endpoint, files: Arc::new(files), state };
        let (files, state, endpoint) = (hub.files.clone(), hub.state.clone(), hub.endpoint.clone());
        let data = Arc::new(data.into_iter().collect());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, state, endpoint) = (files.clone(), state.clone(), endpoint.clone());
                let data = Arc::clone(&data);
                std::thread::spawn(move || serve(&stream.unwrap(), [&files, &data], &state, &endpoint));
            }
        });
        hub
    }

    /// `GET /path` of all requests since the last [`Hub::forget`].
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }

    pub fn ranges(&self) -> Vec<u64> {
        self.state.lock().unwrap().ranges.clone()
    }

    pub fn forget(&self) {
        let mut state = self.state.lock().unwrap();
        state.requests.clear();
        state.ranges.clear();
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().faults = Faults::default();
    }

    pub fn etag(&self, file: &str) -> String {
        sha256(&self.files[file])
    }
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// `files` are those of the model and those of the data set.
fn serve(stream: &TcpStream, files: [&BTreeMap<String, Vec<u8>>; 2], state: &Mutex<State>, endpoint: &str) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> =
        lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    let header = |name: &str| {
        headers.iter().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
    };
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let path = path.split('?').next().unwrap();
    let range =
        header("range").and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
    let mut answer = {
        let mut state = state.lock().unwrap();
        state.requests.push(format!("{method} {path}"));
        // A data set has the addresses of a model, one folder below.
        let [own, api] = [format!("/datasets/{DATA}/"), format!("/api/datasets/{DATA}/")];
        let of_model =
            path.replacen(&api, &format!("/api/models/{NAME}/"), 1).replacen(&own, &format!("/{NAME}/"), 1);
        let files = files[usize::from(of_model != path)];
        answer(&of_model, files, &mut state, endpoint, range, header("authorization").is_some())
    };
    if method == "HEAD" {
        answer.sent = 0;
    }
    let length = answer.body.len();
    let lines: String = answer.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head =
        format!("HTTP/1.1 {}\r\nContent-Length: {length}\r\nConnection: close\r\n{lines}\r\n", answer.status);
    let mut stream = stream;
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&answer.body[..answer.sent.min(length)]));
}

fn answer(
    path: &str,
    files: &BTreeMap<String, Vec<u8>>,
    state: &mut State,
    endpoint: &str,
    range: Option<u64>,
    has_token: bool,
) -> Answer {
    let plain = |status, headers: &[(&'static str, &str)], body: &str| Answer {
        status,
        headers: headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
        body: body.into(),
        sent: usize::MAX,
    };
    let faults = &mut state.faults;
    match faults.status {
        404 => return plain("404 Not Found", &[("X-Error-Code", "RepoNotFound")], "{}"),
        401 => {
            return plain("401 Unauthorized", &[("X-Error-Message", "Invalid username or password.")], "{}");
        }
        _ => {}
    }
    if faults.token && has_token {
        return plain(
            "401 Unauthorized",
            &[("X-Error-Message", "Invalid credentials in Authorization header")],
            "{}",
        );
    }
    if faults.unavailable > 0 || (faults.then_unavailable && state.was_cut) {
        faults.unavailable = faults.unavailable.saturating_sub(1);
        return plain("503 Service Unavailable", &[], "later");
    }
    if faults.html {
        return plain("200 OK", &[("Content-Type", "text/html")], "<html>welcome</html>");
    }
    let api = format!("/api/models/{NAME}/revision/");
    if let Some(revision) = path.strip_prefix(&api) {
        if !["main", COMMIT].contains(&revision) {
            return plain("404 Not Found", &[("X-Error-Code", "RevisionNotFound")], "{}");
        }
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        let body = json!({"id": NAME, "sha": COMMIT, "private": false, "siblings": siblings}).to_string();
        return plain("200 OK", &[("Content-Type", "application/json")], &body);
    }
    // Python asks for sizes and hashes of all files, we for those of single ones.
    if path == format!("/api/models/{NAME}/tree/{COMMIT}") {
        let entry = |(name, bytes): (&String, &Vec<u8>)| {
            let (hash, size) = (sha256(bytes), bytes.len());
            let lfs = name
                .ends_with(".safetensors")
                .then(|| json!({"oid": hash, "size": size, "pointerSize": 134}));
            json!({"type": "file", "path": name, "size": size, "oid": hash[..40], "lfs": lfs})
        };
        let body = json!(files.iter().map(entry).collect::<Vec<_>>()).to_string();
        return plain("200 OK", &[("Content-Type", "application/json")], &body);
    }
    if let Some(etag) = path.strip_prefix("/store/") {
        let bytes = files.values().find(|bytes| sha256(bytes) == etag).unwrap();
        return part(bytes, state, range);
    }
    let own = format!("/{NAME}/resolve/{COMMIT}/");
    let newer = format!("/newer/model/resolve/{COMMIT}/");
    if faults.renamed && path.starts_with(&own) {
        return plain("307 Temporary Redirect", &[("Location", &path.replacen(&own, &newer, 1))], "");
    }
    let file = path.strip_prefix(&own).or_else(|| path.strip_prefix(&newer));
    let Some((name, bytes)) = file.and_then(|name| files.get_key_value(name)) else {
        return plain("404 Not Found", &[("X-Error-Code", "EntryNotFound")], "{}");
    };
    if faults.gated {
        return plain(
            if has_token { "403 Forbidden" } else { "401 Unauthorized" },
            &[("X-Error-Code", "GatedRepo")],
            "{}",
        );
    }
    let etag = sha256(bytes);
    if name.ends_with(".safetensors") {
        // As the hub's, large files lie on another host, which knows no commits.
        let store = endpoint.replace("127.0.0.1", "localhost");
        let (size, location) = (bytes.len().to_string(), format!("{store}/store/{etag}"));
        let quoted = format!("\"{etag}\"");
        return plain(
            "302 Found",
            &[
                ("Location", &location),
                ("X-Repo-Commit", COMMIT),
                ("X-Linked-Etag", &quoted),
                ("X-Linked-Size", &size),
            ],
            "moved",
        );
    }
    let weak = format!("W/\"{}\"", &etag[..40]);
    Answer {
        status: "200 OK",
        headers: vec![("X-Repo-Commit", COMMIT.into()), ("ETag", weak)],
        body: bytes.clone(),
        sent: usize::MAX,
    }
}

/// A large file, from `range` on.
fn part(bytes: &[u8], state: &mut State, range: Option<u64>) -> Answer {
    state.ranges.extend(range);
    let faults = &mut state.faults;
    let from = range.filter(|_| !faults.no_ranges).unwrap_or(0) as usize;
    let mut body = bytes[from..].to_vec();
    if faults.wrong > 0 {
        faults.wrong -= 1;
        *body.last_mut().unwrap() ^= 1;
    }
    let mut sent = body.len();
    if faults.cuts > 0 {
        faults.cuts -= 1;
        state.was_cut = true;
        sent /= 2;
    }
    let (status, headers) = if from > 0 {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        ("206 Partial Content", vec![("Content-Range", range)])
    } else {
        ("200 OK", Vec::new())
    };
    Answer { status, headers, body, sent }
}
