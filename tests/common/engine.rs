//! A client of the server's engine, its data, and a tiny model in files.

use super::{
    relative,
    topology::{Data, names, row, split},
};
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, mpsc},
    time::Duration,
};
use tempfile::TempDir;
use xorl_dist::{
    config::{BaseFiles, TrainArgs},
    dtype::DType,
    loss::NamedLoss,
    model::hf_config::HfModel,
    optim::Settings,
    server::{
        engine::{AdapterDefaults, EngineHandle, EngineOptions},
        request::{
            AdapterSpec, Answer, Datum, Engine, ModelId, OptimStep, Pass, PassReply, Refusal, Reply, Request,
            StepReply, Task,
        },
        store::Base,
    },
    weights::{RandomSource, WeightSource},
};

/// Tokens of a rank and micro-batch at most.
pub const MAX_TOKENS: usize = 200;
/// Standard deviation of the initial B.
pub const B_STD: f64 = 0.05;

pub fn id(name: impl ToString) -> ModelId {
    ModelId::new(name.to_string()).unwrap()
}

pub fn cross_entropy() -> NamedLoss {
    NamedLoss { name: "cross_entropy".into(), params: BTreeMap::new() }
}

/// Settings of an engine over a tiny model: micro-batches of [`MAX_TOKENS`], adapters whose B is not 0, no limits.
pub fn options(output_dir: PathBuf, gather: Duration) -> EngineOptions {
    EngineOptions {
        defaults: AdapterDefaults {
            targets: split(),
            use_rslora: false,
            hybrid: false,
            b_init_std: B_STD,
            max_rank: None,
            rank: 16,
            optimizer: Settings::from(&TrainArgs::default()),
        },
        base: Base {
            name: "base".into(),
            digest: "digest".into(),
            quantization: None,
            files: BaseFiles::default(),
            seed: 1,
        },
        max_tokens_per_pass: MAX_TOKENS,
        max_waiting: 100,
        gather,
        output_dir,
        adapter_memory: None,
        sampling_memory: None,
        max_positions: None,
        storage_limit: None,
        fits_recompute: false,
    }
}

/// The documents of a row as data: targets are the labels of the next tokens.
pub fn data_of(step: usize, index: usize) -> Vec<Datum> {
    let (ids, labels, lengths) = row(step, index, Data::Random);
    let mut start = 0;
    let datum = |length: &usize| {
        let (own, end) = (start, start + length);
        start = end;
        let targets = labels[own + 1..end].iter().copied().chain([-100]).collect();
        Datum { ids: ids[own..end].to_vec(), targets, k: 1, inputs: BTreeMap::new() }
    };
    lengths.iter().map(datum).collect()
}

/// Submits requests and waits for their answers.
pub struct Client(pub Arc<EngineHandle>);

impl Client {
    pub fn submit(&self, model: &ModelId, task: Task) -> mpsc::Receiver<Answer> {
        let (send, answer) = mpsc::channel();
        let give = Box::new(move |answer| send.send(answer).unwrap());
        self.0.submit(Request { model: model.clone(), task }, give);
        answer
    }

    pub fn ask(&self, model: &ModelId, task: Task) -> Answer {
        received(&self.submit(model, task))
    }

    pub fn create(&self, model: &ModelId, spec: AdapterSpec) {
        assert_eq!(self.ask(model, Task::Create(spec)), Ok(Reply::Created));
    }

    pub fn refused(&self, model: &ModelId, task: Task) -> String {
        match self.ask(model, task) {
            Err(Refusal::User(text)) => text,
            other => panic!("not refused as the user's mistake: {other:?}"),
        }
    }

    pub fn step(&self, model: &ModelId, step: OptimStep) -> StepReply {
        stepped(self.ask(model, Task::OptimStep(step)))
    }
}

pub fn received(answer: &mpsc::Receiver<Answer>) -> Answer {
    answer.recv_timeout(Duration::from_secs(120)).expect("an answer")
}

