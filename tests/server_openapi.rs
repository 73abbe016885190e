//! The OpenAPI document against the server: its paths, and the fields that its schemas require.

use crate::server_http::server::Server;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use xorl_dist::server::{keys::Keys, request::ModelId};

/// The calls of the clients that a trainer answers, from their sources, and those that every server has.
const SERVED: [&str; 53] = [
    "DELETE /api/v1/training_runs/{run}/checkpoints/{kind}/{name}",
    "DELETE /api/v1/training_runs/{run}/checkpoints/{kind}/{name}/publish",
    "GET /api/v1/checkpoints",
    "GET /api/v1/get_server_capabilities",
    "GET /api/v1/healthz",
    "GET /api/v1/overview",
    "GET /api/v1/samplers/{sampler}",
    "GET /api/v1/session_info",
    "GET /api/v1/sessions",
    "GET /api/v1/sessions/{session}",
    "GET /api/v1/training_runs",
    "GET /api/v1/training_runs/{run}",
    "GET /api/v1/training_runs/{run}/checkpoints",
    "GET /api/v1/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls",
    "GET /health",
    "GET /metrics",
    "GET /openapi.json",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /api/v1/abort_gradient_epoch",
    "POST /api/v1/asample",
    "POST /api/v1/cancel_future",
    "POST /api/v1/client/config",
    "POST /api/v1/client/dynamic_config",
    "POST /api/v1/copy_weights",
    "POST /api/v1/create_model",
    "POST /api/v1/create_sampling_session",
    "POST /api/v1/create_session",
    "POST /api/v1/delete_checkpoint",
    "POST /api/v1/forward",
    "POST /api/v1/forward_backward",
    "POST /api/v1/get_info",
    "POST /api/v1/join_sampling_session",
    "POST /api/v1/kill_session",
    "POST /api/v1/list_checkpoints",
    "POST /api/v1/load_weights",
    "POST /api/v1/optim_step",
    "POST /api/v1/retrieve_future",
    "POST /api/v1/retrieve_futures",
    "POST /api/v1/save_full_weights_safetensors",
    "POST /api/v1/save_weights",
    "POST /api/v1/save_weights_external",
    "POST /api/v1/save_weights_for_sampler",
    "POST /api/v1/session_heartbeat",
    "POST /api/v1/sessions/{session}/finish",
    "POST /api/v1/telemetry",
    "POST /api/v1/training_runs/{run}/checkpoints/{kind}/{name}/publish",
    "POST /api/v1/unload_model",
    "POST /api/v1/weights_info",
    "POST /generate",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "PUT /api/v1/training_runs/{run}/checkpoints/{kind}/{name}/ttl",
];

struct Document(Value);

impl Document {
    fn of(server: &Server) -> Self {
        let (status, document) = server.get("/openapi.json");
        assert_eq!(status, 200);
        Self(document)
    }

    /// `POST /path`, with the operation.
    fn operations(&self) -> Vec<(String, &Value)> {
        let paths = self.0["paths"].as_object().unwrap();
        let methods = |(path, item): (&String, &'_ Value)| {
            let path = path.clone();
            item.as_object()
                .unwrap()
                .keys()
                .map(move |method| format!("{} {path}", method.to_uppercase()))
                .collect::<Vec<_>>()
        };
        let names = paths.iter().flat_map(methods);
        names
            .map(|name| {
                let (method, path) = name.split_once(' ').unwrap();
                let operation = &self.0["paths"][path][method.to_lowercase()];
                (name.clone(), operation)
            })
            .collect()
    }

