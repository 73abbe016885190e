//! The engine of the server: adapters that are trained together, interleaved and alone end alike, as the local trainer
//! does; a refusal changes nothing.

use crate::common::{
    engine::{
        B_STD, Client, MAX_TOKENS, Seen, adapter, data_of, id, model_folder, pass, passed, passes, received,
        step_of, stepped,
    },
    relative, run_workers, stand_in,
    topology::{Data, batch, load, names, quantised_spec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, sync::mpsc, time::Duration};
use tch::Kind;
use xorl_dist::{
    comm::World,
    config::{ComputeArgs, ModelArgs, QuantArgs, QuantFormat, ReduceGradients, TrainArgs},
    device::DeviceChoice,
    lora::{LoraShape, targets::resolve},
    loss::CrossEntropy,
    mesh::{Mesh, MeshSizes},
    model::{
        base_plan::{Options, all_projections},
        transformer::Transformer,
    },
    optim::{Optimizer, Schedule, Settings},
    server::{
        Server, ServerPlan, engine,
        request::{
            AdapterSpec, Answer, Contents, Datum, Engine, Load, ModelId, OptimStep, Reply, Request, Save,
            StepReply, Task,
        },
    },
    session::Session,
    shard::ProcessGroups,
    train::Trainer,
};

const STEPS: usize = 3;
/// Time for which the engine waits for more passes: a test that needs them together gives them all within it.
const GATHER: Duration = Duration::from_millis(100);

/// A world and what its ranks do.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    replicas: usize,
    experts_over: usize,
    moe: bool,
    reduce: ReduceGradients,
    /// Tensors move over NCCL, for which a library of ours stands in.
    stand_in: bool,
    /// Format of the base, if it is quantised.
    quant: Option<QuantFormat>,
    script: Script,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Script {
    /// So many adapters, together, then interleaved, then each alone.
    Adapters(usize),
    LocalTrainer,
    /// Saved with what it has accumulated, and loaded.
    Saves,
    Refusals,
    ManyTargets,
    Idle,
}

impl Case {
    fn new(world: usize, script: Script) -> Self {
        Self {
            world,
            replicas: 1,
            experts_over: 1,
            moe: false,
            reduce: ReduceGradients::Step,
            stand_in: false,
            quant: None,
            script,
        }
    }

    fn experts(world: usize, experts_over: usize, script: Script) -> Self {
        Self { experts_over, moe: true, ..Self::new(world, script) }
    }
}

fn probe(client: &Client, models: &[ModelId], seen: &mut [Seen]) {
    let ask = |model| client.submit(model, pass(data_of(9, 1), false));
    let answers: Vec<_> = models.iter().map(ask).collect();
    answers.iter().zip(seen).for_each(|(answer, seen)| seen.pass(passed(received(answer))));
}

/// Each step of all adapters at once.
fn together(client: &Client, models: &[ModelId], ranks: usize) -> Vec<Seen> {
    let mut seen = vec![Seen::default(); models.len()];
    for step in 0..STEPS {
        let before = client.0.state().micro_batches;
        let ask = |(index, model): (usize, &ModelId)| {
            let passes = passes(step, index).into_iter();
            passes.map(|data| client.submit(model, pass(data, true))).collect::<Vec<_>>()
        };
        let answers: Vec<_> = models.iter().enumerate().map(ask).collect();
        for (answers, seen) in answers.iter().zip(&mut seen) {
            answers.iter().for_each(|answer| seen.pass(passed(received(answer))));
        }
        let made = client.0.state().micro_batches - before;
        let tokens: usize =
            (0..models.len()).flat_map(|i| passes(step, i)).flatten().map(|d| d.ids.len()).sum();
        // One more where a request came late.
        assert!(made as usize <= tokens.div_ceil(MAX_TOKENS * ranks) + 1, "{made} micro-batches");
        let ask = |(index, model)| client.submit(model, Task::OptimStep(step_of(index)));
        let answers: Vec<_> = models.iter().enumerate().map(ask).collect();
        for (answer, seen) in answers.iter().zip(&mut seen) {
            seen.step(&stepped(received(answer)), step);
        }
    }
    probe(client, models, &mut seen);
    seen
}

/// Requests of all adapters in turn, each after the answer of the one before.
fn interleaved(client: &Client, models: &[ModelId]) -> Vec<Seen> {
    let mut seen = vec![Seen::default(); models.len()];
    for step in 0..STEPS {
        for part in 0..3 {
            for (index, model) in models.iter().enumerate() {
                let data = passes(step, index).swap_remove(part);
                seen[index].pass(passed(client.ask(model, pass(data, true))));
            }
        }
        for (index, model) in models.iter().enumerate() {
            seen[index].step(&client.step(model, step_of(index)), step);
        }
    }
    probe(client, models, &mut seen);
    seen
}

/// Adapters that are trained together and interleaved, against each that is trained alone and unloaded.
fn adapters(client: &Client, count: usize, ranks: usize) -> Value {
    let made = |prefix: &str| -> Vec<ModelId> {
        let make = |index| {
            let model = id(format!("{prefix}{index}"));
            client.create(&model, adapter(index));
            model
        };
        (0..count).map(make).collect()
    };
    let of_together = together(client, &made("together-"), ranks);
    let of_interleaved = interleaved(client, &made("interleaved-"));
    for (index, (ours, others)) in of_together.iter().zip(&of_interleaved).enumerate() {
        let alone = id("alone");
        client.create(&alone, adapter(index));
        let mut seen = Seen::default();
        for step in 0..STEPS {
            for data in passes(step, index) {
                seen.pass(passed(client.ask(&alone, pass(data, true))));
            }
            seen.step(&client.step(&alone, step_of(index)), step);
        }
        probe(client, std::slice::from_ref(&alone), std::slice::from_mut(&mut seen));
        assert_eq!(client.ask(&alone, Task::Unload), Ok(Reply::Unloaded));
        ours.is_near(&seen, &format!("adapter {index}, together and alone"));
        others.is_near(&seen, &format!("adapter {index}, interleaved and alone"));
        assert!(seen.norms.iter().all(|&norm| norm > 1e-3), "{:?}", seen.norms);
        let (first, last) = (&of_together[0].log_probs, &ours.log_probs);
        let n = data_of(9, 1).iter().map(|datum| datum.ids.len()).sum::<usize>();
        let ends = [first, last].map(|all| &all[all.len() - n..]);
        assert!(index == 0 || relative(ends[0], ends[1]) > 1e-3, "adapters are told apart");
    }
    json!(of_together)
}

/// The same data on the local trainer.
fn of_trainer(groups: &ProcessGroups, case: &Case, options: Options) -> Seen {
    let mut model = Transformer::new(quantised_spec(case.moe, case.quant), options, groups).unwrap();
    load(&mut model, Data::Random);
    let spec = adapter(0);
    let sites = resolve(&all_projections(model.spec()), spec.targets.as_deref(), &[]).unwrap();
    let mut adapter = model.new_adapter(&sites, LoraShape::new(spec.rank, spec.alpha));
    adapter.init(spec.seed, B_STD).unwrap();
    let step = step_of(0);
    let args = TrainArgs { lr: step.lr, weight_decay: step.weight_decay, ..TrainArgs::default() };
    assert_eq!((args.adam_beta1, args.adam_beta2, args.adam_epsilon), (0.9, 0.95, step.eps));
    let optimizer = Optimizer::new(&Settings::from(&args), adapter.pieces());
    let session = Session { name: "test".into(), adapter, optimizer, max_grad_norm: step.max_grad_norm };
    let schedule = Schedule::new(&args, STEPS);
    let mut trainer = Trainer { model, session, schedule, world: groups.world.clone(), noise: None };
    let mut seen = Seen::default();
    for step in 0..STEPS {
        let own: Vec<usize> = (0..6).filter(|row| row % case.world == groups.rank).collect();
        let report = trainer.step(&[batch(step, &own, Data::Random).into()], step).unwrap();
        seen.losses.push(report.loss.unwrap());
        seen.valid.push(report.valid_tokens);
        seen.norms.push(report.grad_norm);
    }
    let rows: &[usize] = if groups.rank == 0 { &[1] } else { &[] };
    let probe = batch(9, rows, Data::Random);
    let Trainer { model, session, .. } = &mut trainer;
    let found = model.evaluate(&probe, &mut [&mut session.adapter], &CrossEntropy { scale: 1.0 }).unwrap();
    let log_probs = found.log_probs.to_kind(Kind::Float).reshape([-1]);
    seen.log_probs = Vec::try_from(log_probs).unwrap();
    seen
}

/// The same training by the engine, two passes a step.
fn as_trainer(client: &Client, expected: &Seen) -> Value {
    let model = id("default");
    client.create(&model, adapter(0));
    let mut seen = Seen::default();
    for step in 0..STEPS {
        let rows = |rows: std::ops::Range<usize>| rows.flat_map(|row| data_of(step, row)).collect();
        let replies = [rows(0..4), rows(4..6)].map(|data| passed(client.ask(&model, pass(data, true))));
        let valid = replies.iter().map(|reply| reply.valid).sum::<u64>();
        seen.losses.push(replies.iter().map(|reply| reply.loss).sum::<f64>() / valid as f64);
        seen.valid.push(valid);
        seen.step(&client.step(&model, step_of(0)), step);
    }
    assert!(step_of(0).divide && seen.norms[0] > step_of(0).max_grad_norm, "clipping was active");
    seen.log_probs = passed(client.ask(&model, pass(data_of(9, 1), false))).log_probs.concat();
    seen.is_near(expected, "the engine and the trainer");
    json!(seen)
}

/// Refusals, an abort and gradients that are not finite leave an adapter as one that never had them.
fn refusals(client: &Client) -> Value {
    let calm = id("calm");
    let good = || pass(data_of(0, 1), true);
    let step = OptimStep { divide: true, ..step_of(0) };
    client.create(&calm, adapter(0));
    let mut expected = Seen::default();
    for number in 0..2 {
        expected.pass(passed(client.ask(&calm, good())));
        expected.step(&client.step(&calm, step), number);
    }
    expected.pass(passed(client.ask(&calm, pass(data_of(9, 1), false))));

    let tried = id("tried");
    assert!(client.refused(&tried, good()).contains("create_model"));
    client.create(&tried, adapter(0));
    client.create(&tried, adapter(0));
    let refuse = || {
        let other = AdapterSpec { rank: 5, ..adapter(0) };
        assert!(client.refused(&tried, Task::Create(other)).contains("rank 4, alpha 8"));
        for (changed, text) in [
            (AdapterSpec { targets: Some(names(&["lm_head"])), ..adapter(0) }, "lm_head matches nothing"),
            (AdapterSpec { train_attn: false, train_mlp: false, ..adapter(0) }, "leave none"),
            (AdapterSpec { rank: 65, ..adapter(0) }, "at most 64"),
        ] {
            let said = client.refused(&id("new"), Task::Create(changed));
            assert!(said.contains(text), "{said}");
        }
        let change = |change: &dyn Fn(&mut Datum)| {
            let mut data = data_of(0, 1);
            change(&mut data[1]);
            pass(data, true)
        };
        for (bad, text) in [
            (change(&|datum| datum.ids[0] = 1003), "datum 1: token 0 is 1003"),
            (change(&|datum| datum.targets[0] = 5000), "target 0 is 5000"),
            (change(&|datum| datum.targets.truncate(1)), "targets"),
            (
                change(&|datum| *datum = Datum { ids: vec![1; 201], targets: vec![1; 201], ..datum.clone() }),
                "200",
            ),
            (change(&|datum| drop(datum.inputs.insert("weights".into(), vec![1.0; 99]))), "got 99"),
            (pass(vec![], true), "no datum"),
        ] {
            let said = client.refused(&tried, bad);
            assert!(said.contains(text), "{said}");
        }
        assert!(client.refused(&tried, Task::OptimStep(OptimStep { eps: -1.0, ..step })).contains("eps"));
        let load = Load { folder: "nowhere".into(), optimizer: true };
        assert!(client.ask(&tried, Task::Load(load)).is_err());
    };
    refuse();
    assert!(client.refused(&tried, Task::OptimStep(step)).contains("there are none"));
    // Gradients that are dropped: by an abort, and because they are not finite.
    client.ask(&tried, pass(data_of(0, 5), true)).unwrap();
    assert_eq!(client.0.state().models["tried"].accumulated, 1);
    assert_eq!(client.ask(&tried, Task::AbortGradients), Ok(Reply::Aborted { step: 0 }));
    assert_eq!(client.ask(&tried, Task::AbortGradients), Ok(Reply::Aborted { step: 0 }));
    let mut poison = data_of(0, 1);
    let tokens = poison[0].ids.len();
    poison[0].inputs.insert("weights".into(), vec![f32::MAX; tokens]);
    client.ask(&tried, pass(poison, true)).unwrap();
    let StepReply { step: count, grad_norm, non_finite } =
        client.step(&tried, OptimStep { divide: false, ..step });
    assert!(count == 0 && !grad_norm.is_finite() && non_finite.len() > 10, "{non_finite:?}");

    let mut seen = Seen::default();
    for number in 0..2 {
        seen.pass(passed(client.ask(&tried, good())));
        refuse();
        let state = client.0.state();
        assert_eq!((state.models["tried"].step, state.models["tried"].accumulated), (number as u64, 1));
        seen.step(&client.step(&tried, step), number);
    }
    seen.pass(passed(client.ask(&tried, pass(data_of(9, 1), false))));
    seen.is_near(&expected, "after refusals and without");

    // Answers of one adapter come in the order of its requests; here each waits behind one that takes longer.
    let (send, order) = mpsc::channel();
    let long = || pass((0..12).flat_map(|row| data_of(1, row)).collect(), true);
    let short = || pass(data_of(9, 1), false);
    let tasks = [long(), short(), short(), Task::OptimStep(step), good(), Task::AbortGradients, short()];
    for (number, task) in tasks.into_iter().enumerate() {
        let send = send.clone();
        let give = Box::new(move |answer: Answer| send.send((number, answer.is_ok())).unwrap());
        client.0.submit(Request { model: tried.clone(), task }, give);
    }
    let order: Vec<_> = (0..7).map(|_| order.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
    assert_eq!(order, (0..7).map(|number| (number, true)).collect::<Vec<_>>());

    assert_eq!(client.ask(&tried, Task::Unload), Ok(Reply::Unloaded));
    assert!(client.refused(&tried, good()).contains("unknown"));
    let state = client.0.state();
    assert_eq!((state.healthy, state.waiting, state.models.len()), (true, 0, 1));
    json!(seen)
}

/// A datum with two weighted targets a token, beside data with one, against a pass for each target.
fn many_targets(client: &Client) -> Value {
    let model = id("default");
    client.create(&model, adapter(1));
    let datum = data_of(0, 1).swap_remove(0);
    let tokens = datum.ids.len();
    let columns =
        [datum.targets.clone(), (0..tokens as i64).map(|i| if i == 2 { -1 } else { 7 * i }).collect()];
    let weights = [0.5f32, -2.0];
    let of_column = |column: usize| {
        let mut own = Datum { targets: columns[column].clone(), ..datum.clone() };
        own.inputs.insert("weights".into(), vec![weights[column]; tokens]);
        own
    };
    let alone = [0, 1].map(|column| passed(client.ask(&model, pass(vec![of_column(column)], false))));
    let both = Datum {
        targets: (0..2 * tokens).map(|i| columns[i % 2][i / 2]).collect(),
        k: 2,
        inputs: BTreeMap::from([("weights".into(), (0..2 * tokens).map(|i| weights[i % 2]).collect())]),
        ..datum.clone()
    };
    let reply = passed(client.ask(&model, pass(vec![of_column(0), both, of_column(1)], true)));
    let log_probs = [&alone[0].log_probs[0], &alone[1].log_probs[0]];
    let expected: Vec<f32> = (0..2 * tokens).map(|i| log_probs[i % 2][i / 2]).collect();
    assert!(relative(&reply.log_probs[1], &expected) < 1e-5);
    assert_eq!([0, 2].map(|datum| reply.log_probs[datum].len()), [tokens; 2]);
    let expected = 2.0 * (alone[0].loss + alone[1].loss);
    assert!((reply.loss - expected).abs() < 1e-5 * expected.abs(), "{} {expected}", reply.loss);
    assert_eq!(reply.valid, 2 * (alone[0].valid + alone[1].valid));
    json!(reply.loss)
}

/// An adapter that is loaded goes on as it did when it was saved, with the gradient that it had accumulated.
fn saves(client: &Client) -> Value {
    let (model, step) = (id("default"), step_of(0));
    client.create(&model, adapter(0));
    let train = |data: Vec<Datum>| passed(client.ask(&model, pass(data, true))).loss;
    let on = || {
        let norm = client.step(&model, step).grad_norm;
        (norm, train(data_of(3, 0)), client.step(&model, step).step)
    };
    train(data_of(0, 0));
    client.step(&model, step);
    train(data_of(1, 0));
    let output = std::env::var("XORL_TEST_OUT").unwrap();
    let folder = Path::new(&output).join("weights/default/first");
    let save =
        Save { folder, contents: Contents::Training, overwrite: false, metadata: json!({"note": "first"}) };
    let Ok(Reply::Saved { folder, bytes }) = client.ask(&model, Task::Save(save.clone())) else {
        panic!("not saved");
    };
    assert!(folder.join("adapter_model.safetensors").is_file() && bytes > 10_000, "{bytes} in {folder:?}");
    assert!(client.refused(&model, Task::Save(save)).contains("first"));
    let went_on = on();
    assert_eq!(went_on.2, 3);
    let load = |optimizer| Task::Load(Load { folder: folder.clone(), optimizer });
    assert_eq!(client.ask(&model, load(true)), Ok(Reply::Loaded { step: 1 }));
    assert_eq!(on(), went_on);
    assert_eq!(client.ask(&model, load(false)), Ok(Reply::Loaded { step: 0 }));
    let other = id("other");
    client.create(&other, adapter(1));
    assert!(client.refused(&other, load(true)).contains("rank"));
    json!(went_on.0)
}

/// CPU seconds of a process so far.
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // After the name: fields 14 and 15, in ticks of 10 ms.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = [11, 12].map(|field: usize| fields[field].parse::<f64>().unwrap());
    0.01 * ticks.iter().sum::<f64>()
}

/// Ranks that have computed sleep until the next request.
fn idle(client: &Client, processes: &[u32]) -> Value {
    let model = id("default");
    client.create(&model, adapter(0));
    client.ask(&model, pass(data_of(0, 1), true)).unwrap();
    let measure = || processes.iter().map(|&process| cpu_seconds(process)).collect::<Vec<_>>();
    std::thread::sleep(Duration::from_millis(200));
    let (before, seconds) = (measure(), 4.0);
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let shares: Vec<f64> =
        measure().iter().zip(&before).map(|(after, before)| (after - before) / seconds).collect();
    assert!(shares.iter().all(|&share| share < 0.02), "{shares:?}");
    client.step(&model, step_of(1));
    json!(shares)
}

/// One rank of a case.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let mut world = World::start().unwrap();
    if case.stand_in {
        world.use_device(DeviceChoice::StandIn).unwrap();
    }
    let sizes =
        MeshSizes { replicate: case.replicas as i64, shard: -1, sequence: 1, expert: case.experts_over };
    let groups = ProcessGroups::new(&world, Mesh::new(case.world, sizes).unwrap());
    let options =
        Options { vocab_chunk_rows: 300, loss_chunk_tokens: 7, reduce: case.reduce, ..Options::default() };
    let expected = match case.script {
        Script::LocalTrainer => of_trainer(&groups, &case, options),
        _ => Seen::default(),
    };
    let processes = groups.world.all_gather_host(&std::process::id().to_le_bytes()).unwrap();
    let processes: Vec<u32> =
        processes.iter().map(|bytes| u32::from_le_bytes(bytes[..].try_into().unwrap())).collect();
    let mut model = Transformer::new(quantised_spec(case.moe, case.quant), options, &groups).unwrap();
    load(&mut model, Data::Random);
    let output_dir = std::env::var("XORL_TEST_OUT").unwrap().into();
    let mut engine = crate::common::engine::options(output_dir, GATHER);
    engine.defaults.max_rank = Some(64);
    let seen = engine::serve(&world, groups, model, engine, None, move |handle| {
        let client = Client(handle);
        match case.script {
            Script::Adapters(count) => adapters(&client, count, case.world),
            Script::LocalTrainer => as_trainer(&client, &expected),
            Script::Refusals => refusals(&client),
            Script::Saves => saves(&client),
            Script::ManyTargets => many_targets(&client),
            Script::Idle => idle(&client, &processes),
        }
    });
    if let Some(seen) = seen.unwrap() {
        let out = std::env::var("XORL_TEST_OUT").unwrap();
        std::fs::write(Path::new(&out).join("0.json"), seen.to_string()).unwrap();
    }
}

