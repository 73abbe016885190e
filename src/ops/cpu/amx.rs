//! Tile registers, as AMX has them: eight matrices of 16 rows of 64 bytes, and c += a·b in fp32, where a tile of a is 16
//! rows of 16 pairs of bf16 neighbours along the summed dimension, and one of b 16 such pairs for each of 16 columns
//! (Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3).
//!
//! Measured on a Xeon, a core: 3.7 TFLOP/s in the registers, 3.0 with tiles from the first-level cache, 2.2 from the second,
//! 1.5 where results are written too; libtorch's GEMM does 1.0 to 1.7 on large matrices and half of that on an expert's.

#[cfg(test)]
use super::Element;
use half::bf16;
use pulp::NullaryFnOnce;

/// Rows of a tile, and columns of a tile of sums.
pub const SIDE: usize = 16;

/// Bytes of a row.
pub const ROW_BYTES: usize = 64;

/// Rows and columns of sums that are in registers at a time: two tiles each.
pub const BLOCK: usize = 2 * SIDE;

/// bf16 numbers of a row.
pub const DEPTH: usize = ROW_BYTES / 2;

/// bf16 numbers of a tile.
pub const NUMBERS: usize = SIDE * DEPTH;

/// A thread's eight registers.
pub trait Tiles: Copy + Send + Sync {
    type Registers;

    /// Calls `f`, compiled for what has the registers, with them ready for use on this thread.
    fn run<F: NullaryFnOnce>(self, f: F) -> F::Output;

    /// The registers, of any content.
    ///
    /// # Safety
    /// This is called inside of [`run`](Self::run), and what it gives is used there alone, one at a time.
    unsafe fn registers(self) -> Self::Registers;

    /// Register `T` is zero.
    fn zero<const T: i32>(registers: &mut Self::Registers);

    /// # Safety
    /// There are 16 rows of 64 readable bytes from `from` on, `stride` bytes apart.
    unsafe fn load<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize);

    /// The same, of what will not be read again soon.
    ///
    /// # Safety
    /// As for `load`.
    unsafe fn load_once<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize);

    /// # Safety
    /// There are 16 rows of 64 bytes from `to` on, `stride` bytes apart, to which nothing else refers.
    unsafe fn store<const T: i32>(registers: &mut Self::Registers, to: *mut u8, stride: usize);

    /// c += a·b
    fn multiply_add<const C: i32, const A: i32, const B: i32>(registers: &mut Self::Registers);

    /// Word j of row i becomes word i of row j of `to`, which is dense; words have 32 bits.
    ///
    /// # Safety
    /// There are 16 rows of 64 readable bytes from `from` on, `stride` bytes apart, and this is called inside of
    /// [`run`](Self::run).
    unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]);

    /// Two tiles of right factors, of 32 rows of 32 numbers: word j of row i is column j of rows 2i (its low half) and 2i + 1.
    ///
    /// # Safety
    /// There are such rows from `from` on, `stride` numbers apart, and this is called inside of [`run`](Self::run).
    unsafe fn pair(from: *const bf16, stride: usize, to: [&mut [u32; SIDE * SIDE]; 2]);

    /// Rounds numbers to bf16, nearest, ties to even.
    ///
    /// # Safety
    /// This is called inside of [`run`](Self::run).
    unsafe fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE];

    /// to = start + scale·sums, rounded, for 32 numbers; a start is optional.
    ///
    /// # Safety
    /// They can be read and written, and this is called inside of [`run`](Self::run).
    unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16);
}

#[cfg(target_arch = "x86_64")]
pub use hardware::Amx;

#[cfg(target_arch = "x86_64")]
mod hardware {
    use super::*;
    use crate::ops::cpu::Level;
    use std::{
        arch::{
            asm,
            x86_64::{
                __cpuid, __cpuid_count, __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256,
                _mm512_castsi128_si512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
                _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_inserti32x4, _mm512_loadu_ps, _mm512_loadu_si512,
                _mm512_mul_ps, _mm512_permutex2var_epi64, _mm512_set1_ps, _mm512_setr_epi64,
                _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpackhi_epi32,
                _mm512_unpackhi_epi64, _mm512_unpacklo_epi16, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
            },
        },
        sync::OnceLock,
    };

    /// The registers of a machine that has AMX with bf16.
    #[derive(Clone, Copy, Debug)]
    pub struct Amx(());

