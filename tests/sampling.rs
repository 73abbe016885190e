//! A step that samples computes what transformers and PEFT compute, whatever else is in it: several adapters and the
//! base, prompts whole and in parts, continuations that share a prompt, 1 and 2 ranks, divided experts.
//! tests/oracle/sampling.py writes the truth, from models and adapters that it makes.

use crate::common::{
    python, run_workers, stand_in,
    topology::{self, VOCAB, names, split},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};
use tch::{Device, Tensor};
use xorl_dist::{
    checkpoint::peft::{AdapterFolder, StoredAdapter},
    comm::World,
    device::DeviceChoice,
    dtype::DType,
    infer::{
        cache::KvCache,
        compute::compute,
        request::{
            Choice, Continuation, PromptTargets, SampleReply, SampleRequest, Stop, TokenLogProb, Wanted,
        },
        sampler::{Limits, Progress, Sampler},
        step::RankResult,
    },
    lora::{Adapter, LoraShape, targets},
    loss::{BySegment, CrossEntropy, NamedLoss, Sequence},
    mesh::{Mesh, MeshSizes},
    model::{
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        transformer::{Batch, MicroBatchLoss, Transformer},
    },
    rng::Stream,
    shard::ProcessGroups,
    weights::SafetensorsSource,
};

/// Distance of log-probabilities from those of transformers, both in fp32.
const NEAR: f64 = 1e-4;
/// Distance of log-probabilities that were sampled from those of a pass over the whole text.
const SAME: f64 = 1e-5;
const GREEDY: Choice = Choice { temperature: 0.0, top_p: 1.0, top_k: None };

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Case {
    model: PathBuf,
    world: usize,
    experts_over: usize,
    stand_in: bool,
    /// No model in files: replies are compared to the bit.
    bits: bool,
}

/// Between log-probabilities of the same logits: a sampler sums their exponentials in fp64, a pass in fp32.
const ONE_SOFTMAX: f64 = 2e-6;

/// The results of transformers for a prompt with an adapter.
#[derive(Deserialize)]
struct Expected {
    adapter: Option<usize>,
    prompt: Vec<i64>,
    prompt_log_probs: Vec<f32>,
    top_ids: Vec<Vec<i64>>,
    top_log_probs: Vec<Vec<f32>>,
    new: Vec<i64>,
    new_log_probs: Vec<f32>,
    gaps: Vec<f64>,
}

/// The model of a case with its two adapters, on this rank.
struct Ranks {
    model: Transformer,
    groups: ProcessGroups,
    adapters: Vec<Adapter>,
}

fn near(ours: &[f32], theirs: &[f32], most: f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (at, (&a, &b)) in ours.iter().zip(theirs).enumerate() {
        let off = f64::from((a - b).abs());
        assert!(off <= most, "{what}, {at}: {a}, expected {b}");
    }
}

impl Ranks {
    fn load(case: &Case, world: &World) -> Self {
        let sizes = MeshSizes { replicate: 1, shard: -1, sequence: 1, expert: case.experts_over };
        let groups = ProcessGroups::new(world, Mesh::new(world.size(), sizes).unwrap());
        let spec = HfModel::open(&case.model).unwrap().spec;
        let options = Options { vocab_chunk_rows: 200, loss_chunk_tokens: 7, ..Options::default() };
        let mut model = Transformer::new(spec.clone(), options, &groups).unwrap();
        model.load(&SafetensorsSource::open(&case.model).unwrap()).unwrap();
        let adapter = |i: usize| {
            let folder = AdapterFolder::open(&case.model.join(format!("adapter{i}"))).unwrap();
            let StoredAdapter { sites, shapes, values } = folder.adapter(&all_projections(&spec)).unwrap();
            let mut adapter = model.new_adapter(&sites, shapes);
            adapter.set(|parameter, range| values[&parameter.name][range].to_vec()).unwrap();
            adapter
        };
        let adapters = (0..2).map(adapter).collect();
        Self { model, groups, adapters }
    }

