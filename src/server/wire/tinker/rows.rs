//! The table of the calls: it leads a request to its function, and the OpenAPI document is made of it.

use super::{
    Answer, Call,
    answers::{
        Capabilities, Checkpoints, ClientConfig, Completions, CopiedWeights, CreatedModel,
        CreatedSamplingSession, CreatedSession, Done, DynamicConfig, ExternalWeightsUrls, Heartbeat,
        JoinedSamplingSession, LoadedWeights, ModelInfo, Sampler, SavedExternalWeights, SavedSamplerWeights,
        SavedWeights, Session, Sessions, Status, Stepped, Submitted, SubmittedSample, TrainingRun,
        TrainingRuns, UnloadedModel, WeightsInfo,
    },
    bootstrap,
    calls::{
        CopyWeights, CreateModel, CreateSamplingSession, CreateSession, LoadWeights, ModelCall,
        OptimStepCall, RetrieveFuture, RetrieveFutures, SamplingSessionCall, SaveWeights,
        SaveWeightsForSampler, SessionHeartbeat, SetTtl, WeightsInfoCall,
    },
    data::JsonRequest,
    reply::JsonOutput,
    rest,
    sample::SampleCall,
    sampled::Sampled,
    sampling, training, weights,
};
use crate::server::{
    fault::Fault,
    wire::{
        Later,
        described::{Described, QueryField, Shape},
    },
};
use axum::http::Method;
use percent_encoding::percent_decode_str;

/// A call of the wire.
pub struct Row {
    pub method: Method,
    /// The path below `/api/v1/`. A part in braces stands for any one part.
    pub path: &'static str,
    /// Its effect, as the OpenAPI document says.
    about: &'static str,
    query: &'static [QueryField],
    /// `None`: no body is read.
    body: Option<fn() -> Shape>,
    /// `None`: the answer has no body.
    reply: Option<fn() -> Shape>,
    pub(super) answer: Answers,
}

/// The function that answers a call.
#[derive(Clone, Copy)]
pub(super) enum Answers {
    Now(fn(&Call) -> Answer),
    Later(fn(&Call) -> Result<Later, Fault>),
}

impl Row {
    /// A call whose answer has no body.
    const fn done(
        method: Method,
        path: &'static str,
        about: &'static str,
        answer: fn(&Call) -> Answer,
    ) -> Self {
        Self { method, path, about, query: &[], body: None, reply: None, answer: Answers::Now(answer) }
    }

    const fn get(
        path: &'static str,
        about: &'static str,
        reply: fn() -> Shape,
        answer: fn(&Call) -> Answer,
    ) -> Self {
        Self {
            method: Method::GET,
            path,
            about,
            query: &[],
            body: None,
            reply: Some(reply),
            answer: Answers::Now(answer),
        }
    }

    /// A POST that is answered at once.
    const fn now(
        path: &'static str,
        about: &'static str,
        reply: fn() -> Shape,
        answer: fn(&Call) -> Answer,
    ) -> Self {
        Self {
            method: Method::POST,
            path,
            about,
            query: &[],
            body: None,
            reply: Some(reply),
            answer: Answers::Now(answer),
        }
    }

    /// A POST whose answer is waited for.
    const fn later(
        path: &'static str,
        about: &'static str,
        reply: fn() -> Shape,
        body: fn() -> Shape,
        answer: fn(&Call) -> Result<Later, Fault>,
    ) -> Self {
        let (method, answer) = (Method::POST, Answers::Later(answer));
        Self { method, path, about, query: &[], body: Some(body), reply: Some(reply), answer }
    }

    /// A POST whose result a future has.
    const fn task(
        path: &'static str,
        about: &'static str,
        body: fn() -> Shape,
        answer: fn(&Call) -> Answer,
    ) -> Self {
        Self::now(path, about, Shape::of::<Submitted>, answer).reads(body)
    }

    /// Its body.
    const fn reads(mut self, body: fn() -> Shape) -> Self {
        self.body = Some(body);
        self
    }

    /// A list that is read in parts.
    const fn in_pages(mut self) -> Self {
        self.query = &PAGE;
        self
    }
}

/// The query of a list.
const PAGE: [QueryField; 2] = [
    QueryField { name: "limit", about: "Items at most; 20 where absent.", is_integer: true },
    QueryField { name: "offset", about: "Items that are left out.", is_integer: true },
];

/// The body of a pass: protobuf, or the JSON of clients up to 0.24.
fn pass() -> Shape {
    Shape::of::<JsonRequest>().or_protobuf()
}