    /// Configured, until this is dropped.
    struct Configured;

    impl Configured {
        /// # Safety
        /// The machine has tiles, and Linux lets this process use them.
        #[inline(always)]
        unsafe fn new() -> Self {
            // SAFETY: the caller's.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const ALL_WHOLE, options(nostack, readonly)) };
            Self
        }
    }

    impl Amx {
        /// If the machine has them, with AVX512-BF16 beside them, and the system lets this process use them.
        pub fn new() -> Option<Self> {
            static ALLOWED: OnceLock<bool> = OnceLock::new();
            let has_vectors = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512bf16")
            };
            ALLOWED.get_or_init(|| has_vectors() && has_tiles() && is_allowed()).then_some(Self(()))
        }
    }

    /// CPUID 7.0: AMX-BF16 and AMX-TILE.
    fn has_tiles() -> bool {
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == 1 << 22 | 1 << 24
    }

    /// Asks Linux for the right to use the registers, whose 8 KiB a process does not have by itself; all threads get it.
    fn is_allowed() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        #[cfg(target_os = "linux")]
        // SAFETY: arch_prctl takes two numbers here, and refuses what it does not know.
        return unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 };
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// LDTILECFG's operand: palette 1, eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static ALL_WHOLE: Configuration = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut tile = 0;
        while tile < 8 {
            (row_bytes[tile], rows[tile]) = (ROW_BYTES as u16, SIDE as u8);
            tile += 1;
        }
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    impl Drop for Configured {
        fn drop(&mut self) {
            // SAFETY: they are configured on this thread; no compiled code keeps anything in them.
            unsafe { asm!("tilerelease", options(nostack)) };
        }
    }

    /// Says that this is inside of [`Tiles::run`].
    pub struct InRun(());

    impl Tiles for Amx {
        type Registers = InRun;

        #[inline(always)]
        fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
            // SAFETY: an `Amx` exists only where the machine has tiles and Linux lets us use them.
            let _configured = unsafe { Configured::new() };
            Level::Amx.run(f)
        }

        #[inline(always)]
        unsafe fn registers(self) -> InRun {
            InRun(())
        }

        #[inline(always)]
        fn zero<const T: i32>(_: &mut InRun) {
            // SAFETY: the registers are configured inside of `run`.
            unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) };
        }

        #[inline(always)]
        unsafe fn load<const T: i32>(_: &mut InRun, from: *const u8, stride: usize) {
            // SAFETY: as for `zero`; the caller vouches for the memory.
            unsafe {
                asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn load_once<const T: i32>(_: &mut InRun, from: *const u8, stride: usize) {
            // SAFETY: as for `load`.
            unsafe {
                asm!("tileloaddt1 tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn store<const T: i32>(_: &mut InRun, to: *mut u8, stride: usize) {
            // SAFETY: as for `load`.
            unsafe {
                asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) stride,
                    options(nostack, preserves_flags));
            }
        }

        #[inline(always)]
        fn multiply_add<const C: i32, const A: i32, const B: i32>(_: &mut InRun) {
            // SAFETY: as for `zero`.
            unsafe {
                asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                    options(nostack, nomem, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]) {
            // SAFETY: the caller's; there is an `Amx` only where there is AVX-512.
            unsafe { transpose(from, stride, to) }
        }

        #[inline(always)]
        unsafe fn pair(from: *const bf16, stride: usize, to: [&mut [u32; SIDE * SIDE]; 2]) {
            // SAFETY: the caller's; there is an `Amx` only where there is AVX-512.
            unsafe { pair(from, stride, to) }
        }

        #[inline(always)]
        unsafe fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE] {
            // SAFETY: there is an `Amx` only where there is AVX512-BF16.
            unsafe { round(numbers) }
        }

        #[inline(always)]
        unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16) {
            // SAFETY: the caller's; there is an `Amx` only where there is AVX512-BF16.
            unsafe { put(sums, scale, start, to) }
        }
    }

    /// # Safety
    /// As for [`Tiles::put`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn put(sums: [&[f32; SIDE]; 2], scale: f32, start: Option<*const bf16>, to: *mut bf16) {
        let scale = _mm512_set1_ps(scale);
        // SAFETY: the caller's; what is rounded is 512 bits of any content.
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

    /// 16 numbers.
    ///
    /// # Safety
    /// They can be read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn widened(from: *const bf16) -> __m512 {
        // SAFETY: the caller's.
        let halves = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
    }

    /// # Safety
    /// As for [`Tiles::pair`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(from: *const bf16, stride: usize, [left, right]: [&mut [u32; SIDE * SIDE]; 2]) {
        // Interleaving goes by 128 bits: four columns of the low half, the next four of the high one.
        let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        let second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        for i in 0..SIDE {
            // SAFETY: the caller's; row i of both.
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
    fn round(numbers: &[f32; SIDE]) -> [bf16; SIDE] {
        // SAFETY: 16 numbers; both types of the result are 256 bits of any content.
        unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(numbers.as_ptr()))) }
    }

    /// Fours of words that go below each other are loaded beside each other, four rows apart, so that only squares of four
    /// words are left to be transposed.
    ///
    /// # Safety
    /// As for [`Tiles::transpose`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]) {
        for column in 0..4 {
            // SAFETY: four words of a row; the caller's.
            let word = |row: usize| unsafe { _mm_loadu_si128(from.add(row * stride + column * 16).cast()) };
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
                // SAFETY: a row of `to`.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().add((4 * column + i) * SIDE).cast(), words) };
            }
        }
    }
}

