//! The tiles of a matrix: their number, the elements that each holds, packing and unpacking in the order of tiles.

use super::{
    Decoded, Format, QuantError, block_fp8,
    block_fp8::SIDE,
    check_length,
    four_bit::{self, Window},
    nf4::{self, Nf4},
    nvfp4::{self, GROUP, NvFp4},
};
use std::ops::Range;

/// Tiles that [`Grid::runs`] takes together where they hold neighbours.
const RUN: usize = 256;

/// A matrix `[rows, columns]`, elements row by row, cut into tiles of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub format: Format,
    pub rows: usize,
    pub columns: usize,
}

impl Grid {
    /// Number of tiles; each matrix begins with one of its own.
    pub fn tiles(&self) -> usize {
        match self.format {
            Format::Nf4 => (self.rows * self.columns).div_ceil(nf4::TILE.elements),
            Format::NvFp4 => (self.rows * self.padded()).div_ceil(nvfp4::TILE.elements),
            Format::BlockFp8 => self.rows.div_ceil(SIDE) * self.across(),
        }
    }

    /// Bytes of all tiles.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.format.tile().bytes
    }

    /// Columns of nvfp4 in whole groups.
    fn padded(&self) -> usize {
        self.columns.next_multiple_of(GROUP)
    }

    /// Blocks of block_fp8 in a row.
    fn across(&self) -> usize {
        self.columns.div_ceil(SIDE)
    }

    /// The elements from the first to the last that `tiles` hold, row by row. nf4 and nvfp4 hold all of them, block_fp8
    /// those in the columns of its blocks.
    pub fn elements(&self, tiles: Range<usize>) -> Range<usize> {
        if tiles.is_empty() {
            return 0..0;
        }
        match self.format {
            Format::Nf4 => {
                let all = self.rows * self.columns;
                let at = |tile: usize| (tile * nf4::TILE.elements).min(all);
                at(tiles.start)..at(tiles.end)
            }
            Format::NvFp4 => {
                let all = self.rows * self.padded();
                let at = |tile: usize| {
                    let place = (tile * nvfp4::TILE.elements).min(all);
                    place / self.padded() * self.columns + (place % self.padded()).min(self.columns)
                };
                at(tiles.start)..at(tiles.end)
            }
            Format::BlockFp8 => {
                let (first, last) = (self.block(tiles.start), self.block(tiles.end - 1));
                let start = first.0.start * self.columns + first.1.start;
                start..(last.0.end - 1) * self.columns + last.1.end
            }
        }
    }

    /// The tiles from the first to the last that hold some of `elements`.
    pub fn covering(&self, elements: Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return 0..0;
        }
        let (first, last) = (elements.start, elements.end - 1);
        match self.format {
            Format::Nf4 => first / nf4::TILE.elements..last / nf4::TILE.elements + 1,
            Format::NvFp4 => {
                let tile = |element: usize| {
                    let place = element / self.columns * self.padded() + element % self.columns;
                    place / nvfp4::TILE.elements
                };
                tile(first)..tile(last) + 1
            }
            Format::BlockFp8 => {
                let band = |element: usize| element / self.columns / SIDE;
                band(first) * self.across()..(band(last) + 1) * self.across()
            }
        }
    }

    /// Cuts `tiles` into runs of about a MiB of fp32 elements; those of block_fp8 end with its rows of blocks.
    pub fn runs(&self, tiles: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = if self.format == Format::BlockFp8 { self.across().max(1) } else { RUN };
        let mut start = tiles.start;
        std::iter::from_fn(move || {
            let end = ((start / step + 1) * step).min(tiles.end);
            let run = start..end;
            start = end;
            (!run.is_empty()).then_some(run)
        })
    }

    /// Rows and columns of a tile of block_fp8.
    fn block(&self, tile: usize) -> (Range<usize>, Range<usize>) {
        let (row, column) = (tile / self.across() * SIDE, tile % self.across() * SIDE);
        (row..(row + SIDE).min(self.rows), column..(column + SIDE).min(self.columns))
    }

    /// Runs of neighbouring elements that `tiles` hold, ascending. `tiles` is a run of [`runs`](Self::runs).
    pub fn held(&self, tiles: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, columns) = (self.elements(tiles.clone()), self.columns.max(1));
        let width = match self.format {
            Format::BlockFp8 if !tiles.is_empty() => {
                self.block(tiles.end - 1).1.end - self.block(tiles.start).1.start
            }
            _ => columns,
        };
        // Blocks over the whole width of the matrix have no others between their rows.
        let step = if width == columns { all.len().max(1) } else { columns };
        let each = if width == columns { all.len() } else { width };
        all.clone().step_by(step).map(move |first| first..all.end.min(first + each))
    }

    /// Packs `tiles` into `out`. `values` are their [`elements`](Self::elements); `global` is the scale of the matrix
    /// ([`Format::global`]), 1 where the format has none.
    ///
    /// # Errors
    /// A value is not finite, or `values` or `out` are of another length than `tiles`.
    pub fn pack(
        &self,
        tiles: Range<usize>,
        values: &[f32],
        global: f32,
        out: &mut [u8],
    ) -> Result<(), QuantError> {
        let elements = self.elements(tiles.clone());
        check_length("values", values.len(), elements.len())?;
        check_length("bytes of tiles", out.len(), tiles.len() * self.format.tile().bytes)?;
        match self.format {
            Format::Nf4 => nf4::pack(values, out),
            Format::NvFp4 if self.columns == self.padded() => nvfp4::pack(values, global, out),
            Format::NvFp4 => {
                let mut full = vec![0.0; nvfp4::TILE.elements];
                for (tile, out) in tiles.zip(out.chunks_exact_mut(nvfp4::TILE.bytes)) {
                    full.fill(0.0);
                    let mut filled = 0;
                    self.segments(tile, |at, element, count| {
                        let from = element - elements.start;
                        full[at..at + count].copy_from_slice(&values[from..from + count]);
                        filled = (at + count).next_multiple_of(GROUP);
                    });
                    nvfp4::pack(&full[..filled], global, out).map_err(|_| super::non_finite(values))?;
                }
                Ok(())
            }
            Format::BlockFp8 => {
                let mut full = vec![0.0; block_fp8::TILE.elements];
                for (tile, out) in tiles.zip(out.chunks_exact_mut(block_fp8::TILE.bytes)) {
                    full.fill(0.0);
                    self.segments(tile, |at, element, count| {
                        let from = element - elements.start;
                        full[at..at + count].copy_from_slice(&values[from..from + count]);
                    });
                    block_fp8::pack_tile(&full, out).ok_or_else(|| super::non_finite(values))?;
                }
                Ok(())
            }
        }
    }

    /// Calls `f(place in the tile, first element, count)` for each run of neighbours in a tile of nvfp4 or block_fp8.
    fn segments(&self, tile: usize, mut f: impl FnMut(usize, usize, usize)) {
        match self.format {
            Format::Nf4 => {
                let elements = self.elements(tile..tile + 1);
                f(0, elements.start, elements.len());
            }
            Format::NvFp4 => {
                let (begin, all) = (tile * nvfp4::TILE.elements, self.rows * self.padded());
                let end = (begin + nvfp4::TILE.elements).min(all);
                let mut place = begin;
                while place < end {
                    let (row, column) = (place / self.padded(), place % self.padded());
                    let next = ((row + 1) * self.padded()).min(end);
                    let count = (next - place).min(self.columns.saturating_sub(column));
                    f(place - begin, row * self.columns + column, count);
                    place = next;
                }
            }
            Format::BlockFp8 => {
                let (rows, columns) = self.block(tile);
                for (i, row) in rows.enumerate() {
                    f(i * SIDE, row * self.columns + columns.start, columns.len());
                }
            }
        }
    }

    /// Values of `tiles`, whose bytes are `packed`, into `out`, their [`elements`](Self::elements). Elements between
    /// those that `tiles` hold stay as they are.
    ///
    /// # Errors
    /// `packed` or `out` are of another length than `tiles`.
    pub fn unpack<T: Decoded>(
        &self,
        tiles: Range<usize>,
        packed: &[u8],
        global: f32,
        out: &mut [T],
    ) -> Result<(), QuantError> {
        let (elements, bytes) = (self.elements(tiles.clone()), self.format.tile().bytes);
        check_length("values", out.len(), elements.len())?;
        check_length("bytes of tiles", packed.len(), tiles.len() * bytes)?;
        if self.format == Format::Nf4 {
            four_bit::unpack::<Nf4, T>(packed, 0, 1.0, out);
            return Ok(());
        }
        if self.format == Format::NvFp4 && self.columns == self.padded() {
            four_bit::unpack::<NvFp4, T>(packed, 0, global, out);
            return Ok(());
        }
        for (tile, packed) in tiles.zip(packed.chunks_exact(bytes)) {
            self.segments(tile, |at, element, count| {
                let to = &mut out[element - elements.start..][..count];
                match self.format {
                    Format::BlockFp8 => {
                        block_fp8::unpack(packed, [at / SIDE, at % SIDE], [1, count], count, to);
                    }
                    _ => four_bit::unpack::<NvFp4, T>(packed, at, global, to),
                }
            });
        }
        Ok(())
    }
}

