//! Sampling in the server's engine: what is sampled is what a pass computes, samplers keep their values, and training
//! and sampling leave each other alone.

use crate::common::{
    engine::{Client, Seen, adapter, data_of, id, pass, passed, passes, received, step_of, stepped},
    run_workers,
    topology::{Data, VOCAB, load, spec},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    time::{Duration, Instant},
};
use tch::Device;
use xorl_dist::{
    comm::World,
    infer::request::{Choice, Continuation, NewToken, SampleReply, SampleRequest, Stop, Wanted},
    mesh::{Mesh, MeshSizes},
    model::{
        base_plan::Options,
        transformer::{Batch, Transformer},
    },
    server::{
        engine::{self, EngineOptions},
        request::{
            AdapterSpec, Contents, Datum, Engine, Listener, ModelId, OptimStep, Refusal, Reply, SampleAnswer,
            Save, Source, Task,
        },
    },
    shard::ProcessGroups,
};

/// Tokens of the longest sequence.
const POSITIONS: usize = 4000;
/// Tokens of a text that is compared greedily.
const GREEDY: usize = 10;
const PROMPT: [i64; 7] = [3, 141, 59, 265, 35, 897, 93];

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    replicas: usize,
    moe: bool,
    memory: Option<u64>,
    script: Script,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Script {
    Texts,
    Samplers,
    Beside,
    CopyOnWrite,
    NoRoom,
    Ends,
    Refusals,
}

fn output() -> PathBuf {
    std::env::var("XORL_TEST_OUT").unwrap().into()
}

fn greedy(prompt: &[i64], new: usize) -> SampleRequest {
    SampleRequest {
        prompt: prompt.to_vec(),
        count: 1,
        max_new_tokens: new,
        choice: Choice { temperature: 0.0, top_p: 1.0, top_k: None },
        seed: 0,
        stop: Stop::default(),
        wanted: Wanted::default(),
    }
}

fn random(prompt: &[i64], new: usize, seed: u64) -> SampleRequest {
    let choice = Choice { temperature: 1.0, top_p: 1.0, top_k: None };
    SampleRequest { choice, seed, count: 2, ..greedy(prompt, new) }
}

fn of(model: &ModelId) -> Source {
    Source::Adapter(model.clone())
}

fn submit(client: &Client, source: Source, request: SampleRequest) -> mpsc::Receiver<SampleAnswer> {
    let (send, answer) = mpsc::channel();
    client.0.sample(source, request, Box::new(move |answer: SampleAnswer| send.send(answer).unwrap()));
    answer
}

fn ended(answer: &mpsc::Receiver<SampleAnswer>) -> SampleAnswer {
    answer.recv_timeout(Duration::from_secs(120)).expect("an end")
}

fn sampled(client: &Client, source: Source, request: SampleRequest) -> SampleReply {
    ended(&submit(client, source, request)).unwrap()
}

fn refused(client: &Client, source: Source, request: SampleRequest) -> String {
    match ended(&submit(client, source, request)) {
        Err(Refusal::User(text)) => text,
        other => panic!("not refused as the user's mistake: {other:?}"),
    }
}

/// Counts the tokens of a request while they come.
struct Watched {
    tokens: Arc<AtomicUsize>,
    end: mpsc::Sender<SampleAnswer>,
}

impl Listener for Watched {
    fn token(&mut self, _: &NewToken) {
        self.tokens.fetch_add(1, SeqCst);
    }

    fn end(self: Box<Self>, answer: SampleAnswer) {
        self.end.send(answer).unwrap();
    }
}

/// A request that has its first token.
struct Begun {
    ticket: xorl_dist::server::request::Ticket,
    tokens: Arc<AtomicUsize>,
    end: mpsc::Receiver<SampleAnswer>,
}

