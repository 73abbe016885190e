//! One global gradient norm, each logical parameter counted once whatever its placement.
//!
//! Adapters are cut over a block, those of experts over the ranks of it that have them, and copied across replicas. So no
//! two ranks of a block own the same element, and the squares of the pieces add up over a block and over nothing else.
//! Padding is zero.

use super::sum_of_squares;
use crate::{
    comm::Reduce,
    shard::{AdapterRegions, ShardError},
};
use tch::{Kind, Tensor};

/// The norm before clipping and what gradients are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClippedNorm {
    pub norm: f64,
    /// min(1, c / (norm + 1e-6)), 1 when there is no limit. NaN norms stay NaN: the caller skips the step.
    pub coefficient: f64,
}

impl ClippedNorm {
    /// Clips `norm` to `limit`; a limit of 0 or less is none.
    pub fn new(norm: f64, limit: f64) -> Self {
        let coefficient = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        Self { norm, coefficient }
    }
}

/// The L2 norm of the whole adapter's reduced gradient. Collective over a block.
pub fn global_norm(adapter: &AdapterRegions) -> Result<f64, ShardError> {
    // On a device one number is waited for, not one for each piece.
    let of_pieces: Vec<_> = adapter.owned().map(|owned| sum_of_squares(owned.gradient)).collect();
    let sum = |of: &[Tensor]| Tensor::stack(of, 0).sum(Kind::Double).double_value(&[]);
    let mut squares = [if of_pieces.is_empty() { 0.0 } else { sum(&of_pieces) }];
    adapter.block().all_reduce_host(&mut squares, Reduce::Sum)?;
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
    }
}