impl Grid {
    /// Tiles of block_fp8 from HF's tensors: `codes` are the [`elements`](Self::elements) of `tiles`, e4m3, and
    /// `scales` are those of the tiles in their order.
    ///
    /// # Errors
    /// A length is wrong, or this is no grid of block_fp8.
    pub fn from_blocks(
        &self,
        tiles: Range<usize>,
        codes: &[u8],
        scales: &[f32],
        out: &mut [u8],
    ) -> Result<(), QuantError> {
        if self.format != Format::BlockFp8 {
            return Err(QuantError::Format { name: self.format.name().to_owned() });
        }
        let elements = self.elements(tiles.clone());
        check_length("codes", codes.len(), elements.len())?;
        check_length("scales", scales.len(), tiles.len())?;
        check_length("bytes of tiles", out.len(), tiles.len() * block_fp8::TILE.bytes)?;
        for ((tile, out), &scale) in tiles.zip(out.chunks_exact_mut(block_fp8::TILE.bytes)).zip(scales) {
            out.fill(0);
            block_fp8::set_scale(&mut out[block_fp8::TILE.elements..], scale);
            self.segments(tile, |at, element, count| {
                out[at..at + count].copy_from_slice(&codes[element - elements.start..][..count]);
            });
        }
        Ok(())
    }

