//! The life of adapters on the server: those that leave memory and come back are the same to the bit, what has no room
//! is refused and loses nothing, and numbers that are not finite leave an adapter as it was.

use crate::common::{
    engine::{Client, Seen, adapter, data_of, id, pass, passed, passes, received, step_of, stepped},
    run_workers,
    topology::{Data, load, spec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use xorl_dist::{
    checkpoint::saves,
    comm::World,
    config::ReduceGradients,
    mesh::{Mesh, MeshSizes},
    model::{base_plan::Options, transformer::Transformer},
    server::{
        engine::{self, EngineOptions},
        request::{
            AdapterSpec, Answer, Contents, Engine, ModelId, OptimStep, Refusal, Reply, Save, StepReply, Task,
        },
    },
    shard::ProcessGroups,
};

const STEPS: usize = 2;
const SPILLED: &str = ".server/spilled";

/// A world, its limits, and what its front does.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    replicas: usize,
    moe: bool,
    reduce: ReduceGradients,
    /// Bytes of a rank for adapters.
    memory: Option<u64>,
    storage: Option<u64>,
    script: Script,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Script {
    /// An adapter that leaves memory after each request, and one that stays.
    Leaving,
    /// Four adapters, with requests in turn and then at once.
    Four,
    /// Ranks that have no room, and a disk that is full.
    NoRoom,
    /// Adapters whose files are gone when a pass needs them.
    Damaged,
    /// A disk that is full between the micro-batches of a pass.
    HalfAPass,
    Measured,
    NotFinite,
    StorageLimit,
}

impl Case {
    fn new(world: usize, script: Script) -> Self {
        let reduce = ReduceGradients::Step;
        Self { world, replicas: 1, moe: false, reduce, memory: None, storage: None, script }
    }
}

fn output() -> PathBuf {
    std::env::var("XORL_TEST_OUT").unwrap().into()
}

/// The files of adapters on disk.
fn files() -> Vec<String> {
    let entries = fs::read_dir(output().join(SPILLED)).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits until no adapter has a file: the other ranks delete theirs after the answer.
fn no_files() {
    let until = Instant::now() + Duration::from_secs(20);
    while !files().is_empty() {
        assert!(Instant::now() < until, "{:?}", files());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn in_memory(client: &Client, model: &ModelId) -> bool {
    client.0.state().models[model.as_str()].in_memory
}

/// Two like adapters with like requests; one leaves memory after each, also between the passes of a step.
fn leaving(client: &Client, ranks: usize) -> Value {
    let [stays, leaves] = ["stays", "leaves"].map(id);
    let leave = || {
        assert_eq!(client.ask(&leaves, Task::Spill), Ok(Reply::Spilled));
        assert_eq!(client.ask(&leaves, Task::Spill), Ok(Reply::Spilled));
        assert!(!in_memory(client, &leaves) && in_memory(client, &stays));
        assert_eq!(files().len(), ranks);
    };
    let both = |task: &dyn Fn() -> Task| {
        let [expected, ours] = [&stays, &leaves].map(|model| client.ask(model, task()));
        assert!(expected.is_ok() && expected == ours, "{expected:?} {ours:?}");
        leave();
        expected.unwrap()
    };
    both(&|| Task::Create(adapter(0)));
    let mut seen = Seen::default();
    for step in 0..STEPS + 1 {
        for data in passes(step, 0) {
            seen.pass(passed(Ok(both(&|| pass(data.clone(), true)))));
        }
        if step == 1 {
            // Dropped while they are on disk.
            both(&|| Task::AbortGradients);
            seen.pass(passed(Ok(both(&|| pass(data_of(7, 2), true)))));
        }
        seen.step(&stepped(Ok(both(&|| Task::OptimStep(step_of(0))))), step);
    }
    assert_eq!(client.ask(&leaves, Task::AbortGradients), Ok(Reply::Aborted { step: 3 }));
    // Saved from disk, with gradients.
    both(&|| pass(data_of(5, 3), true));
    let state = client.0.state();
    assert_eq!(state.models["leaves"].accumulated, 1);
    let saved = ["stays", "leaves"].map(|name| {
        let folder = output().join("weights").join(name);
        let save = Save { folder, contents: Contents::Training, overwrite: false, metadata: json!({}) };
        let Ok(Reply::Saved { folder, .. }) = client.ask(&id(name), Task::Save(save)) else {
            panic!("{name}")
        };
        let files = (0..ranks).map(|rank| format!("training_state/optimizer-{rank}-of-{ranks}.safetensors"));
        let files = files.chain(["adapter_model.safetensors".to_owned()]);
        files.filter_map(|file| fs::read(folder.join(file)).ok()).collect::<Vec<_>>()
    });
    assert!(saved[0].len() > 1 && saved[0] == saved[1], "the saves of both are alike");
    // An adapter that is forgotten takes its files with it.
    leave();
    assert_eq!(client.ask(&leaves, Task::Unload), Ok(Reply::Unloaded));
    no_files();
    let usage = client.0.state().usage;
    assert_eq!((usage.memory, usage.spilled), (client.0.state().models["stays"].bytes, usage.restored + 1));
    assert!(client.refused(&leaves, Task::Spill).contains("unknown"));
    json!(seen)
}

/// Four adapters with requests in turn, then all at once; never more in memory than fit.
fn four(client: &Client, memory: Option<u64>) -> Value {
    let check = || {
        let usage = client.0.state().usage;
        assert!(memory.is_none_or(|limit| usage.memory <= limit), "{usage:?}");
        usage
    };
    let models: Vec<ModelId> = (0..4).map(id).collect();
    for (index, model) in models.iter().enumerate() {
        client.create(model, adapter(index));
        check();
    }
    let mut seen = vec![Seen::default(); 4];
    for step in 0..STEPS {
        for part in 0..3 {
            for (index, model) in models.iter().enumerate() {
                let data = passes(step, index).swap_remove(part);
                seen[index].pass(passed(client.ask(model, pass(data, true))));
                check();
            }
        }
        for (index, model) in models.iter().enumerate() {
            seen[index].step(&client.step(model, step_of(index)), step);
        }
    }
    let in_turn = seen.clone();
    for _ in 0..3 {
        let ask = |(index, model)| {
            passes(9, index).into_iter().map(move |data| client.submit(model, pass(data, true)))
        };
        let answers: Vec<_> = models.iter().enumerate().flat_map(ask).collect();
        for (place, answer) in answers.iter().enumerate() {
            seen[place / 3].pass(passed(received(answer)));
        }
        check();
    }
    for (index, model) in models.iter().enumerate() {
        seen[index].step(&client.step(model, step_of(index)), STEPS);
    }
    let usage = check();
    assert_eq!((usage.spilled > 10, usage.restored > 10), (memory.is_some(), memory.is_some()), "{usage:?}");
    assert!(usage.spilled >= usage.restored);
    json!([in_turn, seen])
}

fn number(text: &str, after: &str) -> u64 {
    let rest = &text[text.find(after).unwrap() + after.len()..];
    rest.trim_start().chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// Files that are always full, in place of those that spill number `first` and the next ones of `rank` would make.
fn fill_disk(rank: usize, first: usize) {
    let full = output().join(SPILLED);
    fs::create_dir_all(&full).unwrap();
    for number in first..100 {
        let path = full.join(format!("{number}-{rank}"));
        if !path.exists() {
            std::os::unix::fs::symlink("/dev/full", path).unwrap();
        }
    }
}

fn free_disk() {
    for name in files() {
        let path = output().join(SPILLED).join(name);
        if path.is_symlink() {
            fs::remove_file(path).unwrap();
        }
    }
}

fn no_room(client: &Client, ranks: usize, memory: u64) -> Value {
    let of_rank = |rank| AdapterSpec { rank, ..adapter(0) };
    let said = client.refused(&id("large"), Task::Create(of_rank(1 << 40)));
    assert!(
        said.contains(&format!("the server has {memory} for adapters ({memory} of them free now)")),
        "{said}"
    );
    let largest = number(&said, "the largest rank that fits is") as usize;
    assert!(number(&said, "needs") > memory, "{said}");
    let said = client.refused(&id("large"), Task::Create(of_rank(largest + 1)));
    assert!(
        number(&said, "needs") > memory && number(&said, "rank that fits is") == largest as u64,
        "{said}"
    );
    client.create(&id("large"), of_rank(largest));
    let state = client.0.state();
    assert!(state.usage.memory > memory / 3 && state.usage.memory <= memory, "{:?}", state.usage);
    assert_eq!(client.ask(&id("large"), Task::Unload), Ok(Reply::Unloaded));

    // Two, which fit, and then one more with a disk that is full for one rank.
    let [a, b, c, calm] = ["a", "b", "c", "calm"].map(id);
    let half = of_rank(largest * 11 / 20);
    let train = |model: &ModelId| {
        let loss = passed(client.ask(model, pass(data_of(0, 1), true))).loss;
        (loss, client.step(model, step_of(0)).grad_norm)
    };
    for model in [&a, &b] {
        client.create(model, half.clone());
        client.ask(model, pass(data_of(1, 1), true)).unwrap();
    }
    let before = client.0.state();
    assert!(in_memory(client, &a) && in_memory(client, &b));
    fill_disk(ranks - 1, 1);
    let create = || client.ask(&c, Task::Create(half.clone()));
    for _ in 0..2 {
        let Err(Refusal::Server(said)) = create() else { panic!("not refused") };
        assert!(said.contains("cannot go to disk") && said.contains("No space left"), "{said}");
    }
    let Err(Refusal::Server(_)) = client.ask(&a, Task::Spill) else { panic!("not refused") };
    assert_eq!(client.0.state().models, before.models, "nothing is lost");
    free_disk();
    assert!(files().is_empty(), "{:?}", files());
    assert_eq!(create(), Ok(Reply::Created));
    assert!(!in_memory(client, &a) && in_memory(client, &b) && in_memory(client, &c));
    // Requests of an adapter that cannot come back are refused; those of the others are not.
    fill_disk(ranks - 1, 1);
    for task in [pass(data_of(0, 1), true), Task::OptimStep(step_of(0))] {
        let Err(Refusal::Server(said)) = client.ask(&a, task) else { panic!("not refused") };
        assert!(said.contains("cannot go to disk"), "{said}");
    }
    let both = [&a, &c].map(|model| client.submit(model, pass(data_of(0, 1), true)));
    assert!(received(&both[0]).is_err());
    assert!(received(&both[1]).is_ok());
    assert_eq!(client.ask(&c, Task::AbortGradients), Ok(Reply::Aborted { step: 0 }));
    free_disk();
    let trained = [&a, &b, &c].map(train);
    for model in [&a, &b, &c] {
        client.ask(model, Task::Unload).unwrap();
    }
    no_files();
    assert_eq!(client.0.state().usage.memory, 0);
    // a and b had a pass more than c.
    client.create(&calm, half.clone());
    assert_eq!(train(&calm), trained[2]);
    client.ask(&calm, Task::Unload).unwrap();
    client.create(&calm, half.clone());
    client.ask(&calm, pass(data_of(1, 1), true)).unwrap();
    let expected = train(&calm);
    assert_eq!((trained[0], trained[1]), (expected, expected));
    json!(largest)
}

/// The text of a request that the server could not carry out.
fn unable(answer: Answer) -> String {
    match answer {
        Err(Refusal::Server(text)) => text,
        other => panic!("not refused as the server's failure: {other:?}"),
    }
}

/// Three like adapters of which one cannot come back when a pass of all is formed; its file on one rank is damaged,
/// then gone.
fn damaged(client: &Client, ranks: usize) -> Value {
    let models @ [broken, away, calm] = &["broken", "away", "calm"].map(id);
    for model in models {
        client.create(model, adapter(0));
        client.ask(model, pass(data_of(1, 1), true)).unwrap();
        client.step(model, step_of(0));
    }
    let damage = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[1000] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let remove = |path: &Path| fs::rename(path, path.with_extension("moved")).unwrap();
    let put_back = |path: &Path| fs::rename(path.with_extension("moved"), path).unwrap();
    type Change<'a> = &'a dyn Fn(&Path);
    let ways: [[Change; 2]; 2] = [[&damage, &damage], [&remove, &put_back]];
    let told = ["is not as this server has written it", "No such file"];
    for (round, ([spoil, mend], words)) in ways.into_iter().zip(told).enumerate() {
        for model in [broken, away] {
            client.ask(model, Task::Spill).unwrap();
        }
        let newest = |rank: usize| {
            let own = files().into_iter().filter(|name| name.ends_with(&format!("-{rank}")));
            let mut own: Vec<u64> =
                own.map(|name| name.split_once('-').unwrap().0.parse().unwrap()).collect();
            own.sort_unstable();
            output().join(SPILLED).join(format!("{}-{rank}", own[own.len() - 2]))
        };
        let file = newest(if round == 0 { ranks - 1 } else { 0 });
        spoil(&file);
        let task = || pass(data_of(2, 1), true);
        let answers = models.each_ref().map(|model| client.submit(model, task()));
        let [refused, ours, expected] = answers.map(|answer| received(&answer));
        let said = unable(refused);
        assert!(said.contains("broken cannot come back from disk") && said.contains(words), "{said}");
        assert!(said.contains(file.file_name().unwrap().to_str().unwrap()), "{said}");
        let [mut ours, mut theirs] = [ours, expected].map(|answer| {
            let mut seen = Seen::default();
            seen.pass(passed(answer));
            seen
        });
        for task in [Task::OptimStep(OptimStep { divide: false, ..step_of(0) }), task()] {
            assert_eq!(unable(client.ask(broken, task)), said);
        }
        assert_eq!((in_memory(client, broken), in_memory(client, away)), (false, true));
        ours.step(&client.step(away, step_of(0)), round + 1);
        theirs.step(&client.step(calm, step_of(0)), round + 1);
        ours.is_near(&theirs, words);
        // An adapter whose file is whole again is as it was.
        mend(&file);
        client.ask(broken, task()).unwrap();
        let norm = client.step(broken, step_of(0)).grad_norm;
        assert!((norm - theirs.norms[0]).abs() < 1e-5 * norm, "{norm} {theirs:?}");
    }
    client.ask(broken, Task::Spill).unwrap();
    files().iter().for_each(|name| fs::remove_file(output().join(SPILLED).join(name)).unwrap());
    unable(client.ask(broken, pass(data_of(2, 1), true)));
    assert_eq!(client.ask(broken, Task::Unload), Ok(Reply::Unloaded));
    client.create(broken, adapter(0));
    client.ask(broken, pass(data_of(1, 1), true)).unwrap();
    json!(client.step(broken, step_of(0)).step)
}

/// A pass whose adapter makes room between two micro-batches, and then finds a full disk: its part is dropped.
fn half_a_pass(client: &Client, ranks: usize) -> Value {
    let [first, second, calm] = ["first", "second", "calm"].map(id);
    let step = OptimStep { divide: false, ..step_of(0) };
    client.create(&first, adapter(0));
    client.create(&second, adapter(0));
    client.ask(&first, pass(data_of(0, 1), true)).unwrap();
    let usage = client.0.state().usage;
    assert!(in_memory(client, &first) && !in_memory(client, &second), "room for one");
    assert_eq!((usage.spilled, usage.restored), (2, 1));
    // The second step comes between the micro-batches, of which each leaves memory for the other.
    fill_disk(ranks - 1, 5);
    let long = pass((0..60).flat_map(|row| data_of(1, row)).collect(), true);
    let before = client.0.state().micro_batches;
    let long = client.submit(&second, long);
    let steps = [0, 1].map(|_| client.submit(&first, Task::OptimStep(step)));
    let said = unable(received(&long));
    assert!(said.contains("a part of its passes was computed") && said.contains("No space left"), "{said}");
    assert!(said.contains("an adapter that is not in use") && !said.contains("first"), "{said}");
    for answer in steps {
        stepped(received(&answer));
    }
    let state = client.0.state();
    assert_eq!(state.micro_batches, before + 1);
    assert_eq!((state.models["first"].step, state.models["second"].accumulated), (2, 0));
    assert!(in_memory(client, &first) && !in_memory(client, &second));
    free_disk();
    client.create(&calm, adapter(0));
    let [ours, expected] = [&second, &calm].map(|model| {
        let loss = passed(client.ask(model, pass(data_of(0, 1), true))).loss;
        (loss, client.step(model, step).grad_norm)
    });
    assert_eq!(ours, expected);
    json!(ours.0)
}

/// Bytes that processes have for themselves.
fn anonymous(processes: &[u32]) -> Vec<u64> {
    let of = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        number(&status, "RssAnon:") * 1024
    };
    processes.iter().map(of).collect()
}

/// Memory of adapters that have been trained, beside what is said of them.
fn measured(client: &Client, processes: &[u32]) -> Value {
    let make = |name: &str| {
        let model = id(name);
        client.create(&model, AdapterSpec { rank: 512, ..adapter(0) });
        client.ask(&model, pass(data_of(0, 1), true)).unwrap();
        client.step(&model, step_of(0));
        // Its answer comes when every rank has left the step, and freed what the step has copied.
        client.ask(&model, pass(data_of(0, 1), false)).unwrap();
        anonymous(processes)
    };
    // The first settles what all share.
    let first = make("first");
    let more = ["second", "third", "fourth"].map(make);
    let said = client.0.state().models["first"].bytes as f64;
    let found: Vec<f64> =
        first.iter().zip(&more[2]).map(|(&a, &b)| (b as f64 - a as f64) / 3.0 / said).collect();
    for found in &found {
        assert!((0.97..1.04).contains(found), "{found} of {said} bytes");
    }
    // The memory of one that leaves is there for another.
    client.ask(&id("first"), Task::Spill).unwrap();
    let fifth = make("fifth");
    for (before, after) in more[2].iter().zip(&fifth) {
        assert!((*after as f64) < *before as f64 + 0.3 * said, "{before} {after}");
    }
    json!([said, found])
}

/// Losses, gradients, values and moments that are not finite leave an adapter as it was.
fn not_finite(client: &Client) -> Value {
    let [calm, tried] = ["calm", "tried"].map(id);
    let step = OptimStep { divide: false, max_grad_norm: 0.0, ..step_of(0) };
    let weighted = |weight: f32| {
        let mut data = data_of(3, 2);
        for datum in &mut data {
            datum.inputs.insert("weights".into(), vec![weight; datum.ids.len()]);
        }
        pass(data, true)
    };
    for model in [&calm, &tried] {
        client.create(model, adapter(0));
        client.ask(model, pass(data_of(0, 1), true)).unwrap();
        client.step(model, step);
    }
    let unfit = [
        // The gradient, its norm or the second moment, the values.
        (f32::MAX, step),
        (1e20, step),
        (1.0, OptimStep { lr: 1e300, ..step }),
        (1.0, OptimStep { lr: 1e30, weight_decay: 1e30, ..step }),
    ];
    for (weight, unfit) in unfit {
        client.ask(&tried, weighted(weight)).unwrap();
        let StepReply { step: count, non_finite, .. } = client.step(&tried, unfit);
        assert!(count == 1 && !non_finite.is_empty(), "{weight} {unfit:?}");
        let state = client.0.state();
        assert_eq!((state.models["tried"].step, state.models["tried"].accumulated), (1, 0));
        let probe = [&calm, &tried].map(|model| passed(client.ask(model, pass(data_of(9, 1), false))));
        assert_eq!(probe[0], probe[1], "{weight} {unfit:?}");
    }
    let ends = [&calm, &tried].map(|model| {
        let loss = passed(client.ask(model, pass(data_of(1, 1), true))).loss;
        let stepped = client.step(model, step);
        (loss, stepped, passed(client.ask(model, pass(data_of(9, 1), false))))
    });
    assert_eq!(ends[0], ends[1]);
    assert_eq!(ends[1].1.step, 2);
    json!(ends[0].0)
}

fn storage_limit(client: &Client, limit: u64) -> Value {
    let model = id("default");
    client.create(&model, AdapterSpec { rank: 64, ..adapter(0) });
    let save = |name: &str, overwrite| {
        let folder = output().join("weights/default").join(name);
        client.ask(
            &model,
            Task::Save(Save { folder, contents: Contents::Training, overwrite, metadata: json!({}) }),
        )
    };
    let Ok(Reply::Saved { folder, bytes }) = save("first", false) else { panic!("not saved") };
    assert!(bytes < limit && 2 * bytes > limit, "{bytes}");
    let used = client.0.state().usage.storage;
    let Err(Refusal::User(said)) = save("second", false) else { panic!("not refused") };
    let words = format!("has {used} of the {limit} that storage_limit allows; delete checkpoints");
    assert!(said.contains(&words), "{said}");
    assert!(number(&said, "needs about").abs_diff(bytes) < bytes / 5, "{said} {bytes}");
    assert!(matches!(save("first", false), Err(Refusal::User(_))));
    // An adapter stays in memory where its file would be too much; the server's own saves have no limit.
    assert!(client.ask(&model, Task::Spill).is_ok());
    let own = output().join(".server/adapters/default");
    let own = Save { folder: own, contents: Contents::Training, overwrite: false, metadata: json!({}) };
    let Ok(Reply::Saved { folder: own, .. }) = client.ask(&model, Task::Save(own)) else { panic!("refused") };
    assert!(client.ask(&model, Task::Spill).is_err() && in_memory(client, &model));
    for folder in [own, folder] {
        saves::delete(&folder).unwrap();
    }
    let Ok(Reply::Saved { bytes, .. }) = save("second", false) else { panic!("not saved") };
    assert_eq!(client.0.state().usage.storage, saves::bytes_below(&output()));
    json!(bytes)
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
    let options =
        Options { vocab_chunk_rows: 300, loss_chunk_tokens: 7, reduce: case.reduce, ..Options::default() };
    let processes = groups.world.all_gather_host(&std::process::id().to_le_bytes()).unwrap();
    let processes: Vec<u32> =
        processes.iter().map(|bytes| u32::from_le_bytes(bytes[..].try_into().unwrap())).collect();
    let mut model = Transformer::new(spec(case.moe), options, &groups).unwrap();
    load(&mut model, Data::Random);
    let engine = EngineOptions {
        adapter_memory: case.memory,
        storage_limit: case.storage,
        fits_recompute: true,
        ..crate::common::engine::options(output(), Duration::from_millis(20))
    };
    let seen = engine::serve(&world, groups, model, engine, None, move |handle| {
        let client = Client(handle);
        let usage = client.0.state().usage;
        let fits = usage.fits.unwrap();
        assert!(case.memory.is_some() || fits > 100, "{usage:?}");
        match case.script {
            Script::Leaving => leaving(&client, case.world),
            Script::Four => four(&client, case.memory),
            Script::Damaged => damaged(&client, case.world),
            Script::HalfAPass => half_a_pass(&client, case.world),
            Script::NoRoom => no_room(&client, case.world, case.memory.unwrap()),
            Script::Measured => measured(&client, &processes),
            Script::NotFinite => not_finite(&client),
            Script::StorageLimit => storage_limit(&client, case.storage.unwrap()),
        }
    });
    if let Some(seen) = seen.unwrap() {
        fs::write(output().join("0.json"), seen.to_string()).unwrap();
    }
}

fn run(case: &Case) -> Value {
    let folder = tempfile::tempdir().unwrap();
    // glibc then gives every block of this size back to the system when it is freed, so that RSS is what is in use.
    run_workers("engine_life::mpi_worker", case.world, case, folder.path(), |command| {
        command.env("MALLOC_MMAP_THRESHOLD_", "65536");
    });
    let file: &Path = &folder.path().join("0.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn mpi_an_adapter_that_leaves_memory_goes_on_as_one_that_stays() {
    run(&Case::new(1, Script::Leaving));
    run(&Case::new(2, Script::Leaving));
    run(&Case { reduce: ReduceGradients::MicroBatch, ..Case::new(2, Script::Leaving) });
    run(&Case { moe: true, ..Case::new(2, Script::Leaving) });
    run(&Case { replicas: 2, ..Case::new(2, Script::Leaving) });
}

#[test]
fn mpi_adapters_that_do_not_fit_together_end_as_those_that_do() {
    // Bytes in which one or two of the adapters fit.
    for (world, memory) in [(1, 720_000), (2, 500_000)] {
        let case = Case::new(world, Script::Four);
        let small = Case { memory: Some(memory), ..case.clone() };
        let [roomy, small]: [[Vec<Seen>; 2]; 2] =
            [run(&case), run(&small)].map(|seen| serde_json::from_value(seen).unwrap());
        assert!(roomy[0] == small[0], "requests in turn: the same bits, world {world}");
        for (index, (ours, expected)) in small[1].iter().zip(&roomy[1]).enumerate() {
            ours.is_near(expected, &format!("at once, world {world}, adapter {index}"));
        }
    }
}

#[test]
fn mpi_what_has_no_room_is_refused_and_loses_nothing() {
    let case = Case { memory: Some(8_000_000), ..Case::new(1, Script::NoRoom) };
    run(&case);
    run(&Case { world: 2, ..case });
}

#[test]
fn mpi_an_adapter_that_cannot_come_back_leaves_the_others_of_its_pass_alone() {
    run(&Case::new(1, Script::Damaged));
    run(&Case::new(2, Script::Damaged));
}

#[test]
fn mpi_a_pass_that_loses_its_adapter_half_way_leaves_no_gradient() {
    // Bytes in which one adapter fits.
    for (world, memory) in [(1, 450_000), (2, 320_000)] {
        run(&Case { memory: Some(memory), ..Case::new(world, Script::HalfAPass) });
    }
}

#[test]
fn mpi_memory_of_an_adapter_is_what_is_said() {
    let two = Case::new(2, Script::Measured);
    for case in [
        Case::new(1, Script::Measured),
        Case { reduce: ReduceGradients::MicroBatch, ..two.clone() },
        Case { replicas: 2, ..two.clone() },
        Case { moe: true, ..two.clone() },
        two,
    ] {
        println!("{}", run(&case));
    }
}

#[test]
fn mpi_numbers_that_are_not_finite_leave_an_adapter_as_it_was() {
    run(&Case::new(1, Script::NotFinite));
    run(&Case::new(2, Script::NotFinite));
}

#[test]
fn mpi_a_save_above_the_storage_limit_is_refused() {
    let case = Case { storage: Some(4_000_000), ..Case::new(1, Script::StorageLimit) };
    run(&case);
    run(&Case { world: 2, ..case });
}
