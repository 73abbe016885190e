//! The body of `asample` to a request of the engine. Pure.

use super::{
    data::JsonModelInput,
    tensor::{Csr, JsonTensor, TensorError},
};
use crate::{
    infer::request::{MOST_TOP, PromptTargets, SampleRequest, Stop, Wanted},
    server::{
        app::Settings,
        wire::sampling::{Names, SampleError, Sent, check_ids, checked},
    },
};
use serde::Deserialize;
use utoipa::ToSchema;

const TARGETS: &str = "target_prompt_logprobs";

const NAMES: Names = Names {
    prompt: "prompt",
    count: "num_samples",
    max_tokens: "sampling_params.max_tokens",
    stop: "sampling_params.stop",
    new_top: "topk_sample_logprobs",
    prompt_top: "topk_prompt_logprobs",
};

/// `asample`
#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::Sample)]
pub struct SampleCall {
    /// As `create_sampling_session` or `save_weights_for_sampler` gives it.
    #[serde(default)]
    pub sampling_session_id: Option<String>,
    /// A number that no other request of the sampling session has. The same body again gets the first one's future.
    #[serde(default)]
    #[schema(minimum = 0)]
    pub seq_id: Option<i64>,
    /// In place of a sampling session: the base, by the name that clients are told.
    #[serde(default)]
    pub base_model: Option<String>,
    /// In place of a sampling session: a saved adapter. Without any of the three the base is sampled from.
    #[serde(default)]
    pub model_path: Option<String>,
    prompt: JsonModelInput,
    /// Continuations.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 1024)]
    num_samples: i64,
    sampling_params: SamplingParams,
    /// True: with log-probabilities of the prompt.
    #[serde(default)]
    prompt_logprobs: Option<bool>,
    /// Most likely tokens at each position of the prompt.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 128)]
    topk_prompt_logprobs: usize,
    /// Most likely tokens at each new position.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 128)]
    topk_sample_logprobs: usize,
    /// `[prompt tokens - 1, k]`: ids that could follow each token of the prompt; -1: none.
    #[serde(default)]
    target_prompt_logprobs: Option<JsonTensor>,
    /// Refused unless it is 0.
    #[serde(default)]
    prompt_alt_tokens_k: usize,
    /// The last tokens of the prompt that are scored; all where it is absent.
    #[serde(default)]
    prompt_logprobs_last_n: Option<usize>,
}

fn one() -> i64 {
    1
}

/// The way in which tokens are chosen.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = tinker::SamplingParams)]
struct SamplingParams {
    /// New tokens at most; as many as the context leaves where it is absent.
    #[serde(default)]
    max_tokens: Option<i64>,
    /// Another one at each request where it is absent.
    #[serde(default)]
    seed: Option<i64>,
    /// The model's end tokens where it is absent; nothing for an empty list.
    #[serde(default)]
    stop: Option<SentStop>,
    #[serde(default = "whole")]
    temperature: f64,
    #[serde(default = "whole")]
    top_p: f64,
    /// -1: all tokens.
    #[serde(default = "all")]
    top_k: i64,
}

fn whole() -> f64 {
    1.0
}

fn all() -> i64 {
    -1
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, a list of texts, or a list of token ids")]
#[schema(as = tinker::Stop)]
enum SentStop {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<i64>),
}

/// A body that is refused. Permanent: to be answered by 400 with this text.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum SampleCallError {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error("prompt.chunks[{chunk}] is {kind}: this model reads text; send encoded_text")]
    Chunk { chunk: usize, kind: String },
    #[error("seq_id: expected a number, 0 or more, beside sampling_session_id")]
    Number,
    #[error("{TARGETS}: {0}")]
    Targets(#[from] TensorError),
    #[error(
        "{TARGETS}: expected a shape of two sizes, [{rows}, k]: a row for each token of the prompt but the last"
    )]
    TargetShape { rows: usize },
    #[error("{TARGETS}: {got} ids at a position, at most {MOST_TOP}")]
    TargetWidth { got: usize },
    #[error("{TARGETS}: no id; leave it out")]
    NoTarget,
    #[error(
        "prompt_alt_tokens_k: tokens are not drawn at the positions of a prompt here; leave it out, or ask for \
         topk_prompt_logprobs"
    )]
    Draws,
    #[error(
        "prompt_logprobs_last_n: expected 1 to {most}, beside prompt_logprobs or topk_prompt_logprobs, got {got}"
    )]
    LastN { got: usize, most: usize },
}

