//! Bodies of requests, read within limits of bytes and time, and unpacked. All of them, and the results that clients
//! are sent, share a bound on bytes: a body takes room as it arrives, and gives it back when its last reader drops it.

use super::HttpLimits;
use crate::server::fault::Fault;
use axum::{
    body::{Body, Bytes, HttpBody},
    http::{HeaderMap, StatusCode, header},
};
use std::{
    future::poll_fn,
    io::{Cursor, Read},
    pin::Pin,
    sync::Arc,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// The largest window of a zstd frame, as a power of two.
const WINDOW_LOG: u32 = 26;

/// Bytes beyond the limit that are read and dropped: a client that is cut off while it sends may not see the answer.
const DROPPED: usize = 256 << 20;

/// Bytes of a permit of the semaphore.
const UNIT: usize = 4096;

/// Bytes that are unpacked before room is taken for more.
const STEP: usize = 1 << 20;

/// Bodies within their limits, and those of all of them.
pub struct Bodies {
    limits: HttpLimits,
    /// Room for all bodies, in units.
    room: Arc<Semaphore>,
    units: usize,
}

/// Room that a body has taken.
struct Claim<'a> {
    bodies: &'a Bodies,
    permit: Option<OwnedSemaphorePermit>,
}

/// A body that was refused.
#[derive(Debug)]
pub struct Unread {
    pub fault: Fault,
    /// Its first bytes, unpacked, as far as they came.
    pub start: Vec<u8>,
}

impl From<Fault> for Unread {
    fn from(fault: Fault) -> Self {
        Self { fault, start: Vec::new() }
    }
}

/// Bytes of the start of a body that was refused, at most.
const START: usize = 4096;

fn unread(fault: Fault, mut bytes: Vec<u8>) -> Unread {
    bytes.truncate(START);
    bytes.shrink_to_fit();
    Unread { fault, start: bytes }
}

/// A body with its room.
struct Held {
    bytes: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Claim<'_> {
    /// Takes room for `bytes` in all; waits for it if others have it.
    async fn grow(&mut self, bytes: usize) -> Result<(), Fault> {
        let Bodies { limits, room, units } = self.bodies;
        let held = self.permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Some(missing) = bytes.div_ceil(UNIT).min(*units).checked_sub(held).filter(|&more| more > 0)
        else {
            return Ok(());
        };
        let more = u32::try_from(missing).unwrap_or(u32::MAX);
        match timeout(limits.room_time, room.clone().acquire_many_owned(more)).await {
            Ok(Ok(permit)) => {
                match &mut self.permit {
                    Some(held) => held.merge(permit),
                    none => *none = Some(permit),
                }
                Ok(())
            }
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => {
                let detail = "the server holds as many bytes of requests as it takes; send this one again";
                Err(Fault::new(StatusCode::SERVICE_UNAVAILABLE, detail))
            }
        }
    }

    fn hold(self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Held { bytes, _permit: self.permit })
    }
}

impl Bodies {
    pub fn new(limits: &HttpLimits) -> Self {
        // One body of the largest size, packed and unpacked, always finds room.
        let bytes = limits.bodies.max(2 * limits.body + STEP);
        let units = bytes.div_ceil(UNIT).min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        Self { limits: limits.clone(), room: Arc::new(Semaphore::new(units)), units }
    }

