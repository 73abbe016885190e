//! Futures: a submitted request gets an id, and its result stays for some time under that id, so that a client whose
//! connection broke can ask again. A poll waits until the result is there or its time is over.

mod reserved;

pub use reserved::Reserved;

use super::{
    registry::Tenant,
    request::{Answer, Refusal, Reply, Ticket},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use utoipa::ToSchema;

/// Bounds on futures.
#[derive(Clone, Debug)]
pub struct FutureLimits {
    /// Requests that wait or are being carried out, at most. One of several tenants has no more than it leaves free.
    pub pending: usize,
    /// Bytes of the data of these requests, at most; one alone may have more.
    pub pending_bytes: usize,
    /// Results that are kept, at most. The one that came first goes first.
    pub kept: usize,
    /// Bytes of the results that are kept, at most; the newest is always kept.
    pub bytes: usize,
    /// Time for which a result is kept.
    pub lifetime: Duration,
    /// Time for which a poll waits for a result. Clients give up after 45 s.
    pub poll: Duration,
    /// Time for which a request waits for those before it that have not arrived. Clients send a lost one again after
    /// 60 s and some more.
    pub gap: Duration,
}

impl Default for FutureLimits {
    fn default() -> Self {
        Self {
            pending: 1024,
            pending_bytes: 2 << 30,
            kept: 10_000,
            bytes: 1 << 30,
            lifetime: Duration::from_secs(3600),
            poll: Duration::from_secs(35),
            gap: Duration::from_secs(120),
        }
    }
}

/// A body of an HTTP reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    pub content_type: &'static str,
    pub bytes: Vec<u8>,
}

impl Body {
    /// JSON.
    pub fn json(value: &impl Serialize) -> Self {
        Self { content_type: "application/json", bytes: serde_json::to_vec(value).unwrap_or_default() }
    }
}

/// Writes a reply of the engine as a body: as protobuf if the flag is set and the wire has it, else as JSON. It runs
/// when a client asks for the result.
pub type Render = Box<dyn Fn(&Reply, bool) -> Body + Send + Sync>;

/// A result under its id.
pub struct Outcome {
    answer: Answer,
    render: Render,
}

impl Outcome {
    /// The body for a client. A refusal is JSON: `{error, category}`.
    pub fn body(&self, protobuf: bool) -> Body {
        let refused =
            |error: &str, category| Body::json(&serde_json::json!({"error": error, "category": category}));
        match &self.answer {
            Ok(reply) => (self.render)(reply, protobuf),
            Err(Refusal::User(text)) => refused(text, "user"),
            Err(refusal @ (Refusal::Server(_) | Refusal::Stopping)) => {
                refused(&refusal.to_string(), "server")
            }
        }
    }

    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// Approximate bytes in memory.
    fn bytes(&self) -> usize {
        const FIXED: usize = 1024;
        match &self.answer {
            // The other half: weights, which writing the result needs.
            Ok(Reply::Passed(pass)) => {
                FIXED + pass.log_probs.iter().map(|datum| 48 + 8 * datum.len()).sum::<usize>()
            }
            Ok(Reply::Sampled(sampled)) => FIXED + sampled.bytes(),
            Ok(_) => FIXED,
            Err(refusal) => FIXED + refusal.to_string().len(),
        }
    }
}

/// The place of a request in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Requests that came before it and are not answered.
    pub ahead: usize,
    /// The oldest request that is not answered: `forward_backward of policy_v1`. Empty for one of another tenant.
    pub current: String,
    /// Seconds since the request was submitted.
    pub waited: u64,
    /// The reason why it is not in the queue yet.
    pub held: Option<String>,
}

impl Place {
    /// Cause and place, as a sentence.
    pub fn reason(&self) -> String {
        let Self { ahead, current, waited, held } = self;
        if let Some(reason) = held {
            return format!("{reason}, for {waited} s");
        }
        match (ahead, current.is_empty()) {
            (0, _) => format!("{current} is being carried out, {waited} s after it was submitted"),
            (_, true) => format!("number {} in the queue for {waited} s", ahead + 1),
            _ => format!("number {} in the queue for {waited} s, behind {current}", ahead + 1),
        }
    }
}