    /// Replies to requests that run side by side.
    fn sample(&mut self, requests: &[(Option<usize>, SampleRequest)]) -> Vec<SampleReply> {
        let world = self.groups.world.clone();
        // Prompts are cut into parts of at most 21 tokens, and wait for pages.
        let limits = Limits { ranks: world.size(), pages: 60, sequences: 16, tokens: 36 };
        let (kind, device) = (self.model.options().compute.kind(), self.model.device().tensors());
        let mut cache = KvCache::new(self.model.spec(), 60, kind, device);
        let mut sampler = Sampler::new(limits);
        for (ticket, (adapter, request)) in (0..).zip(requests) {
            sampler.submit(ticket, *adapter, request.clone(), None).unwrap();
        }
        let mut replies = BTreeMap::new();
        let mut mixed = 0;
        while let Some(step) = sampler.plan(&|_| true) {
            mixed = mixed.max(step.adapters.len());
            let adapters = self.adapters.iter_mut().enumerate();
            let mut adapters: Vec<&mut Adapter> =
                adapters.filter(|(i, _)| step.adapters.contains(i)).map(|(_, adapter)| adapter).collect();
            let own = compute(&mut self.model, &mut adapters, &mut cache, &step, world.rank()).unwrap();
            let all = world.all_gather_host(&postcard::to_stdvec(&own).unwrap()).unwrap();
            let all: Vec<RankResult> = all.iter().map(|own| postcard::from_bytes(own).unwrap()).collect();
            for event in sampler.apply(&all) {
                if let Progress::End(reply) = event.what {
                    replies.insert(event.ticket, reply.unwrap());
                }
            }
        }
        assert!(requests.len() == 1 || mixed == self.adapters.len(), "a step has all adapters");
        assert_eq!(replies.len(), requests.len());
        replies.into_values().collect()
    }

    /// Log-probabilities of the tokens of `ids` from `first` on, by a pass over all of them with one adapter or none.
    fn evaluated(&mut self, adapter: Option<usize>, ids: &[i64], first: usize) -> Vec<f32> {
        let batch = Batch::new(ids, ids, &[ids.len()], self.model.device().tensors());
        let mut own: Vec<&mut Adapter> = adapter.map(|i| &mut self.adapters[i]).into_iter().collect();
        let found = self.model.evaluate(&batch, &mut own, &CrossEntropy { scale: 1.0 }).unwrap();
        log_probs_from(&found, first, ids.len())
    }

    /// The same by a pass of `importance_sampling` with backward.
    fn passed(&mut self, adapter: usize, ids: &[i64], first: usize) -> Vec<f32> {
        let device = self.model.device().tensors();
        let batch = Batch::new(ids, ids, &[ids.len()], device);
        let [zeros, ones] = [0.0, 1.0].map(|value| vec![value; ids.len()]);
        let inputs = BTreeMap::from([("logprobs".to_owned(), zeros), ("advantages".to_owned(), ones)]);
        let targets: Vec<i64> = ids[1..].iter().copied().chain([-100]).collect();
        let sequence = Sequence { targets: &targets, k: 1, inputs: &inputs };
        let loss = NamedLoss::new("importance_sampling", BTreeMap::new()).unwrap();
        let loss = loss.over(&[sequence], 1.0, device).unwrap();
        let loss = BySegment::new(vec![(0..ids.len(), &*loss)]);
        let found = self.model.forward_backward(&batch, &mut [&mut self.adapters[adapter]], &loss).unwrap();
        log_probs_from(&found, first, ids.len())
    }
}

/// Those of tokens `first..end`, of which each row before has one.
fn log_probs_from(found: &MicroBatchLoss, first: usize, end: usize) -> Vec<f32> {
    let log_probs: Tensor = found.log_probs.to_device(Device::Cpu).reshape([-1]);
    Vec::<f32>::try_from(log_probs).unwrap()[first - 1..end - 1].to_vec()
}

