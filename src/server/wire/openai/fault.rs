//! Refusals as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

use crate::server::{fault::Fault, futures::Full, request::Refusal, wire::sampling::SampleError};
use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::fmt::Display;
use utoipa::ToSchema;

/// A refused request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub fault: Fault,
    /// The field that is wrong.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl Refused {
    /// `field` has a value that cannot be.
    pub fn field(field: &str, reason: impl Display) -> Self {
        let fault = Fault::user(format!("{field}: {reason}"));
        Self { fault, param: Some(field.to_owned()), code: None }
    }

    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// `model` names nothing that samples.
    pub fn no_model(reason: impl Into<String>) -> Self {
        let fault = Fault::not_found(reason);
        Self { fault, param: Some("model".into()), code: Some("model_not_found") }
    }

    /// The body.
    pub fn error(&self) -> ErrorBody<'_> {
        let r#type = match self.fault.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let error = ErrorDetail {
            message: &self.fault.detail,
            r#type,
            param: self.param.as_deref(),
            code: self.code,
        };
        ErrorBody { error }
    }
}

/// The field of a detail that begins with one: `n: invalid type`.
fn named(detail: &str) -> Option<&str> {
    let (field, _) = detail.split_once(": ")?;
    let is_path = |c: char| c.is_ascii_alphanumeric() || "_[].".contains(c);
    (field != "body" && field.chars().all(is_path)).then_some(field)
}

impl From<Fault> for Refused {
    fn from(fault: Fault) -> Self {
        let code = match fault.status {
            StatusCode::UNAUTHORIZED => Some("invalid_api_key"),
            StatusCode::TOO_MANY_REQUESTS => Some("rate_limit_exceeded"),
            _ => None,
        };
        let param = named(&fault.detail).filter(|_| fault.status == StatusCode::BAD_REQUEST);
        Self { param: param.map(str::to_owned), code, fault }
    }
}

impl From<SampleError> for Refused {
    fn from(error: SampleError) -> Self {
        Fault::user(error.to_string()).into()
    }
}

impl From<Full> for Refused {
    fn from(full: Full) -> Self {
        Fault::from(full).into()
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Fault::from(refusal).into()
    }
}

/// A refusal.
#[derive(Serialize, ToSchema)]
#[schema(as = openai::Error)]
pub struct ErrorBody<'a> {
    error: ErrorDetail<'a>,
}

/// The reason of a refusal.
#[derive(Serialize, ToSchema)]
#[schema(as = openai::ErrorDetail)]
struct ErrorDetail<'a> {
    message: &'a str,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`
    r#type: &'static str,
    /// The field that is wrong.
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = (self.fault.status, Json(self.error())).into_response();
        // The headers are those of every refusal.
        let retry = self.fault.into_response().headers_mut().remove(header::RETRY_AFTER);
        response.headers_mut().extend(retry.map(|value| (header::RETRY_AFTER, value)));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_refusal_names_its_field_and_its_kind() {
        let shown =
            |fault: Fault| serde_json::to_value(Refused::from(fault).error()).unwrap()["error"].clone();
        assert_eq!(
            shown(Fault::user("messages[0].role: missing field")),
            json!({"message": "messages[0].role: missing field", "type": "invalid_request_error",
                "param": "messages[0].role", "code": null})
        );
        for text in ["body: expected a JSON object", "model_id a does not exist; b: c", "no colon"] {
            assert_eq!(shown(Fault::user(text))["param"], json!(null), "{text}");
        }
        let full = shown(Full::Requests(3).into());
        assert_eq!(
            (&full["type"], &full["code"]),
            (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
        );
        let failed = Refused::from(Refusal::Server("a".into()));
        assert_eq!(serde_json::to_value(failed.error()).unwrap()["error"]["type"], "server_error");
    }
}
