//! Sums of packed weights and a delta, packed anew. nvfp4's scale of the matrix is that of the new largest magnitude,
//! as of a matrix that is packed for the first time. A running mean of it would need a state that files do not hold,
//! and would cut off the largest weights whenever they grow.

use super::merge::Survival;
use crate::quant::{self, Grid, QuantError};
use std::ops::Range;

/// W + ΔW of the elements that some tiles of a matrix hold.
pub struct Sum {
    grid: Grid,
    /// A run of [`Grid::runs`].
    tiles: Range<usize>,
    /// W + ΔW `[elements]`, exact; 0 between the elements that the tiles hold.
    exact: Vec<f64>,
    /// ΔW, in the same way.
    delta: Vec<f64>,
    /// W + ΔW, rounded to fp32.
    values: Vec<f32>,
}

impl Sum {
    /// Decodes `tiles`, which have the bytes `packed` and the scale `global` of the matrix, and adds `delta`
    /// `[elements]`, that of all elements from the first to the last that they hold.
    ///
    /// # Errors
    /// A length is wrong.
    pub fn new(
        grid: Grid,
        tiles: Range<usize>,
        packed: &[u8],
        global: f32,
        mut delta: Vec<f64>,
    ) -> Result<Self, QuantError> {
        let elements = grid.elements(tiles.clone());
        let mut values = vec![0f32; elements.len()];
        grid.unpack(tiles.clone(), packed, global, &mut values)?;
        delta.resize(values.len(), 0.0);
        let mut last = elements.start;
        for held in grid.held(tiles.clone()) {
            delta[last - elements.start..held.start - elements.start].fill(0.0);
            last = held.end;
        }
        let exact: Vec<f64> =
            values.iter().zip(&delta).map(|(&value, delta)| f64::from(value) + delta).collect();
        values.iter_mut().zip(&exact).for_each(|(value, &exact)| *value = exact as f32);
        Ok(Self { grid, tiles, exact, delta, values })
    }

    /// The largest magnitude; 0 where one is not finite, which [`pack`](Self::pack) tells.
    pub fn amax(&self) -> f32 {
        quant::amax(&self.values).unwrap_or(0.0)
    }

