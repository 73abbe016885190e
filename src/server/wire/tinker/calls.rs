//! JSON bodies of the calls of `tinker` clients, and what they ask of the engine. Fields that are not named here are
//! ignored, for new clients send new ones.

use super::proto;
use crate::server::{
    request::{AdapterSpec, ModelId, ModelIdError, OptimStep, StepError},
    wire::scalar::{LARGEST_WHOLE, Scalar},
};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use utoipa::ToSchema;

pub use crate::server::sessions::model_id;

/// Seconds that a checkpoint may be kept at most: 10 years.
const LONGEST_TTL: i64 = 10 * 365 * 24 * 3600;

/// Why the body of a call was refused. Permanent: to be answered by 400 with this text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CallError {
    #[error("{field} of type {got:?}: server.yaml names the optimizer of all adapters; {remedy}")]
    Optimizer { field: &'static str, got: String, remedy: &'static str },
    #[error("adam_params.{0}")]
    Step(#[from] StepError),
    #[error("base_model {got:?}: this server trains {served:?} only")]
    BaseModel { got: String, served: String },
    #[error("lora_config.rank {0}: expected a positive number")]
    Rank(i64),
    #[error("lora_config: train_attn and train_mlp are both false, so nothing would be trained")]
    NothingToTrain,
    #[error("load_weights: expected either model_id, or session_id with model_seq_id for a new model")]
    LoadAddress,
    #[error(
        "save_weights_for_sampler: expected either path, the name of the checkpoint, or sampling_session_seq_id"
    )]
    SamplerSave,
    #[error("create_sampling_session: expected model_path with a tinker:// path, or base_model")]
    SamplingWeights,
    #[error("ttl_seconds {0}: expected 1 to {LONGEST_TTL}, or null to keep the checkpoint")]
    Ttl(i64),
    #[error(transparent)]
    Model(#[from] ModelIdError),
}

/// The place of a request in the order of its model. A request that is refused takes its place all the same, since the
/// client goes on with the next number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    pub model: Option<ModelId>,
    pub seq_id: Option<u64>,
}

impl Address {
    /// As far as it can be read from a JSON body whose other fields may be wrong.
    pub fn of(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Fields {
            #[serde(default)]
            model_id: Scalar,
            #[serde(default)]
            seq_id: Scalar,
        }
        let Ok(fields) = serde_json::from_slice::<Fields>(body) else { return Self::default() };
        let seq_id = match fields.seq_id {
            Scalar::Number(number) if number.fract() == 0.0 && (0.0..LARGEST_WHOLE).contains(&number) => {
                Some(number as u64)
            }
            _ => None,
        };
        Self { model: fields.model_id.text().and_then(|id| ModelId::new(id).ok()), seq_id }
    }

    /// As far as the first bytes of a pass as protobuf say, whose rest was not read.
    pub fn of_start(start: &[u8]) -> Self {
        let (model, seq_id) = proto::address(start);
        Self {
            model: model.and_then(|id| ModelId::new(id).ok()),
            seq_id: seq_id.and_then(|seq_id| u64::try_from(seq_id).ok()),
        }
    }
}

/// `create_session`
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub struct CreateSession {
    #[serde(default)]
    pub tags: Vec<String>,
    #[serde(default)]
    pub user_metadata: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    pub sdk_version: Option<String>,
    #[serde(default)]
    pub project_id: Option<String>,
    #[serde(default)]
    pub display_name: Option<String>,
}

/// `session_heartbeat`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct SessionHeartbeat {
    pub session_id: String,
}

/// The optimizer that a client chooses for a new model.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct OptimizerConfig {
    /// `adamw`
    #[serde(rename = "type")]
    pub kind: String,
}

impl OptimizerConfig {
    fn check(&self) -> Result<(), CallError> {
        if self.kind == "adamw" {
            return Ok(());
        }
        let remedy = "leave optimizer_config out";
        Err(CallError::Optimizer { field: "optimizer_config", got: self.kind.clone(), remedy })
    }
}

/// `create_model`
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub struct CreateModel {
    pub session_id: String,
    /// 0, 1, … in a session.
    pub model_seq_id: u64,
    pub base_model: String,
    #[serde(default)]
    pub lora_config: Option<LoraConfig>,
    #[serde(default)]
    pub optimizer_config: Option<OptimizerConfig>,
    #[serde(default)]
    pub user_metadata: Option<BTreeMap<String, Value>>,
}

/// `lora_config` of [`CreateModel`]. Alpha and targets are the server's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct LoraConfig {
    pub rank: i64,
    #[serde(default)]
    pub seed: Option<i64>,
    #[serde(default = "yes")]
    pub train_unembed: bool,
    #[serde(default = "yes")]
    pub train_mlp: bool,
    #[serde(default = "yes")]
    pub train_attn: bool,
}

fn yes() -> bool {
    true
}

