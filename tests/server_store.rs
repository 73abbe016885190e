//! Saves of the server: an adapter with its optimizer and accumulated gradient is the same in any world after a load.

use crate::common::{
    run_workers,
    tiny::{adapter, differences, tamper},
    topology::{Data, batch, load, spec},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use xorl_dist::{
    checkpoint::{
        contents,
        pieces::{GRADIENT, Pieces, read_pieces},
        reshard::Cut,
        saves,
        state::{Accumulated, AdapterState},
    },
    comm::World,
    config::{BaseFiles, ReduceGradients, TrainArgs},
    dtype::DType,
    error::Error,
    lora::{LoraShape, LoraShapes, targets::resolve},
    loss::CrossEntropy,
    mesh::{Mesh, MeshSizes},
    model::{
        base_plan::{BasePlan, Options, all_projections},
        transformer::Transformer,
    },
    optim::{Optimizer, Settings},
    server::{
        merged,
        request::{Contents, Load, Refusal, Save},
        store::{self, Base, Loaded},
    },
    session::Session,
    shard::{FlatRegion, ProcessGroups},
    weights::{self, RandomSource},
};

/// A world, and its part in a test.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    replicas: usize,
    experts_over: usize,
    moe: bool,
    reduce: ReduceGradients,
    part: Part,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Part {
    /// Trains, makes two passes more and saves.
    Saves,
    /// Loads what another world has saved.
    Loads,
}

const UPDATES: u64 = 3;
const ACCUMULATED: Accumulated = Accumulated { passes: 2, valid: 17 };
const ROWS: usize = 4;
const SHAPE: LoraShape = LoraShape::new(3, 6.0);
const TARGETS: [&str; 5] = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Case {
    fn dense(world: usize) -> Self {
        let reduce = ReduceGradients::Step;
        Self { world, replicas: 1, experts_over: 1, moe: false, reduce, part: Part::Saves }
    }

    fn loads(self) -> Self {
        Self { part: Part::Loads, ..self }
    }

    fn options(&self) -> Options {
        Options { vocab_chunk_rows: 300, loss_chunk_tokens: 7, reduce: self.reduce, ..Options::default() }
    }

    fn mesh(&self) -> Mesh {
        let sizes =
            MeshSizes { replicate: self.replicas as i64, shard: -1, sequence: 1, expert: self.experts_over };
        Mesh::new(self.world, sizes).unwrap()
    }
}

fn targets() -> Vec<String> {
    TARGETS.map(str::to_owned).to_vec()
}

/// A model with adapters that are trained on it.
struct Trained {
    model: Transformer,
    groups: ProcessGroups,
}

impl Trained {
    /// An adapter of `shapes` whose values are drawn from `seed`.
    fn session(&self, shapes: impl Into<LoraShapes>, seed: u64) -> Session {
        let sites = resolve(&all_projections(self.model.spec()), Some(&targets()), &[]).unwrap();
        let mut adapter = self.model.new_adapter(&sites, shapes);
        adapter.init(seed, 0.05).unwrap();
        let optimizer = Optimizer::new(&Settings::from(&TrainArgs::default()), adapter.pieces());
        Session { name: "policy".into(), adapter, optimizer, max_grad_norm: 0.0 }
    }

    /// Adds the gradient of rows of step `step`, dealt to the ranks.
    fn accumulate(&mut self, session: &mut Session, step: usize) {
        let (rank, size) = (self.groups.rank, self.groups.mesh.world());
        let own: Vec<usize> = (0..ROWS).filter(|row| row % size == rank).collect();
        let batch = batch(step, &own, Data::Random);
        let loss = CrossEntropy { scale: 0.02 };
        self.model.forward_backward(&batch, &mut [&mut session.adapter], &loss).unwrap();
    }

    /// The values after an update with what is accumulated, which is gone then.
    fn update(&self, session: &mut Session) -> Values {
        session.reduce().unwrap();
        let update = session.update(0.01, &*self.groups.world).unwrap();
        assert!(update.grad_norm > 1e-3, "{update:?}");
        session.adapter.regions_mut().zero_gradients();
        values(session)
    }
}

/// The bits of every parameter.
type Values = BTreeMap<String, Vec<u32>>;

fn values(session: &Session) -> Values {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    session.adapter.whole().unwrap().into_iter().map(|(p, values)| (p.name, bits(values))).collect()
}

/// The base of [`load`], of random weights, whose config.json is in `out`.
fn base(out: &Path, moe: bool) -> Base {
    let (spec, seed) = (spec(moe), 1);
    let source = RandomSource::new(spec.tensors(), spec.initializer_range, seed);
    let files = BaseFiles { weights: None, config: out.join("base"), tokenizer: out.join("base") };
    Base { name: "a/base".into(), digest: weights::digest(&source).unwrap(), quantization: None, files, seed }
}

fn save_of(folder: PathBuf, contents: Contents) -> Save {
    Save { folder, contents, overwrite: false, metadata: json!({"note": 1}) }
}

/// Saves the base with the adapter of `session` merged into it.
fn save_merged(trained: &Trained, session: &Session, base: &Base, folder: PathBuf) -> Result<(), Error> {
    let (groups, spec, dtype) = (&trained.groups, trained.model.spec(), Some(DType::Bf16));
    let save = save_of(folder, Contents::Merged { dtype });
    let saved = merged::save(&session.adapter, groups, base, spec, dtype, &save)?;
    assert_eq!(saved.is_some(), groups.rank == 0);
    if let Some((folder, bytes)) = saved {
        assert_eq!((&folder, bytes), (&save.folder, saves::bytes_below(&folder)));
        let told = merged::bytes(base, spec, dtype).unwrap();
        assert!(told >= bytes && told - bytes < 300_000, "{told} before, {bytes}");
    }
    Ok(())
}

/// One rank of a case. Does nothing unless a case started it.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let out = PathBuf::from(std::env::var("XORL_TEST_OUT").unwrap());
    let world = World::start().unwrap();
    let groups = ProcessGroups::new(&world, case.mesh());
    let mut model = Transformer::new(spec(case.moe), case.options(), &groups).unwrap();
    load(&mut model, Data::Random);
    let trained = Trained { model, groups };
    let seen = match case.part {
        Part::Saves => saves(trained, &out, &base(&out, case.moe)),
        Part::Loads => loads(trained, &out, &base(&out, case.moe)),
    };
    let name = format!("{:?}-{}-{}.json", case.part, case.world, world.rank());
    fs::write(out.join(name), seen.to_string()).unwrap();
}