fn run(case: &Case) -> Value {
    let folder = tempfile::tempdir().unwrap();
    run_workers("engine::mpi_worker", case.world, case, folder.path(), |command| {
        if case.stand_in {
            stand_in(command, folder.path());
        }
    });
    serde_json::from_str(&std::fs::read_to_string(folder.path().join("0.json")).unwrap()).unwrap()
}

/// Runs `case`, and holds what its adapters got against one rank.
fn equals_one_rank(case: &Case) {
    let one = Case { moe: case.moe, ..Case::new(1, case.script) };
    let [ours, theirs]: [Vec<Seen>; 2] =
        [run(case), run(&one)].map(|seen| serde_json::from_value(seen).unwrap());
    for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        ours.is_near(theirs, &format!("{case:?} and one rank, adapter {index}"));
    }
    assert_eq!(ours.len(), theirs.len());
}

#[test]
fn mpi_two_adapters_together_and_interleaved_equal_each_alone() {
    equals_one_rank(&Case::new(2, Script::Adapters(2)));
}

#[test]
fn mpi_eight_adapters_in_one_pass_equal_each_alone() {
    let case = Case::new(2, Script::Adapters(8));
    equals_one_rank(&Case { reduce: ReduceGradients::MicroBatch, ..case });
}

#[test]
fn mpi_adapters_of_replicas_equal_each_alone() {
    run(&Case { replicas: 2, ..Case::new(2, Script::Adapters(3)) });
}

