//! A model that was never trained: N(0, std) matrices, norms of one, biases of zero. Values depend on (seed, name,
//! index) alone, so every topology draws the same model.

use super::{SourceError, TensorMeta, WeightSource, check_range, unknown};
use crate::{dtype::DType, rng::Stream};
use std::{collections::BTreeMap, ops::Range};

/// Random weights of the given tensors.
pub struct RandomSource {
    shapes: BTreeMap<String, Vec<usize>>,
    seed: u64,
    std: f32,
}

impl RandomSource {
    /// `tensors` (name, shape) with matrices drawn from N(0, `std`).
    pub fn new(tensors: Vec<(String, Vec<usize>)>, std: f64, seed: u64) -> Self {
        Self { shapes: tensors.into_iter().collect(), seed, std: std as f32 }
    }
}

impl WeightSource for RandomSource {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        Some(TensorMeta { dtype: DType::F32, shape: self.shapes.get(name)?.clone() })
    }

    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError> {
        let meta = self.meta(name).ok_or_else(|| unknown(name))?;
        check_range(name, &range, &meta)?;
        let stream = Stream::new(self.seed, name);
        let values: Vec<f32> = if meta.shape.len() > 1 {
            range.map(|i| stream.normal(i as u64) * self.std).collect()
        } else {
            vec![if name.ends_with("bias") { 0.0 } else { 1.0 }; range.len()]
        };
        DType::F32.convert(bytemuck::cast_slice(&values), dtype, out);
        Ok(())
    }

    fn bytes_read(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_a_piece_of_the_whole() {
        let tensors = [("w", vec![30, 20]), ("norm", vec![20]), ("q.bias", vec![20])];
        let tensors = tensors.map(|(name, shape)| (name.to_owned(), shape)).to_vec();
        let source = RandomSource::new(tensors, 0.02, 9);
        let read = |name: &str, range: Range<usize>| {
            let mut out = vec![0f32; range.len()];
            source.read(name, range, DType::F32, bytemuck::cast_slice_mut(&mut out)).map(|()| out)
        };
        assert_eq!(read("w", 0..600).unwrap()[100..140], read("w", 100..140).unwrap());
        assert_eq!(read("norm", 0..2).unwrap(), [1.0, 1.0]);
        assert_eq!(read("q.bias", 0..2).unwrap(), [0.0, 0.0]);
        assert!(matches!(read("w", 590..601), Err(SourceError::Range { elements: 600, .. })));
        assert!(matches!(read("v", 0..1), Err(SourceError::Mismatch(_))));
    }
}
