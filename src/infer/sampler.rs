//! The books of all requests to sample: continuous batching over ranks and adapters. Pure: every step is planned from
//! what came of the one before, and equal requests and results give equal plans.
//!
//! A step holds the next token of every continuation that goes on, and prompts as the limits allow. Requests begin in
//! the order in which they came, on the rank with the most free pages. All pages that a request can need are taken when
//! it begins, so that whatever has begun comes to its end, and the next in the queue to its turn.

mod check;
mod group;
#[cfg(test)]
mod tests;

pub use check::{MOST_SAMPLES, SampleError, check};

use super::{
    pages::Pages,
    request::{Continuation, NewToken, PromptScores, SampleReply, SampleRequest},
    step::{RankResult, RankStep, Run, RunResult, Step},
    stops::SharedDecode,
};
use group::{Group, Output, Part, Size};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::Arc,
};

/// Room for what is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ranks with data of their own.
    pub ranks: usize,
    /// Pages of each rank.
    pub pages: u32,
    /// Runs of a rank in a step, and tokens that it chooses there.
    pub sequences: usize,
    /// Tokens of a rank in a step; no fewer than `sequences`. A prompt is computed in parts of at most
    /// tokens − sequences + 1, so that one always has room beside all continuations.
    pub tokens: usize,
}

/// News of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub ticket: u64,
    pub what: Progress,
}

/// Progress of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// A token was chosen.
    Token(NewToken),
    /// It is over.
    End(Result<SampleReply, SampleError>),
}

/// Counts for metrics and the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests of which a part has not begun.
    pub waiting: usize,
    /// Continuations that have begun; a prompt that is scored alone is one.
    pub running: usize,
    /// Pages in use, of all ranks.
    pub pages: usize,
    /// Steps so far.
    pub steps: u64,
    /// Tokens chosen so far.
    pub new_tokens: u64,
}

/// The books. `K` names an adapter.
pub struct Sampler<K> {
    limits: Limits,
    ranks: Vec<Rank<K>>,
    /// Parts of requests that have not begun: the request, and numbers of continuations.
    waiting: VecDeque<(u64, Range<usize>)>,
    books: BTreeMap<u64, Book<K>>,
    /// The step since which each adapter with something to do has waited.
    turns: BTreeMap<K, u64>,
    /// Each rank's runs of the step that is being computed.
    planned: Option<Vec<Vec<Origin>>>,
    groups: u64,
    counts: Counts,
}

/// A rank.
struct Rank<K> {
    pages: Pages,
    /// In the order in which they began.
    groups: Vec<Group<K>>,
}

/// A request that is not over.
struct Book<K> {
    adapter: Option<K>,
    request: Arc<SampleRequest>,
    size: Size,
    decode: Option<SharedDecode>,
    scores: PromptScores,
    /// By their numbers.
    continuations: Vec<Option<Continuation>>,
    /// Groups that have not ended.
    groups: usize,
}

/// The part of a group that a run computes.
#[derive(Clone, Copy)]
struct Origin {
    group: u64,
    part: Part,
}

impl<K> Rank<K> {
    fn slots(&self) -> usize {
        self.groups.iter().map(Group::slots).sum()
    }
}

impl<K: Ord + Clone> Sampler<K> {
    /// Without requests.
    pub fn new(limits: Limits) -> Self {
        let tokens = limits.tokens.max(1);
        let sequences = limits.sequences.clamp(1, tokens);
        let rank = |_| Rank { pages: Pages::new(limits.pages), groups: vec![] };
        Self {
            limits: Limits { sequences, tokens, ..limits },
            ranks: (0..limits.ranks).map(rank).collect(),
            waiting: VecDeque::new(),
            books: BTreeMap::new(),
            turns: BTreeMap::new(),
            planned: None,
            groups: 0,
            counts: Counts::default(),
        }
    }

    /// Puts a request in the queue, to be continued with `adapter` or with the base. `decode` is needed for texts that
    /// end it. Continuations that do not fit a rank together compute the prompt again.
    ///
    /// # Errors
    /// A field is out of its range, or the request has no room even alone; see [`check`] for the model's part.
    pub fn submit(
        &mut self,
        ticket: u64,
        adapter: Option<K>,
        request: SampleRequest,
        decode: Option<SharedDecode>,
    ) -> Result<(), SampleError> {
        check::check_alone(&request, decode.is_some())?;
        let size = Size::new(&request, self.limits.pages as usize)?;
        if self.books.contains_key(&ticket) {
            return Err(SampleError::Ticket(ticket));
        }
        let samples = if request.max_new_tokens == 0 { 0 } else { request.count };
        let most = size.continuations(self.limits.pages as usize).min(self.limits.sequences);
        let groups = samples.div_ceil(most).max(1);
        let part = |i: usize| samples * i / groups..samples * (i + 1) / groups;
        self.waiting.extend((0..groups).map(|i| (ticket, part(i))));
        let wanted = &request.wanted;
        let scores = PromptScores {
            log_probs: if wanted.prompt { vec![f32::NAN] } else { vec![] },
            top: if wanted.prompt_top > 0 { vec![vec![]] } else { vec![] },
            targets: vec![],
        };
        let continuations = vec![None; samples];
        let request = Arc::new(request);
        let book = Book { adapter, request, size, decode, scores, continuations, groups };
        self.books.insert(ticket, book);
        Ok(())
    }

