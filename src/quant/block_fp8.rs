//! block_fp8: `float8_e4m3fn` in blocks of 128×128, value = e4m3 · scale, as HF's fine-grained FP8 has it.
//! AVX-512 looks bf16 values up, scaled and rounded before, 32 at once.

#[cfg(target_arch = "x86_64")]
use super::number::has_avx512;
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

/// Values of `width` neighbours in each of `rows` of the block `tile`, from (row, column) `first` on, into rows of
/// `out` that are `stride` apart.
pub fn unpack<T: Decoded>(
    tile: &[u8],
    first: [usize; 2],
    [rows, width]: [usize; 2],
    stride: usize,
    out: &mut [T],
) {
    let codes = &tile[..CODES];
    let row = |i: usize| &codes[(first[0] + i) * SIDE + first[1]..][..width];
    #[cfg(target_arch = "x86_64")]
    if has_avx512()
        && let Ok(out) = bytemuck::try_cast_slice_mut::<T, u16>(out)
        && size_of::<T>() == size_of::<u16>()
    {
        let table = dispatch(
            #[inline(always)]
            || table::<T>(scale(tile)),
        );
        let table = bytemuck::cast_slice(&table);
        for i in 0..rows {
            // SAFETY: the machine has AVX-512 F and BW.
            unsafe { avx512::words(row(i), table, &mut out[i * stride..][..width]) };
        }
        return;
    }
    dispatch(
        #[inline(always)]
        || {
            let scale = scale(tile);
            for i in 0..rows {
                for (to, &code) in out[i * stride..][..width].iter_mut().zip(row(i)) {
                    *to = T::of(from_e4m3(code) * scale);
                }
            }
        },
    );
}

/// Values of the codes without a sign.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn table<T: Decoded>(scale: f32) -> [T; SIDE] {
    let mut table = [T::default(); SIDE];
    for (code, value) in table.iter_mut().enumerate() {
        *value = T::of(from_e4m3(code as u8) * scale);
    }
    table
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::SIDE;
    use std::arch::x86_64::*;

    /// Looks up bf16 values of `codes` in the `table` of those without a sign.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn words(codes: &[u8], table: &[u16], out: &mut [u16]) {
        assert!(codes.len() == out.len() && table.len() == SIDE);
        // SAFETY: `table` was asserted to be as long as four vectors.
        let part = |i: usize| unsafe { _mm512_loadu_si512(table.as_ptr().add(i * 32).cast()) };
        let parts = [part(0), part(1), part(2), part(3)];
        let mut at = 0;
        while at < codes.len() {
            let mask = u32::MAX >> (32 - (codes.len() - at).min(32));
            // SAFETY: `mask` has the bits of those of the 32 codes and values from `at` on that the slices have.
            unsafe {
                let codes = _mm256_maskz_loadu_epi8(mask, codes.as_ptr().add(at).cast());
                let index = _mm512_cvtepu8_epi16(codes);
                // The lowest six bits count here, the seventh chooses, the eighth is the sign.
                let low = _mm512_permutex2var_epi16(parts[0], index, parts[1]);
                let high = _mm512_permutex2var_epi16(parts[2], index, parts[3]);
                let is_high = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
                let values = _mm512_mask_blend_epi16(is_high, low, high);
                let sign = _mm512_and_si512(_mm512_slli_epi16::<8>(index), _mm512_set1_epi16(i16::MIN));
                let values = _mm512_xor_si512(values, sign);
                _mm512_mask_storeu_epi16(out.as_mut_ptr().add(at).cast(), mask, values);
            }
            at += 32;
        }
    }
}
