//! Bodies that answer the calls of `tinker` clients. A field that is no `Option` is one that clients insist on. A
//! container's `tag` writes its constant field `type`.

use super::{
    calls::{CreateModel, IGNORED_UNEMBED},
    data::Limits,
};
use crate::server::request::{ModelId, StepReply};
use serde::Serialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};
use utoipa::ToSchema;

/// Data that clients put into one request, unless the server takes fewer.
const CHUNK_DATA: usize = 1024;

/// `client/config`: flags of the client. Those that are absent have the client's defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ClientConfig {
    pub pjwt_auth_enabled: bool,
    /// Data in one request.
    pub fwdbwd_max_chunk_len: usize,
    /// True: bodies of passes come compressed by zstd.
    pub proto_compress_fwdbwd: bool,
}

impl ClientConfig {
    pub fn new(limits: &Limits) -> Self {
        let fwdbwd_max_chunk_len = CHUNK_DATA.min(limits.data);
        Self { pjwt_auth_enabled: false, fwdbwd_max_chunk_len, proto_compress_fwdbwd: false }
    }
}

/// `client/dynamic_config`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct DynamicConfig {
    /// Seconds until the client asks again, at least 10.
    pub refresh_interval_sec: u64,
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
    pub lora_rank: usize,
    pub corrupted: bool,
    /// From [`utc`].
    pub last_request_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<Checkpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_sampler_checkpoint: Option<Checkpoint>,
    /// From [`CreateModel::text_metadata`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
}

impl CreateModel {
    /// The client's metadata as it expects it back: values that are no texts as JSON.
    pub fn text_metadata(&self) -> Option<BTreeMap<String, String>> {
        let text = |(name, value): (&String, &Value)| {
            (name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned))
        };
        self.user_metadata.as_ref().map(|metadata| metadata.iter().map(text).collect())
    }
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
    /// From [`utc`].
    pub time: String,
    pub tinker_path: String,
    pub size_bytes: u64,
    pub public: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<BTreeMap<String, String>>,
    /// From [`utc`]; `None`: never.
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
}

impl CheckpointType {
    /// The part of a path between the run and the name.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Training => "weights",
            Self::Sampler => "sampler_weights",
            Self::External => "external_weights",
        }
    }
}

/// `…/external_weights_urls`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ExternalWeightsUrls {
    /// Addresses by file; they are fetched without a key.
    pub urls: BTreeMap<String, String>,
    /// From [`utc`].
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

/// A time in UTC as ISO 8601 has it, to the second: `2026-11-29T08:30:00Z`.
pub fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years begin on 1 March here, so that the day of a leap year is the last; an era has 400 of them.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
