//! Dispatch of this rank's tokens to their experts on all ranks, and combine of the results: rows are sorted by expert,
//! sent to the expert's rank, where each expert's rows are one slice, and summed by token on the way back.

use crate::{
    model::rows::RowAdapters,
    ops::{
        Buffer,
        cpu::values,
        dispatch::{Assignment, padded},
        linear::{self, RowSegments},
    },
    shard::{ExpertDispatcher, ExpertRoute, ShardError},
};
use tch::{Device, Tensor};

/// Routes of the tokens of one forward.
pub struct Dispatch {
    /// Rows of this rank's tokens for all experts.
    assignment: Assignment,
    /// Segments of an expert: one for each adapter of the pass.
    pattern: usize,
    /// The all-to-all that follows with expert parallelism.
    remote: Option<Remote>,
}

/// Rows from all ranks for the experts of this one.
struct Remote {
    route: ExpertRoute,
    segments: RowSegments,
}

impl Dispatch {
    /// Routes of the rows of x `[tokens, hidden]` by `chosen` `[tokens, k]` i64, indices below `experts`. Collective
    /// over the ranks of `dispatcher`.
    pub fn new(
        x: &Tensor,
        chosen: &Tensor,
        experts: usize,
        adapters: &RowAdapters,
        dispatcher: Option<&ExpertDispatcher>,
    ) -> Result<Self, ShardError> {
        let any_rows = linear::takes_any_rows(x);
        let (keys, pattern) = (adapters.keys(chosen), adapters.pattern());
        let count = experts * pattern.len();
        let Some(dispatcher) = dispatcher else {
            let assign = if any_rows { Assignment::new } else { Assignment::padded };
            return Ok(Self {
                assignment: assign(&keys, count, pattern),
                pattern: pattern.len(),
                remote: None,
            });
        };
        // Padding is not sent.
        let assignment = Assignment::new(&keys, count, pattern);
        let counts: Vec<i64> = values(&assignment.counts().to_device(Device::Cpu));
        let route = dispatcher.route(&counts, if any_rows { |count| count } else { padded })?;
        let segments = RowSegments::of_device(route.offsets(), pattern.clone(), x.device());
        Ok(Self { assignment, pattern: pattern.len(), remote: Some(Remote { route, segments }) })
    }

    /// Choices of each of all experts by this rank's tokens: `[experts]` i64.
    pub fn counts(&self) -> Tensor {
        self.assignment.counts().view([-1, self.pattern as i64]).sum_dim_intlist(1, false, None)
    }

    /// Segments of this rank's experts.
    pub fn segments(&self) -> &RowSegments {
        self.remote.as_ref().map_or_else(|| self.assignment.segments(), |remote| &remote.segments)
    }

    /// True if rows are sent between ranks.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Rows `[rows, n]` of this rank's experts, from x `[tokens, n]` of all ranks. Collective.
    pub fn gather(&self, x: &Tensor) -> Result<Buffer, ShardError> {
        let rows = self.assignment.gather(x);
        let Some(remote) = &self.remote else { return Ok(rows) };
        remote.dispatch(&rows)
    }

    /// Sums `[tokens, n]` of the experts' results `[rows, n]` by token, plus `add` `[tokens, n]`. Collective.
    pub fn combine(&self, rows: &Tensor, add: Option<&Tensor>) -> Result<Buffer, ShardError> {
        let Some(remote) = &self.remote else { return Ok(self.assignment.combine(rows, add)) };
        Ok(self.assignment.combine(&*remote.combine(rows, self.assignment.rows())?, add))
    }

    /// Values `[rows, 1]` of rows from those of choices `[tokens, k]`. Collective.
    pub fn by_row(&self, by_choice: &Tensor) -> Result<Tensor, ShardError> {
        let rows = self.assignment.by_row(by_choice);
        let Some(remote) = &self.remote else { return Ok(rows) };
        Ok(remote.dispatch(&rows)?.copy())
    }

    /// Values `[tokens, k]` of choices from those of rows `[rows, 1]`. Collective.
    pub fn by_choice(&self, by_row: &Tensor) -> Result<Tensor, ShardError> {
        let Some(remote) = &self.remote else { return Ok(self.assignment.by_choice(by_row)) };
        Ok(self.assignment.by_choice(&*remote.combine(by_row, self.assignment.rows())?))
    }
}

impl Remote {
    fn dispatch(&self, rows: &Tensor) -> Result<Buffer, ShardError> {
        let count = self.route.offsets().last().copied().unwrap_or(0);
        let arrived = Buffer::empty(&[count, rows.size()[1]], rows.kind(), rows.device());
        self.route.dispatch(rows, &arrived)?;
        Ok(arrived)
    }

    fn combine(&self, rows: &Tensor, count: i64) -> Result<Buffer, ShardError> {
        let arrived = Buffer::empty(&[count, rows.size()[1]], rows.kind(), rows.device());
        self.route.combine(rows, &arrived)?;
        Ok(arrived)
    }
}
