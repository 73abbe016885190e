//! Packed tiles of sources that have plain numbers.

use super::{SourceError, WeightSource, unknown};
use crate::{
    dtype::DType,
    quant::{self, Format, Grid, QuantError},
};
use std::ops::Range;

/// The grid of the matrix `name` in `format`.
pub(super) fn grid<S: WeightSource + ?Sized>(
    source: &S,
    name: &str,
    format: Format,
) -> Result<Grid, SourceError> {
    let shape = source.meta(name).ok_or_else(|| unknown(name))?.shape;
    let &[rows, columns] = &shape[..] else {
        return Err(SourceError::NoMatrix { name: name.to_owned(), shape });
    };
    Ok(Grid { format, rows, columns })
}

/// Packs `tiles` of the matrix `name` from its values, about a MiB of them at a time ([`WeightSource::read_packed`]).
pub fn pack_values<S: WeightSource + ?Sized>(
    source: &S,
    name: &str,
    format: Format,
    global: f32,
    tiles: Range<usize>,
    out: &mut [u8],
) -> Result<(), SourceError> {
    let grid = grid(source, name, format)?;
    let bytes = format.tile().bytes;
    for_runs(source, name, grid, tiles.clone(), |run, values| {
        let out = &mut out[(run.start - tiles.start) * bytes..(run.end - tiles.start) * bytes];
        grid.pack(run, values, global, out)
    })
}

/// The largest magnitude of the values in `tiles` ([`WeightSource::amax`]).
pub(super) fn amax_of_values<S: WeightSource + ?Sized>(
    source: &S,
    name: &str,
    format: Format,
    tiles: Range<usize>,
) -> Result<f32, SourceError> {
    let mut most = 0f32;
    for_runs(source, name, grid(source, name, format)?, tiles, |_, values| {
        most = most.max(quant::amax(values)?);
        Ok(())
    })?;
    Ok(most)
}

/// Calls `f` with each run of `tiles` and the values of its elements.
fn for_runs<S: WeightSource + ?Sized>(
    source: &S,
    name: &str,
    grid: Grid,
    tiles: Range<usize>,
    mut f: impl FnMut(Range<usize>, &[f32]) -> Result<(), QuantError>,
) -> Result<(), SourceError> {
    if tiles.end > grid.tiles() {
        return Err(SourceError::Range { name: name.to_owned(), range: tiles, elements: grid.tiles() });
    }
    let mut values = Vec::new();
    for run in grid.runs(tiles) {
        let elements = grid.elements(run.clone());
        values.resize(elements.len(), 0f32);
        source.read(name, elements.clone(), DType::F32, bytemuck::cast_slice_mut(&mut values))?;
        f(run, &values).map_err(|error| of_tensor(name, grid, elements.start, error))?;
    }
    Ok(())
}

/// Elements `range` (row by row) of the matrix `name` of `grid` as `dtype` into `out`. `read` gets each run of tiles
/// that holds some of them, and writes its bytes.
pub(super) fn read_unpacked(
    name: &str,
    (grid, global): (Grid, f32),
    range: Range<usize>,
    dtype: DType,
    out: &mut [u8],
    read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), SourceError>,
) -> Result<(), SourceError> {
    let size = dtype.size();
    // Runs of whole rows of blocks hold all elements between their first and last.
    for run in grid.runs(grid.covering(range.clone())) {
        let elements = grid.elements(run.clone());
        let mut packed = vec![0; run.len() * grid.format.tile().bytes];
        read(run.clone(), &mut packed)?;
        let mut values = vec![0f32; elements.len()];
        grid.unpack(run, &packed, global, &mut values)
            .map_err(|error| SourceError::Quant { name: name.to_owned(), error })?;
        let (from, to) = (range.start.max(elements.start), range.end.min(elements.end));
        let values = &values[from - elements.start..to - elements.start];
        let out = &mut out[(from - range.start) * size..(to - range.start) * size];
        DType::F32.convert(bytemuck::cast_slice(values), dtype, out);
    }
    Ok(())
}

/// The error of packing the matrix `name` from element `first` on.
fn of_tensor(name: &str, grid: Grid, first: usize, error: QuantError) -> SourceError {
    let name = name.to_owned();
    match error {
        QuantError::NonFinite { index, value } => {
            let element = first + index;
            SourceError::NonFinite { name, index: [element / grid.columns, element % grid.columns], value }
        }
        error => SourceError::Quant { name, error },
    }
}
