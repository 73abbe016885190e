//! The order of samples and rows: pure functions of the seed, the epoch and the sizes, never of the world.
//!
//! Samples are put in order once, before packing: dataset by dataset as listed, each shuffled within itself if
//! `shuffle_before_merging_datasets`, then all of them together if `shuffle_merged_datasets`. Packs are formed
//! once from that order. Each epoch then visits all rows: in an order of its own if `shuffle_merged_datasets`,
//! otherwise as they were formed.

use crate::rng::Stream;

/// Order of the samples before packing, as indices into the concatenation of datasets of `sizes` samples.
pub fn sample_order(seed: u64, sizes: &[usize], shuffle_each: bool, shuffle_merged: bool) -> Vec<usize> {
    let mut order = Vec::with_capacity(sizes.iter().sum());
    for (dataset, &size) in sizes.iter().enumerate() {
        let start = order.len();
        if shuffle_each {
            let stream = Stream::new(seed, &format!("data.dataset.{dataset}"));
            order.extend(stream.permutation(size).into_iter().map(|index| start + index));
        } else {
            order.extend(start..start + size);
        }
    }
    if shuffle_merged {
        let merged = Stream::new(seed, "data.merged").permutation(order.len());
        order = merged.into_iter().map(|index| order[index]).collect();
    }
    order
}

/// Row at each position of `epoch`. Groups of `rows_per_group` (at least 1) adjacent rows keep their rows together
/// and in order; rows that do not fill the last group come last.
pub fn row_order(seed: u64, epoch: usize, rows: usize, rows_per_group: usize, shuffle: bool) -> Vec<usize> {
    if !shuffle {
        return (0..rows).collect();
    }
    let group = rows_per_group.max(1);
    let groups = Stream::new(seed, &format!("data.epoch.{epoch}")).permutation(rows / group);
    let whole = groups.into_iter().flat_map(|index| index * group..(index + 1) * group);
    whole.chain(rows / group * group..rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_shuffling_the_order_is_that_of_the_files() {
        assert_eq!(sample_order(1, &[2, 0, 3], false, false), [0, 1, 2, 3, 4]);
        assert_eq!(row_order(1, 7, 3, 1, false), [0, 1, 2]);
    }

    #[test]
    fn shuffling_before_merging_keeps_datasets_apart() {
        let order = sample_order(1, &[50, 50], true, false);
        assert!(order[..50].iter().all(|&sample| sample < 50));
        assert_ne!(order[..50], (0..50).collect::<Vec<_>>());
        let merged = sample_order(1, &[50, 50], false, true);
        assert!(merged[..50].iter().any(|&sample| sample >= 50));
    }

    #[test]
    fn the_order_is_frozen() {
        // A resume in another release must see the same order; the values were computed in Python.
        assert_eq!(row_order(42, 0, 8, 1, true), [7, 0, 1, 6, 5, 4, 3, 2]);
        assert_eq!(row_order(42, 1, 8, 1, true), [3, 7, 2, 0, 6, 4, 5, 1]);
        assert_eq!(sample_order(42, &[3, 3], true, true), [3, 1, 2, 4, 0, 5]);
    }

    #[test]
    fn groups_of_rows_are_shuffled_whole() {
        // Groups in the frozen order of 8, two rows each; a row is left over.
        let groups = [7, 0, 1, 6, 5, 4, 3, 2];
        let expected: Vec<usize> =
            groups.into_iter().flat_map(|group| [2 * group, 2 * group + 1]).chain([16]).collect();
        assert_eq!(row_order(42, 0, 17, 2, true), expected);
        assert_eq!(row_order(42, 0, 5, 2, false), [0, 1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn orders_are_permutations(
            seed in any::<u64>(), epoch in 0usize..5, sizes in proptest::collection::vec(0usize..30, 0..5),
            each in any::<bool>(), merged in any::<bool>(), group in 1usize..5,
        ) {
            let n: usize = sizes.iter().sum();
            let mut samples = sample_order(seed, &sizes, each, merged);
            let mut rows = row_order(seed, epoch, n, group, merged);
            samples.sort_unstable();
            rows.sort_unstable();
            prop_assert_eq!(&samples, &(0..n).collect::<Vec<_>>());
            prop_assert_eq!(&rows, &samples);
        }
    }
}