/// The state of a future, for one who asks.
pub enum Look {
    /// No such id, or the result is no longer kept, or it is another tenant's.
    Unknown,
    Pending(Place),
    Done(Arc<Outcome>),
}

/// The queue is full.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("{0} requests wait already, as many as this server takes; send it again in some seconds")]
    Requests(usize),
    #[error(
        "the requests that wait have {0} bytes of data, and with this one more than this server takes; send it again \
         in some seconds"
    )]
    Bytes(usize),
    #[error(
        "{requests} requests of this key wait already, with {bytes} bytes of data, and room is left for those of \
         others; send it again in some seconds"
    )]
    Share { requests: usize, bytes: usize },
}

/// Requests that are pending, and bytes of their data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    requests: usize,
    bytes: usize,
}

struct Entry {
    owner: Tenant,
    /// `forward_backward of policy_v1`
    work: String,
    /// Bytes of its data while it is pending.
    bytes: usize,
    submitted: Instant,
    /// The reason why it is held back.
    held: Option<String>,
    /// Names it in the engine, while one that samples is pending.
    ticket: Option<Ticket>,
    changed: Arc<Notify>,
    /// With its time.
    outcome: Option<(Arc<Outcome>, Instant)>,
    is_read: bool,
}

/// Futures by number. Pure: time comes from the caller.
#[derive(Default)]
struct Table {
    entries: BTreeMap<u64, Entry>,
    pending: BTreeSet<u64>,
    /// Bytes of the data of those that are pending.
    pending_bytes: usize,
    /// The part of each tenant in what is pending.
    shares: BTreeMap<Tenant, Load>,
    /// Those with a result, by the time at which it came.
    kept: VecDeque<u64>,
    bytes: usize,
    next: u64,
}

impl Table {
    fn open(
        &mut self,
        owner: Tenant,
        work: String,
        bytes: usize,
        now: Instant,
        limits: &FutureLimits,
    ) -> Result<u64, Full> {
        self.expire(now, limits);
        if self.pending.len() >= limits.pending {
            return Err(Full::Requests(self.pending.len()));
        }
        let pending_bytes = self.pending_bytes.saturating_add(bytes);
        if pending_bytes > limits.pending_bytes && !self.pending.is_empty() {
            return Err(Full::Bytes(self.pending_bytes));
        }
        let share = self.share(&owner, bytes, limits)?;
        self.shares.insert(owner.clone(), share);
        self.pending_bytes = pending_bytes;
        let number = self.next;
        self.next += 1;
        let changed = Arc::default();
        let entry = Entry {
            owner,
            work,
            bytes,
            submitted: now,
            held: None,
            ticket: None,
            changed,
            outcome: None,
            is_read: false,
        };
        self.entries.insert(number, entry);
        self.pending.insert(number);
        Ok(number)
    }

    /// The share of `owner` with a request more. One of several tenants has no more than it leaves free, so that
    /// others find room; its first request needs room alone.
    fn share(&self, owner: &Tenant, bytes: usize, limits: &FutureLimits) -> Result<Load, Full> {
        let Load { requests, bytes: held } = self.shares.get(owner).copied().unwrap_or_default();
        let free = limits.pending.saturating_sub(self.pending.len());
        let free_bytes = limits.pending_bytes.saturating_sub(self.pending_bytes);
        let share = Load { requests: requests + 1, bytes: held.saturating_add(bytes) };
        let is_large = share.requests > free || share.bytes > free_bytes;
        match is_large && requests > 0 && !owner.is_only() {
            true => Err(Full::Share { requests, bytes: held }),
            false => Ok(share),
        }
    }

    fn finish(&mut self, number: u64, outcome: Outcome, now: Instant, limits: &FutureLimits) {
        let Some(entry) = self.entries.get_mut(&number).filter(|entry| entry.outcome.is_none()) else {
            return;
        };
        self.bytes += outcome.bytes();
        entry.ticket = None;
        entry.outcome = Some((Arc::new(outcome), now));
        entry.changed.notify_waiters();
        self.leave(number);
        self.kept.push_back(number);
        self.expire(now, limits);
    }

