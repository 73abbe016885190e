//! Continuations of one request that run on one rank and share one computation of its prompt.

use super::{
    super::{
        choose::uniform,
        pages::Pages,
        request::{Continuation, End, NewToken, PromptScores, SampleRequest, Wanted},
        step::{Draw, Drawn, PAGE, Run, RunResult, Score},
        stops::{SharedDecode, Text},
    },
    check::SampleError,
};
use std::{ops::Range, sync::Arc};

/// Pages that a group needs: all of them are taken when it begins, so that it always comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Full pages of the prompt, which all continuations share.
    full: usize,
    /// Pages of the prompt.
    prompt: usize,
    /// Pages of the prompt with one continuation. Keys and values of its last token are never needed.
    sequence: usize,
}

impl Size {
    /// # Errors
    /// One continuation needs more than `pages`.
    pub(super) fn new(request: &SampleRequest, pages: usize) -> Result<Self, SampleError> {
        let (prompt, new) = (request.prompt.len(), request.max_new_tokens);
        let tokens = prompt.saturating_add(new.saturating_sub(1));
        let sequence = tokens.div_ceil(PAGE);
        if sequence > pages {
            return Err(SampleError::TooLong { prompt, new, room: pages * PAGE });
        }
        Ok(Self { full: prompt / PAGE, prompt: prompt.div_ceil(PAGE), sequence })
    }

    /// Pages of this many continuations.
    pub(super) fn pages(self, continuations: usize) -> usize {
        self.sequence + continuations.saturating_sub(1) * (self.sequence - self.full)
    }

    /// Continuations that fit `pages`, at least one.
    pub(super) fn continuations(self, pages: usize) -> usize {
        let more = pages.saturating_sub(self.sequence).checked_div(self.sequence - self.full);
        more.map_or(usize::MAX, |more| more + 1)
    }
}

/// Continuations of a request with one computation of its prompt.
pub(super) struct Group<K> {
    pub(super) id: u64,
    pub(super) ticket: u64,
    pub(super) adapter: Option<K>,
    request: Arc<SampleRequest>,
    is_scored: bool,
    /// Tokens of the prompt whose keys and values are in the pages.
    computed: usize,
    /// Pages of the prompt, until it is computed.
    prompt_pages: Vec<u32>,
    sequences: Vec<Sequence>,
}

/// A continuation that goes on.
struct Sequence {
    sample: usize,
    /// All that it can need.
    pages: Vec<u32>,
    /// The last page of the prompt and the own page that gets a copy of it, once the prompt is computed.
    copy: Option<(u32, u32)>,
    continuation: Continuation,
    has_ended: bool,
    /// Its text, where texts can end it.
    text: Option<Text>,
}

/// The part of a request that a run computes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    /// So many tokens of the prompt.
    Prompt(usize),
    /// The next token of this continuation.
    Next(usize),
}

/// Destination of the results of a group.
pub(super) struct Output<'a> {
    pub(super) scores: &'a mut PromptScores,
    /// By sample.
    pub(super) continuations: &'a mut [Option<Continuation>],
    pub(super) tokens: &'a mut Vec<NewToken>,
}

impl<K> Group<K> {
    /// Takes the pages of `samples`; `None`, and none taken, where there are not enough. The prompt is scored with its
    /// first sample, or where there is none.
    pub(super) fn begin(
        (id, ticket): (u64, u64),
        adapter: Option<K>,
        request: &Arc<SampleRequest>,
        (size, samples): (Size, Range<usize>),
        decode: Option<&SharedDecode>,
        pages: &mut Pages,
    ) -> Option<Self> {
        let mut taken = pages.take(size.pages(samples.len()))?;
        let prompt_pages = taken.split_off(taken.len() - size.prompt);
        let Wanted { prompt, prompt_top, new_top: _, prompt_targets } = &request.wanted;
        let is_wanted = *prompt || *prompt_top > 0 || prompt_targets.is_some();
        let is_scored = is_wanted && samples.start == 0 && request.prompt.len() > 1;
        let first = samples.start;
        let sequences = samples.map(|sample| {
            // The first continuation goes on in the prompt's last page, the others in copies of it.
            let shared = if sample == first { size.prompt } else { size.full };
            let own = taken.split_off(taken.len() - (size.sequence - shared));
            let last = prompt_pages.get(shared).copied();
            let copy = last.zip(own.first().copied());
            pages.share(&prompt_pages[..shared]);
            let text = decode.filter(|_| !request.stop.texts.is_empty());
            Sequence {
                sample,
                pages: prompt_pages[..shared].iter().copied().chain(own).collect(),
                copy,
                continuation: Continuation { ids: vec![], log_probs: vec![], top: vec![], end: End::Length },
                has_ended: false,
                text: text.map(|decode| Text::new(decode.clone(), &request.prompt, &request.stop.texts)),
            }
        });
        let sequences = sequences.collect();
        Some(Self {
            id,
            ticket,
            adapter,
            request: request.clone(),
            is_scored,
            computed: 0,
            prompt_pages,
            sequences,
        })
    }

    /// Gives all pages back.
    pub(super) fn release(&self, pages: &mut Pages) {
        pages.release(&self.prompt_pages);
        self.sequences.iter().for_each(|sequence| pages.release(&sequence.pages));
    }

    /// Runs of a step that it can have at most.
    pub(super) fn slots(&self) -> usize {
        self.sequences.len().max(1)
    }

    fn is_prompt_computed(&self) -> bool {
        self.computed == self.request.prompt.len()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.is_prompt_computed() && self.sequences.is_empty()
    }

