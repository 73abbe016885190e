//! The order of requests, and the data of each micro-batch: pure.
//!
//! Each adapter has a queue, whose requests begin and end in order. Passes that stand first in their queues share
//! micro-batches: each adapter gives one datum in turn, the one that was served longest ago first, until the ranks are
//! full. So a long pass holds back no other adapter: with n queues, each first request is served within n turns.

use crate::server::request::ModelId;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
};

/// Size of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Ranks that have data of their own.
    pub ranks: usize,
    /// Tokens of a rank in a micro-batch, at most.
    pub tokens: usize,
}

/// Kind of a request, known before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Has the ranks for itself.
    Single,
    /// Has data that share micro-batches with those of other adapters.
    Pass { backward: bool },
    /// Needs the values of the adapter alone, which passes do not change: see [`Plan::samples`].
    Sample,
}

/// Tokens of a datum, and targets a token. Data of other `k` share no micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub tokens: usize,
    pub k: usize,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// A request begins. The caller [opens](Plan::open) a pass, unless it refuses it.
    Begin {
        model: ModelId,
        request: u64,
    },
    MicroBatch(MicroBatch),
}

/// One forward, perhaps with backward, of all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    pub backward: bool,
    /// Targets a token of all its data.
    pub k: usize,
    /// The adapters that have data in it, by name.
    pub adapters: Vec<ModelId>,
    /// The data of each rank, by adapter, then by request.
    pub ranks: Vec<Vec<Dealt>>,
}

/// A datum in a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dealt {
    /// Index into [`MicroBatch::adapters`].
    pub adapter: usize,
    pub request: u64,
    /// Its place in the request.
    pub datum: usize,
}

/// The requests that wait.
#[derive(Debug)]
pub struct Plan {
    limits: Limits,
    queues: BTreeMap<ModelId, Queue>,
    /// Micro-batches so far.
    turn: u64,
}

/// The requests of one adapter.
#[derive(Debug)]
struct Queue {
    waiting: VecDeque<(u64, Kind)>,
    /// Passes of one kind that have begun and have data left.
    open: VecDeque<Open>,
    /// The turn in which it was served last, or its first request came.
    served: u64,
    /// A single request of it was served since the last micro-batch.
    had_single: bool,
}

#[derive(Debug)]
struct Open {
    request: u64,
    backward: bool,
    left: Vec<(usize, Size)>,
}

/// A datum that may go into the next micro-batch.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    model: &'a ModelId,
    request: u64,
    datum: usize,
    tokens: usize,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.open.is_empty()
    }

    fn first(&self) -> u64 {
        let open = self.open.front().map(|open| open.request);
        open.or(self.waiting.front().map(|&(request, _)| request)).unwrap_or(u64::MAX)
    }

    /// The next request to begin, if one may.
    fn begin(&mut self, tokens: usize) -> Option<u64> {
        let &(request, kind) = self.waiting.front()?;
        let open_tokens =
            || -> usize { self.open.iter().flat_map(|open| &open.left).map(|(_, size)| size.tokens).sum() };
        let may = match (kind, self.open.front()) {
            (Kind::Single, None) => !self.had_single,
            (Kind::Single, Some(_)) => false,
            (Kind::Pass { .. }, None) => true,
            (Kind::Pass { backward }, Some(open)) => backward == open.backward && open_tokens() < tokens,
            (Kind::Sample, _) => false,
        };
        if !may {
            return None;
        }
        self.waiting.pop_front();
        self.had_single |= kind == Kind::Single;
        Some(request)
    }

    /// Its data of one kind, in order.
    fn candidates<'a>(&'a self, model: &'a ModelId, k: usize) -> impl Iterator<Item = Candidate<'a>> {
        self.open.iter().flat_map(move |open| {
            let left = open.left.iter().filter(move |(_, size)| size.k == k);
            left.map(|&(datum, Size { tokens, .. })| Candidate {
                model,
                request: open.request,
                datum,
                tokens,
            })
        })
    }
}