    /// Takes a request out of those that are pending.
    fn leave(&mut self, number: u64) {
        self.pending.remove(&number);
        let Some(entry) = self.entries.get_mut(&number) else { return };
        let bytes = std::mem::take(&mut entry.bytes);
        self.pending_bytes -= bytes;
        if let Some(share) = self.shares.get_mut(&entry.owner) {
            *share = Load { requests: share.requests - 1, bytes: share.bytes - bytes };
        }
        self.shares.retain(|_, share| share.requests > 0);
    }

    /// Drops results that are too old or too many.
    fn expire(&mut self, now: Instant, limits: &FutureLimits) {
        while let Some(&oldest) = self.kept.front() {
            let came = self.entries.get(&oldest).and_then(|entry| entry.outcome.as_ref());
            let is_old = came.is_none_or(|(_, at)| now.duration_since(*at) >= limits.lifetime);
            let is_surplus = self.kept.len() > limits.kept || self.bytes > limits.bytes;
            if !(is_old || is_surplus && self.kept.len() > 1) {
                return;
            }
            self.kept.pop_front();
            if let Some((outcome, _)) = self.entries.remove(&oldest).and_then(|entry| entry.outcome) {
                self.bytes -= outcome.bytes();
            }
        }
    }

    fn look(&mut self, number: u64, owner: &Tenant, now: Instant) -> Look {
        let Some(entry) = self.entries.get_mut(&number).filter(|entry| entry.owner == *owner) else {
            return Look::Unknown;
        };
        if let Some((outcome, _)) = &entry.outcome {
            entry.is_read = true;
            return Look::Done(outcome.clone());
        }
        let waited = now.duration_since(entry.submitted).as_secs();
        let held = entry.held.clone();
        let before = self.pending.range(..=number).filter_map(|number| self.entries.get(number));
        let mut queued = before.filter(|entry| entry.held.is_none()).peekable();
        let first = queued.peek().filter(|first| first.owner == *owner);
        let current = first.map(|first| first.work.clone()).unwrap_or_default();
        let ahead = queued.count().saturating_sub(1);
        Look::Pending(Place { ahead, current, waited, held })
    }
}

/// A request that waits or is being carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Queued {
    /// `forward_backward of policy_v1`
    pub work: String,
    /// Seconds since it was submitted.
    pub waited: u64,
    /// The reason why it is not in the queue yet.
    pub held: Option<String>,
}

/// Numbers of futures, for metrics and for the end of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub pending: usize,
    pub kept: usize,
    pub bytes: usize,
    /// Results that nobody has asked for.
    pub unread: usize,
}

/// All futures of a server.
pub struct Futures {
    limits: FutureLimits,
    /// Another one in each process, so that an id of an earlier one is unknown.
    nonce: u32,
    table: Mutex<Table>,
}