/// The layout of a result, as its request asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Log-probabilities of the prompt are told.
    pub prompt: bool,
    pub prompt_top: usize,
    pub new_top: usize,
    /// Tokens at the start of the prompt that are not scored.
    pub unscored: usize,
    /// Columns of the targets, with their positions if they came as CSR.
    pub(super) targets: Option<(usize, Option<Csr>)>,
}

impl SampleCall {
    /// The number of the request; `None`: it repeats no other.
    ///
    /// # Errors
    /// It is negative, or missing beside a sampling session.
    pub fn number(&self) -> Result<Option<u64>, SampleCallError> {
        match (self.seq_id, &self.sampling_session_id) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(SampleCallError::Number),
            (Some(number), _) => u64::try_from(number).map(Some).map_err(|_| SampleCallError::Number),
        }
    }

    /// True if its prompt and its targets can be read, whatever else it asks for.
    pub(super) fn reads(self, vocabulary: usize) -> bool {
        let Ok(prompt) = self.prompt.into_tokens() else { return false };
        let rows = prompt.len().saturating_sub(1);
        self.target_prompt_logprobs.is_none_or(|sent| targets(sent, rows, vocabulary).is_ok())
    }

    /// The request, and the layout of its result.
    ///
    /// # Errors
    /// A field is out of its range.
    pub fn request(self, settings: &Settings) -> Result<(SampleRequest, Layout), SampleCallError> {
        let chunk = |(chunk, kind)| SampleCallError::Chunk { chunk, kind };
        let prompt = self.prompt.into_tokens().map_err(chunk)?;
        if self.prompt_alt_tokens_k > 0 {
            return Err(SampleCallError::Draws);
        }
        let (tokens, rows) = (prompt.len(), prompt.len().saturating_sub(1));
        let mut layout = Layout {
            prompt: self.prompt_logprobs.unwrap_or(false),
            prompt_top: self.topk_prompt_logprobs,
            new_top: self.topk_sample_logprobs,
            ..Layout::default()
        };
        if let Some(got) = self.prompt_logprobs_last_n {
            let is_wanted = layout.prompt || layout.prompt_top > 0;
            if !(1..=rows).contains(&got) || !is_wanted {
                return Err(SampleCallError::LastN { got, most: rows });
            }
            layout.unscored = tokens - got;
        }
        let SamplingParams { max_tokens, seed, stop, temperature, top_p, top_k } = self.sampling_params;
        let stop = match stop {
            None => Stop { ids: settings.end_token_ids.clone(), texts: Vec::new() },
            Some(SentStop::Text(text)) => Stop { texts: vec![text], ids: Vec::new() },
            Some(SentStop::Texts(texts)) => Stop { texts, ids: Vec::new() },
            Some(SentStop::Ids(ids)) => Stop { ids, texts: Vec::new() },
        };
        let wanted = Wanted {
            prompt: layout.prompt,
            prompt_top: layout.prompt_top,
            new_top: layout.new_top,
            prompt_targets: None,
        };
        let count = self.num_samples;
        let sent = Sent { prompt, count, max_tokens, temperature, top_p, top_k, seed, stop, wanted };
        let mut request = checked(sent, &NAMES, settings)?;
        if let Some(sent) = self.target_prompt_logprobs {
            let (targets, csr) = targets(sent, rows, settings.vocab_size)?;
            layout.targets = Some((targets.k, csr));
            request.wanted.prompt_targets = Some(targets);
        }
        Ok((request, layout))
    }
}

/// Targets with a row for each of `rows` tokens.
fn targets(
    sent: JsonTensor,
    rows: usize,
    vocabulary: usize,
) -> Result<(PromptTargets, Option<Csr>), SampleCallError> {
    let sent = sent.into_integers()?;
    let csr = sent.csr().cloned();
    let dense = sent.into_filled(rows, rows * MOST_TOP, -1);
    let dense = dense.map_err(|error| match error {
        TensorError::Shape { .. } => SampleCallError::TargetShape { rows },
        TensorError::TooLarge { shape, .. } => {
            let got = shape.get(1).map_or(0, |&k| usize::try_from(k).unwrap_or(usize::MAX));
            SampleCallError::TargetWidth { got }
        }
        other => other.into(),
    })?;
    let k = dense.columns.ok_or(SampleCallError::TargetShape { rows })?;
    let ids = dense.values;
    let named: Vec<i64> = ids.iter().copied().filter(|&id| id >= 0).collect();
    check_ids(TARGETS, &named, vocabulary)?;
    if named.is_empty() {
        return Err(SampleCallError::NoTarget);
    }
    Ok((PromptTargets { ids, k }, csr))
}
