//! The state of a server as the page at `/` shows it to a tenant: its own adapters, sessions and requests, and what all
//! share.

use super::{
    app::App,
    fault::Fault,
    futures::Queued,
    history::{Course, Curve, INTERVAL, LOSS},
    registry::Tenant,
    request::{EngineState, ModelId, SamplingState, Usage},
    sessions::{Session, of_model},
};
use serde::Serialize;
use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};
use utoipa::ToSchema;

/// Adapters, sessions and requests in one answer, at most.
const MOST_ADAPTERS: usize = 200;
const MOST_SESSIONS: usize = 100;
const MOST_REQUESTS: usize = 20;

/// The state of the server. Times are in Unix seconds.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Overview)]
pub struct Overview {
    pub time: u64,
    pub server: About,
    pub queue: Queue,
    pub sampling: Sampling,
    pub memory: Memory,
    pub throughput: Throughput,
    /// The one with the last request first.
    pub adapters: Vec<Adapter>,
    /// Adapters of this key, those included that the list leaves out.
    pub adapter_count: usize,
    /// Adapters that a killed server has lost.
    pub lost: Vec<Lost>,
    /// Newest first.
    pub sessions: Vec<SessionSeen>,
}

/// The server itself.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Server)]
pub struct About {
    pub base_model: String,
    pub version: &'static str,
    /// False: a rank has failed.
    pub healthy: bool,
    /// Seconds since its start.
    pub uptime: u64,
    /// True: requests need a key.
    pub has_keys: bool,
    /// The owner of this key; `local` without keys.
    pub tenant: String,
}

/// Requests without an answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Queue)]
pub struct Queue {
    /// Requests of all keys.
    pub pending: usize,
    /// Requests that were answered since the start, of all keys.
    pub answered: u64,
    /// The first requests of this key.
    pub own: Vec<Queued>,
}

/// Requests to sample, of all keys.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Sampling)]
pub struct Sampling {
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Continuations that get tokens.
    pub running: usize,
    /// Tokens since the start.
    pub tokens: u64,
    /// Steps of the model since the start, each with a token of every running continuation or part of a prompt.
    pub steps: u64,
}

/// Memory and disk, in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Memory)]
pub struct Memory {
    /// Largest resident memory of each rank so far; empty before the first pass.
    pub peak_rss: Vec<u64>,
    /// Memory of a rank that adapters hold.
    pub adapters: u64,
    /// Memory of a rank that they may hold.
    pub adapters_limit: Option<u64>,
    /// Adapters of the default shape that fit in memory together.
    pub fits: Option<u64>,
    /// Bytes of output_dir.
    pub storage: u64,
    pub storage_limit: Option<u64>,
}

/// Tokens of the passes of this key.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Throughput)]
pub struct Throughput {
    /// Seconds of an interval.
    pub interval: u64,
    /// Tokens a second by interval, oldest first: an hour, or all since the start.
    pub tokens_per_second: Vec<f32>,
}

/// An adapter.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Adapter)]
pub struct Adapter {
    pub model_id: String,
    pub rank: usize,
    pub alpha: f64,
    /// Updates so far.
    pub step: u64,
    /// Passes with backward since the last update.
    pub accumulated: u64,
    /// False: it waits on disk.
    pub in_memory: bool,
    /// Bytes of a rank that it holds while it is in memory.
    pub bytes: u64,
    pub last_request: u64,
    /// Tokens of its passes since the server's start.
    pub tokens: u64,
    /// By name. `loss`: mean of a target. Of adapters that the query does not name, the loss alone.
    #[schema(value_type = BTreeMap<String, CurveSeen>)]
    pub curves: BTreeMap<String, CurveSeen>,
}

/// A value over updates. Where there are many, neighbours are joined to their mean.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Curve)]
pub struct CurveSeen {
    /// The last update of each point.
    pub steps: Vec<u64>,
    pub values: Vec<f32>,
}

