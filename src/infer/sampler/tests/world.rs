//! A fake model whose outputs are functions of the tokens that it finds in the pages, and books that it drives.

use super::super::{
    super::{
        choose::uniform,
        request::{End, PromptTargets, TokenLogProb},
        step::{Draw, Drawn, PAGE},
        stops::Decode,
    },
    *,
};
use std::collections::BTreeSet;

pub(super) const VOCABULARY: u64 = 13;

fn mix(seed: u64, value: u64) -> u64 {
    (seed ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_add(value)
}

/// Stands for the hidden state behind `tokens`, with an adapter.
fn state(tokens: &[i64], adapter: Option<u8>) -> u64 {
    let start = adapter.map_or(7, |key| 1000 + u64::from(key));
    tokens.iter().fold(start, |state, &id| mix(state, id as u64))
}

fn log_prob(state: u64, id: i64) -> f32 {
    if id < 0 { f32::NAN } else { -((mix(state, id as u64) >> 44) as f32) }
}

fn top(state: u64, n: usize) -> Vec<TokenLogProb> {
    (0..n as i64).map(|i| (i, log_prob(state, i))).collect()
}

fn drawn(state: u64, draw: &Draw) -> Drawn {
    let id = (mix(state, draw.uniform.to_bits() ^ draw.choice.temperature.to_bits()) % VOCABULARY) as i64;
    Drawn { id, log_prob: log_prob(state, id), top: top(state, draw.top) }
}

struct Letters;

impl Decode for Letters {
    fn decode(&self, ids: &[i64]) -> String {
        ids.iter().map(|&id| ["a", "b", "ab", "é", "c"][id as usize % 5]).collect()
    }
}

/// The text that is complete first; of several at the same place the longest, then the first.
fn first_complete(text: &str, stops: &[String]) -> Option<usize> {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.into_iter().find_map(|end| {
        let complete = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(*stop));
        complete.max_by_key(|(i, stop)| (stop.len(), Reverse(*i))).map(|(i, _)| i)
    })
}

/// The reply to a request by the definition.
pub(super) fn alone(request: &SampleRequest, adapter: Option<u8>) -> SampleReply {
    let SampleRequest { prompt, wanted, .. } = request;
    let behind = |i: usize| state(&prompt[..=i], adapter);
    let mut scores = PromptScores::default();
    for (i, &id) in prompt.iter().enumerate() {
        if wanted.prompt {
            scores.log_probs.push(if i == 0 { f32::NAN } else { log_prob(behind(i - 1), id) });
        }
        if wanted.prompt_top > 0 {
            scores.top.push(if i == 0 { vec![] } else { top(behind(i - 1), wanted.prompt_top) });
        }
    }
    if let Some(PromptTargets { ids, k }) = &wanted.prompt_targets {
        scores.targets = ids.iter().enumerate().map(|(i, &id)| log_prob(behind(i / k), id)).collect();
    }
    let samples = if request.max_new_tokens == 0 { 0 } else { request.count };
    let continuations = (0..samples).map(|sample| {
        let (mut ids, mut log_probs, mut tops) = (vec![], vec![], vec![]);
        loop {
            let state = state(&[&prompt[..], &ids].concat(), adapter);
            let uniform = uniform(request.seed, sample, ids.len());
            let next = drawn(state, &Draw { choice: request.choice, uniform, top: wanted.new_top });
            ids.push(next.id);
            log_probs.push(next.log_prob);
            tops.extend((wanted.new_top > 0).then_some(next.top));
            let text = Letters.decode(&ids);
            let complete = first_complete(&text, &request.stop.texts);
            let end = if request.stop.ids.contains(&next.id) {
                End::Id
            } else if let Some(number) = complete {
                End::Text(number)
            } else if ids.len() == request.max_new_tokens {
                End::Length
            } else {
                continue;
            };
            return Continuation { ids, log_probs, top: tops, end };
        }
    });
    SampleReply { continuations: continuations.collect(), prompt: scores }
}

/// NaN equals NaN here.
fn shown(reply: &SampleReply) -> String {
    format!("{reply:?}")
}

/// Pages of a rank with the tokens that were computed into them, and the adapter.
struct Memory(Vec<[Place; PAGE]>);

type Place = Option<(i64, Option<u8>)>;

impl Memory {
    fn compute(&mut self, adapters: &[u8], step: &RankStep) -> RankResult {
        for &(from, to) in &step.copies {
            self.0[to as usize] = self.0[from as usize];
        }
        let adapter = |run: &Run| run.adapter.map(|i| adapters[i]);
        // All runs write before one reads, as the rows of a batch do.
        for run in &step.runs {
            for (i, &id) in run.ids.iter().enumerate() {
                let at = run.first + i;
                self.0[run.pages[at / PAGE] as usize][at % PAGE] = Some((id, adapter(run)));
            }
        }
        let runs = step.runs.iter().map(|run| {
            let tokens: Vec<i64> = (0..run.first + run.ids.len())
                .map(|at| {
                    let (id, computed_by) = self.0[run.pages[at / PAGE] as usize][at % PAGE].unwrap();
                    assert_eq!(computed_by, adapter(run), "keys and values of another adapter");
                    id
                })
                .collect();
            assert_eq!(run.pages.len(), tokens.len().div_ceil(PAGE));
            let behind = |i: usize| state(&tokens[..=run.first + i], adapter(run));
            let mut result = RunResult::default();
            if let Some(score) = &run.score {
                assert_eq!(score.targets.len(), run.ids.len() * score.k);
                let targets = score.targets.iter().enumerate();
                result.log_probs = targets.map(|(i, &id)| log_prob(behind(i / score.k), id)).collect();
                if score.top > 0 {
                    result.top = (0..run.ids.len()).map(|i| top(behind(i), score.top)).collect();
                }
            }
            let last = behind(run.ids.len() - 1);
            result.drawn = run.draws.iter().map(|draw| drawn(last, draw)).collect();
            result
        });
        RankResult { runs: runs.collect() }
    }
}

