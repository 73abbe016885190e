//! Packing of bf16 numbers into tiles of 16 rows of 64 bytes, the order in which they are multiplied, and of sums out
//! of it.
//!
//! A tile of a left factor is 16 rows of 16 pairs of neighbours along the summed dimension. A tile of a right factor is
//! 16 such pairs for each of 16 columns, as AMX takes them (TDPBF16PS); AVX512-BF16 multiplies one row of it at once
//! (VDPBF16PS).

#[cfg(test)]
use super::Element;
use half::bf16;

/// Rows of a tile, and columns of a tile of sums.
pub const SIDE: usize = 16;

/// Bytes of a row.
pub const ROW_BYTES: usize = 64;

/// Rows and columns of a block of sums: two tiles each.
pub const BLOCK: usize = 2 * SIDE;

/// bf16 numbers of a row.
pub const DEPTH: usize = ROW_BYTES / 2;

/// bf16 numbers of a tile.
pub const NUMBERS: usize = SIDE * DEPTH;

/// Packing with the instructions of one kind of CPU.
pub trait Packing {
    /// Transposes 16 rows of 16 words of 32 bits: word j of row i becomes word i of row j of `to`, which is dense.
    ///
    /// # Safety
    /// `from` is the first of 16 rows of 64 readable bytes, `stride` bytes apart. The CPU has this type's instructions.
    unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]);

    /// Packs 32 rows of 32 numbers as two tiles of right factors: word j of row i is column j of rows 2i (its low half)
    /// and 2i + 1.
    ///
    /// # Safety
    /// `from` is the first of 32 rows of 32 readable numbers, `stride` numbers apart. The CPU has this type's
    /// instructions.
    unsafe fn pair(from: *const bf16, stride: usize, to: [&mut [u32; SIDE * SIDE]; 2]);

    /// Rounds numbers to bf16, nearest, ties to even.
    ///
    /// # Safety
    /// The CPU has this type's instructions.
    unsafe fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE];

    /// to = start + scale·sums, rounded, for 32 numbers. A start is optional, and may be `to`.
    ///
    /// # Safety
    /// `to` is 32 numbers that nothing but `start` refers to, `start` 32 readable numbers: the same or apart from `to`.
    /// The CPU has this type's instructions.
    unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16);
}

#[cfg(target_arch = "x86_64")]
pub use vectors::Avx512Bf16;

/// Packing in vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use super::*;
    use std::arch::x86_64::{
        __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_castsi128_si512, _mm512_castsi512_ps,
        _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_inserti32x4,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutex2var_epi64, _mm512_set1_ps,
        _mm512_setr_epi64, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi16,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi16, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    /// Needs AVX-512 with F, BW and BF16.
    pub struct Avx512Bf16;

    impl Packing for Avx512Bf16 {
        // Loads groups of four words from rows four apart into one vector, so that only 4 × 4 squares of words are left
        // to be transposed.
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]) {
            for column in 0..4 {
                // SAFETY: the caller promises 16 rows of 64 bytes; this is four words of one.
                let word =
                    |row: usize| unsafe { _mm_loadu_si128(from.add(row * stride + column * 16).cast()) };
                let rows = |row: usize| {
                    let low = _mm512_castsi128_si512(word(row));
                    let low = _mm512_inserti32x4::<1>(low, word(row + 4));
                    let low = _mm512_inserti32x4::<2>(low, word(row + 8));
                    _mm512_inserti32x4::<3>(low, word(row + 12))
                };
                let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
                let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
                let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
                let columns = [
                    _mm512_unpacklo_epi64(low_ab, low_cd),
                    _mm512_unpackhi_epi64(low_ab, low_cd),
                    _mm512_unpacklo_epi64(high_ab, high_cd),
                    _mm512_unpackhi_epi64(high_ab, high_cd),
                ];
                for (i, words) in columns.into_iter().enumerate() {
                    // SAFETY: `to` has 16 rows of 16 words; this is row 4 · column + i < 16.
                    unsafe {
                        _mm512_storeu_si512(to.as_mut_ptr().add((4 * column + i) * SIDE).cast(), words)
                    };
                }
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        unsafe fn pair(from: *const bf16, stride: usize, [left, right]: [&mut [u32; SIDE * SIDE]; 2]) {
            // The instruction interleaves within 128 bits: four columns are in the low half, the next four in the high
            // one.
            let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            for i in 0..SIDE {
                // SAFETY: the caller promises 32 rows of 32 numbers, of which these are 2i and 2i + 1; `left` and
                // `right` have 16 rows of 16 words.
                unsafe {
                    let row = from.add(2 * i * stride);
                    let (a, b) = (_mm512_loadu_si512(row.cast()), _mm512_loadu_si512(row.add(stride).cast()));
                    let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
                    let of = |index| _mm512_permutex2var_epi64(low, index, high);
                    _mm512_storeu_si512(left.as_mut_ptr().add(i * SIDE).cast(), of(first));
                    _mm512_storeu_si512(right.as_mut_ptr().add(i * SIDE).cast(), of(second));
                }
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE] {
            // SAFETY: `numbers` is 16 floats; any 256 bits are a value of both types of the result.
            unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(numbers.as_ptr()))) }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16) {
            let scale = _mm512_set1_ps(scale);
            // SAFETY: the caller promises 32 numbers at `start` and at `to`; each of `sums` is 16 floats; any 512 bits
            // are an `__m512i`.
            unsafe {
                let [left, right] = sums.map(|sums| _mm512_loadu_ps(sums.as_ptr()));
                let (left, right) = match start {
                    None => (_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale)),
                    Some(start) => (
                        _mm512_fmadd_ps(left, scale, widened(start)),
                        _mm512_fmadd_ps(right, scale, widened(start.add(SIDE))),
                    ),
                };
                let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(right, left));
                _mm512_storeu_si512(to.cast(), rounded);
            }
        }
    }

    /// Loads 16 numbers as fp32.
    ///
    /// # Safety
    /// `from` is 16 readable numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn widened(from: *const bf16) -> __m512 {
        // SAFETY: the caller promises 16 numbers, which are 256 bits; the load is unaligned.
        let halves = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
    }
}

