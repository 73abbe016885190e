//! A quantized matrix of the files: the tensors that it is made of, its tiles and its values.

use super::super::{
    PackedForm, SourceError, TensorMeta,
    packed::read_unpacked,
    safetensors::{Located, SafetensorsSource},
    unknown,
};
use crate::{
    dtype::DType,
    quant::{Format, Grid, minifloat, nested, nf4, nvfp4},
};
use safetensors::Dtype;
use serde::Deserialize;
use std::ops::Range;

/// A matrix `[rows, columns]` whose codes and scales are tensors of the files.
pub(in super::super) struct PackedMatrix {
    grid: Grid,
    /// The dtype that the matrix was quantized from.
    dtype: DType,
    codes: Located,
    scales: Scales,
}

/// Scales of the codes.
enum Scales {
    /// `weight_scale_inv`, a value a block.
    Blocks(Located),
    /// `weight_scale`, an e4m3 a group, and the scale of the matrix.
    OfGroups(Located, f32),
    /// `absmax`, an fp32 a block of 64.
    Absmax(Located),
    /// `absmax`, a byte a block of 64; its values, `nested_absmax` of each 256, and the offset.
    Nested { codes: Located, map: Vec<f32>, absmax: Located, offset: f32 },
}

/// The state that bitsandbytes stores as JSON in a tensor.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

fn fault(name: &str, reason: impl Into<String>) -> SourceError {
    SourceError::Packed { name: name.to_owned(), reason: reason.into() }
}

/// Takes `name` out of the files.
fn take(source: &mut SafetensorsSource, name: &str) -> Result<Located, SourceError> {
    source.take(name).ok_or_else(|| unknown(name))
}

/// All values of a tensor of plain numbers, as fp32.
fn floats(source: &SafetensorsSource, name: &str, tensor: &Located) -> Result<Vec<f32>, SourceError> {
    let dtype =
        tensor.number().ok_or_else(|| fault(name, format!("is {:?}, expected numbers", tensor.dtype)))?;
    let mut bytes = vec![0; tensor.bytes()];
    source.read_bytes(tensor, 0..bytes.len(), &mut bytes)?;
    let mut values = vec![0f32; tensor.elements()];
    dtype.convert(&bytes, DType::F32, bytemuck::cast_slice_mut(&mut values));
    Ok(values)
}

/// The one value of a tensor, positive and finite.
fn scalar(source: &SafetensorsSource, name: &str, tensor: &Located) -> Result<f32, SourceError> {
    match floats(source, name, tensor)?[..] {
        [value] if value.is_finite() && value > 0.0 => Ok(value),
        ref values => Err(fault(name, format!("is {values:?}, expected one positive scale"))),
    }
}

fn expect(name: &str, tensor: &Located, dtype: Dtype, shape: &[usize]) -> Result<(), SourceError> {
    if tensor.dtype == dtype && tensor.shape == shape {
        return Ok(());
    }
    let (found, of) = (&tensor.shape, tensor.dtype);
    Err(fault(name, format!("is {of:?} {found:?}, expected {dtype:?} {shape:?}")))
}

impl PackedMatrix {
    /// `matrix` of transformers' FP8 with the scales `scale_name`.
    pub(super) fn fp8(
        source: &mut SafetensorsSource,
        matrix: &str,
        scale_name: &str,
    ) -> Result<Self, SourceError> {
        let (codes, scales) = (take(source, matrix)?, take(source, scale_name)?);
        let &[rows, columns] = &codes.shape[..] else {
            return Err(SourceError::NoMatrix { name: matrix.to_owned(), shape: codes.shape });
        };
        expect(matrix, &codes, Dtype::F8_E4M3, &[rows, columns])?;
        if scales.number().is_none() && scales.dtype != Dtype::F8_E8M0 {
            return Err(fault(scale_name, format!("is {:?}, expected numbers or F8_E8M0", scales.dtype)));
        }
        let side = Format::BlockFp8.group();
        expect(scale_name, &scales, scales.dtype, &[rows.div_ceil(side), columns.div_ceil(side)])?;
        let grid = Grid { format: Format::BlockFp8, rows, columns };
        Ok(Self { grid, dtype: DType::Bf16, codes, scales: Scales::Blocks(scales) })
    }