fn request(prompt: &[i64], new: usize) -> SampleRequest {
    SampleRequest {
        prompt: prompt.to_vec(),
        count: 1,
        max_new_tokens: new,
        choice: GREEDY,
        seed: 0,
        stop: Stop::default(),
        wanted: Wanted::default(),
    }
}

/// The request of an expected answer: a greedy one that wants all that can be told.
fn greedy(expected: &Expected) -> SampleRequest {
    // Two targets a token: the one that follows, and every third time none.
    let targets = expected.prompt[1..].iter().enumerate();
    let ids = targets.flat_map(|(at, &id)| [id, if at % 3 == 0 { -1 } else { (id + 1) % 503 }]).collect();
    let prompt_targets = Some(PromptTargets { ids, k: 2 });
    let wanted = Wanted { prompt: true, prompt_top: 5, new_top: 3, prompt_targets };
    SampleRequest { wanted, ..request(&expected.prompt, expected.new.len()) }
}

fn log_probs(top: &[Vec<TokenLogProb>]) -> Vec<f32> {
    top.iter().flatten().map(|(_, log_prob)| *log_prob).collect()
}

fn equals_transformers(ours: &SampleReply, expected: &Expected, what: &str) {
    let SampleReply { continuations, prompt } = ours;
    near(&prompt.log_probs[1..], &expected.prompt_log_probs, NEAR, &format!("{what}: prompt"));
    assert!(prompt.log_probs[0].is_nan() && prompt.top[0].is_empty());
    near(&log_probs(&prompt.top), &expected.top_log_probs.concat(), NEAR, &format!("{what}: prompt's top"));
    for ((ours, ids), theirs) in prompt.top[1..].iter().zip(&expected.top_ids).zip(&expected.top_log_probs) {
        // Neighbours that are nearly as likely may have changed places.
        let clear = |at: usize| at == 0 || theirs[at - 1] - theirs[at] > 2e-4;
        for at in (0..ours.len() - 1).filter(|&at| clear(at) && clear(at + 1)) {
            assert_eq!(ours[at].0, ids[at], "{what}: {ours:?}, {ids:?}");
        }
    }
    for (at, pair) in prompt.targets.chunks_exact(2).enumerate() {
        near(&pair[..1], &expected.prompt_log_probs[at..at + 1], NEAR, &format!("{what}: target {at}"));
        assert_eq!(pair[1].is_nan(), at % 3 == 0, "{what}: target {at}");
    }
    let [Continuation { ids, log_probs, top, .. }] = &continuations[..] else { panic!("one continuation") };
    assert!(expected.gaps.iter().all(|&gap| gap > 4.0 * NEAR), "a near tie decides nothing");
    assert_eq!(ids, &expected.new, "{what}");
    near(log_probs, &expected.new_log_probs, NEAR, &format!("{what}: continuation"));
    for ((top, id), log_prob) in top.iter().zip(ids).zip(log_probs) {
        assert_eq!((top.len(), top[0].0), (3, *id), "{what}");
        near(&[top[0].1], &[*log_prob], 1e-6, what);
    }
}

