//! Element types of stored and gathered tensors. Pure: conversions work on byte slices.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element type of a tensor in a file, a shard or a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DType {
    F32,
    Bf16,
    F16,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
        }
    }

    /// The libtorch kind of the same layout.
    pub const fn kind(self) -> tch::Kind {
        match self {
            DType::F32 => tch::Kind::Float,
            DType::Bf16 => tch::Kind::BFloat16,
            DType::F16 => tch::Kind::Half,
        }
    }

    /// Converts `src` (elements of `self`) into `dst` (elements of `to`), rounding to nearest even.
    /// Both slices hold whole elements and the same number of them; neither needs to be aligned.
    pub fn convert(self, src: &[u8], to: DType, dst: &mut [u8]) {
        debug_assert_eq!(src.len() / self.size(), dst.len() / to.size());
        let f32_of = f32::from_le_bytes;
        let bf16_of = |number| bf16::from_le_bytes(number).to_f32();
        let f16_of = |number| f16::from_le_bytes(number).to_f32();
        // A loop for each pair, which the compiler vectorises.
        match (self, to) {
            (DType::F32, DType::F32) | (DType::Bf16, DType::Bf16) | (DType::F16, DType::F16) => {
                dst.copy_from_slice(src);
            }
            (DType::F32, DType::Bf16) => each(src, dst, |s| bf16::from_f32(f32_of(s)).to_le_bytes()),
            (DType::F32, DType::F16) => each(src, dst, |s| f16::from_f32(f32_of(s)).to_le_bytes()),
            (DType::F16, DType::Bf16) => each(src, dst, |s| bf16::from_f32(f16_of(s)).to_le_bytes()),
            (DType::F16, DType::F32) => each(src, dst, |s| f16_of(s).to_le_bytes()),
            (DType::Bf16, DType::F16) => each(src, dst, |s| f16::from_f32(bf16_of(s)).to_le_bytes()),
            (DType::Bf16, DType::F32) => each(src, dst, |s| bf16_of(s).to_le_bytes()),
        }
    }
}

/// Converts numbers of `S` bytes to numbers of `D` bytes.
fn each<const S: usize, const D: usize>(src: &[u8], dst: &mut [u8], convert: impl Fn([u8; S]) -> [u8; D]) {
    for (d, &s) in dst.as_chunks_mut::<D>().0.iter_mut().zip(src.as_chunks::<S>().0) {
        *d = convert(s);
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_rounds_to_nearest_even() {
        // 1 + 2^-8 lies half way between two bf16 neighbours: the even one is 1.
        let src = [1.0f32 + 1.0 / 256.0, 1.0 + 3.0 / 256.0];
        let mut dst = [0u8; 4];
        DType::F32.convert(bytemuck::cast_slice(&src), DType::Bf16, &mut dst);
        let back: Vec<f32> = dst.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        assert_eq!(back, [1.0, 1.0 + 2.0 / 128.0]);
    }
}
