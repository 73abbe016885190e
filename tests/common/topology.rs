//! Tiny models trained in fp32 over ranks, held against one rank: what topology tests share.
//!
//! Each case starts this test program under mpirun; its ranks run [`mpi_worker`], which trains and leaves what it saw
//! in a file.

use super::{relative, run_workers, stand_in};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, rc::Rc};
use tch::{Device, Tensor};
use xorl_dist::{
    comm::{CommError, Communicator, Operation, Parts, Pending, Received, Reduce, World, of_tightest},
    config::{self, CheckpointingMethod, QuantFormat, ReduceGradients, TrainArgs},
    device::DeviceChoice,
    dtype::DType,
    lora::{Adapter, LoraShape, MoeNames, Site, targets::resolve},
    loss::CrossEntropy,
    mesh::{Mesh, MeshSizes},
    model::{
        DenseSpec, Ffn, GqaSpec, LayerSpec, Mixer, ModelSpec, MoeSpec, NormSpec, QkNorm, RopeScaling,
        RopeSpec,
        base_plan::{BasePlan, Options, all_projections},
        quantized::{Quantization, StepNoise},
        recompute::Recompute,
        transformer::{Batch, Transformer},
    },
    optim::{Optimizer, Schedule, Settings},
    plan::{RoutedRows, Traffic},
    rng::Stream,
    session::Session,
    shard::ProcessGroups,
    train::{MicroBatch, Trainer, metrics::received_since},
    weights::{RandomSource, SourceError, TensorMeta, WeightSource},
};

pub const STEPS: usize = 20;
pub const ROWS: usize = 6;
/// Gradients are clipped to it.
const LIMIT: f64 = 0.1;
pub const VOCAB: usize = 1003;
/// Divided by every expert-parallel size of the tests.
const EXPERTS: usize = 12;

/// A named topology and how it computes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    pub world: usize,
    pub replicas: usize,
    /// Ranks over which the experts are divided.
    pub experts_over: usize,
    pub slots: usize,
    pub micro_batch_rows: usize,
    pub vocab_chunk_rows: usize,
    pub checkpointing: CheckpointingMethod,
    /// So many layers have it, the others the next lighter method.
    pub recomputed_layers: usize,
    pub merge: bool,
    pub reduce: ReduceGradients,
    pub targets: Vec<String>,
    pub moe: bool,
    pub hybrid: bool,
    pub data: Data,
    pub optimizer: config::Optimizer,
    pub fault: Option<Fault>,
    /// Whether tensors move over NCCL, for which a library of ours stands in.
    pub stand_in: bool,
    /// So many ranks are taken for a host of their own.
    pub ranks_per_host: Option<usize>,
    /// Format of the base, if it is quantised.
    pub quant: Option<QuantFormat>,
    /// Factor of quantisation noise.
    pub noise: Option<f32>,
}

/// What rows are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// Random tokens, of which two thirds have a loss.
    Random,
    /// The same token again and again: every token of a layer goes to the same experts, and most experts get none.
    OneToken,
    /// As `Random`, but rows of odd number have no loss.
    OddRowsSilent,
    /// As `Random`, of a model in which the experts of the second half have a tenth of the gradient of the others.
    UnevenExperts,
}

/// What a rank does wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Gradients of what all ranks have are not summed over them.
    SkipsDenseSum,
    /// Gradients of experts count twice.
    CountsExpertsTwice,
    /// Every rank clips by the norm of its own pieces.
    ClipsByOwnNorm,
    /// The last row that comes to a rank's experts is lost.
    LosesOneRow,
}

