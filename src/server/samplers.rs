//! Samplers: the weights that clients sample from, by the id of a sampling session. One is of the base, of a saved
//! adapter, or of an adapter as it was at a request. It lives as long as the session of its client.

use super::{
    order::{BodyHash, OtherBody, Unordered},
    registry::Tenant,
    request::{ModelId, Source},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::sync::Notify;

/// Samplers of a tenant, at most. The one that was not used for longest goes first.
const MOST: usize = 4096;

/// Samplers that were made of an adapter without a name, at most; clients make one an update, and none says when it
/// needs it no more. The one that was not used for longest goes first.
const MOST_OF_ADAPTER: usize = 32;

/// Ends of requests that a client has not heard of, at most.
const MOST_ENDS: usize = 10_000;

/// Numbers that a client of a sampling session has for itself.
const BLOCK: u64 = 1_000_000_000;

/// The origin of a sampler's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    Base,
    /// A saved adapter, by its path.
    Saved(String),
    /// An adapter as it was.
    Adapter(ModelId),
}

/// A sampler.
#[derive(Debug)]
pub struct Sampler {
    /// The session of its client; `None`: it is of a path, for clients without sessions.
    pub session: Option<String>,
    pub weights: Weights,
    pub source: Source,
    body: BodyHash,
    /// Ids of futures by number.
    pub requests: Unordered<String>,
    /// Clients that share it with the first one, which is client 0.
    clients: u64,
    ends: BTreeMap<u64, Arc<Ends>>,
    pub used: SystemTime,
    /// False: it could not be made. Changed by answers of the engine, which take no lock.
    pub exists: Arc<AtomicBool>,
}

impl Sampler {
    pub fn new(session: Option<String>, weights: Weights, source: Source, body: BodyHash) -> Self {
        let (requests, ends) = (Unordered::default(), BTreeMap::new());
        let exists = Arc::new(AtomicBool::new(true));
        Self { session, weights, source, body, requests, clients: 0, ends, used: SystemTime::now(), exists }
    }

    /// A number for one more client.
    pub fn join(&mut self) -> u64 {
        self.clients += 1;
        self.clients
    }

    /// Ends of the requests of one of its clients.
    pub fn ends(&mut self, client: u64) -> Arc<Ends> {
        // Numbers that clients drew by themselves are as many as they like.
        while self.ends.len() >= MOST_ENDS && !self.ends.contains_key(&client) {
            self.ends.pop_last();
        }
        self.ends.entry(client).or_default().clone()
    }

    /// The client whose request has `number`.
    pub fn client_of(number: u64) -> u64 {
        number / BLOCK
    }
}

/// The samplers of all tenants by id.
#[derive(Debug, Default)]
pub struct Samplers {
    samplers: BTreeMap<(Tenant, String), Sampler>,
    /// Paths of saved adapters by the names that `xorl-client` gives them.
    names: BTreeMap<(Tenant, String), String>,
}

/// A sampler that was given up, with the names of its tenant and in the engine.
pub type Closed = (Tenant, Source);

impl Samplers {
    /// Adds a sampler unless it is there. Returns those that went for it.
    ///
    /// # Errors
    /// The id has a sampler of another request.
    pub fn open(
        &mut self,
        tenant: &Tenant,
        id: &str,
        number: u64,
        sampler: Sampler,
    ) -> Result<Vec<Closed>, OtherBody> {
        let key = (tenant.clone(), id.to_owned());
        if let Some(known) = self.get(tenant, id) {
            known.used = SystemTime::now();
            return if known.body == sampler.body { Ok(Vec::new()) } else { Err(OtherBody(number)) };
        }
        let weights = sampler.weights.clone();
        let is_frozen = matches!(weights, Weights::Adapter(_));
        self.samplers.insert(key, sampler);
        let mut closed = Vec::new();
        if is_frozen {
            closed.extend(self.close_surplus(tenant, id, MOST_OF_ADAPTER, |other| other.weights == weights));
        }
        closed.extend(self.close_surplus(tenant, id, MOST, |_| true));
        Ok(closed)
    }

