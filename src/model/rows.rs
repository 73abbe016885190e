//! The adapters of a batch's rows: segments for dense layers, keys by which experts' rows are sorted.

use crate::ops::linear::{Pattern, RowSegments, one_adapter};
use std::rc::Rc;
use tch::{Device, Tensor};

/// The adapter of each row of a flat batch. A pass has the same pattern on every rank, so that ranks agree on the
/// number of keys that experts exchange.
#[derive(Debug)]
pub struct RowAdapters {
    /// Segments of layers that all rows go through.
    dense: RowSegments,
    /// The adapters of each expert's segments.
    pattern: Pattern,
    /// Index into `pattern` of each row: `[tokens, 1]` i64; `None` where the pattern has one entry.
    index: Option<Tensor>,
}

impl RowAdapters {
    /// `tokens` rows, all of the first adapter.
    pub fn one(tokens: usize) -> Self {
        Self { dense: RowSegments::one(tokens as i64), pattern: one_adapter(), index: None }
    }

    /// Neighbouring rows, `(rows, adapter)`, of a pass with `adapters` adapters; `None` for rows that have none.
    pub fn mixed(segments: &[(usize, Option<usize>)], adapters: usize, device: Device) -> Self {
        let ends = segments.iter().scan(0, |end, &(rows, _)| {
            *end += rows as i64;
            Some(*end)
        });
        let offsets: Vec<i64> = std::iter::once(0).chain(ends).collect();
        let index: Vec<i64> = segments
            .iter()
            .flat_map(|&(rows, adapter)| std::iter::repeat_n(adapter.unwrap_or(adapters) as i64, rows))
            .collect();
        let of_segments: Pattern = segments.iter().map(|&(_, adapter)| adapter).collect();
        // A batch without rows has a segment all the same.
        let (offsets, of_segments) =
            if segments.is_empty() { (vec![0, 0], Rc::from([None])) } else { (offsets, of_segments) };
        Self {
            dense: RowSegments::of_device(&offsets, of_segments, device),
            pattern: (0..adapters).map(Some).chain([None]).collect(),
            index: Some(Tensor::from_slice(&index).view([-1, 1]).to_device(device)),
        }
    }

    /// The same rows with keys `[tokens]` of their tokens, so that dropout acts on them.
    pub fn with_keys(self, keys: &[u64]) -> Self {
        Self { dense: self.dense.with_keys(keys.into()), ..self }
    }

    /// Segments of layers that all rows go through.
    pub fn dense(&self) -> &RowSegments {
        &self.dense
    }

    /// The adapters of each expert's segments.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Keys `[tokens, k]` i64 of the experts `chosen` `[tokens, k]` i64: expert · P + index into the pattern.
    pub fn keys(&self, chosen: &Tensor) -> Tensor {
        match &self.index {
            None => chosen.shallow_clone(),
            Some(index) => chosen * self.pattern.len() as i64 + index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::values;

    #[test]
    fn rows_have_the_adapter_of_their_segment() {
        let rows = RowAdapters::mixed(&[(2, Some(1)), (0, Some(0)), (1, None)], 2, Device::Cpu);
        assert_eq!(rows.dense().offsets(), [0, 2, 2, 3]);
        assert_eq!(&rows.pattern()[..], [Some(0), Some(1), None]);
        let chosen = Tensor::from_slice(&[0i64, 4, 1, 0, 2, 3]).view([3, 2]);
        assert_eq!(values::<i64>(&rows.keys(&chosen)), [1, 13, 4, 1, 8, 11]);
        let one = RowAdapters::one(3);
        assert_eq!(one.keys(&chosen), chosen);
        assert_eq!(RowAdapters::mixed(&[], 1, Device::Cpu).dense().offsets(), [0, 0]);
    }
}
