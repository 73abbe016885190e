//! Which rows a step takes and which of them a rank computes: pure. A step's rows are dealt in contiguous runs that
//! differ by at most one row, and every rank has the same number of micro-batches, because every rank enters every
//! collective.

use std::ops::Range;

/// Where a run stands in its data: the first row that has not been consumed. A checkpoint keeps it, so that a resume
/// goes on behind the last row even with another global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DataCursor {
    pub epoch: usize,
    /// Rows of the epoch that are consumed.
    pub row: usize,
}

/// How a run walks over its data, step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSchedule {
    /// Rows of an epoch.
    pub rows: usize,
    /// Rows of a step; 0 counts as 1.
    pub global_batch: usize,
    /// Leave out the last rows of an epoch when they do not fill a step.
    pub drop_last: bool,
    pub epochs: usize,
}

/// The rows of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRows {
    pub epoch: usize,
    /// Positions within the epoch.
    pub rows: Range<usize>,
    /// Where the next step starts.
    pub next: DataCursor,
}

impl StepRows {
    /// Whether the next step belongs to another epoch.
    pub fn ends_epoch(&self) -> bool {
        self.next.epoch > self.epoch
    }
}

impl BatchSchedule {
    /// Steps of a whole epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps_of(self.rows)
    }

    /// The step that starts at `at`; `None` at the end of the run.
    pub fn step(&self, at: DataCursor) -> Option<StepRows> {
        let DataCursor { epoch, row } = self.settled(at);
        if epoch >= self.epochs || self.steps_per_epoch() == 0 {
            return None;
        }
        let rows = row..row.saturating_add(self.global_batch.max(1)).min(self.rows);
        let next = self.settled(DataCursor { epoch, row: rows.end });
        Some(StepRows { epoch, rows, next })
    }

    /// Steps from `at` to the end of the run.
    pub fn steps_from(&self, at: DataCursor) -> usize {
        let at = self.settled(at);
        match self.epochs.checked_sub(at.epoch) {
            None | Some(0) => 0,
            Some(epochs) => {
                let whole = (epochs - 1).saturating_mul(self.steps_per_epoch());
                self.steps_of(self.rows - at.row).saturating_add(whole)
            }
        }
    }

    /// All steps from `at`, in order.
    pub fn step_rows(self, at: DataCursor) -> impl Iterator<Item = StepRows> + Send + use<> {
        std::iter::successors(self.step(at), move |step_rows| self.step(step_rows.next))
    }

    /// `at`, or the start of the next epoch where nothing is left of this one.
    fn settled(&self, at: DataCursor) -> DataCursor {
        if at.row == 0 || (at.row < self.rows && self.steps_of(self.rows - at.row) > 0) {
            return at;
        }
        DataCursor { epoch: at.epoch.saturating_add(1), row: 0 }
    }

    fn steps_of(&self, rows: usize) -> usize {
        let batch = self.global_batch.max(1);
        if self.drop_last { rows / batch } else { rows.div_ceil(batch) }
    }
}

/// The positions that `data_parallel_rank` computes, by micro-batch of at most `micro_batch_size` rows. Over all
/// ranks every position of `step_rows` is dealt exactly once. All ranks get the same number of micro-batches,
/// as many as the rank with most rows needs; the last ones of a rank may be smaller or empty.
/// The sizes must be positive; 0 counts as 1.
pub fn deal(
    step_rows: Range<usize>,
    data_parallel_rank: usize,
    data_parallel_size: usize,
    micro_batch_size: usize,
) -> Vec<Vec<usize>> {
    let (ranks, micro) = (data_parallel_size.max(1), micro_batch_size.max(1));
    let (share, extra) = (step_rows.len() / ranks, step_rows.len() % ranks);
    let before = data_parallel_rank * share + data_parallel_rank.min(extra);
    let mine = share + usize::from(data_parallel_rank < extra);
    let own: Vec<usize> = step_rows.clone().skip(before).take(mine).collect();
    let chunk = |index: usize| own.iter().copied().skip(index * micro).take(micro).collect();
    (0..micro_batches(step_rows.len(), ranks, micro)).map(chunk).collect()
}

