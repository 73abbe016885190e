//! The wire of `xorl-client`: JSON alone, requests in the order in which they arrive.
//!
//! A number (`seq_id`) is unique since the last `create_model`: the same number with the same body is a repeat and gets
//! the first one's future, with another body it is an error. Gaps are no matter, and a body without a number is never a
//! repeat. The gradient of an update is divided by the valid targets of its passes.

mod answers;
mod bodies;
mod cell;
mod data;
pub(super) mod fields;
mod passes;
mod sampling;
mod sessions;
mod untrusted;
mod weights;

pub use fields::object;
pub(super) use untrusted::read_as_all;

use super::{
    super::{
        app::{App, Submission},
        fault::Fault,
        futures::{Body, Render},
        order::BodyHash,
        registry::Tenant,
        request::{ModelId, Task},
    },
    Answered, Later,
    described::{Described, QueryField, Shape},
};
use axum::http::{Method, StatusCode};
use bodies::Address;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};
use utoipa::openapi::schema::Type;

/// A call that is served.
struct Served {
    name: &'static str,
    /// Its effect, as the OpenAPI document says.
    about: &'static str,
    answer: Answers,
    /// `None` of a GET.
    body: Option<fn() -> Shape>,
    reply: fn() -> Shape,
}

/// The function that answers a call.
enum Answers {
    Post(fn(&Call) -> Result<Value, Fault>),
    Later(fn(&Call) -> Result<Later, Fault>),
    Get(fn(&App, &Tenant, &Query) -> Result<Value, Fault>, &'static [QueryField]),
}

/// The parameters of a GET.
type Query = BTreeMap<String, String>;

impl Served {
    /// A POST whose result a future has.
    const fn task(
        name: &'static str,
        about: &'static str,
        body: fn() -> Shape,
        answer: fn(&Call) -> Result<Value, Fault>,
    ) -> Self {
        Self {
            name,
            about,
            answer: Answers::Post(answer),
            body: Some(body),
            reply: Shape::of::<answers::Submitted>,
        }
    }

    /// A POST that is answered at once.
    const fn now(
        name: &'static str,
        about: &'static str,
        body: fn() -> Shape,
        reply: fn() -> Shape,
        answer: fn(&Call) -> Result<Value, Fault>,
    ) -> Self {
        Self { name, about, answer: Answers::Post(answer), body: Some(body), reply }
    }

    const fn get(
        name: &'static str,
        about: &'static str,
        query: &'static [QueryField],
        reply: fn() -> Shape,
        answer: fn(&App, &Tenant, &Query) -> Result<Value, Fault>,
    ) -> Self {
        Self { name, about, answer: Answers::Get(answer, query), body: None, reply }
    }