fn begin(client: &Client, source: Source, request: SampleRequest) -> Begun {
    let (tokens, (send, end)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel());
    let ticket = client.0.sample(source, request, Box::new(Watched { tokens: tokens.clone(), end: send }));
    let until = Instant::now() + Duration::from_secs(60);
    while tokens.load(SeqCst) == 0 {
        assert!(Instant::now() < until, "no token: {:?}", end.try_recv());
        std::thread::sleep(Duration::from_micros(200));
    }
    Begun { ticket, tokens, end }
}

fn argmax(values: &[f32]) -> i64 {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as i64
}

/// The greedy text behind `prompt` by forward passes of `model` over all of it, which give log p of the vocabulary.
fn text_by_passes(client: &Client, model: &ModelId, prompt: &[i64]) -> Vec<i64> {
    let mut ids = prompt.to_vec();
    for _ in 0..GREEDY {
        let absent = vec![-1; (ids.len() - 1) * VOCAB];
        let targets = absent.into_iter().chain(0..VOCAB as i64).collect();
        let datum = Datum { ids: ids.clone(), targets, k: VOCAB, inputs: BTreeMap::new() };
        let reply = passed(client.ask(model, pass(vec![datum], false)));
        let log_probs = &reply.log_probs[0];
        ids.push(argmax(&log_probs[log_probs.len() - VOCAB..]));
    }
    ids.split_off(prompt.len())
}

/// Checks that the log-probabilities of `text` behind `prompt` are those of a forward pass of `model` over both.
fn check_ratios(client: &Client, model: &ModelId, prompt: &[i64], text: &Continuation, what: &str) {
    let all = [prompt, &text.ids].concat();
    let targets = all[1..].iter().copied().chain([-100]).collect();
    let datum = Datum { ids: all, targets, k: 1, inputs: BTreeMap::new() };
    let reply = passed(client.ask(model, pass(vec![datum], false)));
    let expected = &reply.log_probs[0][prompt.len() - 1..prompt.len() - 1 + text.ids.len()];
    assert_eq!(text.log_probs.len(), expected.len(), "{what}");
    for (ours, theirs) in text.log_probs.iter().zip(expected) {
        assert!((ours - theirs).abs() <= 1e-5 * theirs.abs().max(1.0), "{what}: {ours} {theirs}");
    }
}

/// Checks that the tokens are the same and their log-probabilities near.
fn check_alike(ours: &SampleReply, theirs: &SampleReply, what: &str) {
    assert_eq!(ours.continuations.len(), theirs.continuations.len(), "{what}");
    for (ours, theirs) in ours.continuations.iter().zip(&theirs.continuations) {
        assert_eq!((&ours.ids, &ours.end), (&theirs.ids, &theirs.end), "{what}");
        for (a, b) in ours.log_probs.iter().zip(&theirs.log_probs) {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: {a} {b}");
        }
    }
}

fn update() -> OptimStep {
    OptimStep { lr: 0.05, divide: false, ..step_of(0) }
}

/// One step of training that changes texts.
fn train(client: &Client, model: &ModelId) {
    client.ask(model, pass(data_of(0, 1), true)).unwrap();
    client.step(model, update());
}

fn freeze(client: &Client, model: &ModelId, sampler: &ModelId) {
    assert_eq!(client.ask(model, Task::Freeze(sampler.clone())), Ok(Reply::Sampler));
}

