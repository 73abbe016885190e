//! Products of small matrices in the cache, c (+)= a·b, for kernels that produce their factors, as attention does.
//!
//! A [`MicroKernel`] multiplies *units*: one number, or a pair of bf16 neighbours along the summed dimension, which
//! AVX512-BF16 (VDPBF16PS) and AMX (TDPBF16PS) multiply and add in fp32. A factor is packed in units.

#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
#[cfg(test)]
use super::amx::Emulated;
use super::{
    Element, Isa, LANES, Real,
    amx::Tiles,
    packing::{BLOCK, Packing, ROW_BYTES, SIDE},
};
use bytemuck::Pod;
use half::bf16;
use std::marker::PhantomData;

/// Rows of c that vectors hold in registers at a time.
const VECTOR_ROWS: usize = 4;

/// Multiplication of matrices stored as `Stored`. A value exists only where the CPU has its instructions.
pub trait MicroKernel: Copy + Send + Sync {
    type Stored: Element<Accum = Self::Number>;
    /// The type of sums.
    type Number: Real + Pod;
    type Unit: Pod + Send + Sync;
    /// Numbers in a unit.
    const GROUP: usize;
    /// Rows of c are a multiple of it.
    const ROWS: usize;
    /// Columns of b and c are a multiple of it.
    const WIDTH: usize;
    /// Units of a row of a are a multiple of it.
    const UNITS: usize;

    /// Calls `f`, compiled for the CPU's instructions. The methods below are called inside of `f`.
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output;
    /// A unit of stored numbers; `second` counts only in a pair.
    fn stored(first: Self::Stored, second: Self::Stored) -> Self::Unit;
    /// A unit of numbers rounded to `Stored`; `second` counts only in a pair.
    #[inline(always)]
    fn unit(first: Self::Number, second: Self::Number) -> Self::Unit {
        Self::stored(Self::Stored::narrow(first), Self::Stored::narrow(second))
    }

    /// Rounds numbers to units along a row.
    #[inline(always)]
    fn pack(row: &[Self::Number], packed: &mut [Self::Unit]) {
        for (unit, group) in packed.iter_mut().zip(row.chunks_exact(Self::GROUP)) {
            *unit = Self::unit(group[0], group[Self::GROUP - 1]);
        }
    }

    /// Rounds the numbers `[rows, columns]` and packs their transpose as a left factor into `packed`, of as many
    /// numbers. Rows are a multiple of [`UNITS`](Self::UNITS) · [`GROUP`](Self::GROUP), columns of
    /// [`ROWS`](Self::ROWS).
    #[inline(always)]
    fn transposed<'a>(
        self,
        numbers: &[Self::Number],
        columns: usize,
        packed: &'a mut [Self::Unit],
    ) -> Left<'a, Self::Unit> {
        pack_pairs::<Self>(numbers, columns, packed);
        Left { units: packed, row: 1, unit: columns }
    }

    /// c `[rows, columns]` = a `[rows, sum]` · b `[sum, columns]`, added to c if `add`; `sum` counts units. b and c are
    /// dense.
    fn multiply(
        self,
        a: Left<Self::Unit>,
        b: &[Self::Unit],
        c: &mut [Self::Number],
        columns: usize,
        add: bool,
    );
}

/// A micro-kernel in vectors.
trait Vectors: MicroKernel {
    /// [`LANES`] numbers.
    type Vector: Copy;
    /// Vectors of a row of c held in registers at a time.
    const COLUMNS: usize;

    /// # Safety
    /// `from` is [`LANES`] readable numbers, and the CPU has this type's instructions.
    unsafe fn load(from: *const Self::Number) -> Self::Vector;
    /// # Safety
    /// `to` is [`LANES`] numbers to which nothing else refers, and the CPU has this type's instructions.
    unsafe fn store(vector: Self::Vector, to: *mut Self::Number);
    /// sum + a·b in each lane.
    ///
    /// # Safety
    /// `b` is [`LANES`] readable units, and the CPU has this type's instructions.
    unsafe fn multiply_add(sum: Self::Vector, a: Self::Unit, b: *const Self::Unit) -> Self::Vector;
}

