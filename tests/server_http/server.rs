//! A server on a port of its own over an engine without a model, and a client by hand.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use xorl_dist::{
    infer::request::{Continuation, End, NewToken, PromptScores, SampleReply, SampleRequest},
    server::{
        app::{App, Settings},
        futures::FutureLimits,
        http::{HttpLimits, Shutdown, serve},
        keys::Keys,
        request::{
            AdapterSpec, Answer, Contents, Engine, EngineState, Listener, ModelId, ModelState, OptimStep,
            PassReply, Refusal, Reply, Request, SampleAnswer, SamplerState, Source, StepReply, Task, Ticket,
        },
    },
};

pub type Queued = (Request, Box<dyn FnOnce(Answer) + Send>);

/// An engine without a model: a thread answers, and notes what it was asked.
pub struct Double {
    queue: Mutex<Sender<Queued>>,
    pub state: Arc<Mutex<EngineState>>,
    asked: Arc<Mutex<Vec<Request>>>,
    /// Requests that were submitted.
    submitted: AtomicU64,
    /// Held to stop the thread before its next answer.
    pub gate: Arc<Mutex<()>>,
    /// The requests to sample that it got, by ticket.
    pub sampled: Mutex<Vec<(Source, SampleRequest)>>,
    /// Tickets that were cancelled.
    pub cancelled: Arc<Mutex<BTreeSet<Ticket>>>,
}