impl MicroBatch {
    /// The same without the data of `requests`; `None`: nothing is left.
    pub fn without(mut self, requests: &[u64]) -> Option<Self> {
        for dealt in &mut self.ranks {
            dealt.retain(|dealt| !requests.contains(&dealt.request));
        }
        let left: BTreeSet<usize> = self.ranks.iter().flatten().map(|dealt| dealt.adapter).collect();
        let left: Vec<usize> = left.into_iter().collect();
        for dealt in self.ranks.iter_mut().flatten() {
            dealt.adapter = left.partition_point(|&adapter| adapter < dealt.adapter);
        }
        self.adapters = left.iter().map(|&adapter| self.adapters[adapter].clone()).collect();
        (!self.adapters.is_empty()).then_some(self)
    }
}

impl Plan {
    pub fn new(limits: Limits) -> Self {
        Self { limits, queues: BTreeMap::new(), turn: 0 }
    }

    /// Puts request number `request` at the end of the queue of `model`. Numbers grow.
    pub fn push(&mut self, model: ModelId, request: u64, kind: Kind) {
        let served = self.turn;
        let fresh = || Queue { waiting: VecDeque::new(), open: VecDeque::new(), served, had_single: false };
        self.queues.entry(model).or_insert_with(fresh).waiting.push_back((request, kind));
    }