fn saves(mut trained: Trained, out: &Path, base: &Base) -> Value {
    let mut session = trained.session(SHAPE, 3);
    for step in 0..UPDATES as usize {
        trained.accumulate(&mut session, step);
        trained.update(&mut session);
    }
    trained.accumulate(&mut session, 7);
    trained.accumulate(&mut session, 8);
    let before = values(&session);
    let groups = &trained.groups;
    let publish = |save: &Save| {
        let saved = store::save(&session, groups, base, ACCUMULATED, save).unwrap();
        assert_eq!(saved.is_some(), groups.rank == 0);
        if let Some((folder, bytes)) = saved {
            assert_eq!((&folder, bytes), (&save.folder, saves::bytes_below(&folder)));
        }
    };
    let full = save_of(out.join("weights/policy/full"), Contents::Training);
    publish(&full);
    publish(&save_of(out.join("sampler_weights/policy/plain"), Contents::Adapter));
    // The same name again, whole on every rank or refused on every rank.
    let refused = store::save(&session, groups, base, ACCUMULATED, &full).unwrap_err();
    let refused = store::refusal(&refused);
    assert!(matches!(&refused, Refusal::User(text) if text.contains("full is saved already")), "{refused:?}");
    publish(&Save { overwrite: true, ..full });
    save_merged(&trained, &session, base, out.join("full_weights/policy/merged")).unwrap();
    merges_that_fail(&trained, &session, base, out);
    assert_eq!(values(&session), before, "a save changes nothing");
    json!({"values": before, "after": trained.update(&mut session)})
}

/// A merge that fails on one rank fails on all with one text, and leaves nothing.
fn merges_that_fail(trained: &Trained, session: &Session, base: &Base, out: &Path) {
    let folder = out.join("full_weights/policy/failed");
    let last = trained.groups.rank + 1 == trained.groups.mesh.world();
    let other = if last { "other".to_owned() } else { base.digest.clone() };
    let nowhere = BaseFiles { config: out.join("nowhere"), ..base.files.clone() };
    for (base, words) in [
        (Base { digest: other, ..base.clone() }, "a/base are not those that this server has loaded"),
        (Base { files: nowhere, ..base.clone() }, "nowhere: No such file"),
    ] {
        let refused = store::refusal(&save_merged(trained, session, &base, folder.clone()).unwrap_err());
        assert!(matches!(&refused, Refusal::Server(text) if text.contains(words)), "{refused:?}");
        trained.groups.world.barrier().unwrap();
        let left = fs::read_dir(folder.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 1, "{words}");
    }
}

