//! From a request to its answer: key, limits, the wire that speaks it. The paths are those of the clients; a name that
//! no wire knows is a 404.

use super::{
    body::{self, Unread},
    connection::Connection,
    openapi::{self, Alive, Health, TryAgain},
    page,
    pages::Hosts,
};
use crate::server::{
    app::App,
    downloads,
    fault::Fault,
    futures::{self, Look},
    overview::Overview,
    registry::Tenant,
    wire::{Answered, Wire, described::QueryField, openai, tinker, xorl},
};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};
use tower_http::services::ServeFile;

/// The prefix of the clients' calls.
pub const PREFIX: &str = "/api/v1/";
/// The call that asks for a result.
pub const RETRIEVE: &str = "retrieve_future";
/// The call of the page.
pub const OVERVIEW: &str = "overview";
/// Its query.
pub const ADAPTER: QueryField =
    QueryField { name: "adapter", about: "The adapter with all of its curves.", is_integer: false };

/// All paths of the server.
pub fn router(app: Arc<App>, hosts: Hosts) -> Router {
    Router::new().fallback(handle).with_state((app, Arc::new(hosts)))
}

async fn handle(
    State((app, hosts)): State<(Arc<App>, Arc<Hosts>)>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    request: Request,
) -> Response {
    let _busy = connection.busy();
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let label = label(parts.uri.path());
    let mut body = Some(body);
    let allowed = if app.keys.are_needed() { Ok(()) } else { hosts.check(&parts) };
    let response = match allowed {
        Ok(()) => answer(&app, parts, &mut body).await.unwrap_or_else(IntoResponse::into_response),
        Err(fault) => fault.into_response(),
    };
    if let Some(body) = body {
        app.bodies.discard(body).await;
    }
    app.metrics.count(label, response.status().as_u16(), started.elapsed());
    response
}

/// The name of a path in metrics: one of few.
fn label(path: &str) -> &'static str {
    const OPEN: [(&str, &str); 4] =
        [("/", "page"), ("/health", "health"), ("/metrics", "metrics"), (openapi::PATH, "openapi.json")];
    let open = OPEN.into_iter().find(|(open, _)| *open == path).map(|(_, name)| name);
    let of_call = || {
        let name = path.strip_prefix(PREFIX).or_else(|| xorl::at_root(path))?;
        let other = ["healthz", OVERVIEW, RETRIEVE].into_iter().find(|other| *other == name);
        other.or_else(|| Some(tinker::rows(name).next()?.path)).or_else(|| Some(xorl::method(name)?.0))
    };
    let of_openai = || Some(openai::Call::find(path.strip_prefix(openai::PREFIX)?)?.label());
    open.or_else(of_call).or_else(of_openai).unwrap_or("other")
}

