//! Bodies of requests, read within limits of bytes and time, and unpacked.

use super::HttpLimits;
use crate::server::fault::Fault;
use axum::{
    body::{Body, Bytes, HttpBody},
    http::{HeaderMap, StatusCode, header},
};
use std::{future::poll_fn, io::Read, pin::Pin};

/// The largest window of a zstd frame, as a power of two.
const WINDOW_LOG: u32 = 26;

/// Reads and unpacks a body.
pub async fn read(headers: &HeaderMap, body: Body, limits: &HttpLimits) -> Result<Bytes, Fault> {
    let packing = headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?").trim());
    let is_packed = match packing {
        None | Some("" | "identity") => false,
        Some("zstd") => true,
        Some(other) => {
            let detail = format!("Content-Encoding {other}: send the body as it is or as zstd");
            return Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
    };
    let late = |_| {
        let detail = format!("the body did not come within {} s", limits.body_time.as_secs());
        Fault::new(StatusCode::REQUEST_TIMEOUT, detail)
    };
    let bytes = tokio::time::timeout(limits.body_time, collect(body, limits.body)).await.map_err(late)??;
    if !is_packed {
        return Ok(bytes.into());
    }
    let limit = limits.body;
    tokio::task::spawn_blocking(move || unpack(&bytes, limit).map(Bytes::from)).await.map_err(failed)?
}

fn too_large(limit: usize) -> Fault {
    let detail = format!("the body has more than {limit} bytes; send the data in several requests");
    Fault::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
}

/// The fault of a task that panicked.
pub fn failed(error: tokio::task::JoinError) -> Fault {
    tracing::error!("a request: {error}");
    Fault::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed at this request; its log says more")
}

/// Bytes beyond the limit that are read and dropped: a client that is cut off while it sends may not see the answer.
const DROPPED: usize = 256 << 20;

async fn collect(mut body: Body, limit: usize) -> Result<Vec<u8>, Fault> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let frame = frame.map_err(|error| Fault::user(format!("the body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= limit {
            bytes.extend_from_slice(&data);
        } else {
            bytes = Vec::new();
        }
        if length > limit + DROPPED {
            break;
        }
    }
    if length > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

/// Reads a body that nobody needs, so that its client sees the answer.
pub async fn discard(body: Body, limits: &HttpLimits) {
    let _ = tokio::time::timeout(limits.body_time, collect(body, 0)).await;
}

/// Unpacks zstd to `limit` bytes at most. Memory follows what comes out, not what the frame claims.
fn unpack(packed: &[u8], limit: usize) -> Result<Vec<u8>, Fault> {
    let broken = |error| Fault::user(format!("the body is not whole zstd: {error}"));
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(broken)?;
    decoder.window_log_max(WINDOW_LOG).map_err(broken)?;
    let mut bytes = Vec::new();
    decoder.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(broken)?;
    if bytes.len() > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bomb_is_refused_at_the_limit() {
        let bomb = zstd::encode_all(&vec![0; 50 << 20][..], 19).unwrap();
        assert!(bomb.len() < 10_000, "{}", bomb.len());
        assert_eq!(unpack(&bomb, 1 << 20).unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(unpack(&zstd::encode_all(&b"{}"[..], 0).unwrap(), 2).unwrap(), b"{}");
    }

    #[test]
    fn several_frames_are_one_body() {
        let frames = [&b"{\"a\""[..], b": 1}"].map(|part| zstd::encode_all(part, 1).unwrap()).concat();
        assert_eq!(unpack(&frames, 100).unwrap(), b"{\"a\": 1}");
    }

    proptest! {
        #[test]
        fn a_broken_body_is_a_fault_of_the_client(
            text in prop::collection::vec(any::<u8>(), 0..300),
            cut in 0usize..40,
            flips in prop::collection::vec((0usize..400, any::<u8>()), 0..4),
        ) {
            let mut packed = zstd::encode_all(&text[..], 3).unwrap();
            packed.truncate(packed.len() - cut.min(packed.len()));
            for (at, byte) in flips {
                if let Some(place) = packed.get_mut(at) {
                    *place = byte;
                }
            }
            for bytes in [packed, text] {
                if let Err(fault) = unpack(&bytes, 1000) {
                    prop_assert!(fault.status.is_client_error());
                }
            }
        }
    }
}