    /// `matrix` of ModelOpt's NVFP4: value = e2m1 · weight_scale · weight_scale_2.
    pub(super) fn modelopt(source: &mut SafetensorsSource, matrix: &str) -> Result<Self, SourceError> {
        let codes = take(source, matrix)?;
        let scales = take(source, &format!("{matrix}_scale"))?;
        let name = format!("{matrix}_scale_2");
        let global = take(source, &name)?;
        let global = scalar(source, &name, &global)?;
        Self::nvfp4(matrix, codes, scales, global)
    }

    /// `matrix` of compressed-tensors' NVFP4: value = e2m1 · weight_scale / weight_global_scale.
    pub(super) fn compressed(source: &mut SafetensorsSource, matrix: &str) -> Result<Self, SourceError> {
        let codes = take(source, &format!("{matrix}_packed"))?;
        let scales = take(source, &format!("{matrix}_scale"))?;
        let name = format!("{matrix}_global_scale");
        let divisor = take(source, &name)?;
        let divisor = scalar(source, &name, &divisor)?;
        Self::nvfp4(matrix, codes, scales, 1.0 / divisor)
    }

    fn nvfp4(matrix: &str, codes: Located, scales: Located, global: f32) -> Result<Self, SourceError> {
        let &[rows, bytes] = &codes.shape[..] else {
            return Err(SourceError::NoMatrix { name: matrix.to_owned(), shape: codes.shape });
        };
        expect(matrix, &codes, Dtype::U8, &[rows, bytes])?;
        let columns = bytes.saturating_mul(2);
        if columns % nvfp4::GROUP != 0 {
            return Err(fault(matrix, format!("has {columns} columns, no multiple of {}", nvfp4::GROUP)));
        }
        expect(&format!("{matrix}_scale"), &scales, Dtype::F8_E4M3, &[rows, columns / nvfp4::GROUP])?;
        let grid = Grid { format: Format::NvFp4, rows, columns };
        Ok(Self { grid, dtype: DType::Bf16, codes, scales: Scales::OfGroups(scales, global) })
    }

    /// `matrix` of bitsandbytes' nf4.
    pub(super) fn nf4(source: &mut SafetensorsSource, matrix: &str) -> Result<Self, SourceError> {
        let of = |part: &str| format!("{matrix}.{part}");
        let prefix = of("quant_state.bitsandbytes__");
        let Some(state_name) = source.stored().into_iter().find(|name| name.starts_with(&prefix)) else {
            return Err(unknown(&format!("{prefix}nf4")));
        };
        let stored = take(source, &state_name)?;
        let mut text = vec![0; stored.bytes()];
        source.read_bytes(&stored, 0..text.len(), &mut text)?;
        let state: QuantState =
            serde_json::from_slice(&text).map_err(|error| fault(&state_name, error.to_string()))?;
        if state.quant_type != "nf4" || state.blocksize != nf4::BLOCK {
            let found = format!("{} in blocks of {}", state.quant_type, state.blocksize);
            return Err(fault(matrix, format!("is {found}; nf4 in blocks of {} can be read", nf4::BLOCK)));
        }
        let &[rows, columns] = &state.shape[..] else {
            return Err(SourceError::NoMatrix { name: matrix.to_owned(), shape: state.shape });
        };
        let dtype = match state.dtype.as_str() {
            "float32" => DType::F32,
            "float16" => DType::F16,
            _ => DType::Bf16,
        };
        let table = take(source, &of("quant_map"))?;
        if floats(source, &of("quant_map"), &table)? != nf4::TABLE {
            return Err(fault(&of("quant_map"), "is not the table of nf4"));
        }
        let elements = rows.saturating_mul(columns);
        let codes = take(source, matrix)?;
        if codes.bytes() != elements.div_ceil(2) {
            let (found, shape) = (codes.bytes(), &state.shape);
            return Err(fault(
                matrix,
                format!("has {found} bytes of codes, which are not those of {shape:?}"),
            ));
        }
        let blocks = elements.div_ceil(nf4::BLOCK);
        let absmax = take(source, &of("absmax"))?;
        let scales = match state.nested_offset {
            None => {
                expect(&of("absmax"), &absmax, Dtype::F32, &[blocks])?;
                Scales::Absmax(absmax)
            }
            Some(offset) => {
                expect(&of("absmax"), &absmax, Dtype::U8, &[blocks])?;
                let is_known = state.nested_blocksize == Some(nested::BLOCK)
                    && state.nested_dtype.as_deref().is_none_or(|dtype| dtype == "float32");
                if !is_known {
                    let (size, dtype) = (state.nested_blocksize, state.nested_dtype);
                    let reason =
                        format!("has nested blocks of {size:?} {dtype:?}; 256 of float32 can be read");
                    return Err(fault(matrix, reason));
                }
                let map = take(source, &of("nested_quant_map"))?;
                expect(&of("nested_quant_map"), &map, Dtype::F32, &[256])?;
                let map = floats(source, &of("nested_quant_map"), &map)?;
                let outer = take(source, &of("nested_absmax"))?;
                expect(&of("nested_absmax"), &outer, Dtype::F32, &[blocks.div_ceil(nested::BLOCK)])?;
                Scales::Nested { codes: absmax, map, absmax: outer, offset }
            }
        };
        Ok(Self { grid: Grid { format: Format::Nf4, rows, columns }, dtype, codes, scales })
    }