async fn answer(app: &Arc<App>, parts: Parts, body: &mut Option<Body>) -> Result<Response, Fault> {
    let is_get = [Method::GET, Method::HEAD].contains(&parts.method);
    let path = parts.uri.path().to_owned();
    if is_get && path == "/health" {
        return Ok(health(app));
    }
    if is_get && path == "/api/v1/healthz" {
        return Ok(Json(Alive { status: "ok" }).into_response());
    }
    if is_get && path == openapi::PATH {
        return Ok(openapi::response());
    }
    if !is_get && ["/", "/health", "/metrics", "/api/v1/healthz", openapi::PATH].contains(&path.as_str()) {
        return other_method(&path, &[Method::GET], &parts.method);
    }
    if is_get && let Some(file) = page::file(&path, &parts.headers) {
        return Ok(file);
    }
    if is_get && let Some(address) = path.strip_prefix(downloads::PREFIX) {
        return download(app, address, parts).await;
    }
    if path.starts_with(openai::PREFIX) {
        return Ok(of_openai(app, &path, &parts, body).await.unwrap_or_else(IntoResponse::into_response));
    }
    let tenant = tenant(app, &parts.headers)?;
    if is_get && path == "/metrics" {
        let kind = HeaderValue::from_static("text/plain; version=0.0.4");
        return Ok(([(header::CONTENT_TYPE, kind)], app.metrics.text(app)).into_response());
    }
    let name = path.strip_prefix(PREFIX).or_else(|| xorl::at_root(&path));
    let refused = name.unwrap_or(path.trim_start_matches('/'));
    if let Some(detail) = xorl::refusal(refused).or_else(|| tinker::refusal(refused)) {
        return Err(Fault::user(detail));
    }
    let Some(name) = name else { return Err(unknown(&path)) };
    let method = if is_get { Method::GET } else { parts.method.clone() };
    let target = Target::find(name, &method);
    let bytes = match &target {
        Target::Result | Target::Call(_) if !is_get => {
            match app.bodies.read(&parts.headers, body.take().unwrap_or_default()).await {
                Ok(bytes) => bytes,
                Err(Unread { fault, start }) => {
                    let is_known = matches!(&target, Target::Call(called) if called.tinker.is_some());
                    if is_known && Wire::of(&parts.headers, &[]) == Wire::Tinker {
                        tinker::refused_unread(app, &tenant, &start);
                    }
                    return Err(fault);
                }
            }
        }
        _ => Bytes::new(),
    };
    match target {
        Target::Other(known) => other_method(&path, &known, &parts.method),
        Target::Overview => {
            let query = query(&parts);
            let adapter = query.get(ADAPTER.name).map(String::as_str);
            Ok(Json(Overview::of(app, &tenant, adapter)?).into_response())
        }
        Target::Result => retrieve(app, &tenant, &parts.headers, &bytes).await,
        Target::Call(called) => submit(app, tenant, called, name.to_owned(), parts, bytes).await,
    }
}

/// The owner of the request's key.
fn tenant(app: &App, headers: &HeaderMap) -> Result<Tenant, Fault> {
    app.keys.tenant(headers).ok_or_else(|| {
        let detail = "no known key; send it as `X-API-Key: KEY` or `Authorization: Bearer KEY`";
        Fault::new(StatusCode::UNAUTHORIZED, detail)
    })
}

/// Answers a call of OpenAI's clients, which read refusals in a form of their own.
async fn of_openai(
    app: &Arc<App>,
    path: &str,
    parts: &Parts,
    body: &mut Option<Body>,
) -> Result<Response, openai::Refused> {
    let tenant = tenant(app, &parts.headers)?;
    let call = path.strip_prefix(openai::PREFIX).and_then(openai::Call::find).ok_or_else(|| unknown(path))?;
    let method = call.method();
    if parts.method != method && !(method == Method::GET && parts.method == Method::HEAD) {
        return Ok(other_method(path, &[method], &parts.method)?);
    }
    let bytes = match method == Method::POST {
        true => {
            let read = app.bodies.read(&parts.headers, body.take().unwrap_or_default()).await;
            read.map_err(|unread| unread.fault)?
        }
        false => Bytes::new(),
    };
    openai::answer(app, &tenant, call, bytes).await
}

/// The fields of a query; none of one that cannot be read.
fn query(parts: &Parts) -> BTreeMap<String, String> {
    Query::try_from_uri(&parts.uri).map(|Query(query)| query).unwrap_or_default()
}

fn unknown(path: &str) -> Fault {
    Fault::not_found(format!("{path} is no path of this server"))
}

/// 405 for a path that has other methods, 404 for one that has none.
fn other_method(path: &str, known: &[Method], got: &Method) -> Result<Response, Fault> {
    if known.is_empty() {
        return Err(unknown(path));
    }
    let names = known.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
    let fault = Fault::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path} takes {names}, got {got}"));
    let mut response = match path.starts_with(openai::PREFIX) {
        true => openai::Refused::from(fault).into_response(),
        false => fault.into_response(),
    };
    response.headers_mut().extend(HeaderValue::from_str(&names).map(|value| (header::ALLOW, value)));
    Ok(response)
}

