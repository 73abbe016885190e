//! Element types of CPU kernels: stored as bf16, fp32 or fp64, computed in fp32 or fp64.

use half::bf16;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};
use tch::Kind;

/// A type that kernels compute in.
pub trait Real:
    Element<Accum = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn of(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    /// self · a + b, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// e to the power of self, at most 2 units in the last place off; 0 where that underflows. Vectorisable.
    fn exp(self) -> Self;

    /// The larger one; `other` where self is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }

    /// 1 / (1 + exp(−self))
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }
}

/// A type of a tensor's elements.
pub trait Stored: Copy + Send + Sync + 'static {
    const KIND: Kind;
}

impl Stored for i64 {
    const KIND: Kind = Kind::Int64;
}

impl Stored for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// A stored type that kernels compute with.
pub trait Element: Stored {
    /// The type that it is computed in.
    type Accum: Real;

    fn to_accum(self) -> Self::Accum;
    /// Rounds to nearest, ties to even.
    fn narrow(value: Self::Accum) -> Self;
}

impl Element for bf16 {
    type Accum = f32;

    #[inline(always)]
    fn to_accum(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding the bits of a NaN could give a number.
        bf16::from_bits(if value.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

macro_rules! real {
    ($type:ident, $kind:expr, $exp:expr) => {
        impl Stored for $type {
            const KIND: Kind = $kind;
        }

        impl Element for $type {
            type Accum = $type;

            #[inline(always)]
            fn to_accum(self) -> $type {
                self
            }

            #[inline(always)]
            fn narrow(value: $type) -> $type {
                value
            }
        }

        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $type
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                $type::sqrt(self)
            }

            #[inline(always)]
            fn ln(self) -> Self {
                $type::ln(self)
            }

            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                $type::mul_add(self, a, b)
            }

            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
        }
    };
}

real!(f32, Kind::Float, exp_f32);
real!(f64, Kind::Double, f64::exp);

/// 2ⁿ·p(r) with n = round(x / ln 2), r = x − n·ln 2 and Cephes' polynomial p (expf.c, Moshier).
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    // Adding 1.5·2²³ leaves n in the low bits of the sum: `as i32`, which saturates, would not vectorise.
    const ROUND: f32 = 12_582_912.0;
    const LOWEST: f32 = -87.33;
    let clamped = if x > 88.72 { 88.72 } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    // 88.72 / ln 2 rounds to 128, an exponent too large by one, so the factor is split in two.
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let n = (shifted.to_bits() as i32) - (ROUND.to_bits() as i32);
    let half = n >> 1;
    // A NaN in x is one in p.
    let e = p * scale(half) * scale(n - half);
    if x < LOWEST { 0.0 } else { e }
}

/// Evaluates an expression with `E` the element type of a tensor kind: `dispatch!(kind, E => kernel::<E>(x))`. Panics
/// for a kind that no kernel computes in.
macro_rules! dispatch {
    ($kind:expr, $element:ident => $body:expr) => {
        match $kind {
            tch::Kind::BFloat16 => {
                type $element = half::bf16;
                $body
            }
            tch::Kind::Float => {
                type $element = f32;
                $body
            }
            tch::Kind::Double => {
                type $element = f64;
                $body
            }
            kind => panic!("no kernel computes in {kind:?}"),
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::Isa;

    #[test]
    fn exp_is_the_exponential() {
        for level in Isa::available() {
            let mut worst = 0.0f64;
            for i in -87_000..=88_700 {
                let x = i as f32 / 1000.0;
                let ours = level.run(
                    #[inline(always)]
                    || exp_f32(x),
                );
                let exact = f64::from(x).exp();
                worst = worst.max((f64::from(ours) / exact - 1.0).abs());
            }
            assert!(worst < 2.5e-7, "{level:?}: {worst}");
        }
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-1e30), 0.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert!(exp_f32(f32::INFINITY) > 3e38);
        assert!(exp_f32(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (bf16::narrow(value), bf16::from_f32(value));
            assert!(ours == theirs || (value.is_nan() && ours.is_nan()), "{value}");
            assert!(value.is_nan() || theirs.to_accum() == theirs.to_f32());
        }
    }
}
