//! Decoding of 4-bit codes, for nf4 and nvfp4: tiles of 1024 codes, two a byte, then four bytes of scales for each 64.
//! AVX-512 looks up 32 codes at once, in bf16 among values that are scaled and rounded before.

#[cfg(target_arch = "x86_64")]
use super::number::has_avx512;
use super::{Decoded, Tile, number::dispatch};

/// Codes that are decoded together.
const BLOCK: usize = 64;
/// Codes with one scale at least.
const GROUP: usize = 16;
pub const CODES: usize = 512;
pub const TILE: Tile = Tile { elements: 2 * CODES, bytes: CODES + 64 };

/// A format of 4-bit codes.
pub trait FourBit {
    /// Values of the codes before they are scaled.
    const TABLE: [f32; 16];
    /// The first element of a byte is in its high nibble, otherwise in its low one.
    const HIGH_FIRST: bool;
    /// The 64 codes of a block have one scale.
    const UNIFORM: bool;

    /// Scales of the four groups of a block.
    fn scales(stored: [u8; 4], global: f32) -> [f32; 4];
}

/// Rows of neighbours in the order of tiles, and their places in an output.
#[derive(Clone, Copy)]
pub struct Window {
    /// Place of the first element.
    pub first: usize,
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements from a row to the next in the order of tiles.
    pub step: usize,
    /// The same in the output.
    pub stride: usize,
}

/// Values of `out.len()` elements in the order of tiles. `packed` are whole tiles, `first` is the place of the first
/// element in them.
pub fn unpack<F: FourBit, T: Decoded>(packed: &[u8], first: usize, global: f32, out: &mut [T]) {
    let width = out.len();
    unpack_window::<F, T>(packed, Window { first, rows: 1, width, step: 0, stride: width }, global, out);
}

/// Values of the elements of `window` into `out`. `packed` are whole tiles.
pub fn unpack_window<F: FourBit, T: Decoded>(packed: &[u8], window: Window, global: f32, out: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the machine has AVX-512 F, BW, CD, DQ and VL.
        unsafe { avx512::unpack::<F, T>(packed, window, global, out) };
        return;
    }
    unpack_portable::<F, T>(packed, window, global, out);
}

fn unpack_portable<F: FourBit, T: Decoded>(packed: &[u8], window: Window, global: f32, out: &mut [T]) {
    dispatch(
        #[inline(always)]
        || blocks::<F, T>(packed, window, global, out, portable::<F, T>),
    );
}

/// Calls `decode` for each block that holds some of the elements of `window`.
#[inline(always)]
fn blocks<F: FourBit, T: Decoded>(
    packed: &[u8],
    window: Window,
    global: f32,
    out: &mut [T],
    decode: impl Fn(&[u8; BLOCK / 2], &[u8; 4], f32, &mut [T; BLOCK]),
) {
    let Window { first, rows, width, step, stride } = window;
    for row in 0..rows {
        let out = &mut out[row * stride..][..width];
        let (mut at, mut done) = (first + row * step, 0);
        while done < width {
            let (tile, inside) = (at / TILE.elements * TILE.bytes, at % TILE.elements);
            let (block, from) = (inside / BLOCK, inside % BLOCK);
            let codes = packed[tile + block * BLOCK / 2..].first_chunk();
            let stored = packed[tile + CODES + block * 4..].first_chunk();
            let (Some(codes), Some(stored)) = (codes, stored) else { return };
            let count = (BLOCK - from).min(width - done);
            match out[done..].first_chunk_mut() {
                Some(whole) if from == 0 => decode(codes, stored, global, whole),
                _ => {
                    let mut values = [T::default(); BLOCK];
                    decode(codes, stored, global, &mut values);
                    out[done..done + count].copy_from_slice(&values[from..from + count]);
                }
            }
            (at, done) = (at + count, done + count);
        }
    }
}

/// The values of `TABLE` times `scale`.
#[inline(always)]
fn scaled<F: FourBit, T: Decoded>(scale: f32) -> [T; 16] {
    F::TABLE.map(
        #[inline(always)]
        |value| T::of(value * scale),
    )
}

