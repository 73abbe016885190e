//! Which rows of a step a rank computes: pure. A step's rows are dealt in contiguous runs that differ by at most
//! one row, and every rank has the same number of micro-batches, because every rank enters every collective.

use std::ops::Range;

/// Steps of one epoch: `rows / global_batch`, rounded down if `drop_last`, otherwise up.
/// `global_batch` must be positive; 0 counts as 1.
pub fn steps_per_epoch(rows: usize, global_batch: usize, drop_last: bool) -> usize {
    let global_batch = global_batch.max(1);
    if drop_last { rows / global_batch } else { rows.div_ceil(global_batch) }
}

/// Positions within the epoch that its step number `step` (from 0) takes; the last step may be smaller.
pub fn step_positions(step: usize, rows: usize, global_batch: usize) -> Range<usize> {
    let start = step.saturating_mul(global_batch).min(rows);
    start..start.saturating_add(global_batch).min(rows)
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
    let micro_batches = step_rows.len().div_ceil(ranks).div_ceil(micro);
    let chunk = |index: usize| own.iter().copied().skip(index * micro).take(micro).collect();
    (0..micro_batches).map(chunk).collect()
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

    #[test]
    fn the_last_step_is_smaller_or_dropped() {
        assert_eq!((steps_per_epoch(10, 4, false), steps_per_epoch(10, 4, true)), (3, 2));
        assert_eq!((steps_per_epoch(8, 4, false), steps_per_epoch(3, 4, true)), (2, 0));
        assert_eq!(step_positions(2, 10, 4), 8..10);
        assert_eq!(step_positions(3, 10, 4), 10..10);
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
        fn steps_tile_the_epoch(rows in 0usize..200, batch in 1usize..20) {
            let steps = steps_per_epoch(rows, batch, false);
            let all: Vec<usize> = (0..steps).flat_map(|step| step_positions(step, rows, batch)).collect();
            prop_assert_eq!(all, (0..rows).collect::<Vec<_>>());
        }
    }
}
