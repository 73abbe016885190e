//! Requests to sample, and samplers from their making to their end, as the wires ask for them.

use super::{
    app::{App, DEFAULT_MODEL},
    checkpoints::Stored,
    fault::Fault,
    futures::Render,
    labels,
    order::{BodyHash, OtherBody},
    registry::Tenant,
    request::{Answer, ModelId, Reply, Request, SampleAnswer, Source, Task},
    samplers::{Closed, Sampler, Weights},
};
use crate::infer::request::SampleRequest;
use sha2::{Digest, Sha256};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::oneshot;

/// A request to sample that gets a future.
pub struct Sample<'a> {
    pub tenant: &'a Tenant,
    pub source: Source,
    /// Its work, as the queue names it: `asample of sess-1:sample:0`.
    pub work: String,
    pub request: SampleRequest,
    pub render: Render,
}

/// A sampler of a session that is asked for.
pub struct Wanted<'a> {
    pub tenant: &'a Tenant,
    /// The session, or the adapter itself where it is of none.
    pub session: &'a str,
    /// Its number in the session.
    pub number: u64,
    pub body: BodyHash,
}

/// The answer of the engine that a sampler is there, to be waited for.
pub type Opening = oneshot::Receiver<Answer>;

impl From<OtherBody> for Fault {
    fn from(error: OtherBody) -> Self {
        Self::user(error.to_string())
    }
}

/// The id of sampler `number` of a session.
pub fn sampler_id(session: &str, number: u64) -> String {
    format!("{session}:sample:{number}")
}

/// The refusal of a request for a sampler that is not there.
pub fn no_sampler(id: &str) -> Fault {
    let shown: String = id.chars().take(128).collect();
    Fault::not_found(format!(
        "sampling session {shown:?} is not known: its session has ended, newer ones took its place, or the server was \
         started after it; make another sampling client"
    ))
}

impl App {
    /// Takes a request to sample, and returns the id of its future.
    ///
    /// # Errors
    /// A full queue, or the server takes no request now.
    pub fn sample(
        &self,
        sample: Sample,
        after: impl FnOnce(&str, bool) + Send + 'static,
    ) -> Result<String, Fault> {
        let Sample { tenant, source, work, request, render } = sample;
        let id = {
            let _registry = self.registry();
            self.check_open()?;
            let promise = self.futures.open(tenant.clone(), work, request.bytes(), render)?;
            let id = promise.id();
            let future = id.clone();
            let relative = self.relative();
            let ended = move |answer: SampleAnswer| {
                let is_failed = answer.is_err();
                promise.answer(answer.map(Reply::Sampled).map_err(relative));
                after(&future, is_failed);
            };
            let ticket = self.engine.sample(source, request, Box::new(ended));
            self.futures.note_ticket(&id, ticket);
            id
        };
        Ok(id)
    }

    /// Takes request `number` of a sampler, and returns the id of its future. A repeat gets the id of the first.
    ///
    /// # Errors
    /// No such sampler, a number that is used, a full queue, or the server takes no request now.
    pub fn sample_once(
        &self,
        tenant: &Tenant,
        sampler: &str,
        number: u64,
        body: BodyHash,
        request: SampleRequest,
        render: Render,
    ) -> Result<String, Fault> {
        let mut samplers = self.samplers();
        let known = samplers.get(tenant, sampler).ok_or_else(|| no_sampler(sampler))?;
        known.used = SystemTime::now();
        if let Some(first) = known.requests.repeat(number, body)? {
            return Ok(first);
        }
        let ends = known.ends(Sampler::client_of(number));
        let work = format!("asample of {sampler}");
        let sample = Sample { tenant, source: known.source.clone(), work, request, render };
        let id = self.sample(sample, move |future, is_failed| ends.add(future.to_owned(), is_failed))?;
        known.requests.take(number, body, id.clone());
        Ok(id)
    }

    /// Ends a request of `tenant` that samples. False: the future is not known, has its result, or does not sample.
    pub fn cancel(&self, tenant: &Tenant, future: &str) -> bool {
        let ticket = self.futures.ticket(future, tenant);
        ticket.map(|ticket| self.engine.cancel(ticket)).is_some()
    }

    /// Makes a sampler of the base for a session, and returns its id. A repeat finds it.
    ///
    /// # Errors
    /// The number was used for another one.
    pub fn open_base(&self, wanted: &Wanted) -> Result<String, Fault> {
        self.add_sampler(wanted, Weights::Base, Source::Base)
    }

    /// Makes a sampler of a saved adapter for a session. A repeat finds it.
    ///
    /// # Errors
    /// The number was used for another one, or the server takes no request now.
    pub fn open_saved(
        &self,
        wanted: &Wanted,
        folder: PathBuf,
        path: String,
    ) -> Result<(String, Opening), Fault> {
        let id = sampler_id(wanted.session, wanted.number);
        let source = self.engine_name(wanted.tenant, &id)?;
        self.check_open()?;
        let id = self.add_sampler(wanted, Weights::Saved(path), Source::Adapter(source.clone()))?;
        let exists = self.samplers().get(wanted.tenant, &id).map(|sampler| sampler.exists.clone());
        // One that a newer one has driven out already does not matter to anyone.
        let opening = self.open_in_engine(exists.unwrap_or_default(), source, folder);
        Ok((id, opening))
    }

    /// Notes a sampler of `model` that [`Task::Freeze`] is about to make, and returns its id with its name in the
    /// engine. A repeat finds it.
    ///
    /// # Errors
    /// The number was used for another one.
    pub fn note_frozen(&self, wanted: &Wanted, model: &ModelId) -> Result<(String, ModelId), Fault> {
        let id = sampler_id(wanted.session, wanted.number);
        let name = self.engine_name(wanted.tenant, &id)?;
        let weights = Weights::Adapter(model.clone());
        Ok((self.add_sampler(wanted, weights, Source::Adapter(name.clone()))?, name))
    }