    /// Packs the sum into `out`, all bytes of the tiles, with the scale `global` of the matrix. What is lost is NaN,
    /// and `out` undefined, where a value is not finite.
    pub fn pack(mut self, global: f32, out: &mut [u8]) -> Survival {
        let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let delta = square(&self.delta);
        // Elements between those that the tiles hold stay 0.
        let packed = self.grid.pack(self.tiles.clone(), &self.values, global, out);
        let decoded = packed.and_then(|()| self.grid.unpack(self.tiles, out, global, &mut self.values));
        if decoded.is_err() {
            return Survival { delta, lost: f64::NAN };
        }
        let lost: Vec<f64> =
            self.values.iter().zip(&self.exact).map(|(&value, exact)| f64::from(value) - exact).collect();
        Survival { delta, lost: square(&lost) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{quant::Format, rng::Stream};

    /// Packs `values`, and merges `delta` tile by tile in runs that end at `borders`. Values afterwards, and what
    /// became of the delta.
    fn merged(grid: Grid, values: &[f32], delta: &[f64], borders: &[usize]) -> (Vec<f32>, Survival) {
        let tile = grid.format.tile().bytes;
        let before = grid.format.global(quant::amax(values).unwrap());
        let mut packed = vec![0; grid.bytes()];
        grid.pack(0..grid.tiles(), values, before, &mut packed).unwrap();
        let runs: Vec<Range<usize>> = [&[0], borders, &[grid.tiles()]]
            .concat()
            .windows(2)
            .flat_map(|pair| grid.runs(pair[0]..pair[1]).collect::<Vec<_>>())
            .collect();
        let sums: Vec<Sum> = runs
            .iter()
            .map(|run| {
                let bytes = &packed[run.start * tile..run.end * tile];
                let delta = delta[grid.elements(run.clone())].to_vec();
                Sum::new(grid, run.clone(), bytes, before, delta).unwrap()
            })
            .collect();
        let after = grid.format.global(sums.iter().map(Sum::amax).fold(0.0, f32::max));
        let mut kept = Survival::default();
        for (sum, run) in sums.into_iter().zip(&runs) {
            kept += sum.pack(after, &mut packed[run.start * tile..run.end * tile]);
        }
        let mut back = vec![0f32; values.len()];
        grid.unpack(0..grid.tiles(), &packed, after, &mut back).unwrap();
        (back, kept)
    }

    fn normal(name: &str, n: usize, scale: f32) -> Vec<f32> {
        (0..n as u64).map(|i| Stream::new(5, name).normal(i) * scale).collect()
    }

    #[test]
    fn merged_tiles_are_those_of_the_sum_wherever_borders_lie() {
        for format in Format::ALL {
            let grid = Grid { format, rows: 200, columns: 330 };
            let values = normal("w", 200 * 330, 0.02);
            let delta: Vec<f64> = normal("d", 200 * 330, 0.01).into_iter().map(f64::from).collect();
            let (found, kept) = merged(grid, &values, &delta, &[]);
            // Written out: decode, add, pack the whole matrix, decode.
            let again = |values: &[f32]| {
                let global = format.global(quant::amax(values).unwrap());
                let mut packed = vec![0; grid.bytes()];
                grid.pack(0..grid.tiles(), values, global, &mut packed).unwrap();
                let mut back = vec![0f32; values.len()];
                grid.unpack(0..grid.tiles(), &packed, global, &mut back).unwrap();
                back
            };
            let base = again(&values);
            let sum: Vec<f32> =
                base.iter().zip(&delta).map(|(&base, delta)| (f64::from(base) + delta) as f32).collect();
            let expected = again(&sum);
            assert!(found == expected, "{format}");
            let lost: f64 = expected.iter().zip(&sum).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            assert!((kept.lost / lost - 1.0).abs() < 1e-4, "{format}: {kept:?}, expected {lost}");
            let squares: f64 = delta.iter().map(|delta| delta * delta).sum();
            assert!((kept.delta / squares - 1.0).abs() < 1e-9, "{format}: {kept:?}");
            assert!(kept.lost_share() > 0.01 && kept.lost_share() < 0.6, "{format}: {kept:?}");
            for borders in [&[1][..], &[2, 3], &[grid.tiles() - 1]] {
                let (other, parts) = merged(grid, &values, &delta, borders);
                assert!(other == found, "{format} {borders:?}");
                assert!(
                    (parts.lost / kept.lost - 1.0).abs() < 1e-9
                        && (parts.delta / kept.delta - 1.0).abs() < 1e-9
                );
            }
        }
    }

    #[test]
    fn a_small_delta_is_erased_and_said_to_be() {
        for format in Format::ALL {
            let grid = Grid { format, rows: 64, columns: 128 };
            let values = normal("w", 64 * 128, 0.02);
            // Far below half a step of any code, and zero where a block has its largest magnitude.
            let (base, _) = merged(grid, &values, &[0.0; 64 * 128], &[]);
            let group = if format == Format::BlockFp8 { 128 * 64 } else { format.group() };
            let delta: Vec<f64> = base
                .chunks(group)
                .flat_map(|block| {
                    let most = block.iter().fold(0f32, |most, value| most.max(value.abs()));
                    block
                        .iter()
                        .map(move |value| if value.abs() == most { 0.0 } else { f64::from(most) * 1e-5 })
                })
                .collect();
            let (found, kept) = merged(grid, &base, &delta, &[]);
            let same = found.iter().zip(&base).filter(|(a, b)| a == b).count();
            let share = same as f64 / base.len() as f64;
            assert!(
                share > if format == Format::BlockFp8 { 0.9 } else { 0.999 },
                "{format}: {share} as before"
            );
            assert!((kept.lost_share() - 1.0).abs() < 0.1, "{format}: {kept:?}");
            let (_, all) =
                merged(grid, &base, &delta.iter().map(|delta| delta * 3e4).collect::<Vec<_>>(), &[]);
            assert!(all.lost_share() < 0.3, "{format}: {all:?}");
        }
    }

    #[test]
    fn a_sum_that_is_not_finite_is_told() {
        for format in Format::ALL {
            let grid = Grid { format, rows: 4, columns: 64 };
            let mut delta = vec![0.0; 256];
            delta[77] = 1e300;
            let (_, kept) = merged(grid, &[1.0; 256], &delta, &[]);
            assert!(kept.lost.is_nan(), "{format}");
        }
    }
}