impl Double {
    pub fn start() -> Arc<Self> {
        let (sender, receiver) = channel();
        let double = Arc::new(Self {
            queue: Mutex::new(sender),
            state: Arc::new(Mutex::new(EngineState { healthy: true, ..EngineState::default() })),
            asked: Arc::default(),
            submitted: AtomicU64::new(0),
            gate: Arc::default(),
            sampled: Mutex::default(),
            cancelled: Arc::default(),
        });
        let (state, asked, gate) = (double.state.clone(), double.asked.clone(), double.gate.clone());
        thread::spawn(move || answer_all(&receiver, &state, &asked, &gate));
        double
    }

    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn answer_all(
    queue: &Receiver<Queued>,
    state: &Mutex<EngineState>,
    asked: &Mutex<Vec<Request>>,
    gate: &Mutex<()>,
) {
    for (request, answer) in queue {
        drop(gate.lock().unwrap());
        asked.lock().unwrap().push(request.clone());
        let reply = reply_to(&request, &mut state.lock().unwrap_or_else(PoisonError::into_inner));
        answer(reply);
    }
}

/// An adapter in memory.
pub fn model_state(spec: AdapterSpec, step: u64, accumulated: u64) -> ModelState {
    ModelState { spec, step, accumulated, in_memory: true, bytes: 1000, last_used: 1 }
}

fn sampler_state() -> SamplerState {
    SamplerState { rank: 16, in_memory: true, bytes: 500, last_used: 1 }
}

/// The log-probability of every token that the double samples or scores.
pub const LOG_PROB: f32 = -0.5;

/// Token `i` of continuation `n` of `prompt`, which ends at its length or at an end token.
pub fn double_token(prompt: &[i64], n: usize, i: usize) -> i64 {
    (prompt[0] + n as i64 + i as i64) % 100
}

/// Samples as [`double_token`] says, while the gate is open and the ticket is not cancelled.
fn sample_all(
    request: &SampleRequest,
    listener: &mut dyn Listener,
    goes_on: impl Fn() -> bool,
) -> SampleAnswer {
    let SampleRequest { prompt, count, max_new_tokens, stop, wanted, .. } = request;
    let top = |wanted: usize| (0..wanted as i64).map(|id| (id, LOG_PROB)).collect::<Vec<_>>();
    let mut continuations = Vec::new();
    for sample in 0..if *max_new_tokens == 0 { 0 } else { *count } {
        let (mut ids, mut end) = (Vec::new(), End::Length);
        while ids.len() < *max_new_tokens && end == End::Length {
            if !goes_on() {
                return Err(Refusal::User("cancelled".into()));
            }
            let id = double_token(prompt, sample, ids.len());
            listener.token(&NewToken { sample, id, log_prob: LOG_PROB, top: top(wanted.new_top) });
            ids.push(id);
            if stop.ids.contains(&id) {
                end = End::Id;
            }
        }
        let (log_probs, top) = (vec![LOG_PROB; ids.len()], vec![top(wanted.new_top); ids.len()]);
        continuations.push(Continuation { ids, log_probs, top, end });
    }
    let each = |first, rest| {
        let mut values = vec![rest; prompt.len()];
        values[0] = first;
        values
    };
    let prompt_scores = PromptScores {
        log_probs: if wanted.prompt { each(f32::NAN, LOG_PROB) } else { Vec::new() },
        top: if wanted.prompt_top > 0 {
            let mut all = vec![top(wanted.prompt_top); prompt.len()];
            all[0].clear();
            all
        } else {
            Vec::new()
        },
        targets: wanted.prompt_targets.as_ref().map_or_else(Vec::new, |targets| {
            targets.ids.iter().map(|&id| if id < 0 { f32::NAN } else { LOG_PROB }).collect()
        }),
    };
    Ok(SampleReply { continuations, prompt: prompt_scores })
}

fn reply_to(request: &Request, state: &mut EngineState) -> Answer {
    state.answered += 1;
    let name = request.model.to_string();
    if let Task::Create(spec) = &request.task {
        state.models.entry(name).or_insert_with(|| model_state(spec.clone(), 0, 0));
        return Ok(Reply::Created);
    }
    if let Task::OpenSampler { folder } = &request.task {
        if !folder.is_dir() {
            return Err(Refusal::User(format!("{} is no checkpoint", folder.display())));
        }
        if folder.ends_with("damaged") {
            return Err(Refusal::User(format!("{} is damaged", folder.display())));
        }
        state.samplers.entry(name).or_insert_with(sampler_state);
        return Ok(Reply::Sampler);
    }
    if request.task == Task::Unload && state.samplers.remove(&name).is_some() {
        return Ok(Reply::Unloaded);
    }
    let Some(model) = state.models.get_mut(&name) else {
        return Err(Refusal::Server(format!("{name} was never created")));
    };
    match &request.task {
        Task::Pass(pass) if pass.loss.name == "stable_reinforce" => {
            Err(Refusal::User("stable_reinforce is not built; use importance_sampling".into()))
        }
        Task::Pass(pass) if pass.loss.name == "panic" => panic!("the engine fails"),
        Task::Pass(pass) => {
            model.accumulated += u64::from(pass.backward);
            let log_probs: Vec<Vec<f32>> = pass
                .data
                .iter()
                .map(|datum| datum.targets.iter().map(|&target| -0.5 * f32::from(target >= 0)).collect())
                .collect();
            let valid =
                pass.data.iter().flat_map(|datum| &datum.targets).filter(|&&target| target >= 0).count()
                    as u64;
            Ok(Reply::Passed(PassReply {
                loss: 0.5 * valid as f64,
                valid,
                log_probs,
                metrics: BTreeMap::new(),
            }))
        }
        Task::OptimStep(_) => {
            model.step += 1;
            model.accumulated = 0;
            Ok(Reply::Stepped(StepReply { step: model.step, grad_norm: 1.25, non_finite: Vec::new() }))
        }
        Task::AbortGradients => Ok(Reply::Aborted { step: model.step }),
        Task::Save(save) if save.folder.exists() && !save.overwrite => {
            Err(Refusal::User(format!("{} exists; give overwrite or another name", save.folder.display())))
        }
        Task::Save(save) => {
            fs::create_dir_all(&save.folder).unwrap();
            let config = json!({"peft_type": "LORA", "r": model.spec.rank, "lora_alpha": model.spec.alpha,
                "target_modules": ["q_proj"]});
            let mut manifest = json!({});
            let name = match save.contents {
                Contents::Merged { .. } => "model.safetensors",
                Contents::Adapter | Contents::Training => "adapter_config.json",
            };
            for (file, value) in [(name, &config), ("metadata.json", &save.metadata)] {
                let text = value.to_string();
                let sha256 = format!("{:x}", Sha256::digest(&text));
                manifest[file] = json!({"size": text.len(), "sha256": sha256});
                fs::write(save.folder.join(file), text).unwrap();
            }
            fs::write(save.folder.join("manifest.json"), manifest.to_string()).unwrap();
            Ok(Reply::Saved { folder: save.folder.clone(), bytes: 1 })
        }
        Task::Load(load) if load.folder.ends_with("damaged") => {
            Err(Refusal::User(format!("{} is damaged", load.folder.display())))
        }
        Task::Load(load) if load.folder.is_dir() => Ok(Reply::Loaded { step: 3 }),
        Task::Load(load) => Err(Refusal::User(format!("{} is no checkpoint", load.folder.display()))),
        Task::Spill => {
            model.in_memory = false;
            Ok(Reply::Spilled)
        }
        Task::Unload => {
            state.models.remove(&name);
            Ok(Reply::Unloaded)
        }
        Task::Freeze(sampler) => {
            state.samplers.entry(sampler.to_string()).or_insert_with(sampler_state);
            Ok(Reply::Sampler)
        }
        Task::Create(_) | Task::OpenSampler { .. } => unreachable!(),
    }
}

impl Engine for Double {
    fn submit(&self, request: Request, answer: Box<dyn FnOnce(Answer) + Send>) {
        self.submitted.fetch_add(1, SeqCst);
        // A thread that has panicked has dropped its end: the answer is dropped, too.
        let _ = self.queue.lock().unwrap().send((request, answer));
    }