/// Defaults of models whose client does not say.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelDefaults {
    /// The base by the name that clients are told.
    pub base_model: String,
    pub lora_rank: usize,
    pub lora_alpha: f64,
    pub seed: u64,
}

impl CreateModel {
    /// The adapter, and a warning where a switch is ignored.
    ///
    /// # Errors
    /// The server has another base or optimizer, or nothing would be trained.
    pub fn spec(&self, defaults: &ModelDefaults) -> Result<(AdapterSpec, Option<String>), CallError> {
        check_base(&self.base_model, defaults)?;
        self.optimizer_config.as_ref().map_or(Ok(()), OptimizerConfig::check)?;
        let lora = self.lora_config.as_ref();
        let rank = match lora.map(|lora| lora.rank) {
            None => defaults.lora_rank,
            Some(rank) if rank > 0 => rank as usize,
            Some(rank) => return Err(CallError::Rank(rank)),
        };
        let train_attn = lora.is_none_or(|lora| lora.train_attn);
        let train_mlp = lora.is_none_or(|lora| lora.train_mlp);
        if !train_attn && !train_mlp {
            return Err(CallError::NothingToTrain);
        }
        let seed = lora.and_then(|lora| lora.seed).map_or(defaults.seed, i64::cast_unsigned);
        let alpha = defaults.lora_alpha;
        let spec = AdapterSpec { rank, alpha, targets: None, train_attn, train_mlp, seed };
        let is_ignored = lora.is_some_and(|lora| lora.train_unembed);
        Ok((spec, is_ignored.then(|| IGNORED_UNEMBED.to_owned())))
    }
}

/// The warning about a switch that clients set without being asked.
pub(super) const IGNORED_UNEMBED: &str =
    "train_unembed is ignored: adapters on the unembedding are not trained here";

fn check_base(got: &str, defaults: &ModelDefaults) -> Result<(), CallError> {
    if got == defaults.base_model {
        return Ok(());
    }
    Err(CallError::BaseModel { got: got.to_owned(), served: defaults.base_model.clone() })
}

/// `get_info` and `unload_model`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct ModelCall {
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: String,
}

/// `optim_step`
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub struct OptimStepCall {
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: String,
    #[serde(default)]
    pub seq_id: Option<u64>,
    #[serde(default)]
    pub adam_params: Option<AdamParams>,
    #[serde(default)]
    pub optimizer_params: Option<OptimizerConfig>,
}

/// Parameters of one update; the defaults are the client's.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(default)]
pub struct AdamParams {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// 0: no clipping.
    pub grad_clip_norm: f64,
}

impl Default for AdamParams {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }
}

impl OptimStepCall {
    /// # Errors
    /// Another optimizer is asked for, or a parameter is out of its range.
    pub fn step(&self) -> Result<OptimStep, CallError> {
        if let Some(OptimizerConfig { kind }) = &self.optimizer_params {
            let remedy = "send adam_params";
            return Err(CallError::Optimizer { field: "optimizer_params", got: kind.clone(), remedy });
        }
        let params = self.adam_params.unwrap_or_default();
        let step = OptimStep {
            lr: params.learning_rate,
            betas: (params.beta1, params.beta2),
            eps: params.eps,
            weight_decay: params.weight_decay,
            max_grad_norm: params.grad_clip_norm,
            divide: false,
        };
        step.check()?;
        Ok(step)
    }
}

/// `save_weights` and `save_weights_external`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct SaveWeights {
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: String,
    #[serde(default)]
    pub seq_id: Option<u64>,
    /// The name of the checkpoint; the server finds one where it is absent.
    #[serde(default)]
    pub path: Option<String>,
    #[serde(default)]
    pub ttl_seconds: Option<i64>,
    #[serde(default)]
    pub overwrite: bool,
    #[serde(default)]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// Keys to encrypt external weights for.
    #[serde(default)]
    pub age_encryption_recipients: Option<Vec<String>>,
}

/// `save_weights_for_sampler`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct SaveWeightsForSampler {
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: String,
    #[serde(default)]
    pub seq_id: Option<u64>,
    #[serde(default)]
    pub path: Option<String>,
    #[serde(default)]
    pub sampling_session_seq_id: Option<u64>,
    #[serde(default)]
    pub ttl_seconds: Option<i64>,
    #[serde(default)]
    pub user_metadata: Option<BTreeMap<String, String>>,
}

/// The destination of weights for sampling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SamplerSave<'a> {
    /// A checkpoint of this name.
    Named(&'a str),
    /// A sampling session of the weights as they are; nothing need touch the disk.
    Ephemeral { sampling_session_seq_id: u64 },
}

impl SaveWeightsForSampler {
    /// # Errors
    /// Both forms, or none.
    pub fn target(&self) -> Result<SamplerSave<'_>, CallError> {
        match (&self.path, self.sampling_session_seq_id) {
            (Some(name), None) => Ok(SamplerSave::Named(name)),
            (None, Some(sampling_session_seq_id)) => Ok(SamplerSave::Ephemeral { sampling_session_seq_id }),
            _ => Err(CallError::SamplerSave),
        }
    }
}

