//! What the collectives of this rank have received, by operation and group; metrics print it.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// A collective that moves tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    AllGather,
    ReduceScatter,
    AllReduce,
}

impl Operation {
    pub const fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllReduce => "all_reduce",
        }
    }

    /// Bytes that a rank receives for a whole array of `bytes` over `ranks`: (N-1)/N of it, and twice that for
    /// an all-reduce, which is a reduce-scatter followed by an all-gather.
    pub const fn received(self, bytes: usize, ranks: usize) -> usize {
        match self {
            Operation::AllGather | Operation::ReduceScatter => bytes / ranks * (ranks - 1),
            Operation::AllReduce => 2 * bytes * (ranks - 1) / ranks,
        }
    }
}

/// Received bytes by operation and group.
pub type Received = BTreeMap<(Operation, String), u64>;

/// Received bytes of one rank; clones share the same book.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<Received>>);

impl Ledger {
    /// Enters one collective over a whole array of `bytes`.
    pub fn record(&self, operation: Operation, group: &str, bytes: usize, ranks: usize) {
        let received = operation.received(bytes, ranks) as u64;
        *self.0.borrow_mut().entry((operation, group.to_owned())).or_default() += received;
    }

    /// Everything received so far.
    pub fn totals(&self) -> Received {
        self.0.borrow().clone()
    }
}