    fn method(&self) -> Method {
        if matches!(self.answer, Answers::Get(..)) { Method::GET } else { Method::POST }
    }
}

/// A body with the address of a request.
fn with_address<T: utoipa::ToSchema>() -> Shape {
    Shape::of::<Address>().and(Shape::of::<T>())
}

/// The body of a pass, which has data in one of three fields.
fn pass_shape() -> Shape {
    let data =
        [("forward_backward_input", Type::Object), ("forward_input", Type::Object), ("batches", Type::Array)];
    Shape::of::<passes::PassBody>().with_any(&data)
}

/// The body of `/generate`, whose prompt has one of two forms.
fn generate_shape() -> Shape {
    Shape::of::<bodies::Generate>().with_any(&[("text", Type::String), ("input_ids", Type::Array)])
}

/// Calls that lie at the root in place of below the prefix.
const AT_ROOT: [&str; 1] = ["generate"];

/// The call at a path of the root.
pub fn at_root(path: &str) -> Option<&str> {
    path.strip_prefix('/').filter(|name| AT_ROOT.contains(name))
}

static CALLS: [Served; 19] = [
    Served::task(
        "abort_gradient_epoch",
        "Drops the gradients since the last update.",
        Shape::of::<Address>,
        passes::abort,
    ),
    Served::task(
        "create_model",
        "Creates an adapter. One of that name and shape goes on as it is: values, optimizer and gradients stay, and numbers \
         of requests begin anew.",
        with_address::<bodies::CreateModel>,
        sessions::create,
    ),
    Served {
        name: "create_sampling_session",
        about: "Opens a saved adapter to sample from it.",
        answer: Answers::Later(sampling::create_session),
        body: Some(Shape::of::<bodies::CreateSamplingSession>),
        reply: Shape::of::<answers::SamplingSession>,
    },
    Served::now(
        "delete_checkpoint",
        "Deletes a saved adapter or model.",
        with_address::<bodies::DeleteCheckpoint>,
        Shape::of::<answers::Deleted>,
        weights::delete,
    ),
    Served::task("forward", "Computes a loss without gradients.", pass_shape, passes::pass),
    Served::task("forward_backward", "Computes a loss and adds its gradients.", pass_shape, passes::pass),
    Served {
        name: "generate",
        about: "Samples, as SGLang does.",
        answer: Answers::Later(sampling::generate),
        body: Some(generate_shape),
        reply: Shape::of::<answers::Generated>,
    },
    Served::now(
        "get_info",
        "Describes an adapter and its base.",
        Shape::of::<Address>,
        Shape::of::<answers::Info>,
        sessions::info,
    ),
    Served {
        name: "kill_session",
        about: "Saves an adapter and unloads it.",
        answer: Answers::Later(sessions::kill),
        body: Some(with_address::<bodies::KillSession>),
        reply: Shape::of::<answers::Killed>,
    },
    Served::now(
        "list_checkpoints",
        "Lists what was saved of an adapter, newest last.",
        Shape::of::<Address>,
        Shape::of::<answers::Checkpoints>,
        weights::list,
    ),
    Served::task(
        "load_weights",
        "Loads saved values into an adapter.",
        with_address::<bodies::LoadWeights>,
        weights::load,
    ),
    Served::task(
        "optim_step",
        "Updates an adapter by its gradients.",
        with_address::<bodies::OptimStep>,
        passes::optim_step,
    ),
    Served {
        name: "save_full_weights_safetensors",
        about: "Saves the base with an adapter merged into it, as a model that needs no adapter. The answer comes when it is \
                there; training and sampling wait meanwhile.",
        answer: Answers::Later(weights::save_full),
        body: Some(with_address::<bodies::SaveFullWeights>),
        reply: Shape::of::<answers::FullWeights>,
    },
    Served::task(
        "save_weights",
        "Saves an adapter with its training state.",
        with_address::<bodies::SaveWeights>,
        weights::save,
    ),
    Served::task(
        "save_weights_for_sampler",
        "Saves an adapter alone.",
        with_address::<bodies::SaveForSampler>,
        weights::save_for_sampler,
    ),
    Served::get(
        "session_info",
        "Counts of an adapter.",
        &sessions::OF_SESSION,
        Shape::of::<answers::SessionInfo>,
        sessions::session_info,
    ),
    Served::get(
        "training_runs",
        "Lists adapters by name.",
        &sessions::OF_LIST,
        Shape::of::<answers::TrainingRuns>,
        sessions::training_runs,
    ),
    Served::task("unload_model", "Forgets an adapter.", Shape::of::<Address>, sessions::unload),
    Served::now(
        "weights_info",
        "Describes a saved adapter.",
        with_address::<bodies::WeightsInfo>,
        Shape::of::<answers::StoredInfo>,
        weights::info,
    ),
];

/// All calls of the wire, below `prefix`.
pub fn described(prefix: &str) -> impl Iterator<Item = Described> {
    CALLS.iter().map(move |call| Described {
        method: call.method(),
        path: if AT_ROOT.contains(&call.name) {
            format!("/{}", call.name)
        } else {
            format!("{prefix}{}", call.name)
        },
        about: call.about,
        query: if let Answers::Get(_, query) = call.answer { query } else { &[] },
        body: call.body.map(|shape| shape()),
        reply: Some((call.reply)()),
    })
}

/// The results that futures of this wire have.
pub fn results() -> Shape {
    let shapes: [fn() -> Shape; 6] = [
        Shape::of::<answers::PassResult>,
        Shape::of::<answers::StepResult>,
        Shape::of::<answers::AbortResult>,
        Shape::of::<answers::SaveResult>,
        Shape::of::<answers::LoadResult>,
        Shape::of::<answers::ModelResult>,
    ];
    Shape::any_of(shapes.map(|shape| shape()))
}

const SYNC: &str = "inference servers are not kept in step; save the weights and load them there";
const HUB: &str = "nothing is uploaded from here; save the weights and upload the folder";

/// Calls of the client that are refused, each with the reason.
const REFUSED: [(&str, &str); 12] = [
    ("add_inference_endpoint", SYNC),
    ("connect_inference_endpoint", SYNC),
    ("disconnect_inference_endpoint", SYNC),
    ("list_inference_endpoints", SYNC),
    ("remove_inference_endpoint", SYNC),
    ("set_sync_quantization", SYNC),
    ("sleep", SYNC),
    ("sync_inference_weights", SYNC),
    ("sync_weights", SYNC),
    ("update_dedicated_endpoint", HUB),
    ("update_serverless_weights", HUB),
    ("wake_up", SYNC),
];

/// A call with its method, if the wire has it.
pub fn method(name: &str) -> Option<(&'static str, Method)> {
    find(name).map(|call| (call.name, call.method()))
}

fn find(name: &str) -> Option<&'static Served> {
    CALLS.iter().find(|call| call.name == name)
}

