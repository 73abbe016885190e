//! Sampling: sessions, samples, and the ends of these.

use super::{
    Answer, Call,
    answers::{
        Completion, Completions, CreatedSamplingSession, Done, JoinedSamplingSession, Sampler,
        SavedSamplerWeights, SubmittedSample,
    },
    calls::{CreateSamplingSession, RetrieveFuture, RetrieveFutures, SamplingSessionCall, SamplingWeights},
    json,
    sample::SampleCall,
    sampled,
    weights::SCHEME,
};
use crate::server::{
    app::mismatched,
    fault::Fault,
    futures::{Body, Look, Render},
    request::{Reply, Source, Task},
    samplers::{Sampler as Known, Weights},
    sampling::{Sample, Wanted, no_sampler, opened},
    sessions::of_model,
    wire::Later,
};
use std::{sync::Arc, time::Duration};

/// Time for which a poll waits for the end of a request. Clients give up after 45 s.
const POLL: Duration = Duration::from_secs(30);

impl Call<'_> {
    /// Makes the sampler of a model as it is after the requests before this one.
    pub(super) fn freeze(&self, model_id: &str, seq_id: Option<u64>, number: u64) -> Answer {
        let model = self.model(model_id)?;
        let session = of_model(&model).map_or(model.as_str(), |(session, _)| session);
        let wanted = Wanted { tenant: self.tenant, session, number, body: self.hash() };
        let (id, name) = self.app.note_frozen(&wanted, &model).map_err(|fault| self.used_up(fault))?;
        let render = Box::new(move |reply: &Reply, _| match reply {
            Reply::Sampler => {
                Body::json(&SavedSamplerWeights { path: None, sampling_session_id: Some(id.clone()) })
            }
            other => mismatched(other),
        });
        self.submit(&model, seq_id, Task::Freeze(name), render)
    }

    /// The weights of a path, which need no model to be told.
    fn saved(&self, path: &str) -> Result<(crate::server::checkpoints::Stored, String), Fault> {
        self.app.saved(self.tenant, path, SCHEME)
    }

    /// # Errors
    /// The base is another one.
    fn check_base(&self, named: Option<&str>) -> Result<(), Fault> {
        let served = &self.app.settings.base_model;
        match named.map(|named| self.base_model(named.to_owned())) {
            Some(named) if named != *served => {
                Err(Fault::user(format!("base_model {named:?}: this server samples from {served:?} only")))
            }
            _ => Ok(()),
        }
    }
}

/// Makes a sampler for a session. A repeat finds it, and one that failed can be made again.
pub fn create_session(call: &Call) -> Result<Later, Fault> {
    let CreateSamplingSession { session_id, sampling_session_seq_id, base_model, model_path } =
        call.read()?;
    let weights = SamplingWeights::of(base_model.as_deref(), model_path.as_deref());
    call.check_base(base_model.as_deref())?;
    let heard = call.app.sessions().heartbeat(call.tenant, &session_id);
    heard.map_err(|ended| Fault::user(ended.to_string()))?;
    let wanted = Wanted {
        tenant: call.tenant,
        session: &session_id,
        number: sampling_session_seq_id,
        body: call.hash(),
    };
    let (id, opening) = match weights.map_err(|error| Fault::user(error.to_string()))? {
        SamplingWeights::Base => (call.app.open_base(&wanted)?, None),
        SamplingWeights::Path(path) => {
            let (stored, uri) = call.saved(path)?;
            let (id, opening) = call.app.open_saved(&wanted, stored.folder, uri)?;
            (id, Some(opening))
        }
    };
    Ok(Box::pin(async move {
        if let Some(opening) = opening {
            opened(opening).await?;
        }
        Ok(Body::json(&CreatedSamplingSession { sampling_session_id: id }))
    }))
}

/// Describes a sampler.
pub fn sampler(call: &Call) -> Answer {
    let [id] = call.parts("samplers/{sampler}")?;
    let mut samplers = call.app.samplers();
    let known = samplers.get(call.tenant, &id).ok_or_else(|| no_sampler(&id))?;
    let model_path = if let Weights::Saved(path) = &known.weights { Some(path.clone()) } else { None };
    let base_model = call.app.settings.base_model.clone();
    json(&Sampler { sampler_id: id, base_model, model_path })
}

