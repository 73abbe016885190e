//! An answer that refuses a request at once: a status and `{detail}`.

use super::{checkpoints::StoreError, futures::Full, paths::PathError, request::Refusal};
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

/// Bytes of a detail, at most.
const LONGEST: usize = 2000;

/// A refused request. What is permanent is a 4xx but not 409: clients try 409 and 5xx again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {detail}")]
pub struct Fault {
    pub status: StatusCode,
    /// The reason, and what to do.
    pub detail: String,
}

impl Fault {
    /// A detail that repeats much of a long request is cut.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        if detail.len() > LONGEST {
            detail.truncate(detail.floor_char_boundary(LONGEST));
            detail.push('…');
        }
        Self { status, detail }
    }

    /// The request is wrong.
    pub fn user(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }
}

impl From<Full> for Fault {
    fn from(full: Full) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, full.to_string())
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::User(detail) => Self::user(detail),
            Refusal::Server(detail) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail),
            Refusal::Stopping => Self::new(StatusCode::SERVICE_UNAVAILABLE, refusal.to_string()),
        }
    }
}

impl From<PathError> for Fault {
    fn from(error: PathError) -> Self {
        Self::user(error.to_string())
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Absent(_) => Self::not_found(error.to_string()),
            StoreError::Io { .. } | StoreError::Failed(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
            }
            _ => Self::user(error.to_string()),
        }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(serde_json::json!({"detail": self.detail}))).into_response();
        let is_busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&self.status);
        if is_busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        response
    }
}