/// Packs numbers `[rows, columns]` in units down the columns: `[rows / GROUP, columns]`.
#[inline(always)]
fn pack_pairs<M: MicroKernel>(numbers: &[M::Number], columns: usize, packed: &mut [M::Unit]) {
    let rows = numbers.chunks_exact(M::GROUP * columns);
    for (packed, rows) in packed.chunks_exact_mut(columns).zip(rows) {
        let (first, last) = (&rows[..columns], &rows[(M::GROUP - 1) * columns..]);
        for ((unit, &a), &b) in packed.iter_mut().zip(first).zip(last) {
            *unit = M::unit(a, b);
        }
    }
}

/// A unit of two neighbours along the summed dimension: the first in the low half, as the instructions want it.
#[inline(always)]
fn pair(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// Stored numbers, converted to their accumulation type and multiplied one by one.
#[derive(Clone, Copy, Debug)]
pub struct Plain<E>(Isa, PhantomData<E>);

impl<E: Element> Plain<E> {
    pub fn new(level: Isa) -> Self {
        Self(level, PhantomData)
    }
}

impl<E: Element<Accum: Pod>> MicroKernel for Plain<E> {
    type Stored = E;
    type Number = E::Accum;
    type Unit = E::Accum;
    const GROUP: usize = 1;
    const ROWS: usize = VECTOR_ROWS;
    const WIDTH: usize = LANES;
    const UNITS: usize = 1;

    #[inline(always)]
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output {
        self.0.run(f)
    }

    #[inline(always)]
    fn stored(first: E, _: E) -> E::Accum {
        first.to_accum()
    }

    #[inline(always)]
    fn unit(first: E::Accum, _: E::Accum) -> E::Accum {
        first
    }

    #[inline(always)]
    fn multiply(self, a: Left<E::Accum>, b: &[E::Accum], c: &mut [E::Accum], columns: usize, add: bool) {
        multiply::<Self>(a, b, c, columns, add);
    }
}

impl<E: Element<Accum: Pod>> Vectors for Plain<E> {
    type Vector = [E::Accum; LANES];
    // AVX2 has 16 registers of 8 floats.
    const COLUMNS: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const E::Accum) -> Self::Vector {
        // SAFETY: the caller promises LANES readable numbers; an array of them has the alignment of one.
        unsafe { from.cast::<Self::Vector>().read() }
    }

    #[inline(always)]
    unsafe fn store(vector: Self::Vector, to: *mut E::Accum) {
        // SAFETY: the caller promises LANES numbers of its own; an array of them has the alignment of one.
        unsafe { to.cast::<Self::Vector>().write(vector) }
    }

    #[inline(always)]
    unsafe fn multiply_add(mut sum: Self::Vector, a: E::Accum, b: *const E::Accum) -> Self::Vector {
        // SAFETY: the caller promises LANES readable units, which are numbers here.
        let b = unsafe { b.cast::<Self::Vector>().read() };
        // No iterator: one over an array made a build with little optimisation, as that of the tests, several times as
        // slow.
        let mut i = 0;
        while i < LANES {
            sum[i] = a.mul_add(b[i], sum[i]);
            i += 1;
        }
        sum
    }
}

/// Pairs of bf16 on AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub struct Pairs(());