    /// Codes and scales as HF's tensors have them, of `tiles` with the bytes `packed`: e4m3 of their
    /// [`elements`](Self::elements), 0 between those that they hold, and fp32 scales block by block.
    ///
    /// # Errors
    /// `packed` is of another length, or this is no grid of block_fp8.
    pub fn to_blocks(&self, tiles: Range<usize>, packed: &[u8]) -> Result<(Vec<u8>, Vec<f32>), QuantError> {
        if self.format != Format::BlockFp8 {
            return Err(QuantError::Format { name: self.format.name().to_owned() });
        }
        check_length("bytes of tiles", packed.len(), tiles.len() * block_fp8::TILE.bytes)?;
        let elements = self.elements(tiles.clone());
        let mut codes = vec![0; elements.len()];
        let mut scales = Vec::with_capacity(tiles.len());
        for (tile, packed) in tiles.zip(packed.chunks_exact(block_fp8::TILE.bytes)) {
            scales.push(block_fp8::scale(packed));
            self.segments(tile, |at, element, count| {
                let to = element - elements.start;
                codes[to..to + count].copy_from_slice(&packed[at..at + count]);
            });
        }
        Ok((codes, scales))
    }
}

/// All tiles of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    pub grid: Grid,
    /// `[tiles · bytes of a tile]`
    pub bytes: &'a [u8],
    /// The scale of the matrix, 1 where the format has none.
    pub global: f32,
}

impl Packed<'_> {
    /// Values of a rectangle of the matrix into `out` `[rows, columns]`, row by row.
    ///
    /// # Errors
    /// The rectangle lies outside of the matrix, or a length is wrong.
    pub fn rectangle<T: Decoded>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [T],
    ) -> Result<(), QuantError> {
        check_length("values", out.len(), rows.len() * columns.len())?;
        let stride = columns.len();
        self.strided(rows, columns, stride, out)
    }

    /// Values of a rectangle of the matrix into rows of `out` that are `stride` apart. What lies between them stays.
    ///
    /// # Errors
    /// The rectangle lies outside of the matrix, or of `out`.
    pub fn strided<T: Decoded>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        stride: usize,
        out: &mut [T],
    ) -> Result<(), QuantError> {
        let grid = &self.grid;
        check_length("bytes of tiles", self.bytes.len(), grid.bytes())?;
        check_length("rows up to the last", grid.rows.min(rows.end), rows.end)?;
        check_length("columns up to the last", grid.columns.min(columns.end), columns.end)?;
        if columns.is_empty() || rows.is_empty() {
            return Ok(());
        }
        let last = (rows.len() - 1) * stride + columns.len();
        check_length("values of rows", out.len().min(last), last)?;
        check_length("values from a row to the next", stride.max(columns.len()), stride)?;
        let window = |step: usize| Window {
            first: rows.start * step + columns.start,
            rows: rows.len(),
            width: columns.len(),
            step,
            stride,
        };
        match grid.format {
            Format::Nf4 => four_bit::unpack_window::<Nf4, T>(self.bytes, window(grid.columns), 1.0, out),
            Format::NvFp4 => {
                four_bit::unpack_window::<NvFp4, T>(self.bytes, window(grid.padded()), self.global, out);
            }
            Format::BlockFp8 => {
                let mut row = rows.start;
                while row < rows.end {
                    let count = (SIDE - row % SIDE).min(rows.end - row);
                    let mut column = columns.start;
                    while column < columns.end {
                        let width = (SIDE - column % SIDE).min(columns.end - column);
                        let tile = row / SIDE * grid.across() + column / SIDE;
                        let bytes = &self.bytes[tile * block_fp8::TILE.bytes..][..block_fp8::TILE.bytes];
                        let out = &mut out[(row - rows.start) * stride + column - columns.start..];
                        let first = [row % SIDE, column % SIDE];
                        block_fp8::unpack(bytes, first, [count, width], stride, out);
                        column += width;
                    }
                    row += count;
                }
            }
        }
        Ok(())
    }
}