/// One rank of a case.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let mut world = World::start().unwrap();
    if case.bits {
        return same_bits(&case, &world);
    }
    if case.stand_in {
        world.use_device(DeviceChoice::StandIn).unwrap();
    }
    let mut ranks = Ranks::load(&case, &world);
    let expected = std::fs::read_to_string(case.model.join("expected.json")).unwrap();
    let expected: Vec<Expected> = serde_json::from_str(&expected).unwrap();
    assert_eq!(expected.len(), 15);

    // Everything at once: greedy, three samples of one prompt, a prompt that is scored alone.
    let mut requests: Vec<_> = expected.iter().map(|expected| (expected.adapter, greedy(expected))).collect();
    for Expected { adapter, prompt, .. } in &expected {
        let choice = Choice { temperature: 0.9, top_p: 0.95, top_k: Some(200) };
        requests.push((*adapter, SampleRequest { count: 3, choice, seed: 7, ..request(prompt, 9) }));
        let wanted = Wanted { prompt: true, ..Wanted::default() };
        requests.push((*adapter, SampleRequest { wanted, ..request(prompt, 0) }));
    }
    let replies = ranks.sample(&requests);
    let (of_greedy, others) = replies.split_at(expected.len());
    for (ours, expected) in of_greedy.iter().zip(&expected) {
        let what = format!("{case:?}, adapter {:?}, {} tokens", expected.adapter, expected.prompt.len());
        equals_transformers(ours, expected, &what);
    }
    for ((pair, expected), alone) in others.chunks_exact(2).zip(&expected).zip(of_greedy) {
        let what = format!("{case:?}, adapter {:?}, {} tokens", expected.adapter, expected.prompt.len());
        let [sampled, scored] = pair else { panic!("pairs") };
        assert!(scored.continuations.is_empty());
        near(&scored.prompt.log_probs[1..], &alone.prompt.log_probs[1..], SAME, &format!("{what}: scored"));
        let texts: Vec<&[i64]> = sampled.continuations.iter().map(|each| &each.ids[..]).collect();
        assert!(texts.len() == 3 && texts[0] != texts[1] && texts[1] != texts[2], "{what}: {texts:?}");
        for each in sampled.continuations.iter().chain(&alone.continuations) {
            let whole = [&expected.prompt[..], &each.ids].concat();
            let log_probs = ranks.evaluated(expected.adapter, &whole, expected.prompt.len());
            near(&each.log_probs, &log_probs, SAME, &format!("{what}: evaluated"));
        }
    }
    if ranks.groups.rank == 0 {
        let texts = replies.iter().flat_map(|reply| reply.continuations.iter().map(|each| &each.ids));
        let out = std::env::var("XORL_TEST_OUT").unwrap();
        let texts = serde_json::to_string(&texts.collect::<Vec<_>>()).unwrap();
        std::fs::write(Path::new(&out).join("texts.json"), texts).unwrap();
    }
}

/// Sixteen requests, of the base and of three adapters: short prompts and some that are cut into parts, all that can be
/// told, one sample and several.
fn sixteen() -> Vec<(Option<usize>, SampleRequest)> {
    let of = |i: usize| {
        let stream = Stream::new(3, &format!("prompt {i}"));
        let length = [3, 1, 50, 17, 22, 64, 9, 43][i % 8];
        let id = |at: usize| stream.below(at as u64, VOCAB as u64) as i64;
        let prompt: Vec<i64> = (0..length).map(id).collect();
        let targets = (0..(length - 1) * 3).map(|at| if at % 4 == 0 { -1 } else { id(1000 + at) }).collect();
        let wanted = Wanted {
            prompt: true,
            prompt_top: 4,
            new_top: 5,
            prompt_targets: (length > 1).then_some(PromptTargets { ids: targets, k: 3 }),
        };
        let choice = Choice { temperature: 1.1, top_p: 0.97, top_k: None };
        let request = SampleRequest { choice, seed: i as u64, wanted, ..request(&prompt, 6) };
        ((i % 4).checked_sub(1), SampleRequest { count: 1 + i % 3 / 2, ..request })
    };
    (0..16).map(of).collect()
}