#[cfg(target_arch = "x86_64")]
impl Pairs {
    /// `None` unless `level` is [`Isa::Avx512Bf16`] and the CPU has it.
    pub fn new(level: Isa) -> Option<Self> {
        (level == Isa::Avx512Bf16 && Isa::available().any(|has| has == level)).then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl MicroKernel for Pairs {
    type Stored = bf16;
    type Number = f32;
    type Unit = u32;
    const GROUP: usize = 2;
    const ROWS: usize = VECTOR_ROWS;
    const WIDTH: usize = LANES;
    const UNITS: usize = 1;

    #[inline(always)]
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output {
        Isa::Avx512Bf16.run(f)
    }

    #[inline(always)]
    fn stored(first: bf16, second: bf16) -> u32 {
        pair(first, second)
    }

    #[inline(always)]
    fn multiply(self, a: Left<u32>, b: &[u32], c: &mut [f32], columns: usize, add: bool) {
        multiply::<Self>(a, b, c, columns, add);
    }
}

#[cfg(target_arch = "x86_64")]
impl Vectors for Pairs {
    type Vector = std::arch::x86_64::__m512;
    const COLUMNS: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        // SAFETY: the caller promises 16 readable floats; the load is unaligned; `Pairs` exists only where there is
        // AVX-512.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(vector: Self::Vector, to: *mut f32) {
        // SAFETY: the caller promises 16 floats of its own; the store is unaligned; `Pairs` exists only where there is
        // AVX-512.
        unsafe { std::arch::x86_64::_mm512_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: Self::Vector, a: u32, b: *const u32) -> Self::Vector {
        use std::arch::x86_64::{__m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32};
        // SAFETY: the caller promises 16 readable units; the load is unaligned. Any 512 bits are a value of both types.
        // `Pairs` exists only where the CPU has AVX512-BF16.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a as i32));
            let b = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast()));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
}

/// Pairs of bf16 in tile registers.
#[derive(Clone, Copy, Debug)]
pub struct InTiles<T>(pub T);

impl<T: Tiles> MicroKernel for InTiles<T> {
    type Stored = bf16;
    type Number = f32;
    type Unit = u32;
    const GROUP: usize = 2;
    const ROWS: usize = BLOCK;
    const WIDTH: usize = BLOCK;
    const UNITS: usize = SIDE;

    #[inline(always)]
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output {
        self.0.run(f)
    }

    #[inline(always)]
    fn stored(first: bf16, second: bf16) -> u32 {
        pair(first, second)
    }

    #[inline(always)]
    fn pack(row: &[f32], packed: &mut [u32]) {
        let (rows, packed) = (row.as_chunks::<SIDE>().0, packed.as_chunks_mut::<{ SIDE / 2 }>().0);
        for (numbers, packed) in rows.iter().zip(packed) {
            // SAFETY: a `T` exists only where the CPU has the instructions of its packing.
            *packed = bytemuck::cast(unsafe { T::Packing::round(numbers) });
        }
    }

