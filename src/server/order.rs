//! Order and exactly once: which request of a model runs next, and which was sent before. Pure: time is passed in and
//! nothing waits here.
//!
//! A request's place is its `seq_id`. The `tinker` wire sends chunks of a pass at once, the first one last, so
//! [`InOrder`] holds requests back until those before them are here. The `xorl` wire sends one after another and leaves
//! gaps, so [`OnArrival`] holds none back. On both the same id with the same body is a repeat, which gets the answer of
//! the first, and with another body an error. Type `R` names a request, and with it its answer.

use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// Requests that are remembered at least; repeats come within minutes of the first.
const REMEMBERED: usize = 4096;

/// A hash of a request's body, decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyHash([u8; 32]);

impl BodyHash {
    pub fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }

    /// With the name of the call, for ids that several calls share.
    pub fn of_call(name: &str, body: &[u8]) -> Self {
        Self(Sha256::new().chain_update(name).chain_update([0]).chain_update(body).finalize().into())
    }
}

/// An id that two different requests have. Permanent: to be answered by 400 with this text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seq_id {0} was sent before with another body: a new request needs a new one")]
pub struct OtherBody(pub u64);

/// Why a request has no place in the order. Permanent: to be answered by 400 with this text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    #[error(transparent)]
    OtherBody(#[from] OtherBody),
    #[error("seq_id {seq_id} comes too late: all up to {last} were carried out, refused or given up")]
    TooLate { seq_id: u64, last: u64 },
    #[error("seq_id {0} was refused before: a new request needs a new one")]
    Consumed(u64),
}

/// A request that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted<R> {
    New,
    /// It was sent before; its answer is that of this request.
    Repeat(R),
}

/// Requests by id, with the hash of each body: those of a model by `seq_id`, or the models of a session by
/// `model_seq_id`.
#[derive(Clone, Debug)]
pub struct Repeats<R, K = u64> {
    sent: BTreeMap<K, (BodyHash, R)>,
}

impl<R, K> Default for Repeats<R, K> {
    fn default() -> Self {
        Self { sent: BTreeMap::new() }
    }
}

impl<R: Clone> Repeats<R> {
    /// The request that has this id and body, if it was taken before.
    ///
    /// # Errors
    /// The id was sent with another body.
    pub fn repeat(&self, id: u64, body: BodyHash) -> Result<Option<R>, OtherBody> {
        self.find(id, body).ok_or(OtherBody(id))
    }

    /// # Errors
    /// The id was sent with another body.
    pub fn submit(&mut self, id: u64, body: BodyHash, request: R) -> Result<Submitted<R>, OtherBody> {
        if let Some(first) = self.repeat(id, body)? {
            return Ok(Submitted::Repeat(first));
        }
        self.sent.insert(id, (body, request));
        self.forget_below(u64::MAX, REMEMBERED);
        Ok(Submitted::New)
    }
}

impl<R: Clone, K: Ord + Copy> Repeats<R, K> {
    /// The request that has this id and body, if there is one. `None`: the id has another body.
    fn find(&self, id: K, body: BodyHash) -> Option<Option<R>> {
        match self.sent.get(&id) {
            Some((sent, _)) if *sent != body => None,
            found => Some(found.map(|(_, request)| request.clone())),
        }
    }

    /// Forgets the smallest ids below `bound` that are more than `remembered`. Gives the largest of them.
    fn forget_below(&mut self, bound: K, remembered: usize) -> Option<K> {
        let mut last = None;
        while self.sent.len() > remembered && self.sent.first_key_value().is_some_and(|(&id, _)| id < bound) {
            last = self.sent.pop_first().map(|(id, _)| id);
        }
        last
    }
}

/// The order of a model whose requests may arrive in any: by `seq_id`, without gaps. A request waits for those before
/// it no longer than a limit; then they are given up.
#[derive(Clone, Debug)]
pub struct InOrder<R, T> {
    /// The longest time that a request waits.
    limit: Duration,
    /// The same before the first request has run, where the id of the first is not known.
    first_limit: Option<Duration>,
    /// Every id below was carried out, consumed or given up.
    next_id: u64,
    /// Requests that are held back, with their arrival.
    waiting: BTreeMap<u64, (Instant, T)>,
    /// Ids from `next_id` on that no request will have.
    consumed: BTreeSet<u64>,
    repeats: Repeats<R>,
}

