//! Samples into packs, by length alone: pure.

use crate::config::PackingMethod;

/// Packs of indices into `lengths`, each of at most `capacity` tokens, in an order that depends on the arguments
/// alone. Every index is in exactly one pack. A sample longer than `capacity` gets a pack of its own: callers
/// drop such samples first.
///
/// - `None`: a sample a pack.
/// - `Sequential`: packs are filled in order; one is closed when the next sample does not fit.
/// - `Multipack`: first-fit-decreasing, ties in the given order; at most 11/9 of the optimal number of packs.
pub fn pack(method: PackingMethod, lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    match method {
        PackingMethod::None => (0..lengths.len()).map(|index| vec![index]).collect(),
        PackingMethod::Sequential => sequential(lengths, capacity),
        PackingMethod::Multipack => first_fit_decreasing(lengths, capacity),
    }
}

fn sequential(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (index, &length) in lengths.iter().enumerate() {
        match packs.last_mut() {
            Some(open) if length <= room => open.push(index),
            _ => {
                packs.push(vec![index]);
                room = capacity;
            }
        }
        room = room.saturating_sub(length);
    }
    packs
}

/// O(n log n): a tree of maxima over the packs' room finds the first pack that fits.
fn first_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut by_length: Vec<usize> = (0..lengths.len()).collect();
    by_length.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let leaves = lengths.len().next_power_of_two();
    let mut room = vec![capacity; 2 * leaves];
    let mut packs: Vec<Vec<usize>> = Vec::new();
    for index in by_length {
        let length = lengths[index];
        let mut node = 1;
        while node < leaves {
            node = 2 * node + usize::from(room[2 * node] < length);
        }
        // There are as many leaves as samples, so an over-long sample, which fits nowhere, has one left too.
        let slot = if room[node] < length { packs.len() } else { node - leaves };
        if slot >= packs.len() {
            packs.push(vec![index]);
        } else {
            packs[slot].push(index);
        }
        node = leaves + slot;
        room[node] = room[node].saturating_sub(length);
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sequential_keeps_the_order() {
        let packs = pack(PackingMethod::Sequential, &[3, 3, 4, 10, 1], 10);
        assert_eq!(packs, [vec![0, 1, 2], vec![3], vec![4]]);
    }

    #[test]
    fn multipack_fills_the_first_pack_with_room() {
        let packs = pack(PackingMethod::Multipack, &[3, 7, 5, 5, 2, 8], 10);
        assert_eq!(packs, [vec![5, 4], vec![1, 0], vec![2, 3]]);
    }

    #[test]
    fn no_packing_is_a_sample_a_row() {
        assert_eq!(pack(PackingMethod::None, &[30, 1], 10), [vec![0], vec![1]]);
        assert!(pack(PackingMethod::Multipack, &[], 10).is_empty());
    }

    fn first_fit_decreasing_naively(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
        let mut packs: Vec<Vec<usize>> = Vec::new();
        for index in order {
            let used = |pack: &[usize]| pack.iter().map(|&other| lengths[other]).sum::<usize>();
            match packs.iter().position(|pack| used(pack) + lengths[index] <= capacity) {
                Some(found) => packs[found].push(index),
                None => packs.push(vec![index]),
            }
        }
        packs
    }

    proptest! {
        #[test]
        fn packing_loses_no_sample_and_respects_capacity(
            lengths in proptest::collection::vec(1usize..40, 0..120), capacity in 40usize..100,
        ) {
            for method in [PackingMethod::None, PackingMethod::Sequential, PackingMethod::Multipack] {
                let packs = pack(method, &lengths, capacity);
                for pack in &packs {
                    let tokens: usize = pack.iter().map(|&index| lengths[index]).sum();
                    prop_assert!(tokens <= capacity, "{} tokens in a pack of {}", tokens, capacity);
                }
                let mut all: Vec<usize> = packs.into_iter().flatten().collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            }
        }

        #[test]
        fn the_tree_finds_what_a_plain_search_finds(
            lengths in proptest::collection::vec(1usize..40, 0..120), capacity in 40usize..100,
        ) {
            let packs = pack(PackingMethod::Multipack, &lengths, capacity);
            prop_assert_eq!(packs, first_fit_decreasing_naively(&lengths, capacity));
        }

        #[test]
        fn over_long_samples_do_not_break_packing(lengths in proptest::collection::vec(1usize..90, 0..40)) {
            for method in [PackingMethod::Sequential, PackingMethod::Multipack] {
                let packs = pack(method, &lengths, 40);
                let mut all: Vec<usize> = packs.into_iter().flatten().collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            }
        }
    }
}