/// `create_sampling_session`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = tinker::CreateSamplingSession)]
pub struct CreateSamplingSession {
    pub session_id: String,
    /// 0, 1, … in a session, samplers of models as they are among them.
    pub sampling_session_seq_id: u64,
    /// The base, by the name that clients are told.
    #[serde(default)]
    pub base_model: Option<String>,
    /// A saved adapter.
    #[serde(default)]
    #[schema(example = "tinker://default/sampler_weights/step_1")]
    pub model_path: Option<String>,
}

/// The weights of a sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplingWeights<'a> {
    Base,
    /// Those of a save.
    Path(&'a str),
}

impl<'a> SamplingWeights<'a> {
    /// A path goes before the base, which it then stands on.
    ///
    /// # Errors
    /// Neither is there.
    pub fn of(base_model: Option<&'a str>, model_path: Option<&'a str>) -> Result<Self, CallError> {
        match (base_model, model_path) {
            (_, Some(path)) => Ok(Self::Path(path)),
            (Some(_), None) => Ok(Self::Base),
            (None, None) => Err(CallError::SamplingWeights),
        }
    }
}

/// `join_sampling_session`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct SamplingSessionCall {
    pub sampling_session_id: String,
}

/// `retrieve_futures`
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub struct RetrieveFutures {
    pub target: FuturesTarget,
    /// The cursor of the answer before: ends up to it are known. 0: none are.
    #[serde(default)]
    pub prev_cursor: u64,
    /// Seconds to wait for an end, at most 30; 0: answer now.
    #[serde(default)]
    pub timeout: Option<f64>,
}

/// The requests of a client of a sampling session.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct FuturesTarget {
    pub sampling_session_id: String,
    /// 0: the first client. Else as `join_sampling_session` says.
    #[serde(default)]
    pub cloned_sampler_id: u64,
}

/// `load_weights`
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub struct LoadWeights {
    /// A `tinker://` path.
    pub path: String,
    /// True: with the optimizer's state.
    pub optimizer: bool,
    #[serde(default)]
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: Option<String>,
    #[serde(default)]
    pub seq_id: Option<u64>,
    #[serde(default)]
    pub session_id: Option<String>,
    #[serde(default)]
    pub model_seq_id: Option<u64>,
    #[serde(default)]
    pub base_model: Option<String>,
    #[serde(default)]
    pub optimizer_config: Option<OptimizerConfig>,
    #[serde(default)]
    pub user_metadata: Option<BTreeMap<String, Value>>,
}

/// The model that gets loaded weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadTarget {
    /// One that this call creates, with the shape of the checkpoint.
    New(ModelId),
    Existing(ModelId),
}

impl LoadWeights {
    /// # Errors
    /// Both forms or none, or the server has another base or optimizer.
    pub fn target(&self, defaults: &ModelDefaults) -> Result<LoadTarget, CallError> {
        self.base_model.as_ref().map_or(Ok(()), |base| check_base(base, defaults))?;
        self.optimizer_config.as_ref().map_or(Ok(()), OptimizerConfig::check)?;
        match (&self.model_id, &self.session_id, self.model_seq_id) {
            (Some(model), None, None) => Ok(LoadTarget::Existing(ModelId::new(model)?)),
            (None, Some(session), Some(index)) => Ok(LoadTarget::New(model_id(session, index)?)),
            _ => Err(CallError::LoadAddress),
        }
    }
}

/// `weights_info`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct WeightsInfoCall {
    #[schema(example = "tinker://default/weights/step_1")]
    pub tinker_path: String,
}

/// `…/checkpoints/…/ttl`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct SetTtl {
    #[serde(default)]
    pub ttl_seconds: Option<i64>,
}

/// Seconds that a checkpoint is kept; `None`: for ever.
///
/// # Errors
/// Not 1 second to 10 years.
pub fn ttl(seconds: Option<i64>) -> Result<Option<u64>, CallError> {
    match seconds {
        Some(seconds) if !(1..=LONGEST_TTL).contains(&seconds) => Err(CallError::Ttl(seconds)),
        seconds => Ok(seconds.map(i64::unsigned_abs)),
    }
}

/// `copy_weights`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct CopyWeights {
    /// A `tinker://` path.
    #[schema(example = "tinker://default/weights/step_1")]
    pub source_path: String,
    #[serde(default)]
    pub session_id: Option<String>,
    #[serde(default)]
    pub model_seq_id: Option<u64>,
    #[serde(default)]
    pub ttl_seconds: Option<i64>,
}

/// `retrieve_future`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct RetrieveFuture {
    pub request_id: String,
}

/// The query of a list: items from `offset` on, at most `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Page {
    pub limit: usize,
    pub offset: usize,
}

impl Default for Page {
    fn default() -> Self {
        Self { limit: 20, offset: 0 }
    }
}
