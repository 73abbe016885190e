//! Initial values of an adapter: A Kaiming uniform with a = √5, which is U(−1/√in, 1/√in); B zeros, or
//! N(0, std). A value is a function of (seed, parameter name, index), never of rank, shard or order, so every
//! topology starts from the same bits.

use super::{module::Parameter, targets::Factor};
use crate::rng::Stream;
use std::ops::Range;

/// Elements `range` of `parameter`, row-major.
pub fn values(parameter: &Parameter, range: Range<usize>, seed: u64, b_std: f64) -> Vec<f32> {
    let stream = Stream::new(seed, &parameter.name);
    let indices = range.map(|i| i as u64);
    match parameter.factor {
        Factor::A => {
            let bound = 1.0 / (parameter.shape[1] as f32).sqrt();
            indices.map(|i| (2.0 * stream.uniform(i) - 1.0) * bound).collect()
        }
        Factor::B if b_std == 0.0 => vec![0.0; indices.count()],
        Factor::B => indices.map(|i| stream.normal(i) * b_std as f32).collect(),
        // Norms of the base's rows, which the caller knows.
        Factor::Magnitude => vec![0.0; indices.count()],
    }
}

/// Elements `range` of `parameter` after merge `merge` (1 is the first): A is drawn anew, B is zero.
pub fn values_after_merge(parameter: &Parameter, range: Range<usize>, seed: u64, merge: u64) -> Vec<f32> {
    let name = format!("{} after merge {merge}", parameter.name);
    values(&Parameter { name, ..parameter.clone() }, range, seed, 0.0)
}

/// The random numbers of the dropout masks of the site `path`: element i of a token's mask is the i-th of this stream
/// keyed by the token's of [`token_keys`].
pub fn dropout_stream(seed: u64, path: &str) -> Stream {
    Stream::new(seed, &format!("dropout {path}"))
}

/// The keys of the `tokens` tokens of row `row` (its place in the epoch) in step `step` (0-based).
pub fn token_keys(seed: u64, step: usize, row: usize, tokens: usize) -> impl Iterator<Item = u64> {
    let stream = Stream::new(seed, &format!("dropout step {step} row {row}"));
    (0..tokens as u64).map(move |position| stream.bits(position))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Region;

    fn parameter(factor: Factor) -> Parameter {
        Parameter {
            name: "model.layers.0.mlp.up_proj.lora_A".into(),
            factor,
            shape: [64, 100],
            region: Region::Dense,
            group: 0,
            entry: 0,
            first: 0,
        }
    }

    #[test]
    fn a_is_kaiming_uniform() {
        let all = values(&parameter(Factor::A), 0..6400, 1, 0.0);
        assert!(all.iter().all(|v| v.abs() <= 0.1));
        let variance = all.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 6400.0;
        // U(−b, b) has variance b²/3.
        assert!((variance / (0.01 / 3.0) - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn a_piece_is_a_piece_of_the_whole() {
        let whole = values(&parameter(Factor::A), 0..6400, 1, 0.0);
        assert_eq!(values(&parameter(Factor::A), 1000..1100, 1, 0.0), whole[1000..1100]);
        assert_eq!(values(&parameter(Factor::B), 0..3, 1, 0.0), [0.0; 3]);
        assert!(values(&parameter(Factor::B), 0..3, 1, 0.02).iter().all(|&v| v != 0.0));
        let merged = |merge| values_after_merge(&parameter(Factor::A), 0..100, 1, merge);
        assert!(merged(1) != merged(2) && merged(1) != whole[..100], "each merge draws anew");
        assert_eq!(values_after_merge(&parameter(Factor::B), 0..3, 1, 1), [0.0; 3]);
    }
}