    /// The requests to sample that stand first in their queues, out of these: all before them have changed what they
    /// change.
    pub fn samples(&mut self) -> Vec<(ModelId, u64)> {
        let mut samples = Vec::new();
        for (model, queue) in &mut self.queues {
            while let Some((request, _)) = queue.waiting.pop_front_if(|(_, kind)| *kind == Kind::Sample) {
                samples.push((model.clone(), request));
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        samples.sort_by_key(|&(_, request)| request);
        samples
    }

    /// True if no request waits and no pass has data left.
    pub fn is_empty(&self) -> bool {
        self.queues.values().all(Queue::is_empty)
    }

    /// Adapters with requests.
    pub fn adapters(&self) -> usize {
        self.queues.len()
    }

    /// Gives the data of a pass that has begun, none larger than a micro-batch of a rank.
    pub fn open(&mut self, model: &ModelId, request: u64, backward: bool, data: &[Size]) {
        let Some(queue) = self.queues.get_mut(model).filter(|_| !data.is_empty()) else { return };
        let left = data.iter().copied().enumerate().collect();
        queue.open.push_back(Open { request, backward, left });
    }

    /// Drops the data of a pass that are left.
    pub fn cancel(&mut self, model: &ModelId, request: u64) {
        if let Some(queue) = self.queues.get_mut(model) {
            queue.open.retain(|open| open.request != request);
        }
    }

    /// The next thing to do beside [`samples`](Self::samples), which were taken before; `None` when nothing waits. The
    /// adapters of a micro-batch `fit` together, or it has one.
    pub fn next(&mut self, fit: &dyn Fn(&[&ModelId]) -> bool) -> Option<Next> {
        self.queues.retain(|_, queue| !queue.is_empty());
        let budget = self.limits.ranks * self.limits.tokens;
        let order = self.order();
        // Whatever changes no micro-batch goes first: passes behind it then join the others.
        for model in &order {
            let Some(request) = self.queues.get_mut(model).and_then(|queue| queue.begin(budget)) else {
                continue;
            };
            return Some(Next::Begin { model: model.clone(), request });
        }
        let micro_batch = self.micro_batch(&order, fit);
        let had_single = self.queues.values_mut().map(|queue| std::mem::take(&mut queue.had_single));
        let had_single = had_single.fold(false, |any, had| any | had);
        match micro_batch {
            Some(micro_batch) => Some(Next::MicroBatch(micro_batch)),
            None if had_single => self.next(fit),
            None => None,
        }
    }

    /// Adapters, the one that was served longest ago first, then by the age of their first requests.
    fn order(&self) -> Vec<ModelId> {
        let mut order: Vec<&ModelId> = self.queues.keys().collect();
        order.sort_by_key(|model| (self.queues[*model].served, self.queues[*model].first()));
        order.into_iter().cloned().collect()
    }

    /// Takes the data of the next micro-batch out of the queues, in `order`.
    fn micro_batch(&mut self, order: &[ModelId], fit: &dyn Fn(&[&ModelId]) -> bool) -> Option<MicroBatch> {
        let open = |model: &ModelId| self.queues[model].open.front();
        let first = order.iter().find_map(open)?;
        let (backward, k) = (first.backward, first.left.first()?.1.k);
        let queues = order.iter().map(|model| (model, &self.queues[model]));
        let of_kind =
            queues.filter(|(_, queue)| queue.open.front().is_some_and(|open| open.backward == backward));
        let mut together: Vec<&ModelId> = Vec::new();
        let fitting = of_kind.filter(|(model, _)| {
            together.push(model);
            let fits = together.len() == 1 || fit(&together);
            if !fits {
                together.pop();
            }
            fits
        });
        let queues: Vec<_> = fitting.map(|(model, queue)| queue.candidates(model, k)).collect();
        let dealt = deal(&in_turn(queues, self.limits), self.limits);
        let adapters: BTreeSet<&ModelId> = dealt.iter().flatten().map(|candidate| candidate.model).collect();
        let adapters: Vec<ModelId> = adapters.into_iter().cloned().collect();
        let place = |candidate: &Candidate| Dealt {
            adapter: adapters.partition_point(|model| model < candidate.model),
            request: candidate.request,
            datum: candidate.datum,
        };
        let ranks: Vec<Vec<Dealt>> = dealt
            .iter()
            .map(|candidates| {
                let mut own: Vec<Dealt> = candidates.iter().map(place).collect();
                own.sort_unstable();
                own
            })
            .collect();
        self.take(&adapters, &ranks);
        Some(MicroBatch { backward, k, adapters, ranks })
    }

    /// Removes the data of `ranks` from the queues of `adapters`.
    fn take(&mut self, adapters: &[ModelId], ranks: &[Vec<Dealt>]) {
        self.turn += 1;
        let dealt: HashSet<(u64, usize)> =
            ranks.iter().flatten().map(|dealt| (dealt.request, dealt.datum)).collect();
        for model in adapters {
            let Some(queue) = self.queues.get_mut(model) else { continue };
            queue.served = self.turn;
            for open in &mut queue.open {
                open.left.retain(|&(datum, _)| !dealt.contains(&(open.request, datum)));
            }
            queue.open.retain(|open| !open.left.is_empty());
        }
    }
}

/// Candidates for one micro-batch: a datum of each queue in turn, while the ranks have room. A queue whose datum finds
/// none gives no later one.
fn in_turn<'a>(queues: Vec<impl Iterator<Item = Candidate<'a>>>, limits: Limits) -> Vec<Candidate<'a>> {
    let (mut room, mut candidates) = (limits.ranks * limits.tokens, Vec::new());
    let mut queues = queues;
    while !queues.is_empty() {
        queues.retain_mut(|queue| {
            let next = queue.next().filter(|next| next.tokens <= room);
            if let Some(next) = next {
                room -= next.tokens;
                candidates.push(next);
            }
            next.is_some()
        });
    }
    candidates
}

/// Deals candidates out to the ranks, the longest first, each to the rank with the fewest tokens (longest processing
/// time, Graham, 1969). The first candidate comes before all: it has waited longest. Those that find no room are left
/// out.
fn deal<'a>(candidates: &[Candidate<'a>], limits: Limits) -> Vec<Vec<Candidate<'a>>> {
    let mut ranks = vec![(0, Vec::new()); limits.ranks];
    let mut order: Vec<(usize, &Candidate)> = candidates.iter().enumerate().collect();
    order.sort_by_key(|&(place, candidate)| (place > 0, Reverse(candidate.tokens)));
    for (place, candidate) in order {
        let Some((tokens, own)) = ranks.iter_mut().min_by_key(|(tokens, _)| *tokens) else { break };
        if place == 0 || *tokens + candidate.tokens <= limits.tokens {
            *tokens += candidate.tokens;
            own.push(*candidate);
        }
    }
    ranks.into_iter().map(|(_, own)| own).collect()
}

#[cfg(test)]
mod tests;
