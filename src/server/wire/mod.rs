//! Wires: each turns the requests of one family of clients into requests to the engine, and the engine's replies into
//! bodies. Two of them share paths, so the sender is known by the request itself ([`Wire::of`]); those of [`openai`]
//! are its own.

mod bounded;
pub mod described;
pub mod openai;
pub mod sampling;
mod scalar;
pub mod tinker;
mod untrusted;
pub mod xorl;

#[doc(hidden)]
pub use untrusted::read_as_all;

use super::{fault::Fault, futures::Body};
use axum::http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use scalar::Scalar;
use serde::Deserialize;
use std::{
    pin::Pin,
    time::{SystemTime, UNIX_EPOCH},
};

/// The body of an answer that is waited for.
pub type Later = Pin<Box<dyn Future<Output = Result<Body, Fault>> + Send>>;

/// The answer of a wire.
pub enum Answered {
    /// It has no body.
    Done,
    Now(Body),
    Later(Later),
}

/// A family of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// `tinker`, and programs that speak as it does.
    Tinker,
    /// `xorl-client`, and programs that send plain JSON.
    Xorl,
}

/// Fields by which a body tells its sender.
#[derive(Deserialize)]
struct Marks {
    #[serde(default)]
    r#type: Scalar,
    #[serde(default)]
    model_seq_id: Scalar,
    #[serde(default)]
    model_id: Scalar,
}

impl Wire {
    /// The sender of a request: tinker sends protobuf, headers of its HTTP library, or JSON with a constant `type` or
    /// a `model_seq_id`, and its adapters have ':' in their names.
    pub fn of(headers: &HeaderMap, body: &[u8]) -> Self {
        let is_tinker =
            |name: &str| ["x-stainless-", "x-sdk-", "x-tinker-"].iter().any(|start| name.starts_with(start));
        let sent = [header::CONTENT_TYPE, header::ACCEPT].map(|name| headers.get(name));
        let is_protobuf =
            sent.into_iter().flatten().any(|kind| kind.to_str().is_ok_and(|kind| kind.contains("protobuf")));
        if is_protobuf || headers.keys().any(|name| is_tinker(name.as_str())) {
            return Self::Tinker;
        }
        let Ok(marks) = serde_json::from_slice::<Marks>(body) else { return Self::Xorl };
        let is_typed =
            marks.r#type.text().is_some_and(|kind| kind != "unload_model" && kind != "create_model");
        let is_session = marks.model_seq_id != Scalar::Null;
        let is_run = marks.model_id.text().is_some_and(|model| model.contains(':'));
        if is_typed || is_session || is_run { Self::Tinker } else { Self::Xorl }
    }
}

/// Bytes of a body without data, at most: JSON takes many times its bytes once it is read.
const LARGEST: usize = 1 << 20;

/// # Errors
/// A body without data is too large.
fn check_size(body: &[u8]) -> Result<(), Fault> {
    if body.len() <= LARGEST {
        return Ok(());
    }
    let detail = format!("body: {} bytes are more than the {LARGEST} that this call may have", body.len());
    Err(Fault::new(StatusCode::PAYLOAD_TOO_LARGE, detail))
}

/// A time as `2026-11-29T09:05:00Z`.
pub fn iso_time(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // A time that the calendar lacks is shown as its first second.
    Timestamp::from_second(seconds.cast_signed()).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};
    use std::time::Duration;

    #[test]
    fn the_sender_is_known_by_headers_or_body() {
        let of = |headers: &[(&'static str, &'static str)], body: &str| {
            let headers = headers
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            Wire::of(&headers.collect(), body.as_bytes())
        };
        for body in [
            r#"{"model_id": "default", "seq_id": 1}"#,
            r#"{"model_id": "default", "type": "unload_model"}"#,
            r#"{"batches": [], "session_id": "policy_v1"}"#,
            "",
            "{",
            "[1]",
        ] {
            assert_eq!(of(&[("content-type", "application/json")], body), Wire::Xorl, "{body}");
        }
        for header in [
            ("content-type", "application/x-protobuf"),
            ("accept", "application/x-protobuf, application/json"),
            ("x-stainless-lang", "python"),
        ] {
            assert_eq!(of(&[header], "{}"), Wire::Tinker);
        }
        for body in [
            r#"{"session_id": "s", "model_seq_id": 0}"#,
            r#"{"model_id": "s:train:0", "adam_params": {}}"#,
            r#"{"model_id": "a", "type": "optim_step"}"#,
        ] {
            assert_eq!(of(&[], body), Wire::Tinker, "{body}");
        }
    }

    #[test]
    fn a_time_is_that_of_the_calendar() {
        // Seconds as `date -u -d TIME +%s` prints them.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_764_403_500, "2025-11-29T08:05:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(iso_time(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
