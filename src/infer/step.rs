//! One forward of all ranks that samples: its tokens and what comes of them. Pure; travels between ranks.
//!
//! A sequence is a prompt with a continuation, or a prompt that is scored. Its keys and values lie in pages of
//! [`PAGE`] tokens; position p is in page `pages[p / PAGE]`. Continuations of one prompt share its full pages.

use super::request::{Choice, TokenLogProb};
use serde::{Deserialize, Serialize};

/// Tokens of a page.
pub const PAGE: usize = 16;

/// The work of all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step<K> {
    /// Keys of the adapters that it needs, in their order, each once.
    pub adapters: Vec<K>,
    /// The work of each rank with data of its own; perhaps none.
    pub ranks: Vec<RankStep>,
}

/// The work of a rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStep {
    /// Pages to copy first, `(from, to)`: the part of a prompt that does not fill a page, for its second continuation
    /// and those after it.
    pub copies: Vec<(u32, u32)>,
    /// By adapter, those without one last.
    pub runs: Vec<Run>,
}

/// Neighbouring tokens of one sequence: a prompt or a part of it, or the token that was chosen last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Index into [`Step::adapters`]; `None`: the base alone.
    pub adapter: Option<usize>,
    /// `[tokens]`, at least one.
    pub ids: Vec<i64>,
    /// Position of the first of them. Keys and values of all before it are in the pages.
    pub first: usize,
    /// The pages of the sequence up to the last token.
    pub pages: Vec<u32>,
    /// Tokens to choose behind the last token: one of each continuation that begins or goes on here.
    pub draws: Vec<Draw>,
    pub score: Option<Score>,
}

/// A token to choose.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draw {
    pub choice: Choice,
    /// A random number in [0, 1).
    pub uniform: f64,
    /// The most likely tokens to tell.
    pub top: usize,
}

/// Log-probabilities to tell behind each token of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// `[tokens × k]`: tokens whose log-probabilities are told; negative where there is none.
    pub targets: Vec<i64>,
    pub k: usize,
    /// The most likely tokens to tell behind each token.
    pub top: usize,
}

/// Results of a [`RankStep`], run by run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankResult {
    pub runs: Vec<RunResult>,
}

/// Results of a [`Run`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// As [`Run::draws`].
    pub drawn: Vec<Drawn>,
    /// As [`Score::targets`]; NaN where there is none.
    pub log_probs: Vec<f32>,
    /// The most likely tokens behind each token, if [`Score::top`] is not 0.
    pub top: Vec<Vec<TokenLogProb>>,
    /// An output of its last token, or of a scored one, is not finite: nothing else counts.
    pub is_broken: bool,
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drawn {
    pub id: i64,
    pub log_prob: f32,
    /// The most likely tokens, the most likely first.
    pub top: Vec<TokenLogProb>,
}
