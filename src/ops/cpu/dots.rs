//! Products whose sums run in one order, whatever the number of rows: out = start + bias + scale · x·wᵀ.
//!
//! Each number of the output is one dot product along rows of x and w: in [`LANES`] partial sums, front to back, which
//! are added by halves at the end. Blocks of rows and columns share loads and no sums, so a row gets the same bits
//! alone and beside any others. Nothing is packed: with few rows the time is that of reading w. A w of packed tiles of
//! `quant` is decoded by each task, for the columns that it computes.

use super::{
    Element, Isa, LANES, Real, Rows,
    decode::PackedRows,
    lanes, pool,
    scratch::{Memory, words},
};
use crate::quant::Decoded;
use half::bf16;
use pulp::NullaryFnOnce;
use std::{marker::PhantomData, ops::Range};
use tch::{Kind, Tensor};

/// Columns of an output that are computed together.
const COLUMNS: usize = 4;

/// Bytes of w that a task reads for all rows of x: they stay in a second-level cache.
const CACHED: usize = 1 << 17;

/// Multiplications below which another thread costs more than it saves.
const LEAST: usize = 1 << 15;

/// Start and factor of a sum.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// `[rows, columns]`, perhaps the output itself.
    pub rows: Option<&'a Tensor>,
    /// `[columns]`
    pub bias: Option<&'a Tensor>,
    pub scale: f64,
}

impl Start<'_> {
    /// The product alone.
    pub const NOTHING: Start<'static> = Start { rows: None, bias: None, scale: 1.0 };
}

/// The factor w `[columns, depth]`.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    Plain(&'a Tensor),
    Packed(PackedRows<'a>),
}

impl<'a> From<&'a Tensor> for Factor<'a> {
    fn from(w: &'a Tensor) -> Self {
        Self::Plain(w)
    }
}

/// out `[rows, columns]` = start + bias + scale · x·wᵀ, from x `[rows, depth]` and w `[columns, depth]`, rounded once.
///
/// # Panics
/// Shapes or kinds do not agree, or the output overlaps a factor, or partly overlaps the matrix it starts from.
pub fn multiply<'a>(x: &Tensor, w: impl Into<Factor<'a>>, start: Start, out: &Tensor) {
    let (level, w) = (Isa::current(), w.into());
    match x.kind() {
        Kind::BFloat16 => {
            let product = Product::<bf16>::new(x, w, start, out);
            #[cfg(target_arch = "x86_64")]
            if x86::compute_pairs(&product, level) || x86::compute(&product, level) {
                return;
            }
            product.compute(Plain(level, PhantomData));
        }
        Kind::Float => {
            let product = Product::<f32>::new(x, w, start, out);
            #[cfg(target_arch = "x86_64")]
            if x86::compute(&product, level) {
                return;
            }
            product.compute(Plain(level, PhantomData));
        }
        _ => Product::<f64>::new(x, w, start, out).compute(Plain(level, PhantomData)),
    }
}

/// Rows of w, each a column of the output.
enum Columns<'a, E> {
    Plain(Rows<'a, E>),
    Packed(PackedRows<'a>),
}

/// A product as its threads share it.
struct Product<'a, E: Element> {
    x: Rows<'a, E>,
    w: Columns<'a, E>,
    start: Option<Rows<'a, E>>,
    bias: Option<Rows<'a, E>>,
    scale: E::Accum,
    out: Rows<'a, E>,
}

impl<'a, E: Element + Decoded> Product<'a, E> {
    fn new(x: &'a Tensor, w: Factor<'a>, start: Start<'a>, out: &'a Tensor) -> Self {
        let Start { rows, bias, scale } = start;
        let [start, bias] = [rows, bias].map(|tensor| tensor.map(Rows::<E>::of));
        let is_itself = rows.is_some_and(|rows| rows.data_ptr() == out.data_ptr());
        let is_same = is_itself && rows.map(Tensor::stride) == Some(out.stride());
        let [x, out] = [x, out].map(Rows::<E>::of);
        let (w, [columns, depth], is_apart) = match w {
            Factor::Plain(w) => {
                let w = Rows::of(w);
                (Columns::Plain(w), [w.len(), w.columns()], out.is_apart_from(&w))
            }
            Factor::Packed(w) => {
                let is_apart = w.footprints().all(|bytes| !out.overlaps(&bytes));
                (Columns::Packed(w), w.shape(), is_apart)
            }
        };
        assert_eq!([out.len(), out.columns(), x.columns()], [x.len(), columns, depth], "factors fit");
        assert!(out.is_apart_from(&x) && is_apart, "an output overlaps a factor");
        if let Some(start) = &start {
            assert_eq!([start.len(), start.columns()], [out.len(), out.columns()], "the start fits");
            assert!(is_same || out.is_apart_from(start), "an output partly overlaps its start");
        }
        if let Some(bias) = &bias {
            assert_eq!([bias.len(), bias.columns()], [1, out.columns()], "the bias fits");
            assert!(out.is_apart_from(bias), "an output overlaps its bias");
        }
        Self { x, w, start, bias, scale: E::Accum::of(scale), out }
    }

