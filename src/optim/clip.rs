//! One global gradient norm, each logical parameter counted once whatever its placement.
//!
//! Adapters are cut over a block, those of experts over the ranks of it that have them, and copied across replicas. No
//! two ranks of a block own the same element: squares of pieces add up over a block, and over nothing else. Padding is
//! zero.

use crate::{
    comm::{Communicator, Reduce},
    ops::sum_of_squares,
    shard::{OwnedPiece, ShardError},
};
use tch::{Kind, Tensor};

/// The norm before clipping and the factor that clips gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedNorm {
    pub norm: f64,
    /// min(1, c / (norm + 1e-6)), 1 without a limit, times the factor of the gradient. NaN norms stay NaN: the caller
    /// skips the step.
    pub coefficient: f64,
}

impl ClippedNorm {
    /// Clips `norm` to `limit`; 0 or less is no limit.
    pub fn new(norm: f64, limit: f64) -> Self {
        let coefficient = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Self { norm, coefficient }
    }

    /// Clips a gradient that counts `factor` times; `norm` is the one before.
    pub fn of_scaled(norm: f64, factor: f64, limit: f64) -> Self {
        let clipped = Self::new(norm * factor, limit);
        Self { coefficient: clipped.coefficient * factor, ..clipped }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficient_is_torchs() {
        assert_eq!(ClippedNorm::new(0.5, 1.0).coefficient, 1.0);
        assert_eq!(ClippedNorm::new(4.0, 1.0).coefficient, 1.0 / (4.0 + 1e-6));
        assert_eq!(ClippedNorm::new(4.0, 0.0), ClippedNorm { norm: 4.0, coefficient: 1.0 });
        let quarter = ClippedNorm { norm: 1.0, coefficient: 0.25 };
        assert_eq!(ClippedNorm::of_scaled(4.0, 0.25, 0.0), quarter);
        assert_eq!(ClippedNorm::of_scaled(4.0, 0.25, 0.5).coefficient, 0.25 * (0.5 / (1.0 + 1e-6)));
    }
}