/// Every request gets the same bits alone, on one thread, as beside the others, on three.
fn same_bits(case: &Case, world: &World) {
    for (moe, compute) in [false, true].into_iter().flat_map(|moe| [(moe, DType::F32), (moe, DType::Bf16)]) {
        let expert = if moe { case.experts_over } else { 1 };
        let sizes = MeshSizes { replicate: 1, shard: -1, sequence: 1, expert };
        let groups = ProcessGroups::new(world, Mesh::new(world.size(), sizes).unwrap());
        let options = Options {
            compute,
            vocab_chunk_rows: 300,
            loss_chunk_tokens: 7,
            deterministic_sampling: true,
            ..Options::default()
        };
        let mut model = Transformer::new(topology::spec(moe), options, &groups).unwrap();
        topology::load(&mut model, topology::Data::Random);
        let fused = ["qkv_proj", "gate_up_proj", "down_proj"];
        let adapter = |(seed, (rank, of)): (u64, (usize, Vec<String>))| {
            let sites = targets::resolve(&all_projections(model.spec()), Some(&of), &[]).unwrap();
            let mut adapter = model.new_adapter(&sites, LoraShape::new(rank, 2.0 * rank as f64));
            adapter.init(seed, 0.05).unwrap();
            adapter
        };
        let of = [(4, split()), (8, names(&fused)), (5, names(&["q_proj", "o_proj"]))];
        let adapters = (1..).zip(of).map(adapter).collect();
        let mut ranks = Ranks { model, groups, adapters };
        let requests = sixteen();
        // Texts, for NaN is not NaN; a number's text tells its bits.
        let mut texts = |requests: &[_], threads| -> Vec<String> {
            tch::set_num_threads(threads);
            ranks.sample(requests).iter().map(|reply| format!("{reply:?}")).collect()
        };
        let all = texts(&requests, 3);
        for (i, beside) in all.iter().enumerate() {
            let what = format!("experts {moe}, {compute:?}, request {i}");
            assert_eq!(texts(&requests[i..=i], 1)[0], *beside, "{what}");
        }
        // A pass over prompt and continuation sums as the sampler did, and the ratio of the two is 1.
        let replies = ranks.sample(&requests);
        for (i, ((adapter, request), reply)) in requests.iter().zip(&replies).enumerate() {
            for each in &reply.continuations {
                let whole = [&request.prompt[..], &each.ids].concat();
                let passed = ranks.evaluated(*adapter, &whole, request.prompt.len());
                let what = format!("experts {moe}, {compute:?}, request {i} in a pass");
                near(&each.log_probs, &passed, ONE_SOFTMAX, &what);
                if let Some(adapter) = *adapter {
                    let passed = ranks.passed(adapter, &whole, request.prompt.len());
                    near(&each.log_probs, &passed, ONE_SOFTMAX, &format!("{what} of a policy loss"));
                }
            }
        }
    }
}

#[test]
fn mpi_what_is_sampled_is_the_same_to_the_bit_alone_and_beside_others() {
    let folder = tempfile::tempdir().unwrap();
    for world in [1, 2] {
        let case = Case { model: PathBuf::new(), world, experts_over: world, stand_in: false, bits: true };
        run_workers("sampling::mpi_worker", world, &case, folder.path(), |_| ());
    }
}

/// The texts of all continuations of a case.
fn texts(case: &Case) -> Vec<Vec<i64>> {
    let folder = tempfile::tempdir().unwrap();
    run_workers("sampling::mpi_worker", case.world, case, folder.path(), |command| {
        if case.stand_in {
            stand_in(command, folder.path());
        }
    });
    serde_json::from_str(&std::fs::read_to_string(folder.path().join("texts.json")).unwrap()).unwrap()
}

#[test]
fn mpi_what_is_sampled_equals_transformers_and_peft() {
    let out = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/sampling.py");
    let status = Command::new(python()).arg(script).arg(out.path()).env("HF_HUB_OFFLINE", "1").status();
    assert!(status.expect("launch/setup.sh makes .venv").success());
    let of = |model: &str, world, experts_over, stand_in| Case {
        model: out.path().join(model),
        world,
        experts_over,
        stand_in,
        bits: false,
    };
    let one = texts(&of("dense", 1, 1, false));
    assert_eq!(one.len(), 15 + 45);
    assert_eq!(texts(&of("dense", 2, 1, false)), one, "2 ranks choose what one chooses");
    texts(&of("dense", 2, 1, true));
    let one = texts(&of("experts", 1, 1, false));
    assert_eq!(texts(&of("experts", 2, 2, false)), one, "2 ranks choose what one chooses");
    texts(&of("experts", 2, 2, true));
}
