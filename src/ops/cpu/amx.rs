//! AMX tile registers: eight [tiles](super::packing), and c += a·b in fp32, where a is a tile of a left factor and b of
//! a right one (Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3).
//!
//! Measured on one core of a Xeon: 3.7 TFLOP/s in the registers, 3.0 with tiles from the first-level cache, 2.2 from
//! the second, 1.5 where results are written too. libtorch's GEMM does 1.0 to 1.7 on large matrices, half of that on an
//! expert's.

use super::packing::Packing;
#[cfg(test)]
use super::packing::{SIDE, Scalar};
use pulp::NullaryFnOnce;

/// Eight tile registers of a thread. A value exists only where the CPU has them.
pub trait Tiles: Copy + Send + Sync {
    type Registers;
    /// The CPU has its instructions where a value of this type exists.
    type Packing: Packing;

    /// Calls `f`, compiled for the CPU's instructions, with the registers configured on this thread.
    fn run<F: NullaryFnOnce>(self, f: F) -> F::Output;

    /// The registers, of any content.
    ///
    /// # Safety
    /// This is called inside of [`run`](Self::run). The result is used there alone, and no second one beside it.
    unsafe fn registers(self) -> Self::Registers;

    /// Sets register `T` to zero.
    fn zero<const T: i32>(registers: &mut Self::Registers);

    /// # Safety
    /// `from` is the first of 16 rows of 64 readable bytes, `stride` bytes apart.
    unsafe fn load<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize);

    /// Loads memory that will not be read again soon.
    ///
    /// # Safety
    /// `from` is the first of 16 rows of 64 readable bytes, `stride` bytes apart.
    unsafe fn load_once<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize);

    /// # Safety
    /// `to` is the first of 16 rows of 64 bytes, `stride` bytes apart, to which nothing else refers.
    unsafe fn store<const T: i32>(registers: &mut Self::Registers, to: *mut u8, stride: usize);

    /// Adds the product of registers `A` and `B` to register `C`.
    fn multiply_add<const C: i32, const A: i32, const B: i32>(registers: &mut Self::Registers);
}

#[cfg(target_arch = "x86_64")]
pub use hardware::Amx;

#[cfg(target_arch = "x86_64")]
mod hardware {
    use super::*;
    use crate::ops::cpu::{
        Isa,
        packing::{Avx512Bf16, ROW_BYTES, SIDE},
    };
    use std::{
        arch::{
            asm,
            x86_64::{__cpuid, __cpuid_count},
        },
        sync::OnceLock,
    };

    /// The registers of a CPU that has AMX with bf16.
    #[derive(Clone, Copy, Debug)]
    pub struct Amx(());

    /// Keeps the registers configured until it is dropped.
    struct Configured;

    impl Configured {
        /// # Safety
        /// The CPU has tiles, and Linux lets this process use them.
        #[inline(always)]
        unsafe fn new() -> Self {
            // SAFETY: the caller promises that the CPU has tiles and the process may use them; the operand is the 64
            // bytes that the instruction reads.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const ALL_WHOLE, options(nostack, readonly)) };
            Self
        }
    }

    impl Amx {
        /// `None` unless the CPU has AMX and AVX512-BF16, and the system lets this process use tiles.
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

    /// True if CPUID 7.0 lists AMX-BF16 and AMX-TILE.
    fn has_tiles() -> bool {
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == 1 << 22 | 1 << 24
    }