/// Texts of the base, of adapters and of samplers, alone and all at once.
fn texts(client: &Client, of_base: &[i64]) {
    let models: Vec<ModelId> = (0..3).map(id).collect();
    let samplers: Vec<ModelId> = (0..3).map(|index| id(format!("sampler{index}"))).collect();
    for (index, model) in models.iter().enumerate() {
        client.create(model, adapter(index));
        train(client, model);
        freeze(client, model, &samplers[index]);
    }
    let prompts: Vec<Vec<i64>> = (0..3).map(|index| PROMPT[index..].to_vec()).collect();
    let expected: Vec<Vec<i64>> =
        models.iter().zip(&prompts).map(|(model, prompt)| text_by_passes(client, model, prompt)).collect();
    let base = sampled(client, Source::Base, greedy(&PROMPT, GREEDY));
    assert_eq!(base.continuations[0].ids, of_base);
    for _ in 0..2 {
        let ask = |names: &[ModelId]| {
            let with = names.iter().zip(&prompts);
            with.map(|(name, prompt)| submit(client, of(name), greedy(prompt, GREEDY))).collect::<Vec<_>>()
        };
        let base = submit(client, Source::Base, greedy(&PROMPT, GREEDY));
        for answers in [ask(&models), ask(&samplers)] {
            for (index, answer) in answers.iter().enumerate() {
                let text = &ended(answer).unwrap().continuations[0];
                assert_eq!(text.ids, expected[index], "adapter {index}");
                check_ratios(client, &models[index], &prompts[index], text, "greedy");
            }
        }
        assert_eq!(ended(&base).unwrap().continuations[0].ids, of_base);
    }
    // Every importance ratio of what was sampled is 1.
    for (index, model) in models.iter().enumerate() {
        let reply = sampled(client, of(model), random(&prompts[index], 30, 11));
        assert_ne!(reply.continuations[0].ids, reply.continuations[1].ids);
        for text in &reply.continuations {
            check_ratios(client, model, &prompts[index], text, "sampled");
        }
    }
    let state = client.0.state().sampling;
    assert_eq!((state.waiting, state.running), (0, 0));
    assert_eq!(state.tokens, 15 * GREEDY as u64 + 3 * 2 * 30);
    assert!(state.steps >= 30 && state.steps < state.tokens, "{state:?}");
}

/// Samplers that are frozen, opened, moved to disk and forgotten.
fn samplers(client: &Client) {
    let (model, frozen, opened) = (id("policy"), id("frozen"), id("opened"));
    client.create(&model, adapter(1));
    train(client, &model);
    let folder = output().join("sampler_weights/policy/one");
    let save =
        Save { folder: folder.clone(), contents: Contents::Adapter, overwrite: false, metadata: json!({}) };
    assert!(matches!(client.ask(&model, Task::Save(save)), Ok(Reply::Saved { .. })));
    let request = random(&PROMPT, 20, 3);
    let before = sampled(client, of(&model), request.clone());
    // Submitted at once: it is frozen between the tasks of its adapter.
    let tasks = [
        Task::Freeze(frozen.clone()),
        pass(data_of(0, 2), true),
        Task::OptimStep(update()),
        Task::Freeze(frozen.clone()),
    ];
    for answer in tasks.map(|task| client.submit(&model, task)) {
        received(&answer).unwrap();
    }
    let open = || Task::OpenSampler { folder: folder.clone() };
    for _ in 0..2 {
        assert_eq!(client.ask(&opened, open()), Ok(Reply::Sampler));
    }
    let after = sampled(client, of(&model), request.clone());
    assert_ne!(after.continuations, before.continuations);
    let check = |what: &str| {
        for sampler in [&frozen, &opened] {
            check_alike(&sampled(client, of(sampler), request.clone()), &before, what);
        }
    };
    check("after the adapter has changed");
    let state = client.0.state();
    assert_eq!(state.samplers.keys().collect::<Vec<_>>(), ["frozen", "opened"]);
    assert_eq!(state.samplers["frozen"].rank, state.samplers["opened"].rank);
    // Files have fused targets as their leaves, each with an A.
    let [own, leaves] = ["frozen", "opened"].map(|name| state.samplers[name].bytes);
    assert!(own < leaves && leaves < 2 * own, "{state:?}");
    assert_eq!(state.usage.memory, state.models["policy"].bytes + own + leaves);
    assert!(5 * state.samplers["frozen"].bytes < 2 * state.models["policy"].bytes, "{state:?}");
    for model in [&frozen, &opened, &model] {
        assert_eq!(client.ask(model, Task::Spill), Ok(Reply::Spilled));
    }
    let state = client.0.state();
    assert_eq!((state.usage.memory, state.usage.spilled), (0, 3));
    assert!(!state.samplers["frozen"].in_memory);
    check("back from disk");
    let state = client.0.state();
    assert!(state.samplers["frozen"].in_memory && !state.models["policy"].in_memory);
    assert_eq!(sampled(client, of(&model), request.clone()), after);
    // Frozen from disk.
    client.ask(&model, Task::Spill).unwrap();
    freeze(client, &model, &id("second"));
    assert_eq!(sampled(client, of(&id("second")), request.clone()), after);
    for name in ["frozen", "opened", "second"] {
        assert_eq!(client.ask(&id(name), Task::Unload), Ok(Reply::Unloaded));
        assert!(refused(client, of(&id(name)), request.clone()).contains("is unknown"));
    }
    // Another adapter may have the name of one that is gone.
    client.create(&frozen, adapter(2));
    let state = client.0.state();
    assert_eq!((state.samplers.len(), state.models.len()), (0, 2));
}