pub fn split() -> Vec<String> {
    names(&["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
}

pub fn fused() -> Vec<String> {
    names(&["qkv_proj", "o_proj", "gate_up_proj", "layers.[0-1].mlp.*down_proj"])
}

pub fn names(of: &[&str]) -> Vec<String> {
    of.iter().map(|name| name.to_string()).collect()
}

impl Case {
    /// One rank that computes everything at once.
    pub fn one() -> Self {
        Self {
            world: 1,
            replicas: 1,
            experts_over: 1,
            slots: 2,
            micro_batch_rows: ROWS,
            vocab_chunk_rows: VOCAB,
            checkpointing: CheckpointingMethod::NoRecompute,
            recomputed_layers: usize::MAX,
            merge: true,
            reduce: ReduceGradients::Step,
            targets: split(),
            moe: false,
            hybrid: false,
            data: Data::Random,
            optimizer: config::Optimizer::Adamw,
            fault: None,
            stand_in: false,
            ranks_per_host: None,
            quant: None,
            noise: None,
        }
    }

    /// The same training on one rank.
    pub fn on_one_rank(&self) -> Self {
        let Self { targets, moe, hybrid, data, optimizer, stand_in, quant, .. } = self.clone();
        Self { targets, moe, hybrid, data, optimizer, stand_in, quant, ..Self::one() }
    }

    /// Largest distances of losses and of tensors of the adapter from those of one rank. Muon's iterations in bf16 turn
    /// the last bit of a sum into one of bf16.
    fn tolerances(&self) -> [f64; 2] {
        if self.optimizer == config::Optimizer::Muon { [1e-4, 1e-2] } else { [1e-5, 1e-4] }
    }

    fn mesh(&self) -> Mesh {
        let sizes =
            MeshSizes { replicate: self.replicas as i64, shard: -1, sequence: 1, expert: self.experts_over };
        Mesh::new(self.world, sizes).unwrap()
    }

    pub fn options(&self) -> Options {
        Options {
            merge: self.merge,
            slots: self.slots,
            vocab_chunk_rows: self.vocab_chunk_rows,
            loss_chunk_tokens: 7,
            checkpointing: Recompute::first(self.recomputed_layers, self.checkpointing),
            reduce: self.reduce,
            ..Options::default()
        }
    }
}

/// A Qwen3-like model whose sizes divide by nothing convenient; with experts in all layers but the first.
pub fn spec(moe: bool) -> ModelSpec {
    let gqa = GqaSpec {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        value_dim: 16,
        scale: None,
        rope: RopeSpec { theta: 10000.0, scaling: RopeScaling::None, dim: 16 },
        qkv_bias: true,
        o_bias: false,
        qk_norm: Some(QkNorm::Head),
        qk_norm_eps: 1e-6,
        clip_qkv: None,
        window: None,
    };
    let experts = MoeSpec {
        experts: EXPERTS,
        top_k: 2,
        normalise: true,
        width: 28,
        shared_width: Some(36),
        names: MoeNames::MLP,
    };
    let layer = |i: usize| LayerSpec {
        mixer: Mixer::Gqa(GqaSpec { window: (i == 1).then_some(5), ..gqa.clone() }),
        ffn: if moe && i > 0 { Ffn::Moe(experts) } else { Ffn::Dense(DenseSpec { width: 72, bias: false }) },
        norms: NormSpec::new(1e-6),
    };
    ModelSpec {
        vocab_size: VOCAB,
        hidden_size: 40,
        layers: (0..3).map(layer).collect(),
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        initializer_range: 0.2,
        quantization: None,
    }
}

/// The same with linear layers in a format, all but one that is excluded.
pub fn quantised_spec(moe: bool, format: Option<QuantFormat>) -> ModelSpec {
    let (mut spec, excluded) = (spec(moe), names(&["layers.2.*.k_proj"]));
    let source = RandomSource::new(spec.tensors(), spec.initializer_range, 1);
    spec.quantization =
        format.map(|format| Quantization::new(format.into(), &excluded, &spec, &source).unwrap());
    spec
}

/// Random weights, those of the experts' down projections larger in the first half and smaller in the second.
struct UnevenSource(RandomSource);

impl WeightSource for UnevenSource {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.0.meta(name)
    }

    fn read(
        &self,
        name: &str,
        range: std::ops::Range<usize>,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        self.0.read(name, range, dtype, out)?;
        let expert = name.split_once("experts.").and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
        if let Some(expert) = expert.filter(|_: &usize| name.contains("down_proj")) {
            assert_eq!(dtype, DType::F32);
            let factor = if expert < EXPERTS / 2 { 3.0 } else { 0.1 };
            bytemuck::cast_slice_mut::<u8, f32>(out).iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }

    fn bytes_read(&self) -> u64 {
        self.0.bytes_read()
    }
}

pub fn load(model: &mut Transformer, data: Data) {
    let spec = model.spec();
    let random = RandomSource::new(spec.tensors(), spec.initializer_range, 1);
    match data {
        Data::UnevenExperts => model.load(&UnevenSource(random)).unwrap(),
        _ => model.load(&random).unwrap(),
    }
}

/// Row `row` of step `step`: ids, labels and document lengths, the same in every topology. Lengths differ, so
/// ranks get unequal numbers of tokens.
pub fn row(step: usize, row: usize, data: Data) -> (Vec<i64>, Vec<i64>, Vec<usize>) {
    let stream = Stream::new(5, &format!("row {step} {row}"));
    let lengths = vec![3 + (row * 5 + step) % 7, 1 + row % 4];
    let n: usize = lengths.iter().sum();
    let id = |i: usize| if data == Data::OneToken { 77 } else { stream.below(i as u64, VOCAB as u64) as i64 };
    let ids: Vec<i64> = (0..n).map(id).collect();
    let silent = |i: usize| match data {
        Data::OddRowsSilent if row % 2 == 1 => true,
        _ => (i + row).is_multiple_of(3),
    };
    let labels = ids.iter().enumerate().map(|(i, &id)| if silent(i) { -100 } else { id }).collect();
    (ids, labels, lengths)
}

pub fn batch(step: usize, rows: &[usize], data: Data) -> Batch {
    let (mut ids, mut labels, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for &index in rows {
        let (i, l, d) = row(step, index, data);
        ids.extend(i);
        labels.extend(l);
        lengths.extend(d);
    }
    Batch::new(&ids, &labels, &lengths, Device::Cpu)
}

/// A communicator that does something wrong.
struct Faulty {
    inner: Rc<dyn Communicator>,
    fault: Fault,
}

impl Communicator for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn group(&self) -> &str {
        self.inner.group()
    }

    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError> {
        self.inner.start_all_gather(input, output)
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        self.inner.reduce_scatter(input, output)?;
        let mut output = output.shallow_clone();
        match self.fault {
            Fault::SkipsDenseSum => {
                let n = output.numel() as i64;
                output.copy_(&input.narrow(0, self.rank() as i64 * n, n));
            }
            Fault::CountsExpertsTwice => drop(output.g_mul_scalar_(2.0)),
            _ => {}
        }
        Ok(())
    }

    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError> {
        self.inner.all_to_all(sent, received)?;
        let last = received
            .pieces
            .iter()
            .flatten()
            .filter(|piece| !piece.is_empty())
            .map(|piece| piece.end - 1)
            .max();
        if let Some(last) = last.filter(|_| self.fault == Fault::LosesOneRow) {
            let _ = received.rows.get(last as i64).zero_();
        }
        Ok(())
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        self.inner.all_reduce(values)
    }

    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
        let own = values.to_vec();
        self.inner.all_reduce_host(values, how)?;
        if self.fault == Fault::ClipsByOwnNorm {
            values.copy_from_slice(&own);
        }
        Ok(())
    }

    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.inner.all_gather_host(bytes)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }
}