/// Books with a fake model, and what was told so far.
pub(super) struct World {
    pub(super) sampler: Sampler<u8>,
    memory: Vec<Memory>,
    limits: Limits,
    /// Adapters that fit together.
    pub(super) together: usize,
    pub(super) tokens: BTreeMap<u64, Vec<NewToken>>,
    pub(super) ends: BTreeMap<u64, Result<SampleReply, SampleError>>,
}

impl World {
    pub(super) fn new(limits: Limits, together: usize) -> Self {
        let memory = (0..limits.ranks).map(|_| Memory(vec![[None; PAGE]; limits.pages as usize])).collect();
        let (tokens, ends) = (BTreeMap::new(), BTreeMap::new());
        Self { sampler: Sampler::new(limits), memory, limits, together, tokens, ends }
    }

    pub(super) fn submit(
        &mut self,
        ticket: u64,
        adapter: Option<u8>,
        request: &SampleRequest,
    ) -> Result<(), SampleError> {
        self.sampler.submit(ticket, adapter, request.clone(), Some(Arc::new(Letters)))
    }

    pub(super) fn plan(&mut self) -> Option<Step<u8>> {
        let together = self.together;
        let step = self.sampler.plan(&move |keys| keys.is_sorted() && keys.len() <= together)?;
        self.check(&step);
        Some(step)
    }

    fn check(&self, step: &Step<u8>) {
        let Limits { ranks, sequences, tokens, .. } = self.limits;
        assert_eq!(step.ranks.len(), ranks);
        // One alone is taken in any case.
        assert!(step.adapters.len() <= self.together.max(1));
        assert!(step.adapters.is_sorted_by(|a, b| a < b));
        let used: BTreeSet<usize> =
            step.ranks.iter().flat_map(|r| &r.runs).filter_map(|r| r.adapter).collect();
        assert!(used.into_iter().eq(0..step.adapters.len()), "an adapter of the step has no run");
        for rank in &step.ranks {
            assert!(rank.runs.iter().map(|run| run.ids.len()).sum::<usize>() <= tokens);
            assert!(rank.runs.iter().map(|run| run.draws.len().max(1)).sum::<usize>() <= sequences);
            assert!(rank.runs.iter().map(|run| run.adapter.unwrap_or(usize::MAX)).is_sorted());
            assert!(rank.runs.iter().all(|run| !run.ids.is_empty()));
        }
    }

    pub(super) fn compute(&mut self, step: &Step<u8>) -> Vec<RankResult> {
        let ranks = self.memory.iter_mut().zip(&step.ranks);
        ranks.map(|(memory, rank)| memory.compute(&step.adapters, rank)).collect()
    }

    pub(super) fn apply(&mut self, results: &[RankResult]) {
        for Event { ticket, what } in self.sampler.apply(results) {
            assert!(!self.ends.contains_key(&ticket), "news of {ticket} after its end");
            match what {
                Progress::Token(token) => self.tokens.entry(ticket).or_default().push(token),
                Progress::End(end) => assert!(self.ends.insert(ticket, end).is_none()),
            }
        }
    }

    /// False where nothing can be done.
    pub(super) fn step(&mut self) -> bool {
        let Some(step) = self.plan() else { return false };
        let results = self.compute(&step);
        self.apply(&results);
        true
    }

    pub(super) fn run(&mut self) -> usize {
        (0..).take_while(|_| self.step()).count()
    }

    /// The reply of a request equals the definition's, and so do the tokens that were told before.
    pub(super) fn assert_reply(&self, ticket: u64, request: &SampleRequest, adapter: Option<u8>) {
        let expected = alone(request, adapter);
        let reply = self.ends[&ticket].as_ref().unwrap();
        assert_eq!(shown(reply), shown(&expected), "request {ticket}");
        for (sample, continuation) in expected.continuations.iter().enumerate() {
            let told = self.tokens[&ticket].iter().filter(|token| token.sample == sample);
            let told: Vec<(i64, f32)> = told.map(|token| (token.id, token.log_prob)).collect();
            let all: Vec<(i64, f32)> =
                continuation.ids.iter().copied().zip(continuation.log_probs.iter().copied()).collect();
            assert_eq!(told, all);
        }
    }

    pub(super) fn assert_empty(&self) {
        let Counts { waiting, running, pages, .. } = self.sampler.counts();
        assert_eq!((waiting, running, pages, self.sampler.is_empty()), (0, 0, 0, true));
    }
}
