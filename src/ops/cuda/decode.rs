//! The launch of `decode.cu`.

use super::{Kernels, THREADS, WARP, values};
use crate::{
    ops::linear::PackedMatrices,
    quant::{Format, Grid},
};
use std::{
    ffi::c_void,
    ops::Range,
    ptr::{from_mut, null_mut},
};
use tch::{Kind, Tensor};

/// Most leaves of a base.
const LEAVES: usize = 8;

/// Codes that a warp decodes.
const RUN: usize = 1024;

/// `Leaves` of `decode.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Leaves {
    count: u32,
    tiles: u32,
    rows: u32,
    columns: u32,
    tiles_of: [u32; LEAVES],
    rows_of: [u32; LEAVES],
}

impl Leaves {
    /// `None` for too many leaves, or one in which the kernel cannot count: from 2³¹ elements on.
    fn of(packed: &PackedMatrices) -> Option<Self> {
        let (mut tiles_of, mut rows_of) = ([0; LEAVES], [0; LEAVES]);
        let widths = &packed.widths;
        if !(1..=LEAVES).contains(&widths.len()) {
            return None;
        }
        for ((tiles, rows), &width) in tiles_of.iter_mut().zip(&mut rows_of).zip(widths) {
            let Grid { format, .. } = packed.grid(width);
            let count = packed.grid(width).tiles();
            i32::try_from(count * format.tile().elements).ok()?;
            (*tiles, *rows) = (count as u32, width as u32);
        }
        Some(Self {
            count: widths.len() as u32,
            tiles: packed.tiles_of_base().try_into().ok()?,
            rows: packed.rows().try_into().ok()?,
            columns: packed.columns.try_into().ok()?,
            tiles_of,
            rows_of,
        })
    }
}

impl Kernels {
    /// Decodes the matrices of `bases` to `out` `[bases, rows, columns]`, fp32 or bf16, in one launch. The scales of
    /// matrices stay on the device.
    pub fn decode(&self, packed: &PackedMatrices, bases: &Range<usize>, out: &Tensor) -> bool {
        let run = || {
            let leaves = Leaves::of(packed)?;
            let PackedMatrices { format, tiles, scales, .. } = packed;
            let (tile, of_base) = (format.tile(), leaves.tiles as usize);
            let at = values(tiles, Kind::Uint8).filter(|at| at.addr().is_multiple_of(16))?;
            let scales_at = match scales {
                Some(scales) => values(scales, Kind::Float)?,
                None if format.has_global() => return None,
                None => null_mut(),
            };
            let own = scales.as_ref().map_or(usize::MAX, Tensor::numel);
            let elements = bases.len() * packed.rows() * packed.columns;
            let fits = tiles.numel() >= bases.end * of_base * tile.bytes
                && own >= bases.end * packed.widths.len()
                && out.numel() == elements;
            if !fits {
                return None;
            }
            let at = at.wrapping_byte_add(bases.start * of_base * tile.bytes);
            let scales_at = match scales {
                Some(_) => scales_at.wrapping_byte_add(bases.start * packed.widths.len() * size_of::<f32>()),
                None => scales_at,
            };
            let to = values(out, out.kind())?;
            let runs = u32::try_from(bases.len() * of_base * (tile.elements / RUN)).ok()?;
            let blocks = i64::from(runs.div_ceil(THREADS / WARP));
            match format {
                Format::Nf4 => {
                    start!(self, "decode_nf4", out.kind(), blocks, at, scales_at, to, leaves, runs)
                }
                Format::BlockFp8 => {
                    start!(self, "decode_block_fp8", out.kind(), blocks, at, scales_at, to, leaves, runs)
                }
                Format::NvFp4 => {
                    start!(self, "decode_nvfp4", out.kind(), blocks, at, scales_at, to, leaves, runs)
                }
            }
        };
        run().is_some()
    }
}
