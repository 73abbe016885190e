//! The way of rows between the ranks of an expert group: to the rank that owns their expert, and back.
//!
//! Every rank of the group enters every exchange, also without rows.

use super::ShardError;
use crate::comm::{CommError, Communicator};
use std::{ops::Range, rc::Rc};
use tch::Tensor;

/// The ranks between which the experts of a layer are divided, the same number to each, in rank order.
#[derive(Clone)]
pub struct Exchange {
    comm: Rc<dyn Communicator>,
}

/// Whose rows go where, for one choice of experts.
pub struct Route {
    comm: Rc<dyn Communicator>,
    /// Rows that go to each rank.
    sent: Vec<usize>,
    /// Rows that come from each rank.
    received: Vec<usize>,
    /// Which of this rank's experts each row that comes is for, from 0: `[Σ received]`.
    experts: Vec<i64>,
}

impl Exchange {
    /// Between the ranks of `comm`; `None` for one that has all experts.
    pub fn over(comm: &Rc<dyn Communicator>) -> Option<Self> {
        (comm.size() > 1).then(|| Self { comm: comm.clone() })
    }

    /// How many of `experts` each rank has.
    pub fn share(&self, experts: usize) -> usize {
        experts / self.comm.size()
    }

    /// The route of rows that are sorted by expert, `counts` `[experts]` of each. Collective.
    pub fn route(&self, counts: &[i64]) -> Result<Route, ShardError> {
        let (rank, ranks) = (self.comm.rank(), self.comm.size());
        let mut table = Vec::with_capacity(ranks);
        for (from, bytes) in self.comm.all_gather_host(bytemuck::cast_slice(counts))?.iter().enumerate() {
            let theirs: Vec<i64> =
                bytes.as_chunks().0.iter().map(|&number| i64::from_ne_bytes(number)).collect();
            if theirs.len() != counts.len() || theirs.iter().any(|&count| count < 0) {
                let (actual, expected) = (bytes.len(), size_of_val(counts));
                return Err(ShardError::Counts { from, actual, expected });
            }
            table.push(theirs);
        }
        let each = self.share(counts.len());
        let of = |rank: usize| rank * each..(rank + 1) * each;
        let rows = |counts: &[i64], experts: Range<usize>| counts[experts].iter().sum::<i64>() as usize;
        let sent = (0..ranks).map(|to| rows(counts, of(to))).collect();
        let received = table.iter().map(|theirs| rows(theirs, of(rank))).collect();
        let mut experts = Vec::new();
        for theirs in &table {
            for (expert, &count) in theirs[of(rank)].iter().enumerate() {
                experts.extend(std::iter::repeat_n(expert as i64, count as usize));
            }
        }
        Ok(Route { comm: self.comm.clone(), sent, received, experts })
    }
}

impl Route {
    /// Which of this rank's experts each row that comes is for, from 0: `[received]`.
    pub fn experts(&self) -> &[i64] {
        &self.experts
    }

    /// Sends `rows` `[sent, n]`, sorted by expert, to their experts; `arrived` `[received, n]` are then those that are for
    /// this rank's, in the order of [`experts`](Self::experts). Collective.
    pub fn there(&self, rows: &Tensor, arrived: &Tensor) -> Result<(), CommError> {
        self.comm.all_to_all((rows, &self.sent), (arrived, &self.received))
    }

    /// The reverse of [`there`](Self::there): `arrived` `[sent, n]` are then what became of this rank's own rows.
    /// Collective.
    pub fn back(&self, rows: &Tensor, arrived: &Tensor) -> Result<(), CommError> {
        self.comm.all_to_all((rows, &self.received), (arrived, &self.sent))
    }
}
