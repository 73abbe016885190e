//! block_fp8: `float8_e4m3fn` in blocks of 128×128, value = e4m3 · scale, as HF's fine-grained FP8 has it.

use super::{
    Decoded, Tile,
    minifloat::{E4M3_MAX, from_e4m3, to_e4m3},
    number::{amax, dispatch},
};

/// Side of a block.
pub const SIDE: usize = 128;
const CODES: usize = SIDE * SIDE;
pub const TILE: Tile = Tile { elements: CODES, bytes: CODES + 64 };

/// Packs a block, `[128, 128]` values, with scale amax / 448; `None` where one is not finite.
pub fn pack_tile(values: &[f32], tile: &mut [u8]) -> Option<()> {
    dispatch(
        #[inline(always)]
        || {
            let scale = amax(values)? / E4M3_MAX;
            let (codes, rest) = tile.split_at_mut(CODES);
            set_scale(rest, scale);
            if scale == 0.0 {
                codes.fill(0);
                return Some(());
            }
            for (code, value) in codes.iter_mut().zip(values) {
                *code = to_e4m3(value / scale);
            }
            Some(())
        },
    )
}

/// Writes the part of a tile behind its codes.
pub fn set_scale(rest: &mut [u8], scale: f32) {
    rest.fill(0);
    rest[..4].copy_from_slice(&scale.to_le_bytes());
}

/// The scale of a tile.
#[inline(always)]
pub fn scale(tile: &[u8]) -> f32 {
    f32::from_le_bytes([tile[CODES], tile[CODES + 1], tile[CODES + 2], tile[CODES + 3]])
}

/// Values of `out.len()` neighbours from `column` on in row `row` of the block `tile`.
pub fn unpack<T: Decoded>(tile: &[u8], row: usize, column: usize, out: &mut [T]) {
    dispatch(
        #[inline(always)]
        || {
            let scale = scale(tile);
            let codes = &tile[row * SIDE + column..row * SIDE + SIDE];
            for (to, &code) in out.iter_mut().zip(codes) {
                *to = T::of(from_e4m3(code) * scale);
            }
        },
    );
}