    /// Closes the sampler that was not used for longest of those that are `counted`, if these are more than `most`. The
    /// one of `newest` stays.
    fn close_surplus(
        &mut self,
        tenant: &Tenant,
        newest: &str,
        most: usize,
        counted: impl Fn(&Sampler) -> bool,
    ) -> Option<Closed> {
        let own = self.samplers.iter().filter(|((owner, _), other)| owner == tenant && counted(other));
        let (count, oldest) = own.fold((0, None), |(count, oldest), ((_, id), other)| {
            let is_older = oldest.is_none_or(|(used, _)| other.used < used);
            (count + 1, if is_older && id != newest { Some((other.used, id)) } else { oldest })
        });
        let id = oldest.filter(|_| count > most)?.1.clone();
        self.close(tenant, &id)
    }

    pub fn get(&mut self, tenant: &Tenant, id: &str) -> Option<&mut Sampler> {
        let found = self.samplers.get_mut(&(tenant.clone(), id.to_owned()));
        found.filter(|sampler| sampler.exists.load(Ordering::Acquire))
    }

    pub fn close(&mut self, tenant: &Tenant, id: &str) -> Option<Closed> {
        let key = (tenant.clone(), id.to_owned());
        self.samplers.remove(&key).map(|sampler| (key.0, sampler.source))
    }

    /// Ids of the samplers of a session.
    pub fn of_session<'a>(&'a self, tenant: &'a Tenant, session: &'a str) -> impl Iterator<Item = &'a str> {
        let own = self.samplers.iter().filter(move |((owner, _), sampler)| {
            let exists = sampler.exists.load(Ordering::Acquire);
            exists && owner == tenant && sampler.session.as_deref() == Some(session)
        });
        own.map(|((_, id), _)| id.as_str())
    }

    /// Samplers of all tenants that were not used for `time` before `now`, with their sessions.
    pub fn idle(&self, now: SystemTime, time: Duration) -> Vec<(Tenant, String, Option<String>)> {
        let is_idle = |sampler: &Sampler| now.duration_since(sampler.used).is_ok_and(|idle| idle >= time);
        let idle = self.samplers.iter().filter(|(_, sampler)| is_idle(sampler));
        idle.map(|((tenant, id), sampler)| (tenant.clone(), id.clone(), sampler.session.clone())).collect()
    }

    /// Gives the saved adapter at `path` the name `name`.
    pub fn name(&mut self, tenant: &Tenant, name: &str, path: String) {
        self.names.insert((tenant.clone(), name.to_owned()), path);
    }

    /// The path of the saved adapter that has this name.
    pub fn named(&self, tenant: &Tenant, name: &str) -> Option<String> {
        self.names.get(&(tenant.clone(), name.to_owned())).cloned()
    }
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Later ends have larger numbers.
    pub cursor: u64,
    pub future: String,
    pub is_failed: bool,
}

/// Ends of requests, in the order in which they came, for a client that asks what has ended since.
#[derive(Debug, Default)]
pub struct Ends {
    /// With the number of the last.
    list: Mutex<(u64, VecDeque<Ended>)>,
    changed: Notify,
}