/// Breaks the group that `fault` is about.
fn break_groups(groups: &mut ProcessGroups, fault: Fault) {
    let broken = match fault {
        Fault::SkipsDenseSum | Fault::ClipsByOwnNorm => &mut groups.shard,
        Fault::CountsExpertsTwice => &mut groups.expert_shard,
        Fault::LosesOneRow => &mut groups.expert,
    };
    *broken = Rc::new(Faulty { inner: broken.clone(), fault });
}

/// How often this rank's tokens chose each expert, [micro-batch][layer with experts][expert], by a model that is whole
/// on this rank.
fn choices(
    (lone, adapter): &mut (Transformer, Adapter),
    trained: &Adapter,
    batches: &[Batch],
) -> Vec<Vec<Vec<f64>>> {
    let values: BTreeMap<String, Vec<f32>> =
        trained.whole().unwrap().into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
    adapter.set(|parameter, range| values[&parameter.name][range].to_vec()).unwrap();
    let of_batch = |batch: &Batch| {
        lone.forward_backward(batch, &mut [&mut *adapter], &CrossEntropy { scale: 1.0 }).unwrap();
        let sums = lone.take_router_load().sums();
        let layers = sums.chunks_exact(2 * EXPERTS);
        layers.map(|layer| layer[..EXPERTS].to_vec()).collect()
    };
    batches.iter().map(of_batch).collect()
}