    /// Computes all parts, on several threads where that is faster.
    fn compute<D: Dot<Stored = E>>(&self, dot: D) {
        let (rows, columns, depth) = (self.out.len(), self.out.columns(), self.x.columns().max(1));
        if rows == 0 || columns == 0 {
            return;
        }
        let threads = if rows * columns * depth < LEAST { 1 } else { pool::threads() };
        let blocks = columns.div_ceil(COLUMNS);
        let cached = (CACHED / (depth * size_of::<E>() * COLUMNS)).max(1);
        let beside = blocks.div_ceil(cached).next_multiple_of(threads).min(blocks);
        let below = threads.div_ceil(beside).min(rows);
        let cut = |i: usize, of: usize, n: usize| i * n / of..(i + 1) * n / of;
        let part = |i: usize| {
            let Range { start, end } = cut(i % beside, beside, blocks);
            let columns = start * COLUMNS..columns.min(end * COLUMNS);
            let rows = cut(i / beside, below, rows);
            match self.w {
                Columns::Plain(w) => {
                    // SAFETY: `new` found the output apart from w, which so has no writer.
                    let of = |column| unsafe { w.row(column) };
                    dot.run(Part::<D, _> { product: self, rows, columns, of });
                }
                Columns::Packed(w) => {
                    let numbers = columns.len() * depth;
                    let mut memory = Memory::take(words::<E>(numbers));
                    let decoded = memory.scratch().cut::<E>(numbers);
                    let (first, width) = (columns.start, self.x.columns());
                    w.decode(columns.clone(), 0..width, width, decoded);
                    let of = |column: usize| &decoded[(column - first) * width..][..width];
                    dot.run(Part::<D, _> { product: self, rows, columns, of });
                }
            }
        };
        if threads == 1 { (0..beside * below).for_each(part) } else { pool::tasks(beside * below, part) }
    }
}

/// Rows and columns of a product that one thread computes.
struct Part<'a, D: Dot, W> {
    product: &'a Product<'a, D::Stored>,
    rows: Range<usize>,
    columns: Range<usize>,
    /// The row of w of a column.
    of: W,
}

impl<'a, D: Dot, W: Fn(usize) -> &'a [D::Stored]> NullaryFnOnce for Part<'a, D, W> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Range { start: mut row, end } = self.rows;
        while row < end {
            let rows = (end - row).min(D::ROWS);
            match rows {
                1 => self.rows::<1>(row, rows),
                2 => self.rows::<2>(row, rows),
                _ => self.rows::<4>(row, rows),
            }
            row += rows;
        }
    }
}

impl<'a, D: Dot, W: Fn(usize) -> &'a [D::Stored]> Part<'a, D, W> {
    /// Computes `rows` rows from `first` on, at most `R`.
    #[inline(always)]
    fn rows<const R: usize>(&self, first: usize, rows: usize) {
        let x = &self.product.x;
        // SAFETY: `Product::new` found the output apart from x, which so has no writer.
        let x: [&[D::Stored]; R] = std::array::from_fn(|r| unsafe { x.row(first + r.min(rows - 1)) });
        let mut column = self.columns.start;
        while column < self.columns.end {
            let columns = (self.columns.end - column).min(COLUMNS);
            let w: [&[D::Stored]; COLUMNS] = std::array::from_fn(|c| (self.of)(column + c.min(columns - 1)));
            // SAFETY: `call` runs inside of `D::run`. All rows have as many numbers, see `Product::new`.
            let sums = unsafe { block::<D, R>(x, w) };
            for (r, sums) in sums.iter().enumerate().take(rows) {
                self.put(first + r, column..column + columns, sums);
            }
            column += COLUMNS;
        }
    }

    /// Writes the finished sums of some columns of a row.
    #[inline(always)]
    fn put(&self, row: usize, columns: Range<usize>, sums: &[<D::Stored as Element>::Accum; COLUMNS]) {
        let Product { start, bias, scale, out, .. } = self.product;
        let mut values = *sums;
        for value in &mut values {
            *value = *value * *scale;
        }
        for (from, row) in [(bias, 0), (start, row)] {
            if let Some(from) = from {
                // SAFETY: the bias is apart from the output. What the sums start from is too, or is the output itself:
                // then these columns have no other user than this thread, and the slice is gone when they are written.
                let from = unsafe { from.part(row, columns.clone()) };
                for (value, &from) in values.iter_mut().zip(from) {
                    *value += from.to_accum();
                }
            }
        }
        // SAFETY: parts have other rows or columns, so these numbers are this thread's alone.
        let out = unsafe { out.part_mut(row, columns) };
        for (out, &value) in out.iter_mut().zip(&values) {
            *out = D::Stored::narrow(value);
        }
    }
}

