//! From a request to its answer: key, limits, the wire that speaks it. The paths are those of the clients; a name that
//! no wire knows is a 404.

use super::{
    body,
    connection::Connection,
    openapi::{self, Alive, Health, TryAgain},
};
use crate::server::{
    app::App,
    fault::Fault,
    futures::{self, Look},
    registry::Tenant,
    wire::{Wire, xorl},
};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, sync::Arc, time::Instant};

/// The prefix of the clients' calls.
pub const PREFIX: &str = "/api/v1/";
/// The call that asks for a result.
pub const RETRIEVE: &str = "retrieve_future";

/// All paths of the server.
pub fn router(app: Arc<App>) -> Router {
    Router::new().fallback(handle).with_state(app)
}

async fn handle(
    State(app): State<Arc<App>>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    request: Request,
) -> Response {
    let _busy = connection.busy();
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let mut body = Some(body);
    let path = parts.uri.path();
    let name = path.strip_prefix(PREFIX).unwrap_or(path.trim_start_matches('/')).to_owned();
    let answered = answer(&app, &name, parts, &mut body).await;
    let response = answered.unwrap_or_else(IntoResponse::into_response);
    if let Some(body) = body {
        app.bodies.discard(body).await;
    }
    let is_known = xorl::method(&name).is_some()
        || ["health", "healthz", "metrics", "openapi.json", RETRIEVE].contains(&&*name);
    let label = if is_known { &name } else { "other" };
    app.metrics.count(label, response.status().as_u16(), started.elapsed());
    response
}

async fn answer(
    app: &Arc<App>,
    name: &str,
    parts: Parts,
    body: &mut Option<Body>,
) -> Result<Response, Fault> {
    let is_get = [Method::GET, Method::HEAD].contains(&parts.method);
    let path = parts.uri.path();
    if is_get && path == "/health" {
        return Ok(health(app));
    }
    if is_get && path == "/api/v1/healthz" {
        return Ok(Json(Alive { status: "ok" }).into_response());
    }
    if is_get && path == openapi::PATH {
        return Ok(openapi::response());
    }
    let Some(tenant) = app.keys.tenant(&parts.headers) else {
        let detail = "no known key; send it as `X-API-Key: KEY` or `Authorization: Bearer KEY`";
        return Err(Fault::new(StatusCode::UNAUTHORIZED, detail));
    };
    if is_get && path == "/metrics" {
        let kind = HeaderValue::from_static("text/plain; version=0.0.4");
        return Ok(([(header::CONTENT_TYPE, kind)], app.metrics.text(app)).into_response());
    }
    if let Some(detail) = xorl::refusal(name) {
        return Err(Fault::user(detail));
    }
    let is_below = path.starts_with(PREFIX);
    let method = xorl::method(name).map(|(_, method)| method);
    match method.or((name == RETRIEVE).then_some(Method::POST)).filter(|_| is_below) {
        None => Err(Fault::not_found(format!("{path} is no path of this server"))),
        Some(method) if method == Method::GET && is_get => get(app, tenant, name.to_owned(), &parts).await,
        Some(method) if method == parts.method => {
            let bytes = app.bodies.read(&parts.headers, body.take().unwrap_or_default()).await?;
            if name == RETRIEVE {
                return retrieve(app, &tenant, &parts.headers, &bytes).await;
            }
            post(app, tenant, name.to_owned(), parts.headers, bytes).await
        }
        Some(method) => {
            let detail = format!("{path} takes {method}, got {}", parts.method);
            let mut response = Fault::new(StatusCode::METHOD_NOT_ALLOWED, detail).into_response();
            response
                .headers_mut()
                .extend(HeaderValue::from_str(method.as_str()).map(|value| (header::ALLOW, value)));
            Ok(response)
        }
    }
}

fn health(app: &App) -> Response {
    let engine = app.engine.state();
    let status = if engine.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = Health {
        status: if engine.healthy { "ok" } else { "failed" },
        engine_running: engine.healthy,
        active_requests: app.futures.counts().pending,
        total_requests: engine.answered + engine.waiting as u64,
    };
    (status, Json(body)).into_response()
}

async fn get(app: &Arc<App>, tenant: Tenant, name: String, parts: &Parts) -> Result<Response, Fault> {
    let query = Query::<BTreeMap<String, String>>::try_from_uri(&parts.uri);
    let query = query.map(|Query(query)| query).unwrap_or_default();
    let app = app.clone();
    let called = move || xorl::get(&app, &tenant, &name, &query);
    Ok(Json(tokio::task::spawn_blocking(called).await.map_err(body::failed)??).into_response())
}

/// Reads the body and submits what it asks for, apart from the threads of connections: a body may be large.
async fn post(
    app: &Arc<App>,
    tenant: Tenant,
    name: String,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let (own, owner) = (app.clone(), tenant.clone());
    let called = move || match Wire::of(&headers, &bytes) {
        Wire::Tinker => Err(Fault::user(
            "the request is of a tinker client (protobuf, its headers, a `type` or a session), which is not served \
             here; use xorl-client",
        )),
        Wire::Xorl => xorl::post(&own, &owner, &name, &bytes),
    };
    let value = match tokio::task::spawn_blocking(called).await.map_err(body::failed)?? {
        xorl::Called::Now(value) => value,
        xorl::Called::Kill(kill) => xorl::kill(app, &tenant, kill).await?,
    };
    Ok(Json(value).into_response())
}

/// Waits for a result. 408 tells the client to ask again, and why it waits.
async fn retrieve(
    app: &Arc<App>,
    tenant: &Tenant,
    headers: &HeaderMap,
    bytes: &[u8],
) -> Result<Response, Fault> {
    let body: Map<String, Value> = xorl::object(bytes)?;
    let Some(id) = body.get("request_id").and_then(Value::as_str) else {
        return Err(Fault::user("request_id: expected the text that a request was answered with"));
    };
    let outcome = match app.futures.wait(id, tenant, None).await {
        Look::Unknown => {
            let shown: String = id.chars().take(40).collect();
            return Err(Fault::not_found(format!(
                "request_id {shown:?} is not known: results are kept for an hour, and not over a restart of the server"
            )));
        }
        Look::Pending(place) => {
            return Ok((StatusCode::REQUEST_TIMEOUT, Json(TryAgain::new(id, &place))).into_response());
        }
        Look::Done(outcome) => outcome,
    };
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let protobuf = accepted.is_some_and(|kinds| kinds.contains("protobuf"));
    let rendered = tokio::task::spawn_blocking(move || outcome.body(protobuf)).await.map_err(body::failed)?;
    let futures::Body { content_type, bytes } = rendered;
    let bytes = app.bodies.hold(bytes).await?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], bytes).into_response())
}
