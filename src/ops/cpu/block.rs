//! The micro-kernel of a large product: a block of 32 rows and columns, summed in registers over terms whose factors
//! are [tiles](super::packing). It works in tile registers, or in vectors that multiply pairs.

use super::{
    amx::Tiles,
    packing::{NUMBERS, Packing, ROW_BYTES, SIDE},
    tile::{InTiles, MicroKernel},
};
use half::bf16;

/// A tile of bf16 numbers.
pub type Tile = [bf16; NUMBERS];

/// The sums of a block: the upper two tiles, then the lower two.
pub type Sums = [[[f32; SIDE]; SIDE]; 4];

/// Tiles along the sum of one term.
#[derive(Clone, Copy)]
pub struct Stretch {
    pub tiles: usize,
    pub left: Place,
    /// The first of a column of tiles, which lie one behind the other.
    pub right: *const Tile,
    /// Tiles from a tile to its neighbour in the column on the right.
    pub next_column: usize,
}

/// Two rows of tiles of a left factor, as they lie in memory.
#[derive(Clone, Copy)]
pub struct Place {
    /// The first tile of the upper row of tiles.
    pub first: *const u8,
    /// Bytes from a row of a tile to the next.
    pub row: usize,
    /// Bytes from a tile to the next along the sum.
    pub along: usize,
    /// Bytes from the upper row of tiles to the lower.
    pub lower: usize,
}

/// A micro-kernel that computes blocks. A value exists only where the CPU has its instructions.
pub trait Blocks: MicroKernel {
    /// The CPU has its instructions where a value of this type exists.
    type Packing: Packing;

    /// Tiles of right factors packed at a time: most of a second-level cache.
    const PACKED_TILES: usize;

    /// Computes the sums over `stretches`, added to `sums` if `add`. Sums beyond the first `rows` and `columns`
    /// (`shape`) have any value.
    ///
    /// # Safety
    /// All tiles of the stretches can be read, those of the second row and column too, and have no writer. Right tiles
    /// start at multiples of 64 bytes. This is called inside of [`run`](MicroKernel::run).
    unsafe fn block(
        self,
        stretches: impl Iterator<Item = Stretch> + Clone,
        shape: [usize; 2],
        sums: &mut Sums,
        add: bool,
    );
}

impl<T: Tiles> Blocks for InTiles<T> {
    type Packing = T::Packing;

    // Most of 2 MiB.
    const PACKED_TILES: usize = 1296;

    #[inline(always)]
    unsafe fn block(
        self,
        stretches: impl Iterator<Item = Stretch> + Clone,
        [rows, columns]: [usize; 2],
        sums: &mut Sums,
        add: bool,
    ) {
        // SAFETY: the caller keeps the contract of `Blocks::block`, which is that of `in_tiles` too.
        unsafe {
            match [rows > SIDE, columns > SIDE] {
                [true, true] => in_tiles::<T, true, true>(self.0, stretches, sums, add),
                [true, false] => in_tiles::<T, true, false>(self.0, stretches, sums, add),
                [false, true] => in_tiles::<T, false, true>(self.0, stretches, sums, add),
                [false, false] => in_tiles::<T, false, false>(self.0, stretches, sums, add),
            }
        }
    }
}

