//! The driver calls that training needs beside libtorch: streams, events and memory. They are a trait, so that a test
//! can record the calls that order them ([`CommStream`](super::CommStream)).

use super::DeviceError;
use std::{
    fmt::Debug,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// The driver's handle of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(pub usize);

/// libtorch's stream of every device: the legacy default stream. Our streams are non-blocking, so only events order
/// work between it and them.
pub const COMPUTE: RawStream = RawStream(0);

/// The driver's handle of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawEvent(pub usize);

/// Memory of a device (bytes), for all processes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub free: usize,
    pub total: usize,
}

impl Memory {
    /// Bytes in use.
    pub const fn used(self) -> usize {
        self.total - self.free
    }
}

/// One device's streams, events and memory. Any thread may call it.
///
/// # Safety
/// Callers of unsafe functions pass handles that come from this runtime and are not destroyed.
pub trait DeviceRuntime: Debug + Send + Sync {
    /// Creates a non-blocking stream: it does not wait for the legacy default stream.
    fn create_stream(&self) -> Result<RawStream, DeviceError>;

    /// Destroys a stream. The driver finishes its work first.
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn destroy_stream(&self, stream: RawStream);

    /// Creates an event. It counts as done until it is recorded.
    fn create_event(&self) -> Result<RawEvent, DeviceError>;

    /// Destroys an event.
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn destroy_event(&self, event: RawEvent);

    /// Records `event` on `stream`: it is done when all work enqueued so far is.
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError>;

    /// Makes later work on `stream` wait for `event`.
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError>;

    /// Returns true if the event is done. Earlier errors of the device are returned here.
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError>;

    /// Free and total memory of the device.
    fn memory(&self) -> Result<Memory, DeviceError>;

    /// Makes this device current on the calling thread. NCCL and libtorch use the current device.
    fn attach(&self) -> Result<(), DeviceError>;

    /// Allocates `bytes` of page-locked host memory, which the device reads and writes directly.
    fn lock_memory(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError>;

    /// Frees memory of [`lock_memory`](Self::lock_memory).
    #[expect(clippy::missing_safety_doc, reason = "stated for the trait")]
    unsafe fn unlock_memory(&self, start: NonNull<u8>);
}

/// An event that is destroyed when it is dropped.
#[derive(Debug)]
pub struct Event {
    raw: RawEvent,
    runtime: Arc<dyn DeviceRuntime>,
    /// The event was done at an earlier query: the driver is not queried again.
    done: AtomicBool,
}

impl Event {
    /// Creates an event and records it on `stream`.
    ///
    /// # Safety
    /// `stream` comes from `runtime` and is not destroyed.
    pub(super) unsafe fn of(
        runtime: &Arc<dyn DeviceRuntime>,
        stream: RawStream,
    ) -> Result<Self, DeviceError> {
        let raw = runtime.create_event()?;
        let event = Self { raw, runtime: runtime.clone(), done: AtomicBool::new(false) };
        // SAFETY: the event was created by this runtime above. The caller promises the same of the stream.
        unsafe { runtime.record(raw, stream)? };
        Ok(event)
    }

    /// Makes later work on `stream` wait for this event.
    ///
    /// # Safety
    /// `stream` comes from the runtime of this event and is not destroyed.
    pub(super) unsafe fn before(&self, stream: RawStream) -> Result<(), DeviceError> {
        // SAFETY: the event is destroyed only when self is dropped. The caller promises that the stream is valid.
        unsafe { self.runtime.wait(stream, self.raw) }
    }

    /// Returns true if the event is done.
    ///
    /// # Errors
    /// The device has failed.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event was created by this runtime, and is destroyed only when self is dropped.
        let done = self.done.load(Ordering::Acquire) || unsafe { self.runtime.is_done(self.raw)? };
        self.done.store(done, Ordering::Release);
        Ok(done)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event was created by this runtime, and is destroyed here only.
        unsafe { self.runtime.destroy_event(self.raw) }
    }
}