/// Training and sampling at once, each as it is alone.
fn beside(client: &Client) {
    let [calm, model, source] = ["calm", "model", "source"].map(id);
    client.create(&source, adapter(2));
    train(client, &source);
    freeze(client, &source, &id("sampler"));
    let requests: Vec<(Source, SampleRequest)> = (0..6)
        .map(|index| {
            let source = [Source::Base, of(&source), of(&id("sampler"))][index % 3].clone();
            (source, random(&PROMPT[index..], 400, index as u64))
        })
        .collect();
    let ask = || -> Vec<_> {
        requests.iter().map(|(source, request)| submit(client, source.clone(), request.clone())).collect()
    };
    let alone: Vec<SampleReply> = ask().iter().map(|answer| ended(answer).unwrap()).collect();
    let trained = |model: &ModelId| {
        client.create(model, adapter(0));
        let mut seen = Seen::default();
        for step in 0..4 {
            for data in passes(step, 0) {
                seen.pass(passed(client.ask(model, pass(data, true))));
            }
            seen.step(&client.step(model, step_of(0)), step);
        }
        seen
    };
    let expected = trained(&calm);
    let answers = ask();
    let ours = trained(&model);
    assert!(client.0.state().sampling.running > 0, "both were at work at once");
    assert_eq!(ours, expected, "training beside sampling");
    for (answer, expected) in answers.iter().zip(&alone) {
        check_alike(&ended(answer).unwrap(), expected, "sampling beside training");
    }
}