/// Dot products of rows of numbers. A value exists only where the CPU has its instructions.
trait Dot: Copy + Send + Sync {
    type Stored: Element;
    /// Numbers that a step reads.
    type Numbers: Copy;
    /// The partial sums of one dot product.
    type Sums: Copy;
    /// Numbers in `Numbers`.
    const STEP: usize;
    /// Rows whose sums with [`COLUMNS`] columns fit the registers: 1, 2 or 4.
    const ROWS: usize;

    /// Calls `f`, compiled for the CPU's instructions. The functions below are called inside of `f`.
    fn run<F: NullaryFnOnce>(self, f: F) -> F::Output;
    fn zero() -> Self::Sums;
    /// # Safety
    /// `from` is [`STEP`](Self::STEP) readable numbers; this is called inside of `run`.
    unsafe fn load(from: *const Self::Stored) -> Self::Numbers;
    /// sums + x·w, lane by lane.
    ///
    /// # Safety
    /// This is called inside of `run`.
    unsafe fn multiply_add(sums: Self::Sums, x: Self::Numbers, w: Self::Numbers) -> Self::Sums;
    /// The sum of the partial sums, of each dot product.
    ///
    /// # Safety
    /// This is called inside of `run`.
    unsafe fn totals(sums: [Self::Sums; COLUMNS]) -> [<Self::Stored as Element>::Accum; COLUMNS];
}

/// The dot products of `R` rows with [`COLUMNS`] others, all of one length.
///
/// # Safety
/// This is called inside of `D::run`. The rows have as many numbers each.
#[inline(always)]
unsafe fn block<D: Dot, const R: usize>(
    x: [&[D::Stored]; R],
    w: [&[D::Stored]; COLUMNS],
) -> [[<D::Stored as Element>::Accum; COLUMNS]; R] {
    let depth = w[0].len();
    let whole = depth / D::STEP * D::STEP;
    let mut sums = [[D::zero(); COLUMNS]; R];
    // SAFETY: the caller promises rows of `depth` numbers, of which each step reads STEP that are there, and `run`.
    unsafe {
        // No iterators in these loops: they made a build with little optimisation five times as slow.
        let mut k = 0;
        while k < whole {
            step::<D, R>(&mut sums, x.map(|x| x.as_ptr().add(k)), w.map(|w| w.as_ptr().add(k)));
            k += D::STEP;
        }
        if whole < depth {
            let x = x.map(|x| last::<D>(&x[whole..]));
            let w = w.map(|w| last::<D>(&w[whole..]));
            step::<D, R>(&mut sums, x.each_ref().map(|x| x.as_ptr()), w.each_ref().map(|w| w.as_ptr()));
        }
        // No closure: one that is not inlined is compiled without the CPU's instructions, and calls each of them.
        let mut totals = [[<D::Stored as Element>::Accum::ZERO; COLUMNS]; R];
        let mut r = 0;
        while r < R {
            totals[r] = D::totals(sums[r]);
            r += 1;
        }
        totals
    }
}

/// The numbers behind the last whole step, and zeros.
#[inline(always)]
fn last<D: Dot>(rest: &[D::Stored]) -> [D::Stored; MOST_STEP] {
    let mut numbers = [D::Stored::narrow(Real::of(0.0)); MOST_STEP];
    numbers[..rest.len()].copy_from_slice(rest);
    numbers
}

/// The longest step.
const MOST_STEP: usize = 2 * LANES;