impl<R: Clone, T> InOrder<R, T> {
    /// `next_id`: the id of the model's first request, 1 for a new model.
    pub fn new(next_id: u64, limit: Duration) -> Self {
        let (waiting, consumed) = (BTreeMap::new(), BTreeSet::new());
        Self { limit, first_limit: None, next_id, waiting, consumed, repeats: Repeats::default() }
    }

    /// The order of a model whose earlier requests are not known: it begins with the lowest id that is there
    /// `first_limit` after the first request came.
    pub fn resumed(first_limit: Duration, limit: Duration) -> Self {
        Self { first_limit: Some(first_limit.min(limit)), ..Self::new(1, limit) }
    }

    /// The request that has this id and body, if it was taken before.
    ///
    /// # Errors
    /// The id has a request with another body, or its turn is over.
    pub fn repeat(&self, seq_id: u64, body: BodyHash) -> Result<Option<R>, OrderError> {
        if let Some(first) = self.repeats.repeat(seq_id, body)? {
            return Ok(Some(first));
        }
        if self.consumed.contains(&seq_id) {
            return Err(OrderError::Consumed(seq_id));
        }
        if seq_id < self.next_id {
            return Err(OrderError::TooLate { seq_id, last: self.next_id - 1 });
        }
        Ok(None)
    }

    /// Takes `item`, the work of `request`. [`Self::next`] gives it back when its turn has come; a repeat's is dropped.
    ///
    /// # Errors
    /// The id has a request with another body, or its turn is over.
    pub fn submit(
        &mut self,
        seq_id: u64,
        body: BodyHash,
        request: R,
        item: T,
        now: Instant,
    ) -> Result<Submitted<R>, OrderError> {
        if let Some(first) = self.repeat(seq_id, body)? {
            return Ok(Submitted::Repeat(first));
        }
        self.repeats.sent.insert(seq_id, (body, request));
        self.repeats.forget_below(self.next_id, REMEMBERED);
        self.waiting.insert(seq_id, (now, item));
        Ok(Submitted::New)
    }

    /// Skips an id whose request was refused, for the client goes on with the next one. An id that has a request keeps
    /// it.
    pub fn consume(&mut self, seq_id: u64) {
        if seq_id >= self.next_id && !self.repeats.sent.contains_key(&seq_id) {
            self.consumed.insert(seq_id);
        }
        self.skip_consumed();
        // A client whose requests are all refused after a gap does not fill the memory.
        if self.consumed.len() > REMEMBERED {
            self.next_id = self.consumed.pop_first().map_or(self.next_id, |id| id.saturating_add(1));
        }
    }

    /// The next request whose turn has come. To be called until it gives none: after [`Self::submit`] and
    /// [`Self::consume`], and at [`Self::deadline`].
    pub fn next(&mut self, now: Instant) -> Option<T> {
        self.skip_consumed();
        let first = *self.waiting.first_key_value()?.0;
        // The first of those that wait runs before the one whose time is over.
        if first > self.next_id && self.deadline().is_none_or(|deadline| deadline > now) {
            return None;
        }
        let (_, item) = self.waiting.remove(&first)?;
        self.next_id = self.next_id.max(first.saturating_add(1));
        self.first_limit = None;
        self.consumed = self.consumed.split_off(&self.next_id);
        self.skip_consumed();
        Some(item)
    }

    /// The time at which [`Self::next`] gives up what is missing, if any request waits for it.
    pub fn deadline(&self) -> Option<Instant> {
        let limit = self.first_limit.unwrap_or(self.limit);
        self.waiting.values().map(|(arrived, _)| *arrived + limit).min()
    }

    /// The id from which the order goes on: the one that is missing, while requests wait.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Gives up the requests that wait, which it returns, and all before them.
    pub fn give_up(&mut self) -> impl Iterator<Item = T> + use<R, T> {
        if let Some((&last, _)) = self.waiting.last_key_value() {
            self.next_id = last.saturating_add(1);
            self.consumed = self.consumed.split_off(&self.next_id);
        }
        std::mem::take(&mut self.waiting).into_values().map(|(_, item)| item)
    }