impl Ends {
    fn lock(&self) -> MutexGuard<'_, (u64, VecDeque<Ended>)> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, future: String, is_failed: bool) {
        let mut list = self.lock();
        let (last, ends) = &mut *list;
        *last += 1;
        ends.push_back(Ended { cursor: *last, future, is_failed });
        if ends.len() > MOST_ENDS {
            ends.pop_front();
        }
        drop(list);
        self.changed.notify_waiters();
    }

    /// Ends after `cursor`; those before are forgotten.
    fn after(&self, cursor: u64) -> Vec<Ended> {
        let mut list = self.lock();
        while list.1.front().is_some_and(|first| first.cursor <= cursor) {
            list.1.pop_front();
        }
        list.1.iter().cloned().collect()
    }

    /// Waits for an end after `cursor`, for `most` time. Returns all of them.
    pub async fn wait(&self, cursor: u64, most: Duration) -> Vec<Ended> {
        let until = tokio::time::Instant::now() + most;
        loop {
            // Listening begins before the look, so that no end falls between them.
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let ends = self.after(cursor);
            if !ends.is_empty() || tokio::time::timeout_at(until, changed).await.is_err() {
                return ends;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(weights: Weights, body: &str) -> Sampler {
        let session = Some("sess-1".to_owned());
        Sampler::new(session, weights, Source::Base, BodyHash::of(body.as_bytes()))
    }

    #[test]
    fn a_sampler_is_of_its_tenant_and_of_one_request() {
        let (one, two) = (Tenant::named("one").unwrap(), Tenant::named("two").unwrap());
        let mut samplers = Samplers::default();
        assert_eq!(samplers.open(&one, "s", 0, sampler(Weights::Base, "a")), Ok(Vec::new()));
        assert_eq!(samplers.open(&one, "s", 0, sampler(Weights::Base, "a")), Ok(Vec::new()));
        assert_eq!(samplers.open(&one, "s", 0, sampler(Weights::Base, "b")), Err(OtherBody(0)));
        assert!(samplers.get(&one, "s").is_some() && samplers.get(&two, "s").is_none());
        assert_eq!(samplers.of_session(&one, "sess-1").collect::<Vec<_>>(), ["s"]);
        assert_eq!(samplers.of_session(&two, "sess-1").count(), 0);
        assert!(samplers.close(&two, "s").is_none() && samplers.close(&one, "s").is_some());
        // One that was closed, or could not be made, can be made again by any request.
        assert_eq!(samplers.open(&one, "s", 0, sampler(Weights::Base, "b")), Ok(Vec::new()));
        samplers.get(&one, "s").unwrap().exists.store(false, Ordering::Release);
        assert!(samplers.get(&one, "s").is_none());
        assert_eq!(samplers.open(&one, "s", 0, sampler(Weights::Base, "c")), Ok(Vec::new()));
    }

    #[test]
    fn of_many_samplers_of_an_adapter_the_one_unused_for_longest_goes() {
        let tenant = Tenant::everyone();
        let of = |name: &str| Weights::Adapter(ModelId::new(name).unwrap());
        let mut samplers = Samplers::default();
        samplers.open(&tenant, "other", 0, sampler(of("b"), "")).unwrap();
        for i in 0..MOST_OF_ADAPTER {
            let closed = samplers.open(&tenant, &format!("s{i}"), 0, sampler(of("a"), "")).unwrap();
            assert!(closed.is_empty(), "{i}");
        }
        samplers.get(&tenant, "s0").unwrap().used = SystemTime::now() + Duration::from_secs(9);
        assert_eq!(samplers.open(&tenant, "new", 0, sampler(of("a"), "")).unwrap().len(), 1);
        assert!(samplers.get(&tenant, "s1").is_none());
        assert!(["s0", "s2", "new", "other"].iter().all(|id| samplers.get(&tenant, id).is_some()));
    }

    #[test]
    fn a_client_hears_of_each_end_until_it_has_read_it() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(hears_of_each_end());
    }

    async fn hears_of_each_end() {
        let ends = Arc::new(Ends::default());
        assert!(ends.wait(0, Duration::ZERO).await.is_empty());
        let later = ends.clone();
        let waiting = tokio::spawn(async move { later.wait(0, Duration::from_secs(20)).await });
        tokio::task::yield_now().await;
        ends.add("a".into(), false);
        let first = waiting.await.unwrap();
        assert_eq!((first.len(), first[0].future.as_str(), first[0].cursor), (1, "a", 1));
        ends.add("b".into(), true);
        assert_eq!(ends.wait(0, Duration::ZERO).await.len(), 2, "what was not confirmed is told again");
        let rest = ends.wait(1, Duration::ZERO).await;
        assert_eq!(rest, [Ended { cursor: 2, future: "b".into(), is_failed: true }]);
    }
}
