//! The OpenAPI document, made of what the wires say about their calls and of the paths that all share.

use super::routes::{ADAPTER, OVERVIEW, PREFIX, RETRIEVE};
use crate::server::{
    futures::Place,
    overview::Overview,
    wire::{
        described::{Described, QueryField, Shape},
        openai,
        tinker::{self, calls::RetrieveFuture},
        xorl,
    },
};
use axum::{
    body::Bytes,
    http::{HeaderValue, Method, header},
    response::{IntoResponse, Response as HttpResponse},
};
use serde::Serialize;
use std::{collections::BTreeMap, sync::OnceLock};
use utoipa::{
    ToSchema,
    openapi::{
        Components, Content, HttpMethod, Info, Object, OpenApi, Paths, RefOr, Required, Response, Schema,
        SecurityRequirement,
        path::{Operation, Parameter, ParameterIn},
        request_body::{RequestBody, RequestBodyBuilder},
        schema::{KnownFormat, SchemaFormat, SchemaType, Type},
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

/// The path of the document.
pub const PATH: &str = "/openapi.json";

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/x-protobuf";
const TEXT: &str = "text/plain";

/// The document as a response.
pub fn response() -> HttpResponse {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    let document = DOCUMENT.get_or_init(|| serde_json::to_vec(&document()).unwrap_or_default().into());
    ([(header::CONTENT_TYPE, HeaderValue::from_static(JSON))], document.clone()).into_response()
}

/// The reason of a refused request.
#[derive(Serialize, ToSchema)]
struct Refused {
    #[schema(example = "model_id a does not exist")]
    detail: String,
}

/// The state of the server.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// `ok`, `stopping` or `failed`
    pub status: &'static str,
    pub engine_running: bool,
    pub active_requests: usize,
    pub total_requests: u64,
}

/// The server answers.
#[derive(Serialize, ToSchema)]
pub struct Alive {
    /// `ok`
    pub status: &'static str,
}

/// A result that is not there yet: to be asked for again.
#[derive(Serialize, ToSchema)]
pub struct TryAgain<'a> {
    /// `try_again`
    pub r#type: &'static str,
    pub request_id: &'a str,
    pub queue_state: &'static str,
    /// Cause and place in the queue.
    pub queue_state_reason: String,
}

impl<'a> TryAgain<'a> {
    pub fn new(request_id: &'a str, place: &Place) -> Self {
        let queue_state_reason = place.reason();
        Self { r#type: "try_again", request_id, queue_state: "active", queue_state_reason }
    }
}

/// A request that was taken and has failed.
#[derive(Serialize, ToSchema)]
struct Failed {
    error: String,
    /// `user` or `server`
    category: String,
}

/// The whole document.
fn document() -> OpenApi {
    let mut all = Parts::default();
    let mut calls: BTreeMap<(String, String), Vec<Described>> = BTreeMap::new();
    let of_wires = xorl::described(PREFIX).chain(tinker::described(PREFIX)).chain(openai::described());
    for call in shared().into_iter().chain(of_wires) {
        let (path, method) = (call.path.clone(), call.method.to_string());
        calls.entry((path, method)).or_default().push(call);
    }
    let mut paths = Paths::new();
    for ((path, name), calls) in calls {
        let method = match calls.first().map(|call| &call.method) {
            Some(&Method::GET) => HttpMethod::Get,
            Some(&Method::PUT) => HttpMethod::Put,
            Some(&Method::DELETE) => HttpMethod::Delete,
            _ => HttpMethod::Post,
        };
        let operation = all.operation(&name, &path, calls);
        paths.add_path_operation(&path, vec![method], operation);
    }
    let key = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key")));
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    let components = Components::builder()
        .schemas_from_iter(all.schemas)
        .security_scheme("key", key)
        .security_scheme("bearer", bearer)
        .build();
    let mut info = Info::new("xorl-dist", env!("CARGO_PKG_VERSION"));
    info.description = Some("Trains many LoRA adapters on one base model.".into());
    let mut document = OpenApi::new(info, paths);
    document.components = Some(components);
    let none: [&str; 0] = [];
    let securities = ["key", "bearer"].map(|name| SecurityRequirement::new(name, none));
    // A server without keys needs none.
    document.security = Some([SecurityRequirement::default()].into_iter().chain(securities).collect());
    document
}

/// The calls that are of no wire.
fn shared() -> [Described; 6] {
    let get = |path: &str, about, reply| {
        let path = path.to_owned();
        Described { method: Method::GET, path, about, query: &[], body: None, reply: Some(reply) }
    };
    let text = Shape::alone(Object::with_type(SchemaType::Type(Type::String)));
    let any = Shape::alone(Object::new());
    [
        get("/health", "Says whether all ranks run.", Shape::of::<Health>()),
        get(&format!("{PREFIX}healthz"), "Says that the server answers.", Shape::of::<Alive>()),
        get("/metrics", "Metrics of Prometheus.", text),
        Described {
            method: Method::GET,
            path: format!("{PREFIX}{OVERVIEW}"),
            about: "The state of the server, as its page shows it.",
            query: &[ADAPTER],
            body: None,
            reply: Some(Shape::of::<Overview>()),
        },
        get(PATH, "This document.", any),
        Described {
            method: Method::POST,
            path: format!("{PREFIX}{RETRIEVE}"),
            about: "Waits for the result of a request. 408: ask again.",
            query: &[],
            body: Some(Shape::of::<RetrieveFuture>()),
            reply: Some(Shape::any_of([xorl::results(), tinker::results(), Shape::of::<Failed>()])),
        },
    ]
}

/// Schemas that the document names.
#[derive(Default)]
struct Parts {
    schemas: BTreeMap<String, RefOr<Schema>>,
}

impl Parts {
    /// The schema of a shape, whose parts are kept.
    fn take(&mut self, shape: Shape) -> RefOr<Schema> {
        self.schemas.extend(shape.parts);
        shape.schema
    }

