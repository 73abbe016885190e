//! The calls of a device's driver that training needs beside libtorch: streams, events and memory. One trait, so that
//! what orders them ([`CommStream`](super::CommStream)) can be tested by what it calls.

use super::DeviceError;
use std::{
    fmt::Debug,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// A stream, as the driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(pub usize);

/// libtorch's stream of every device: the legacy default stream. What is done there is ordered with nothing else but by
/// events, since streams of ours are non-blocking.
pub const COMPUTE: RawStream = RawStream(0);

/// An event, as the driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawEvent(pub usize);

/// Memory of a device (bytes), of all processes that use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub free: usize,
    pub total: usize,
}

impl Memory {
    pub const fn used(self) -> usize {
        self.total - self.free
    }
}

/// One device's streams, events and memory. Any thread may call it.
///
/// # Safety
/// Of what is `unsafe`: the handles come from this runtime and were not given back.
pub trait DeviceRuntime: Debug + Send + Sync {
    /// A new stream that does not wait for the legacy default stream by itself.
    fn create_stream(&self) -> Result<RawStream, DeviceError>;

    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn destroy_stream(&self, stream: RawStream);

    /// A new event; it counts as done until it is recorded.
    fn create_event(&self) -> Result<RawEvent, DeviceError>;

    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn destroy_event(&self, event: RawEvent);

    /// The event is done when all is done that `stream` was given so far.
    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError>;

    /// What `stream` is given from now on waits for the event.
    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError>;

    /// Whether the event is done; what went wrong on the device meanwhile is an error here.
    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError>;

    fn memory(&self) -> Result<Memory, DeviceError>;

    /// Makes the device the calling thread's, which libraries beside the driver go by.
    fn attach(&self) -> Result<(), DeviceError>;

    /// Host memory that stays in place, so that the device can read and write it by itself.
    fn lock_memory(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError>;

    #[expect(clippy::missing_safety_doc, reason = "said of the trait")]
    unsafe fn unlock_memory(&self, start: NonNull<u8>);
}

/// An event that is given back when nobody needs it.
#[derive(Debug)]
pub struct Event {
    raw: RawEvent,
    runtime: Arc<dyn DeviceRuntime>,
    /// Whether it was seen done: the driver is not asked again.
    done: AtomicBool,
}

impl Event {
    /// An event that is done when all is done that `stream` was given so far.
    ///
    /// # Safety
    /// `stream` comes from `runtime` and was not given back.
    pub(super) unsafe fn of(
        runtime: &Arc<dyn DeviceRuntime>,
        stream: RawStream,
    ) -> Result<Self, DeviceError> {
        let raw = runtime.create_event()?;
        let event = Self { raw, runtime: runtime.clone(), done: AtomicBool::new(false) };
        // SAFETY: the event was made here, the stream is the caller's word.
        unsafe { runtime.record(raw, stream)? };
        Ok(event)
    }

    /// What `stream` is given from now on waits for it.
    ///
    /// # Safety
    /// `stream` comes from the runtime of this event and was not given back.
    pub(super) unsafe fn before(&self, stream: RawStream) -> Result<(), DeviceError> {
        // SAFETY: the event lives as long as self, the stream is the caller's word.
        unsafe { self.runtime.wait(stream, self.raw) }
    }

    /// Whether it is done.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event lives as long as self.
        let done = self.done.load(Ordering::Acquire) || unsafe { self.runtime.is_done(self.raw)? };
        self.done.store(done, Ordering::Release);
        Ok(done)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it was made by this runtime and is given back once.
        unsafe { self.runtime.destroy_event(self.raw) }
    }
}