#[inline(always)]
fn portable<F: FourBit, T: Decoded>(
    codes: &[u8; BLOCK / 2],
    stored: &[u8; 4],
    global: f32,
    out: &mut [T; BLOCK],
) {
    let scales = F::scales(*stored, global);
    let groups = out.chunks_exact_mut(GROUP).zip(codes.chunks_exact(GROUP / 2)).zip(scales);
    for ((values, codes), scale) in groups {
        let table = scaled::<F, T>(scale);
        for (pair, &byte) in values.chunks_exact_mut(2).zip(codes) {
            let (high, low) = (table[usize::from(byte >> 4)], table[usize::from(byte & 15)]);
            (pair[0], pair[1]) = if F::HIGH_FIRST { (high, low) } else { (low, high) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{BLOCK, Decoded, FourBit, Window, blocks};
    use std::arch::x86_64::*;

    /// [`super::unpack_window`], compiled for AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    pub fn unpack<F: FourBit, T: Decoded>(packed: &[u8], window: Window, global: f32, out: &mut [T]) {
        blocks::<F, T>(packed, window, global, out, |codes, stored, global, values| {
            let scales = F::scales(*stored, global);
            if let Ok(values) = bytemuck::try_cast_slice_mut::<T, u16>(values)
                && values.len() == BLOCK
            {
                let tables = if F::UNIFORM {
                    let table = _mm512_broadcast_i64x4(table::<F>(scales[0]));
                    [table, table]
                } else {
                    let two = |i: usize| {
                        let first = _mm512_castsi256_si512(table::<F>(scales[i]));
                        _mm512_inserti64x4::<1>(first, table::<F>(scales[i + 1]))
                    };
                    [two(0), two(2)]
                };
                words::<F>(&codes[..16], tables[0], &mut values[..32]);
                words::<F>(&codes[16..], tables[1], &mut values[32..]);
            } else {
                for half in 0..2 {
                    let mut plain = [0f32; 32];
                    floats::<F>(&codes[half * 16..half * 16 + 16], &mut plain);
                    let to = values[half * 32..half * 32 + 32].chunks_exact_mut(16);
                    for ((to, plain), scale) in to.zip(plain.chunks_exact(16)).zip(&scales[half * 2..]) {
                        for (to, plain) in to.iter_mut().zip(plain) {
                            *to = T::of(plain * scale);
                        }
                    }
                }
            }
        });
    }

    /// The values of the codes times `scale` in bf16, rounded as `Decoded` rounds them: VCVTNEPS2BF16 makes subnormal
    /// numbers zero.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn table<F: FourBit>(scale: f32) -> __m256i {
        // SAFETY: the table is 16 floats.
        let values = unsafe { _mm512_loadu_ps(F::TABLE.as_ptr()) };
        let bits = _mm512_castps_si512(_mm512_mul_ps(values, _mm512_set1_ps(scale)));
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(sum))
    }

    /// Values of 32 codes, 16 of each of two tables of 16 words.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn words<F: FourBit>(codes: &[u8], tables: __m512i, out: &mut [u16]) {
        assert!(codes.len() == 16 && out.len() == 32);
        // SAFETY: the slices were asserted to be as long as the vectors.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            // A byte's first code in the low word, its second in the high one, in their lowest four bits.
            let index = if F::HIGH_FIRST {
                _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes))
            } else {
                _mm512_or_si512(bytes, _mm512_slli_epi32::<12>(bytes))
            };
            // Only the lowest five bits of an index count; the fifth is that of the second table, if they differ.
            let index = if F::UNIFORM {
                index
            } else {
                let upper = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
                _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), upper)
            };
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(index, tables));
        }
    }

    /// Values of 32 codes before they are scaled.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn floats<F: FourBit>(codes: &[u8], out: &mut [f32; 32]) {
        assert!(codes.len() == 16);
        // SAFETY: `codes` was asserted to be as long as the vector, and the arrays are as long as one and two.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let table = _mm512_loadu_ps(F::TABLE.as_ptr());
            // Only the lowest four bits of an index count.
            let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
            let low = _mm512_permutexvar_ps(bytes, table);
            let (first, second) = if F::HIGH_FIRST { (high, low) } else { (low, high) };
            let of_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let of_high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(first, of_low, second));
            _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(first, of_high, second));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{nf4::Nf4, nvfp4::NvFp4};
    use half::bf16;

    /// Bits of all values that both ways decode from bytes of every kind.
    fn compare<F: FourBit>() {
        let packed: Vec<u8> = (0..2 * TILE.bytes).map(|i| (i * 37 % 251) as u8 & 0x77).collect();
        for (first, count) in [(0, 2048), (0, 64), (64, 100), (5, 3), (1000, 500), (2047, 1)] {
            let window = Window { first, rows: 1, width: count, step: 0, stride: count };
            let (mut wide, mut expected) = (vec![0f32; count], vec![0f32; count]);
            unpack::<F, f32>(&packed, first, 0.3, &mut wide);
            unpack_portable::<F, f32>(&packed, window, 0.3, &mut expected);
            assert_eq!(wide, expected, "{first} {count}");
            let (mut narrow, mut expected) = (vec![bf16::ZERO; count], vec![bf16::ZERO; count]);
            unpack::<F, bf16>(&packed, first, 0.3, &mut narrow);
            unpack_portable::<F, bf16>(&packed, window, 0.3, &mut expected);
            assert_eq!(narrow, expected, "{first} {count}");
        }
    }

    #[test]
    fn vectors_decode_as_plain_loops() {
        compare::<Nf4>();
        compare::<NvFp4>();
    }
}
