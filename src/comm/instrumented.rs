//! A communicator that records its collectives: received bytes in the ledger, times in the trace, progress in the
//! control mesh. It is the only place that does, for all backends.
//!
//! An all-gather counts its received bytes in full, also where ranks share the memory and nothing is sent.
//!
//! In a trace, `bytes` are those of the ledger: host collectives have none. An all-gather is a transfer from its
//! start to the end of its wait; the wait is a span of its own.

use super::{
    CommError, Communicator, Completion, Ledger, Operation, Parts, Pending, Reduce, SharedMemory, bytes,
    control::{GroupWatch, Within},
};
use crate::trace::{self, Category, Span, Transfer};
use tch::Tensor;

pub(super) struct Instrumented<C> {
    pub inner: C,
    pub ledger: Ledger,
    pub watch: GroupWatch,
}

impl<C: Communicator> Instrumented<C> {
    fn span(&self, name: &'static str) -> Span {
        trace::span(Category::Collective, name).with("group", self.group())
    }

    /// Span and guard of a collective of host values.
    fn host(&self, name: &'static str) -> (Span, Within) {
        (self.span(name), self.watch.enter(name))
    }

    /// Bytes that this rank receives for a complete array of `bytes`.
    fn received(&self, operation: Operation, bytes: usize) -> usize {
        operation.received(bytes, self.size())
    }

    /// Runs and records a blocking collective over a complete array of `bytes`.
    fn record(
        &self,
        operation: Operation,
        bytes: usize,
        collective: impl FnOnce() -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let _span = self.span(operation.name()).with("bytes", self.received(operation, bytes));
        let _within = self.watch.enter(operation.name());
        collective()?;
        self.ledger.record(operation, self.group(), self.received(operation, bytes));
        Ok(())
    }
}

/// A started all-gather, traced until the end of its wait.
struct Started {
    pending: Pending,
    group: String,
    watch: GroupWatch,
    _transfer: Option<Transfer>,
}

impl Completion for Started {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        let Self { pending, group, watch, _transfer } = *self;
        let _waiting = trace::span(Category::Collective, "all_gather.wait").with("group", group);
        let _within = watch.wait();
        pending.wait()
    }
}

impl<C: Communicator> Communicator for Instrumented<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn group(&self) -> &str {
        self.inner.group()
    }

    fn open(&self) -> Result<(), CommError> {
        self.inner.open()
    }

    fn share(&self, bytes: usize) -> Result<Option<SharedMemory>, CommError> {
        let _host = self.host("share");
        self.inner.share(bytes)
    }

    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError> {
        let _starting = self.span("all_gather.start");
        let whole = bytes(output);
        let operation = Operation::AllGather;
        let _transfer = trace::transfer(operation.name(), self.group(), self.received(operation, whole));
        self.watch.start(operation.name());
        let pending = self.inner.start_all_gather(input, output)?;
        self.ledger.record(operation, self.group(), self.received(operation, whole));
        let (group, watch) = (self.group().to_owned(), self.watch.clone());
        Ok(Pending::new(Started { pending, group, watch, _transfer }))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        self.record(Operation::ReduceScatter, bytes(input), || self.inner.reduce_scatter(input, output))
    }

    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError> {
        let bytes = received.bytes_of_others(self.rank());
        self.record(Operation::AllToAll, bytes, || self.inner.all_to_all(sent, received))
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        self.record(Operation::AllReduce, bytes(values), || self.inner.all_reduce(values))
    }

    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
        let _host = self.host("all_reduce_host");
        self.inner.all_reduce_host(values, how)
    }

    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let _host = self.host("all_gather_host");
        self.inner.all_gather_host(bytes)
    }

    fn barrier(&self) -> Result<(), CommError> {
        let _host = self.host("barrier");
        self.inner.barrier()
    }
}
