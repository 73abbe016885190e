//! Floats of 8 and 4 bits as in the OCP Microscaling formats: e4m3 (`torch.float8_e4m3fn`), e8m0, e2m1. Encoding rounds
//! to nearest even and saturates; values are finite.

/// The largest e4m3.
pub const E4M3_MAX: f32 = 448.0;
/// The smallest normal e4m3.
pub const E4M3_TINY: f32 = 0.015625;
/// The largest e2m1.
pub const E2M1_MAX: f32 = 6.0;
/// Values of the e2m1 codes.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The e4m3 nearest to `value`.
#[inline(always)]
pub fn to_e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) & 0x80;
    let value = value.abs().min(E4M3_MAX);
    let bits = value.to_bits();
    // Normal: drops 20 bits of the mantissa with rounding, and changes the bias of the exponent from 127 to 7.
    let normal = (bits + 0x7ffff + ((bits >> 20) & 1)).wrapping_sub(120 << 23) >> 20;
    // Subnormal: the last mantissa bit of 2^14 + value is 2^-9, as that of the code.
    let small = (value + 16384.0).to_bits() & 0xff;
    (sign | if value < E4M3_TINY { small } else { normal }) as u8
}

/// The value of an e4m3 code. The two codes of NaN give ±480.
#[inline(always)]
pub fn from_e4m3(code: u8) -> f32 {
    let (code, sign) = (u32::from(code & 0x7f), u32::from(code & 0x80) << 24);
    let normal = f32::from_bits((code << 20) + (120 << 23));
    let magnitude = if code < 8 { code as f32 * (1.0 / 512.0) } else { normal };
    f32::from_bits(magnitude.to_bits() | sign)
}

/// True if `code` is one of the two NaNs of e4m3.
pub fn is_e4m3_nan(code: u8) -> bool {
    code & 0x7f == 0x7f
}

/// The value of an e8m0 code, a power of two; `None` for its NaN.
pub fn from_e8m0(code: u8) -> Option<f32> {
    // Code 0 is 2^-127, which is subnormal in fp32.
    (code < 255).then(|| f32::from_bits(if code == 0 { 1 << 22 } else { u32::from(code) << 23 }))
}

/// The e2m1 nearest to `value`, in the low four bits. The sign of zero is kept.
#[inline(always)]
pub fn to_e2m1(value: f32) -> u8 {
    let sign = (value.to_bits() >> 28) & 8;
    let value = value.abs().min(E2M1_MAX);
    let bits = value.to_bits();
    let normal = (bits + 0x1f_ffff + ((bits >> 22) & 1)).wrapping_sub(126 << 23) >> 22;
    // The last mantissa bit of 2^22 + value is 0.5.
    let small = (value + 4_194_304.0).to_bits() & 7;
    (sign | if value < 1.0 { small } else { normal }) as u8
}
