//! JSON bodies of the calls, passes apart. Fields that are not named here are ignored, for clients send others, and
//! null counts as absent.

use crate::dtype::DType;
use serde::Deserialize;
use utoipa::ToSchema;

/// The adapter and the number of a request, in every body.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::Address)]
pub struct Address {
    /// Name of the adapter; `default` where it is absent.
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub model_id: Option<String>,
    /// Another name of `model_id`, read where that is absent.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    pub session_id: Option<String>,
    /// A number that no other request since `create_model` has. The same body again gets the first one's future.
    pub seq_id: Option<i64>,
}

/// `create_model`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::CreateModel)]
pub struct CreateModel {
    /// The base that this server trains.
    pub base_model: Option<String>,
    pub lora_config: Option<LoraConfig>,
}

/// The shape of an adapter; the server's own where a field is absent.
#[derive(Default, Deserialize, ToSchema)]
#[schema(as = xorl::LoraConfig)]
pub struct LoraConfig {
    #[schema(minimum = 1, example = 8)]
    pub rank: Option<f64>,
    /// Another name of `rank`, which goes before it.
    #[schema(minimum = 1, example = 8)]
    pub lora_rank: Option<f64>,
    #[schema(exclusive_minimum = 0, example = 16)]
    pub alpha: Option<f64>,
    /// Another name of `alpha`, which goes before it.
    #[schema(exclusive_minimum = 0, example = 16)]
    pub lora_alpha: Option<f64>,
    /// Names of linear layers.
    #[schema(example = json!(["q_proj", "v_proj"]))]
    pub target_modules: Option<Vec<String>>,
    /// Keeps the targets that are in attention.
    pub train_attn: Option<bool>,
    /// Keeps the targets that are in MLPs and experts.
    pub train_mlp: Option<bool>,
    /// Key of the initial values.
    pub seed: Option<i64>,
    /// Ignored, with a warning where it is not 0.
    #[schema(minimum = 0, maximum = 1, example = 0)]
    pub dropout: Option<f64>,
    /// Another name of `dropout`, read where that is absent.
    #[schema(minimum = 0, maximum = 1, example = 0)]
    pub lora_dropout: Option<f64>,
}

/// `optim_step`. Values beside `adam_params` go before those in it, and these before the server's own.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::OptimStep)]
pub struct OptimStep {
    #[schema(minimum = 0, example = 1e-4)]
    pub learning_rate: Option<f64>,
    /// Another name of `learning_rate`, read where that is absent.
    #[schema(minimum = 0, example = 1e-4)]
    pub lr: Option<f64>,
    /// Largest L2 norm of the gradient; 0 or less: no limit.
    pub gradient_clip: Option<f64>,
    pub adam_params: Option<AdamParams>,
}

/// Parameters of an update by AdamW.
#[derive(Default, Deserialize, ToSchema)]
#[schema(as = xorl::AdamParams)]
pub struct AdamParams {
    #[schema(minimum = 0, example = 1e-4)]
    pub learning_rate: Option<f64>,
    /// Another name of `learning_rate`, read where that is absent.
    #[schema(minimum = 0, example = 1e-4)]
    pub lr: Option<f64>,
    #[schema(minimum = 0, exclusive_maximum = 1, example = 0.9)]
    pub beta1: Option<f64>,
    #[schema(minimum = 0, exclusive_maximum = 1, example = 0.95)]
    pub beta2: Option<f64>,
    #[schema(exclusive_minimum = 0, example = 1e-12)]
    pub eps: Option<f64>,
    #[schema(minimum = 0, example = 0.01)]
    pub weight_decay: Option<f64>,
    /// Largest L2 norm of the gradient; 0 or less: no limit.
    pub grad_clip_norm: Option<f64>,
}

/// `save_weights`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::SaveWeights)]
pub struct SaveWeights {
    /// A name, `xorl://model/weights/name`, or a folder below the server's; `checkpoint-{milliseconds}` where absent.
    #[schema(example = "step_1")]
    pub path: Option<String>,
    /// Replace a save of the same name.
    pub overwrite: Option<bool>,
}

/// `save_weights_for_sampler`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::SaveForSampler)]
pub struct SaveForSampler {
    /// The name of the save; also read as `path`.
    #[serde(alias = "path")]
    #[schema(example = "sampler_1")]
    pub name: String,
    /// Replace a save of the same name.
    pub overwrite: Option<bool>,
}

