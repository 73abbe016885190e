//! A request to continue a prompt, and what comes of it: pure.

use serde::{Deserialize, Serialize};

/// Most tokens with log-probabilities that are told at a position.
pub const MOST_TOP: usize = 128;

/// A prompt to continue or to score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRequest {
    /// `[tokens]`, at least one.
    pub prompt: Vec<i64>,
    /// Continuations, at least one. The prompt is computed once for all.
    pub count: usize,
    /// Tokens of a continuation, at most. 0: the prompt is scored alone.
    pub max_new_tokens: usize,
    pub choice: Choice,
    /// Key of the random numbers. Number `i` of continuation `n` is a function of (seed, n, i) alone.
    pub seed: u64,
    pub stop: Stop,
    pub wanted: Wanted,
}

/// The way a token is chosen: of the `top_k` most likely ones, the fewest whose probabilities at `temperature` add up
/// to `top_p`; among these by probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// 0: the most likely token, whatever the others say.
    pub temperature: f64,
    /// Above 0, at most 1.
    pub top_p: f64,
    /// `None`: all.
    pub top_k: Option<usize>,
}

/// Tokens and texts that end a continuation, and are part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub ids: Vec<i64>,
    /// Texts in what was generated; none is empty.
    pub texts: Vec<String>,
}

/// Log-probabilities that are told beside those of the chosen tokens. All are of the model's own distribution, at
/// temperature 1 and over the whole vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// Those of the prompt's tokens.
    pub prompt: bool,
    /// The most likely tokens at each position of the prompt, at most [`MOST_TOP`].
    pub prompt_top: usize,
    /// The most likely tokens at each new position, at most [`MOST_TOP`].
    pub new_top: usize,
    /// Those of given tokens at each position of the prompt.
    pub prompt_targets: Option<PromptTargets>,
}

/// Tokens whose log-probabilities are told: `ids` `[(prompt tokens − 1) × k]`, those that could follow each token,
/// negative where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTargets {
    pub ids: Vec<i64>,
    pub k: usize,
}

/// A token and its log-probability.
pub type TokenLogProb = (i64, f32);

/// A new token of a continuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewToken {
    /// The continuation, from 0.
    pub sample: usize,
    pub id: i64,
    pub log_prob: f32,
    /// [`Wanted::new_top`], the most likely first.
    pub top: Vec<TokenLogProb>,
}

/// Reason for the end of a continuation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// A token of [`Stop::ids`], the last of the continuation.
    Id,
    /// The text of this number in [`Stop::texts`].
    Text(usize),
    /// It has as many tokens as it may.
    Length,
}

impl End {
    /// `length`, or `stop` for whatever ended it before, as clients have it.
    pub fn reason(&self) -> &'static str {
        if *self == Self::Length { "length" } else { "stop" }
    }
}

/// A continuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Continuation {
    pub ids: Vec<i64>,
    /// One a token.
    pub log_probs: Vec<f32>,
    /// [`Wanted::new_top`] of each token; empty where none are wanted.
    pub top: Vec<Vec<TokenLogProb>>,
    pub end: End,
}

/// The answer to a [`SampleRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleReply {
    /// In the order of their numbers; none where no new token was asked for.
    pub continuations: Vec<Continuation>,
    pub prompt: PromptScores,
}

impl SampleRequest {
    /// Bytes of its data in memory.
    pub fn bytes(&self) -> usize {
        let targets = self.wanted.prompt_targets.as_ref().map_or(&[][..], |targets| &targets.ids);
        size_of_val(&self.prompt[..]) + size_of_val(targets) + size_of_val(&self.stop.ids[..])
    }
}

impl SampleReply {
    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let top = |rows: &[Vec<TokenLogProb>]| {
            rows.iter().map(|row| size_of::<Vec<TokenLogProb>>() + size_of_val(&row[..])).sum::<usize>()
        };
        let one = |all: &Continuation| {
            size_of_val(&all.ids[..])
                + size_of_val(&all.log_probs[..])
                + top(&all.top)
                + size_of::<Continuation>()
        };
        let prompt = size_of_val(&self.prompt.log_probs[..]) + size_of_val(&self.prompt.targets[..]);
        self.continuations.iter().map(one).sum::<usize>() + prompt + top(&self.prompt.top)
    }
}

/// Log-probabilities of a prompt, empty where they are not wanted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptScores {
    /// One a token; NaN for the first, which nothing predicts.
    pub log_probs: Vec<f32>,
    /// The most likely tokens at each position, the most likely first; none at the first position.
    pub top: Vec<Vec<TokenLogProb>>,
    /// As [`PromptTargets::ids`]; NaN where there is none.
    pub targets: Vec<f32>,
}