/// An adapter that is updated, loaded and unloaded while it is sampled from.
fn copy_on_write(client: &Client) {
    let (model, frozen) = (id("policy"), id("frozen"));
    client.create(&model, adapter(1));
    train(client, &model);
    freeze(client, &model, &frozen);
    let folder = output().join("weights/policy/one");
    let save =
        Save { folder: folder.clone(), contents: Contents::Training, overwrite: false, metadata: json!({}) };
    client.ask(&model, Task::Save(save)).unwrap();
    let request = random(&PROMPT, 300, 5);
    let expected = sampled(client, of(&frozen), request.clone());
    client.ask(&model, pass(data_of(0, 2), true)).unwrap();
    let held = client.0.state().usage.memory;
    let [first, second] = [0; 2].map(|_| begin(client, of(&model), request.clone()));
    client.step(&model, update());
    let state = client.0.state();
    assert!(state.sampling.running > 0, "the update waits for no request");
    assert_eq!(state.usage.memory, held + state.samplers["frozen"].bytes, "one copy for both");
    assert_eq!(state.samplers.len(), 1, "which nobody sees");
    // Submitted after the update, it sees its values.
    let now = sampled(client, of(&model), random(&PROMPT, 10, 5));
    assert_ne!(now.continuations[0].log_probs, expected.continuations[0].log_probs[..10]);
    check_ratios(client, &model, &PROMPT, &now.continuations[0], "after the update");
    for begun in [first, second] {
        check_alike(&ended(&begun.end).unwrap(), &expected, "values from before the update");
    }
    // The answer of a later task comes when every rank has dropped the copy.
    client.ask(&model, Task::AbortGradients).unwrap();
    assert_eq!(client.0.state().usage.memory, held);

    // An update that was submitted before a request is seen by it, and one behind it is not.
    let updated = sampled(client, of(&model), random(&PROMPT, 200, 5));
    client.ask(&model, pass(data_of(0, 3), true)).unwrap();
    let early = submit(client, of(&model), random(&PROMPT, 200, 5));
    let step = client.submit(&model, Task::OptimStep(update()));
    let late = submit(client, of(&model), random(&PROMPT, 5, 5));
    stepped(received(&step));
    check_alike(&ended(&early).unwrap(), &updated, "before the update");
    let late = ended(&late).unwrap();
    assert_ne!(late.continuations[0].log_probs, updated.continuations[0].log_probs[..5]);
    check_ratios(client, &model, &PROMPT, &late.continuations[0], "behind the update");

    // A load, and what forgets an adapter and a sampler.
    let after = sampled(client, of(&model), request.clone());
    let begun = begin(client, of(&model), request.clone());
    let load = xorl_dist::server::request::Load { folder, optimizer: true };
    assert!(matches!(client.ask(&model, Task::Load(load)), Ok(Reply::Loaded { .. })));
    let loaded = begin(client, of(&model), request.clone());
    let of_sampler = begin(client, of(&frozen), request.clone());
    for name in [&model, &frozen] {
        assert_eq!(client.ask(name, Task::Unload), Ok(Reply::Unloaded));
        assert!(refused(client, of(name), request.clone()).contains("is unknown"));
    }
    check_alike(&ended(&begun.end).unwrap(), &after, "before the load");
    check_alike(&ended(&loaded.end).unwrap(), &expected, "of an adapter that is gone");
    check_alike(&ended(&of_sampler.end).unwrap(), &expected, "of a sampler that is gone");
    client.create(&id("last"), adapter(1));
    let state = client.0.state();
    assert_eq!(state.usage.memory, state.models["last"].bytes);
}