/// The reason why a call of the client is not served, if it is one of those.
pub fn refusal(name: &str) -> Option<String> {
    let (name, reason) = REFUSED.iter().find(|(refused, _)| *refused == name)?;
    Some(format!("{name} is not served: {reason}"))
}

/// A POST of a client.
struct Call<'a> {
    app: &'a Arc<App>,
    tenant: &'a Tenant,
    name: &'a str,
    body: &'a [u8],
}

impl Call<'_> {
    /// The adapter and the number of the request, with the rest of the body.
    fn read<T: DeserializeOwned>(&self) -> Result<(ModelId, Option<i64>, T), Fault> {
        let (model, seq_id) = self.address()?;
        Ok((model, seq_id, fields::read(self.body)?))
    }

    /// The adapter and the number of the request.
    fn address(&self) -> Result<(ModelId, Option<i64>), Fault> {
        let address: Address = fields::read(self.body)?;
        Ok((address.model()?, address.seq_id))
    }

    /// Submits `task` for a model; returns the body that names its future.
    fn submit(
        &self,
        model: &ModelId,
        seq_id: Option<i64>,
        task: Task,
        render: Render,
    ) -> Result<Value, Fault> {
        let request_id = self.take(model, seq_id, task, render)?;
        value(&answers::Submitted { request_id, model_id: model })
    }

    /// Submits `task` for a model; returns the id of its future.
    fn take(
        &self,
        model: &ModelId,
        seq_id: Option<i64>,
        task: Task,
        render: Render,
    ) -> Result<String, Fault> {
        let number = seq_id.map(|seq_id| (seq_id, BodyHash::of_call(self.name, self.body)));
        self.app.submit(Submission { tenant: self.tenant, model, call: self.name, number, task, render })
    }
}

/// An answer as JSON.
fn value(answer: &impl Serialize) -> Result<Value, Fault> {
    serde_json::to_value(answer)
        .map_err(|error| Fault::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer: {error}")))
}

fn no_call(name: &str) -> Fault {
    Fault::not_found(format!("{name} is no call of this server"))
}

/// Answers a POST. `name` is one that [`method`] knows.
///
/// # Errors
/// The request is refused.
pub fn post(app: &Arc<App>, tenant: &Tenant, name: &str, body: &[u8]) -> Result<Answered, Fault> {
    let call = Call { app, tenant, name, body };
    match find(name).map(|served| &served.answer) {
        Some(Answers::Post(answer)) => answer(&call).map(|value| Answered::Now(Body::json(&value))),
        Some(Answers::Later(answer)) => answer(&call).map(Answered::Later),
        Some(Answers::Get(..)) | None => Err(no_call(name)),
    }
}

/// Answers a GET.
///
/// # Errors
/// The request is refused.
pub fn get(app: &Arc<App>, tenant: &Tenant, name: &str, query: &Query) -> Result<Answered, Fault> {
    match find(name).map(|served| &served.answer) {
        Some(Answers::Get(answer, _)) => {
            answer(app, tenant, query).map(|value| Answered::Now(Body::json(&value)))
        }
        _ => Err(no_call(name)),
    }
}