/// Computes all four tiles of sums, or only those of the upper row without `LOWER`, of the left column without `RIGHT`.
///
/// # Safety
/// The contract of [`Blocks::block`].
#[inline(always)]
unsafe fn in_tiles<T: Tiles, const LOWER: bool, const RIGHT: bool>(
    tiles: T,
    stretches: impl Iterator<Item = Stretch>,
    sums: &mut Sums,
    add: bool,
) {
    // SAFETY: `sums` is four tiles of 16 dense rows of 64 bytes. The caller promises that the tiles of all stretches
    // can be read, and that this is inside of `run`, where the registers are configured.
    unsafe {
        let registers = &mut tiles.registers();
        let [s0, s1, s2, s3] = sums.each_mut().map(|tile| tile.as_mut_ptr().cast::<u8>());
        if add {
            T::load::<0>(registers, s0, ROW_BYTES);
            T::load::<1>(registers, s1, ROW_BYTES);
            T::load::<2>(registers, s2, ROW_BYTES);
            T::load::<3>(registers, s3, ROW_BYTES);
        } else {
            T::zero::<0>(registers);
            T::zero::<1>(registers);
            T::zero::<2>(registers);
            T::zero::<3>(registers);
        }
        for Stretch { tiles, left, right, next_column } in stretches {
            for k in 0..tiles {
                let upper = left.first.add(k * left.along);
                T::load::<4>(registers, upper, left.row);
                T::load_once::<6>(registers, right.add(k).cast(), ROW_BYTES);
                T::multiply_add::<0, 4, 6>(registers);
                if RIGHT {
                    T::load_once::<7>(registers, right.add(next_column + k).cast(), ROW_BYTES);
                    T::multiply_add::<1, 4, 7>(registers);
                }
                if LOWER {
                    T::load::<5>(registers, upper.add(left.lower), left.row);
                    T::multiply_add::<2, 5, 6>(registers);
                    if RIGHT {
                        T::multiply_add::<3, 5, 7>(registers);
                    }
                }
            }
        }
        T::store::<0>(registers, s0, ROW_BYTES);
        T::store::<1>(registers, s1, ROW_BYTES);
        T::store::<2>(registers, s2, ROW_BYTES);
        T::store::<3>(registers, s3, ROW_BYTES);
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use super::*;
    use crate::ops::cpu::{
        packing::{Avx512Bf16, BLOCK},
        tile::Pairs,
    };
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    impl Blocks for Pairs {
        type Packing = Avx512Bf16;

        // Most of 1 MiB.
        const PACKED_TILES: usize = 640;

        #[inline(always)]
        unsafe fn block(
            self,
            stretches: impl Iterator<Item = Stretch> + Clone,
            [rows, columns]: [usize; 2],
            sums: &mut Sums,
            add: bool,
        ) {
            // 16 of the 32 registers hold sums: enough independent ones to hide the latency of each.
            // SAFETY: the caller keeps the contract of `Blocks::block`; `Pairs` exists only where the CPU has
            // AVX512-BF16; rows go up in steps of `ROWS` below 32.
            unsafe {
                if columns > SIDE {
                    for row in (0..rows.min(BLOCK)).step_by(8) {
                        in_vectors::<8, 2>(stretches.clone(), row, sums, add);
                    }
                } else {
                    for row in (0..rows.min(BLOCK)).step_by(SIDE) {
                        in_vectors::<SIDE, 1>(stretches.clone(), row, sums, add);
                    }
                }
            }
        }
    }

    /// A pair of bf16 numbers at any address.
    #[derive(Clone, Copy)]
    #[repr(C, packed)]
    struct Word(i32);

    /// Computes `ROWS` rows, a divisor of 16, of `N` tiles side by side.
    ///
    /// # Safety
    /// The contract of [`Blocks::block`]. `row` is below 32 and a multiple of `ROWS`. The CPU has AVX512-BF16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn in_vectors<const ROWS: usize, const N: usize>(
        stretches: impl Iterator<Item = Stretch>,
        row: usize,
        sums: &mut Sums,
        add: bool,
    ) {
        let (below, row) = (row / SIDE, row % SIDE);
        // SAFETY: the caller promises readable tiles, the right ones at multiples of 64 bytes as `__m512bh` wants; a
        // `Word` is packed, so it may lie anywhere. The rows of `sums` are 16 floats. Any 512 bits are a value of both
        // vector types.
        unsafe {
            let zero = _mm512_setzero_ps();
            let mut totals = [[zero; N]; ROWS];
            if add {
                for (r, totals) in totals.iter_mut().enumerate() {
                    for (n, total) in totals.iter_mut().enumerate() {
                        *total = _mm512_loadu_ps(sums[2 * below + n][row + r].as_ptr());
                    }
                }
            }
            for Stretch { tiles, left, right, next_column } in stretches {
                let first = left.first.add(below * left.lower + row * left.row);
                let mut pair = 0;
                while pair < tiles * SIDE {
                    // No iterators in these loops: they made a build with little optimisation five times as slow.
                    let rights = right.cast::<__m512bh>().wrapping_add(pair);
                    let lefts =
                        first.wrapping_add(pair / SIDE * left.along + pair % SIDE * size_of::<Word>());
                    let mut r = 0;
                    while r < ROWS {
                        let word = (*lefts.wrapping_add(r * left.row).cast::<Word>()).0;
                        let word = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(word));
                        let mut n = 0;
                        while n < N {
                            let right = *rights.wrapping_add(n * next_column * SIDE);
                            totals[r][n] = _mm512_dpbf16_ps(totals[r][n], word, right);
                            n += 1;
                        }
                        r += 1;
                    }
                    pair += 1;
                }
            }
            for (r, totals) in totals.into_iter().enumerate() {
                for (n, total) in totals.into_iter().enumerate() {
                    _mm512_storeu_ps(sums[2 * below + n][row + r].as_mut_ptr(), total);
                }
            }
        }
    }
}
