//! Dispatch and combine between the ranks of an expert group: rows go to the rank that owns their expert, results come
//! back. Every rank of the group enters every exchange, also without rows.

use super::ShardError;
use crate::comm::{CommError, Communicator, Parts};
use std::{ops::Range, rc::Rc};
use tch::Tensor;

/// The ranks between which the experts of a layer are divided, the same number to each, in rank order.
#[derive(Clone)]
pub struct ExpertDispatcher {
    comm: Rc<dyn Communicator>,
}

/// Dispatch and combine for one choice of experts.
pub struct ExpertRoute {
    comm: Rc<dyn Communicator>,
    places: RoutePlan,
}

/// Ranges of rows that one rank sends and receives. The rows of an expert are contiguous at both ends: sorted by
/// expert at the sender, by expert and then by rank at the receiver.
struct RoutePlan {
    /// For each rank the rows that go to each of its experts.
    sent: Vec<Vec<Range<usize>>>,
    /// For each rank the rows that come from it, to each of this one's experts.
    received: Vec<Vec<Range<usize>>>,
    /// Offsets of the rows of this rank's experts: `[experts + 1]`.
    offsets: Vec<i64>,
    /// Rows that fill up an expert's segment; they are zero.
    gaps: Vec<Range<usize>>,
}

impl ExpertDispatcher {
    /// Dispatcher between the ranks of `comm`; `None` for a group of one, which has all experts.
    pub fn over(comm: &Rc<dyn Communicator>) -> Option<Self> {
        (comm.size() > 1).then(|| Self { comm: comm.clone() })
    }

    /// Route of rows that are sorted by expert, `counts` `[experts]` of each. At the receiver an expert has
    /// `rows(count)` rows for the `count` that arrive. Collective.
    pub fn route(&self, counts: &[i64], rows: fn(i64) -> i64) -> Result<ExpertRoute, ShardError> {
        let mut table = Vec::with_capacity(self.comm.size());
        for (from, bytes) in self.comm.all_gather_host(bytemuck::cast_slice(counts))?.iter().enumerate() {
            let theirs: Vec<i64> =
                bytes.as_chunks().0.iter().map(|&number| i64::from_ne_bytes(number)).collect();
            if theirs.len() != counts.len() || theirs.iter().any(|&count| count < 0) {
                let (actual, expected) = (bytes.len(), size_of_val(counts));
                return Err(ShardError::Counts { from, actual, expected });
            }
            table.push(theirs);
        }
        let places = RoutePlan::new(self.comm.rank(), &table, rows);
        Ok(ExpertRoute { comm: self.comm.clone(), places })
    }
}

impl RoutePlan {
    /// Plan of `rank` from `table` `[ranks][experts]`, the rows that each rank has for each expert.
    fn new(rank: usize, table: &[Vec<i64>], rows: fn(i64) -> i64) -> Self {
        let ranks = table.len();
        let each = table[rank].len() / ranks;
        let mut at = 0;
        let mut next = |count: i64| {
            let start = at;
            at += count as usize;
            start..at
        };
        let sent = table[rank].chunks(each).map(|counts| counts.iter().map(|&n| next(n)).collect()).collect();
        let (mut received, mut offsets, mut gaps) =
            (vec![Vec::with_capacity(each); ranks], vec![0], Vec::new());
        let mut start = 0;
        for expert in rank * each..(rank + 1) * each {
            let mut end = start;
            for (theirs, pieces) in table.iter().zip(&mut received) {
                let count = theirs[expert] as usize;
                pieces.push(end..end + count);
                end += count;
            }
            let filled = start + rows((end - start) as i64) as usize;
            gaps.push(end..filled);
            offsets.push(filled as i64);
            start = filled;
        }
        gaps.retain(|gap| !gap.is_empty());
        Self { sent, received, offsets, gaps }
    }
}

impl ExpertRoute {
    /// Offsets of the rows of this rank's experts: `[experts + 1]`.
    pub fn offsets(&self) -> &[i64] {
        &self.places.offsets
    }

    /// Sends `rows` `[sent, n]`, sorted by expert, to their experts. `arrived` `[received, n]` gets the rows for this
    /// rank's experts, by expert and then by rank, and zeros where an expert's segment is filled up. Collective.
    pub fn dispatch(&self, rows: &Tensor, arrived: &Tensor) -> Result<(), CommError> {
        for gap in &self.places.gaps {
            let _ = arrived.narrow(0, gap.start as i64, gap.len() as i64).zero_();
        }
        self.comm.all_to_all(self.own(rows), self.of_experts(arrived))
    }

    /// Reverse of [`dispatch`](Self::dispatch): `arrived` `[sent, n]` gets the results of this rank's own rows.
    /// Collective.
    pub fn combine(&self, rows: &Tensor, arrived: &Tensor) -> Result<(), CommError> {
        self.comm.all_to_all(self.of_experts(rows), self.own(arrived))
    }

    fn own<'a>(&'a self, rows: &'a Tensor) -> Parts<'a> {
        Parts { rows, pieces: &self.places.sent }
    }

    fn of_experts<'a>(&'a self, rows: &'a Tensor) -> Parts<'a> {
        Parts { rows, pieces: &self.places.received }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::World;
    use tch::{Device, Kind};

    fn fours(count: i64) -> i64 {
        (count as u64).next_multiple_of(4) as i64
    }

    #[test]
    fn rows_of_an_expert_lie_together() {
        // Two ranks, three experts each.
        let table = [vec![2, 0, 5, 1, 1, 0], vec![3, 0, 4, 0, 2, 7]];
        let [first, second] = [0, 1].map(|rank| RoutePlan::new(rank, &table, fours));
        assert_eq!(first.sent, [[0..2, 2..2, 2..7], [7..8, 8..9, 9..9]]);
        assert_eq!(second.sent, [[0..3, 3..3, 3..7], [7..7, 7..9, 9..16]]);
        assert_eq!(first.received, [[0..2, 8..8, 8..13], [2..5, 8..8, 13..17]]);
        assert_eq!((&first.offsets[..], &first.gaps[..]), (&[0, 8, 8, 20][..], &[5..8, 17..20][..]));
        assert_eq!(second.received, [[0..1, 4..5, 8..8], [1..1, 5..7, 8..15]]);
        assert_eq!((&second.offsets[..], &second.gaps[..]), (&[0, 4, 8, 16][..], &[1..4, 7..8, 15..16][..]));
        let exact = RoutePlan::new(0, &table, |count| count);
        assert_eq!((&exact.offsets[..], exact.gaps.len()), (&[0, 5, 5, 14][..], 0));
    }

    #[test]
    fn nobodys_rows_are_zeros() {
        let comm = World::start().unwrap().group("expert", 0);
        let route = ExpertRoute { comm, places: RoutePlan::new(0, &[vec![2, 0, 5]], fours) };
        let rows = Tensor::arange_start(1, 8, (Kind::Float, Device::Cpu)).view([7, 1]);
        let arrived = Tensor::full([12, 1], f64::NAN, (Kind::Float, Device::Cpu));
        route.dispatch(&rows, &arrived).unwrap();
        let expected = [1.0f32, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0, 0.0, 0.0];
        assert_eq!(arrived.view([-1]), Tensor::from_slice(&expected));
        let back = rows.zeros_like();
        route.combine(&arrived, &back).unwrap();
        assert_eq!(back, rows);
    }
}