    /// The schema that a reference leads to.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(place) => self.resolved(
                self.0.pointer(place.strip_prefix('#').unwrap()).unwrap_or_else(|| panic!("{place}")),
            ),
            None => schema,
        }
    }

    /// A schema as text, with the alternatives that it names.
    fn alternatives(&self, schema: &Value) -> String {
        let schema = self.resolved(schema);
        let named = schema["oneOf"].as_array().into_iter().flatten().map(|one| self.resolved(one));
        let named = named.filter(|one| one["oneOf"].is_array()).map(Value::to_string);
        std::iter::once(schema.to_string()).chain(named).collect()
    }

    /// True for a schema that null has.
    fn is_nullable(&self, schema: &Value) -> bool {
        let schema = self.resolved(schema);
        let is_null = |kind: &Value| *kind == "null";
        let kinds = schema["type"].as_array().is_some_and(|kinds| kinds.iter().any(is_null));
        let any = ["oneOf", "anyOf"].iter().filter_map(|name| schema[*name].as_array()).flatten();
        kinds || is_null(&schema["type"]) || any.into_iter().any(|one| self.is_nullable(one))
    }

    /// Properties of an object, of all its parts; of alternatives the first.
    fn properties(&self, schema: &Value) -> (Map<String, Value>, BTreeSet<String>) {
        let schema = self.resolved(schema);
        let (mut properties, mut required) = (Map::new(), BTreeSet::new());
        let first = schema["anyOf"].as_array().and_then(|any| any.first());
        for part in schema["allOf"].as_array().into_iter().flatten().chain(first) {
            let (more, needed) = self.properties(part);
            for (name, property) in more {
                // The part that says most of a property is the one with its reference.
                properties.entry(name).or_insert(property);
            }
            required.extend(needed);
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            properties.insert(name.clone(), property.clone());
        }
        let own = schema["required"].as_array().into_iter().flatten();
        required.extend(own.map(|name| name.as_str().unwrap().to_owned()));
        (properties, required)
    }

    /// A value of a schema with what is required alone, made of its examples.
    fn value(&self, schema: &Value) -> Value {
        let schema = self.resolved(schema);
        if let Some(example) = schema.get("example") {
            return example.clone();
        }
        let mut alternatives =
            ["oneOf", "anyOf"].iter().filter_map(|name| schema[*name].as_array()).flatten();
        if let Some(first) = alternatives.find(|one| one["type"] != "null") {
            return self.value(first);
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().find(|kind| **kind != "null").unwrap(),
            kind => kind,
        };
        match kind.as_str() {
            Some("string") => json!("a"),
            Some("integer" | "number") => json!(1),
            Some("boolean") => json!(true),
            Some("array") => json!([self.value(&schema["items"])]),
            _ => {
                let (properties, required) = self.properties(schema);
                let field = |name: &String| (name.clone(), self.value(&properties[name]));
                Value::Object(required.iter().map(field).collect())
            }
        }
    }

    /// Every place of a required field in `value`, as pointers.
    fn required_places(&self, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
        let (properties, required) = self.properties(schema);
        for (name, part) in value.as_object().into_iter().flatten() {
            let place = format!("{at}/{name}");
            if required.contains(name) {
                found.push(place.clone());
            }
            let property = properties.get(name).cloned().unwrap_or_default();
            let one = |schema: &Value| match schema["oneOf"].as_array() {
                Some(any) => any.iter().find(|one| one["type"] != "null").cloned().unwrap(),
                None => schema.clone(),
            };
            let property = one(self.resolved(&property));
            self.required_places(&property, part, &place, found);
            if let Some(first) = part.get(0) {
                self.required_places(&property["items"], first, &format!("{place}/0"), found);
            }
        }
    }
}

/// The bodies that a call takes: of a path that two wires share, that of xorl's client first.
fn body_schemas(operation: &Value) -> Vec<&Value> {
    let Some(schema) = operation.pointer("/requestBody/content/application~1json/schema") else {
        return vec![];
    };
    schema["anyOf"].as_array().map_or_else(|| vec![schema], |any| any.iter().collect())
}

fn body_schema(operation: &Value) -> Option<&Value> {
    body_schemas(operation).first().copied()
}

/// A path with "a" in place of each of its parameters.
fn filled(path: &str) -> String {
    path.split('/').map(|part| if part.starts_with('{') { "a" } else { part }).collect::<Vec<_>>().join("/")
}

fn send_with(server: &Server, name: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let (method, path) = name.split_once(' ').unwrap();
    let body = if method == "GET" { String::new() } else { body.to_string() };
    server.send(method, &filled(path), headers, body.as_bytes())
}

/// A server that knows texts, as calls that generate need.
fn server() -> Server {
    Server::with_texts(Keys::default(), |_| {})
}

/// The reason of a refusal, in either form.
fn reason(reply: &Value) -> &str {
    reply["detail"].as_str().or_else(|| reply["error"]["message"].as_str()).unwrap_or_default()
}

fn send(server: &Server, name: &str, body: &Value) -> (u16, Value) {
    send_with(server, name, &[], body)
}

