//! Targets of a micro-batch: up to K token ids for each token, sorted out once on the host.

use std::{collections::HashMap, ops::Range};
use tch::{Device, Kind, Tensor};

/// Targets `[tokens, K]` of a micro-batch. Ids of a token may repeat: the pass sees each of them once.
pub struct Targets {
    tokens: usize,
    k: usize,
    /// Borders of the sequences in tokens.
    sequences: Vec<usize>,
    /// The tokens that have a target, ascending.
    valid: Vec<i64>,
    pub(super) on_device: OnDevice,
}

/// The same for the pass, on its device. Of the tokens that have a target, in order:
pub(super) struct OnDevice {
    /// `[valid]` i64: their places among all tokens.
    pub index: Tensor,
    /// `[valid, width]` i64: their distinct targets, −1 behind the last of a token.
    pub distinct: Tensor,
    /// `[entries]` i64: the distinct targets without the gaps.
    pub entries: Tensor,
    /// `[valid + 1]` i64: token i has the entries `offsets[i]..offsets[i + 1]`.
    pub offsets: Tensor,
    /// `[valid, K]` i64: the column of each target in `distinct`, −1 where absent.
    pub column: Tensor,
}

impl Targets {
    /// From `ids` `[tokens × k]`, token by token, negative where a target is absent, and the lengths of the sequences,
    /// which add up to `tokens`. `k` is at least 1.
    pub fn new(ids: &[i64], k: usize, sequence_lengths: &[usize], device: Device) -> Self {
        let k = k.max(1);
        let tokens = ids.len() / k;
        debug_assert_eq!(tokens * k, ids.len());
        debug_assert_eq!(tokens, sequence_lengths.iter().sum::<usize>());
        let (mut valid, mut entries, mut offsets, mut column) = (Vec::new(), Vec::new(), vec![0], Vec::new());
        let mut places = HashMap::new();
        for (token, ids) in ids.chunks_exact(k).enumerate().filter(|(_, ids)| ids.iter().any(|&id| id >= 0)) {
            valid.push(token as i64);
            places.clear();
            for &id in ids {
                let next = places.len() as i64;
                column.push(if id < 0 { -1 } else { *places.entry(id).or_insert(next) });
                if id >= 0 && places.len() as i64 > next {
                    entries.push(id);
                }
            }
            offsets.push(entries.len() as i64);
        }
        let counts = offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let width = counts.max().unwrap_or(1);
        let padded = offsets.windows(2).flat_map(|pair| {
            let own = &entries[pair[0] as usize..pair[1] as usize];
            own.iter().copied().chain(std::iter::repeat_n(-1, width - own.len()))
        });
        let padded: Vec<i64> = padded.collect();
        let on_device = OnDevice {
            index: tensor(&valid, &[valid.len() as i64], device),
            distinct: tensor(&padded, &[valid.len() as i64, width as i64], device),
            entries: tensor(&entries, &[entries.len() as i64], device),
            offsets: tensor(&offsets, &[offsets.len() as i64], device),
            column: tensor(&column, &[valid.len() as i64, k as i64], device),
        };
        let mut sequences = vec![0];
        sequences.extend(sequence_lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        Self { tokens, k, sequences, valid, on_device }
    }

    /// No target for any token of one sequence of `tokens` tokens.
    pub fn none(tokens: usize, device: Device) -> Self {
        Self::new(&vec![-1; tokens], 1, &[tokens], device)
    }

    /// All tokens, with a target or not.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Targets a token, absent ones included.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Borders of the sequences: see [`super::LogProbs::sequences`].
    pub fn sequences(&self) -> &[usize] {
        &self.sequences
    }

    /// Tokens of `range` that have a target.
    pub fn valid_in(&self, range: Range<usize>) -> usize {
        self.valid_range(range).len()
    }

    /// Σ of `values` `[tokens]` over the tokens of `range`, in fp64. The tokens that have a target are added in an
    /// order of their own, so the sum does not depend on tokens without one, nor on tokens outside of the range.
    pub fn sum(&self, values: &Tensor, range: Range<usize>) -> f64 {
        let own = self.valid_range(range.clone());
        let index = self.on_device.index.narrow(0, own.start as i64, own.len() as i64);
        let valid = values.index_select(0, &index).sum(Kind::Double);
        let others = values.index_fill(0, &index, 0.0).narrow(0, range.start as i64, range.len() as i64);
        (valid + others.sum(Kind::Double)).double_value(&[])
    }

    /// Places in `valid` of the tokens of `range`.
    fn valid_range(&self, range: Range<usize>) -> Range<usize> {
        let place = |token: usize| self.valid.partition_point(|&valid| (valid as usize) < token);
        place(range.start)..place(range.end)
    }
}

fn tensor(values: &[i64], shape: &[i64], device: Device) -> Tensor {
    if values.iter().all(|&value| value == 0) {
        // Nothing to copy, for tokens that are generated least of all.
        return Tensor::zeros(shape, (Kind::Int64, device));
    }
    Tensor::from_slice(values).view(shape).to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor.view([-1])).expect("numbers")
    }

    #[test]
    fn repeated_and_absent_targets_are_sorted_out() {
        let ids = [7, 3, 7, -1, -100, -1, -1, 5, -1, 2, 2, 2];
        let targets = Targets::new(&ids, 3, &[3, 0, 1], Device::Cpu);
        assert_eq!((targets.tokens(), targets.k()), (4, 3));
        assert_eq!(targets.sequences(), [0, 3, 3, 4]);
        let OnDevice { index, distinct, entries, offsets, column } = &targets.on_device;
        assert_eq!(values(index), [0, 2, 3]);
        assert_eq!((distinct.size(), values(distinct)), (vec![3, 2], vec![7, 3, 5, -1, 2, -1]));
        assert_eq!((values(entries), values(offsets)), (vec![7, 3, 5, 2], vec![0, 2, 3, 4]));
        assert_eq!((column.size(), values(column)), (vec![3, 3], vec![0, 1, 0, -1, 0, -1, 0, 0, 0]));
    }

    #[test]
    fn sums_of_ranges_count_every_value_once() {
        let targets = Targets::new(&[1, -1, 2, -1, 0], 1, &[2, 3], Device::Cpu);
        let values = Tensor::from_slice(&[1.0f32, 10.0, 100.0, 1e3, 1e4]);
        assert_eq!(targets.sum(&values, 0..5), 11111.0);
        assert_eq!(targets.sum(&values, 1..4), 1110.0);
        assert_eq!(targets.sum(&values, 3..3), 0.0);
        assert_eq!([0..5, 1..4, 3..4, 4..4].map(|range| targets.valid_in(range)), [3, 1, 0, 0]);
    }

    #[test]
    fn no_target_leaves_an_empty_pass() {
        for (tokens, targets) in [(3, Targets::none(3, Device::Cpu)), (0, Targets::none(0, Device::Cpu))] {
            let OnDevice { index, distinct, entries, offsets, column } = &targets.on_device;
            assert_eq!((targets.tokens(), targets.valid_in(0..tokens)), (tokens, 0));
            assert_eq!((index.size(), entries.size(), values(offsets)), (vec![0], vec![0], vec![0]));
            assert_eq!((distinct.size(), column.size()), (vec![0, 1], vec![0, 1]));
        }
    }
}
