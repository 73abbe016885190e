//! Packed matrices as tensors of HF's files, as tools write them that our reader reads without packing anew: nf4 as
//! bitsandbytes, block_fp8 as transformers' fine-grained FP8, nvfp4 as NVIDIA's ModelOpt, whose scale of the matrix
//! stands in the file as it is (compressed-tensors stores its inverse).

use crate::{
    dtype::DType,
    quant::{Format, Grid, QuantError, nf4, nvfp4},
    weights::TensorMeta,
};
use serde_json::{Value, json};
use std::ops::Range;

/// A tensor of a file.
pub(super) struct Part {
    pub name: String,
    /// Name in headers of safetensors.
    pub dtype: &'static str,
    /// Bytes of an element.
    pub size: usize,
    pub shape: Vec<usize>,
}

impl Part {
    /// Plain numbers.
    pub fn plain(name: String, meta: &TensorMeta) -> Self {
        let dtype = match meta.dtype {
            DType::F32 => "F32",
            DType::Bf16 => "BF16",
            DType::F16 => "F16",
        };
        Self { name, dtype, size: meta.dtype.size(), shape: meta.shape.clone() }
    }

    fn fp32(name: String, shape: Vec<usize>) -> Self {
        Self { name, dtype: "F32", size: 4, shape }
    }

    fn codes(name: String, dtype: &'static str, shape: Vec<usize>) -> Self {
        Self { name, dtype, size: 1, shape }
    }

    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product::<u64>() * self.size as u64
    }
}

/// bitsandbytes' state of the matrix, in a tensor of JSON.
fn state_of(grid: Grid, dtype: DType) -> Vec<u8> {
    let state = json!({"quant_type": "nf4", "blocksize": nf4::BLOCK, "dtype": dtype.name(),
        "shape": [grid.rows, grid.columns]});
    state.to_string().into_bytes()
}

fn state_name(matrix: &str) -> String {
    format!("{matrix}.quant_state.bitsandbytes__nf4")
}

/// The tensors of the packed `matrix`, which stands for numbers in `dtype`. Columns of nvfp4 are whole groups.
pub(super) fn parts(matrix: &str, grid: Grid, dtype: DType) -> Vec<Part> {
    let Grid { format, rows, columns } = grid;
    let (elements, name) = (rows * columns, matrix.to_owned());
    match format {
        Format::Nf4 => vec![
            Part::codes(name, "U8", vec![elements.div_ceil(2), 1]),
            Part::fp32(format!("{matrix}.absmax"), vec![elements.div_ceil(nf4::BLOCK)]),
            Part::fp32(format!("{matrix}.quant_map"), vec![nf4::TABLE.len()]),
            Part::codes(state_name(matrix), "U8", vec![state_of(grid, dtype).len()]),
        ],
        Format::BlockFp8 => {
            let side = format.group();
            vec![
                Part::codes(name, "F8_E4M3", vec![rows, columns]),
                Part::fp32(format!("{matrix}_scale_inv"), vec![rows.div_ceil(side), columns.div_ceil(side)]),
            ]
        }
        Format::NvFp4 => vec![
            Part::codes(name, "U8", vec![rows, columns / 2]),
            Part::codes(format!("{matrix}_scale"), "F8_E4M3", vec![rows, columns / nvfp4::GROUP]),
            Part::fp32(format!("{matrix}_scale_2"), vec![]),
        ],
    }
}

/// Bytes of `tiles` of the packed `matrix`, a run of [`Grid::runs`]: tensor, first byte in it, bytes.
///
/// # Errors
/// `packed` is of another length than `tiles`.
pub(super) fn of_tiles(
    matrix: &str,
    grid: Grid,
    tiles: Range<usize>,
    packed: &[u8],
) -> Result<Vec<(String, usize, Vec<u8>)>, QuantError> {
    let (elements, name) = (grid.elements(tiles.clone()), matrix.to_owned());
    let fp32 = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect();
    Ok(match grid.format {
        Format::Nf4 => {
            let (codes, absmax) = nf4::to_blocks(packed, elements.len())?;
            let scales = (format!("{matrix}.absmax"), elements.start / nf4::BLOCK * 4, fp32(absmax));
            vec![(name, elements.start / 2, codes), scales]
        }
        Format::BlockFp8 => {
            let (codes, scales) = grid.to_blocks(tiles.clone(), packed)?;
            let rows = grid.held(tiles.clone()).map(|held| {
                let own = held.start - elements.start..held.end - elements.start;
                (name.clone(), held.start, codes[own].to_vec())
            });
            let scales = (format!("{matrix}_scale_inv"), tiles.start * 4, fp32(scales));
            rows.chain([scales]).collect()
        }
        Format::NvFp4 => {
            let first = elements.start / nvfp4::GROUP;
            let (codes, scales) = nvfp4::to_groups(packed, elements.len() / nvfp4::GROUP)?;
            vec![(name, elements.start / 2, codes), (format!("{matrix}_scale"), first, scales)]
        }
    })
}

/// Tensors of the packed `matrix` that do not lie in its tiles, whole. `global`: its scale.
pub(super) fn beside(matrix: &str, grid: Grid, dtype: DType, global: f32) -> Vec<(String, Vec<u8>)> {
    let table = || nf4::TABLE.into_iter().flat_map(f32::to_le_bytes).collect();
    match grid.format {
        Format::Nf4 => {
            vec![(format!("{matrix}.quant_map"), table()), (state_name(matrix), state_of(grid, dtype))]
        }
        Format::BlockFp8 => Vec::new(),
        Format::NvFp4 => vec![(format!("{matrix}_scale_2"), global.to_le_bytes().to_vec())],
    }
}

/// `quantization_config` of config.json for matrices in `format`, but for the linear layers `plain`.
pub(super) fn config(format: Format, plain: &[String]) -> Value {
    match format {
        Format::Nf4 => json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": false,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": plain,
        }),
        Format::BlockFp8 => json!({
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [format.group(), format.group()],
            "modules_to_not_convert": plain,
        }),
        Format::NvFp4 => json!({
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": format.group(),
            "ignore": plain,
            "producer": {"name": "modelopt"},
        }),
    }
}