    /// Asks Linux for the right to use the 8 KiB of registers, for all threads of the process.
    fn is_allowed() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        #[cfg(target_os = "linux")]
        // SAFETY: arch_prctl takes two numbers here, touches no memory, and refuses requests that it does not know.
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
            // SAFETY: a `Configured` exists, so the CPU has tiles; no compiled code keeps values in tile registers.
            unsafe { asm!("tilerelease", options(nostack)) };
        }
    }

    /// Proof of being inside of [`Tiles::run`]. The instructions below fault (#UD) on a thread without configured
    /// tiles.
    pub struct InRun(());

    impl Tiles for Amx {
        type Registers = InRun;
        type Packing = Avx512Bf16;

        #[inline(always)]
        fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
            // SAFETY: an `Amx` exists only where the CPU has tiles and Linux lets this process use them, see
            // `Amx::new`.
            let _configured = unsafe { Configured::new() };
            Isa::Amx.run(f)
        }

        #[inline(always)]
        unsafe fn registers(self) -> InRun {
            InRun(())
        }

        #[inline(always)]
        fn zero<const T: i32>(_: &mut InRun) {
            // SAFETY: an `InRun` says that the registers are configured; the instruction touches no memory.
            unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) };
        }

        #[inline(always)]
        unsafe fn load<const T: i32>(_: &mut InRun, from: *const u8, stride: usize) {
            // SAFETY: an `InRun` says that the registers are configured; the caller promises 16 readable rows.
            unsafe {
                asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn load_once<const T: i32>(_: &mut InRun, from: *const u8, stride: usize) {
            // SAFETY: an `InRun` says that the registers are configured; the caller promises 16 readable rows.
            unsafe {
                asm!("tileloaddt1 tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
                    options(nostack, readonly, preserves_flags));
            }
        }

        #[inline(always)]
        unsafe fn store<const T: i32>(_: &mut InRun, to: *mut u8, stride: usize) {
            // SAFETY: an `InRun` says that the registers are configured; the caller promises 16 rows of its own.
            unsafe {
                asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) stride,
                    options(nostack, preserves_flags));
            }
        }

        #[inline(always)]
        fn multiply_add<const C: i32, const A: i32, const B: i32>(_: &mut InRun) {
            // SAFETY: an `InRun` says that the registers are configured; the instruction touches no memory.
            unsafe {
                asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                    options(nostack, nomem, preserves_flags));
            }
        }
    }
}

/// Tile registers in plain arithmetic, so that code built on them is tested on any machine.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub struct Emulated;

#[cfg(test)]
impl Tiles for Emulated {
    type Registers = [[u32; SIDE * SIDE]; 8];
    type Packing = Scalar;

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
            // SAFETY: the caller promises 16 readable rows of 64 bytes; the read is unaligned.
            row.copy_from_slice(&unsafe { from.add(i * stride).cast::<[u32; SIDE]>().read_unaligned() });
        }
    }

    unsafe fn load_once<const T: i32>(registers: &mut Self::Registers, from: *const u8, stride: usize) {
        // SAFETY: both have the same contract, which the caller keeps.
        unsafe { Self::load::<T>(registers, from, stride) };
    }

    unsafe fn store<const T: i32>(registers: &mut Self::Registers, to: *mut u8, stride: usize) {
        for (i, row) in registers[T as usize].as_chunks::<SIDE>().0.iter().enumerate() {
            // SAFETY: the caller promises 16 rows of 64 bytes that nothing else refers to; the write is unaligned.
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::packing::{
        ROW_BYTES,
        testing::{STRIDE, WORDS, number, numbers},
    };

    /// Twice a·b `[16, 16]`.
    fn computed<T: Tiles>(tiles: T, [a, b]: [&[u32]; 2]) -> Vec<u32> {
        let mut c = vec![0u32; SIDE * SIDE];
        // SAFETY: this is inside of `run`; a and b are 16 rows and more, c is 16 dense rows.
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
        });
        c
    }

    #[test]
    fn the_emulation_computes() {
        let (a, b) = (numbers(WORDS, 1), numbers(WORDS, 2));
        for (i, word) in computed(Emulated, [&a, &b]).into_iter().enumerate() {
            let (row, column) = (i / SIDE, i % SIDE);
            let term = |k: usize| {
                number(&a, row * STRIDE + k / 2, k % 2) * number(&b, k / 2 * STRIDE + column, k % 2)
            };
            assert_eq!(f32::from_bits(word), 2.0 * (0..2 * SIDE).map(term).sum::<f32>());
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_machine_does_what_the_emulation_does() {
        let Some(amx) = Amx::new() else { return };
        let (a, b) = (numbers(WORDS, 1), numbers(WORDS, 2));
        assert_eq!(computed(amx, [&a, &b]), computed(Emulated, [&a, &b]));
    }
}