/// `save_full_weights_safetensors`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::SaveFullWeights)]
pub struct SaveFullWeights {
    /// The name of the save; also read as `path`.
    #[serde(alias = "path")]
    #[schema(example = "full_1")]
    pub name: String,
    pub dtype: Option<FullDtype>,
    /// The base that this server trains; another is refused.
    pub base_model_path: Option<String>,
    /// Replace a save of the same name.
    pub overwrite: Option<bool>,
}

/// The type of the weights of a whole model; `bfloat16` where it is absent.
#[derive(Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = xorl::FullDtype)]
pub enum FullDtype {
    #[default]
    Bfloat16,
    Float32,
    /// That of the base, tensor by tensor: packed where the base is.
    Base,
}

impl FullDtype {
    /// Its name, and the dtype of all weights.
    pub fn of_weights(self) -> (&'static str, Option<DType>) {
        let dtype = match self {
            Self::Bfloat16 => DType::Bf16,
            Self::Float32 => DType::F32,
            Self::Base => return ("base", None),
        };
        (dtype.name(), Some(dtype))
    }
}

/// `load_weights`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::LoadWeights)]
pub struct LoadWeights {
    /// A name, `xorl://model/weights/name`, or a folder below the server's.
    #[schema(example = "step_1")]
    pub path: String,
    /// False: without the optimizer's state. True where it is absent.
    pub optimizer: Option<bool>,
}

/// `delete_checkpoint`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::DeleteCheckpoint)]
pub struct DeleteCheckpoint {
    /// A name as `list_checkpoints` gives it, or `xorl://model/weights/name`; also read as `path`.
    #[serde(alias = "path")]
    #[schema(example = "weights/step_1")]
    pub checkpoint_id: String,
}

/// `weights_info`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::WeightsInfo)]
pub struct WeightsInfo {
    /// `xorl://model/weights/name`, or a name; also read as `path`.
    #[serde(alias = "path")]
    #[schema(example = "xorl://default/weights/step_1")]
    pub xorl_path: String,
}

/// `kill_session`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::KillSession)]
pub struct KillSession {
    /// False: without a save before the end. True where it is absent.
    pub save_checkpoint: Option<bool>,
}

/// `create_sampling_session`
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::CreateSamplingSession)]
pub struct CreateSamplingSession {
    /// A saved adapter: `xorl://model/sampler_weights/name`, or a name as `list_checkpoints` gives it.
    #[schema(example = "xorl://default/sampler_weights/sampler_1")]
    pub model_path: String,
}

/// `/generate`, as SGLang has it. Fields of SGLang's that are not built are refused by name.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::Generate)]
pub struct Generate {
    /// A prompt as text; special tokens in it are recognised, and none are added.
    pub text: Option<String>,
    /// A prompt as token ids.
    #[schema(example = json!([1, 2, 3]))]
    pub input_ids: Option<Vec<i64>>,
    pub sampling_params: Option<SamplingParams>,
    /// True: with the log-probability of each new token.
    pub return_logprob: Option<bool>,
    /// Most likely tokens that are told at each new position, if `return_logprob` is true.
    #[schema(minimum = 0, maximum = 128, example = 0)]
    pub top_logprobs_num: Option<usize>,
    /// The `lora_name` of a sampling session, or the path of a saved adapter; the base where it is absent.
    pub lora_path: Option<String>,
}

/// The way in which tokens are chosen.
#[derive(Default, Deserialize, ToSchema)]
#[schema(as = xorl::SamplingParams)]
pub struct SamplingParams {
    /// New tokens at most; 128 where it is absent.
    #[schema(minimum = 1, example = 4)]
    pub max_new_tokens: Option<i64>,
    #[schema(minimum = 0, example = 1)]
    pub temperature: Option<f64>,
    #[schema(exclusive_minimum = 0, maximum = 1, example = 1)]
    pub top_p: Option<f64>,
    /// -1: all tokens.
    #[schema(minimum = -1, example = -1)]
    pub top_k: Option<i64>,
    /// Continuations.
    #[schema(minimum = 1, maximum = 1024, example = 1)]
    pub n: Option<i64>,
    pub stop: Option<StopTexts>,
    /// Beside the model's end tokens.
    pub stop_token_ids: Option<Vec<i64>>,
    /// True: the model's end tokens end nothing.
    pub ignore_eos: Option<bool>,
    /// Another one at each request where it is absent.
    pub seed: Option<i64>,
    /// Another name of `seed`, which goes before it.
    pub sampling_seed: Option<i64>,
    /// False: special tokens are in the text.
    pub skip_special_tokens: Option<bool>,
}

/// A text that ends a continuation, or several.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
#[schema(as = xorl::Stop)]
pub enum StopTexts {
    One(String),
    Many(Vec<String>),
}

impl StopTexts {
    pub fn into_list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}
