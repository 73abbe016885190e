//! Products of small matrices that are in the cache, for kernels that make what they multiply: c (+)= a·b.
//!
//! A [`Machine`] multiplies *units*: one number, or a pair of bf16 neighbours along the summed dimension, which
//! AVX512-BF16 multiplies and adds in fp32 (VDPBF16PS). So a factor is packed in units, wherever its dimensions lie.

use super::{Element, LANES, Level, Real};
use bytemuck::Pod;
use half::bf16;
use std::marker::PhantomData;

/// Rows of c that are in registers at a time; rows come in multiples of it.
pub const ROWS: usize = 4;

/// How a kernel multiplies what is stored as `Stored`.
pub trait Machine: Copy + Send + Sync {
    type Stored: Element<Wide = Self::Number>;
    /// What sums are in.
    type Number: Real + Pod;
    type Unit: Pod + Send + Sync;
    /// [`LANES`] numbers.
    type Vector: Copy;
    /// Numbers in a unit.
    const GROUP: usize;
    /// Vectors of a row of c that are in registers at a time.
    const COLUMNS: usize;

    /// Calls `f`, compiled for this machine.
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output;
    /// A unit of what is stored; `second` counts only in a pair.
    fn stored(first: Self::Stored, second: Self::Stored) -> Self::Unit;
    /// A unit of numbers, rounded; `second` counts only in a pair.
    fn unit(first: Self::Number, second: Self::Number) -> Self::Unit;

    /// # Safety
    /// `from` and `to` are [`LANES`] numbers, `b` is [`LANES`] units, and the machine is what this program runs on.
    unsafe fn load(from: *const Self::Number) -> Self::Vector;
    /// # Safety
    /// As for `load`.
    unsafe fn store(vector: Self::Vector, to: *mut Self::Number);
    /// sum + a·b in each lane.
    /// # Safety
    /// As for `load`.
    unsafe fn multiply_add(sum: Self::Vector, a: Self::Unit, b: *const Self::Unit) -> Self::Vector;
}

/// Stored numbers, widened and multiplied one by one.
#[derive(Clone, Copy, Debug)]
pub struct Plain<E>(Level, PhantomData<E>);

impl<E: Element> Plain<E> {
    pub fn new(level: Level) -> Self {
        Self(level, PhantomData)
    }
}

impl<E: Element<Wide: Pod>> Machine for Plain<E> {
    type Stored = E;
    type Number = E::Wide;
    type Unit = E::Wide;
    type Vector = [E::Wide; LANES];
    const GROUP: usize = 1;
    // AVX2 has 16 registers of 8 floats.
    const COLUMNS: usize = 1;

    #[inline(always)]
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output {
        self.0.run(f)
    }

    #[inline(always)]
    fn stored(first: E, _: E) -> E::Wide {
        first.wide()
    }

    #[inline(always)]
    fn unit(first: E::Wide, _: E::Wide) -> E::Wide {
        first
    }

    #[inline(always)]
    unsafe fn load(from: *const E::Wide) -> Self::Vector {
        // SAFETY: the caller's: LANES numbers, which an array of them needs no more alignment than.
        unsafe { from.cast::<Self::Vector>().read() }
    }

    #[inline(always)]
    unsafe fn store(vector: Self::Vector, to: *mut E::Wide) {
        // SAFETY: as for `load`.
        unsafe { to.cast::<Self::Vector>().write(vector) }
    }

    #[inline(always)]
    unsafe fn multiply_add(mut sum: Self::Vector, a: E::Wide, b: *const E::Wide) -> Self::Vector {
        // SAFETY: as for `load`.
        let b = unsafe { b.cast::<Self::Vector>().read() };
        for (sum, b) in sum.iter_mut().zip(b) {
            *sum = a.mul_add(b, *sum);
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
    /// If `level` is [`Level::Avx512Bf16`] and the machine has it.
    pub fn new(level: Level) -> Option<Self> {
        (level == Level::Avx512Bf16 && Level::available().any(|has| has == level)).then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Machine for Pairs {
    type Stored = bf16;
    type Number = f32;
    type Unit = u32;
    type Vector = std::arch::x86_64::__m512;
    const GROUP: usize = 2;
    const COLUMNS: usize = 4;

    #[inline(always)]
    fn run<F: pulp::NullaryFnOnce>(self, f: F) -> F::Output {
        Level::Avx512Bf16.run(f)
    }

    #[inline(always)]
    fn stored(first: bf16, second: bf16) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
    }

    #[inline(always)]
    fn unit(first: f32, second: f32) -> u32 {
        Self::stored(bf16::narrow(first), bf16::narrow(second))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        // SAFETY: the caller's; the load is unaligned.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(vector: Self::Vector, to: *mut f32) {
        // SAFETY: the caller's; the store is unaligned.
        unsafe { std::arch::x86_64::_mm512_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: Self::Vector, a: u32, b: *const u32) -> Self::Vector {
        use std::arch::x86_64::{__m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32};
        // SAFETY: the caller's; both types are 512 bits of any content.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a as i32));
            let b = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast()));
            _mm512_dpbf16_ps(sum, a, b)
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

/// c `[rows, columns]` = a `[rows, sum]` · b `[sum, columns]`, added to c if `add`; `sum` counts units. `b` and `c` have rows
/// of exactly `columns`, a multiple of [`LANES`]; rows are a multiple of [`ROWS`].
#[inline(always)]
pub fn multiply<M: Machine>(a: Left<M::Unit>, b: &[M::Unit], c: &mut [M::Number], columns: usize, add: bool) {
    let (sum, rows) = (b.len() / columns, c.len() / columns);
    assert!(columns.is_multiple_of(LANES) && rows.is_multiple_of(ROWS), "{rows} rows of {columns}");
    assert!(rows == 0 || sum == 0 || (rows - 1) * a.row + (sum - 1) * a.unit < a.units.len());
    let mut column = 0;
    while column < columns {
        let wide = columns - column >= M::COLUMNS * LANES;
        for row in (0..rows).step_by(ROWS) {
            // SAFETY: rows row..row + ROWS of a and c and the columns of b and c lie within, as asserted above;
            // `run` of the machine has called this.
            unsafe {
                let (b, c) = (b.as_ptr().add(column), c.as_mut_ptr().add(row * columns + column));
                if wide && M::COLUMNS == 4 {
                    block::<M, 4>(a, row, sum, b, c, columns, add);
                } else {
                    block::<M, 1>(a, row, sum, b, c, columns, add);
                }
            }
        }
        column += if wide { M::COLUMNS * LANES } else { LANES };
    }
}

/// [`ROWS`] rows of `N` vectors of c, in registers.
///
/// # Safety
/// Rows `row..row + ROWS` of `a` exist; `b` has `sum` rows and `c` has [`ROWS`] rows of `N · LANES`, `stride` apart.
#[inline(always)]
unsafe fn block<M: Machine, const N: usize>(
    a: Left<M::Unit>,
    row: usize,
    sum: usize,
    b: *const M::Unit,
    c: *mut M::Number,
    stride: usize,
    add: bool,
) {
    // SAFETY: the caller's.
    unsafe {
        let zeros = [M::Number::ZERO; LANES];
        let start = |r: usize, n: usize| {
            M::load(if add { c.add(r * stride + n * LANES).cast_const() } else { zeros.as_ptr() })
        };
        let mut sums: [[M::Vector; N]; ROWS] = std::array::from_fn(|r| std::array::from_fn(|n| start(r, n)));
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
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                M::store(sum, c.add(r * stride + n * LANES));
            }
        }
    }
}