/// The rows that travel to and from this rank, for each micro-batch and layer.
fn routed(groups: &ProcessGroups, own: &[Vec<Vec<f64>>]) -> Vec<RoutedRows> {
    let bytes = serde_json::to_vec(own).unwrap();
    let all = groups.expert.all_gather_host(&bytes).unwrap();
    let all: Vec<Vec<Vec<Vec<f64>>>> = all.iter().map(|own| serde_json::from_slice(own).unwrap()).collect();
    let (rank, each) = (groups.expert.rank(), EXPERTS / groups.expert.size());
    let mine = rank * each..(rank + 1) * each;
    let mut routed = Vec::new();
    for (micro, layers) in own.iter().enumerate() {
        for (layer, counts) in layers.iter().enumerate() {
            let home: f64 = counts[mine.clone()].iter().sum();
            let go = counts.iter().sum::<f64>() - home;
            let here: f64 = all.iter().map(|rank| rank[micro][layer][mine.clone()].iter().sum::<f64>()).sum();
            routed.push(RoutedRows { received: (here - home) as usize, sent: go as usize });
        }
    }
    routed
}

/// One rank of a case. Does nothing unless a case started it.
#[test]
fn mpi_worker() {
    let Ok(cases) = std::env::var("XORL_TEST_CASE") else { return };
    let cases: Vec<Case> = serde_json::from_str(&cases).unwrap();
    let mut world = World::start().unwrap();
    if cases[0].stand_in {
        world.use_device(DeviceChoice::StandIn).unwrap();
    }
    let seen: Vec<Value> = cases.iter().map(|case| train(&world, case)).collect();
    let out = std::env::var("XORL_TEST_OUT").unwrap();
    let path = Path::new(&out).join(format!("{}.json", world.rank()));
    std::fs::write(path, Value::from(seen).to_string()).unwrap();
}