    /// The sampler of a saved adapter for clients without sessions. It is made where it is not there, and then the
    /// engine's answer follows; a request to sample need not wait for it.
    ///
    /// # Errors
    /// The server takes no request now.
    pub fn open_path(
        &self,
        tenant: &Tenant,
        stored: &Stored,
        path: &str,
    ) -> Result<(Source, Option<Opening>), Fault> {
        // A save that was replaced is another one.
        let saved = stored.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let hash = Sha256::digest(format!("{path}\0{saved}"));
        let digits: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        let id = format!("path:{digits}");
        let name = self.engine_name(tenant, &id)?;
        let source = Source::Adapter(name.clone());
        self.check_open()?;
        let (closed, exists) = {
            let mut samplers = self.samplers();
            if let Some(known) = samplers.get(tenant, &id) {
                known.used = SystemTime::now();
                return Ok((source, None));
            }
            let (weights, body) = (Weights::Saved(path.to_owned()), BodyHash::of(id.as_bytes()));
            let sampler = Sampler::new(None, weights, source.clone(), body);
            let exists = sampler.exists.clone();
            (samplers.open(tenant, &id, 0, sampler)?, exists)
        };
        self.unload_samplers(closed);
        Ok((source, Some(self.open_in_engine(exists, name, stored.folder.clone()))))
    }

    fn engine_name(&self, tenant: &Tenant, id: &str) -> Result<ModelId, Fault> {
        let name = ModelId::new(id).and_then(|id| tenant.engine_id(&id));
        name.map_err(|error| Fault::user(error.to_string()))
    }

    fn add_sampler(&self, wanted: &Wanted, weights: Weights, source: Source) -> Result<String, Fault> {
        let Wanted { tenant, session, number, body } = *wanted;
        let id = sampler_id(session, number);
        let sampler = Sampler::new(Some(session.to_owned()), weights, source, body);
        let closed = self.samplers().open(tenant, &id, number, sampler);
        let closed = closed.map_err(|error| Fault::user(format!("sampling_session_{error}")))?;
        self.unload_samplers(closed);
        Ok(id)
    }

    /// Has the engine open a sampler. One that it cannot open does not exist, so that it can be made again.
    fn open_in_engine(&self, exists: Arc<AtomicBool>, name: ModelId, folder: PathBuf) -> Opening {
        let (told, opening) = oneshot::channel();
        let relative = self.relative();
        let opened = move |answer: Answer| {
            if answer.is_err() {
                exists.store(false, Ordering::Release);
            }
            // Nobody may be waiting.
            let _ = told.send(answer.map_err(relative));
        };
        let request = Request { model: name, task: Task::OpenSampler { folder } };
        self.engine.submit(request, Box::new(opened));
        opening
    }

    fn unload_samplers(&self, closed: impl IntoIterator<Item = Closed>) {
        for (_, source) in closed {
            let Source::Adapter(model) = source else { continue };
            let name = model.clone();
            let told = Box::new(move |answer: Answer| match answer {
                Ok(_) => tracing::debug!("sampler {name} is unloaded"),
                // Its making has failed before.
                Err(why) => tracing::debug!("sampler {name} is not unloaded: {why}"),
            });
            self.engine.submit(Request { model, task: Task::Unload }, told);
        }
    }

    /// Unloads the samplers of a session that has ended. What is being sampled from them goes on to its end.
    pub fn end_samplers(&self, tenant: &Tenant, session: &str) {
        let closed: Vec<Closed> = {
            let mut samplers = self.samplers();
            let ids: Vec<String> = samplers.of_session(tenant, session).map(str::to_owned).collect();
            ids.iter().filter_map(|id| samplers.close(tenant, id)).collect()
        };
        self.unload_samplers(closed);
    }

    /// Unloads the samplers that were not used for `time` before `now`, and whose session has no sign of life in it.
    pub fn unload_idle_samplers(&self, now: SystemTime, time: Duration) {
        let idle = self.samplers().idle(now, time);
        let closed: Vec<Closed> = idle
            .into_iter()
            .filter(|(tenant, _, session)| {
                let Some(session) = session else { return true };
                let seen = self.sessions().get(tenant, session).map(|session| session.seen);
                seen.is_none_or(|seen| now.duration_since(seen).is_ok_and(|silent| silent >= time))
            })
            .filter_map(|(tenant, id, _)| self.samplers().close(&tenant, &id))
            .collect();
        self.unload_samplers(closed);
    }

    /// The saved adapter that `path` names, with its path as clients of `scheme` have it. A short form belongs to the
    /// default adapter.
    ///
    /// # Errors
    /// There is none, or it is a whole model.
    pub fn saved(&self, tenant: &Tenant, path: &str, scheme: &str) -> Result<(Stored, String), Fault> {
        let model = ModelId::new(DEFAULT_MODEL).map_err(|error| Fault::user(error.to_string()))?;
        let stored = labels::find(&self.root(tenant)?, path, &model)?.0.adapter()?;
        let uri = stored.checkpoint.uri(scheme);
        Ok((stored, uri))
    }
}

/// The outcome of an [`Opening`].
///
/// # Errors
/// The engine could not open the sampler.
pub async fn opened(opening: Opening) -> Result<(), Fault> {
    match opening.await {
        Ok(answer) => Ok(answer.map(drop)?),
        Err(_) => {
            let detail =
                "the engine ended before it opened the sampler; look at the server's log, and restart it";
            Err(Fault::new(axum::http::StatusCode::SERVICE_UNAVAILABLE, detail))
        }
    }
}