/// Memory for one large adapter with a sampler: all take turns, and an update goes before a request.
fn no_room(client: &Client) {
    let [first, second, large, frozen] = ["first", "second", "large", "frozen"].map(id);
    let of_rank = |rank| AdapterSpec { rank, ..adapter(0) };
    let said = client.refused(&large, Task::Create(of_rank(1 << 30)));
    let largest: usize = said.rsplit(' ').next().unwrap().parse().unwrap();
    let part = AdapterSpec { alpha: largest as f64, ..of_rank(largest * 8 / 10) };
    client.create(&first, part.clone());
    train(client, &first);
    freeze(client, &first, &frozen);
    client.create(&second, part);
    train(client, &second);
    let state = client.0.state();
    assert!(!state.models["first"].in_memory, "{state:?}");
    let request = random(&PROMPT, 20, 5);
    let expected = sampled(client, of(&frozen), request.clone());
    for _ in 0..2 {
        for name in [&first, &second, &frozen] {
            check_alike(&sampled(client, of(name), request.clone()), &expected, "in turn");
        }
    }
    let answers = [&first, &second, &frozen].map(|name| submit(client, of(name), request.clone()));
    for answer in answers {
        check_alike(&ended(&answer).unwrap(), &expected, "at once");
    }
    let usage = client.0.state().usage;
    let limit = usage.memory_limit.unwrap();
    assert!(usage.spilled >= 4 && usage.memory <= limit, "{usage:?}");
    // An adapter that leaves no room for a copy.
    client.create(&large, of_rank(largest));
    client.ask(&large, pass(data_of(0, 1), true)).unwrap();
    let begun = begin(client, of(&large), random(&PROMPT, 2000, 5));
    client.step(&large, update());
    match ended(&begun.end) {
        Err(Refusal::Server(text)) => assert!(text.contains("large changes, and there is no room"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(client.0.state().usage.memory <= limit);
    check_alike(&sampled(client, of(&frozen), request), &expected, "after all");
}

/// Requests that are cancelled, and those that a stop ends.
fn ends(client: &Client) {
    let model = id("policy");
    client.create(&model, adapter(1));
    let long = random(&PROMPT, POSITIONS - 10, 1);
    let begun = begin(client, of(&model), long.clone());
    client.0.cancel(begun.ticket);
    let seen = begun.tokens.load(SeqCst);
    let Err(Refusal::User(text)) = ended(&begun.end) else { panic!("not cancelled") };
    assert!(text.contains("cancelled"), "{text}");
    let more = begun.tokens.load(SeqCst) - seen;
    // Two continuations have one more token each, of the step that was under way.
    assert!(more <= 2, "{more} tokens after it was cancelled");
    assert_eq!(client.0.state().sampling.running, 0);
    client.0.cancel(begun.ticket);
    // One that waits behind a pass.
    client.ask(&model, pass(data_of(0, 1), true)).unwrap();
    let tasks: Vec<_> = (0..20).map(|_| client.submit(&model, pass(data_of(0, 2), true))).collect();
    let step = client.submit(&model, Task::OptimStep(update()));
    let (send, end) = mpsc::channel();
    let ticket = client.0.sample(
        of(&model),
        greedy(&PROMPT, 5),
        Box::new(move |answer: SampleAnswer| send.send(answer).unwrap()),
    );
    client.0.cancel(ticket);
    assert!(ended(&end).is_err());
    tasks.iter().for_each(|task| drop(passed(received(task))));
    stepped(received(&step));
    // A stop: tasks are carried out, requests to sample end.
    let running = begin(client, of(&model), long.clone());
    let queued = submit(client, Source::Base, long.clone());
    let task = client.submit(&model, pass(data_of(0, 1), true));
    client.0.end_sampling();
    for answer in [running.end, queued, submit(client, Source::Base, long)] {
        assert_eq!(ended(&answer).map(drop), Err(Refusal::Stopping));
    }
    passed(received(&task));
    let state = client.0.state();
    assert_eq!((state.waiting, state.sampling.running), (0, 0));
}

fn refusals(client: &Client) {
    let (model, sampler) = (id("policy"), id("sampler"));
    client.create(&model, adapter(1));
    freeze(client, &model, &sampler);
    let request = greedy(&PROMPT, 5);
    let said = |source: Source, request: SampleRequest, words: &[&str]| {
        let text = refused(client, source, request);
        assert!(words.iter().all(|words| text.contains(words)), "{text}");
        assert_eq!(text.lines().count(), 1);
    };
    said(of(&id("other")), request.clone(), &["model_id other is unknown"]);
    let most = (POSITIONS - PROMPT.len()).to_string();
    said(Source::Base, greedy(&PROMPT, POSITIONS), &["max_new_tokens", &POSITIONS.to_string(), &most]);
    said(of(&model), greedy(&[1; POSITIONS + 1], 0), &["prompt", &(POSITIONS + 1).to_string()]);
    said(of(&model), greedy(&[VOCAB as i64], 5), &["prompt[0]", &VOCAB.to_string(), "0 to 1002"]);
    said(of(&model), greedy(&[], 5), &["prompt", "at least one"]);
    let stop = Stop { texts: vec!["end".into()], ids: vec![] };
    said(of(&model), SampleRequest { stop, ..request.clone() }, &["stop", "no tokenizer"]);
    let task = |model: &ModelId, task: Task, words: &str| {
        let text = client.refused(model, task);
        assert!(text.contains(words), "{text}");
    };
    task(&sampler, Task::OptimStep(update()), "sampler is a sampler, which is never trained");
    task(&sampler, pass(data_of(0, 1), true), "sampler is a sampler, which is never trained");
    task(&sampler, Task::Create(adapter(1)), "sampler is a sampler; give the adapter another name");
    task(&model, Task::Freeze(model.clone()), "policy is an adapter that is trained");
    task(&id("other"), Task::Freeze(id("new")), "model_id other is unknown");
    task(&id("other"), Task::Unload, "model_id other is unknown");
    let folder = output().join("nowhere");
    task(&id("other"), Task::OpenSampler { folder: folder.clone() }, "nowhere");
    task(&model, Task::OpenSampler { folder }, "policy is an adapter that is trained");
    // Nothing of that has left anything behind.
    let state = client.0.state();
    assert_eq!((state.samplers.len(), state.models.len(), state.waiting), (1, 1, 0));
    assert!(sampled(client, of(&sampler), request).continuations[0].ids.len() == 5);
}

/// The greedy text of the base by whole forwards, before there is an engine.
fn text_of_base(model: &mut Transformer) -> Vec<i64> {
    let mut ids = PROMPT.to_vec();
    for _ in 0..GREEDY {
        let labels = vec![-100; ids.len()];
        let logits = model.logits(&Batch::new(&ids, &labels, &[ids.len()], Device::Cpu), &mut []).unwrap();
        ids.push(logits.get(-1).argmax(0, false).int64_value(&[]));
    }
    ids.split_off(PROMPT.len())
}

/// One rank of a case.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let world = World::start().unwrap();
    let experts = if case.moe { case.world } else { 1 };
    let sizes = MeshSizes { replicate: case.replicas as i64, shard: -1, sequence: 1, expert: experts };
    let groups = ProcessGroups::new(&world, Mesh::new(case.world, sizes).unwrap());
    let options = Options { vocab_chunk_rows: 300, loss_chunk_tokens: 7, ..Options::default() };
    let mut model = Transformer::new(spec(case.moe), options, &groups).unwrap();
    load(&mut model, Data::Random);
    let of_base = text_of_base(&mut model);
    let engine = EngineOptions {
        adapter_memory: case.memory,
        max_positions: Some(POSITIONS),
        ..crate::common::engine::options(output(), Duration::from_millis(2))
    };
    let served = engine::serve(&world, groups, model, engine, None, move |handle| {
        let client = Client(handle);
        match case.script {
            Script::Texts => texts(&client, &of_base),
            Script::Samplers => samplers(&client),
            Script::Beside => beside(&client),
            Script::CopyOnWrite => copy_on_write(&client),
            Script::NoRoom => no_room(&client),
            Script::Ends => ends(&client),
            Script::Refusals => refusals(&client),
        }
    });
    if served.unwrap().is_some() {
        std::fs::write(output().join("done"), "").unwrap();
    }
}

fn run(case: &Case) {
    let folder = tempfile::tempdir().unwrap();
    run_workers("engine_sampling::mpi_worker", case.world, case, folder.path(), |_| ());
    assert!(folder.path().join("done").exists());
}

/// One rank, two, and two with divided experts.
fn run_on_some(script: Script, memory: Option<u64>) {
    let case = |world, moe| Case { world, replicas: 1, moe, memory, script };
    run(&case(1, false));
    run(&case(2, false));
    run(&case(2, true));
}

#[test]
fn mpi_what_is_sampled_is_what_a_pass_computes() {
    run_on_some(Script::Texts, None);
    run(&Case { world: 2, replicas: 2, moe: false, memory: None, script: Script::Texts });
}

#[test]
fn mpi_a_sampler_keeps_the_values_of_its_adapter_also_on_disk() {
    run_on_some(Script::Samplers, None);
}

#[test]
fn mpi_sampling_beside_training_changes_neither() {
    run_on_some(Script::Beside, None);
}

#[test]
fn mpi_requests_go_on_with_the_values_that_they_began_with() {
    run_on_some(Script::CopyOnWrite, None);
}

#[test]
fn mpi_samplers_and_adapters_without_room_take_turns() {
    run_on_some(Script::NoRoom, Some(8_000_000));
}

#[test]
fn mpi_a_request_that_is_cancelled_or_stopped_ends_within_a_step() {
    run_on_some(Script::Ends, None);
}

#[test]
fn mpi_requests_to_sample_that_cannot_be_are_refused_by_name() {
    run_on_some(Script::Refusals, None);
}