/// Micro-batches of a step of `rows` rows, on every rank.
pub fn micro_batches(rows: usize, data_parallel_size: usize, micro_batch_size: usize) -> usize {
    rows.div_ceil(data_parallel_size.max(1)).div_ceil(micro_batch_size.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ten_rows_over_three_ranks_in_micro_batches_of_two() {
        assert_eq!(deal(20..30, 0, 3, 2), [vec![20, 21], vec![22, 23]]);
        assert_eq!(deal(20..30, 1, 3, 2), [vec![24, 25], vec![26]]);
        assert_eq!(deal(20..30, 2, 3, 2), [vec![27, 28], vec![29]]);
    }

    #[test]
    fn ranks_without_rows_have_empty_micro_batches() {
        assert_eq!(deal(0..1, 0, 3, 4), [vec![0]]);
        assert_eq!(deal(0..1, 2, 3, 4), [Vec::<usize>::new()]);
        assert!(deal(5..5, 0, 2, 1).is_empty());
    }

    fn schedule(rows: usize, global_batch: usize, drop_last: bool) -> BatchSchedule {
        BatchSchedule { rows, global_batch, drop_last, epochs: 2 }
    }

    fn rows_of(schedule: BatchSchedule, at: DataCursor) -> Vec<(usize, Range<usize>)> {
        schedule.step_rows(at).map(|step_rows| (step_rows.epoch, step_rows.rows)).collect()
    }

    #[test]
    fn the_last_step_is_smaller_or_dropped() {
        let start = DataCursor::default();
        assert_eq!(
            rows_of(schedule(10, 4, false), start),
            [(0, 0..4), (0, 4..8), (0, 8..10), (1, 0..4), (1, 4..8), (1, 8..10)]
        );
        assert_eq!(rows_of(schedule(10, 4, true), start), [(0, 0..4), (0, 4..8), (1, 0..4), (1, 4..8)]);
        assert_eq!((schedule(8, 4, false).steps_per_epoch(), schedule(3, 4, true).steps_per_epoch()), (2, 0));
        assert!(rows_of(schedule(3, 4, true), start).is_empty());
    }

    #[test]
    fn a_resume_with_another_batch_goes_on_behind_the_last_row() {
        let at = schedule(10, 4, false).step_rows(DataCursor::default()).nth(1).unwrap().next;
        assert_eq!(at, DataCursor { epoch: 0, row: 8 });
        assert_eq!(rows_of(schedule(10, 5, false), at), [(0, 8..10), (1, 0..5), (1, 5..10)]);
        assert_eq!(rows_of(schedule(10, 5, true), at), [(1, 0..5), (1, 5..10)]);
        assert_eq!(schedule(10, 5, true).steps_from(at), 2);
        // A position that no run of ours leaves ends the run or begins the next epoch; it never overflows.
        for row in [10, 11, usize::MAX] {
            assert_eq!(schedule(10, 5, true).step(DataCursor { epoch: 0, row }).unwrap().epoch, 1);
        }
        assert_eq!(schedule(10, 5, true).step(DataCursor { epoch: usize::MAX, row: 3 }), None);
    }

    proptest! {
        #[test]
        fn every_row_is_dealt_once_and_all_ranks_enter_as_often(
            start in 0usize..50, rows in 0usize..70, ranks in 1usize..9, micro in 1usize..6,
        ) {
            let dealt: Vec<_> = (0..ranks).map(|rank| deal(start..start + rows, rank, ranks, micro)).collect();
            for micro_batches in &dealt {
                prop_assert_eq!(micro_batches.len(), dealt[0].len());
                prop_assert!(micro_batches.iter().all(|positions| positions.len() <= micro));
            }
            let all: Vec<usize> = dealt.into_iter().flatten().flatten().collect();
            prop_assert_eq!(all, (start..start + rows).collect::<Vec<_>>());
        }

        #[test]
        fn steps_tile_the_epochs_from_wherever_a_run_stands(
            rows in 0usize..200, batch in 1usize..20, drop_last in any::<bool>(), cut in 0usize..30,
        ) {
            let schedule = schedule(rows, batch, drop_last);
            let all: Vec<StepRows> = schedule.step_rows(DataCursor::default()).collect();
            prop_assert_eq!(all.len(), schedule.steps_from(DataCursor::default()));
            prop_assert_eq!(all.len(), 2 * schedule.steps_per_epoch());
            let kept = if drop_last { rows / batch * batch } else { rows };
            let positions: Vec<_> = all.iter().flat_map(|s| s.rows.clone().map(|row| (s.epoch, row))).collect();
            prop_assert_eq!(positions, (0..2).flat_map(|e| (0..kept).map(move |row| (e, row))).collect::<Vec<_>>());
            if let Some(step_rows) = all.get(cut) {
                let rest: Vec<StepRows> = schedule.step_rows(step_rows.next).collect();
                prop_assert_eq!(&rest[..], &all[cut + 1..]);
                prop_assert_eq!(rest.len(), schedule.steps_from(step_rows.next));
                prop_assert_eq!(step_rows.ends_epoch(), (cut + 1).is_multiple_of(schedule.steps_per_epoch()));
            }
        }
    }
}