/// Takes a request to sample.
pub fn sample(call: &Call) -> Answer {
    let body: SampleCall = call.read_data()?;
    let wrong = |error: super::sample::SampleCallError| Fault::user(error.to_string());
    let number = body.number().map_err(wrong)?;
    let (session, base, path) =
        (body.sampling_session_id.clone(), body.base_model.clone(), body.model_path.clone());
    call.check_base(base.as_deref())?;
    let (request, layout) = body.request(&call.app.settings).map_err(wrong)?;
    let count = request.count;
    let render: Render = Box::new(move |reply: &Reply, protobuf| match reply {
        Reply::Sampled(reply) if protobuf => {
            Body { content_type: "application/x-protobuf", bytes: sampled::to_protobuf(reply, &layout) }
        }
        Reply::Sampled(reply) => Body::json(&sampled::to_json(reply, &layout)),
        other => mismatched(other),
    });
    let future = match (session, number) {
        (Some(session), Some(number)) => {
            call.app.sample_once(call.tenant, &session, number, call.hash(), request, render)?
        }
        _ => {
            let (source, work) = match path {
                None => (Source::Base, "asample of the base".to_owned()),
                Some(path) => {
                    let (stored, uri) = call.saved(&path)?;
                    let (source, _) = call.app.open_path(call.tenant, &stored, &uri)?;
                    (source, format!("asample of {uri}"))
                }
            };
            let sample = Sample { tenant: call.tenant, source, work, request, render };
            call.app.sample(sample, |_, _| {})?
        }
    };
    let sample_sequence_ids = (0..count).map(|n| format!("{future}-{n}")).collect();
    json(&SubmittedSample { request_id: future, sample_sequence_ids })
}

/// Gives one more client of a sampling session a block of numbers.
pub fn join(call: &Call) -> Answer {
    let SamplingSessionCall { sampling_session_id } = call.read()?;
    let mut samplers = call.app.samplers();
    let known = samplers.get(call.tenant, &sampling_session_id);
    let client_counter = known.map(Known::join).ok_or_else(|| no_sampler(&sampling_session_id))?;
    json(&JoinedSamplingSession { client_counter })
}

/// Waits for the end of a request of a sampling session. Results that were read need not be named: they go by age.
pub fn retrieve(call: &Call) -> Result<Later, Fault> {
    let RetrieveFutures { target, prev_cursor, timeout } = call.read()?;
    let ends = {
        let mut samplers = call.app.samplers();
        let known = samplers.get(call.tenant, &target.sampling_session_id);
        let known = known.ok_or_else(|| no_sampler(&target.sampling_session_id))?;
        known.ends(target.cloned_sampler_id)
    };
    let most = match timeout {
        None => POLL,
        Some(seconds) => Duration::try_from_secs_f64(seconds)
            .map_err(|_| Fault::user(format!("timeout: expected seconds, 0 or more, got {seconds}")))?
            .min(POLL),
    };
    let most = most.min(call.app.futures.poll());
    Ok(Box::pin(async move {
        let ended = ends.wait(prev_cursor, most).await;
        let cursor = ended.last().map_or(prev_cursor, |last| last.cursor);
        let completion = |end: crate::server::samplers::Ended| Completion {
            state: if end.is_failed { "failed" } else { "finished" },
            request_id: end.future,
        };
        Ok(Body::json(&Completions { cursor, completions: ended.into_iter().map(completion).collect() }))
    }))
}

/// Ends a request that samples. One that has its result keeps it.
pub fn cancel(call: &Call) -> Answer {
    let RetrieveFuture { request_id } = call.read()?;
    let app: &Arc<_> = call.app;
    if !app.cancel(call.tenant, &request_id)
        && let Look::Pending(_) = app.futures.look(&request_id, call.tenant)
    {
        return Err(Fault::user(
            "cancel_future: this request trains, and requests that were taken are carried out; only those that \
             sample can be cancelled",
        ));
    }
    json(&Done {})
}