    /// Pages to copy before the next step.
    pub(super) fn copies(&self) -> impl Iterator<Item = (u32, u32)> {
        let is_due = self.is_prompt_computed();
        self.sequences.iter().filter_map(move |sequence| sequence.copy.filter(|_| is_due))
    }

    /// The next tokens of the continuations that have begun.
    pub(super) fn nexts(&self) -> Vec<(Part, Run)> {
        if !self.is_prompt_computed() {
            return vec![];
        }
        let next = |sequence: &Sequence| {
            let ids = &sequence.continuation.ids;
            let first = self.computed + ids.len() - 1;
            let run = Run {
                adapter: None,
                ids: ids[ids.len() - 1..].to_vec(),
                first,
                pages: sequence.pages[..=first / PAGE].to_vec(),
                draws: vec![self.draw(sequence)],
                score: None,
            };
            (Part::Next(sequence.sample), run)
        };
        self.sequences.iter().map(next).collect()
    }

    /// The next part of the prompt, at most `most` tokens; `None` where all is computed.
    pub(super) fn prompt_part(&self, most: usize) -> Option<(Part, Run)> {
        let prompt = &self.request.prompt;
        let end = prompt.len().min(self.computed + most);
        let tokens = self.computed..end;
        if tokens.is_empty() {
            return None;
        }
        let is_last = end == prompt.len();
        let run = Run {
            adapter: None,
            ids: prompt[tokens.clone()].to_vec(),
            first: self.computed,
            pages: self.prompt_pages[..end.div_ceil(PAGE)].to_vec(),
            draws: self.sequences.iter().filter(|_| is_last).map(|sequence| self.draw(sequence)).collect(),
            score: self.is_scored.then(|| self.score(tokens.clone())),
        };
        Some((Part::Prompt(tokens.len()), run))
    }

    fn draw(&self, sequence: &Sequence) -> Draw {
        let request = &self.request;
        let uniform = uniform(request.seed, sequence.sample, sequence.continuation.ids.len());
        Draw { choice: request.choice, uniform, top: request.wanted.new_top }
    }

    /// Behind each of `tokens` the one that follows in the prompt, then the targets of the request.
    fn score(&self, tokens: Range<usize>) -> Score {
        let SampleRequest { prompt, wanted, .. } = &*self.request;
        let (others, k) =
            wanted.prompt_targets.as_ref().map_or((&[][..], 0), |others| (&others.ids, others.k));
        let targets = tokens.flat_map(|at| match prompt.get(at + 1) {
            Some(&next) => [&[next], &others[at * k..(at + 1) * k]].concat(),
            None => vec![-1; 1 + k],
        });
        Score { targets: targets.collect(), k: 1 + k, top: wanted.prompt_top }
    }

    /// Takes what came of a run; continuations that end give their pages back.
    pub(super) fn apply(&mut self, part: Part, result: &RunResult, pages: &mut Pages, out: &mut Output) {
        match part {
            Part::Prompt(tokens) => {
                self.take_scores(tokens, result, out.scores);
                self.computed += tokens;
                if self.is_prompt_computed() {
                    for (sequence, drawn) in self.sequences.iter_mut().zip(&result.drawn) {
                        sequence.push(drawn, &self.request, out.tokens);
                    }
                    pages.release(&std::mem::take(&mut self.prompt_pages));
                }
            }
            Part::Next(sample) => {
                let sequence = self.sequences.iter_mut().find(|sequence| sequence.sample == sample);
                if let Some((sequence, drawn)) = sequence.zip(result.drawn.first()) {
                    sequence.push(drawn, &self.request, out.tokens);
                }
            }
        }
        for sequence in self.sequences.extract_if(.., |sequence| sequence.has_ended) {
            pages.release(&sequence.pages);
            out.continuations[sequence.sample] = Some(sequence.continuation);
        }
    }

    /// The copies that were due have been made.
    pub(super) fn have_copied(&mut self) {
        if self.is_prompt_computed() {
            self.sequences.iter_mut().for_each(|sequence| sequence.copy = None);
        }
    }

    fn take_scores(&self, tokens: usize, result: &RunResult, scores: &mut PromptScores) {
        let wanted = &self.request.wanted;
        let k = 1 + wanted.prompt_targets.as_ref().map_or(0, |targets| targets.k);
        let predicting = (self.request.prompt.len() - 1).min(self.computed + tokens) - self.computed;
        for row in result.log_probs.chunks_exact(k).take(predicting) {
            if wanted.prompt {
                scores.log_probs.push(row[0]);
            }
            scores.targets.extend(&row[1..]);
        }
        scores.top.extend(result.top.iter().take(predicting).cloned());
    }
}

impl Sequence {
    fn push(&mut self, drawn: &Drawn, request: &SampleRequest, tokens: &mut Vec<NewToken>) {
        let &Drawn { id, log_prob, ref top } = drawn;
        let continuation = &mut self.continuation;
        continuation.ids.push(id);
        continuation.log_probs.push(log_prob);
        if request.wanted.new_top > 0 {
            continuation.top.push(top.clone());
        }
        tokens.push(NewToken { sample: self.sample, id, log_prob, top: top.clone() });
        let text = self.text.as_mut().and_then(|text| {
            text.push(id);
            text.stopped()
        });
        let end = match text {
            _ if request.stop.ids.contains(&id) => Some(End::Id),
            Some(number) => Some(End::Text(number)),
            None => (continuation.ids.len() >= request.max_new_tokens).then_some(End::Length),
        };
        self.has_ended = end.is_some();
        continuation.end = end.unwrap_or(End::Length);
    }
}