#[test]
fn the_document_has_the_paths_that_the_server_answers() {
    let server = server();
    let document = Document::of(&server);
    assert_eq!(document.0["openapi"], "3.1.0");
    let names: Vec<String> = document.operations().into_iter().map(|(name, _)| name).collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, SERVED);
    for name in &names {
        let (method, path) = name.split_once(' ').unwrap();
        let (status, reply) = send(&server, name, &json!({}));
        // A body without fields may be refused, but its path is there.
        let is_no_path = reason(&reply).contains("is no path");
        assert!(!is_no_path && ![405, 501].contains(&status) && status < 500, "{name}: {status} {reply}");
        let other = if method == "GET" { "PUT" } else { "GET" };
        assert!([404, 405].contains(&server.send(other, &filled(path), &[], b"").0), "{other} {path}");
    }
    let served: BTreeSet<&str> = names.iter().map(|name| name.split_once(' ').unwrap().1).collect();
    for word in ["health", "metrics", "openapi.json", "create_sessions", "sample", "nothing", "save_state"] {
        for path in [format!("/{word}"), format!("/api/v1/{word}"), format!("/api/{word}")] {
            if !served.contains(path.as_str()) {
                let status = server.send("POST", &path, &[], b"{}").0.min(server.get(&path).0);
                assert!([400, 404].contains(&status), "{path} is answered with {status}");
            }
        }
    }
}

#[test]
fn every_name_in_the_document_leads_to_a_schema() {
    let server = server();
    let document = Document::of(&server);
    let mut values = vec![&document.0];
    let mut references = 0;
    while let Some(value) = values.pop() {
        if let Some(place) = value["$ref"].as_str() {
            assert!(document.0.pointer(&place[1..]).is_some(), "{place}");
            references += 1;
        }
        values.extend(value.as_object().into_iter().flat_map(Map::values));
        values.extend(value.as_array().into_iter().flatten());
    }
    assert!(references > 50, "{references}");
    for (name, operation) in document.operations() {
        let ids = ["summary", "operationId"].map(|field| operation[field].as_str().unwrap_or_default());
        assert!(ids.iter().all(|text| !text.is_empty()), "{name}");
        let responses = &operation["responses"];
        assert!(responses["200"]["content"].is_object() || responses["204"].is_object(), "{name}");
        let places = name.matches('{').count();
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        assert_eq!(parameters.filter(|parameter| parameter["in"] == "path").count(), places, "{name}");
    }
}

#[test]
fn a_body_of_required_fields_is_taken_and_each_of_them_is_required() {
    let server = server();
    let document = Document::of(&server);
    let mut dropped = 0;
    for (name, operation) in document.operations() {
        let Some(schema) = body_schema(operation) else { continue };
        let mut bodies = vec![document.value(schema)];
        // A pass has its data in one of several fields.
        let parts = document.resolved(schema)["allOf"].as_array().into_iter().flatten();
        let any = parts.filter_map(|part| part["anyOf"].as_array()).flatten();
        let fields: Vec<String> = any.map(|one| one["required"][0].as_str().unwrap().to_owned()).collect();
        if !fields.is_empty() {
            let (properties, _) = document.properties(schema);
            bodies = fields.iter().map(|field| json!({field: document.value(&properties[field])})).collect();
        }
        for body in bodies {
            let (status, reply) = send(&server, &name, &body);
            assert!([200, 404, 410].contains(&status), "{name} {body}: {status} {reply}");
            let mut places = Vec::new();
            document.required_places(schema, &body, "", &mut places);
            places.extend(
                fields
                    .iter()
                    .filter(|field| body.get(field.as_str()).is_some())
                    .map(|field| format!("/{field}")),
            );
            for place in places {
                let (parent, field) = place.rsplit_once('/').unwrap();
                let mut without = body.clone();
                without.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(field);
                let (status, reply) = send(&server, &name, &without);
                assert_eq!(status, 400, "{name} without {place}: {reply}");
                assert!(reason(&reply).contains(field), "{name} without {place}: {reply}");
                dropped += 1;
            }
        }
    }
    assert!(dropped >= 15, "{dropped}");
}

