//! The wire of `xorl-client`: JSON alone, requests in the order in which they arrive.
//!
//! A number (`seq_id`) is unique since the last `create_model`: the same number with the same body is a repeat and gets
//! the first one's future, with another body it is an error. Gaps are no matter, and a body without a number is never a
//! repeat. The gradient of an update is divided by the valid targets of its passes.

mod cell;
mod data;
mod fields;
mod passes;
mod sessions;
mod weights;

pub use fields::object;
pub use sessions::{Kill, kill};

use super::super::{
    app::App, app::Submission, fault::Fault, futures::Render, order::BodyHash, registry::Tenant,
    request::Task,
};
use axum::http::Method;
use fields::Fields;
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc};

const POSTS: [&str; 14] = [
    "abort_gradient_epoch",
    "create_model",
    "delete_checkpoint",
    "forward",
    "forward_backward",
    "get_info",
    "kill_session",
    "list_checkpoints",
    "load_weights",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "unload_model",
    "weights_info",
];
const GETS: [&str; 2] = ["session_info", "training_runs"];

const SAMPLING: &str =
    "sampling is not served here; load the saved adapter into an inference server, for it is PEFT's";
const SYNC: &str = "inference servers are not kept in step; save the weights and load them there";
const HUB: &str = "nothing is uploaded from here; save the weights and upload the folder";

/// Calls of the client that are refused, each with the reason.
const REFUSED: [(&str, &str); 17] = [
    ("add_inference_endpoint", SYNC),
    ("asample", SAMPLING),
    ("connect_inference_endpoint", SYNC),
    ("create_sampling_session", SAMPLING),
    ("disconnect_inference_endpoint", SYNC),
    ("generate", SAMPLING),
    ("list_inference_endpoints", SYNC),
    ("remove_inference_endpoint", SYNC),
    (
        "save_full_weights_safetensors",
        "bases with merged adapters are not written; use save_weights, whose adapter PEFT can merge",
    ),
    ("set_sync_quantization", SYNC),
    ("sleep", SYNC),
    ("sync_inference_weights", SYNC),
    ("sync_weights", SYNC),
    ("update_dedicated_endpoint", HUB),
    ("update_serverless_weights", HUB),
    ("v1/chat/completions", SAMPLING),
    ("wake_up", SYNC),
];

/// A call with its method, if the wire has it.
pub fn method(name: &str) -> Option<(&'static str, Method)> {
    let of = |names: &'static [&'static str], method: Method| {
        names.iter().find(|known| **known == name).map(|known| (*known, method))
    };
    of(&GETS, Method::GET).or_else(|| of(&POSTS, Method::POST))
}

/// The reason why a call of the client is not served, if it is one of those.
pub fn refusal(name: &str) -> Option<String> {
    let (name, reason) = REFUSED.iter().find(|(refused, _)| *refused == name)?;
    Some(format!("{name} is not served: {reason}"))
}

/// The answer to a call.
pub enum Called {
    /// The body.
    Now(Value),
    /// A session that is to end: [`kill`] says how that went.
    Kill(Kill),
}

/// A POST of a client.
struct Call<'a> {
    app: &'a Arc<App>,
    tenant: &'a Tenant,
    name: &'a str,
    body: &'a [u8],
}

impl Call<'_> {
    /// Submits `task` for a model; returns the body that names its future.
    fn submit(
        &self,
        model: &super::super::request::ModelId,
        seq_id: Option<i64>,
        task: Task,
        render: Render,
    ) -> Result<Value, Fault> {
        let number = seq_id.map(|seq_id| (seq_id, BodyHash::of_call(self.name, self.body)));
        let submission = Submission { tenant: self.tenant, model, call: self.name, number, task, render };
        let id = self.app.submit(submission)?;
        Ok(json!({"request_id": id, "model_id": model}))
    }
}

/// Answers a POST. `name` is one that [`method`] knows.
///
/// # Errors
/// The request is refused.
pub fn post(app: &Arc<App>, tenant: &Tenant, name: &str, body: &[u8]) -> Result<Called, Fault> {
    let call = Call { app, tenant, name, body };
    if name == "forward_backward" || name == "forward" {
        return passes::pass(&call).map(Called::Now);
    }
    let fields = Fields::read(body)?;
    let answered = match name {
        "abort_gradient_epoch" => passes::abort(&call, &fields),
        "create_model" => sessions::create(&call, &fields),
        "delete_checkpoint" => weights::delete(&call, &fields),
        "get_info" => sessions::info(&call, &fields),
        "kill_session" => return sessions::begin_kill(&call, &fields).map(Called::Kill),
        "list_checkpoints" => weights::list(&call, &fields),
        "load_weights" => weights::load(&call, &fields),
        "optim_step" => passes::optim_step(&call, &fields),
        "save_weights" => weights::save(&call, &fields),
        "save_weights_for_sampler" => weights::save_for_sampler(&call, &fields),
        "unload_model" => sessions::unload(&call, &fields),
        "weights_info" => weights::info(&call, &fields),
        _ => Err(Fault::not_found(format!("{name} is no call of this server"))),
    };
    answered.map(Called::Now)
}

/// Answers a GET.
///
/// # Errors
/// The request is refused.
pub fn get(
    app: &Arc<App>,
    tenant: &Tenant,
    name: &str,
    query: &BTreeMap<String, String>,
) -> Result<Value, Fault> {
    match name {
        "session_info" => sessions::session_info(app, tenant, query),
        _ => sessions::training_runs(app, tenant, query),
    }
}