    /// Shape of the matrix, and the dtype that it was quantized from.
    pub fn meta(&self) -> TensorMeta {
        TensorMeta { dtype: self.dtype, shape: vec![self.grid.rows, self.grid.columns] }
    }

    pub fn form(&self) -> PackedForm {
        let global = if let Scales::OfGroups(_, global) = self.scales { global } else { 1.0 };
        PackedForm { format: self.grid.format, global }
    }

    /// Tiles `tiles` with the codes and scales of the files.
    pub fn read_tiles(
        &self,
        source: &SafetensorsSource,
        name: &str,
        tiles: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        let (grid, size) = (&self.grid, self.grid.format.tile().bytes);
        if tiles.end > grid.tiles() || out.len() != tiles.len() * size {
            return Err(SourceError::Range { name: name.to_owned(), range: tiles, elements: grid.tiles() });
        }
        for run in grid.runs(tiles.clone()) {
            let out = &mut out[(run.start - tiles.start) * size..(run.end - tiles.start) * size];
            self.read_run(source, name, run, out)?;
        }
        Ok(())
    }

    fn read_run(
        &self,
        source: &SafetensorsSource,
        name: &str,
        tiles: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        let read = |tensor: &Located, range: Range<usize>| {
            let mut bytes = vec![0; range.len()];
            source.read_bytes(tensor, range, &mut bytes)?;
            Ok::<_, SourceError>(bytes)
        };
        let elements = self.grid.elements(tiles.clone());
        let halves = |elements: &Range<usize>| elements.start / 2..elements.end.div_ceil(2);
        let result = match &self.scales {
            Scales::Blocks(scales) => {
                let codes = no_nan(name, read(&self.codes, elements)?)?;
                let scales = self.block_scales(source, name, scales, tiles.clone())?;
                self.grid.from_blocks(tiles, &codes, &scales, out)
            }
            Scales::OfGroups(scales, _) => {
                let codes = read(&self.codes, halves(&elements))?;
                let scales = read(scales, elements.start / nvfp4::GROUP..elements.end / nvfp4::GROUP)?;
                nvfp4::from_groups(&codes, &no_nan(name, scales)?, out)
            }
            Scales::Absmax(absmax) => {
                let codes = read(&self.codes, halves(&elements))?;
                let blocks = elements.start / nf4::BLOCK..elements.end.div_ceil(nf4::BLOCK);
                let bytes = read(absmax, blocks.start * 4..blocks.end * 4)?;
                nf4::from_blocks(&codes, &finite(name, fp32(&bytes))?, out)
            }
            Scales::Nested { codes, map, absmax, offset } => {
                let weights = read(&self.codes, halves(&elements))?;
                let blocks = elements.start / nf4::BLOCK..elements.end.div_ceil(nf4::BLOCK);
                // From the border of a nested block on.
                let start = blocks.start / nested::BLOCK;
                let end = blocks.end.div_ceil(nested::BLOCK);
                let codes = read(codes, start * nested::BLOCK..blocks.end)?;
                let outer = fp32(&read(absmax, start * 4..end * 4)?);
                nested::decode(&codes, map, &outer, *offset)
                    .map_err(|error| fault(name, error.to_string()))
                    .and_then(|all| finite(name, all[blocks.start - start * nested::BLOCK..].to_vec()))
                    .map(|absmax| nf4::from_blocks(&weights, &absmax, out))?
            }
        };
        result.map_err(|error| SourceError::Quant { name: name.to_owned(), error })
    }