/// Adds the products of the next numbers.
///
/// # Safety
/// The contract of [`block`]; all pointers are to `D::STEP` readable numbers.
#[inline(always)]
unsafe fn step<D: Dot, const R: usize>(
    sums: &mut [[D::Sums; COLUMNS]; R],
    x: [*const D::Stored; R],
    w: [*const D::Stored; COLUMNS],
) {
    // SAFETY: the caller promises what each call needs.
    unsafe {
        let w = [D::load(w[0]), D::load(w[1]), D::load(w[2]), D::load(w[3])];
        let mut r = 0;
        while r < R {
            let x = D::load(x[r]);
            let mut c = 0;
            while c < COLUMNS {
                sums[r][c] = D::multiply_add(sums[r][c], x, w[c]);
                c += 1;
            }
            r += 1;
        }
    }
}

/// Any numbers, on any CPU.
#[derive(Clone, Copy)]
struct Plain<E>(Isa, PhantomData<E>);

impl<E: Element> Dot for Plain<E> {
    type Stored = E;
    type Numbers = [E::Accum; LANES];
    type Sums = [E::Accum; LANES];
    const STEP: usize = LANES;
    const ROWS: usize = 1;

    #[inline(always)]
    fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
        self.0.run(f)
    }

    #[inline(always)]
    fn zero() -> Self::Sums {
        [E::Accum::ZERO; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const E) -> Self::Numbers {
        // SAFETY: the caller promises LANES numbers; an array of them has the alignment of one.
        let stored = unsafe { from.cast::<[E; LANES]>().read() };
        let mut numbers = [E::Accum::ZERO; LANES];
        let mut i = 0;
        while i < LANES {
            numbers[i] = stored[i].to_accum();
            i += 1;
        }
        numbers
    }

    #[inline(always)]
    unsafe fn multiply_add(mut sums: Self::Sums, x: Self::Numbers, w: Self::Numbers) -> Self::Sums {
        let mut i = 0;
        while i < LANES {
            sums[i] = x[i].mul_add(w[i], sums[i]);
            i += 1;
        }
        sums
    }

    #[inline(always)]
    unsafe fn totals(sums: [Self::Sums; COLUMNS]) -> [E::Accum; COLUMNS] {
        let mut totals = [E::Accum::ZERO; COLUMNS];
        let mut c = 0;
        while c < COLUMNS {
            totals[c] = lanes::total(sums[c]);
            c += 1;
        }
        totals
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::{
        __m128, __m256, __m512, __m512bh, __m512i, _mm_add_ps, _mm_loadu_si128, _mm_movehl_ps, _mm_movelh_ps,
        _mm_unpackhi_ps, _mm_unpacklo_ps, _mm256_add_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
        _mm256_cvtepu16_epi32, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
        _mm256_slli_epi32, _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
        _mm512_dpbf16_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_slli_epi32,
    };

    /// Computes pairs of bf16. False below [`Isa::Avx512Bf16`], or where the CPU has none.
    pub fn compute_pairs(product: &Product<bf16>, level: Isa) -> bool {
        Pairs::of(level).map(|dot| product.compute(dot)).is_some()
    }

    /// Computes with numbers as fp32. False below [`Isa::Avx2`], or where the CPU has none. The compiler's own code for
    /// [`Plain`] takes one number at a time, an eighth of the speed.
    pub fn compute<E: Widened + Decoded>(product: &Product<E>, level: Isa) -> bool {
        let by_avx512 = Avx512::of(level).map(|dot| product.compute(dot));
        by_avx512.or_else(|| Avx2::of(level).map(|dot| product.compute(dot))).is_some()
    }

    /// True if `level` allows `wanted` and the CPU has it.
    fn has(level: Isa, wanted: Isa) -> bool {
        level >= wanted && Isa::available().any(|has| has == wanted)
    }

    /// Pairs of bf16 on AVX512-BF16.
    #[derive(Clone, Copy)]
    struct Pairs(());

    impl Pairs {
        fn of(level: Isa) -> Option<Self> {
            has(level, Isa::Avx512Bf16).then_some(Self(()))
        }
    }

    /// fp32 on AVX-512.
    #[derive(Clone, Copy)]
    struct Avx512<E>(PhantomData<E>);

    impl<E> Avx512<E> {
        fn of(level: Isa) -> Option<Self> {
            has(level, Isa::Avx512).then_some(Self(PhantomData))
        }
    }

    /// fp32 on AVX2 with FMA.
    #[derive(Clone, Copy)]
    struct Avx2<E>(PhantomData<E>);

    impl<E> Avx2<E> {
        fn of(level: Isa) -> Option<Self> {
            has(level, Isa::Avx2).then_some(Self(PhantomData))
        }
    }

    /// Numbers that are loaded as fp32.
    pub trait Widened: Element<Accum = f32> {
        /// # Safety
        /// `from` is [`LANES`] readable numbers, and the CPU has AVX-512.
        unsafe fn load_512(from: *const Self) -> __m512;
        /// # Safety
        /// `from` is [`LANES`] readable numbers, and the CPU has AVX2.
        unsafe fn load_256(from: *const Self) -> [__m256; 2];
    }

    impl Widened for f32 {
        #[inline(always)]
        unsafe fn load_512(from: *const f32) -> __m512 {
            // SAFETY: the caller promises 16 numbers and the instructions; the load is unaligned.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_256(from: *const f32) -> [__m256; 2] {
            // SAFETY: the caller promises 16 numbers and the instructions; the loads are unaligned.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
    }

    // The bits of a bf16 are the upper half of those of the fp32.
    impl Widened for bf16 {
        #[inline(always)]
        unsafe fn load_512(from: *const bf16) -> __m512 {
            // SAFETY: the caller promises 16 numbers, 32 bytes, and the instructions; the load is unaligned.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }

        #[inline(always)]
        unsafe fn load_256(from: *const bf16) -> [__m256; 2] {
            // SAFETY: the caller promises 16 numbers, twice 16 bytes, and the instructions; the loads are unaligned.
            unsafe {
                let first = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                let second = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
                ]
            }
        }
    }

    /// Adds halves, twice.
    ///
    /// # Safety
    /// The CPU has AVX-512.
    #[inline(always)]
    unsafe fn quarter(sums: __m512) -> __m128 {
        // SAFETY: the caller promises the instructions.
        unsafe {
            let half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
            _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
        }
    }

    /// Adds by halves, as [`lanes::total`] does, four dot products at a time.
    ///
    /// # Safety
    /// The CPU has AVX-512.
    #[inline(always)]
    unsafe fn totals(sums: [__m512; COLUMNS]) -> [f32; COLUMNS] {
        // SAFETY: the caller promises the instructions. A vector of four floats is an array of them.
        unsafe {
            let [a, b, c, d] = [quarter(sums[0]), quarter(sums[1]), quarter(sums[2]), quarter(sums[3])];
            let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
            let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
            let all = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
            std::mem::transmute::<__m128, [f32; COLUMNS]>(all)
        }
    }

    impl Dot for Pairs {
        type Stored = bf16;
        type Numbers = __m512i;
        type Sums = __m512;
        const STEP: usize = 2 * LANES;
        const ROWS: usize = 4;

        #[inline(always)]
        fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
            Isa::Avx512Bf16.run(f)
        }

        #[inline(always)]
        fn zero() -> __m512 {
            bytemuck::Zeroable::zeroed()
        }

        #[inline(always)]
        unsafe fn load(from: *const bf16) -> __m512i {
            // SAFETY: the caller promises 32 numbers; the load is unaligned; a `Pairs` exists only where there is
            // AVX-512.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
            // SAFETY: any 512 bits are a value of both types; a `Pairs` exists only where there is AVX512-BF16.
            unsafe {
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                let w = std::mem::transmute::<__m512i, __m512bh>(w);
                _mm512_dpbf16_ps(sums, x, w)
            }
        }

        #[inline(always)]
        unsafe fn totals(sums: [__m512; COLUMNS]) -> [f32; COLUMNS] {
            // SAFETY: a `Pairs` exists only where there is AVX-512.
            unsafe { totals(sums) }
        }
    }

    impl<E: Widened> Dot for Avx512<E> {
        type Stored = E;
        type Numbers = __m512;
        type Sums = __m512;
        const STEP: usize = LANES;
        const ROWS: usize = 4;

        #[inline(always)]
        fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
            Isa::Avx512.run(f)
        }

        #[inline(always)]
        fn zero() -> __m512 {
            bytemuck::Zeroable::zeroed()
        }

        #[inline(always)]
        unsafe fn load(from: *const E) -> __m512 {
            // SAFETY: the caller promises 16 numbers; an `Avx512` exists only where there is AVX-512.
            unsafe { E::load_512(from) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: __m512, x: __m512, w: __m512) -> __m512 {
            // SAFETY: an `Avx512` exists only where there is AVX-512.
            unsafe { _mm512_fmadd_ps(x, w, sums) }
        }

        #[inline(always)]
        unsafe fn totals(sums: [__m512; COLUMNS]) -> [f32; COLUMNS] {
            // SAFETY: an `Avx512` exists only where there is AVX-512.
            unsafe { totals(sums) }
        }
    }

    impl<E: Widened> Dot for Avx2<E> {
        type Stored = E;
        type Numbers = [__m256; 2];
        type Sums = [__m256; 2];
        const STEP: usize = LANES;
        // There are 16 registers of 8 floats.
        const ROWS: usize = 1;

        #[inline(always)]
        fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
            Isa::Avx2.run(f)
        }

        #[inline(always)]
        fn zero() -> [__m256; 2] {
            bytemuck::Zeroable::zeroed()
        }

        #[inline(always)]
        unsafe fn load(from: *const E) -> [__m256; 2] {
            // SAFETY: the caller promises 16 numbers; an `Avx2` exists only where there is AVX2.
            unsafe { E::load_256(from) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: [__m256; 2], x: [__m256; 2], w: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: an `Avx2` exists only where there are AVX2 and FMA.
            unsafe { [_mm256_fmadd_ps(x[0], w[0], sums[0]), _mm256_fmadd_ps(x[1], w[1], sums[1])] }
        }

        #[inline(always)]
        unsafe fn totals(sums: [[__m256; 2]; COLUMNS]) -> [f32; COLUMNS] {
            let mut totals = [0.0; COLUMNS];
            let mut c = 0;
            while c < COLUMNS {
                totals[c] = lanes::total(bytemuck::cast(sums[c]));
                c += 1;
            }
            totals
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, distance, everywhere};
    use tch::Device;

    fn random(rows: i64, columns: i64, kind: Kind) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// Some columns of a wider matrix.
    fn inside(rows: i64, columns: i64, kind: Kind) -> Tensor {
        random(rows, columns + 5, kind).narrow(1, 3, columns)
    }

    #[test]
    fn a_product_is_what_its_formula_says() {
        everywhere(|| {
            for (kind, tolerance) in KINDS {
                for (rows, columns, depth) in
                    [(1, 1, 1), (1, 5, 33), (2, 9, 64), (3, 4, 31), (11, 70, 200), (5, 3, 0)]
                {
                    let (x, w) = (inside(rows, depth, kind), inside(columns, depth, kind));
                    let (start, bias) = (inside(rows, columns, kind), random(1, columns, kind));
                    let out = inside(rows, columns, kind);
                    let [wide_x, wide_w, wide_start, wide_bias] =
                        [&x, &w, &start, &bias].map(|t| t.to_kind(Kind::Double));
                    let product = wide_x.mm(&wide_w.tr());
                    let off = |exact: &Tensor| distance(&out, exact);
                    let limit = tolerance * (1.0 + (depth as f64).sqrt());
                    multiply(&x, &w, Start::NOTHING, &out);
                    assert!(off(&product) <= limit, "{kind:?} {rows} {columns} {depth}");
                    let all = Start { rows: Some(&start), bias: Some(&bias), scale: 0.5 };
                    multiply(&x, &w, all, &out);
                    let exact = &product * 0.5 + &wide_start + &wide_bias;
                    assert!(off(&exact) <= limit, "{kind:?} {rows} {columns} {depth}");
                    out.shallow_clone().copy_(&start);
                    multiply(&x, &w, Start { rows: Some(&out), bias: None, scale: 1.0 }, &out);
                    assert!(off(&(product + wide_start)) <= limit, "{kind:?} {rows} {columns} {depth}");
                }
            }
        });
    }

    #[test]
    fn a_row_has_the_same_bits_beside_any_others() {
        everywhere(|| {
            for (kind, _) in KINDS {
                let (x, w) = (random(40, 203, kind), random(77, 203, kind));
                let of = |x: &Tensor| {
                    let out = Tensor::empty([x.size()[0], 77], (kind, Device::Cpu));
                    multiply(x, &w, Start::NOTHING, &out);
                    out
                };
                let all = of(&x);
                for (first, rows) in [(0, 1), (39, 1), (7, 2), (11, 3), (5, 6), (1, 17), (3, 37)] {
                    assert_eq!(
                        of(&x.narrow(0, first, rows)),
                        all.narrow(0, first, rows),
                        "{kind:?} {first} {rows}"
                    );
                }
            }
        });
    }
}