    fn claim(&self) -> Claim<'_> {
        Claim { bodies: self, permit: None }
    }

    /// Bytes of bodies that are held now, in whole units.
    pub fn bytes(&self) -> usize {
        (self.units - self.room.available_permits()) * UNIT
    }

    /// Reads and unpacks a body.
    ///
    /// # Errors
    /// It is too large, late or broken, its packing is not known, or others leave no room for it.
    pub async fn read(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, Unread> {
        let limits = &self.limits;
        let packing = headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?").trim());
        let is_packed = match packing {
            None | Some("" | "identity") => false,
            Some("zstd") => true,
            Some(other) => {
                let detail = format!("Content-Encoding {other}: send the body as it is or as zstd");
                return Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail).into());
            }
        };
        let late = |_| {
            let detail = format!("the body did not come within {} s", limits.body_time.as_secs());
            Fault::new(StatusCode::REQUEST_TIMEOUT, detail)
        };
        let bytes = timeout(limits.body_time, self.collect(body)).await.map_err(late)?;
        match (bytes, is_packed) {
            (Ok(bytes), true) => self.unpack(bytes).await,
            (Ok(bytes), false) => Ok(bytes),
            // The start of what is packed says nothing.
            (Err(Unread { fault, .. }), true) => Err(fault.into()),
            (Err(unread), false) => Err(unread),
        }
    }

    /// Bytes of a response, which take room until their client has them.
    ///
    /// # Errors
    /// Others leave no room for them.
    pub async fn hold(&self, bytes: Vec<u8>) -> Result<Bytes, Fault> {
        let mut claim = self.claim();
        claim.grow(bytes.len()).await?;
        Ok(claim.hold(bytes))
    }

    /// Reads a body that nobody needs, so that its client sees the answer.
    pub async fn discard(&self, body: Body) {
        let _ = timeout(self.limits.body_time, drop_rest(body)).await;
    }

    async fn collect(&self, mut body: Body) -> Result<Bytes, Unread> {
        let (mut claim, mut bytes) = (self.claim(), Vec::new());
        while let Some(data) = next_data(&mut body).await? {
            let length = bytes.len() + data.len();
            let refused = match length > self.limits.body {
                true => Err(too_large(self.limits.body)),
                false => claim.grow(length).await,
            };
            if let Err(fault) = refused {
                let refused = unread(fault, bytes);
                drop(claim);
                drop_rest(body).await;
                return Err(refused);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(claim.hold(bytes))
    }

    /// Unpacks zstd to the largest size of a body at most. Memory follows what comes out, not what a frame claims.
    async fn unpack(&self, packed: Bytes) -> Result<Bytes, Unread> {
        let (mut claim, mut unpacking) = (self.claim(), Unpacking::new(packed, self.limits.body)?);
        loop {
            claim.grow(unpacking.bytes.len() + STEP).await?;
            let step = tokio::task::spawn_blocking(move || {
                let is_whole = unpacking.step();
                (unpacking, is_whole)
            });
            let is_whole;
            (unpacking, is_whole) = step.await.map_err(failed)?;
            match is_whole {
                Ok(true) => return Ok(claim.hold(unpacking.bytes)),
                Ok(false) => {}
                Err(fault) => return Err(unread(fault, unpacking.bytes)),
            }
        }
    }
}

/// The next bytes of a body.
async fn next_data(body: &mut Body) -> Result<Option<Bytes>, Fault> {
    while let Some(frame) = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
        let frame = frame.map_err(|error| Fault::user(format!("the body could not be read: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

async fn drop_rest(mut body: Body) {
    let mut length = 0;
    while let Ok(Some(data)) = next_data(&mut body).await {
        length += data.len();
        if length > DROPPED {
            return;
        }
    }
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

/// A body that is being unpacked.
struct Unpacking {
    decoder: zstd::stream::read::Decoder<'static, Cursor<Bytes>>,
    bytes: Vec<u8>,
    limit: usize,
}

impl Unpacking {
    fn new(packed: Bytes, limit: usize) -> Result<Self, Fault> {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(Cursor::new(packed)).map_err(broken)?;
        decoder.window_log_max(WINDOW_LOG).map_err(broken)?;
        Ok(Self { decoder, bytes: Vec::new(), limit })
    }

    /// Unpacks some bytes more; true when that was all.
    fn step(&mut self) -> Result<bool, Fault> {
        let read = self.decoder.by_ref().take(STEP as u64).read_to_end(&mut self.bytes).map_err(broken)?;
        match self.bytes.len() > self.limit {
            true => Err(too_large(self.limit)),
            false => Ok(read < STEP),
        }
    }
}

fn broken(error: std::io::Error) -> Fault {
    Fault::user(format!("the body is not whole zstd: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Unpacks in the steps of [`Bodies::unpack`], without room.
    fn unpack(packed: &[u8], limit: usize) -> Result<Vec<u8>, Fault> {
        let mut unpacking = Unpacking::new(Bytes::copy_from_slice(packed), limit)?;
        while !unpacking.step()? {}
        Ok(unpacking.bytes)
    }

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
