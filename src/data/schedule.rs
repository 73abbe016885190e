//! Rows of each step, and of each rank in it: pure. Groups of a step's rows are dealt in contiguous runs that differ
//! by at most one group. Every rank has the same number of micro-batches, because every rank enters every collective.

use std::ops::Range;

/// Position of a run in its data: the first row that has not been consumed. A checkpoint keeps it, so that a resume
/// continues after the last row even with another global batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DataCursor {
    pub epoch: usize,
    /// Rows of the epoch that are consumed.
    pub row: usize,
}

/// Order in which a run takes its rows, step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSchedule {
    /// Rows of an epoch.
    pub rows: usize,
    /// Rows of a step, a multiple of [`BatchSplit::rows_per_group`]; 0 counts as 1.
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
    /// Start of the next step.
    pub next: DataCursor,
}

impl StepRows {
    /// True if the next step belongs to another epoch.
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

/// Positions that a rank computes, by micro-batch. All ranks get the same number of micro-batches, as many as the
/// rank with most rows needs; the last ones of a rank may be smaller or empty. Over all ranks every position of
/// `step_rows` is dealt exactly once.
pub fn deal(step_rows: Range<usize>, data_parallel_rank: usize, split: BatchSplit) -> Vec<Vec<usize>> {
    let (ranks, group) = (split.data_parallel_size.max(1), split.rows_per_group.max(1));
    let groups = step_rows.len().div_ceil(group);
    let (each, extra) = (groups / ranks, groups % ranks);
    let before = data_parallel_rank * each + data_parallel_rank.min(extra);
    let mine = each + usize::from(data_parallel_rank < extra);
    let row = |index: usize| step_rows.start.saturating_add(index.saturating_mul(group)).min(step_rows.end);
    let micro = split.groups_of_micro_batch();
    let micro_batch = |index: usize| {
        let first = before + index.saturating_mul(micro).min(mine);
        (row(first)..row(first.saturating_add(micro).min(before + mine))).collect()
    };
    (0..split.micro_batches(step_rows.len())).map(micro_batch).collect()
}

/// Division of a step's rows over ranks and micro-batches. Sizes are positive; 0 counts as 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSplit {
    pub data_parallel_size: usize,
    /// Most rows of a micro-batch. A group with more rows is a micro-batch of its own.
    pub micro_batch_size: usize,
    /// Adjacent rows that a loss needs together, such as the 2 of a preference pair. They go to one rank and one
    /// micro-batch. Groups are counted from the first row of the step; its last group may be shorter.
    pub rows_per_group: usize,
}

impl BatchSplit {
    /// Micro-batches of a step of `rows` rows, on every rank.
    pub fn micro_batches(&self, rows: usize) -> usize {
        let groups = rows.div_ceil(self.rows_per_group.max(1));
        groups.div_ceil(self.data_parallel_size.max(1)).div_ceil(self.groups_of_micro_batch())
    }

    fn groups_of_micro_batch(&self) -> usize {
        (self.micro_batch_size / self.rows_per_group.max(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(data_parallel_size: usize, micro_batch_size: usize, rows_per_group: usize) -> BatchSplit {
        BatchSplit { data_parallel_size, micro_batch_size, rows_per_group }
    }

    #[test]
    fn ten_rows_over_three_ranks_in_micro_batches_of_two() {
        let split = split(3, 2, 1);
        assert_eq!(deal(20..30, 0, split), [vec![20, 21], vec![22, 23]]);
        assert_eq!(deal(20..30, 1, split), [vec![24, 25], vec![26]]);
        assert_eq!(deal(20..30, 2, split), [vec![27, 28], vec![29]]);
    }

    #[test]
    fn ranks_without_rows_have_empty_micro_batches() {
        assert_eq!(deal(0..1, 0, split(3, 4, 1)), [vec![0]]);
        assert_eq!(deal(0..1, 2, split(3, 4, 1)), [Vec::<usize>::new()]);
        assert!(deal(5..5, 0, split(2, 1, 1)).is_empty());
        assert_eq!(deal(0..8, 1, split(2, usize::MAX, 1)), [vec![4, 5, 6, 7]]);
        assert!(deal(5..5, 0, split(2, 1, 2)).is_empty());
    }

    #[test]
    fn pairs_stay_together() {
        // Five pairs: three and two. A micro-batch of five rows holds two whole pairs.
        assert_eq!(deal(20..30, 0, split(2, 5, 2)), [vec![20, 21, 22, 23], vec![24, 25]]);
        assert_eq!(deal(20..30, 1, split(2, 5, 2)), [vec![26, 27, 28, 29], vec![]]);
        // A pair is no less than a micro-batch.
        assert_eq!(deal(4..8, 1, split(2, 1, 2)), [vec![6, 7]]);
        assert_eq!(split(2, 1, 2).micro_batches(8), 2);
        // The last group is short.
        assert_eq!(deal(0..5, 0, split(1, 4, 2)), [vec![0, 1, 2, 3], vec![4]]);
    }

    /// Rows one by one, as they were dealt before there were groups.
    fn deal_rows(rows: Range<usize>, rank: usize, ranks: usize, micro: usize) -> Vec<Vec<usize>> {
        let (each, extra) = (rows.len() / ranks, rows.len() % ranks);
        let before = rank * each + rank.min(extra);
        let own: Vec<usize> = rows.clone().skip(before).take(each + usize::from(rank < extra)).collect();
        let chunk = |index: usize| own.iter().copied().skip(index * micro).take(micro).collect();
        (0..rows.len().div_ceil(ranks).div_ceil(micro)).map(chunk).collect()
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
            start in 0usize..50, rows in 0usize..70, ranks in 1usize..9, micro in 1usize..6, group in 1usize..5,
        ) {
            let split = split(ranks, micro, group);
            let dealt: Vec<_> = (0..ranks).map(|rank| deal(start..start + rows, rank, split)).collect();
            for micro_batches in &dealt {
                prop_assert_eq!(micro_batches.len(), split.micro_batches(rows));
                prop_assert!(micro_batches.iter().all(|positions| positions.len() <= micro.max(group)));
                // A micro-batch begins where a group does.
                let first = micro_batches.iter().filter_map(|positions| positions.first());
                prop_assert!(first.into_iter().all(|first| (first - start).is_multiple_of(group)));
            }
            let all: Vec<usize> = dealt.into_iter().flatten().flatten().collect();
            prop_assert_eq!(all, (start..start + rows).collect::<Vec<_>>());
        }

        #[test]
        fn groups_of_one_are_dealt_as_rows(
            start in 0usize..50, rows in 0usize..70, ranks in 1usize..9, micro in 1usize..6,
        ) {
            for rank in 0..ranks {
                let ours = deal(start..start + rows, rank, split(ranks, micro, 1));
                prop_assert_eq!(ours, deal_rows(start..start + rows, rank, ranks, micro));
            }
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
