//! The wire of OpenAI's clients: models, completions and chats, as one body or as a stream of events.
//!
//! `model` is the base's name or an adapter's `model_id`; an adapter samples with the values that it has when its
//! requests before are carried out. Text ends before what ends it: neither end tokens nor texts of `stop` are in it.
//!
//! - `bodies`, `prompts`, `asked`: bodies to requests of the engine
//! - `generation`: a request in the engine, cancelled when its client is gone
//! - `tokens`: text and log-probabilities of tokens; `whole`, `stream`: the two forms of answers
//! - `models`, `answers`, `fault`: models, bodies of answers, refusals

mod answers;
mod asked;
mod bodies;
mod fault;
mod generation;
mod models;
mod prompts;
mod stream;
mod tokens;
mod untrusted;
mod whole;

pub use fault::{ErrorBody, Refused};
pub(super) use untrusted::read_as_all;

use super::{
    described::{Described, Shape},
    sampling::fresh_number,
};
use crate::server::{app::App, fault::Fault, futures::Body, http::failed, registry::Tenant};
use answers::Head;
use asked::Kind;
use axum::{
    Json,
    body::Bytes,
    http::{HeaderValue, Method, header},
    response::{IntoResponse, Response},
};
use generation::Generation;
use percent_encoding::percent_decode_str;
use std::sync::Arc;

/// The prefix of the calls.
pub const PREFIX: &str = "/v1/";

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Models,
    /// One model, by name.
    Model(String),
    Generate(Kind),
}

impl Call {
    /// The call of a path below [`PREFIX`].
    pub fn find(path: &str) -> Option<Self> {
        match path {
            "models" => Some(Self::Models),
            "completions" => Some(Self::Generate(Kind::Text)),
            "chat/completions" => Some(Self::Generate(Kind::Chat)),
            // Names of bases have '/', which clients may write as it is.
            _ => path
                .strip_prefix("models/")
                .filter(|name| !name.is_empty())
                .map(|name| Self::Model(percent_decode_str(name).decode_utf8_lossy().into_owned())),
        }
    }

    pub fn method(&self) -> Method {
        if matches!(self, Self::Generate(_)) { Method::POST } else { Method::GET }
    }

    /// Its name in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Models | Self::Model(_) => "v1/models",
            Self::Generate(Kind::Text) => "v1/completions",
            Self::Generate(Kind::Chat) => "v1/chat/completions",
        }
    }
}

/// All calls of the wire.
pub fn described() -> [Described; 4] {
    let get = |path: &str, about, reply| Described {
        method: Method::GET,
        path: format!("{PREFIX}{path}"),
        about,
        query: &[],
        body: None,
        reply: Some(reply),
    };
    let generate = |path: &str, about, body: Shape| Described {
        method: Method::POST,
        path: format!("{PREFIX}{path}"),
        about,
        query: &[],
        body: Some(Shape::of::<bodies::Sampling>().and(body)),
        reply: Some(Shape::of::<answers::Answer>()),
    };
    [
        get("models", "Lists the base and the adapters that can be asked.", Shape::of::<answers::Models>()),
        get("models/{model}", "Describes one of them.", Shape::of::<answers::Model>()),
        generate("completions", "Continues prompts.", Shape::of::<bodies::Completion>()),
        generate("chat/completions", "Answers a chat.", Shape::of::<bodies::Chat>()),
    ]
}

/// Answers a call.
///
/// # Errors
/// The request is refused.
pub async fn answer(app: &Arc<App>, tenant: &Tenant, call: Call, body: Bytes) -> Result<Response, Refused> {
    match call {
        Call::Models => Ok(Json(models::list(app, tenant)).into_response()),
        Call::Model(name) => Ok(Json(models::find(app, tenant, &name)?).into_response()),
        Call::Generate(kind) => generate(app, tenant, kind, body).await,
    }
}

/// Reads the body and writes the answer apart from the threads of connections: both may be large.
async fn generate(app: &Arc<App>, tenant: &Tenant, kind: Kind, body: Bytes) -> Result<Response, Refused> {
    let (own, owner) = (app.clone(), tenant.clone());
    let read = move || asked::read(&own, &owner, kind, &body);
    let asked = tokio::task::spawn_blocking(read).await.map_err(failed)??;
    let head = Head::new(&asked, fresh_number());
    let mut generation = Generation::start(app, tenant, &asked)?;
    if asked.is_stream {
        let first = generation.next().await?;
        return Ok(stream::respond(app.clone(), asked, head, generation, first)?);
    }
    let replies = whole::replies(generation, &asked).await?;
    let own = app.clone();
    let write = move || Ok::<_, Fault>(Body::json(&whole::answer(&own, &asked, head, &replies)?));
    let body = tokio::task::spawn_blocking(write).await.map_err(failed)??;
    let kind = HeaderValue::from_static(body.content_type);
    Ok(([(header::CONTENT_TYPE, kind)], app.bodies.hold(body.bytes).await?).into_response())
}