/// Packing in plain arithmetic, so that code built on tiles is tested on any machine.
#[cfg(test)]
pub struct Scalar;

#[cfg(test)]
impl Packing for Scalar {
    unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]) {
        for (i, word) in to.iter_mut().enumerate() {
            // SAFETY: the caller promises 16 rows of 16 words; the read is unaligned.
            *word = unsafe { from.add(i % SIDE * stride + i / SIDE * 4).cast::<u32>().read_unaligned() };
        }
    }

    unsafe fn pair(from: *const bf16, stride: usize, to: [&mut [u32; SIDE * SIDE]; 2]) {
        for (tile, to) in to.into_iter().enumerate() {
            for (i, word) in to.iter_mut().enumerate() {
                let (row, column) = (i / SIDE * 2, tile * SIDE + i % SIDE);
                // SAFETY: the caller promises 32 rows of 32 numbers, and both indices are below 32.
                let half = |row: usize| unsafe { u32::from((*from.add(row * stride + column)).to_bits()) };
                *word = half(row) | half(row + 1) << 16;
            }
        }
    }

    unsafe fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE] {
        numbers.map(bf16::narrow)
    }

    unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16) {
        for (i, &sum) in sums.into_iter().flatten().enumerate() {
            // SAFETY: the caller promises 32 numbers at both, and i is below 32; read and write are unaligned.
            unsafe {
                let start = start.map_or(0.0, |start| start.add(i).read_unaligned().to_accum());
                to.add(i).write_unaligned(bf16::narrow(sum.mul_add(scale, start)));
            }
        }
    }
}

/// Numbers that tests of tiles multiply and move.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// Words from a row to the next; the last three are not the row's.
    pub const STRIDE: usize = SIDE + 3;

    /// Words of 32 rows.
    pub const WORDS: usize = 2 * SIDE * STRIDE;

    /// Small whole numbers, whose sums are exact in any order.
    pub fn numbers(n: usize, seed: u32) -> Vec<u32> {
        let half = |x: u32| f32::to_bits((x % 7) as f32 - 3.0) >> 16;
        (0..n as u32).map(|i| half(i * 5 + seed) | half(i * 3 + 2 * seed + 1) << 16).collect()
    }

    /// Half `half` of word i.
    pub fn number(words: &[u32], i: usize, half: usize) -> f32 {
        f32::from_bits(words[i] >> (16 * half) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    /// Every packing of one set of rows.
    #[derive(Debug, PartialEq)]
    struct Packed {
        transposed: [u32; SIDE * SIDE],
        pairs: [[u32; SIDE * SIDE]; 2],
        rounded: [bf16; SIDE],
        /// Half of [`sums`], alone and added to the first 32 numbers of a.
        put: [[bf16; DEPTH]; 2],
    }

    /// Numbers that bf16 has to round.
    fn sums() -> [[f32; SIDE]; 2] {
        std::array::from_fn(|i| std::array::from_fn(|j| (i * SIDE + j) as f32 * 1.37 - 20.0))
    }

    fn packed<P: Packing>(a: &[u32]) -> Packed {
        let mut transposed = [0; SIDE * SIDE];
        let mut pairs = [[0; SIDE * SIDE]; 2];
        let mut put = [[bf16::ZERO; DEPTH]; 2];
        let sums = &sums();
        // SAFETY: a is 32 rows of 16 words with three behind each; the tests name a `P` whose instructions the CPU has.
        let rounded = unsafe {
            P::transpose(a.as_ptr().cast(), STRIDE * 4, &mut transposed);
            P::pair(a.as_ptr().cast(), 2 * STRIDE, pairs.each_mut());
            for (start, to) in [None, Some(a.as_ptr().cast())].into_iter().zip(&mut put) {
                P::put(sums.each_ref(), 0.5, start, to.as_mut_ptr());
            }
            P::round(&sums[0])
        };
        Packed { transposed, pairs, rounded, put }
    }

    #[test]
    fn plain_arithmetic_packs() {
        let a = numbers(WORDS, 1);
        let Packed { transposed, pairs, rounded, put } = packed::<Scalar>(&a);
        for i in 0..SIDE * SIDE {
            let (row, column) = (i / SIDE, i % SIDE);
            assert_eq!(transposed[column * SIDE + row], a[row * STRIDE + column]);
            for (tile, pairs) in pairs.iter().enumerate() {
                let (at, half) = ((tile * SIDE + column) / 2, column % 2);
                let both = [2 * row, 2 * row + 1].map(|row| number(&a, row * STRIDE + at, half));
                assert_eq!([number(pairs, i, 0), number(pairs, i, 1)], both);
            }
        }
        assert_eq!(rounded, sums()[0].map(bf16::from_f32));
        for (i, sum) in sums().into_iter().flatten().enumerate() {
            let start = number(&a, i / 2, i % 2);
            assert_eq!(put.map(|row| row[i]), [sum * 0.5, sum * 0.5 + start].map(bf16::from_f32));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_pack_the_same() {
        if crate::ops::cpu::Isa::available().any(|level| level == crate::ops::cpu::Isa::Avx512Bf16) {
            let a = numbers(WORDS, 1);
            assert_eq!(packed::<Avx512Bf16>(&a), packed::<Scalar>(&a));
        }
    }
}
