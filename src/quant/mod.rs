//! Packed formats of frozen matrices: nf4, block_fp8, nvfp4. A matrix `[rows, columns]`, as the model files have it, is
//! cut into tiles ([`Grid`]). A tile is its codes followed by their scales, so that it is stored, sent and owned as
//! one. Pure: bytes and numbers, no tensors, no ranks, no files.

mod block_fp8;
mod four_bit;
mod grid;
pub mod minifloat;
pub mod nested;
pub mod nf4;
mod noise;
mod number;
pub mod nvfp4;

pub use grid::{Grid, Packed};
pub use noise::Noise;
pub use number::Decoded;

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The smallest run of elements that is stored, sent and owned as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub elements: usize,
    /// Bytes of the codes and of their scales.
    pub bytes: usize,
}

/// A packed format. Tiles are multiples of 64 bytes, the alignment of regions, so that shards need no other alignment
/// and codes and scales can be loaded as whole vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Format {
    /// NormalFloat of QLoRA (arXiv 2305.14314) in bitsandbytes' blocks: 64 neighbours of the flattened matrix, 4-bit
    /// codes, the even element in the high nibble, times an fp32 absmax. A tile is 16 blocks: 512 bytes of codes, then
    /// 16 absmax. Behind the last element absmax is 0 and codes are 7, which is 0.
    #[serde(rename = "nf4")]
    Nf4,
    /// Blocks of 128×128, `float8_e4m3fn` times an fp32 scale, amax / 448. A tile is a block, row by row, then its
    /// scale and 60 zero bytes. Beyond the edges of the matrix codes are 0.
    #[serde(rename = "block_fp8")]
    BlockFp8,
    /// Groups of 16 neighbours in a row, 4-bit e2m1 codes, the even column in the low nibble, times an e4m3 scale,
    /// times one fp32 scale of the matrix that is kept elsewhere. A tile is 64 groups, row by row: 512 bytes of codes,
    /// then 64 scales. Rows are filled with zeros to whole groups.
    #[serde(rename = "nvfp4")]
    NvFp4,
}

impl Format {
    pub const ALL: [Self; 3] = [Self::Nf4, Self::BlockFp8, Self::NvFp4];

    /// The name in configurations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::BlockFp8 => "block_fp8",
            Self::NvFp4 => "nvfp4",
        }
    }

    /// Elements that share a scale, along a row; of block_fp8, the side of a block.
    pub const fn group(self) -> usize {
        match self {
            Self::Nf4 => nf4::BLOCK,
            Self::BlockFp8 => block_fp8::SIDE,
            Self::NvFp4 => nvfp4::GROUP,
        }
    }

    /// Bits of a code.
    const fn code_bits(self) -> usize {
        match self {
            Self::Nf4 | Self::NvFp4 => 4,
            Self::BlockFp8 => 8,
        }
    }

    pub const fn tile(self) -> Tile {
        match self {
            Self::Nf4 => nf4::TILE,
            Self::BlockFp8 => block_fp8::TILE,
            Self::NvFp4 => nvfp4::TILE,
        }
    }

    /// True if a matrix has an fp32 scale beside its tiles.
    pub const fn has_global(self) -> bool {
        matches!(self, Self::NvFp4)
    }

    /// The scale beside the tiles of a matrix whose largest magnitude is `amax`; 1 where the format has none.
    pub fn global(self, amax: f32) -> f32 {
        if self.has_global() { nvfp4::global(amax) } else { 1.0 }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = QuantError;

    fn from_str(name: &str) -> Result<Self, QuantError> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| QuantError::Format { name: name.to_owned() })
    }
}

/// Errors of packing and unpacking.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuantError {
    #[error("{name} is no packed format; nf4, block_fp8 and nvfp4 are")]
    Format { name: String },
    /// `index`: place in the values that were given.
    #[error("element {index} is {value}: only finite weights can be quantized")]
    NonFinite { index: usize, value: f32 },
    #[error("{part}: {found} were given, expected {expected}")]
    Length { part: &'static str, expected: usize, found: usize },
}

/// The largest magnitude of `values`; 0 of none.
///
/// # Errors
/// One of them is infinite or NaN.
pub fn amax(values: &[f32]) -> Result<f32, QuantError> {
    number::dispatch(
        #[inline(always)]
        || number::amax(values),
    )
    .ok_or_else(|| non_finite(values))
}

/// The error of the first value that is not finite.
fn non_finite(values: &[f32]) -> QuantError {
    let index = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    QuantError::NonFinite { index, value: values.get(index).copied().unwrap_or(f32::NAN) }
}

fn check_length(part: &'static str, found: usize, expected: usize) -> Result<(), QuantError> {
    if found == expected { Ok(()) } else { Err(QuantError::Length { part, expected, found }) }
}

#[cfg(test)]
mod tests;
