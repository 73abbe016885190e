//! Bytes received by the collectives of this rank, by operation and group. Metrics report them.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// A collective that moves tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    AllGather,
    ReduceScatter,
    AllReduce,
    AllToAll,
}

impl Operation {
    /// Name in metrics, errors and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllReduce => "all_reduce",
            Operation::AllToAll => "all_to_all",
        }
    }

    /// Bytes that a rank receives for a complete array of `bytes` over N ranks: (N-1)/N of it, and twice that for an
    /// all-reduce (a reduce-scatter and an all-gather). The array of an all-to-all is the bytes from the other ranks.
    pub const fn received(self, bytes: usize, ranks: usize) -> usize {
        match self {
            Operation::AllGather | Operation::ReduceScatter => bytes / ranks * (ranks - 1),
            Operation::AllReduce => 2 * bytes * (ranks - 1) / ranks,
            Operation::AllToAll => bytes,
        }
    }
}

/// Received bytes by operation and group.
pub type Received = BTreeMap<(Operation, String), u64>;

/// Received bytes of one rank. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<Received>>);

impl Ledger {
    /// Adds a collective in which this rank has received `received` bytes.
    pub fn record(&self, operation: Operation, group: &str, received: usize) {
        *self.0.borrow_mut().entry((operation, group.to_owned())).or_default() += received as u64;
    }

    /// Bytes received so far.
    pub fn totals(&self) -> Received {
        self.0.borrow().clone()
    }
}
