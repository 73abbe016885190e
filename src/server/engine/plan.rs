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

    /// The next thing to do; `None` when nothing waits.
    pub fn next(&mut self) -> Option<Next> {
        self.queues.retain(|_, queue| !queue.waiting.is_empty() || !queue.open.is_empty());
        let budget = self.limits.ranks * self.limits.tokens;
        let order = self.order();
        // Whatever changes no micro-batch goes first: passes behind it then join the others.
        for model in &order {
            let Some(request) = self.queues.get_mut(model).and_then(|queue| queue.begin(budget)) else {
                continue;
            };
            return Some(Next::Begin { model: model.clone(), request });
        }
        let micro_batch = self.micro_batch(&order);
        let had_single = self.queues.values_mut().map(|queue| std::mem::take(&mut queue.had_single));
        let had_single = had_single.fold(false, |any, had| any | had);
        match micro_batch {
            Some(micro_batch) => Some(Next::MicroBatch(micro_batch)),
            None if had_single => self.next(),
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
    fn micro_batch(&mut self, order: &[ModelId]) -> Option<MicroBatch> {
        let open = |model: &ModelId| self.queues[model].open.front();
        let first = order.iter().find_map(open)?;
        let (backward, k) = (first.backward, first.left.first()?.1.k);
        let queues = order.iter().map(|model| (model, &self.queues[model]));
        let of_kind =
            queues.filter(|(_, queue)| queue.open.front().is_some_and(|open| open.backward == backward));
        let queues: Vec<_> = of_kind.map(|(model, queue)| queue.candidates(model, k)).collect();
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Requests by number from 0: the adapter, and the data of a pass with its direction, or `None` for a single one.
    type Requests = Vec<(usize, Option<(bool, Vec<Size>)>)>;

    fn model(adapter: usize) -> ModelId {
        ModelId::new(format!("m{adapter}")).unwrap()
    }

    fn sizes(tokens: &[usize]) -> Vec<Size> {
        tokens.iter().map(|&tokens| Size { tokens, k: 1 }).collect()
    }

    fn pass(adapter: usize, tokens: &[usize]) -> (usize, Option<(bool, Vec<Size>)>) {
        (adapter, Some((true, sizes(tokens))))
    }

    fn forward(adapter: usize, tokens: &[usize]) -> (usize, Option<(bool, Vec<Size>)>) {
        (adapter, Some((false, sizes(tokens))))
    }

    fn push(plan: &mut Plan, requests: &Requests) {
        for (number, (adapter, data)) in requests.iter().enumerate() {
            let kind = data.as_ref().map_or(Kind::Single, |&(backward, _)| Kind::Pass { backward });
            plan.push(model(*adapter), number as u64, kind);
        }
    }

    /// Everything that comes, to the end.
    fn all(limits: Limits, requests: &Requests) -> Vec<Next> {
        let mut plan = Plan::new(limits);
        push(&mut plan, requests);
        std::iter::from_fn(|| {
            let next = plan.next()?;
            if let Next::Begin { model, request } = &next
                && let Some((backward, data)) = &requests[*request as usize].1
            {
                plan.open(model, *request, *backward, data);
            }
            Some(next)
        })
        .collect()
    }

    /// `b0` for the begin of request 0; of a micro-batch the data of each rank, `request.datum`.
    fn told(limits: Limits, requests: &Requests) -> Vec<String> {
        let rank = |dealt: &Vec<Dealt>| {
            dealt.iter().map(|d| format!("{}.{}", d.request, d.datum)).collect::<Vec<_>>().join(" ")
        };
        let text = |next: &Next| match next {
            Next::Begin { request, .. } => format!("b{request}"),
            Next::MicroBatch(of) => of.ranks.iter().map(rank).collect::<Vec<_>>().join(" | "),
        };
        all(limits, requests).iter().map(text).collect()
    }

    const ONE: Limits = Limits { ranks: 1, tokens: 10 };
    const TWO: Limits = Limits { ranks: 2, tokens: 10 };

    #[test]
    fn passes_of_several_adapters_share_a_micro_batch() {
        let requests = vec![pass(0, &[3, 4]), pass(1, &[2]), pass(2, &[5])];
        assert_eq!(told(ONE, &requests), ["b0", "b1", "b2", "0.0 1.0 2.0", "0.1"]);
        // The longest after the first, each to the rank with the fewest tokens.
        assert_eq!(told(TWO, &requests), ["b0", "b1", "b2", "0.0 0.1 | 1.0 2.0"]);
    }

    #[test]
    fn passes_of_one_adapter_join_up_to_its_next_step() {
        let requests = vec![pass(0, &[2]), pass(0, &[3]), (0, None), pass(0, &[1])];
        assert_eq!(told(ONE, &requests), ["b0", "b1", "0.0 1.0", "b2", "b3", "3.0"]);
    }

    #[test]
    fn a_long_pass_holds_back_no_other_adapter() {
        let requests = vec![pass(0, &[10; 4]), pass(1, &[10, 10]), pass(2, &[10])];
        let seen = told(ONE, &requests);
        assert_eq!(seen[3..], ["0.0", "1.0", "2.0", "0.1", "1.1", "0.2", "0.3"]);
    }

    #[test]
    fn steps_go_first_so_that_passes_behind_them_join() {
        let requests = vec![pass(0, &[5]), (1, None), pass(1, &[5]), (2, None), (2, None), pass(2, &[5])];
        // One of each adapter: many steps of one hold up no pass.
        assert_eq!(told(TWO, &requests), ["b0", "b1", "b2", "b3", "0.0 | 2.0", "b4", "b5", "5.0 | "]);
    }

    #[test]
    fn data_of_other_kinds_share_no_micro_batch() {
        let of_two = vec![Size { tokens: 2, k: 1 }, Size { tokens: 2, k: 3 }];
        let requests = vec![pass(0, &[2]), forward(1, &[2]), forward(0, &[1]), (2, Some((false, of_two)))];
        let seen = told(ONE, &requests);
        assert_eq!(seen, ["b0", "b1", "b3", "0.0", "b2", "2.0 1.0 3.0", "3.1"]);
    }

    #[test]
    fn a_refused_pass_and_an_empty_plan_leave_nothing() {
        let mut plan = Plan::new(ONE);
        assert_eq!(plan.next(), None);
        push(&mut plan, &vec![pass(0, &[1]), (0, None)]);
        assert_eq!(plan.adapters(), 1);
        // Nobody opens it.
        for request in 0..2 {
            assert_eq!(plan.next(), Some(Next::Begin { model: model(0), request }));
        }
        assert_eq!((plan.next(), plan.adapters()), (None, 0));
    }

    fn requests() -> impl Strategy<Value = Requests> {
        let size = (1usize..=16, 1usize..3).prop_map(|(tokens, k)| Size { tokens, k });
        let data = (any::<bool>(), proptest::collection::vec(size, 1..12));
        proptest::collection::vec((0usize..5, proptest::option::weighted(0.7, data)), 0..20)
    }

    proptest! {
        #[test]
        fn every_datum_is_computed_once_in_order_and_within_bounds(requests in requests(), ranks in 1usize..5) {
            let limits = Limits { ranks, tokens: 16 };
            let seen = all(limits, &requests);
            prop_assert_eq!(&seen, &all(limits, &requests));
            let mut left: Vec<usize> =
                requests.iter().map(|(_, data)| data.as_ref().map_or(0, |data| data.1.len())).collect();
            let (mut begun, mut computed) = (vec![false; requests.len()], HashSet::new());
            // Turns since the first request of an adapter could have been served.
            let mut waited = [0; 5];
            for next in &seen {
                match next {
                    Next::Begin { request, .. } => {
                        let number = *request as usize;
                        let (adapter, data) = &requests[number];
                        prop_assert!(!std::mem::replace(&mut begun[number], true));
                        for (before, (of, earlier)) in requests[..number].iter().enumerate() {
                            prop_assert!(of != adapter || begun[before], "begins in order");
                            let same = earlier.as_ref().zip(data.as_ref()).is_some_and(|(a, b)| a.0 == b.0);
                            prop_assert!(of != adapter || same || left[before] == 0, "ends in order");
                        }
                    }
                    Next::MicroBatch(MicroBatch { backward, k, adapters, ranks: dealt }) => {
                        prop_assert_eq!(dealt.len(), ranks);
                        prop_assert!(adapters.is_sorted() && dealt.iter().flatten().count() > 0);
                        for dealt in dealt {
                            let mut tokens = 0;
                            for datum in dealt {
                                let (adapter, data) = &requests[datum.request as usize];
                                let (direction, data) = data.as_ref().unwrap();
                                prop_assert!(begun[datum.request as usize] && direction == backward);
                                prop_assert_eq!((data[datum.datum].k, &adapters[datum.adapter]), (*k, &model(*adapter)));
                                prop_assert!(computed.insert((datum.request, datum.datum)), "once");
                                tokens += data[datum.datum].tokens;
                                left[datum.request as usize] -= 1;
                            }
                            prop_assert!(tokens <= limits.tokens);
                        }
                        for (adapter, waited) in waited.iter_mut().enumerate() {
                            let served = adapters.contains(&model(adapter));
                            *waited = if served { 0 } else { *waited + 1 };
                            let waits = requests.iter().zip(&left).zip(&begun);
                            let mut waits = waits.filter(|((request, left), begun)| {
                                request.0 == adapter && **left > 0 && **begun
                            });
                            if waits.next().is_none() {
                                *waited = 0;
                            }
                            prop_assert!(*waited < 5, "adapter {} waits for {} turns", adapter, waited);
                        }
                    }
                }
            }
            prop_assert!(begun.iter().all(|&begun| begun) && left.iter().all(|&left| left == 0));
        }
    }
}
