//! Bodies that answer the calls of `tinker` clients. A field that is no `Option` is one that clients insist on. A
//! container's `tag` writes its constant field `type`.

use super::{calls::IGNORED_UNEMBED, data::Limits};
use crate::server::{
    paths::Kind,
    request::{ModelId, StepReply},
};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Data that clients put into one request, unless the server takes fewer.
pub const CHUNK_DATA: usize = 1024;

/// `client/config`: flags of the client. Those that are absent have the client's defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ClientConfig {
    pub pjwt_auth_enabled: bool,
    /// Data in one request.
    pub fwdbwd_max_chunk_len: usize,
    /// True: bodies of passes come compressed by zstd.
    pub proto_compress_fwdbwd: bool,
    /// True: clients wait for the ends of all samples of a session by one call, `retrieve_futures`.
    pub sample_use_retrieve_futures: bool,
    /// True: clients of a session that other processes have join it by `join_sampling_session`.
    pub sample_join_sampling_session: bool,
    /// True: clients of 0.24, too, create models from saved weights by `load_weights` alone.
    pub create_model_via_load_weights: bool,
}

impl ClientConfig {
    pub fn new(limits: &Limits) -> Self {
        let fwdbwd_max_chunk_len = CHUNK_DATA.min(limits.data);
        Self {
            pjwt_auth_enabled: false,
            fwdbwd_max_chunk_len,
            proto_compress_fwdbwd: false,
            sample_use_retrieve_futures: true,
            sample_join_sampling_session: true,
            create_model_via_load_weights: true,
        }
    }
}

/// `client/dynamic_config`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DynamicConfig {
    /// Seconds until the client asks again, at least 10.
    pub refresh_interval_sec: u64,
    /// True: samples that nobody waits for are cancelled.
    pub sample_cancel_enabled: bool,
}

/// `create_session`; the client logs the messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "create_session")]
pub struct CreatedSession {
    pub session_id: String,
    pub info_message: String,
    pub warning_message: String,
}

impl CreatedSession {
    /// `lora_alpha`: of every adapter, as clients cannot choose it.
    pub fn new(session_id: String, lora_alpha: f64) -> Self {
        let info_message = format!("every adapter has alpha {lora_alpha}");
        Self { session_id, info_message, warning_message: IGNORED_UNEMBED.to_owned() }
    }
}

/// The answer to a call that has nothing to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Done {}

/// `session_heartbeat`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "session_heartbeat")]
pub struct Heartbeat {}

/// `telemetry`, which is dropped, and `healthz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Status {
    status: &'static str,
}

impl Status {
    pub const ACCEPTED: Self = Self { status: "accepted" };
    pub const OK: Self = Self { status: "ok" };
}

/// A request that was taken: its result is asked for by `request_id`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Submitted {
    pub request_id: String,
    pub model_id: String,
}

impl Submitted {
    pub fn new(request_id: String, model: &ModelId) -> Self {
        Self { request_id, model_id: model.to_string() }
    }
}

/// The result of `create_model`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "create_model")]
pub struct CreatedModel {
    pub model_id: String,
    /// Names switches that are ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning_message: Option<String>,
}

/// The result of `unload_model`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "unload_model")]
pub struct UnloadedModel {
    pub model_id: String,
}

/// `get_info`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "get_info")]
pub struct ModelInfo {
    pub model_data: ModelData,
    pub model_id: String,
    pub model_name: String,
    pub is_lora: bool,
    pub lora_rank: usize,
}

/// The base of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ModelData {
    pub arch: String,
    pub model_name: String,
    /// An absolute directory keeps clients on this host from asking a hub.
    pub tokenizer_id: String,
}

impl ModelInfo {
    pub fn new(model: &ModelId, lora_rank: usize, base: ModelData) -> Self {
        let model_name = base.model_name.clone();
        Self { model_data: base, model_id: model.to_string(), model_name, is_lora: true, lora_rank }
    }
}

/// The result of `optim_step`.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Stepped {
    pub metrics: BTreeMap<&'static str, f64>,
}

impl Stepped {
    /// Leaves out a norm that is not finite, which JSON cannot hold.
    pub fn new(reply: &StepReply, lr: f64) -> Self {
        let metrics = [
            ("step", reply.step as f64),
            ("learning_rate", lr),
            ("grad_norm", reply.grad_norm),
            ("non_finite_parameters", reply.non_finite.len() as f64),
        ];
        Self { metrics: metrics.into_iter().filter(|(_, value)| value.is_finite()).collect() }
    }
}