/// The meaning of path and method.
enum Target {
    /// A result is asked for, on any wire.
    Result,
    /// The page asks for what it shows.
    Overview,
    Call(Called),
    /// The methods that the path has instead.
    Other(Vec<Method>),
}

impl Target {
    fn find(name: &str, method: &Method) -> Self {
        if name == RETRIEVE {
            return if method == Method::POST { Self::Result } else { Self::Other(vec![Method::POST]) };
        }
        if name == OVERVIEW {
            return if method == Method::GET { Self::Overview } else { Self::Other(vec![Method::GET]) };
        }
        let of_xorl = xorl::method(name).map(|(_, method)| method);
        let called = Called {
            tinker: tinker::rows(name).find(|row| row.method == *method),
            xorl: of_xorl.as_ref() == Some(method),
        };
        if called.tinker.is_some() || called.xorl {
            return Self::Call(called);
        }
        let mut known: Vec<Method> =
            tinker::rows(name).map(|row| row.method.clone()).chain(of_xorl).collect();
        known.dedup();
        Self::Other(known)
    }
}

/// The wires that have a call.
struct Called {
    tinker: Option<&'static tinker::Row>,
    xorl: bool,
}

impl Called {
    /// The call of the client's wire, where both have the path.
    fn of(self, headers: &HeaderMap, bytes: &[u8]) -> Option<&'static tinker::Row> {
        self.tinker.filter(|_| !self.xorl || Wire::of(headers, bytes) == Wire::Tinker)
    }
}

fn health(app: &App) -> Response {
    let engine = app.engine.state();
    let (status, said) = match (engine.healthy, app.is_draining()) {
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        (true, true) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        (true, false) => (StatusCode::OK, "ok"),
    };
    let body = Health {
        status: said,
        engine_running: engine.healthy,
        active_requests: app.futures.counts().pending,
        total_requests: engine.answered + engine.waiting as u64,
    };
    (status, Json(body)).into_response()
}

/// Sends the file at a signed address. Ranges are honoured.
async fn download(app: &Arc<App>, address: &str, parts: Parts) -> Result<Response, Fault> {
    let path = app.signer.open(address, SystemTime::now())?.to_owned();
    let absent = || Fault::not_found("the file is no longer there");
    let own = app.clone();
    let found = move || downloads::file(&own.settings.output_dir, own.keys.are_needed(), &path);
    let file = tokio::task::spawn_blocking(found).await.map_err(body::failed)?.ok_or_else(absent)?;
    let request = Request::from_parts(parts, Body::empty());
    let response = ServeFile::new(file).try_call(request).await.map_err(|_| absent())?;
    Ok(response.map(Body::new))
}

/// Reads the body and carries out or submits what it asks for, apart from the threads of connections: a body may be
/// large.
async fn submit(
    app: &Arc<App>,
    tenant: Tenant,
    called: Called,
    name: String,
    parts: Parts,
    bytes: Bytes,
) -> Result<Response, Fault> {
    let query = query(&parts);
    let (own, owner, headers) = (app.clone(), tenant.clone(), parts.headers);
    let is_post = parts.method == Method::POST;
    let answered = move || match called.of(&headers, &bytes) {
        Some(row) => {
            let call = tinker::Call {
                app: &own,
                tenant: &owner,
                path: &name,
                query: &query,
                headers: &headers,
                body: &bytes,
            };
            tinker::answer(row, &call)
        }
        None if is_post => xorl::post(&own, &owner, &name, &bytes),
        None => xorl::get(&own, &owner, &name, &query),
    };
    match tokio::task::spawn_blocking(answered).await.map_err(body::failed)?? {
        Answered::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        Answered::Now(body) => Ok(response(body)),
        Answered::Later(later) => Ok(response(later.await?)),
    }
}

fn response(body: futures::Body) -> Response {
    let futures::Body { content_type, bytes } = body;
    ([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], bytes).into_response()
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
    Ok(response(rendered))
}
