//! Decoding of packed matrices on the host.

use super::{Stored, pool};
use crate::quant::{Decoded, Grid};
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Decodes `tiles` `[tiles, bytes]` u8 of a matrix to `out` `[rows, columns]`, fp32 or bf16. `global` is the scale of
/// the matrix, 1 where its format has none.
///
/// # Panics
/// A tensor is not on the host, not dense, or of another kind or size.
pub fn decode(grid: Grid, tiles: &Tensor, global: f32, out: &Tensor) {
    let _span = crate::trace::operation("linear.decode");
    match out.kind() {
        Kind::BFloat16 => decode_to::<bf16>(grid, tiles, global, out),
        _ => decode_to::<f32>(grid, tiles, global, out),
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

fn decode_to<E: Decoded + Stored>(grid: Grid, tiles: &Tensor, global: f32, out: &Tensor) {
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
        let decoded = grid.unpack(run.clone(), &packed[run.start * each..run.end * each], global, out);
        assert_eq!(decoded, Ok(()), "{grid:?}");
    });
}
