//! Instruction sets that kernels are compiled for, one of which is chosen at run time.

#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
use pulp::NullaryFnOnce;
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use std::cell::Cell;

/// An instruction set, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// The compiler's target. On x86-64 it has no fused multiply-add, which is then a slow call.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, CD, DQ, VL.
    Avx512,
    /// `Avx512` and AVX512-BF16.
    Avx512Bf16,
    /// `Avx512Bf16` and AMX with bf16.
    Amx,
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl Isa {
    /// The instruction sets of this machine.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let has_bf16 = || V4::is_available() && std::arch::is_x86_feature_detected!("avx512bf16");
        let has = move |level: &Isa| match level {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => V3::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => V4::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => has_bf16(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => has_bf16() && Amx::new().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        };
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx].into_iter().filter(has)
    }

    /// The best instruction set of this machine, or the one that [`forced`](Self::forced) asks for.
    pub fn current() -> Self {
        FORCED.get().or_else(|| Self::available().last()).unwrap_or(Isa::Portable)
    }

    /// Calls `f` with kernels of this thread on this instruction set, for tests and benches.
    pub fn forced<R>(self, f: impl FnOnce() -> R) -> R {
        let before = FORCED.replace(Some(self));
        let result = f();
        FORCED.set(before);
        result
    }

    /// Calls `f`, compiled for this instruction set; on a machine that lacks it, for the best one below.
    #[inline]
    pub fn run<F: NullaryFnOnce>(self, f: F) -> F::Output {
        #[cfg(target_arch = "x86_64")]
        if self >= Isa::Avx512Bf16 && std::arch::is_x86_feature_detected!("avx512bf16") && V4::is_available()
        {
            // SAFETY: V4 is AVX-512 F, BW, CD, DQ and VL with all that comes before them, and BF16 was asked for: the
            // CPU has every feature that `avx512_bf16` enables.
            return unsafe { avx512_bf16(f) };
        }
        #[cfg(target_arch = "x86_64")]
        if self >= Isa::Avx512
            && let Some(simd) = V4::try_new()
        {
            return simd.vectorize(f);
        }
        #[cfg(target_arch = "x86_64")]
        if self >= Isa::Avx2
            && let Some(simd) = V3::try_new()
        {
            return simd.vectorize(f);
        }
        f.call()
    }
}

/// Calls `f`, compiled for AVX-512 with BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,avx2,bmi1,bmi2,lzcnt,popcnt,f16c,movbe"
)]
fn avx512_bf16<F: NullaryFnOnce>(f: F) -> F::Output {
    f.call()
}