    fn sample(&self, source: Source, request: SampleRequest, mut listener: Box<dyn Listener>) -> Ticket {
        let mut sampled = self.sampled.lock().unwrap();
        let ticket = Ticket(sampled.len() as u64);
        sampled.push((source.clone(), request.clone()));
        let (gate, cancelled, state) = (self.gate.clone(), self.cancelled.clone(), self.state.clone());
        let before = self.submitted.load(SeqCst);
        thread::spawn(move || {
            // It comes behind the tasks that were submitted before it.
            let until = Instant::now() + Duration::from_secs(20);
            let answered = || state.lock().unwrap_or_else(PoisonError::into_inner).answered;
            while answered() < before && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            let goes_on = || {
                drop(gate.lock().unwrap());
                !cancelled.lock().unwrap().contains(&ticket)
            };
            let known = match &source {
                Source::Base => true,
                Source::Adapter(id) => {
                    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
                    state.samplers.contains_key(id.as_str()) || state.models.contains_key(id.as_str())
                }
            };
            let answer = if known {
                sample_all(&request, &mut *listener, goes_on)
            } else {
                Err(Refusal::User(format!("{source:?} is unknown")))
            };
            listener.end(answer);
        });
        ticket
    }

    fn cancel(&self, ticket: Ticket) {
        self.cancelled.lock().unwrap().insert(ticket);
    }

