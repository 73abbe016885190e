//! The way of requests to the engine's thread and back, and the state that other threads see.

use crate::{
    infer::request::SampleRequest,
    server::request::{
        Answer, Engine, EngineState, Listener, ModelState, Refusal, Request, SamplingState, Source, Ticket,
        Usage,
    },
};
use crossbeam::channel::{Receiver, Sender};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

/// Input of the engine's thread.
pub(super) enum Message {
    Asked(Asked),
    /// No request follows.
    Stop,
}

/// A request with its answer. One that is dropped is refused: everybody who asks gets one answer.
pub(super) struct Asked {
    pub request: Request,
    answer: Option<Box<dyn FnOnce(Answer) + Send>>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    waiting: AtomicUsize,
    answered: AtomicU64,
}

impl Asked {
    pub fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        if let Some(give) = self.answer.take() {
            self.counts.waiting.fetch_sub(1, SeqCst);
            self.counts.answered.fetch_add(1, SeqCst);
            give(answer);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.give(Err(Refusal::Server("the server is stopping; the request was not carried out".into())));
    }
}

/// Takes requests to the engine from any thread.
pub struct EngineHandle {
    messages: Sender<Message>,
    counts: Arc<Counts>,
    max_waiting: usize,
    stopping: AtomicBool,
    state: Mutex<Shown>,
}

/// The part of the state that the engine's thread writes.
struct Shown {
    healthy: bool,
    models: BTreeMap<String, ModelState>,
    micro_batches: u64,
    peak_rss_bytes: Vec<u64>,
    usage: Usage,
}

impl EngineHandle {
    /// A handle, and the end of the engine's thread.
    pub(super) fn new(max_waiting: usize) -> (Arc<Self>, Receiver<Message>) {
        // Bounded by the count of waiting requests. Unlike a bounded channel, it drops what is in it with its receiver.
        let (messages, received) = crossbeam::channel::unbounded();
        let shown = Shown {
            healthy: true,
            models: BTreeMap::new(),
            micro_batches: 0,
            peak_rss_bytes: Vec::new(),
            usage: Usage::default(),
        };
        let handle = Self {
            messages,
            counts: Arc::default(),
            max_waiting,
            stopping: AtomicBool::new(false),
            state: Mutex::new(shown),
        };
        (Arc::new(handle), received)
    }

    /// Shows the adapters as they are now.
    pub(super) fn show(&self, models: BTreeMap<String, ModelState>, usage: Usage) {
        let mut shown = self.lock();
        (shown.models, shown.usage) = (models, usage);
    }

    /// Shows that a micro-batch was computed. `peak_rss_bytes`: the largest resident memory of each rank so far.
    pub(super) fn computed(&self, peak_rss_bytes: Vec<u64>) {
        let mut shown = self.lock();
        shown.micro_batches += 1;
        shown.peak_rss_bytes = peak_rss_bytes;
    }

    /// Shows that a rank has failed.
    pub(super) fn fail(&self) {
        self.stopping.store(true, SeqCst);
        self.lock().healthy = false;
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        // Every change is valid on its own, also after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for EngineHandle {
    fn submit(&self, request: Request, answer: Box<dyn FnOnce(Answer) + Send>) {
        let before = self.counts.waiting.fetch_add(1, SeqCst);
        let asked = Asked { request, answer: Some(answer), counts: self.counts.clone() };
        if before >= self.max_waiting {
            let most = self.max_waiting;
            let full = format!("{most} requests wait already, which is the limit; send this one again later");
            asked.answer(Err(Refusal::Server(full)));
        } else if !self.stopping.load(SeqCst) {
            // A message that nobody takes is dropped, and its request refused.
            let _ = self.messages.send(Message::Asked(asked));
        }
    }

    fn sample(&self, _source: Source, _request: SampleRequest, listener: Box<dyn Listener>) -> Ticket {
        listener.end(Err(Refusal::Server("not built".into())));
        Ticket(0)
    }

    fn cancel(&self, _ticket: Ticket) {}

    fn state(&self) -> EngineState {
        let shown = self.lock();
        EngineState {
            healthy: shown.healthy,
            waiting: self.counts.waiting.load(SeqCst),
            answered: self.counts.answered.load(SeqCst),
            models: shown.models.clone(),
            micro_batches: shown.micro_batches,
            peak_rss_bytes: shown.peak_rss_bytes.clone(),
            usage: shown.usage.clone(),
            samplers: BTreeMap::new(),
            sampling: SamplingState::default(),
        }
    }
}

/// Stops the engine when it is dropped, also by a panic.
pub(super) struct StopOnDrop(pub Arc<EngineHandle>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stopping.store(true, SeqCst);
        // An engine that has ended needs no message.
        let _ = self.0.messages.send(Message::Stop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::request::{ModelId, Reply, Task};
    use std::sync::mpsc;

    fn ask(handle: &EngineHandle) -> mpsc::Receiver<Answer> {
        let (send, answer) = mpsc::channel();
        let request = Request { model: ModelId::new("a").unwrap(), task: Task::Unload };
        handle.submit(request, Box::new(move |answer| send.send(answer).unwrap()));
        answer
    }

    fn refusal(answer: &mpsc::Receiver<Answer>) -> String {
        answer.try_recv().unwrap().unwrap_err().to_string()
    }

    #[test]
    fn every_request_gets_one_answer() {
        let (handle, messages) = EngineHandle::new(2);
        let (first, second, third) = (ask(&handle), ask(&handle), ask(&handle));
        assert!(refusal(&third).starts_with("2 requests wait already"));
        assert_eq!((handle.state().waiting, handle.state().answered), (2, 1));
        let Message::Asked(asked) = messages.recv().unwrap() else { panic!("a request") };
        asked.answer(Ok(Reply::Unloaded));
        assert_eq!(first.try_recv().unwrap(), Ok(Reply::Unloaded));
        drop(StopOnDrop(handle.clone()));
        assert!(refusal(&ask(&handle)).contains("the server is stopping"));
        drop(messages);
        assert!(refusal(&second).contains("not carried out"));
        assert_eq!((handle.state().waiting, handle.state().answered), (0, 4));
    }
}
