//! bitsandbytes' double quantization: absmax of nf4 blocks as bytes, in blocks of 256 with an absmax of their own, around
//! their mean. absmax = map[byte] · nested absmax + offset.

use super::{QuantError, check_length};

/// Elements with one nested absmax.
pub const BLOCK: usize = 256;

/// absmax of the nf4 blocks that `codes` stand for; the first begins a nested block. `map` has the values of all 256 bytes
/// (`quant_map` of the files).
pub fn decode(codes: &[u8], map: &[f32], absmax: &[f32], offset: f32) -> Result<Vec<f32>, QuantError> {
    check_length("values of bytes", map.len(), 256)?;
    check_length("nested absmax", absmax.len(), codes.len().div_ceil(BLOCK))?;
    let value = |(i, &code): (usize, &u8)| map[usize::from(code)] * absmax[i / BLOCK] + offset;
    Ok(codes.iter().enumerate().map(value).collect())
}