/// The calls of the wire.
static ROWS: [Row; 36] = [
    Row::now(
        "client/config",
        "Tells a client how to send.",
        Shape::of::<ClientConfig>,
        bootstrap::client_config,
    ),
    Row::now(
        "client/dynamic_config",
        "Tells a client when to ask again.",
        Shape::of::<DynamicConfig>,
        bootstrap::dynamic_config,
    ),
    Row::now("create_session", "Opens a session.", Shape::of::<CreatedSession>, bootstrap::create_session)
        .reads(Shape::of::<CreateSession>),
    Row::now("session_heartbeat", "Hears that a client lives.", Shape::of::<Heartbeat>, bootstrap::heartbeat)
        .reads(Shape::of::<SessionHeartbeat>),
    Row::now("telemetry", "Is dropped.", Shape::of::<Status>, bootstrap::telemetry),
    Row::now("sessions/{session}/finish", "Ends a session.", Shape::of::<Done>, bootstrap::finish),
    Row::get(
        "get_server_capabilities",
        "Names the base that is trained and sampled from.",
        Shape::of::<Capabilities>,
        bootstrap::capabilities,
    ),
    Row::task(
        "create_model",
        "Creates a model of a session.",
        Shape::of::<CreateModel>,
        training::create_model,
    ),
    Row::now("get_info", "Describes a model and its base.", Shape::of::<ModelInfo>, training::info)
        .reads(Shape::of::<ModelCall>),
    Row::task("forward_backward", "Computes a loss and adds its gradients.", pass, training::pass),
    Row::task("forward", "Computes a loss without gradients.", pass, training::pass),
    Row::task(
        "optim_step",
        "Updates a model by its gradients.",
        Shape::of::<OptimStepCall>,
        training::optim_step,
    ),
    Row::task("unload_model", "Forgets a model.", Shape::of::<ModelCall>, training::unload),
    Row::task(
        "save_weights",
        "Saves a model with its training state.",
        Shape::of::<SaveWeights>,
        weights::save,
    ),
    Row::task(
        "save_weights_for_sampler",
        "Saves a model alone, or makes a sampler of it as it is.",
        Shape::of::<SaveWeightsForSampler>,
        weights::save_for_sampler,
    ),
    Row::later(
        "create_sampling_session",
        "Makes a sampler of the base or of a saved adapter.",
        Shape::of::<CreatedSamplingSession>,
        Shape::of::<CreateSamplingSession>,
        sampling::create_session,
    ),
    Row::get("samplers/{sampler}", "Describes a sampler.", Shape::of::<Sampler>, sampling::sampler),
    Row::now("asample", "Samples.", Shape::of::<SubmittedSample>, sampling::sample)
        .reads(Shape::of::<SampleCall>),
    Row::now(
        "join_sampling_session",
        "Gives one more client of a sampling session its numbers.",
        Shape::of::<JoinedSamplingSession>,
        sampling::join,
    )
    .reads(Shape::of::<SamplingSessionCall>),
    Row::later(
        "retrieve_futures",
        "Waits for the ends of samples.",
        Shape::of::<Completions>,
        Shape::of::<RetrieveFutures>,
        sampling::retrieve,
    ),
    Row::now("cancel_future", "Ends a sample.", Shape::of::<Done>, sampling::cancel)
        .reads(Shape::of::<RetrieveFuture>),
    Row::task(
        "save_weights_external",
        "Saves a model to be downloaded.",
        Shape::of::<SaveWeights>,
        weights::save_external,
    ),
    Row::task(
        "load_weights",
        "Loads saved values into a model, or creates one by them.",
        Shape::of::<LoadWeights>,
        weights::load,
    ),
    Row::now("weights_info", "Describes saved weights.", Shape::of::<WeightsInfo>, weights::info)
        .reads(Shape::of::<WeightsInfoCall>),
    Row::now(
        "copy_weights",
        "Gives saved weights to another run.",
        Shape::of::<CopiedWeights>,
        weights::copy,
    )
    .reads(Shape::of::<CopyWeights>),
    Row::get("training_runs", "Lists models.", Shape::of::<TrainingRuns>, rest::runs).in_pages(),
    Row::get("training_runs/{run}", "Describes a model.", Shape::of::<TrainingRun>, rest::run),
    Row::get(
        "training_runs/{run}/checkpoints",
        "Lists the checkpoints of a model.",
        Shape::of::<Checkpoints>,
        rest::checkpoints_of_run,
    ),
    Row::get(
        "checkpoints",
        "Lists the checkpoints of all models.",
        Shape::of::<Checkpoints>,
        rest::checkpoints,
    )
    .in_pages(),
    Row::done(
        Method::DELETE,
        "training_runs/{run}/checkpoints/{kind}/{name}",
        "Deletes a checkpoint.",
        rest::delete,
    ),
    Row::done(
        Method::PUT,
        "training_runs/{run}/checkpoints/{kind}/{name}/ttl",
        "Sets the time for which a checkpoint is kept.",
        rest::set_ttl,
    )
    .reads(Shape::of::<SetTtl>),
    Row::done(
        Method::POST,
        "training_runs/{run}/checkpoints/{kind}/{name}/publish",
        "Marks a checkpoint as public.",
        rest::publish,
    ),
    Row::done(
        Method::DELETE,
        "training_runs/{run}/checkpoints/{kind}/{name}/publish",
        "Marks a checkpoint as not public.",
        rest::unpublish,
    ),
    Row::get(
        "training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls",
        "Gives addresses of the files of external weights.",
        Shape::of::<ExternalWeightsUrls>,
        rest::external_urls,
    ),
    Row::get("sessions", "Lists sessions.", Shape::of::<Sessions>, rest::sessions).in_pages(),
    Row::get("sessions/{session}", "Describes a session.", Shape::of::<Session>, rest::session),
];