#[test]
fn every_documented_field_is_read_with_its_type() {
    let server = server();
    let document = Document::of(&server);
    let mut fields = 0;
    for (name, operation) in document.operations() {
        let Some(schema) = body_schema(operation) else { continue };
        let base = document.value(schema);
        let (properties, _) = document.properties(schema);
        for (field, property) in &properties {
            // A wrong value of each type that the schema does not allow.
            let text = document.alternatives(property);
            let wrong = match ["\"string\"", "\"integer\""].map(|kind| text.contains(kind)) {
                // Texts, ids, or lists of them.
                [true, true] => json!({"a": 1}),
                [true, false] => json!([1]),
                _ => json!("text"),
            };
            let mut body = base.clone();
            if name.ends_with("save_full_weights_safetensors") {
                // It is answered when it is saved, and a name is saved once.
                body["name"] = json!(format!("full_{fields}"));
            }
            body[field] = wrong.clone();
            let (status, reply) = send(&server, &name, &body);
            assert_eq!(status, 400, "{name} with {field} {wrong}: {reply}");
            fields += 1;
            // Without its data a pass is refused, and without its prompt a sample.
            if ["forward_backward_input", "forward_input", "text"].contains(&field.as_str()) {
                continue;
            }
            body[field] = Value::Null;
            let is_null_fine = document.is_nullable(property);
            let (status, reply) = send(&server, &name, &body);
            assert_eq!(status == 400, !is_null_fine, "{name} with {field} null: {status} {reply}");
        }
    }
    assert!(fields >= 60, "{fields}");
}

#[test]
fn the_other_body_of_a_shared_path_is_read_as_it_is_documented() {
    let server = server();
    let document = Document::of(&server);
    let tinker = [("x-stainless-lang", "python")];
    let (mut wrongs, mut dropped, mut packed) = (0, 0, 0);
    for (name, operation) in document.operations() {
        packed += usize::from(operation["requestBody"]["content"]["application/x-protobuf"].is_object());
        for schema in body_schemas(operation).into_iter().skip(1) {
            let base = document.value(schema);
            let (properties, required) = document.properties(schema);
            for (field, property) in &properties {
                let text = document.resolved(property).to_string();
                let wrong = if text.contains("\"string\"") { json!([1]) } else { json!("text") };
                let with = |value: &Value| {
                    let mut body = base.clone();
                    body[field] = value.clone();
                    let (status, reply) = send_with(&server, &name, &tinker, &body);
                    (status, reply["detail"].as_str().unwrap_or_default().to_owned())
                };
                let (status, detail) = with(&wrong);
                let is_refused = status == 400 && detail.starts_with("body: invalid type");
                assert!(is_refused, "{name} with {field} {wrong}: {status} {detail}");
                let is_null_fine = document.is_nullable(property);
                let (_, detail) = with(&Value::Null);
                let is_null_refused = detail.starts_with("body: invalid type: null");
                assert_ne!(is_null_refused, is_null_fine, "{name} with {field} null: {detail}");
                wrongs += 1;
            }
            for field in &required {
                let mut body = base.clone();
                body.as_object_mut().unwrap().remove(field);
                let (status, reply) = send_with(&server, &name, &tinker, &body);
                let detail = reply["detail"].as_str().unwrap_or_default();
                let is_named = detail.starts_with(&format!("body: missing field `{field}`"));
                assert!(status == 400 && is_named, "{name} without {field}: {reply}");
                dropped += 1;
            }
        }
    }
    assert!(wrongs >= 40 && dropped >= 12 && packed == 2, "{wrongs} {dropped} {packed}");
}

#[test]
fn every_name_of_an_adapter_has_the_pattern_of_those_that_are_taken() {
    let server = server();
    let document = Document::of(&server);
    let mut patterns = BTreeSet::new();
    for (name, operation) in document.operations() {
        for schema in body_schemas(operation) {
            if let Some(property) = document.properties(schema).0.get("model_id") {
                patterns.insert(property["pattern"].as_str().unwrap_or_else(|| panic!("{name}")).to_owned());
            }
        }
    }
    let [pattern] = &patterns.into_iter().collect::<Vec<_>>()[..] else { panic!("not one pattern") };
    let pattern = fancy_regex::Regex::new(pattern).unwrap();
    for text in ["a", "default", "sess-1:train:0", "a.b_c-d", "", ".", "-a", "_a", "a/b", "a b", "é", "aé"]
    {
        assert_eq!(pattern.is_match(text).unwrap(), ModelId::new(text).is_ok(), "{text}");
    }
    for length in [128, 129] {
        assert_eq!(pattern.is_match(&"a".repeat(length)).unwrap(), length == 128);
    }
}

/// Serves until it is killed, for programs that read the document: `ci/long.sh schemathesis`.
#[test]
#[ignore = "serves until it is killed"]
fn serves_until_killed() {
    let server = server();
    println!("http://{}", server.address);
    loop {
        std::thread::park();
    }
}
