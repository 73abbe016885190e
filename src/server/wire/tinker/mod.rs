//! The wire of the `tinker` clients: protobuf and JSON bodies.
//!
//! Requests of a model are numbered from 1 without gaps and carried out by number; models of a session are numbered
//! too. The same number with the same body is a repeat and gets the first one's future, with another body it is an
//! error. A request that is refused has used up its number. The gradient of an update is a plain sum.
//!
//! - `proto`, `data`, `tensor`, `calls`: bodies to requests of the engine; `reply`, `answers`: its replies back. Pure
//! - `rows`: the table of the calls, of which the OpenAPI document is made
//! - `sample`, `sampled`: the same for samples
//! - `bootstrap`, `training`, `weights`, `sampling`, `rest`: the calls

pub mod answers;
mod bootstrap;
pub mod calls;
pub mod data;
pub mod proto;
pub mod reply;
mod rest;
mod rows;
mod sample;
mod sampled;
mod sampling;
mod tensor;
mod training;
mod untrusted;
mod weights;

pub use rows::{Row, described, refusal, results, rows};
pub(super) use untrusted::read_as_all;

use super::{Answered, check_size};
use crate::server::{
    app::{App, Submission},
    fault::Fault,
    futures::{Body, Render},
    order::BodyHash,
    registry::Tenant,
    request::{ModelId, Task},
};
use axum::{body::Bytes, http::HeaderMap};
use calls::{Address, ModelDefaults};
use data::Limits;
use rows::{Answers, matched};
use serde::{Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, fmt, sync::Arc};

/// Bytes that ids, targets and inputs of a request may take, for each byte of its body: ids take 4 bytes on the wire
/// and 8 here, and a sparse tensor grows.
const GROWTH: usize = 4;

/// The body of an answer; `None`: there is none, by 204.
type Answer = Result<Option<Body>, Fault>;

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
pub fn answer(row: &Row, call: &Call) -> Result<Answered, Fault> {
    match row.answer {
        Answers::Now(answer) => answer(call).map(|body| body.map_or(Answered::Done, Answered::Now)),
        Answers::Later(answer) => answer(call).map(Answered::Later),
    }
}

/// Hears of a request whose body was not read to its end: its number is used up where its first bytes tell it. JSON has
/// the number behind the data.
pub fn refused_unread(app: &App, tenant: &Tenant, start: &[u8]) {
    if let Address { model: Some(model), seq_id: Some(seq_id) } = Address::of_start(start) {
        app.refuse_in_order(tenant, &model, seq_id);
    }
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
        check_size(self.body).map_err(|fault| self.used_up(fault))?;
        self.read_data()
    }

    /// Reads a JSON body.
    fn read_data<T: DeserializeOwned>(&self) -> Result<T, Fault> {
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