/// The result of `save_weights`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "save_weights")]
pub struct SavedWeights {
    pub path: String,
}

/// The result of `save_weights_external`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "save_weights_external")]
pub struct SavedExternalWeights {
    pub path: String,
    pub size_bytes: u64,
}

/// The result of `save_weights_for_sampler`: `path` of the named form, `sampling_session_id` of the ephemeral one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "save_weights_for_sampler")]
pub struct SavedSamplerWeights {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling_session_id: Option<String>,
}

/// `create_sampling_session`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "create_sampling_session")]
#[schema(as = tinker::CreatedSamplingSession)]
pub struct CreatedSamplingSession {
    pub sampling_session_id: String,
}

/// `samplers/{sampler}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Sampler {
    pub sampler_id: String,
    pub base_model: String,
    /// The path of the saved adapter, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_path: Option<String>,
}

/// A request to sample that was taken: its result is asked for by `request_id`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct SubmittedSample {
    pub request_id: String,
    /// One a continuation; none has the same.
    pub sample_sequence_ids: Vec<String>,
}

/// `join_sampling_session`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "join_sampling_session")]
pub struct JoinedSamplingSession {
    /// The client's number: it has the request numbers from a milliard times it on.
    pub client_counter: u64,
}

/// `retrieve_futures`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Completions {
    /// For the next call.
    pub cursor: u64,
    pub completions: Vec<Completion>,
}

/// A request that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Completion {
    /// `finished` or `failed`
    pub state: &'static str,
    pub request_id: String,
}

/// The result of `load_weights`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "type", rename = "load_weights")]
pub struct LoadedWeights {
    pub path: String,
    pub model_id: String,
}

/// `copy_weights`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct CopiedWeights {
    pub tinker_path: String,
}

/// `weights_info`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct WeightsInfo {
    pub base_model: String,
    pub is_lora: bool,
    pub lora_rank: usize,
    pub train_unembed: bool,
    pub train_mlp: bool,
    pub train_attn: bool,
}

/// `get_server_capabilities`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Capabilities {
    pub supported_models: Vec<SupportedModel>,
}

/// A base that the server has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct SupportedModel {
    pub model_name: String,
    /// In tokens.
    pub max_context_length: usize,
    pub trainable: bool,
    pub sampleable: bool,
}

/// The part of a list that a reply has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Cursor {
    pub offset: usize,
    pub limit: usize,
    pub total_count: usize,
}

/// `training_runs`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct TrainingRuns {
    pub training_runs: Vec<TrainingRun>,
    pub cursor: Cursor,
}

/// `training_runs/{training_run_id}`: a model with its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct TrainingRun {
    pub training_run_id: String,
    pub base_model: String,
    pub model_owner: String,
    pub is_lora: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<usize>,
    pub corrupted: bool,
    /// From [`iso_time`](crate::server::wire::iso_time).
    pub last_request_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<Checkpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_sampler_checkpoint: Option<Checkpoint>,
    /// From [`texts`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
}

/// The client's metadata as it expects it back: values that are no texts as JSON.
pub fn texts(metadata: &BTreeMap<String, Value>) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    metadata.iter().map(|(name, value)| (name.clone(), text(value))).collect()
}

/// `training_runs/{training_run_id}/checkpoints` and `checkpoints`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Checkpoints {
    pub checkpoints: Vec<Checkpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// Saved weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Checkpoint {
    /// `weights/x`: the last two parts of `tinker_path`.
    pub checkpoint_id: String,
    pub checkpoint_type: CheckpointType,
    /// From [`iso_time`](crate::server::wire::iso_time).
    pub time: String,
    pub tinker_path: String,
    pub size_bytes: u64,
    pub public: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// From [`iso_time`](crate::server::wire::iso_time); `None`: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
}

/// The use of saved weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointType {
    Training,
    Sampler,
    External,
    Full,
}

impl From<Kind> for CheckpointType {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Weights => Self::Training,
            Kind::Sampler => Self::Sampler,
            Kind::External => Self::External,
            Kind::Full => Self::Full,
        }
    }
}

/// `…/external_weights_urls`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ExternalWeightsUrls {
    /// Addresses by file; they are fetched without a key.
    pub urls: BTreeMap<String, String>,
    /// From [`iso_time`](crate::server::wire::iso_time).
    pub expires: String,
}

/// `sessions`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Sessions {
    pub sessions: Vec<String>,
}

/// `sessions/{session_id}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Session {
    pub training_run_ids: Vec<String>,
    pub sampler_ids: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
}
