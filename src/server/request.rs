//! Requests to the engine and their answers, in one form for all wires.

mod sampling;

pub use sampling::{Listener, SampleAnswer, Source, Ticket};

use crate::{
    checkpoint::saves::folder_name,
    config::is_model_id,
    dtype::DType,
    infer::request::{SampleReply, SampleRequest},
    loss::NamedLoss,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, path::PathBuf};

/// The name of an adapter on the server: a client's `model_id`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelId(String);

/// Why a text is no [`ModelId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "model_id {0:?}: expected 1 to 128 letters, digits, '.', '_', '-' and ':', the first of them a letter or a digit"
)]
pub struct ModelIdError(String);

impl ModelId {
    /// # Errors
    /// The text is empty, too long, or has a character that is not allowed.
    pub fn new(text: impl Into<String>) -> Result<Self, ModelIdError> {
        let text = text.into();
        if is_model_id(&text) { Ok(Self(text)) } else { Err(ModelIdError(text)) }
    }

    /// A name that no client can give.
    pub(super) fn hidden(number: u64) -> Self {
        Self(format!("-{number}"))
    }

    /// True for a name of [`hidden`](Self::hidden).
    pub(super) fn is_hidden(&self) -> bool {
        self.0.starts_with('-')
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of its folder: ':' is written `%3A`.
    pub fn folder(&self) -> String {
        folder_name(&self.0)
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A request for one adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub model: ModelId,
    pub task: Task,
}

/// A task for an adapter. Tasks of one adapter are carried out in the order in which the engine gets them.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Make a new adapter. The same name with an equal spec again is no error and changes nothing.
    Create(AdapterSpec),
    /// Forward, and backward unless it is forward-only.
    Pass(Pass),
    OptimStep(OptimStep),
    /// Drop the gradients that were accumulated since the last step.
    AbortGradients,
    Save(Save),
    Load(Load),
    /// Move the adapter to disk, which frees its memory; its next task brings it back.
    Spill,
    /// Make a sampler of this name: a copy of the adapter as it is now, which samples and is never trained. No error
    /// where there is one of this name.
    Freeze(ModelId),
    /// Make a sampler of the values of a save, of any shape; the request's name is the sampler's. No error where there
    /// is one of this name.
    OpenSampler {
        folder: PathBuf,
    },
    /// Forget the adapter or the sampler. What is being sampled from it goes on to its end.
    Unload,
}

impl Task {
    /// Bytes of its data in memory.
    pub fn bytes(&self) -> usize {
        let Self::Pass(pass) = self else { return 0 };
        pass.data.iter().map(Datum::bytes).sum()
    }
}

/// The shape of an adapter, as it is created.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    pub rank: usize,
    pub alpha: f64,
    /// Names as in `lora.lora_target_modules`; `None`: the server's.
    pub targets: Option<Vec<String>>,
    /// Keeps the targets that are in attention.
    pub train_attn: bool,
    /// Keeps the targets that are in MLPs and experts.
    pub train_mlp: bool,
    /// Key of the initial values.
    pub seed: u64,
}

/// One forward, perhaps with backward, over some data.
#[derive(Clone, Debug, PartialEq)]
pub struct Pass {
    pub data: Vec<Datum>,
    pub loss: NamedLoss,
    /// False: no gradient is made.
    pub backward: bool,
}

/// One sequence of tokens with what its loss needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Datum {
    /// `[tokens]`
    pub ids: Vec<i64>,
    /// `[tokens × k]`, token by token: the ids that each token should predict, already shifted; negative where absent.
    pub targets: Vec<i64>,
    /// Targets a token, at least 1.
    pub k: usize,
    /// Other inputs of the loss by their names on the wire (`weights`, `logprobs`, `advantages`): `[tokens × k]` each.
    pub inputs: BTreeMap<String, Vec<f32>>,
}

impl Datum {
    fn bytes(&self) -> usize {
        let integers = size_of::<i64>() * (self.ids.len() + self.targets.len());
        let input = |(name, values): (&String, &Vec<f32>)| name.len() + size_of_val(&values[..]);
        size_of::<Self>() + integers + self.inputs.iter().map(input).sum::<usize>()
    }
}