    /// Scales of `tiles` of a block a tile, as fp32.
    fn block_scales(
        &self,
        source: &SafetensorsSource,
        name: &str,
        scales: &Located,
        tiles: Range<usize>,
    ) -> Result<Vec<f32>, SourceError> {
        let size = scales.dtype.bitsize() / 8;
        let mut bytes = vec![0; tiles.len() * size];
        source.read_bytes(scales, tiles.start * size..tiles.end * size, &mut bytes)?;
        let values = match scales.number() {
            Some(dtype) => {
                let mut values = vec![0f32; tiles.len()];
                dtype.convert(&bytes, DType::F32, bytemuck::cast_slice_mut(&mut values));
                values
            }
            None => bytes.into_iter().map(|code| minifloat::from_e8m0(code).unwrap_or(f32::NAN)).collect(),
        };
        finite(name, values)
    }

    /// Values of elements `range` of blocks, without the rest of their blocks.
    fn read_blocks(
        &self,
        source: &SafetensorsSource,
        name: &str,
        scales: &Located,
        range: Range<usize>,
    ) -> Result<Vec<f32>, SourceError> {
        let (columns, side) = (self.grid.columns, self.grid.format.group());
        let mut codes = vec![0; range.len()];
        source.read_bytes(&self.codes, range.clone(), &mut codes)?;
        let codes = no_nan(name, codes)?;
        let across = columns.div_ceil(side);
        let mut of_band = (usize::MAX, Vec::new());
        let mut values = Vec::with_capacity(codes.len());
        while values.len() < codes.len() {
            let at = range.start + values.len();
            let (row, column) = (at / columns, at % columns);
            if of_band.0 != row / side {
                let first = row / side * across;
                of_band = (row / side, self.block_scales(source, name, scales, first..first + across)?);
            }
            let end = ((column / side + 1) * side).min(columns);
            let count = (end - column).min(range.end - at);
            let scale = of_band.1[column / side];
            let from = values.len();
            values.extend(codes[from..from + count].iter().map(|&code| minifloat::from_e4m3(code) * scale));
        }
        Ok(values)
    }

    /// Elements `range` (row by row) as `dtype` into `out`.
    pub fn read(
        &self,
        source: &SafetensorsSource,
        name: &str,
        range: Range<usize>,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        if let Scales::Blocks(scales) = &self.scales {
            let values = self.read_blocks(source, name, scales, range)?;
            DType::F32.convert(bytemuck::cast_slice(&values), dtype, out);
            return Ok(());
        }
        read_unpacked(name, (self.grid, self.form().global), range, dtype, out, |run, packed| {
            self.read_run(source, name, run, packed)
        })
    }
}

/// Little-endian fp32 values of `bytes`.
fn fp32(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]])).collect()
}

/// `codes` of e4m3, which a broken file may have NaN.
fn no_nan(name: &str, codes: Vec<u8>) -> Result<Vec<u8>, SourceError> {
    match codes.iter().any(|&code| minifloat::is_e4m3_nan(code)) {
        true => Err(fault(name, "one of its e4m3 values is NaN")),
        false => Ok(codes),
    }
}

/// `scales`, which a broken file may have infinite.
fn finite(name: &str, scales: Vec<f32>) -> Result<Vec<f32>, SourceError> {
    match scales.iter().find(|scale| !scale.is_finite()) {
        Some(scale) => Err(fault(name, format!("one of its scales is {scale}"))),
        None => Ok(scales),
    }
}