/// What this rank sees of a case.
fn train(world: &World, case: &Case) -> Value {
    let (rank, size) = (world.rank(), world.size());
    let mesh = case.mesh();
    let mut groups = ProcessGroups::new(world, mesh);
    if let Some(fault) = case.fault {
        break_groups(&mut groups, fault);
    }

    let spec = quantised_spec(case.moe, case.quant);
    let options = case.options();
    let mut sites = resolve(&all_projections(&spec), Some(&case.targets), &[]).unwrap();
    if case.hybrid {
        sites = sites.into_iter().map(Site::hybrid).collect();
    }
    let lora = LoraShape::new(3, 6.0);
    let new = |groups: &ProcessGroups| {
        let mut model = Transformer::new(spec.clone(), options, groups).unwrap();
        load(&mut model, case.data);
        let mut adapter = model.new_adapter(&sites, lora);
        adapter.init(3, 0.05).unwrap();
        (model, adapter)
    };
    let (model, adapter) = new(&groups);
    let mut lone = (case.experts_over > 1).then(|| new(&ProcessGroups::alone()));
    let initial = digest(&adapter);
    let args = TrainArgs { lr: 2e-3, weight_decay: 0.01, optimizer: case.optimizer, ..TrainArgs::default() };
    let optimizer = Optimizer::new(&Settings::from(&args), adapter.pieces());
    let schedule = Schedule::new(&args, STEPS);
    let session = Session { name: "test".into(), adapter, optimizer, max_grad_norm: LIMIT };
    let noise = case.noise.map(|alpha| StepNoise { seed: 1, step: 0, alpha });
    let mut trainer = Trainer { model, session, schedule, world: groups.world.clone(), noise };

    // What every step has to receive: base and adapter regions as the ring needs them, and of gradients only the
    // adapter's. The first step finds empty slots.
    let base = BasePlan::new(&spec, &options, &mesh, rank).unwrap();
    let adapter = base.adapter(&sites, &lora.into(), &options, &mesh);
    let traffic = Traffic {
        spec: &spec,
        options: &options,
        base: &base.regions,
        adapter: &adapter,
        replicas: case.replicas,
        optimizer: case.optimizer,
        reference: None,
    };
    let mut received = Received::new();
    let mut reports = Vec::new();
    let mut norms = Vec::new();
    for step in 0..STEPS {
        // Rows in turn to the ranks, then cut into micro-batches: as many on every rank.
        let (own, micro): (Vec<usize>, _) =
            ((0..ROWS).filter(|row| row % size == rank).collect(), case.micro_batch_rows);
        let count = ROWS.div_ceil(size).div_ceil(micro);
        let of = |m: usize| own.get(m * micro..(m * micro + micro).min(own.len())).unwrap_or(&[]);
        let batches: Vec<Batch> = (0..count).map(|m| batch(step, of(m), case.data)).collect();
        let mut expected = traffic.step(count, step > 0);
        if let Some(lone) = &mut lone {
            let own = choices(lone, &trainer.session.adapter, &batches);
            // The first layer has no experts.
            let layers = (1..spec.layers.len()).cycle();
            let rows = layers.zip(routed(&groups, &own));
            let bytes: usize = rows.map(|(layer, rows)| traffic.all_to_all(layer, rows)).sum();
            expected.insert((Operation::AllToAll, "expert".into()), bytes as u64);
        }
        let before = world.ledger().totals();
        let batches: Vec<MicroBatch> = batches.into_iter().map(MicroBatch::from).collect();
        let report = trainer.step(&batches, step).unwrap();
        let mut seen = received_since(&before, world.ledger());
        if case.experts_over > 1 {
            seen.entry((Operation::AllToAll, "expert".into())).or_default();
        }
        if case.fault.is_none() {
            assert_eq!(seen, expected, "rank {rank}, step {step}");
        }
        for (key, bytes) in seen {
            *received.entry(key).or_default() += bytes;
        }
        reports.push(json!([report.loss.unwrap(), report.grad_norm, report.valid_tokens]));
        let pieces = trainer.session.adapter.pieces();
        let squares = pieces.map(|piece| piece.gradient.square().sum(None).double_value(&[]));
        norms.push(squares.sum::<f64>().sqrt());
    }
    // Ranks that see unlike memory, each its own.
    let free = of_tightest(&*trainer.world, &format!("of rank {rank}"), Some(1000 - rank as u64)).unwrap();
    let adapter: Vec<Value> =
        trainer.session.adapter.whole().unwrap().into_iter().map(|(p, v)| json!([p.name, v])).collect();
    let received: BTreeMap<&str, u64> = received.iter().map(|((op, _), bytes)| (op.name(), *bytes)).collect();
    json!({
        "initial": initial, "steps": reports, "adapter": adapter, "received": received, "norms": norms,
        "shares_memory": trainer.model.shares_memory(), "free": free
    })
}

/// SHA-256 over the bits of all adapter parameters.
fn digest(adapter: &Adapter) -> String {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    for (parameter, values) in adapter.whole().unwrap() {
        hash.update(parameter.name.as_bytes());
        hash.update(bytemuck::cast_slice::<f32, u8>(&values));
    }
    format!("{:x}", hash.finalize())
}

