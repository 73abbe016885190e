//! The way of requests to the engine's thread and back, and the state that other threads see.

use crate::{
    infer::request::{NewToken, SampleRequest},
    server::request::{
        Answer, Engine, EngineState, Listener, ModelState, Refusal, Request, SampleAnswer, SamplerState,
        SamplingState, Source, Ticket, Usage,
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
    Sample(Sample),
    /// End a request to sample, if it has not ended.
    Cancel(Ticket),
    /// End all requests to sample.
    EndSampling,
    /// No request follows.
    Stop,
}

/// A request with its answer. One that is dropped is refused: everybody who asks gets one answer.
pub(super) struct Asked {
    pub request: Request,
    answer: Option<Box<dyn FnOnce(Answer) + Send>>,
    counts: Arc<Counts>,
}

/// A request to sample.
pub(super) struct Sample {
    pub source: Source,
    pub request: SampleRequest,
    pub client: SampleClient,
}

/// The end of a request to sample that hears of it. One that is dropped hears a refusal.
pub(super) struct SampleClient {
    pub ticket: Ticket,
    listener: Option<Box<dyn Listener>>,
    counts: Arc<Counts>,
}

impl SampleClient {
    pub fn token(&mut self, token: &NewToken) {
        if let Some(listener) = &mut self.listener {
            listener.token(token);
        }
    }

    pub fn end(mut self, answer: SampleAnswer) {
        self.give(answer);
    }

    fn give(&mut self, answer: SampleAnswer) {
        if let Some(listener) = self.listener.take() {
            self.counts.answered();
            listener.end(answer);
        }
    }
}

impl Drop for SampleClient {
    fn drop(&mut self) {
        self.give(Err(Refusal::Stopping));
    }
}

#[derive(Default)]
struct Counts {
    waiting: AtomicUsize,
    answered: AtomicU64,
}

impl Counts {
    fn answered(&self) {
        self.waiting.fetch_sub(1, SeqCst);
        self.answered.fetch_add(1, SeqCst);
    }
}

impl Asked {
    pub fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        if let Some(give) = self.answer.take() {
            self.counts.answered();
            give(answer);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.give(Err(Refusal::Stopping));
    }
}

/// Takes requests to the engine from any thread.
pub struct EngineHandle {
    messages: Sender<Message>,
    counts: Arc<Counts>,
    max_waiting: usize,
    stopping: AtomicBool,
    /// Requests to sample end before the others.
    samples: AtomicBool,
    tickets: AtomicU64,
    state: Mutex<Shown>,
}

/// The part of the state that the engine's thread writes.
struct Shown {
    healthy: bool,
    adapters: Adapters,
    micro_batches: u64,
    peak_rss_bytes: Vec<u64>,
    sampling: SamplingState,
}

/// The adapters and samplers of an engine, and what they take.
#[derive(Default)]
pub(super) struct Adapters {
    pub models: BTreeMap<String, ModelState>,
    pub samplers: BTreeMap<String, SamplerState>,
    pub usage: Usage,
}

impl EngineHandle {
    /// A handle, and the end of the engine's thread.
    pub(super) fn new(max_waiting: usize) -> (Arc<Self>, Receiver<Message>) {
        // Bounded by the count of waiting requests. Unlike a bounded channel, it drops what is in it with its receiver.
        let (messages, received) = crossbeam::channel::unbounded();
        let shown = Shown {
            healthy: true,
            adapters: Adapters::default(),
            micro_batches: 0,
            peak_rss_bytes: Vec::new(),
            sampling: SamplingState::default(),
        };
        let handle = Self {
            messages,
            counts: Arc::default(),
            max_waiting,
            stopping: AtomicBool::new(false),
            samples: AtomicBool::new(true),
            tickets: AtomicU64::new(0),
            state: Mutex::new(shown),
        };
        (Arc::new(handle), received)
    }

    /// Shows the adapters as they are now.
    pub(super) fn show(&self, adapters: Adapters) {
        self.lock().adapters = adapters;
    }

    /// Shows what is being sampled.
    pub(super) fn sampled(&self, sampling: SamplingState) {
        self.lock().sampling = sampling;
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

    /// Counts one more request.
    ///
    /// # Errors
    /// As many wait as may.
    fn takes_one(&self) -> Result<(), Refusal> {
        let most = self.max_waiting;
        let is_full = self.counts.waiting.fetch_add(1, SeqCst) >= most;
        let full = || format!("{most} requests wait already, which is the limit; send this one again later");
        if is_full { Err(Refusal::Server(full())) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        // Every change is valid on its own, also after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for EngineHandle {
    fn submit(&self, request: Request, answer: Box<dyn FnOnce(Answer) + Send>) {
        let full = self.takes_one();
        let asked = Asked { request, answer: Some(answer), counts: self.counts.clone() };
        if let Err(full) = full {
            asked.answer(Err(full));
        } else if !self.stopping.load(SeqCst) {
            // A message that nobody takes is dropped, and its request refused.
            let _ = self.messages.send(Message::Asked(asked));
        }
    }

    fn sample(&self, source: Source, request: SampleRequest, listener: Box<dyn Listener>) -> Ticket {
        let full = self.takes_one();
        let ticket = Ticket(self.tickets.fetch_add(1, SeqCst));
        let client = SampleClient { ticket, listener: Some(listener), counts: self.counts.clone() };
        if let Err(full) = full {
            client.end(Err(full));
        } else if self.samples.load(SeqCst) && !self.stopping.load(SeqCst) {
            let _ = self.messages.send(Message::Sample(Sample { source, request, client }));
        }
        ticket
    }

    fn cancel(&self, ticket: Ticket) {
        let _ = self.messages.send(Message::Cancel(ticket));
    }

    fn end_sampling(&self) {
        self.samples.store(false, SeqCst);
        let _ = self.messages.send(Message::EndSampling);
    }

    fn state(&self) -> EngineState {
        let shown = self.lock();
        EngineState {
            healthy: shown.healthy,
            waiting: self.counts.waiting.load(SeqCst),
            answered: self.counts.answered.load(SeqCst),
            models: shown.adapters.models.clone(),
            micro_batches: shown.micro_batches,
            peak_rss_bytes: shown.peak_rss_bytes.clone(),
            usage: shown.adapters.usage.clone(),
            samplers: shown.adapters.samplers.clone(),
            sampling: shown.sampling.clone(),
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
    use crate::{
        infer::request::{Choice, PromptScores, SampleReply, Stop, Wanted},
        server::request::{ModelId, Reply, Task},
    };
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

    fn sample(handle: &EngineHandle) -> (Ticket, mpsc::Receiver<SampleAnswer>) {
        let (send, answer) = mpsc::channel();
        let request = SampleRequest {
            prompt: vec![1],
            count: 1,
            max_new_tokens: 1,
            choice: Choice { temperature: 1.0, top_p: 1.0, top_k: None },
            seed: 0,
            stop: Stop::default(),
            wanted: Wanted::default(),
        };
        let listener = move |answer: SampleAnswer| send.send(answer).unwrap();
        (handle.sample(Source::Base, request, Box::new(listener)), answer)
    }

    #[test]
    fn every_request_to_sample_has_one_end() {
        let (handle, messages) = EngineHandle::new(3);
        let said =
            |answer: &mpsc::Receiver<SampleAnswer>| answer.try_recv().unwrap().unwrap_err().to_string();
        let [first, second, third, fourth] = [0; 4].map(|_| sample(&handle));
        assert!(said(&fourth.1).starts_with("3 requests wait already"));
        let Message::Sample(Sample { client, .. }) = messages.recv().unwrap() else { panic!("a request") };
        assert_eq!(client.ticket, first.0);
        client.end(Ok(SampleReply { continuations: Vec::new(), prompt: PromptScores::default() }));
        assert!(first.1.try_recv().unwrap().is_ok());
        handle.end_sampling();
        assert!(said(&sample(&handle).1).contains("the server is stopping"));
        drop((handle.clone(), messages));
        for (_, answer) in [second, third] {
            assert!(said(&answer).contains("the server is stopping"));
        }
        assert_eq!((handle.state().waiting, handle.state().answered), (0, 5));
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
