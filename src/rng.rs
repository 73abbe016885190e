//! Counter-based random numbers: value `i` of a stream is a pure function of (seed, name, i), so that a
//! rank can draw any piece of any tensor without drawing the rest, and no value depends on the topology.

use sha2::{Digest, Sha256};

/// The step of SplitMix64's counter and the factors of its two products (Steele et al., 2014).
pub const SPLIT_MIX: [u64; 3] = [0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];

/// One stream of random numbers, addressed by index.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of `name` under `seed`; the key is the head of SHA-256 over both.
    pub fn new(seed: u64, name: &str) -> Self {
        let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name.as_bytes()).finalize();
        let mut head = [0u8; 8];
        head.copy_from_slice(&digest[..8]);
        Self { key: u64::from_le_bytes(head) }
    }

    /// A stream of its own for each `key`.
    pub fn keyed(self, key: u64) -> Self {
        Self { key: self.key ^ key }
    }

    /// The number that its values depend on.
    pub fn key(self) -> u64 {
        self.key
    }

    /// 64 random bits at `index` (SplitMix64 with the counter as its state).
    #[inline(always)]
    pub fn bits(self, index: u64) -> u64 {
        let [step, first, second] = SPLIT_MIX;
        let mut z = self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(step));
        z = (z ^ (z >> 30)).wrapping_mul(first);
        z = (z ^ (z >> 27)).wrapping_mul(second);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1) with 24 random bits.
    #[inline(always)]
    pub fn uniform(self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Standard normal (Box-Muller over the two halves of one draw).
    pub fn normal(self, index: u64) -> f32 {
        let bits = self.bits(index);
        let u = ((bits >> 32) as f64 + 1.0) / 4_294_967_296.0;
        let v = (bits & 0xFFFF_FFFF) as f64 / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    /// Uniform integer in [0, bound), `bound` > 0 (Lemire's multiply-shift; bias below 2^-32 for any bound we use).
    pub fn below(self, index: u64, bound: u64) -> u64 {
        ((self.bits(index) as u128 * bound as u128) >> 64) as u64
    }

    /// A permutation of 0..n (Fisher-Yates over this stream).
    pub fn permutation(self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_the_moments_of_their_distribution() {
        let stream = Stream::new(7, "layers.0.q_proj");
        let n = 200_000u64;
        let mean = (0..n).map(|i| stream.uniform(i) as f64).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5e-3, "uniform mean {mean}");
        let (sum, square) = (0..n).fold((0.0, 0.0), |(s, q), i| {
            let x = stream.normal(i) as f64;
            (s + x, q + x * x)
        });
        assert!((sum / n as f64).abs() < 1e-2, "normal mean {}", sum / n as f64);
        assert!((square / n as f64 - 1.0).abs() < 2e-2, "normal variance {}", square / n as f64);
    }

    #[test]
    fn names_and_seeds_give_different_streams() {
        assert_ne!(Stream::new(1, "a").bits(0), Stream::new(1, "b").bits(0));
        assert_ne!(Stream::new(1, "a").bits(0), Stream::new(2, "a").bits(0));
        let mut order = Stream::new(3, "order").permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