    #[inline(always)]
    fn transposed<'a>(self, numbers: &[f32], columns: usize, packed: &'a mut [u32]) -> Left<'a, u32> {
        let rows = numbers.len() / columns;
        assert!(
            rows.is_multiple_of(2 * SIDE)
                && columns.is_multiple_of(SIDE)
                && packed.len() >= rows / 2 * columns
        );
        let mut pairs = [0; SIDE * SIDE];
        let mut across = [0; SIDE * SIDE];
        for (block, rows_of) in numbers.chunks_exact(2 * SIDE * columns).enumerate() {
            for column in (0..columns).step_by(SIDE) {
                for (pairs, two) in
                    pairs.as_chunks_mut::<SIDE>().0.iter_mut().zip(rows_of.chunks_exact(2 * columns))
                {
                    let of = |row: usize| &two[row * columns + column..].as_chunks::<SIDE>().0[0];
                    // SAFETY: a `T` exists only where the CPU has the instructions of its packing.
                    let (first, second) = unsafe { (T::Packing::round(of(0)), T::Packing::round(of(1))) };
                    for (pair, (a, b)) in pairs.iter_mut().zip(first.into_iter().zip(second)) {
                        *pair = Self::stored(a, b);
                    }
                }
                // SAFETY: `pairs` is 16 rows of 64 bytes; a `T` exists only where the CPU has the instructions of its
                // packing.
                unsafe { T::Packing::transpose(pairs.as_ptr().cast(), ROW_BYTES, &mut across) };
                for (i, row) in across.as_chunks::<SIDE>().0.iter().enumerate() {
                    packed[(column + i) * (rows / 2) + block * SIDE..][..SIDE].copy_from_slice(row);
                }
            }
        }
        Left { units: packed, row: rows / 2, unit: 1 }
    }

    #[inline(always)]
    fn multiply(self, a: Left<u32>, b: &[u32], c: &mut [f32], columns: usize, add: bool) {
        let (sum, rows) = (b.len() / columns, c.len() / columns);
        assert!(
            rows.is_multiple_of(BLOCK)
                && columns.is_multiple_of(BLOCK)
                && sum.is_multiple_of(SIDE)
                && a.unit == 1,
            "whole tiles"
        );
        assert!(rows == 0 || sum == 0 || (rows - 1) * a.row + sum <= a.units.len());
        // SAFETY: this is called inside of `run`, as the trait demands; elsewhere tile instructions fault. These
        // registers are the only ones until this returns.
        let registers = &mut unsafe { self.0.registers() };
        for row in (0..rows).step_by(BLOCK) {
            for column in (0..columns).step_by(BLOCK) {
                // SAFETY: as asserted above, a has 32 rows of `sum` units from `row` on, b has `sum` rows and c 32 rows
                // from `row` on, both of 32 columns from `column` on. c is borrowed for writing.
                unsafe {
                    let a_row = a.units.as_ptr().add(row * a.row);
                    let (b, c) = (b.as_ptr().add(column), c.as_mut_ptr().add(row * columns + column));
                    in_tiles::<T>(registers, [a_row, b], c, [a.row, columns], sum, add);
                }
            }
        }
    }
}

/// The micro-kernels that multiply pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub enum Multiplier {
    #[cfg(target_arch = "x86_64")]
    Registers(InTiles<Amx>),
    #[cfg(target_arch = "x86_64")]
    Vectors(Pairs),
    /// Emulated registers, for tests on any machine.
    #[cfg(test)]
    Emulated(InTiles<Emulated>),
}

impl Multiplier {
    /// The multiplier of `level`, if it has one.
    pub fn of(level: Isa) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return match level {
            Isa::Amx => Amx::new().map(InTiles).map(Self::Registers),
            _ => Pairs::new(level).map(Self::Vectors),
        };
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = level;
            None
        }
    }
}

/// A left factor: `[rows, units]` in units, with any strides.
#[derive(Clone, Copy)]
pub struct Left<'a, U> {
    pub units: &'a [U],
    pub row: usize,
    pub unit: usize,
}

/// c `[rows, columns]` = a `[rows, sum]` · b `[sum, columns]`, added to c if `add`; `sum` counts units. b and c are
/// dense, columns a multiple of [`LANES`], rows of [`VECTOR_ROWS`].
#[inline(always)]
fn multiply<M: Vectors>(a: Left<M::Unit>, b: &[M::Unit], c: &mut [M::Number], columns: usize, add: bool) {
    let (sum, rows) = (b.len() / columns, c.len() / columns);
    assert!(columns.is_multiple_of(LANES) && rows.is_multiple_of(VECTOR_ROWS), "{rows} rows of {columns}");
    assert!(rows == 0 || sum == 0 || (rows - 1) * a.row + (sum - 1) * a.unit < a.units.len());
    let mut column = 0;
    while column < columns {
        let is_whole = columns - column >= M::COLUMNS * LANES;
        for row in (0..rows).step_by(VECTOR_ROWS) {
            // SAFETY: as asserted above, a and c have VECTOR_ROWS rows from `row` on, a of `sum` units; b and c have
            // the columns from `column` on that a block takes. An `M` exists only where the CPU has its instructions.
            unsafe {
                let (b, c) = (b.as_ptr().add(column), c.as_mut_ptr().add(row * columns + column));
                if is_whole && M::COLUMNS == 4 {
                    block::<M, 4>(a, row, sum, b, c, columns, add);
                } else {
                    block::<M, 1>(a, row, sum, b, c, columns, add);
                }
            }
        }
        column += if is_whole { M::COLUMNS * LANES } else { LANES };
    }
}

