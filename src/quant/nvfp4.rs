//! nvfp4 as torchao 0.18's `nvfp4_quantize` packs it on CPUs, with NVIDIA's two scales: value = e2m1 · (global · e4m3).

use super::{
    QuantError, Tile, check_length, four_bit,
    four_bit::{CODES, FourBit},
    minifloat::{E2M1, E2M1_MAX, E4M3_MAX, E4M3_TINY, from_e4m3, to_e2m1, to_e4m3},
    non_finite,
    number::{amax, dispatch},
};

/// Elements with one e4m3 scale.
pub const GROUP: usize = 16;
const GROUPS: usize = 64;
pub const TILE: Tile = four_bit::TILE;

/// The scale of a matrix: amax / (6·448); 1 for one of zeros.
pub fn global(amax: f32) -> f32 {
    let scale = amax / (E2M1_MAX * E4M3_MAX);
    if scale < f32::MIN_POSITIVE { 1.0 } else { scale }
}

/// Packs `values`, whole groups from the border of a tile on, into whole tiles `out`; groups behind the last are zeros.
pub(super) fn pack(values: &[f32], global: f32, out: &mut [u8]) -> Result<(), QuantError> {
    check_length("bytes of tiles", out.len(), values.len().div_ceil(TILE.elements) * TILE.bytes)?;
    let done = dispatch(
        #[inline(always)]
        || {
            let mut tiles = values.chunks(TILE.elements).zip(out.chunks_exact_mut(TILE.bytes));
            tiles.all(|(values, tile)| pack_tile(values, global, tile).is_some())
        },
    );
    if done { Ok(()) } else { Err(non_finite(values)) }
}

/// `None` where a value is not finite.
#[inline(always)]
fn pack_tile(values: &[f32], global: f32, tile: &mut [u8]) -> Option<()> {
    let (codes, scales) = tile.split_at_mut(CODES);
    if values.len() < TILE.elements {
        codes.fill(0);
        scales.fill(0);
    }
    let groups = values.chunks_exact(GROUP).zip(codes.chunks_exact_mut(GROUP / 2)).zip(scales);
    for ((values, codes), scale) in groups {
        let wanted = amax(values)? / E2M1_MAX / global;
        *scale = to_e4m3(wanted.clamp(E4M3_TINY, E4M3_MAX));
        let factor = (1.0 / global) / from_e4m3(*scale);
        let mut numbers = [0u8; GROUP];
        for (code, value) in numbers.iter_mut().zip(values) {
            *code = to_e2m1(value * factor);
        }
        for (byte, pair) in codes.iter_mut().zip(numbers.chunks_exact(2)) {
            *byte = pair[0] | pair[1] << 4;
        }
    }
    Some(())
}

/// Decoding of nvfp4.
pub(super) enum NvFp4 {}

impl FourBit for NvFp4 {
    const TABLE: [f32; 16] = E2M1;
    const HIGH_FIRST: bool = false;
    const UNIFORM: bool = false;

    #[inline(always)]
    fn scales(stored: [u8; 4], global: f32) -> [f32; 4] {
        stored.map(
            #[inline(always)]
            |scale| global * from_e4m3(scale),
        )
    }
}

/// Tiles from the tensors of NVIDIA's files: `codes` of groups from the border of a tile on, two a byte, and their e4m3
/// `scales`, one a group.
pub fn from_groups(codes: &[u8], scales: &[u8], out: &mut [u8]) -> Result<(), QuantError> {
    check_length("bytes of codes", codes.len(), scales.len() * GROUP / 2)?;
    check_length("bytes of tiles", out.len(), scales.len().div_ceil(GROUPS) * TILE.bytes)?;
    let tiles = out.chunks_exact_mut(TILE.bytes).zip(codes.chunks(CODES)).zip(scales.chunks(GROUPS));
    for ((tile, codes), scales) in tiles {
        tile.fill(0);
        tile[..codes.len()].copy_from_slice(codes);
        tile[CODES..][..scales.len()].copy_from_slice(scales);
    }
    Ok(())
}

/// Codes and scales as NVIDIA's files have them, of the `groups` groups that `tiles` hold: the opposite of
/// [`from_groups`].
pub fn to_groups(tiles: &[u8], groups: usize) -> Result<(Vec<u8>, Vec<u8>), QuantError> {
    check_length("bytes of tiles", tiles.len(), groups.div_ceil(GROUPS) * TILE.bytes)?;
    let codes = tiles.chunks_exact(TILE.bytes).flat_map(|tile| &tile[..CODES]).copied();
    let scales = tiles.chunks_exact(TILE.bytes).flat_map(|tile| &tile[CODES..]).copied();
    Ok((codes.take(groups * GROUP / 2).collect(), scales.take(groups).collect()))
}