pub fn pass(data: Vec<Datum>, backward: bool) -> Task {
    Task::Pass(Pass { data, loss: cross_entropy(), backward })
}

pub fn passed(answer: Answer) -> PassReply {
    match answer {
        Ok(Reply::Passed(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

pub fn stepped(answer: Answer) -> StepReply {
    match answer {
        Ok(Reply::Stepped(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

/// One of eight adapters of different ranks and targets.
pub fn adapter(index: usize) -> AdapterSpec {
    let targets: [&[&str]; 4] = [
        &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        &["qkv_proj", "gate_up_proj", "down_proj"],
        &["q_proj", "o_proj", "down_proj"],
        &["all-linear"],
    ];
    AdapterSpec {
        rank: [4, 8, 16, 2, 3, 5, 1, 6][index],
        alpha: [8.0, 4.0, 32.0, 3.0][index % 4],
        targets: Some(names(targets[index % 4])),
        train_attn: index != 7,
        train_mlp: index != 3,
        seed: 7 + index as u64,
    }
}

/// Three passes of one step of adapter `index`, the last with weights.
pub fn passes(step: usize, index: usize) -> Vec<Vec<Datum>> {
    let mut last = data_of(step, index + 20);
    for datum in &mut last {
        let weights = (0..datum.ids.len()).map(|i| 0.5 * (i % 3) as f32).collect();
        datum.inputs.insert("weights".into(), weights);
    }
    vec![data_of(step, index), data_of(step, index + 10), last]
}

/// The step of adapter `index`.
pub fn step_of(index: usize) -> OptimStep {
    OptimStep {
        lr: 2e-3,
        betas: (0.9, 0.95),
        eps: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: if index.is_multiple_of(2) { 0.1 } else { 0.0 },
        divide: index.is_multiple_of(3),
    }
}

/// The replies to an adapter: losses, norms, and log-probabilities, the last ones after all steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub losses: Vec<f64>,
    pub valid: Vec<u64>,
    pub norms: Vec<f64>,
    pub log_probs: Vec<f32>,
}

impl Seen {
    pub fn pass(&mut self, reply: PassReply) {
        self.losses.push(reply.loss);
        self.valid.push(reply.valid);
        self.log_probs.extend(reply.log_probs.concat());
    }

    pub fn step(&mut self, reply: &StepReply, number: usize) {
        assert_eq!((reply.step, &reply.non_finite[..]), (number as u64 + 1, &[][..]));
        self.norms.push(reply.grad_norm);
    }

    pub fn is_near(&self, other: &Self, what: &str) {
        assert_eq!(self.valid, other.valid, "{what}");
        let numbers = [(&self.losses, &other.losses), (&self.norms, &other.norms)];
        for (ours, theirs) in numbers {
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert!((ours - theirs).abs() <= 1e-5 * theirs.abs().max(1e-3), "{what}: {ours} {theirs}");
            }
            assert_eq!(ours.len(), theirs.len(), "{what}");
        }
        let apart = relative(&self.log_probs, &other.log_probs);
        assert!(apart <= 1e-5, "{what}: log-probabilities are {apart} apart");
    }
}

/// A folder with a random model of two layers.
pub fn model_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "qwen3", "vocab_size": 503, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.15, "tie_word_embeddings": false});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let spec = HfModel::open(folder.path()).unwrap().spec;
    let source = RandomSource::new(spec.tensors(), spec.initializer_range, 1);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = source
        .names()
        .into_iter()
        .map(|name| {
            let shape = source.meta(&name).unwrap().shape;
            let elements = shape.iter().product::<usize>();
            let mut bytes = vec![0f32; elements];
            source.read(&name, 0..elements, DType::F32, bytemuck::cast_slice_mut(&mut bytes)).unwrap();
            (name, shape, bytemuck::cast_slice(&bytes).to_vec())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}