impl Futures {
    pub fn new(limits: FutureLimits) -> Self {
        let nonce = (RandomState::new().hash_one(std::process::id()) >> 32) as u32;
        Self { limits, nonce, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a future for `work` with `bytes` of data, whose result `render` writes.
    ///
    /// # Errors
    /// [`Full`]: too many are pending, or too much data.
    pub fn open(
        self: &Arc<Self>,
        owner: Tenant,
        work: String,
        bytes: usize,
        render: Render,
    ) -> Result<Promise, Full> {
        let number = self.table().open(owner, work, bytes, Instant::now(), &self.limits)?;
        Ok(Promise { futures: self.clone(), number, render: Some(render) })
    }

    fn id(&self, number: u64) -> String {
        format!("future_{:08x}{number:08x}", self.nonce)
    }

    fn number(&self, id: &str) -> Option<u64> {
        let digits = id.strip_prefix("future_")?.get(8..)?;
        let number = u64::from_str_radix(digits, 16).ok()?;
        (self.id(number) == id).then_some(number)
    }

    /// The state of a future now.
    pub fn look(&self, id: &str, owner: &Tenant) -> Look {
        self.number(id).map_or(Look::Unknown, |number| self.table().look(number, owner, Instant::now()))
    }

    /// Waits for a result, for the time of a poll or for `most` if that is given.
    pub async fn wait(&self, id: &str, owner: &Tenant, most: Option<Duration>) -> Look {
        let ends = tokio::time::Instant::now() + most.unwrap_or(self.limits.poll);
        loop {
            let changed = self.number(id).and_then(|number| {
                let table = self.table();
                table.entries.get(&number).map(|entry| entry.changed.clone())
            });
            let Some(changed) = changed else { return Look::Unknown };
            // Listening begins before the look, so that no change falls between them.
            let mut notified = std::pin::pin!(changed.notified());
            notified.as_mut().enable();
            match self.look(id, owner) {
                Look::Pending(place) => {
                    if tokio::time::timeout_at(ends, notified).await.is_err() {
                        return match self.look(id, owner) {
                            Look::Pending(_) => Look::Pending(place),
                            other => other,
                        };
                    }
                }
                other => return other,
            }
        }
    }

    /// Notes by what name the engine can end the request of a future.
    pub fn note_ticket(&self, id: &str, ticket: Ticket) {
        let mut table = self.table();
        let entry = self.number(id).and_then(|number| table.entries.get_mut(&number));
        if let Some(entry) = entry.filter(|entry| entry.outcome.is_none()) {
            entry.ticket = Some(ticket);
        }
    }

    /// The name by which the engine can end the request of a future of `owner`; `None`: it does not sample.
    pub fn ticket(&self, id: &str, owner: &Tenant) -> Option<Ticket> {
        let table = self.table();
        table.entries.get(&self.number(id)?).filter(|entry| entry.owner == *owner)?.ticket
    }

    /// Time for which a poll waits for a result.
    pub fn poll(&self) -> Duration {
        self.limits.poll
    }

    /// Time for which a request waits for those before it that have not arrived.
    pub fn gap(&self) -> Duration {
        self.limits.gap
    }

    /// The first `most` requests of `owner` that are pending, in the order in which they came.
    pub fn queue(&self, owner: &Tenant, most: usize) -> Vec<Queued> {
        let (table, now) = (self.table(), Instant::now());
        let own = table.pending.iter().filter_map(|number| table.entries.get(number));
        let own = own.filter(|entry| entry.owner == *owner).take(most);
        let queued = |entry: &Entry| Queued {
            work: entry.work.clone(),
            waited: now.duration_since(entry.submitted).as_secs(),
            held: entry.held.clone(),
        };
        own.map(queued).collect()
    }

    pub fn counts(&self) -> Counts {
        let table = self.table();
        let is_unread = |number: &&u64| table.entries.get(number).is_some_and(|entry| !entry.is_read);
        Counts {
            pending: table.pending.len(),
            kept: table.kept.len(),
            bytes: table.bytes,
            unread: table.kept.iter().filter(is_unread).count(),
        }
    }
}

/// The duty to answer a future. Dropped without an answer, it answers that the engine has ended.
pub struct Promise {
    futures: Arc<Futures>,
    number: u64,
    render: Option<Render>,
}

impl Promise {
    /// The id of its future.
    pub fn id(&self) -> String {
        self.futures.id(self.number)
    }

    pub fn answer(mut self, answer: Answer) {
        self.settle(answer);
    }

    /// Tells those who poll why the request is held back; `None`: it is in the queue.
    pub fn hold(&self, reason: Option<String>) {
        if let Some(entry) = self.futures.table().entries.get_mut(&self.number) {
            entry.held = reason;
        }
    }

    fn settle(&mut self, answer: Answer) {
        if let Some(render) = self.render.take() {
            let outcome = Outcome { answer, render };
            self.futures.table().finish(self.number, outcome, Instant::now(), &self.futures.limits);
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let text = "the engine ended before it carried this out; look at the server's log, and restart it";
        self.settle(Err(Refusal::Server(text.into())));
    }
}

#[cfg(test)]
mod tests;
