//! The wire of the `tinker` clients: protobuf and JSON bodies.
//!
//! Requests of a model are numbered from 1 without gaps and carried out by number; models of a session are numbered
//! too. The same number with the same body is a repeat and gets the first one's future, with another body it is an
//! error. A request that is refused has used up its number. The gradient of an update is a plain sum.
//!
//! - `proto`, `data`, `tensor`, `calls`: bodies to requests of the engine; `reply`, `answers`: its replies back. Pure
//! - `bootstrap`, `training`, `weights`, `rest`: the calls

pub mod answers;
mod bootstrap;
pub mod calls;
pub mod data;
pub mod proto;
pub mod reply;
mod rest;
mod tensor;
mod training;
mod weights;

use super::check_size;
use crate::server::{
    app::{App, Submission},
    fault::Fault,
    futures::{Body, Render},
    order::BodyHash,
    registry::Tenant,
    request::{ModelId, Task},
};
use axum::{
    body::Bytes,
    http::{HeaderMap, Method},
};
use calls::{Address, ModelDefaults};
use data::Limits;
use percent_encoding::percent_decode_str;
use serde::{Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, fmt, sync::Arc};

/// Bytes that ids, targets and inputs of a request may take, for each byte of its body: ids take 4 bytes on the wire
/// and 8 here, and a sparse tensor grows.
const GROWTH: usize = 4;

/// The body of an answer; `None`: there is none, by 204.
type Answer = Result<Option<Body>, Fault>;

/// A call of the wire.
pub struct Row {
    pub method: Method,
    /// The path below `/api/v1/`. A part in braces stands for any one part.
    pub path: &'static str,
    answer: fn(&Call) -> Answer,
}

/// The calls of the wire.
static ROWS: [Row; 30] = [
    post("client/config", bootstrap::client_config),
    post("client/dynamic_config", bootstrap::dynamic_config),
    post("create_session", bootstrap::create_session),
    post("session_heartbeat", bootstrap::heartbeat),
    post("telemetry", bootstrap::telemetry),
    post("sessions/{session}/finish", bootstrap::finish),
    get("get_server_capabilities", bootstrap::capabilities),
    post("create_model", training::create_model),
    post("get_info", training::info),
    post("forward_backward", training::pass),
    post("forward", training::pass),
    post("optim_step", training::optim_step),
    post("unload_model", training::unload),
    post("save_weights", weights::save),
    post("save_weights_for_sampler", weights::save_for_sampler),
    post("save_weights_external", weights::save_external),
    post("load_weights", weights::load),
    post("weights_info", weights::info),
    post("copy_weights", weights::copy),
    get("training_runs", rest::runs),
    get("training_runs/{run}", rest::run),
    get("training_runs/{run}/checkpoints", rest::checkpoints_of_run),
    get("checkpoints", rest::checkpoints),
    row(Method::DELETE, "training_runs/{run}/checkpoints/{kind}/{name}", rest::delete),
    row(Method::PUT, "training_runs/{run}/checkpoints/{kind}/{name}/ttl", rest::set_ttl),
    post("training_runs/{run}/checkpoints/{kind}/{name}/publish", rest::publish),
    row(Method::DELETE, "training_runs/{run}/checkpoints/{kind}/{name}/publish", rest::unpublish),
    get("training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls", rest::external_urls),
    get("sessions", rest::sessions),
    get("sessions/{session}", rest::session),
];

const SAMPLING: &str =
    "sampling is not served here; load the saved adapter into an inference server, for it is PEFT's";
const ACCOUNTS: &str = "this server has keys and no accounts";

