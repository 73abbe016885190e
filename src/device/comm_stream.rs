//! A stream beside the one that libtorch computes on, and how the two are ordered.
//!
//! libtorch stays on the legacy default stream. What is given to a stream comes after all that libtorch was given before; and
//! libtorch's next operation comes after it only where [`CommStream::join`] says so. Between the two, both go on at once.

use super::{
    DeviceError,
    runtime::{COMPUTE, DeviceRuntime, Event, RawStream},
};
use std::sync::Arc;

/// A stream for what is not libtorch's.
#[derive(Debug)]
pub struct CommStream {
    stream: RawStream,
    runtime: Arc<dyn DeviceRuntime>,
}

impl CommStream {
    pub fn new(runtime: &Arc<dyn DeviceRuntime>) -> Result<Self, DeviceError> {
        Ok(Self { stream: runtime.create_stream()?, runtime: runtime.clone() })
    }

    /// Gives the stream `work`, which is told the stream: it begins when all is done that libtorch was given so far, and the
    /// event is done when it is.
    pub fn run<E: From<DeviceError>>(
        &self,
        work: impl FnOnce(RawStream) -> Result<(), E>,
    ) -> Result<Event, E> {
        // SAFETY: libtorch's stream always exists; ours as long as self.
        unsafe {
            Event::of(&self.runtime, COMPUTE)?.before(self.stream)?;
            work(self.stream)?;
            Ok(Event::of(&self.runtime, self.stream)?)
        }
    }

    /// What libtorch is given from now on begins when `event` is done.
    pub fn join(event: &Event) -> Result<(), DeviceError> {
        // SAFETY: libtorch's stream always exists.
        unsafe { event.before(COMPUTE) }
    }
}

impl Drop for CommStream {
    fn drop(&mut self) {
        // SAFETY: it was made by this runtime and is given back once.
        unsafe { self.runtime.destroy_stream(self.stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::runtime::{Memory, RawEvent};
    use std::{ptr::NonNull, sync::Mutex};

    /// Remembers what it is called for.
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
    fn work_comes_after_what_was_computed_and_before_what_joins() {
        let recorder = Arc::new(Recorder::default());
        let runtime: Arc<dyn DeviceRuntime> = recorder.clone();
        let stream = CommStream::new(&runtime).unwrap();
        assert_eq!(recorder.taken(), ["stream"]);
        let work = |stream: RawStream| {
            recorder.said(format!("work on {}", stream.0));
            Ok::<_, DeviceError>(())
        };
        let done = stream.run(work).unwrap();
        // Event 2 is of libtorch's stream, event 7 of ours.
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