    fn skip_consumed(&mut self) {
        while self.consumed.remove(&self.next_id) {
            self.next_id = self.next_id.saturating_add(1);
        }
    }
}

/// Requests whose numbers have no order, each carried out once: those of a sampling session, where each of its clients
/// has a block of numbers for itself.
#[derive(Clone, Debug)]
pub struct Unordered<R> {
    repeats: Repeats<R>,
    /// Numbers as they came.
    arrived: VecDeque<u64>,
}

impl<R> Default for Unordered<R> {
    fn default() -> Self {
        Self { repeats: Repeats::default(), arrived: VecDeque::new() }
    }
}

impl<R: Clone> Unordered<R> {
    /// The request that has this number and body, if it was taken before.
    ///
    /// # Errors
    /// The number was sent with another body.
    pub fn repeat(&self, number: u64, body: BodyHash) -> Result<Option<R>, OtherBody> {
        self.repeats.repeat(number, body)
    }

    /// Remembers `request`, which [`Self::repeat`] did not find. The one that came first is forgotten first.
    pub fn take(&mut self, number: u64, body: BodyHash, request: R) {
        self.repeats.sent.insert(number, (body, request));
        self.arrived.push_back(number);
        if self.arrived.len() > REMEMBERED_OF_EPOCH
            && let Some(oldest) = self.arrived.pop_front()
        {
            self.repeats.sent.remove(&oldest);
        }
    }
}

/// Requests that an epoch of [`OnArrival`], or an [`Unordered`], remembers.
const REMEMBERED_OF_EPOCH: usize = 10_000;

/// Why a number of [`OnArrival`] gives no request. Permanent: to be answered by 400 with this text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    #[error(
        "seq_id {0} was used for another request of this adapter; number requests from 1 upwards, or begin anew with \
         create_model"
    )]
    Reused(i64),
    #[error(
        "seq_id {0} is not above all those that were taken long ago or before the server was restarted, so a repeat \
         cannot be told; number on from there, or begin anew with create_model"
    )]
    Forgotten(i64),
}

/// The order of a model whose client sends one request after another: as they arrive, with gaps.
#[derive(Clone, Debug)]
pub struct OnArrival<R> {
    repeats: Repeats<R, i64>,
    /// The largest number that was forgotten, or that an earlier process took.
    forgotten: Option<i64>,
}

impl<R> Default for OnArrival<R> {
    fn default() -> Self {
        Self { repeats: Repeats::default(), forgotten: None }
    }
}

impl<R: Clone> OnArrival<R> {
    /// The order of a model for which an earlier process took requests up to number `last`.
    pub fn resumed(last: i64) -> Self {
        Self { forgotten: Some(last), ..Self::default() }
    }

    /// The largest number that was taken.
    pub fn last(&self) -> Option<i64> {
        self.repeats.sent.last_key_value().map(|(&last, _)| last).max(self.forgotten)
    }

    /// A client attaches with `create_model`: its ids begin anew and repeat none of the clients before it.
    pub fn open_epoch(&mut self) {
        *self = Self::default();
    }

    /// The request that has this number and body, if it was taken before.
    ///
    /// # Errors
    /// The number was used for another body, or is too old to tell.
    pub fn repeat(&self, number: i64, body: BodyHash) -> Result<Option<R>, SequenceError> {
        match self.repeats.find(number, body) {
            None => Err(SequenceError::Reused(number)),
            Some(None) if self.forgotten.is_some_and(|last| number <= last) => {
                Err(SequenceError::Forgotten(number))
            }
            Some(found) => Ok(found),
        }
    }

    /// Remembers `request`, which [`Self::repeat`] did not find.
    pub fn take(&mut self, number: i64, body: BodyHash, request: R) {
        self.repeats.sent.insert(number, (body, request));
        let last = self.repeats.forget_below(i64::MAX, REMEMBERED_OF_EPOCH);
        self.forgotten = last.or(self.forgotten);
    }
}

#[cfg(test)]
mod tests;