    /// A body of any of `shapes`, by its media types; none without a shape. JSON goes by the name of `json`.
    fn contents(&mut self, json: &str, shapes: Vec<Shape>) -> BTreeMap<String, Content> {
        let mut shapes = shapes.into_iter();
        let shape = match (shapes.next(), shapes.len()) {
            (None, _) => return BTreeMap::new(),
            (Some(only), 0) => only,
            (Some(first), _) => Shape::any_of([first].into_iter().chain(shapes)),
        };
        let bytes = Object::builder()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)));
        let protobuf = shape.has_protobuf.then(|| (PROTOBUF.to_owned(), Content::new(Some(bytes))));
        let json = (json.to_owned(), Content::new(Some(self.take(shape))));
        [json].into_iter().chain(protobuf).collect()
    }

    fn response<T: ToSchema>(&mut self, about: &str) -> Response {
        let schema = self.take(Shape::of::<T>());
        let mut response = Response::new(about);
        response.content.insert(JSON.into(), Content::new(Some(schema)));
        response
    }

    /// The operation of a path, which several wires may answer.
    fn operation(&mut self, method: &str, path: &str, calls: Vec<Described>) -> Operation {
        let is_text = path == "/metrics";
        let mut operation = Operation::new();
        let name = path.strip_prefix(PREFIX).unwrap_or(path.trim_start_matches('/'));
        let id = name.replace('/', "_").replace(['{', '}'], "");
        operation.operation_id = Some(format!("{}_{id}", method.to_lowercase()));
        let of_path = name.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let mut parameters: Vec<Parameter> = of_path.map(path_parameter).collect();
        let (mut bodies, mut replies) = (Vec::new(), Vec::new());
        for call in calls {
            operation.summary.get_or_insert_with(|| call.about.into());
            for field in call.query {
                // Wires that share a path share the names of its query.
                if parameters.iter().all(|known| known.name != field.name) {
                    parameters.push(parameter(field));
                }
            }
            bodies.extend(call.body);
            replies.extend(call.reply);
        }
        operation.parameters = Some(parameters).filter(|parameters| !parameters.is_empty());
        let contents = self.contents(JSON, bodies);
        if !contents.is_empty() {
            let body = RequestBody::builder().required(Some(Required::True));
            let with = |body: RequestBodyBuilder, (kind, content)| body.content(kind, content);
            operation.request_body = Some(contents.into_iter().fold(body, with).build());
        }
        let contents = self.contents(if is_text { TEXT } else { JSON }, replies);
        let (status, about) = if contents.is_empty() { ("204", "Done.") } else { ("200", "The answer.") };
        let mut response = Response::new(about);
        response.content.extend(contents);
        let responses = &mut operation.responses.responses;
        responses.insert(status.into(), response.into());
        if path.ends_with(RETRIEVE) {
            responses.insert("408".into(), self.response::<TryAgain>("Not there yet.").into());
        }
        if path == "/health" {
            responses.insert("503".into(), self.response::<Health>("A rank has failed.").into());
        }
        for (status, about) in
            [("4XX", "Refused: the request is wrong."), ("5XX", "Refused: try again later.")]
        {
            let response = match path.starts_with(openai::PREFIX) {
                true => self.response::<openai::ErrorBody>(about),
                false => self.response::<Refused>(about),
            };
            responses.insert(status.into(), response.into());
        }
        operation
    }
}

fn path_parameter(name: &str) -> Parameter {
    let text = Object::with_type(SchemaType::Type(Type::String));
    Parameter::builder()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .schema(Some(text))
        .build()
}

fn parameter(field: &QueryField) -> Parameter {
    let kind = if field.is_integer { Type::Integer } else { Type::String };
    let mut schema = Object::builder().schema_type(kind);
    if field.is_integer {
        schema = schema.minimum(Some(0));
    }
    Parameter::builder()
        .name(field.name)
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .description(Some(field.about))
        .schema(Some(schema))
        .build()
}