    fn state(&self) -> EngineState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A folder with a small tokenizer and a chat template.
fn tokenizer() -> TempDir {
    let (from, folder) =
        (Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat"), tempfile::tempdir().unwrap());
    for (file, name) in [
        ("byte_level/tokenizer.json", "tokenizer.json"),
        ("byte_level/tokenizer_config.json", "tokenizer_config.json"),
        ("templates/chatml.jinja", "chat_template.jinja"),
    ] {
        fs::copy(from.join(file), folder.path().join(name)).unwrap();
    }
    folder
}

/// A server on a port of its own.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Arc<Double>,
    pub output: TempDir,
    pub shutdown: Shutdown,
    /// The tokenizer, where there is one.
    pub tokenizer: Option<TempDir>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

pub fn settings(output: &Path) -> Settings {
    Settings {
        base_model: "org/base".into(),
        other_names: vec!["/models/base".into()],
        api_host: "127.0.0.1".into(),
        architecture: "LlamaForCausalLM".into(),
        tokenizer: "/models/base".into(),
        output_dir: output.to_owned(),
        vocab_size: 100,
        end_token_ids: vec![99],
        max_context: 1000,
        adapter: AdapterSpec {
            rank: 16,
            alpha: 32.0,
            targets: None,
            train_attn: true,
            train_mlp: true,
            seed: 42,
        },
        max_rank: Some(64),
        model_ids: vec![ModelId::new("policy_v1").unwrap()],
        optim: OptimStep {
            lr: 1e-4,
            betas: (0.9, 0.95),
            eps: 1e-12,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            divide: true,
        },
        max_datum: 1000,
        max_tokens: 1000,
        futures: FutureLimits { poll: Duration::from_millis(300), ..FutureLimits::default() },
        http: HttpLimits { linger: Duration::from_millis(500), ..HttpLimits::default() },
    }
}

impl Server {
    pub fn start() -> Self {
        Self::with(Keys::default(), |_| {})
    }

    pub fn with(keys: Keys, change: impl FnOnce(&mut Settings)) -> Self {
        let output = tempfile::tempdir().unwrap();
        let mut settings = settings(output.path());
        change(&mut settings);
        let engine = Double::start();
        let app = App::new(engine.clone(), settings, keys);
        app.create_declared().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), Shutdown::default());
        let stop = shutdown.clone();
        let thread = Some(thread::spawn(move || serve(listener, app, &stop)));
        Self { address, engine, output, shutdown, tokenizer: None, thread }
    }

    /// A server that knows texts: `!` is 0, `A` 32, `a` 64, and other tokens of one character lie between.
    pub fn with_texts(keys: Keys, change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tokenizer();
        let mut server = Self::with(keys, |settings| {
            settings.tokenizer = folder.path().to_owned();
            settings.vocab_size = 437;
            change(settings);
        });
        server.tokenizer = Some(folder);
        server
    }

    /// Sends a request on a connection of its own; returns status and JSON body (text where it is no JSON).
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, Value) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n",
            body.len()
        );
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        stream.write_all((head + "\r\n").as_bytes()).unwrap();
        // A server may answer and close before it has read all.
        let _ = stream.write_all(body);
        read_response(&mut stream)
    }

    pub fn post(&self, name: &str, body: &Value) -> (u16, Value) {
        self.send("POST", &format!("/api/v1/{name}"), &[], body.to_string().as_bytes())
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, &[], b"")
    }

    /// Submits, and returns the id of the future.
    pub fn submit(&self, name: &str, body: &Value) -> String {
        let (status, reply) = self.post(name, body);
        assert_eq!(status, 200, "{name}: {reply}");
        reply["request_id"].as_str().unwrap().to_owned()
    }

    pub fn retrieve(&self, id: &str) -> (u16, Value) {
        self.post("retrieve_future", &json!({"request_id": id}))
    }

    /// Submits and waits as clients do: a 408 is asked again.
    pub fn call(&self, name: &str, body: &Value) -> Value {
        let id = self.submit(name, body);
        let polls = std::iter::repeat_with(|| self.retrieve(&id)).take(100);
        let mut ends = polls.skip_while(|(status, _)| *status == 408);
        let (status, reply) = ends.next().unwrap_or_else(|| panic!("{name}: no result in 100 polls"));
        assert_eq!(status, 200, "{name}: {reply}");
        reply
    }

    pub fn stop(&mut self) {
        self.shutdown.begin();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn read_response(stream: &mut TcpStream) -> (u16, Value) {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.into())))
}

pub fn detail(reply: &Value) -> &str {
    reply["detail"].as_str().unwrap_or_else(|| panic!("no detail in {reply}"))
}

pub fn datum() -> Value {
    json!({"model_input": {"input_ids": [1, 2, 3]},
        "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
            "weights": {"data": [0.0, 1.0, 2.0], "dtype": "float32", "shape": [3]}}})
}

pub fn forward_backward(seq_id: u64) -> Value {
    json!({"model_id": "default", "seq_id": seq_id,
        "forward_backward_input": {"data": [datum()], "loss_fn": "cross_entropy"}})
}