/// The same in plain arithmetic, so that what is built on tiles is tested on any machine.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub struct Emulated;

#[cfg(test)]
impl Tiles for Emulated {
    type Registers = [[u32; SIDE * SIDE]; 8];

    fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
        f.call()
    }

    unsafe fn registers(self) -> Self::Registers {
        [[0x7fc0_7fc0; SIDE * SIDE]; 8]
    }

    fn zero<const T: i32>(registers: &mut Self::Registers) {
        registers[T as usize] = [0; SIDE * SIDE];
    }

    unsafe fn load<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize) {
        for (i, row) in registers[T as usize].chunks_exact_mut(SIDE).enumerate() {
            // SAFETY: the caller's; words need no alignment here.
            row.copy_from_slice(&unsafe { from.add(i * stride).cast::<[u32; SIDE]>().read_unaligned() });
        }
    }

    unsafe fn load_once<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize) {
        // SAFETY: the caller's.
        unsafe { Self::load::<T>(registers, from, stride) };
    }

    unsafe fn store<const T: i32>(registers: &mut Self::Registers, to: *mut u8, stride: usize) {
        for (i, row) in registers[T as usize].as_chunks::<SIDE>().0.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { to.add(i * stride).cast::<[u32; SIDE]>().write_unaligned(*row) };
        }
    }

    fn multiply_add<const C: i32, const A: i32, const B: i32>(registers: &mut Self::Registers) {
        let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        let (a, b) = (registers[A as usize], registers[B as usize]);
        for (i, word) in registers[C as usize].iter_mut().enumerate() {
            let (row, column) = (i / SIDE, i % SIDE);
            let mut sum = f32::from_bits(*word);
            for k in 0..SIDE {
                let (a, b) = (halves(a[row * SIDE + k]), halves(b[k * SIDE + column]));
                sum += a[0] * b[0] + a[1] * b[1];
            }
            *word = sum.to_bits();
        }
    }

    unsafe fn transpose(from: *const u8, stride: usize, to: &mut [u32; SIDE * SIDE]) {
        for (i, word) in to.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *word = unsafe { from.add(i % SIDE * stride + i / SIDE * 4).cast::<u32>().read_unaligned() };
        }
    }

    unsafe fn pair(from: *const bf16, stride: usize, to: [&mut [u32; SIDE * SIDE]; 2]) {
        for (tile, to) in to.into_iter().enumerate() {
            for (i, word) in to.iter_mut().enumerate() {
                let (row, column) = (i / SIDE * 2, tile * SIDE + i % SIDE);
                // SAFETY: the caller's.
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
            // SAFETY: the caller's.
            unsafe {
                let start = start.map_or(0.0, |start| start.add(i).read_unaligned().wide());
                to.add(i).write_unaligned(bf16::narrow(sum.mul_add(scale, start)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers, so that every order of summing gives the same.
    fn numbers(n: usize, seed: u32) -> Vec<u32> {
        let half = |x: u32| f32::to_bits((x % 7) as f32 - 3.0) >> 16;
        (0..n as u32).map(|i| half(i * 5 + seed) | half(i * 3 + 2 * seed + 1) << 16).collect()
    }

    /// What all instructions make of a and b.
    #[derive(Debug, PartialEq)]
    struct Computed {
        /// Twice a·b.
        c: Vec<u32>,
        transposed: [u32; SIDE * SIDE],
        pairs: [[u32; SIDE * SIDE]; 2],
        /// Half of [`put_sums`], and that added to the first 32 numbers of a.
        put: [[bf16; DEPTH]; 2],
    }

    /// Numbers that are not in bf16.
    fn put_sums() -> [[f32; SIDE]; 2] {
        std::array::from_fn(|i| std::array::from_fn(|j| (i * SIDE + j) as f32 * 1.37 - 20.0))
    }

    /// Words from a row of a or b to the next.
    const STRIDE: usize = SIDE + 3;

    fn computed<T: Tiles>(tiles: T, [a, b]: [&[u32]; 2]) -> Computed {
        let mut c = vec![0u32; SIDE * SIDE];
        let mut transposed = [0; SIDE * SIDE];
        let mut pairs = [[0; SIDE * SIDE]; 2];
        let mut put = [[bf16::ZERO; DEPTH]; 2];
        // SAFETY: this is inside of `run`; a and b are 32 rows of 16 words with 3 behind each, c is 16 dense rows.
        tiles.run(|| unsafe {
            let mut registers = tiles.registers();
            let stride = STRIDE * 4;
            T::load::<1>(&mut registers, a.as_ptr().cast(), stride);
            T::load::<2>(&mut registers, b.as_ptr().cast(), stride);
            T::zero::<0>(&mut registers);
            T::multiply_add::<0, 1, 2>(&mut registers);
            T::store::<0>(&mut registers, c.as_mut_ptr().cast(), ROW_BYTES);
            T::load::<7>(&mut registers, c.as_ptr().cast(), ROW_BYTES);
            T::multiply_add::<7, 1, 2>(&mut registers);
            T::store::<7>(&mut registers, c.as_mut_ptr().cast(), ROW_BYTES);
            T::transpose(a.as_ptr().cast(), stride, &mut transposed);
            T::pair(a.as_ptr().cast(), 2 * STRIDE, pairs.each_mut());
            let sums = &put_sums();
            for (start, to) in [None, Some(a.as_ptr().cast())].into_iter().zip(&mut put) {
                T::put(sums.each_ref(), 0.5, start, to.as_mut_ptr());
            }
        });
        Computed { c, transposed, pairs, put }
    }

    #[test]
    fn the_emulation_computes() {
        let n = 2 * SIDE * STRIDE;
        let (a, b) = (numbers(n, 1), numbers(n, 2));
        let Computed { c, transposed, pairs, put } = computed(Emulated, [&a, &b]);
        let number = |words: &[u32], i: usize, k: usize| f32::from_bits(words[i] >> (16 * k) << 16);
        for (i, &word) in c.iter().enumerate() {
            let (row, column) = (i / SIDE, i % SIDE);
            let term = |k: usize| {
                number(&a, row * STRIDE + k / 2, k % 2) * number(&b, k / 2 * STRIDE + column, k % 2)
            };
            assert_eq!(f32::from_bits(word), 2.0 * (0..2 * SIDE).map(term).sum::<f32>());
            assert_eq!(transposed[column * SIDE + row], a[row * STRIDE + column]);
            for (tile, pairs) in pairs.iter().enumerate() {
                let (at, half) = ((tile * SIDE + column) / 2, column % 2);
                let both = [2 * row, 2 * row + 1].map(|row| number(&a, row * STRIDE + at, half));
                assert_eq!([number(pairs, i, 0), number(pairs, i, 1)], both);
            }
        }
        for (i, sum) in put_sums().into_iter().flatten().enumerate() {
            let start = number(&a, i / 2, i % 2);
            assert_eq!(put.map(|row| row[i]), [sum * 0.5, sum * 0.5 + start].map(bf16::narrow));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_machine_does_what_the_emulation_does() {
        let Some(amx) = Amx::new() else { return };
        let n = 2 * SIDE * STRIDE;
        let (a, b) = (numbers(n, 1), numbers(n, 2));
        assert_eq!(computed(amx, [&a, &b]), computed(Emulated, [&a, &b]));
    }
}
