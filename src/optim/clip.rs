//! One global gradient norm, each logical parameter counted once whatever its placement.
//!
//! Adapters are cut over the shard group and copied across replicas, so the squares of the pieces add up over the
//! shard group and over nothing else. Padding is zero.

use super::sum_of_squares;
use crate::{
    comm::Reduce,
    shard::{AdapterShards, ShardError},
};

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

/// The L2 norm of the whole adapter's reduced gradient. Collective over the shard group.
pub fn global_norm(adapter: &AdapterShards) -> Result<f64, ShardError> {
    let mut squares = [(0..adapter.len()).map(|unit| sum_of_squares(adapter.gradient(unit))).sum()];
    adapter.shard_group().all_reduce_host(&mut squares, Reduce::Sum)?;
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
