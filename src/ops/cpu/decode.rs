//! Decoding of packed matrices on the host: whole, or a few rows at a time inside of a product.

use super::{Stored, pool};
use crate::{
    ops::row_layout::{Footprint, RowLayout},
    quant::{Decoded, Grid, Noise, Packed},
};
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Some rows of a matrix of packed leaves, one below the other, which a product decodes where it uses them.
#[derive(Clone, Copy)]
pub struct PackedRows<'a> {
    leaves: &'a [Packed<'a>],
    first: usize,
    rows: usize,
    columns: usize,
}

impl<'a> PackedRows<'a> {
    /// All rows of `leaves`.
    ///
    /// # Panics
    /// The leaves differ in their columns, or have other bytes than their grids.
    pub fn of(leaves: &'a [Packed<'a>]) -> Self {
        let columns = leaves.first().map_or(0, |leaf| leaf.grid.columns);
        for Packed { grid, bytes, .. } in leaves {
            assert_eq!((grid.columns, grid.bytes()), (columns, bytes.len()), "{grid:?}");
        }
        Self { leaves, first: 0, rows: leaves.iter().map(|leaf| leaf.grid.rows).sum(), columns }
    }

    /// Some of its rows.
    pub fn rows(self, range: &Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        Self { first: self.first + range.start, rows: range.len(), ..self }
    }

    /// [rows, columns]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The bytes of its leaves.
    pub fn footprints(&self) -> impl Iterator<Item = Footprint> {
        self.leaves.iter().map(|leaf| {
            let columns = leaf.bytes.len();
            let layout = RowLayout { rows: 1, columns, stride: columns, inner: 1, outer_stride: 0 };
            layout.footprint(leaf.bytes.as_ptr().addr(), 1)
        })
    }

    /// Values of a rectangle into rows of `out` that are `stride` apart, as [`decode`] gives them.
    ///
    /// # Panics
    /// The rectangle lies outside of the matrix, or of `out`.
    pub fn decode<E: Decoded>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        stride: usize,
        out: &mut [E],
    ) {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let rows = self.first + rows.start..self.first + rows.end;
        let mut top = 0;
        for leaf in self.leaves {
            let own = top..top + leaf.grid.rows;
            let (from, to) = (rows.start.max(own.start), rows.end.min(own.end));
            if from < to {
                let out = &mut out[(from - rows.start) * stride..];
                let decoded = leaf.strided(from - top..to - top, columns.clone(), stride, out);
                assert_eq!(decoded, Ok(()), "{:?}", leaf.grid);
            }
            top = own.end;
        }
    }
}

/// Decodes `tiles` `[tiles, bytes]` u8 of a matrix to `out` `[rows, columns]`, fp32 or bf16. `global` is the scale of
/// the matrix, 1 where its format has none.
///
/// # Panics
/// A tensor is not on the host, not dense, or of another kind or size.
pub fn decode(grid: Grid, tiles: &Tensor, global: f32, out: &Tensor) {
    let _span = crate::trace::operation("linear.decode");
    match out.kind() {
        Kind::BFloat16 => decode_to::<bf16>(grid, tiles, global, None, out),
        _ => decode_to::<f32>(grid, tiles, global, None, out),
    }
}

/// [`decode`] with `noise` added before rounding.
///
/// # Panics
/// See [`decode`].
pub fn decode_with_noise(grid: Grid, tiles: &Tensor, global: f32, noise: Noise, out: &Tensor) {
    let _span = crate::trace::operation("linear.decode");
    match out.kind() {
        Kind::BFloat16 => decode_to::<bf16>(grid, tiles, global, Some(noise), out),
        _ => decode_to::<f32>(grid, tiles, global, Some(noise), out),
    }
}

/// Memory to which threads write, each to elements of its own.
struct Target<E>(*mut E);

// SAFETY: `decode_to` hands each thread elements that no other one has.
unsafe impl<E> Sync for Target<E> {}

impl<E> Target<E> {
    /// # Safety
    /// The elements lie in the memory, and have no other reference.
    #[expect(clippy::mut_from_ref, reason = "threads share the memory, not its elements")]
    unsafe fn elements(&self, range: &Range<usize>) -> &mut [E] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

fn decode_to<E: Decoded + Stored>(
    grid: Grid,
    tiles: &Tensor,
    global: f32,
    noise: Option<Noise>,
    out: &Tensor,
) {
    assert_eq!((tiles.kind(), out.kind()), (Kind::Uint8, E::KIND), "packed tiles, and their values");
    assert_eq!((tiles.device(), out.device()), (Device::Cpu, Device::Cpu), "packed tiles on the host");
    assert!(tiles.is_contiguous() && out.is_contiguous(), "packed tiles and their values are dense");
    assert_eq!((tiles.numel(), out.numel()), (grid.bytes(), grid.rows * grid.columns), "{grid:?}");
    // SAFETY: the tensor is so many dense bytes, is borrowed, and has no writer: weights are frozen.
    let packed =
        unsafe { std::slice::from_raw_parts(tiles.data_ptr().cast::<u8>().cast_const(), grid.bytes()) };
    let to = Target(out.data_ptr().cast::<E>());
    // Runs are whole rows of blocks, so each has neighbouring elements of its own.
    let runs: Vec<Range<usize>> = grid.runs(0..grid.tiles()).collect();
    let each = grid.format.tile().bytes;
    pool::tasks(runs.len(), |i| {
        let run = runs[i].clone();
        // SAFETY: the elements of a run, which one task alone has, lie in the output, which has no other reference.
        let out = unsafe { to.elements(&grid.elements(run.clone())) };
        let packed = &packed[run.start * each..run.end * each];
        let decoded = match noise {
            None => grid.unpack(run, packed, global, out),
            Some(noise) => grid.unpack_with_noise(run, packed, global, noise, out),
        };
        assert_eq!(decoded, Ok(()), "{grid:?}");
    });
}
