//! Bodies of the answers, and the events of a stream.

use super::{
    asked::{Asked, Kind},
    models::unix_seconds,
};
use crate::infer::request::End;
use serde::Serialize;
use std::{collections::BTreeMap, time::SystemTime};
use utoipa::ToSchema;

/// A model that can be asked.
#[derive(Serialize, ToSchema)]
#[schema(as = openai::Model)]
pub struct Model {
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// In Unix seconds; 0: before the server was started.
    pub created: u64,
    /// The tenant, or `system` for the base.
    pub owned_by: String,
    /// The base of an adapter.
    pub parent: Option<String>,
}

/// `models`
#[derive(Serialize, ToSchema)]
#[schema(as = openai::Models)]
pub struct Models {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Model>,
}

/// The fields with which every answer and event begins.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = openai::Head)]
pub struct Head {
    /// Id of the request.
    pub id: String,
    /// `chat.completion`, `chat.completion.chunk` or `text_completion`
    pub object: &'static str,
    /// The time of the request, in Unix seconds.
    pub created: u64,
    /// As the request names it.
    pub model: String,
}

/// Counts of tokens. Those that end a continuation are among them; a prompt counts once for all of its continuations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = openai::Usage)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl Usage {
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// `chat/completions` and `completions`: an answer, or an event of a stream.
#[derive(Serialize, ToSchema)]
#[schema(as = openai::Answer)]
pub struct Answer {
    #[serde(flatten)]
    pub head: Head,
    pub choices: Vec<Choice>,
    /// Absent of events, but for the last where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A continuation, or a part of one. A chat has `message`, its events `delta`, a completion `text`.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = openai::Choice)]
pub struct Choice {
    /// By prompt, and by continuation of each.
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub logprobs: Option<LogProbs>,
    /// `stop` or `length`; null while it goes on.
    pub finish_reason: Option<&'static str>,
}

/// The reason for which a continuation ended. `is_cut`: a text that ends it is in it.
pub fn finish_reason(end: &End, is_cut: bool) -> &'static str {
    if is_cut { "stop" } else { end.reason() }
}

/// The `object` of a text, also in a stream.
const TEXT: &str = "text_completion";

impl Head {
    /// The head of the answer to a request that comes now.
    pub fn new(asked: &Asked, id: u64) -> Self {
        let (prefix, object) = match (asked.kind, asked.is_stream) {
            (Kind::Chat, false) => ("chatcmpl", "chat.completion"),
            (Kind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Kind::Text, _) => ("cmpl", TEXT),
        };
        let created = unix_seconds(SystemTime::now());
        Self { id: format!("{prefix}-{id:016x}"), object, created, model: asked.model.clone() }
    }
}

impl Choice {
    /// A whole continuation.
    pub fn whole(
        kind: Kind,
        index: usize,
        text: String,
        logprobs: Option<LogProbs>,
        end: &'static str,
    ) -> Self {
        let (message, text) = match kind {
            Kind::Chat => (Some(Message { role: Some(ROLE), content: Some(text) }), None),
            Kind::Text => (None, Some(text)),
        };
        Self { index, message, text, logprobs, finish_reason: Some(end), ..Self::default() }
    }

    /// The start of the message of a chat.
    pub fn role(index: usize) -> Self {
        let delta = Message { role: Some(ROLE), content: Some(String::new()) };
        Self { index, delta: Some(delta), ..Self::default() }
    }

    /// More of a text.
    pub fn more(kind: Kind, index: usize, text: String, logprobs: Option<LogProbs>) -> Self {
        let (delta, text) = match kind {
            Kind::Chat => (Some(Message { role: None, content: Some(text) }), None),
            Kind::Text => (None, Some(text)),
        };
        Self { index, delta, text, logprobs, ..Self::default() }
    }

    /// The end of a text that was told before.
    pub fn end(kind: Kind, index: usize, end: &'static str) -> Self {
        let (delta, text) = match kind {
            Kind::Chat => (Some(Message::default()), None),
            Kind::Text => (None, Some(String::new())),
        };
        Self { index, delta, text, finish_reason: Some(end), ..Self::default() }
    }
}

/// The role of the model.
const ROLE: &str = "assistant";

/// A message of the assistant, or what an event adds to one.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = openai::AnsweredMessage)]
pub struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities: of the model's own distribution, at temperature 1 and over the whole vocabulary.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = openai::LogProbs)]
pub enum LogProbs {
    Chat(ChatLogProbs),
    Text(TextLogProbs),
}

/// Log-probabilities of the tokens of a chat's answer.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = openai::ChatLogProbs)]
pub struct ChatLogProbs {
    pub content: Vec<TokenLogProb>,
}

/// A token of an answer.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = openai::TokenLogProb)]
pub struct TokenLogProb {
    #[serde(flatten)]
    pub token: TopLogProb,
    /// The most likely tokens in its place, the most likely first.
    pub top_logprobs: Vec<TopLogProb>,
}

/// A token that could stand in a place.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = openai::TopLogProb)]
pub struct TopLogProb {
    pub token: String,
    pub logprob: f32,
    /// The token's text in UTF-8; null where it is a part of a character.
    pub bytes: Option<Vec<u8>>,
}

/// Log-probabilities of the tokens of a completion, one entry a token.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = openai::TextLogProbs)]
pub struct TextLogProbs {
    pub tokens: Vec<String>,
    /// Null of the first token of a prompt, which nothing predicts.
    pub token_logprobs: Vec<Option<f32>>,
    /// By token, the chosen one among them; null where none were asked for.
    pub top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
    /// Characters before each token.
    pub text_offset: Vec<usize>,
}

impl TextLogProbs {
    /// These, and `more` behind them.
    pub fn and(mut self, more: Self) -> Self {
        self.tokens.extend(more.tokens);
        self.token_logprobs.extend(more.token_logprobs);
        if let (Some(all), Some(more)) = (&mut self.top_logprobs, more.top_logprobs) {
            all.extend(more);
        }
        self.text_offset.extend(more.text_offset);
        self
    }
}
