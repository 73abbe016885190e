//! JSON bodies of the answers: those that come at once, and results of futures.

use crate::server::request::{ModelId, PassReply};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{borrow::Cow, collections::BTreeMap, path::PathBuf};
use utoipa::ToSchema;

/// A request that was taken: its result is there for `retrieve_future`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Submitted)]
pub struct Submitted<'a> {
    pub request_id: String,
    #[schema(value_type = String)]
    pub model_id: &'a ModelId,
}

/// `get_info`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Info)]
pub struct Info {
    pub r#type: &'static str,
    #[schema(value_type = String)]
    pub model_id: ModelId,
    pub model_name: String,
    pub model_data: ModelData,
    pub is_lora: bool,
    pub lora_rank: usize,
    pub lora_alpha: f64,
}

/// The base of an adapter.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::ModelData)]
pub struct ModelData {
    /// `LlamaForCausalLM`
    pub arch: String,
    pub model_name: String,
    /// The folder of the tokenizer.
    #[schema(value_type = String)]
    pub tokenizer_id: PathBuf,
}

/// `session_info`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::SessionInfo)]
pub struct SessionInfo {
    #[schema(value_type = String)]
    pub model_id: ModelId,
    #[schema(value_type = String)]
    pub session_id: ModelId,
    pub base_model: String,
    pub is_lora: bool,
    pub lora_rank: usize,
    pub lora_alpha: f64,
    /// Updates so far.
    pub step: u64,
    /// Passes with backward since the last update.
    pub accumulated_passes: u64,
    pub last_request_time: Option<String>,
}

/// `training_runs`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::TrainingRuns)]
pub struct TrainingRuns {
    pub training_runs: Vec<TrainingRun>,
    pub cursor: Cursor,
}

/// An adapter as `training_runs` lists it.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::TrainingRun)]
pub struct TrainingRun {
    #[schema(value_type = String)]
    pub training_run_id: ModelId,
    pub base_model: String,
    pub model_owner: String,
    pub is_lora: bool,
    pub lora_rank: usize,
    pub corrupted: bool,
    pub last_request_time: String,
    pub last_checkpoint: Option<Checkpoint>,
    pub last_sampler_checkpoint: Option<Checkpoint>,
}

/// A place in a list.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Cursor)]
pub struct Cursor {
    pub offset: usize,
    pub limit: usize,
    pub total_count: usize,
}

/// A saved adapter.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Checkpoint)]
pub struct Checkpoint {
    /// `weights/step_1`
    pub checkpoint_id: String,
    /// `training`, `sampler`, `external` or `full`
    pub checkpoint_type: &'static str,
    pub time: String,
    pub path: String,
    pub size_bytes: u64,
}

/// `list_checkpoints`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Checkpoints)]
pub struct Checkpoints {
    pub checkpoints: Vec<Checkpoint>,
}

/// `delete_checkpoint`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Deleted)]
pub struct Deleted {
    pub success: bool,
    pub deleted_path: String,
    pub error: Option<String>,
}

/// `weights_info`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::StoredInfo)]
pub struct StoredInfo {
    #[schema(value_type = String)]
    pub model_id: ModelId,
    pub base_model: String,
    pub is_lora: bool,
    pub lora_rank: usize,
    pub lora_config: StoredShape,
    pub size_bytes: u64,
}

/// Rank and scale of a saved adapter.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::StoredShape)]
pub struct StoredShape {
    pub rank: usize,
    pub alpha: f64,
}

/// `kill_session`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Killed)]
pub struct Killed {
    pub success: bool,
    pub message: String,
    pub checkpoint_path: Option<String>,
}

/// The result of `create_model` and of `unload_model`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::ModelResult)]
pub struct ModelResult<'a> {
    #[schema(value_type = String)]
    pub model_id: &'a ModelId,
    pub r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning_message: Option<&'a str>,
}

