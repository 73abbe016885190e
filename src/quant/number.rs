//! Numbers that are packed and unpacked, and the instruction set that loops over them are compiled for.

use half::bf16;

/// A number that is decoded to: fp64, fp32, or bf16, rounded to nearest even.
pub trait Decoded: bytemuck::Pod + Default + Send + Sync {
    fn of(value: f32) -> Self;
}

impl Decoded for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
}

impl Decoded for f64 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value.into()
    }
}

impl Decoded for bf16 {
    /// The value is finite: a NaN may become infinite.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        bf16::from_bits(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

/// Calls `f`, which is compiled into this function, with the best instruction set of the machine.
#[inline(always)]
pub fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// True if the machine has AVX-512 F, BW, CD, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn has_avx512() -> bool {
    pulp::x86::V4::is_available()
}

/// The largest magnitude of `values`, or `None` where one is not finite: bits of positive floats are ordered as
/// integers.
#[inline(always)]
pub fn amax(values: &[f32]) -> Option<f32> {
    let mut lanes = [0u32; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(0, |most: u32, value| most.max(magnitude(*value)));
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane).max(magnitude(*value));
        }
    }
    let bits = lanes.iter().fold(rest, |most, &lane| most.max(lane));
    (bits < f32::INFINITY.to_bits()).then(|| f32::from_bits(bits))
}

#[inline(always)]
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}