/// The outcome of a [`Pass`].
#[derive(Clone, Debug, PartialEq)]
pub struct PassReply {
    /// Σ of the loss over all data, not divided.
    pub loss: f64,
    /// Targets that count for [`OptimStep::divide`]; see [`NamedLoss::valid`].
    pub valid: u64,
    /// `[tokens × k]` of each datum: log p of each target under the model; 0 where absent.
    pub log_probs: Vec<Vec<f32>>,
    /// Statistics of the loss, with the suffix that says how chunks combine: `ratio_mean:mean`.
    pub metrics: BTreeMap<String, f64>,
}

/// One update of an adapter, with the numbers of AdamW; another optimizer reads those that it has.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimStep {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    /// 0 or less: no limit.
    pub max_grad_norm: f64,
    /// True: the accumulated gradient is divided by the valid targets of its passes (xorl). False: it is their plain
    /// sum (tinker).
    pub divide: bool,
}

/// A number of an [`OptimStep`] that AdamW cannot take.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: expected {expected}, got {got}")]
pub struct StepError {
    field: &'static str,
    expected: &'static str,
    got: f64,
}

impl OptimStep {
    /// # Errors
    /// The first number that AdamW cannot take.
    pub fn check(&self) -> Result<(), StepError> {
        let &Self { lr, betas, eps, weight_decay, max_grad_norm, .. } = self;
        let (finite, betas_range) = (0.0..f64::INFINITY, 0.0..1.0);
        let (not_negative, below_1) = ("a number, 0 or more", "a number, 0 or more and below 1");
        let rules = [
            ("learning_rate", lr, finite.contains(&lr), not_negative),
            ("beta1", betas.0, betas_range.contains(&betas.0), below_1),
            ("beta2", betas.1, betas_range.contains(&betas.1), below_1),
            ("eps", eps, eps > 0.0 && eps.is_finite(), "a number above 0"),
            ("weight_decay", weight_decay, finite.contains(&weight_decay), not_negative),
            ("grad_clip_norm", max_grad_norm, !max_grad_norm.is_nan(), "a number; 0 is no limit"),
        ];
        match rules.into_iter().find(|(.., is_fine, _)| !is_fine) {
            Some((field, got, _, expected)) => Err(StepError { field, expected, got }),
            None => Ok(()),
        }
    }
}

/// The outcome of an [`OptimStep`].
#[derive(Clone, Debug, PartialEq)]
pub struct StepReply {
    /// Updates of the adapter so far, this one included.
    pub step: u64,
    /// L2 norm before clipping, of the gradient that was applied.
    pub grad_norm: f64,
    /// Parameters whose gradient is not finite, or whose value would not be after the update. Not empty: nothing was
    /// updated, and the gradients are dropped.
    pub non_finite: Vec<String>,
}

/// A save of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Save {
    /// The folder to make, below output_dir; the caller has checked that it stays there.
    pub folder: PathBuf,
    pub contents: Contents,
    /// Replace a save of the same name.
    pub overwrite: bool,
    /// Written into the save as it is.
    pub metadata: serde_json::Value,
}

/// The contents of a [`Save`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contents {
    /// The adapter alone.
    Adapter,
    /// With the optimizer's state and what was accumulated, so that training goes on from it.
    Training,
    /// The base with the adapter merged into it: an HF checkpoint that needs no adapter, with its weights in `dtype`;
    /// `None`: as the base has them.
    Merged { dtype: Option<DType> },
}

/// A load of saved values into an adapter of the same shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// The folder of the save.
    pub folder: PathBuf,
    /// True: with the optimizer's state.
    pub optimizer: bool,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Created,
    Passed(PassReply),
    Stepped(StepReply),
    /// The steps of the adapter so far.
    Aborted {
        step: u64,
    },
    /// The folder, and the bytes of its files.
    Saved {
        folder: PathBuf,
        bytes: u64,
    },
    Loaded {
        step: u64,
    },
    Spilled,
    /// A sampler is there.
    Sampler,
    Unloaded,
    /// The answer to [`Engine::sample`], as futures keep it.
    Sampled(SampleReply),
}