const ACCOUNTS: &str = "this server has keys and no accounts";

/// Calls of the clients that are refused, each with the reason.
const REFUSED: [(&str, &str); 10] = [
    ("create_custom_loss", "losses are not traced here; pass the function itself to forward_backward_custom"),
    (
        "training_runs/{run}/checkpoints/{kind}/{name}/archive",
        "archives are not made; use save_weights_external of tinker 0.38, or the folder on the server",
    ),
    ("auth/token", ACCOUNTS),
    ("auth/apikey/me", ACCOUNTS),
    ("audit", ACCOUNTS),
    ("billing/usage/events", ACCOUNTS),
    ("billing/usage/checkpoints/current", ACCOUNTS),
    ("sessions/search", "sessions are not searched; sessions lists them"),
    ("sessions/{session}/project", "there are no projects here"),
    ("sessions/{session}/trace_export", "traces of sessions are not kept"),
];

/// The parts of `path` that stand in the braces of `pattern`, decoded; `None`: it does not match.
pub(super) fn matched(pattern: &str, path: &str) -> Option<Vec<String>> {
    let (mut expected, mut parts, mut found) = (pattern.split('/'), path.split('/'), Vec::new());
    loop {
        match (expected.next(), parts.next()) {
            (None, None) => return Some(found),
            (Some(name), Some(part)) if name.starts_with('{') && !part.is_empty() => {
                found.push(percent_decode_str(part).decode_utf8().ok()?.into_owned());
            }
            (Some(name), Some(part)) if name == part => {}
            _ => return None,
        }
    }
}

/// The calls that have `path`, which is below `/api/v1/`.
pub fn rows(path: &str) -> impl Iterator<Item = &'static Row> {
    ROWS.iter().filter(move |row| matched(row.path, path).is_some())
}

/// The reason why a call of the clients is not served, if it is one of those.
pub fn refusal(path: &str) -> Option<String> {
    let (_, reason) = REFUSED.iter().find(|(pattern, _)| matched(pattern, path).is_some())?;
    Some(format!("{path} is not served: {reason}"))
}

/// All calls of the wire, below `prefix`.
pub fn described(prefix: &str) -> impl Iterator<Item = Described> {
    ROWS.iter().map(move |row| Described {
        method: row.method.clone(),
        path: format!("{prefix}{}", row.path),
        about: row.about,
        query: row.query,
        body: row.body.map(|shape| shape()),
        reply: row.reply.map(|shape| shape()),
    })
}

/// The results that futures of this wire have. That of a pass may be protobuf.
pub fn results() -> Shape {
    let shapes: [fn() -> Shape; 9] = [
        || Shape::of::<JsonOutput>().or_protobuf(),
        Shape::of::<Stepped>,
        Shape::of::<CreatedModel>,
        Shape::of::<UnloadedModel>,
        Shape::of::<SavedWeights>,
        Shape::of::<SavedExternalWeights>,
        Shape::of::<SavedSamplerWeights>,
        Shape::of::<LoadedWeights>,
        || Shape::of::<Sampled>().or_protobuf(),
    ];
    Shape::any_of(shapes.map(|shape| shape()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_that_of_its_rows() {
        let methods = |path: &str| rows(path).map(|row| row.method.clone()).collect::<Vec<_>>();
        assert_eq!(methods("training_runs/sess-1:train:0/checkpoints/weights/a"), [Method::DELETE]);
        let publish = "training_runs/sess-1%3Atrain%3A0/checkpoints/weights/a/publish";
        assert_eq!(methods(publish), [Method::POST, Method::DELETE]);
        assert!(methods("training_runs/").is_empty() && methods("training_runs//checkpoints").is_empty());
        let found = matched("training_runs/{run}", "training_runs/sess-1%3Atrain%3A0");
        assert_eq!(found.unwrap(), ["sess-1:train:0"]);
        assert_eq!(matched("sessions/{session}", "sessions/%ff"), None);
        assert!(refusal("auth/token").unwrap().contains("no accounts"));
        assert_eq!(refusal("sessions/s"), None);
    }

    #[test]
    fn no_two_calls_share_path_and_method() {
        let mut all: Vec<(&str, &str)> = ROWS.iter().map(|row| (row.path, row.method.as_str())).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), ROWS.len());
        // A path that is refused is not answered, too.
        assert!(REFUSED.iter().all(|(path, _)| ROWS.iter().all(|row| row.path != *path)));
    }
}
