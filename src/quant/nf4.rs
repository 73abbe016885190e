//! nf4 as bitsandbytes 0.50 packs it on CPUs: the code is the number of midpoints between table values that lie below
//! value / absmax.

#[cfg(target_arch = "x86_64")]
use super::number::has_avx512;
use super::{
    QuantError, Tile, check_length, four_bit,
    four_bit::{CODES, FourBit},
    non_finite,
    number::{amax, dispatch},
};

/// Elements with one absmax.
pub const BLOCK: usize = 64;
const BLOCKS: usize = 16;
pub const TILE: Tile = four_bit::TILE;
/// Two codes of 0.
const ZEROS: u8 = 0x77;
/// bitsandbytes divides by no less.
const LEAST: f32 = 1e-38;

/// Values of the codes: bitsandbytes' `get_4bit_type("nf4")`.
pub const TABLE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The smallest distance of neighbours in the table, of 0 and the value above it.
pub(super) const LEAST_GAP: f32 = TABLE[8] - TABLE[7];

const MIDPOINTS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = (TABLE[i] + TABLE[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// Packs `values`, neighbours of the flattened matrix from the border of a tile on, into whole tiles `out`. Only the
/// end of a matrix is no whole tile.
pub fn pack(values: &[f32], out: &mut [u8]) -> Result<(), QuantError> {
    check_length("bytes of tiles", out.len(), values.len().div_ceil(TILE.elements) * TILE.bytes)?;
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the machine has AVX-512 F, BW, CD, DQ and VL.
        let done = unsafe { avx512::pack_tiles(values, out) };
        return done.ok_or_else(|| non_finite(values));
    }
    pack_portable(values, out).ok_or_else(|| non_finite(values))
}

fn pack_portable(values: &[f32], out: &mut [u8]) -> Option<()> {
    dispatch(
        #[inline(always)]
        || pack_tiles(values, out, portable),
    )
}

/// Packs whole tiles. `encode(values, factor, codes)` packs the codes of a whole block. `None` where a value is not
/// finite.
#[inline(always)]
fn pack_tiles(
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; BLOCK], f32, &mut [u8; BLOCK / 2]),
) -> Option<()> {
    for (values, tile) in values.chunks(TILE.elements).zip(out.chunks_exact_mut(TILE.bytes)) {
        let (codes, scales) = tile.split_at_mut(CODES);
        if values.len() < TILE.elements {
            codes.fill(ZEROS);
            scales.fill(0);
        }
        let codes = codes.as_chunks_mut::<{ BLOCK / 2 }>().0;
        for ((values, codes), scale) in values.chunks(BLOCK).zip(codes).zip(scales.chunks_exact_mut(4)) {
            let most = amax(values)?;
            if let Ok(values) = <&[f32; BLOCK]>::try_from(values) {
                scale.copy_from_slice(&most.to_le_bytes());
                encode(values, 1.0 / most.max(LEAST), codes);
            } else {
                // bitsandbytes divides in a short block, and raises its absmax.
                let most = most.max(LEAST);
                scale.copy_from_slice(&most.to_le_bytes());
                for (byte, pair) in codes.iter_mut().zip(values.chunks(2)) {
                    let low = pair.get(1).map_or(7, |value| code_of(value / most));
                    *byte = code_of(pair[0] / most) << 4 | low;
                }
            }
        }
    }
    Some(())
}

#[inline(always)]
fn portable(values: &[f32; BLOCK], factor: f32, codes: &mut [u8; BLOCK / 2]) {
    let mut numbers = [0u8; BLOCK];
    for (code, value) in numbers.iter_mut().zip(values) {
        *code = code_of(value * factor);
    }
    for (byte, pair) in codes.iter_mut().zip(numbers.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{BLOCK, MIDPOINTS};
    use std::arch::x86_64::*;

    /// [`super::pack_tiles`], compiled for AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    pub fn pack_tiles(values: &[f32], out: &mut [u8]) -> Option<()> {
        super::pack_tiles(values, out, |values, factor, codes| encode(values, factor, codes))
    }

    /// Counts the midpoints below each of 64 values · `factor` by a binary search among them.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn encode(values: &[f32; BLOCK], factor: f32, codes: &mut [u8; BLOCK / 2]) {
        let mut sorted = [f32::INFINITY; 16];
        sorted[..15].copy_from_slice(&MIDPOINTS);
        // SAFETY: `sorted` is 16 floats.
        let midpoints = unsafe { _mm512_loadu_ps(sorted.as_ptr()) };
        let quarter = |i: usize| {
            // SAFETY: `values` is 64 floats, of which these are a quarter.
            let values = unsafe { _mm512_loadu_ps(values.as_ptr().add(16 * i)) };
            let values = _mm512_mul_ps(values, _mm512_set1_ps(factor));
            let mut below = _mm512_setzero_si512();
            for step in [8, 4, 2, 1] {
                let middle = _mm512_add_epi32(below, _mm512_set1_epi32(step - 1));
                let middle = _mm512_permutexvar_ps(middle, midpoints);
                let is_above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, middle);
                below = _mm512_mask_add_epi32(below, is_above, below, _mm512_set1_epi32(step));
            }
            _mm512_cvtepi32_epi8(below)
        };
        let all = _mm512_castsi128_si512(quarter(0));
        let all = _mm512_inserti32x4::<1>(all, quarter(1));
        let all = _mm512_inserti32x4::<2>(all, quarter(2));
        let all = _mm512_inserti32x4::<3>(all, quarter(3));
        // A word has two codes, the first in its low byte: it becomes the high nibble of a byte.
        let pairs = _mm512_or_si512(_mm512_slli_epi16::<4>(all), _mm512_srli_epi16::<8>(all));
        // SAFETY: `codes` is 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), _mm512_cvtepi16_epi8(pairs)) };
    }
}