/// An adapter that is lost.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Lost)]
pub struct Lost {
    pub model_id: String,
    /// The last saved state, and how to go on from it.
    pub reason: String,
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = overview::Session)]
pub struct SessionSeen {
    pub session_id: String,
    pub display_name: Option<String>,
    pub opened: u64,
    /// The last sign of life of its client.
    pub seen: u64,
    pub is_ended: bool,
    /// Its adapters that the server has.
    pub adapters: usize,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl From<&Curve> for CurveSeen {
    fn from(curve: &Curve) -> Self {
        let (steps, values) = curve.points().map(|(step, value)| (step, value as f32)).unzip();
        Self { steps, values }
    }
}

impl Overview {
    /// The state that `tenant` sees. `adapter`: its adapter with all curves.
    ///
    /// # Errors
    /// The name of an adapter is too long beside that of the tenant.
    pub fn of(app: &App, tenant: &Tenant, adapter: Option<&str>) -> Result<Self, Fault> {
        let engine = app.engine.state();
        let sessions = sessions(app, tenant);
        let (mut known, lost) = {
            let registry = app.registry();
            let known = registry.of(tenant).map(|(id, model)| (id.clone(), model.last_request));
            let lost = registry.lost_of(tenant);
            let lost = lost.map(|(id, text)| Lost { model_id: id.to_string(), reason: text });
            (known.collect::<Vec<_>>(), lost.collect())
        };
        let adapter_count = known.len();
        known.sort_by_key(|(_, last_request)| Reverse(*last_request));
        known.truncate(MOST_ADAPTERS);
        let named = |id: &ModelId| adapter == Some(id.as_str());
        let adapters = known.iter().filter_map(|(id, last_request)| {
            shown(app, tenant, &engine, id, named(id), *last_request).transpose()
        });
        Ok(Self {
            time: seconds(SystemTime::now()),
            adapters: adapters.collect::<Result<_, _>>()?,
            adapter_count,
            lost,
            sessions,
            server: About {
                base_model: app.settings.base_model.clone(),
                version: env!("CARGO_PKG_VERSION"),
                healthy: engine.healthy,
                uptime: app.history.age().as_secs(),
                has_keys: app.keys.are_needed(),
                tenant: tenant.name().to_owned(),
            },
            queue: Queue {
                pending: app.futures.counts().pending,
                answered: engine.answered,
                own: app.futures.queue(tenant, MOST_REQUESTS),
            },
            sampling: sampling(&engine),
            throughput: Throughput { interval: INTERVAL, tokens_per_second: app.history.rates(tenant) },
            memory: memory(engine),
        })
    }
}

fn sampling(engine: &EngineState) -> Sampling {
    let &SamplingState { waiting, running, tokens, steps } = &engine.sampling;
    Sampling { waiting, running, tokens, steps }
}

fn memory(engine: EngineState) -> Memory {
    let EngineState { peak_rss_bytes, usage, .. } = engine;
    let Usage { memory, memory_limit, fits, storage, storage_limit, .. } = usage;
    let (adapters, adapters_limit) = (memory, memory_limit);
    Memory { peak_rss: peak_rss_bytes, adapters, adapters_limit, fits, storage, storage_limit }
}

/// An adapter; `None`: the engine has not made it yet. `is_named`: with all curves.
fn shown(
    app: &App,
    tenant: &Tenant,
    engine: &EngineState,
    id: &ModelId,
    is_named: bool,
    last_request: SystemTime,
) -> Result<Option<Adapter>, Fault> {
    let of_engine = tenant.engine_id(id).map_err(|error| Fault::user(error.to_string()))?;
    let Some(state) = engine.models.get(of_engine.as_str()) else { return Ok(None) };
    let read = |course: &Course| {
        let curves = course.curves.iter().filter(|(name, _)| is_named || *name == LOSS);
        (course.tokens, curves.map(|(name, curve)| (name.clone(), curve.into())).collect())
    };
    let (tokens, curves) = app.history.course(&of_engine, read).unwrap_or_default();
    Ok(Some(Adapter {
        model_id: id.to_string(),
        rank: state.spec.rank,
        alpha: state.spec.alpha,
        step: state.step,
        accumulated: state.accumulated,
        in_memory: state.in_memory,
        bytes: state.bytes,
        last_request: seconds(last_request),
        tokens,
        curves,
    }))
}

/// The newest sessions of `tenant`.
fn sessions(app: &App, tenant: &Tenant) -> Vec<SessionSeen> {
    let sessions = app.sessions();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (id, _) in app.registry().of(tenant) {
        if let Some((session, _)) = of_model(id) {
            *counts.entry(session.to_owned()).or_default() += 1;
        }
    }
    let seen = |(id, session): (&str, &Session)| SessionSeen {
        session_id: id.to_owned(),
        display_name: session.about.display_name.clone(),
        opened: seconds(session.opened),
        seen: seconds(session.seen),
        is_ended: session.is_ended,
        adapters: counts.get(id).copied().unwrap_or(0),
    };
    sessions.all_of(tenant).into_iter().take(MOST_SESSIONS).map(seen).collect()
}
