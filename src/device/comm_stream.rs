//! A stream beside the one that libtorch computes on, and their order.
//!
//! libtorch stays on the legacy default stream. Work on a [`CommStream`] starts after all that was enqueued on
//! libtorch's stream before it. Later libtorch operations wait for it only after [`CommStream::join`]; until then
//! both overlap.

use super::{
    DeviceError,
    runtime::{COMPUTE, DeviceRuntime, Event, RawStream},
};
use std::sync::Arc;

/// A stream for communication.
#[derive(Debug)]
pub struct CommStream {
    stream: RawStream,
    runtime: Arc<dyn DeviceRuntime>,
}

impl CommStream {
    /// Creates the stream.
    ///
    /// # Errors
    /// The driver fails.
    pub fn new(runtime: &Arc<dyn DeviceRuntime>) -> Result<Self, DeviceError> {
        Ok(Self { stream: runtime.create_stream()?, runtime: runtime.clone() })
    }

    /// Enqueues `work` on the stream, after all that was enqueued on libtorch's stream. The event is done when the
    /// work is.
    ///
    /// # Errors
    /// `work` or the driver fails.
    pub fn run<E: From<DeviceError>>(
        &self,
        work: impl FnOnce(RawStream) -> Result<(), E>,
    ) -> Result<Event, E> {
        // SAFETY: `COMPUTE` is the legacy default stream, which always exists. `self.stream` was created by this
        // runtime and is destroyed only when self is dropped. All events belong to this runtime.
        unsafe {
            Event::of(&self.runtime, COMPUTE)?.before(self.stream)?;
            work(self.stream)?;
            Ok(Event::of(&self.runtime, self.stream)?)
        }
    }

    /// Makes later operations of libtorch wait for `event`.
    ///
    /// # Errors
    /// The driver fails.
    pub fn join(event: &Event) -> Result<(), DeviceError> {
        // SAFETY: `COMPUTE` is the legacy default stream, which always exists in every runtime.
        unsafe { event.before(COMPUTE) }
    }
}

impl Drop for CommStream {
    fn drop(&mut self) {
        // SAFETY: the stream was created by this runtime, and is destroyed here only.
        unsafe { self.runtime.destroy_stream(self.stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::runtime::{Memory, RawEvent};
    use std::{ptr::NonNull, sync::Mutex};

    /// A runtime that records its calls.
    #[derive(Debug, Default)]
    struct Recorder(Mutex<(usize, Vec<String>)>);

    impl Recorder {
        fn said(&self, what: String) -> usize {
            let mut guard = self.0.lock().unwrap();
            guard.0 += 1;
            guard.1.push(what);
            guard.0
        }

        fn taken(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap().1)
        }
    }

    impl DeviceRuntime for Recorder {
        fn create_stream(&self) -> Result<RawStream, DeviceError> {
            Ok(RawStream(self.said("stream".into())))
        }

        unsafe fn destroy_stream(&self, stream: RawStream) {
            self.said(format!("drop stream {}", stream.0));
        }

        fn create_event(&self) -> Result<RawEvent, DeviceError> {
            Ok(RawEvent(self.said("event".into())))
        }

        unsafe fn destroy_event(&self, event: RawEvent) {
            self.said(format!("drop event {}", event.0));
        }

        unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError> {
            self.said(format!("record {} on {}", event.0, stream.0));
            Ok(())
        }

        unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
            self.said(format!("{} waits for {}", stream.0, event.0));
            Ok(())
        }

        unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError> {
            self.said(format!("is {} done", event.0));
            Ok(true)
        }

        fn memory(&self) -> Result<Memory, DeviceError> {
            Ok(Memory { free: 1, total: 3 })
        }

        fn attach(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn lock_memory(&self, _bytes: usize) -> Result<NonNull<u8>, DeviceError> {
            Ok(NonNull::dangling())
        }

        unsafe fn unlock_memory(&self, _start: NonNull<u8>) {}
    }

    #[test]
    fn work_comes_after_earlier_computation_and_before_the_join() {
        let recorder = Arc::new(Recorder::default());
        let runtime: Arc<dyn DeviceRuntime> = recorder.clone();
        let stream = CommStream::new(&runtime).unwrap();
        assert_eq!(recorder.taken(), ["stream"]);
        let work = |stream: RawStream| {
            recorder.said(format!("work on {}", stream.0));
            Ok::<_, DeviceError>(())
        };
        let done = stream.run(work).unwrap();
        // Event 2 is recorded on libtorch's stream, event 7 on the communication stream.
        let expected = ["event", "record 2 on 0", "1 waits for 2", "drop event 2", "work on 1", "event"];
        assert_eq!(recorder.taken(), [&expected[..], &["record 7 on 1"]].concat());
        CommStream::join(&done).unwrap();
        assert!(done.is_done().unwrap() && done.is_done().unwrap());
        assert_eq!(recorder.taken(), ["0 waits for 7", "is 7 done"]);
        drop((done, stream));
        assert_eq!(recorder.taken(), ["drop event 7", "drop stream 1"]);
    }

    #[test]
    fn work_that_fails_leaves_no_event() {
        let recorder = Arc::new(Recorder::default());
        let runtime: Arc<dyn DeviceRuntime> = recorder.clone();
        let stream = CommStream::new(&runtime).unwrap();
        let failed = stream.run(|_| Err(DeviceError::Missing { what: "nothing", why: "a test".into() }));
        assert!(failed.is_err());
        assert_eq!(recorder.taken().last().map(String::as_str), Some("drop event 2"));
    }
}