/// The result of `forward_backward` and of `forward`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::PassResult)]
pub struct PassResult<'a> {
    pub loss_fn_output_type: &'static str,
    /// One for each datum, in order.
    pub loss_fn_outputs: Vec<LossOutput<'a>>,
    pub metrics: BTreeMap<&'a str, f64>,
    #[schema(value_type = Object)]
    pub info: Map<String, Value>,
}

/// The result of a datum.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::LossOutput)]
pub struct LossOutput<'a> {
    pub logprobs: TensorData<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elementwise_loss: Option<TensorData<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = xorl::TensorData)]
pub struct TensorData<'a> {
    #[schema(value_type = Vec<f32>)]
    pub data: Cow<'a, [f32]>,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
}

impl<'a> TensorData<'a> {
    pub fn floats(data: impl Into<Cow<'a, [f32]>>, shape: Vec<usize>) -> Self {
        Self { data: data.into(), dtype: "float32", shape }
    }
}

impl PassResult<'_> {
    /// Sums and means of a pass.
    pub fn metrics(pass: &PassReply) -> BTreeMap<&str, f64> {
        let mut metrics: BTreeMap<&str, f64> =
            pass.metrics.iter().map(|(name, &value)| (name.as_str(), value)).collect();
        metrics.insert("loss:sum", pass.loss);
        metrics.insert("loss:mean", pass.loss / (pass.valid.max(1) as f64));
        metrics.insert("valid_tokens:sum", pass.valid as f64);
        metrics
    }
}

/// The result of `optim_step`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::StepResult)]
pub struct StepResult {
    pub metrics: BTreeMap<&'static str, f64>,
    #[schema(value_type = Object)]
    pub info: Value,
}

/// The result of `abort_gradient_epoch`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::AbortResult)]
pub struct AbortResult<'a> {
    pub success: bool,
    #[schema(value_type = String)]
    pub model_id: &'a ModelId,
    /// Updates so far.
    pub step: u64,
    pub forward_backward_step: u64,
    #[schema(value_type = Object)]
    pub info: Map<String, Value>,
}

/// The result of `save_weights` and of `save_weights_for_sampler`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::SaveResult)]
pub struct SaveResult<'a> {
    /// `xorl://model/weights/name`
    pub path: &'a str,
    /// The folder on the server.
    #[schema(value_type = String)]
    pub model_path: &'a std::path::Path,
    pub size_bytes: u64,
}

/// `save_full_weights_safetensors`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::FullWeights)]
pub struct FullWeights<'a> {
    /// The folder on the server.
    #[schema(value_type = String)]
    pub path: &'a std::path::Path,
    /// As it was asked for.
    pub dtype: &'static str,
    /// Files of weights.
    pub num_shards: usize,
    /// `xorl://model/full_weights/name`
    pub xorl_path: &'a str,
    pub size_bytes: u64,
}

/// The result of `load_weights`.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::LoadResult)]
pub struct LoadResult<'a> {
    pub path: &'a str,
    /// Updates that the optimizer has seen.
    pub step: u64,
}

/// `create_sampling_session`
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::SamplingSession)]
pub struct SamplingSession {
    pub success: bool,
    /// The `lora_path` for `/generate`.
    pub lora_name: String,
    pub model_path: String,
    pub message: String,
}

/// `/generate`: a list where several continuations were asked for.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = xorl::Generated)]
pub enum Generated {
    One(Generation),
    Many(Vec<Generation>),
}

/// A continuation.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Generation)]
pub struct Generation {
    /// Without the token or text that ended it. Absent where the server has no tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub output_ids: Vec<i64>,
    pub meta_info: Meta,
}

/// A scored token: its log-probability, its id, and null in the place of its text.
pub type Scored = (f32, i64, ());

/// Facts about a continuation.
#[derive(Serialize, ToSchema)]
#[schema(as = xorl::Meta)]
pub struct Meta {
    pub id: String,
    /// `stop` or `length`
    pub finish_reason: &'static str,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// Log-probability, id and null of each token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Value>>>)]
    pub output_token_logprobs: Option<Vec<Scored>>,
    /// The same of the most likely tokens at each position.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<Value>>>>)]
    pub output_top_logprobs: Option<Vec<Vec<Scored>>>,
}
