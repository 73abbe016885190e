//! bitsandbytes' double quantization: absmax of nf4 blocks as bytes, in blocks of 256 with an absmax of their own,
//! around their mean. absmax = map\[byte\] · nested absmax + offset.

use super::{QuantError, amax, check_length};

/// Elements with one nested absmax.
pub const BLOCK: usize = 256;
/// Steps of 1 of the values in which bitsandbytes' CPU kernel looks for a byte.
const STEPS: f32 = 32767.5;

/// absmax of nf4 blocks in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    /// `[blocks]`, `absmax` of the files.
    pub codes: Vec<u8>,
    /// `[ceil(blocks / 256)]`, `nested_absmax` of the files.
    pub absmax: Vec<f32>,
}

/// absmax of the nf4 blocks that `codes` stand for; the first begins a nested block. `map` has the values of all 256
/// bytes (`nested_quant_map` of the files), `absmax` one value a nested block.
pub fn decode(codes: &[u8], map: &[f32], absmax: &[f32], offset: f32) -> Result<Vec<f32>, QuantError> {
    check_length("values of bytes", map.len(), 256)?;
    check_length("nested absmax", absmax.len(), codes.len().div_ceil(BLOCK))?;
    let value = |(i, &code): (usize, &u8)| map[usize::from(code)] * absmax[i / BLOCK] + offset;
    Ok(codes.iter().enumerate().map(value).collect())
}

/// Bytes for `absmax` around `offset`, with bitsandbytes' [`map`].
///
/// # Errors
/// One of them is not finite.
pub fn encode(absmax: &[f32], offset: f32) -> Result<Nested, QuantError> {
    let map = map();
    let midpoints: Vec<f64> =
        map.windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect();
    let mut nested = Nested { codes: Vec::with_capacity(absmax.len()), absmax: Vec::new() };
    for block in absmax.chunks(BLOCK) {
        let centred: Vec<f32> = block.iter().map(|value| value - offset).collect();
        let most = amax(&centred)?;
        nested.absmax.push(most);
        for value in centred {
            if most == 0.0 {
                // Whatever the byte, it stands for the offset.
                nested.codes.push(0);
                continue;
            }
            let scaled = value / most;
            // The kernel's table has an entry for every 65536th part of [-1, 1].
            let entry = ((scaled + 1.0) * STEPS + 0.5).floor();
            let looked_up = f64::from(entry) / f64::from(STEPS) - 1.0;
            nested.codes.push(midpoints.partition_point(|&midpoint| midpoint < looked_up) as u8);
        }
    }
    Ok(nested)
}

/// The offset of `absmax`: their mean. bitsandbytes' is torch's, whose last bits depend on the machine.
pub fn offset(absmax: &[f32]) -> f32 {
    let sum: f64 = absmax.iter().map(|&value| f64::from(value)).sum();
    (sum / absmax.len().max(1) as f64) as f32
}

/// Values of the bytes, ascending: bitsandbytes' `create_dynamic_map()`. Seven decades, the i-th with 2^i fractions of
/// both signs, then 0 and 1.
pub fn map() -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let items = 1usize << decade;
        // torch.linspace(0.1, 1, items + 1), from both ends, with fused multiply-add.
        let step = (1.0 - 0.1f32) / items as f32;
        let border = |i: usize| match i < items.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((items - i) as f32, 1.0),
        };
        let power = 10f64.powi(decade - 6) as f32;
        for i in 0..items {
            let value = power * ((border(i) + border(i + 1)) / 2.0);
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    values
}