#[inline(always)]
fn code_of(scaled: f32) -> u8 {
    MIDPOINTS.iter().map(|&midpoint| u32::from(scaled > midpoint)).sum::<u32>() as u8
}

/// Decoding of nf4.
pub(super) enum Nf4 {}

impl FourBit for Nf4 {
    const TABLE: [f32; 16] = TABLE;
    const HIGH_FIRST: bool = true;
    const UNIFORM: bool = true;

    #[inline(always)]
    fn scales(stored: [u8; 4], _: f32) -> [f32; 4] {
        [f32::from_le_bytes(stored); 4]
    }
}

/// Tiles from bitsandbytes' tensors: `codes` of the blocks from the border of a tile on, two a byte, and their
/// `absmax`, one a block, the last of which may be short.
pub fn from_blocks(codes: &[u8], absmax: &[f32], out: &mut [u8]) -> Result<(), QuantError> {
    check_length("blocks of codes", codes.len().div_ceil(BLOCK / 2), absmax.len())?;
    check_length("bytes of tiles", out.len(), absmax.len().div_ceil(BLOCKS) * TILE.bytes)?;
    let tiles = out.chunks_exact_mut(TILE.bytes).zip(codes.chunks(CODES)).zip(absmax.chunks(BLOCKS));
    for ((tile, codes), absmax) in tiles {
        let (to, scales) = tile.split_at_mut(CODES);
        to[..codes.len()].copy_from_slice(codes);
        to[codes.len()..].fill(ZEROS);
        scales.fill(0);
        for (scale, absmax) in scales.chunks_exact_mut(4).zip(absmax) {
            scale.copy_from_slice(&absmax.to_le_bytes());
        }
    }
    Ok(())
}

/// Codes and absmax as bitsandbytes stores them, of the blocks of `elements` elements that `tiles` hold: the opposite
/// of [`from_blocks`].
pub fn to_blocks(tiles: &[u8], elements: usize) -> Result<(Vec<u8>, Vec<f32>), QuantError> {
    check_length("bytes of tiles", tiles.len(), elements.div_ceil(TILE.elements) * TILE.bytes)?;
    let codes = tiles.chunks_exact(TILE.bytes).flat_map(|tile| &tile[..CODES]).copied();
    let scales = tiles.chunks_exact(TILE.bytes).flat_map(|tile| tile[CODES..].chunks_exact(4));
    let absmax = scales.map(|scale| f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]));
    Ok((codes.take(elements.div_ceil(2)).collect(), absmax.take(elements.div_ceil(BLOCK)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Midpoints, their neighbours, zeros of both signs and numbers between, in blocks with different factors.
    #[test]
    fn vectors_pack_as_plain_loops() {
        let near = MIDPOINTS.iter().flat_map(|m| [m.next_down(), *m, m.next_up()]);
        let values: Vec<f32> = near.chain([0.0, -0.0, 1.0, -1.0]).collect();
        for (scale, len) in [(1.0, 64 * 40), (0.02, 64 * 40), (1e-39, 64 * 20), (3.7, 1500), (0.0, 130)] {
            let values: Vec<f32> = (0..len).map(|i| values[i * 31 % values.len()] * scale).collect();
            let mut packed = [0xa5u8, 0x5a].map(|byte| vec![byte; len.div_ceil(1024) * TILE.bytes]);
            pack(&values, &mut packed[0]).unwrap();
            pack_portable(&values, &mut packed[1]).unwrap();
            assert_eq!(packed[0], packed[1], "{scale} {len}");
        }
    }
}