fn loads(mut trained: Trained, out: &Path, base: &Base) -> Value {
    let (full, plain) = (out.join("weights/policy/full"), out.join("sampler_weights/policy/plain"));
    let mut session = trained.session(SHAPE, 9);
    trained.accumulate(&mut session, 1);
    trained.update(&mut session);
    trained.accumulate(&mut session, 2);
    let groups = trained.groups.clone();
    let from = |folder: &Path, optimizer| Load { folder: folder.to_owned(), optimizer };

    // Refused on every rank with the same words, and nothing is changed.
    let before = values(&session);
    let mut other = trained.session(LoraShape::new(5, 6.0), 9);
    let refused = |session: &mut Session, base: Base, load: Load, words: &[&str]| {
        let refused = store::refusal(&store::load(session, &groups, &base, &load).unwrap_err());
        let Refusal::User(text) = &refused else { panic!("{refused:?}") };
        assert!(words.iter().all(|words| text.contains(words)), "{text}");
        assert_eq!(text.lines().count(), 1);
    };
    let shapes = ["rank 3 and alpha 6", "rank 5 and alpha 6", "qkv_proj"];
    refused(&mut other, base.clone(), from(&full, true), &shapes);
    refused(&mut other, base.clone(), from(&plain, false), &shapes);
    let other_base = Base { digest: "other".into(), ..base.clone() };
    refused(&mut session, other_base, from(&full, false), &["trained on another base"]);
    refused(&mut session, base.clone(), from(&out.join("nowhere"), false), &["nowhere", "no such directory"]);
    refused(&mut session, base.clone(), from(&out.join("hurt"), true), &["hurt", "SHA-256 differs"]);
    refused(&mut session, base.clone(), from(&out.join("sgd"), true), &["its optimizer is Sgd"]);
    assert_eq!(values(&session), before);

    let load = |session: &mut Session, folder: &Path, optimizer| {
        store::load(session, &groups, base, &from(folder, optimizer)).unwrap()
    };
    let fresh = Loaded { step: 0, accumulated: Accumulated::default() };
    let mut seen = Vec::new();
    for (folder, optimizer) in [(&plain, true), (&full, false)] {
        trained.accumulate(&mut session, 3);
        assert_eq!(load(&mut session, folder, optimizer), fresh);
        let gradients = session.adapter.reduced_gradients().unwrap();
        let moments =
            session.adapter.pieces().flat_map(|piece| session.optimizer.state()[piece.region].values());
        for tensor in gradients.iter().chain(moments) {
            assert!(tensor.count_nonzero(0).int64_value(&[]) == 0, "left over from before the load");
        }
        seen.push(values(&session));
    }
    trained.accumulate(&mut session, 3);
    assert_eq!(load(&mut session, &full, true), Loaded { step: UPDATES, accumulated: ACCUMULATED });
    seen.push(values(&session));
    let merged = out.join(format!("merged-{}", groups.mesh.world()));
    save_merged(&trained, &session, base, merged).unwrap();
    let again = out.join(format!("again-{}", groups.mesh.world()));
    store::save(&session, &groups, base, ACCUMULATED, &save_of(again, Contents::Training)).unwrap();
    json!({"values": seen, "after": trained.update(&mut session)})
}

/// All pieces of a save as one rank would own them, and the state.
fn stored(case: &Case, folder: &Path) -> (AdapterState, Pieces) {
    let (spec, one) = (spec(case.moe), Mesh::one_block(1));
    let sites = resolve(&all_projections(&spec), Some(&targets()), &[]).unwrap();
    let plan = BasePlan::new(&spec, &case.options(), &one, 0).unwrap();
    let plan = plan.adapter(&sites, &SHAPE.into(), &case.options(), &one);
    let regions: Vec<FlatRegion> = plan.flat().cloned().collect();
    let state = AdapterState::read(folder).unwrap().unwrap();
    let names = ["exp_avg", "exp_avg_sq", GRADIENT];
    let pieces = read_pieces(folder, &state, Cut { regions: &regions, shards: 1 }, 0, &names).unwrap();
    (state, pieces)
}