/// Why a request was not carried out. The adapter is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The client asked for what cannot be; the text says what to do.
    #[error("{0}")]
    User(String),
    /// The server could not, though the request was in order.
    #[error("{0}")]
    Server(String),
    /// A stop came first.
    #[error("the server is stopping; the request was not carried out, so send it again after its restart")]
    Stopping,
}

/// The answer of the engine.
pub type Answer = Result<Reply, Refusal>;

/// Takes requests to the engine. A wire has one; tests have one that answers by itself.
pub trait Engine: Send + Sync {
    /// Queues `request`. `answer` is called once, from a thread of the engine, and must not block.
    fn submit(&self, request: Request, answer: Box<dyn FnOnce(Answer) + Send>);

    /// Queues a request to sample, behind the tasks of its adapter that were submitted before. `listener` hears of its
    /// tokens and of its end.
    fn sample(&self, source: Source, request: SampleRequest, listener: Box<dyn Listener>) -> Ticket;

    /// Ends a request to sample within a step of the model; its answer is a refusal. One that has ended is no error.
    fn cancel(&self, ticket: Ticket);

    /// Ends all requests to sample and refuses later ones: the server is stopping.
    fn end_sampling(&self) {}

    /// The state that pages and metrics show.
    fn state(&self) -> EngineState;
}

/// The state of an engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EngineState {
    /// False once a rank has failed: the process is about to end.
    pub healthy: bool,
    /// Requests that wait or are being carried out.
    pub waiting: usize,
    /// Requests that were answered.
    pub answered: u64,
    /// Adapters by name.
    pub models: BTreeMap<String, ModelState>,
    /// Micro-batches that were computed. Data of several adapters share one.
    pub micro_batches: u64,
    /// Largest resident memory of each rank so far, in bytes; empty before the first micro-batch.
    pub peak_rss_bytes: Vec<u64>,
    pub usage: Usage,
    /// Samplers by name: adapters that are never trained.
    pub samplers: BTreeMap<String, SamplerState>,
    pub sampling: SamplingState,
}

/// Counts of requests to sample and of their tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SamplingState {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Continuations that get tokens.
    pub running: usize,
    /// Tokens so far.
    pub tokens: u64,
    /// Steps of the model so far, each with a token of every running continuation or part of a prompt.
    pub steps: u64,
}

/// A sampler as the engine has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SamplerState {
    pub rank: usize,
    /// False: it waits on disk.
    pub in_memory: bool,
    /// Bytes of a rank that it holds while it is in memory.
    pub bytes: u64,
    /// The time of its last use, in Unix seconds.
    pub last_used: u64,
}

/// Memory and disk that adapters take.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Usage {
    /// Bytes of a rank that adapters in memory hold.
    pub memory: u64,
    /// Bytes of a rank that they may hold; `None`: not known.
    pub memory_limit: Option<u64>,
    /// Adapters of the default shape that fit in memory together; `None`: not known.
    pub fits: Option<u64>,
    /// Times that an adapter went to disk, and came back.
    pub spilled: u64,
    pub restored: u64,
    /// Bytes of output_dir.
    pub storage: u64,
    pub storage_limit: Option<u64>,
}

/// An adapter as the engine has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelState {
    pub spec: AdapterSpec,
    /// Updates so far.
    pub step: u64,
    /// Passes with backward since the last update.
    pub accumulated: u64,
    /// False: it waits on disk.
    pub in_memory: bool,
    /// Bytes of a rank that it holds while it is in memory.
    pub bytes: u64,
    /// The time of its last task, in Unix seconds.
    pub last_used: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_id_is_a_safe_folder_name() {
        for good in ["default", "policy_v1", "sess-1:train:0", "a.b-c"] {
            assert_eq!(ModelId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "-a", "_a", "a b", "é", "a\0b", &"a".repeat(129)] {
            assert!(ModelId::new(bad).unwrap_err().to_string().starts_with("model_id"), "{bad}");
        }
        assert_eq!(ModelId::new("sess-1:train:0").unwrap().folder(), "sess-1%3Atrain%3A0");
    }
}