/// What every rank of a case saw.
pub fn run(case: &Case) -> Vec<Value> {
    run_all(std::slice::from_ref(case)).remove(0)
}

/// What every rank saw of each of `cases`, which one start of mpirun runs one after another: their worlds are alike.
pub fn run_all(cases: &[Case]) -> Vec<Vec<Value>> {
    let directory = tempfile::tempdir().unwrap();
    let Case { world, stand_in: stands_in, ranks_per_host, .. } = cases[0];
    run_workers("common::topology::mpi_worker", world, cases, directory.path(), |command| {
        if stands_in {
            stand_in(command, directory.path());
        }
        if let Some(ranks) = ranks_per_host {
            command.env("XORL_RANKS_PER_HOST", ranks.to_string());
        }
    });
    let read = |rank: usize| std::fs::read_to_string(directory.path().join(format!("{rank}.json"))).unwrap();
    let ranks: Vec<Vec<Value>> = (0..world).map(|rank| serde_json::from_str(&read(rank)).unwrap()).collect();
    (0..cases.len()).map(|case| ranks.iter().map(|rank| rank[case].clone()).collect()).collect()
}

/// Where what a rank saw parts from what one rank alone saw, if it does.
pub fn difference(seen: &Value, one: &Value) -> Option<String> {
    difference_beyond([1e-5, 1e-4], seen, one)
}

/// The same for losses and norms, and tensors of the adapter, that may be so far apart, relative to one rank's.
fn difference_beyond([of_losses, of_tensors]: [f64; 2], seen: &Value, one: &Value) -> Option<String> {
    if seen["initial"] != one["initial"] {
        return Some("initial adapters differ in their bits".into());
    }
    for step in 0..STEPS {
        for (column, what) in ["loss", "grad norm"].iter().enumerate() {
            let [ours, theirs] = [seen, one].map(|seen| seen["steps"][step][column].as_f64().unwrap());
            if relative(&[ours], &[theirs]) >= of_losses {
                return Some(format!("{what} of step {step}: {ours}, one rank {theirs}"));
            }
        }
        let [ours, theirs] = [seen, one].map(|seen| &seen["steps"][step][2]);
        if ours != theirs {
            return Some(format!("valid tokens of step {step}: {ours}, one rank {theirs}"));
        }
    }
    let [ours, theirs] = [seen, one].map(|seen| seen["adapter"].as_array().unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours[0], theirs[0]);
        let floats = |v: &Value| -> Vec<f64> {
            v[1].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let apart = relative(&floats(ours), &floats(theirs));
        if apart >= of_tensors {
            return Some(format!("{}: {apart} apart", ours[0]));
        }
    }
    None
}

/// Holds `case` against what `one` rank alone saw; what its ranks saw.
pub fn equals(case: &Case, one: &Value) -> Vec<Value> {
    let ranks = run(case);
    compare(case, &ranks, one);
    ranks
}

/// Holds what `ranks` saw of `case` against what `one` rank alone saw.
pub fn compare(case: &Case, ranks: &[Value], one: &Value) {
    for seen in ranks {
        assert_eq!(difference_beyond(case.tolerances(), seen, one), None, "{case:?}");
    }
    // Clipping was active, or the test would not see a wrong norm.
    assert!(one["steps"][0][1].as_f64().unwrap() > LIMIT, "norm {}", one["steps"][0][1]);
    // Each rank has held its ledger against the formula; a single rank moves nothing.
    assert_eq!(one["received"], json!({}));
    for seen in ranks {
        let moves = |operation: &str| seen["received"][operation].is_u64();
        assert_eq!(moves("all_gather"), case.world > case.replicas);
        assert_eq!(moves("all_reduce"), case.replicas > 1);
        assert_eq!(moves("all_to_all"), case.experts_over > 1);
    }
}

/// Holds `case` against one rank with the same targets and data; what its ranks saw.
pub fn equals_one_rank(case: Case) -> Vec<Value> {
    let one = run(&case.on_one_rank()).remove(0);
    equals(&case, &one)
}