fn run(case: &Case, out: &Path) -> Value {
    run_workers("server_store::mpi_worker", case.world, case, out, |_| ());
    let seen = |rank: usize| {
        let name = format!("{:?}-{}-{rank}.json", case.part, case.world);
        serde_json::from_str::<Value>(&fs::read_to_string(out.join(name)).unwrap()).unwrap()
    };
    let first = seen(0);
    for rank in 1..case.world {
        assert_eq!(seen(rank), first, "rank {rank} of {case:?}");
    }
    first
}

/// Each of `to` loads bit for bit what `from` saves, and makes the update that `from` makes.
fn travels(from: Case, to: &[Case]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    fs::create_dir(out.join("base")).unwrap();
    fs::write(out.join("base/config.json"), r#"{"dtype": "float32"}"#).unwrap();
    fs::write(out.join("base/tokenizer.json"), "{}").unwrap();
    let saved = run(&from, out);
    let full = out.join("weights/policy/full");
    let description = saves::describe(&full).unwrap();
    assert_eq!((description.shape, description.base.as_deref()), (SHAPE, Some("a/base")));
    assert!(description.has_optimizer && description.metadata == json!({"note": 1}));
    let plain = out.join("sampler_weights/policy/plain");
    assert!(!saves::describe(&plain).unwrap().has_optimizer && !plain.join("training_state").exists());
    assert_eq!(adapter(&full), adapter(&plain));
    for save in [&full, &plain, &out.join("full_weights/policy/merged")] {
        contents::check(save).unwrap();
    }
    // A save whose files have changed, and one of another optimizer.
    for name in ["hurt", "sgd"] {
        crate::common::tiny::copy_tree(&full, &out.join(name));
    }
    tamper(&out.join("hurt"), "adapter_model.safetensors", &bent(&full), false);
    let state = fs::read_to_string(full.join("training_state/trainer_state.json")).unwrap();
    let state = state.replace("\"adamw\"", "\"sgd\"");
    tamper(&out.join("sgd"), "training_state/trainer_state.json", state.as_bytes(), true);

    for to in to {
        let loaded = run(&to.clone().loads(), out);
        for values in loaded["values"].as_array().unwrap() {
            assert!(*values == saved["values"], "{from:?} to {to:?}");
        }
        let ours = out.join(format!("merged-{}", to.world));
        let different = differences(&out.join("full_weights/policy/merged"), &ours);
        assert_eq!(different, Vec::<PathBuf>::new(), "the merged model, {from:?} to {to:?}");
        fs::remove_dir_all(ours).unwrap();
        assert!(loaded["after"] != saved["values"]);
        assert!(loaded["after"] == saved["after"], "the next update, {from:?} to {to:?}");
        let again = out.join(format!("again-{}", to.world));
        let ((old, pieces), (new, others)) = (stored(&from, &full), stored(&from, &again));
        assert!(pieces == others, "masters, moments and gradients, {from:?} to {to:?}");
        assert_eq!((old.optimizer.updates, old.accumulated), (UPDATES, Some(ACCUMULATED)));
        assert_eq!((&old.optimizer, old.accumulated), (&new.optimizer, new.accumulated));
        if from.mesh() == to.mesh() {
            assert_eq!(differences(&full, &again), Vec::<PathBuf>::new());
        }
    }
}

fn bent(save: &Path) -> Vec<u8> {
    let mut bytes = fs::read(save.join("adapter_model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    bytes
}

#[test]
fn mpi_a_save_of_one_rank_loads_in_any_world() {
    travels(
        Case::dense(1),
        &[Case::dense(1), Case { reduce: ReduceGradients::MicroBatch, ..Case::dense(2) }],
    );
}

#[test]
fn mpi_a_save_of_two_ranks_loads_in_any_world() {
    travels(Case::dense(2), &[Case::dense(2), Case { replicas: 2, ..Case::dense(4) }, Case::dense(1)]);
}

#[test]
fn mpi_a_save_of_replicas_loads_in_any_world() {
    let replicas = Case { replicas: 2, ..Case::dense(4) };
    let micro = Case { reduce: ReduceGradients::MicroBatch, ..replicas.clone() };
    travels(micro, &[replicas, Case::dense(1)]);
}

#[test]
fn mpi_a_save_of_experts_loads_over_other_ranks() {
    let experts = Case { moe: true, experts_over: 2, ..Case::dense(2) };
    let one = Case { moe: true, ..Case::dense(1) };
    travels(experts.clone(), &[one.clone(), Case { experts_over: 1, ..experts.clone() }]);
    travels(one, &[experts]);
}