    /// Forgets a request: no step that is planned from now on has a part of it, and nothing more is said of it. False
    /// where there is none of this number.
    pub fn cancel(&mut self, ticket: u64) -> bool {
        let is_there = self.books.remove(&ticket).is_some();
        self.waiting.retain(|(waiting, _)| *waiting != ticket);
        for Rank { pages, groups } in &mut self.ranks {
            groups.extract_if(.., |group| group.ticket == ticket).for_each(|group| group.release(pages));
        }
        is_there
    }

    /// True where no request is left.
    pub fn is_empty(&self) -> bool {
        self.books.is_empty()
    }

    /// Numbers for metrics.
    pub fn counts(&self) -> Counts {
        let mut waiting: Vec<u64> = self.waiting.iter().map(|(ticket, _)| *ticket).collect();
        waiting.dedup();
        let all = self.limits.pages as usize;
        Counts {
            waiting: waiting.len(),
            running: self.ranks.iter().map(Rank::slots).sum(),
            pages: self.ranks.iter().map(|rank| all - rank.pages.free()).sum(),
            ..self.counts
        }
    }

    /// The next step; `None` where nothing can be done. `fit` says of adapters in their order if they can be in memory
    /// together. Those that do not fit this time go first in the steps that follow; one alone is taken in any case, so
    /// that a caller who has work gets a step. A step that is planned before [`Sampler::apply`] takes the place of the
    /// last one.
    pub fn plan(&mut self, fit: &dyn Fn(&[&K]) -> bool) -> Option<Step<K>> {
        self.begin_groups();
        let adapters = self.adapters_of_step(fit);
        let is_chosen = |group: &Group<K>| group.adapter.as_ref().is_none_or(|key| adapters.contains(key));
        let runs = self.ranks.iter().map(|rank| rank.runs(&self.limits, is_chosen));
        let mut runs: Vec<Vec<(Option<&K>, Origin, Run)>> = runs.collect();

        let mut used: Vec<K> = runs.iter().flatten().filter_map(|(key, ..)| (*key).cloned()).collect();
        used.sort_unstable();
        used.dedup();
        let mut ranks = Vec::with_capacity(runs.len());
        let mut planned = Vec::with_capacity(runs.len());
        for (rank, runs) in self.ranks.iter().zip(&mut runs) {
            let index = |key: Option<&K>| key.and_then(|key| used.binary_search(key).ok());
            let mut runs: Vec<(Origin, Run)> = runs
                .drain(..)
                .map(|(key, origin, run)| (origin, Run { adapter: index(key), ..run }))
                .collect();
            runs.sort_by_key(|(_, run)| run.adapter.unwrap_or(usize::MAX));
            let (origins, runs): (Vec<Origin>, Vec<Run>) = runs.into_iter().unzip();
            ranks.push(RankStep { copies: rank.groups.iter().flat_map(Group::copies).collect(), runs });
            planned.push(origins);
        }
        if ranks.iter().all(|rank| rank.runs.is_empty()) {
            self.planned = None;
            return None;
        }
        for key in &used {
            self.turns.insert(key.clone(), self.counts.steps + 1);
        }
        self.planned = Some(planned);
        Some(Step { adapters: used, ranks })
    }

    /// Takes what came of the step that was planned last, and tells what it means for the requests, in the order of
    /// ranks and runs. Results of requests that were cancelled meanwhile are dropped.
    pub fn apply(&mut self, results: &[RankResult]) -> Vec<Event> {
        let mut events = Vec::new();
        let Some(planned) = self.planned.take() else { return events };
        self.counts.steps += 1;
        for group in self.ranks.iter_mut().flat_map(|rank| &mut rank.groups) {
            group.have_copied();
        }
        for (rank, (origins, result)) in planned.into_iter().zip(results).enumerate() {
            debug_assert_eq!(origins.len(), result.runs.len(), "results of rank {rank}");
            for (origin, result) in origins.into_iter().zip(&result.runs) {
                self.apply_run(rank, origin, result, &mut events);
            }
        }
        events
    }