/// Calls of the clients that are refused, each with the reason.
const REFUSED: [(&str, &str); 14] = [
    ("samplers/{sampler}", SAMPLING),
    ("join_sampling_session", SAMPLING),
    ("retrieve_futures", SAMPLING),
    ("cancel_future", "requests that were taken are carried out"),
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

const fn row(method: Method, path: &'static str, answer: fn(&Call) -> Answer) -> Row {
    Row { method, path, answer }
}

const fn post(path: &'static str, answer: fn(&Call) -> Answer) -> Row {
    row(Method::POST, path, answer)
}

const fn get(path: &'static str, answer: fn(&Call) -> Answer) -> Row {
    row(Method::GET, path, answer)
}

/// The parts of `path` that stand in the braces of `pattern`, decoded; `None`: it does not match.
fn matched(pattern: &str, path: &str) -> Option<Vec<String>> {
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

/// A request of a client.
pub struct Call<'a> {
    pub app: &'a Arc<App>,
    pub tenant: &'a Tenant,
    /// The path below `/api/v1/`.
    pub path: &'a str,
    pub query: &'a BTreeMap<String, String>,
    pub headers: &'a HeaderMap,
    pub body: &'a Bytes,
}

/// Answers a request by `row`, which is one of its path.
///
/// # Errors
/// The request is refused.
pub fn answer(row: &Row, call: &Call) -> Answer {
    (row.answer)(call)
}

fn json(value: &impl Serialize) -> Answer {
    Ok(Some(Body::json(value)))
}

impl Call<'_> {
    /// The parts of the path that stand in the braces of `pattern`.
    fn parts<const N: usize>(&self, pattern: &str) -> Result<[String; N], Fault> {
        let parts = matched(pattern, self.path).and_then(|parts| parts.try_into().ok());
        parts.ok_or_else(|| Fault::not_found(format!("{}: expected {pattern}", self.path)))
    }

    /// Reads a body without data.
    fn read<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        check_size(self.body)?;
        serde_json::from_slice(self.body).map_err(|error| self.refuse(format!("body: {error}")))
    }

    /// The refusal of a request with a JSON body, whose number is used up.
    fn refuse(&self, reason: impl fmt::Display) -> Fault {
        self.used_up(Fault::user(reason.to_string()))
    }

    fn used_up(&self, fault: impl Into<Fault>) -> Fault {
        self.refuse_at(&Address::of(self.body), fault)
    }

    fn refuse_at(&self, address: &Address, fault: impl Into<Fault>) -> Fault {
        if let Address { model: Some(model), seq_id: Some(seq_id) } = address {
            self.app.refuse_in_order(self.tenant, model, *seq_id);
        }
        fault.into()
    }

    /// The hash by which a repeat is known.
    fn hash(&self) -> BodyHash {
        BodyHash::of_call(self.path, self.body)
    }

    /// Submits `task` for a model; the answer names its future.
    fn submit(&self, model: &ModelId, seq_id: Option<u64>, task: Task, render: Render) -> Answer {
        let number = match seq_id.map(i64::try_from) {
            None => None,
            Some(Ok(seq_id)) => Some((seq_id, self.hash())),
            Some(Err(_)) => return Err(Fault::user("seq_id: expected a number below 2^63")),
        };
        let submission = Submission { tenant: self.tenant, model, call: self.path, number, task, render };
        json(&answers::Submitted::new(self.app.submit_in_order(submission)?, model))
    }

    fn limits(&self) -> Limits {
        let settings = &self.app.settings;
        Limits {
            data: answers::CHUNK_DATA,
            tokens: settings.max_tokens,
            bytes: GROWTH.saturating_mul(settings.http.body),
            vocabulary: settings.vocab_size,
        }
    }

    fn defaults(&self) -> ModelDefaults {
        let settings = &self.app.settings;
        ModelDefaults {
            base_model: settings.base_model.clone(),
            lora_rank: settings.adapter.rank,
            lora_alpha: settings.adapter.alpha,
            seed: settings.adapter.seed,
        }
    }

    /// The base that a client names, by the one name that clients are told.
    fn base_model(&self, named: String) -> String {
        let settings = &self.app.settings;
        if settings.other_names.contains(&named) { settings.base_model.clone() } else { named }
    }
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
        assert!(refusal("samplers/s").unwrap().contains("sampling is not served"));
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