/// Computes [`VECTOR_ROWS`] rows of `N` vectors of c in registers.
///
/// # Safety
/// `a` has rows `row..row + VECTOR_ROWS` of `sum` units. `b` has `sum` rows and `c` has [`VECTOR_ROWS`] rows of `N ·
/// LANES`, `stride` apart, to which nothing else refers. The CPU has the instructions of `M`.
#[inline(always)]
unsafe fn block<M: Vectors, const N: usize>(
    a: Left<M::Unit>,
    row: usize,
    sum: usize,
    b: *const M::Unit,
    c: *mut M::Number,
    stride: usize,
    add: bool,
) {
    // SAFETY: the caller promises the rows of a, b and c that the loops below go through, each N vectors of LANES wide,
    // and the instructions of `M`.
    unsafe {
        // Plain loops: an array that `from_fn` makes, or `into_iter` takes apart, goes through memory and loses the
        // CPU's instructions wherever the compiler does not inline it.
        let mut sums = [[M::load([M::Number::ZERO; LANES].as_ptr()); N]; VECTOR_ROWS];
        if add {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = M::load(c.add(r * stride + n * LANES).cast_const());
                }
            }
        }
        let a_first = a.units.as_ptr().add(row * a.row);
        for k in 0..sum {
            let b = b.add(k * stride);
            let a_k = a_first.add(k * a.unit);
            for (r, sums) in sums.iter_mut().enumerate() {
                let unit = *a_k.add(r * a.row);
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = M::multiply_add(*sum, unit, b.add(n * LANES));
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                M::store(sum, c.add(r * stride + n * LANES));
            }
        }
    }
}

/// Computes [`BLOCK`] rows and columns of c: `sum` units of two rows of tiles of a, times two columns of tiles of b.
///
/// # Safety
/// a has [`BLOCK`] rows of `sum` units, `a_stride` units apart. b has `sum` rows and c has [`BLOCK`] rows of [`BLOCK`]
/// columns, `columns` apart. Nothing else refers to those of c. This is called inside of [`MicroKernel::run`].
#[inline(always)]
unsafe fn in_tiles<T: Tiles>(
    registers: &mut T::Registers,
    [a, b]: [*const u32; 2],
    c: *mut f32,
    [a_stride, columns]: [usize; 2],
    sum: usize,
    add: bool,
) {
    let stride = columns * 4;
    // SAFETY: the caller promises the rows of a, b and c, of which each load and store takes 16, and configured
    // registers.
    unsafe {
        let corner = |row: usize, column: usize| c.add(row * SIDE * columns + column * SIDE).cast::<u8>();
        if add {
            T::load::<0>(registers, corner(0, 0), stride);
            T::load::<1>(registers, corner(0, 1), stride);
            T::load::<2>(registers, corner(1, 0), stride);
            T::load::<3>(registers, corner(1, 1), stride);
        } else {
            T::zero::<0>(registers);
            T::zero::<1>(registers);
            T::zero::<2>(registers);
            T::zero::<3>(registers);
        }
        for k in (0..sum).step_by(SIDE) {
            T::load::<4>(registers, a.add(k).cast(), a_stride * 4);
            T::load::<6>(registers, b.add(k * columns).cast(), stride);
            T::multiply_add::<0, 4, 6>(registers);
            T::load::<7>(registers, b.add(k * columns + SIDE).cast(), stride);
            T::multiply_add::<1, 4, 7>(registers);
            T::load::<5>(registers, a.add(SIDE * a_stride + k).cast(), a_stride * 4);
            T::multiply_add::<2, 5, 6>(registers);
            T::multiply_add::<3, 5, 7>(registers);
        }
        T::store::<0>(registers, corner(0, 0), stride);
        T::store::<1>(registers, corner(0, 1), stride);
        T::store::<2>(registers, corner(1, 0), stride);
        T::store::<3>(registers, corner(1, 1), stride);
    }
}
