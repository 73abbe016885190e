//! The text of continuations, token by token, and the log-probabilities of their tokens.

use super::{
    answers::{ChatLogProbs, LogProbs, TextLogProbs, TokenLogProb, TopLogProb},
    asked::Kind,
};
use crate::{
    infer::{
        request::{Continuation, PromptScores, Stop, TokenLogProb as Scored},
        stops::{self, Decode, WithoutSpecialTokens},
    },
    server::{fault::Fault, texts::Texts},
};
use std::{collections::BTreeMap, sync::Arc};

/// The log-probability of what is impossible: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// A token of a text, with its scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub id: i64,
    /// `None`: nothing predicts it.
    pub log_prob: Option<f32>,
    pub top: Vec<Scored>,
    /// Bytes and characters of the text before it.
    start: usize,
    offset: usize,
}

/// A part of a text, and the tokens that begin in it where their scores are told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    pub text: String,
    pub tokens: Vec<Entry>,
}

/// A text that grows by tokens, without special ones. It ends before the first text of `stop`, and has no token of it.
pub struct Text {
    stop: Arc<Stop>,
    /// `None`: it has ended.
    told: Option<stops::Text>,
    is_cut: bool,
    /// Bytes that were taken.
    taken: usize,
    /// Offsets of tokens, where their scores are told.
    offsets: Option<Offsets>,
    waiting: Vec<Entry>,
}

/// Finds the places of tokens in a text of which nothing is held back.
struct Offsets {
    text: stops::Text,
    bytes: usize,
    characters: usize,
}

impl Offsets {
    fn new(decode: Arc<dyn Decode + Send + Sync>, prompt: &[i64]) -> Self {
        Self { text: stops::Text::new(decode, prompt, &[]), bytes: 0, characters: 0 }
    }

    /// The next token, with its place.
    fn entry(&mut self, id: i64, log_prob: Option<f32>, top: &[Scored]) -> Entry {
        let entry = Entry { id, log_prob, top: top.to_vec(), start: self.bytes, offset: self.characters };
        let more = self.text.push(id);
        self.bytes += more.len();
        self.characters += more.chars().count();
        entry
    }
}

impl Text {
    /// The text behind `prompt`. `has_scores`: parts have their tokens.
    ///
    /// # Errors
    /// There is no tokenizer.
    pub fn new(texts: &Texts, prompt: &[i64], stop: Arc<Stop>, has_scores: bool) -> Result<Self, Fault> {
        let decode = Arc::new(WithoutSpecialTokens(texts.tokenizer()?.clone()));
        Ok(Self {
            told: Some(stops::Text::new(decode.clone(), prompt, &stop.texts)),
            stop,
            is_cut: false,
            taken: 0,
            offsets: has_scores.then(|| Offsets::new(decode, prompt)),
            waiting: Vec::new(),
        })
    }

    /// True once a text of `stop` is in it.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Adds a token. Returns what no later token takes away.
    pub fn push(&mut self, id: i64, log_prob: Option<f32>, top: &[Scored]) -> Part {
        if self.is_cut || self.stop.ids.contains(&id) {
            return Part::default();
        }
        let Some(told) = &mut self.told else { return Part::default() };
        self.waiting.extend(self.offsets.as_mut().map(|offsets| offsets.entry(id, log_prob, top)));
        let text = told.push(id);
        self.is_cut = told.stopped().is_some();
        self.part(text, false)
    }

    /// The rest. No token follows.
    pub fn end(&mut self) -> Part {
        let was_cut = self.is_cut;
        let text = self.told.take().map(stops::Text::finish).unwrap_or_default();
        self.part(text, !was_cut)
    }

    /// All of a continuation.
    pub fn whole(&mut self, continuation: &Continuation) -> Part {
        let Continuation { ids, log_probs, top, .. } = continuation;
        let mut all = Part::default();
        for (i, &id) in ids.iter().enumerate() {
            let top = top.get(i).map(Vec::as_slice).unwrap_or_default();
            all.add(self.push(id, log_probs.get(i).copied(), top));
        }
        all.add(self.end());
        all
    }

