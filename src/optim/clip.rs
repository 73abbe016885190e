//! One global gradient norm, each logical parameter counted once whatever its placement.
//!
//! Adapters are cut over a block, those of experts over the ranks of it that have them, and copied across replicas. No
//! two ranks of a block own the same element: squares of pieces add up over a block, and over nothing else. Padding is
//! zero.

use crate::{
    comm::{Communicator, Reduce},
    shard::{OwnedPiece, ShardError},
};
use tch::{Device, Kind, Tensor};

/// The norm before clipping and the factor that clips gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedNorm {
    pub norm: f64,
    /// min(1, c / (norm + 1e-6)), 1 without a limit. NaN norms stay NaN: the caller skips the step.
    pub coefficient: f64,
}

impl ClippedNorm {
    /// Clips `norm` to `limit`; 0 or less is no limit.
    pub fn new(norm: f64, limit: f64) -> Self {
        let coefficient = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Self { norm, coefficient }
    }
}

/// The L2 norm of a whole adapter's reduced gradient, from this rank's `pieces`. Collective over `block`.
///
/// # Errors
/// Those of the reduction.
pub fn global_norm<'a>(
    pieces: impl IntoIterator<Item = OwnedPiece<'a>>,
    block: &dyn Communicator,
) -> Result<f64, ShardError> {
    // A device is waited for once, not once a piece.
    let by_piece: Vec<_> = pieces.into_iter().map(|piece| sum_of_squares(piece.gradient)).collect();
    let sum = |squares: &[Tensor]| Tensor::stack(squares, 0).sum(Kind::Double).double_value(&[]);
    let mut squares = [if by_piece.is_empty() { 0.0 } else { sum(&by_piece) }];
    block.all_reduce_host(&mut squares, Reduce::Sum)?;
    Ok(squares[0].sqrt())
}

/// Elements that a CPU squares at a time: libtorch writes out both the squares and their fp64 copies.
const SQUARES: i64 = 1 << 15;

/// Σ of squares of a flat tensor, accumulated in fp64: `[]` fp64.
fn sum_of_squares(values: &Tensor) -> Tensor {
    let sum = |values: &Tensor| values.square().sum(Kind::Double);
    if values.device() != Device::Cpu {
        return sum(values);
    }
    Tensor::stack(&values.split(SQUARES, 0).iter().map(sum).collect::<Vec<_>>(), 0).sum(Kind::Double)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficient_is_torchs() {
        assert_eq!(ClippedNorm::new(0.5, 1.0).coefficient, 1.0);
        assert_eq!(ClippedNorm::new(4.0, 1.0).coefficient, 1.0 / (4.0 + 1e-6));
        assert_eq!(ClippedNorm::new(4.0, 0.0), ClippedNorm { norm: 4.0, coefficient: 1.0 });
    }
}