#[test]
fn mpi_adapters_of_experts_over_ranks_equal_each_alone() {
    equals_one_rank(&Case::experts(2, 2, Script::Adapters(4)));
}

#[test]
fn mpi_adapters_over_nccl_equal_each_alone() {
    run(&Case { stand_in: true, ..Case::new(2, Script::Adapters(2)) });
}

#[test]
fn mpi_an_adapter_of_the_engine_equals_that_of_the_local_trainer() {
    run(&Case::new(1, Script::LocalTrainer));
    run(&Case::new(2, Script::LocalTrainer));
    run(&Case::experts(2, 2, Script::LocalTrainer));
    run(&Case { quant: Some(QuantFormat::Nvfp4), ..Case::experts(2, 2, Script::LocalTrainer) });
}

#[test]
fn mpi_refusals_and_dropped_gradients_leave_an_adapter_as_it_was() {
    run(&Case::new(1, Script::Refusals));
    run(&Case { reduce: ReduceGradients::MicroBatch, ..Case::new(2, Script::Refusals) });
}

#[test]
fn a_server_reads_a_model_and_trains_its_default_targets() {
    let folder = model_folder();
    let plan = ServerPlan {
        model: ModelArgs { model_path: Some(folder.path().into()), ..ModelArgs::default() },
        seed: 1,
        output_dir: folder.path().into(),
        compute: ComputeArgs { enable_mixed_precision: false, ..ComputeArgs::default() },
        merge: true,
        quant: QuantArgs::default(),
        exclude: vec![],
        targets: None,
        hybrid: false,
        b_init_std: 0.0,
        max_rank: None,
        rank: 16,
        optimizer: Settings::from(&TrainArgs::default()),
        adapter_memory: None,
        sampling_memory: None,
        deterministic_sampling: Some(false),
        storage_limit: None,
        max_tokens_per_pass: 100,
        max_waiting: 10,
        gather: Duration::ZERO,
        comm_timeout: Duration::from_secs(60),
        debug: false,
    };
    let refused = |plan: ServerPlan| Server::prepare(plan, 2).err().unwrap().to_string();
    let compute = ComputeArgs { expert_parallel_size: 2, ..plan.compute.clone() };
    assert!(refused(ServerPlan { compute, ..plan.clone() }).contains("no experts to divide"));
    let targets = Some(names(&["w1"]));
    assert!(refused(ServerPlan { targets, ..plan.clone() }).contains("w1 matches nothing"));
    let world = World::start().unwrap();
    let losses = Server::prepare(plan, 1).unwrap().execute(&world, |handle| {
        let (client, model) = (Client(handle), id("default"));
        client.create(&model, AdapterSpec { targets: None, train_attn: true, train_mlp: true, ..adapter(0) });
        let data = || {
            vec![Datum { ids: (5..25).collect(), targets: (6..26).collect(), k: 1, inputs: BTreeMap::new() }]
        };
        let mut losses = Vec::new();
        for _ in 0..8 {
            losses.push(passed(client.ask(&model, pass(data(), true))).loss);
            client.step(&model, OptimStep { lr: 0.02, ..step_of(0) });
        }
        losses
    });
    let losses = losses.unwrap().unwrap();
    // B starts at zero: the first loss is the base model's.
    assert!(losses[0] > 20.0 * 503f64.ln() * 0.8 && losses[7] < 0.7 * losses[0], "{losses:?}");
}

#[test]
fn mpi_a_loaded_adapter_goes_on_as_when_it_was_saved() {
    run(&Case::new(1, Script::Saves));
    run(&Case::experts(2, 2, Script::Saves));
}

#[test]
fn mpi_data_with_many_targets_a_token_equal_data_with_one() {
    run(&Case::new(2, Script::ManyTargets));
}

#[test]
fn mpi_idle_ranks_sleep() {
    run(&Case::new(2, Script::Idle));
}
