//! Models: create, describe, pass, update, unload.

use super::{
    Answer, Call,
    answers::{CreatedModel, ModelData, ModelInfo, Stepped, Submitted, UnloadedModel, texts},
    calls::{CreateModel, ModelCall, OptimStepCall},
    data::PassCall,
    json, reply,
};
use crate::server::{
    app::{Submission, mismatched},
    fault::Fault,
    futures::Body,
    request::{ModelId, PassReply, Reply, Task},
    runs::{self, Record},
    sessions::{SessionError, model_id},
};
use axum::http::header;
use std::collections::BTreeMap;

impl From<SessionError> for Fault {
    fn from(error: SessionError) -> Self {
        Self::user(error.to_string())
    }
}

impl Call<'_> {
    /// Makes model `number` of a session by `make`, which returns the id of a future; a repeat gets the first one's.
    pub(super) fn once(
        &self,
        session: &str,
        number: u64,
        make: impl FnOnce(&ModelId) -> Result<String, Fault>,
    ) -> Answer {
        let model = model_id(session, number).map_err(|error| Fault::user(error.to_string()))?;
        let (hash, mut sessions) = (self.hash(), self.app.sessions());
        let future = match sessions.repeat(self.tenant, session, number, hash)? {
            Some(first) => first,
            None => {
                let future = make(&model)?;
                sessions.take(self.tenant, session, number, hash, future.clone())?;
                future
            }
        };
        json(&Submitted::new(future, &model))
    }

    /// Begins a new model: its first request has number 1, and what its client said of it is kept.
    pub(super) fn begin(&self, model: &ModelId, record: &Record) -> Result<(), Fault> {
        self.app.begin_order(self.tenant, model);
        Ok(runs::record(&self.app.root(self.tenant)?, model, record)?)
    }

    /// The model that a body names, which exists.
    pub(super) fn model(&self, named: &str) -> Result<ModelId, Fault> {
        let model = ModelId::new(named).map_err(|error| Fault::user(error.to_string()))?;
        self.app.spec(self.tenant, &model)?;
        Ok(model)
    }
}

/// Creates a model of a session.
pub fn create_model(call: &Call) -> Answer {
    let mut body: CreateModel = call.read()?;
    body.base_model = call.base_model(body.base_model);
    let (mut spec, warning_message) = body.spec(&call.defaults()).map_err(|error| call.refuse(error))?;
    spec.targets.clone_from(&call.app.settings.adapter.targets);
    call.app.check_rank(spec.rank)?;
    let user_metadata: Option<BTreeMap<String, String>> = body.user_metadata.as_ref().map(texts);
    call.once(&body.session_id, body.model_seq_id, |model| {
        let record = Record { spec: spec.clone(), user_metadata };
        let id = model.to_string();
        let render = Box::new(move |reply: &Reply, _| match reply {
            Reply::Created => {
                Body::json(&CreatedModel { model_id: id.clone(), warning_message: warning_message.clone() })
            }
            other => mismatched(other),
        });
        let future = call.app.create(call.tenant, model, spec, render)?;
        call.begin(model, &record)?;
        Ok(future)
    })
}

/// Describes a model and its base.
pub fn info(call: &Call) -> Answer {
    let ModelCall { model_id } = call.read()?;
    let (model, settings) = (call.model(&model_id)?, &call.app.settings);
    let spec = call.app.spec(call.tenant, &model)?;
    let base = ModelData {
        arch: settings.architecture.clone(),
        model_name: settings.base_model.clone(),
        tokenizer_id: settings.tokenizer.display().to_string(),
    };
    json(&ModelInfo::new(&model, spec.rank, base))
}

/// Submits a pass: protobuf, or the JSON of clients up to 0.24.
pub fn pass(call: &Call) -> Answer {
    let kind = call.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let read = match kind.is_some_and(|kind| kind.contains("protobuf")) {
        true => PassCall::from_protobuf(call.body.clone(), &call.limits()),
        false => PassCall::from_json(call.body, &call.limits()),
    };
    let PassCall { model, seq_id, pass, columns } =
        read.map_err(|refused| call.refuse_at(&refused.address, Fault::user(refused.reason.to_string())))?;
    let render = Box::new(move |reply: &Reply, protobuf: bool| match reply {
        Reply::Passed(pass) => pass_body(pass, &columns, protobuf),
        other => mismatched(other),
    });
    call.submit(&model, seq_id, Task::Pass(pass), render)
}

fn pass_body(pass: &PassReply, columns: &[Option<usize>], protobuf: bool) -> Body {
    if protobuf {
        return Body { content_type: "application/x-protobuf", bytes: reply::to_protobuf(pass, columns) };
    }
    Body { content_type: "application/json", bytes: reply::to_json(pass, columns).unwrap_or_default() }
}

/// Submits an update.
pub fn optim_step(call: &Call) -> Answer {
    let body: OptimStepCall = call.read()?;
    let step = body.step().map_err(|error| call.refuse(error))?;
    let model = call.model(&body.model_id)?;
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Stepped(stepped) => Body::json(&Stepped::new(stepped, step.lr)),
        other => mismatched(other),
    });
    call.submit(&model, body.seq_id, Task::OptimStep(step), render)
}

/// Forgets a model. Its saves stay.
pub fn unload(call: &Call) -> Answer {
    let ModelCall { model_id } = call.read()?;
    let model = call.model(&model_id)?;
    let id = model.to_string();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Unloaded => Body::json(&UnloadedModel { model_id: id.clone() }),
        other => mismatched(other),
    });
    let (tenant, task) = (call.tenant, Task::Unload);
    let submission = Submission { tenant, model: &model, call: call.path, number: None, task, render };
    json(&Submitted::new(call.app.submit(submission)?, &model))
}
