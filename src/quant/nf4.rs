//! nf4 as bitsandbytes 0.50 packs it on CPUs: the code is the number of midpoints between table values that lie below
//! value / absmax.

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
    let done = dispatch(
        #[inline(always)]
        || {
            let tiles = values.chunks(TILE.elements).zip(out.chunks_exact_mut(TILE.bytes));
            tiles.into_iter().all(|(values, tile)| pack_tile(values, tile).is_some())
        },
    );
    if done { Ok(()) } else { Err(non_finite(values)) }
}

/// `None` where a value is not finite.
#[inline(always)]
fn pack_tile(values: &[f32], tile: &mut [u8]) -> Option<()> {
    let (codes, scales) = tile.split_at_mut(CODES);
    if values.len() < TILE.elements {
        codes.fill(ZEROS);
        scales.fill(0);
    }
    let blocks = values.chunks(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales.chunks_exact_mut(4));
    for ((values, codes), scale) in blocks {
        let most = amax(values)?;
        if let Ok(values) = <&[f32; BLOCK]>::try_from(values) {
            scale.copy_from_slice(&most.to_le_bytes());
            let factor = 1.0 / most.max(LEAST);
            let mut numbers = [0u8; BLOCK];
            for (code, value) in numbers.iter_mut().zip(values) {
                *code = code_of(value * factor);
            }
            for (byte, pair) in codes.iter_mut().zip(numbers.chunks_exact(2)) {
                *byte = pair[0] << 4 | pair[1];
            }
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
    Some(())
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
