//! Division of samples into those that are trained and those that validate: pure, before rows are formed.

use super::tokenized::Sample;
use crate::rng::Stream;
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

/// A number that equal records of a file share: hash of the tokens and labels of the samples that a record makes.
pub(super) fn record(samples: &[Sample]) -> u64 {
    let mut hash = DefaultHasher::new();
    for Sample { tokens, labels, .. } in samples {
        tokens.hash(&mut hash);
        labels.hash(&mut hash);
    }
    hash.finish()
}

/// True for each sample that validates. `records` has the record of each sample; samples of one record are on one side.
/// `size`: a share of the records below 1, of which a part counts whole, or their number. Records are drawn by `seed`.
/// `None` where nothing would be left on one side.
pub(super) fn validating(seed: u64, records: &[u64], size: f64) -> Option<Vec<bool>> {
    let mut places = HashMap::new();
    for &record in records {
        let next = places.len();
        places.entry(record).or_insert(next);
    }
    let all = places.len();
    let count = if size < 1.0 { (all as f64 * size).ceil() } else { size } as usize;
    if count == 0 || count >= all {
        return None;
    }
    let mut drawn = vec![false; all];
    for place in Stream::new(seed, "data.validation").permutation(all).into_iter().take(count) {
        drawn[place] = true;
    }
    Some(records.iter().map(|record| drawn[places[record]]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_size_is_a_share_or_a_number() {
        let records: Vec<u64> = (0..10).collect();
        let count = |size| Some(validating(1, &records, size)?.into_iter().filter(|&drawn| drawn).count());
        let sizes = [0.1, 0.25, 0.01, 1.0, 9.0].map(count);
        assert_eq!(sizes, [Some(1), Some(3), Some(1), Some(1), Some(9)]);
        assert_eq!([0.0, 0.95, 10.0, 1e300].map(count), [None; 4]);
        assert_eq!(validating(1, &[], 0.5), None);
        assert_ne!(validating(1, &records, 5.0), validating(2, &records, 5.0));
    }

    #[test]
    fn equal_samples_make_equal_records() {
        let sample = |tokens: &[u32], labels: &[i64]| Sample::whole(tokens.to_vec(), labels.to_vec());
        let one = || sample(&[1, 2], &[1, 2]);
        assert_eq!(record(&[one()]), record(&[one()]));
        assert_ne!(record(&[one()]), record(&[sample(&[1, 2], &[-100, 2])]));
        assert_ne!(record(&[one()]), record(&[one(), one()]));
    }

    proptest! {
        #[test]
        fn no_record_is_on_both_sides(
            records in proptest::collection::vec(0u64..20, 2..60), size in 0.01f64..12.0, seed in any::<u64>(),
        ) {
            let size = if size < 1.0 { size } else { size.floor() };
            let of = |drawn: &[bool], side| -> BTreeSet<u64> {
                records.iter().zip(drawn).filter(|(_, drawn)| **drawn == side).map(|(&record, _)| record).collect()
            };
            if let Some(drawn) = validating(seed, &records, size) {
                let [validated, trained] = [true, false].map(|side| of(&drawn, side));
                prop_assert!(validated.is_disjoint(&trained) && !validated.is_empty() && !trained.is_empty());
            }
        }
    }
}