    /// More of the text with the tokens that begin in it; with `has_rest` all others, too.
    fn part(&mut self, text: String, has_rest: bool) -> Part {
        self.taken += text.len();
        let count = self.waiting.iter().take_while(|entry| has_rest || entry.start < self.taken).count();
        Part { text, tokens: self.waiting.drain(..count).collect() }
    }
}

impl Part {
    fn add(&mut self, more: Self) {
        self.text.push_str(&more.text);
        self.tokens.extend(more.tokens);
    }
}

/// The tokens of a prompt with their scores; special ones are a part of its text.
///
/// # Errors
/// There is no tokenizer.
pub fn of_prompt(texts: &Texts, prompt: &[i64], scores: &PromptScores) -> Result<Vec<Entry>, Fault> {
    let mut offsets = Offsets::new(texts.tokenizer()?.clone(), &[]);
    let entry = |(i, &id): (usize, &i64)| {
        // Nothing predicts the first token.
        let log_prob = scores.log_probs.get(i).copied().filter(|log_prob| !log_prob.is_nan());
        offsets.entry(id, log_prob, scores.top.get(i).map(Vec::as_slice).unwrap_or_default())
    };
    Ok(prompt.iter().enumerate().map(entry).collect())
}

/// The log-probabilities of `tokens`, in the form of `kind`. `top`: tokens that are named at each position; `before`:
/// characters before the text.
///
/// # Errors
/// There is no tokenizer.
pub fn log_probs(
    texts: &Texts,
    kind: Kind,
    top: usize,
    before: usize,
    tokens: &[Entry],
) -> Result<LogProbs, Fault> {
    match kind {
        Kind::Chat => {
            let content = tokens.iter().map(|entry| of_chat(texts, entry)).collect::<Result<_, _>>()?;
            Ok(LogProbs::Chat(ChatLogProbs { content }))
        }
        Kind::Text => of_text(texts, top > 0, before, tokens).map(LogProbs::Text),
    }
}

fn of_chat(texts: &Texts, entry: &Entry) -> Result<TokenLogProb, Fault> {
    let named = |&(id, log_prob): &Scored| {
        let token = texts.decode(&[id], false)?;
        let is_whole = !token.contains(char::REPLACEMENT_CHARACTER);
        let bytes = is_whole.then(|| token.as_bytes().to_vec());
        Ok(TopLogProb { token, logprob: finite(log_prob), bytes })
    };
    let token = named(&(entry.id, entry.log_prob.unwrap_or(LEAST)))?;
    Ok(TokenLogProb { token, top_logprobs: entry.top.iter().map(named).collect::<Result<_, Fault>>()? })
}

fn of_text(texts: &Texts, has_top: bool, before: usize, tokens: &[Entry]) -> Result<TextLogProbs, Fault> {
    let mut all = TextLogProbs { top_logprobs: has_top.then(Vec::new), ..TextLogProbs::default() };
    for entry in tokens {
        let token = texts.decode(&[entry.id], false)?;
        if let Some(tops) = &mut all.top_logprobs {
            let mut named = BTreeMap::new();
            // The chosen token is among them. Of tokens that are written alike the most likely one stays.
            for &(id, log_prob) in &entry.top {
                named.entry(texts.decode(&[id], false)?).or_insert(finite(log_prob));
            }
            tops.push(entry.log_prob.map(|log_prob| {
                named.entry(token.clone()).or_insert(finite(log_prob));
                named
            }));
        }
        all.tokens.push(token);
        all.token_logprobs.push(entry.log_prob.map(finite));
        all.text_offset.push(before + entry.offset);
    }
    Ok(all)
}

fn finite(log_prob: f32) -> f32 {
    if log_prob.is_nan() { LEAST } else { log_prob.max(LEAST) }
}