    /// Begins groups in the order of the queue, as long as there is room for the first.
    fn begin_groups(&mut self) {
        while let Some((ticket, samples)) = self.waiting.front() {
            let Some(book) = self.books.get(ticket) else { return };
            let slots = samples.len().max(1);
            let with_room = self.ranks.iter_mut().enumerate();
            let with_room = with_room.filter(|(_, rank)| rank.slots() + slots <= self.limits.sequences);
            let most = with_room.max_by_key(|(i, rank)| (rank.pages.free(), Reverse(*i)));
            let Some((_, rank)) = most else { return };
            let names = (self.groups, *ticket);
            let part = (book.size, samples.clone());
            let decode = book.decode.as_ref();
            let group =
                Group::begin(names, book.adapter.clone(), &book.request, part, decode, &mut rank.pages);
            let Some(group) = group else { return };
            rank.groups.push(group);
            self.groups += 1;
            self.waiting.pop_front();
        }
    }

    /// As many adapters as fit together, those that have waited longest first.
    fn adapters_of_step(&mut self, fit: &dyn Fn(&[&K]) -> bool) -> Vec<K> {
        let groups = self.ranks.iter().flat_map(|rank| &rank.groups);
        let busy: Vec<&K> = groups.filter_map(|group| group.adapter.as_ref()).collect();
        let mut turns: Vec<(u64, &K)> = Vec::new();
        for key in busy {
            turns.push((self.turns.get(key).copied().unwrap_or(self.counts.steps), key));
        }
        turns.sort_unstable();
        turns.dedup();
        let mut chosen: Vec<&K> = Vec::new();
        for &(_, key) in &turns {
            let at = chosen.partition_point(|&other| other < key);
            chosen.insert(at, key);
            if chosen.len() > 1 && !fit(&chosen) {
                chosen.remove(at);
            }
        }
        let chosen = chosen.into_iter().cloned().collect();
        self.turns = turns.into_iter().map(|(since, key)| (key.clone(), since)).collect();
        chosen
    }

    fn apply_run(&mut self, rank: usize, origin: Origin, result: &RunResult, events: &mut Vec<Event>) {
        let Rank { pages, groups } = &mut self.ranks[rank];
        let Some(at) = groups.iter().position(|group| group.id == origin.group) else { return };
        let group = &mut groups[at];
        let ticket = group.ticket;
        if result.is_broken {
            self.cancel(ticket);
            events.push(Event { ticket, what: Progress::End(Err(SampleError::NotFinite)) });
            return;
        }
        let Some(book) = self.books.get_mut(&ticket) else { return };
        let Book { scores, continuations, .. } = book;
        let mut tokens = Vec::new();
        group.apply(origin.part, result, pages, &mut Output { scores, continuations, tokens: &mut tokens });
        self.counts.new_tokens += tokens.len() as u64;
        events.extend(tokens.into_iter().map(|token| Event { ticket, what: Progress::Token(token) }));
        if !group.has_ended() {
            return;
        }
        groups.remove(at);
        book.groups -= 1;
        if book.groups == 0
            && let Some(book) = self.books.remove(&ticket)
        {
            let continuations = book.continuations.into_iter().flatten().collect();
            let reply = SampleReply { continuations, prompt: book.scores };
            events.push(Event { ticket, what: Progress::End(Ok(reply)) });
        }
    }
}

impl<K> Rank<K> {
    /// The next token of every continuation, then parts of prompts as the tokens of a step allow. The first of these
    /// always has room, so none waits for ever.
    fn runs(&self, limits: &Limits, is_chosen: impl Fn(&Group<K>) -> bool) -> Vec<(Option<&K>, Origin, Run)> {
        let groups: Vec<&Group<K>> = self.groups.iter().filter(|group| is_chosen(group)).collect();
        let mut runs = Vec::new();
        for group in &groups {
            let origin = |part| Origin { group: group.id, part };
            runs.extend(
                group.nexts().into_iter().map(|(part, run)| (group.adapter.as_ref(), origin(part), run)),
            );
        }
        let mut left = limits.tokens.saturating_sub(runs.len());
        let most = limits.tokens - limits.sequences + 1;
        for group in &groups {
            if let Some((part, next)) = group.prompt_part(most)
                && next.ids.len() <= left
            {
                left -= next.ids.len();
                runs.push((group.adapter.as_ref(), Origin { group: group.id, part }, next));
            }
        }
        runs
    }
}
