//! Calls that a client makes before it trains and while it lives: configuration, session, heartbeat, telemetry.

use super::{
    Answer, Call,
    answers::{
        Capabilities, ClientConfig, CreatedSession, Done, DynamicConfig, Heartbeat, Status, SupportedModel,
        texts,
    },
    calls::{CreateSession, SessionHeartbeat},
    json,
};
use crate::server::{
    fault::Fault,
    request::ModelId,
    sessions::{self, About},
};
use axum::http::StatusCode;
use std::time::SystemTime;

/// Seconds after which clients ask for their dynamic configuration again, which never changes.
const REFRESH: u64 = 3600;

pub fn client_config(call: &Call) -> Answer {
    json(&ClientConfig::new(&call.limits()))
}

pub fn dynamic_config(_: &Call) -> Answer {
    json(&DynamicConfig { refresh_interval_sec: REFRESH, sample_cancel_enabled: true })
}

/// Opens a session. Its messages say what differs from what clients may expect.
pub fn create_session(call: &Call) -> Answer {
    let CreateSession { user_metadata, display_name, .. } = call.read()?;
    let about = About { user_metadata: user_metadata.as_ref().map(texts), display_name };
    let id = call.app.sessions().open(call.tenant.clone(), about);
    json(&CreatedSession::new(id, call.app.settings.adapter.alpha))
}

/// Hears that a client lives. 410 tells one whose session has ended to be silent.
pub fn heartbeat(call: &Call) -> Answer {
    let SessionHeartbeat { session_id } = call.read()?;
    let heard = call.app.sessions().heartbeat(call.tenant, &session_id);
    heard.map_err(|ended| Fault::new(StatusCode::GONE, ended.to_string()))?;
    let of_session =
        |model: &ModelId| sessions::of_model(model).is_some_and(|(session, _)| session == session_id);
    call.app.registry().heartbeat(call.tenant, SystemTime::now(), of_session);
    json(&Heartbeat {})
}

/// Drops what clients tell about themselves.
pub fn telemetry(_: &Call) -> Answer {
    json(&Status::ACCEPTED)
}

/// Ends a session, and unloads its samplers. One that is not known is no error, for that would end the client's program
/// with one. Its models stay, on disk once they are idle: clients end a session after an error too, with what they have
/// not saved.
pub fn finish(call: &Call) -> Answer {
    let [session] = call.parts("sessions/{session}/finish")?;
    call.app.sessions().finish(call.tenant, &session);
    call.app.end_samplers(call.tenant, &session);
    json(&Done {})
}

pub fn capabilities(call: &Call) -> Answer {
    let settings = &call.app.settings;
    let base = SupportedModel {
        model_name: settings.base_model.clone(),
        max_context_length: settings.max_datum.min(settings.max_context),
        trainable: true,
        sampleable: true,
    };
    json(&Capabilities { supported_models: vec![base] })
}
