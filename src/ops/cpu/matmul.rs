//! GEMM for large matrices: out = start + scale · Σ left·right over some terms, bf16 in, fp32 sums.
//!
//! The scheme is that of Goto and van de Geijn (2008). A thread packs the right factors of its output columns into
//! tiles, as many columns at a time as fit the second-level cache. Rows of a left factor already are rows of tiles and
//! are read in place. [Blocks](super::block) of the output are summed over all terms in registers, so an adapter's part
//! of a layer's output costs neither a pass over the output nor a rounding.
//!
//! A frozen right factor may be packed in a format of `quant`: it is decoded while its tiles are packed, a few rows at
//! a time that stay in the first-level cache, so no decoded matrix is written to memory and read again.
//!
//! With few rows, as an expert has, reading the right factor takes most of the time. Measured no faster with AMX:
//! prefetching it, packing the next columns while the last are multiplied, multiplying its transpose, and stores that
//! bypass the caches.

use super::{
    block::{Blocks, Place, Stretch, Sums, Tile},
    decode::PackedRows,
    operand::{Matrix, Operand, Right},
    packing::{BLOCK, DEPTH, NUMBERS, Packing, ROW_BYTES, SIDE},
    pool,
    scratch::{Memory, words},
};
use crate::ops::row_layout::Footprint;
use half::bf16;
use std::ops::Range;

/// Tiles along the sum that are packed at a time.
const PASS_TILES: usize = 48;

/// Rows of unfinished sums that are kept at a time, where a sum is longer than a pass.
const UNFINISHED_ROWS: usize = 1024;

/// Columns of a band of 32 rows that are decoded together: 16 KiB, half of a first-level cache.
const BAND_COLUMNS: usize = 256;

/// Numbers of a band.
const BAND: usize = BLOCK * BAND_COLUMNS;

/// A product to be summed: left `[rows, depth]` · right `[depth, columns]`.
pub struct Term<'a> {
    pub left: Operand<'a>,
    pub right: Right<'a>,
}

/// The destination of a sum of products.
pub enum Output<'a> {
    /// to = start + scale·product, rounded to bf16; `start` has the shape of `to`.
    Rounded { to: Matrix<'a, bf16>, start: Option<Matrix<'a, bf16>>, scale: f32 },
    /// fp32 to += product
    Added(Matrix<'a, f32>),
    /// fp32 to += productᵀ
    AddedTransposed(Matrix<'a, f32>),
}

impl Output<'_> {
    fn footprint(&self) -> Footprint {
        match self {
            Self::Rounded { to, .. } => to.footprint(to.rows),
            Self::Added(to) | Self::AddedTransposed(to) => to.footprint(to.rows),
        }
    }

    /// [rows, columns] of the product.
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Rounded { to, .. } => to.shape(),
            Self::Added(to) => to.shape(),
            Self::AddedTransposed(to) => [to.columns, to.rows],
        }
    }
}

/// A pass's tiles of one term: tiles `along` of `term`, packed from the pass's tile `packed` on.
struct DepthSlice {
    term: usize,
    along: Range<usize>,
    packed: usize,
}

/// Cuts the tiles along the sum into passes of at most [`PASS_TILES`].
fn passes(lengths: impl Iterator<Item = usize>) -> Vec<Vec<DepthSlice>> {
    let mut passes = vec![Vec::new()];
    let mut used = 0;
    for (term, length) in lengths.enumerate() {
        let mut start = 0;
        while start < length {
            if used == PASS_TILES {
                passes.push(Vec::new());
                used = 0;
            }
            let n = (length - start).min(PASS_TILES - used);
            if let Some(pass) = passes.last_mut() {
                pass.push(DepthSlice { term, along: start..start + n, packed: used });
            }
            (start, used) = (start + n, used + n);
        }
    }
    passes
}

/// A product as its threads share it.
struct Product<'a, T> {
    machine: T,
    terms: &'a [Term<'a>],
    passes: Vec<Vec<DepthSlice>>,
    rows: usize,
    columns: usize,
    out: Output<'a>,
}

/// Computes the sum of `terms`. The sums may start from the output itself.
///
/// # Panics
/// Shapes do not agree. The output has a number twice, overlaps a factor, or partly overlaps the matrix it starts from.
pub fn multiply<T: Blocks>(machine: T, terms: &[Term], out: Output) {
    let [rows, columns] = out.shape();
    for Term { left, right } in terms {
        assert_eq!((left.shape()[0], left.shape()[1]), (rows, right.shape()[0]), "a left factor fits");
        assert_eq!(right.shape()[1], columns, "a right factor fits");
    }
    let written = out.footprint();
    assert!(!written.is_repeated(), "rows of an output overlap: {written:?}");
    let apart = |factor: Footprint| {
        assert!(!written.overlaps(&factor), "an output overlaps a factor: {written:?} and {factor:?}");
    };
    for Term { left, right } in terms {
        apart(left.footprint());
        match right {
            Right::Plain(right) => apart(right.footprint()),
            Right::Packed { matrix, .. } => matrix.footprints().for_each(apart),
        }
    }
    if let Output::Rounded { start: Some(start), to, .. } = &out {
        assert_eq!(start.shape(), [rows, columns], "the matrix that a sum starts from fits");
        let read = start.footprint(start.rows);
        assert!(
            start.is_in_place_of(to) || !written.overlaps(&read),
            "an output overlaps its start: {written:?} and {read:?}"
        );
    }
    let passes = passes(terms.iter().map(|term| term.right.shape()[0].div_ceil(DEPTH)));
    Product { machine, terms, passes, rows, columns, out }.compute();
}

impl<T: Blocks> Product<'_, T> {
    fn compute(&self) {
        let (down, across) = (self.rows.div_ceil(BLOCK), self.columns.div_ceil(BLOCK));
        if down == 0 || across == 0 {
            return;
        }
        let deepest = self.passes.iter().map(|pass| depth_of(pass)).max().unwrap_or(0).max(1);
        let most = (T::PACKED_TILES / (2 * deepest)).max(1);
        let threads = pool::threads();
        // As many parts as the threads can share evenly. Columns first: each part packs its own right factors.
        let beside = across.div_ceil(most).next_multiple_of(threads).min(across);
        let below = threads.div_ceil(beside).min(down);
        let part = |i: usize, of: usize, n: usize| i * n / of..(i + 1) * n / of;
        pool::tasks(beside * below, |i| {
            let rows = part(i / beside, below, down);
            let pairs = part(i % beside, beside, across);
            self.machine.run(
                #[inline(always)]
                || self.part(rows.start * BLOCK..self.rows.min(rows.end * BLOCK), pairs, deepest),
            );
        });
    }

    /// Computes the rows `rows` of the pairs of column tiles `pairs`; a pass has at most `deepest` tiles.
    #[inline(always)]
    fn part(&self, rows: Range<usize>, pairs: Range<usize>, deepest: usize) {
        let width = pairs.len();
        let passes = self.passes.len();
        // With one pass a block is done once it is computed; with more, all blocks wait for the next pass. A finished
        // block is written while the next one is computed: stores of tile registers are not visible to vector loads at
        // once.
        let height = if passes == 1 { rows.len() } else { rows.len().min(UNFINISHED_ROWS) };
        let kept = if passes == 1 { 2 } else { height.div_ceil(BLOCK) * width };
        let [left_tiles, right_tiles] = [2 * deepest, 2 * width * deepest];
        let has_packed = self.terms.iter().any(|term| matches!(term.right, Right::Packed { .. }));
        let band = if has_packed { BAND } else { 0 };
        let tiles = words::<Tile>(left_tiles + right_tiles);
        let mut memory = Memory::take(tiles + words::<Sums>(kept) + words::<bf16>(band));
        let mut scratch = memory.scratch();
        let left: &mut [Tile] = scratch.cut(left_tiles);
        let right: &mut [Tile] = scratch.cut(right_tiles);
        let sums: &mut [Sums] = scratch.cut(kept);
        let band: &mut [bf16] = scratch.cut(band);
        let mut done = None;
        let mut places = Vec::with_capacity(self.terms.len());
        for first in rows.clone().step_by(height) {
            for (number, pass) in self.passes.iter().enumerate() {
                let depth = depth_of(pass);
                self.pack_right(pass, &pairs, right, band);
                for (i, row) in (first..rows.end.min(first + height)).step_by(BLOCK).enumerate() {
                    places.clear();
                    let mut unused = &mut *left;
                    places.extend(pass.iter().map(|section| {
                        let (own, rest) = std::mem::take(&mut unused).split_at_mut(2 * section.along.len());
                        unused = rest;
                        self.place(section, row, own)
                    }));
                    for (j, pair) in pairs.clone().enumerate() {
                        let place = i * width + j;
                        let place = if passes == 1 { place % 2 } else { place };
                        let right = right[j * 2 * depth..][..2 * depth].as_ptr();
                        let stretches = pass.iter().zip(&places).map(
                            #[inline(always)]
                            |(section, &left)| Stretch {
                                tiles: section.along.len(),
                                left,
                                right: right.wrapping_add(section.packed),
                                next_column: depth,
                            },
                        );
                        let shape = [self.rows - row, self.columns - pair * BLOCK];
                        // SAFETY: a place has two rows of its section's tiles: of a matrix that `multiply` found apart
                        // from the output, or packed above. `right` begins with two columns of tiles. Slices of a
                        // scratch start at cache lines. `compute` calls this inside of `run`.
                        unsafe { self.machine.block(stretches, shape, &mut sums[place], number > 0) };
                        if number + 1 == passes
                            && let Some((row, pair, place)) = done.replace((row, pair, place))
                        {
                            self.put(row, pair * BLOCK, &sums[place]);
                        }
                    }
                }
            }
            // The next rows overwrite the sums of the last block.
            if let Some((row, pair, place)) = done.take() {
                self.put(row, pair * BLOCK, &sums[place]);
            }
        }
    }

    /// The rows `row..row + 32` of a section, packed if need be: `[2, tiles along the sum]`.
    #[inline(always)]
    fn place(&self, section: &DepthSlice, row: usize, packed: &mut [Tile]) -> Place {
        let left = &self.terms[section.term].left;
        if let Some(place) = left.in_place(row, section.along.start * DEPTH) {
            return place;
        }
        let along = section.along.len();
        let (upper, lower) = packed.split_at_mut(along);
        for ((k, upper), lower) in section.along.clone().zip(upper).zip(lower) {
            // SAFETY: `self.machine` is a `T`, so the CPU has the instructions of its packing.
            unsafe { left.pack_left::<T::Packing>(row, k * DEPTH, [upper, lower]) };
        }
        let tile = NUMBERS * size_of::<bf16>();
        Place { first: packed.as_ptr().cast(), row: ROW_BYTES, along: tile, lower: along * tile }
    }

    /// Packs the column tiles of a pass: `[column tiles, tiles along the sum]`. `band` is room for a [`BAND`] where a
    /// right factor is decoded.
    #[inline(always)]
    fn pack_right(&self, pass: &[DepthSlice], pairs: &Range<usize>, packed: &mut [Tile], band: &mut [bf16]) {
        let depth = depth_of(pass);
        for section in pass {
            let place = |k: usize, pair: usize| {
                (pair - pairs.start) * 2 * depth + section.packed + k - section.along.start
            };
            let right = match &self.terms[section.term].right {
                Right::Plain(right) => right,
                Right::Packed { matrix, transposed } => {
                    let to = |k: usize, pair: usize| (place(k, pair), depth);
                    let along = section.along.clone();
                    if *transposed {
                        let to = |pair: usize, k: usize| to(k, pair);
                        self.decode_right::<true>(matrix, pairs.clone(), along, to, packed, band);
                    } else {
                        self.decode_right::<false>(matrix, along, pairs.clone(), to, packed, band);
                    }
                    continue;
                }
            };
            let mut one = |k: usize, pair: usize| {
                let tiles = both(packed, place(k, pair), depth);
                // SAFETY: `self.machine` is a `T`, so the CPU has the instructions of its packing.
                unsafe { right.pack_right::<T::Packing>(k * DEPTH, pair * BLOCK, tiles) };
            };
            // In the order of memory.
            match right {
                Operand::Of(_) => {
                    section.along.clone().for_each(|k| pairs.clone().for_each(|pair| one(k, pair)))
                }
                Operand::Transposed(_) => {
                    pairs.clone().for_each(|pair| section.along.clone().for_each(|k| one(k, pair)));
                }
            }
        }
    }

    /// Decodes the squares of 32 numbers `down` × `across` of `matrix`, band by band, and packs each as two tiles of
    /// `packed`, whose places and distance `to` tells.
    #[inline(always)]
    fn decode_right<const TRANSPOSED: bool>(
        &self,
        matrix: &PackedRows,
        down: Range<usize>,
        across: Range<usize>,
        to: impl Fn(usize, usize) -> (usize, usize),
        packed: &mut [Tile],
        band: &mut [bf16],
    ) {
        const { assert!(DEPTH == BLOCK && BAND_COLUMNS.is_multiple_of(BLOCK)) };
        let [rows, columns] = matrix.shape();
        for i in down {
            let of_rows = i * BLOCK..rows.min((i + 1) * BLOCK);
            for first in across.clone().step_by(BAND_COLUMNS / BLOCK) {
                let end = across.end.min(first + BAND_COLUMNS / BLOCK);
                let of_columns = first * BLOCK..columns.min(end * BLOCK);
                if of_rows.len() < BLOCK || of_columns.end < end * BLOCK {
                    band.fill(bf16::ZERO);
                }
                matrix.decode(of_rows.clone(), of_columns, BAND_COLUMNS, band);
                for j in first..end {
                    let (place, depth) = to(i, j);
                    let tiles = both(packed, place, depth).map(bytemuck::cast_mut);
                    let from = &band[(j - first) * BLOCK..];
                    assert!(from.len() > (BLOCK - 1) * BAND_COLUMNS + BLOCK - 1);
                    // SAFETY: `from` has 32 rows of 32 numbers, `BAND_COLUMNS` apart, as was asserted. `self.machine`
                    // is a `T`, so the CPU has the instructions of its packing.
                    unsafe {
                        if TRANSPOSED {
                            for (half, tile) in tiles.into_iter().enumerate() {
                                let from = from.as_ptr().add(half * SIDE * BAND_COLUMNS);
                                T::Packing::transpose(from.cast(), BAND_COLUMNS * size_of::<bf16>(), tile);
                            }
                        } else {
                            T::Packing::pair(from.as_ptr(), BAND_COLUMNS, tiles);
                        }
                    }
                }
            }
        }
    }

    /// Writes a finished block to the output.
    #[inline(always)]
    fn put(&self, row: usize, column: usize, sums: &Sums) {
        let rows = self.rows.saturating_sub(row).min(BLOCK);
        let columns = self.columns.saturating_sub(column).min(BLOCK);
        // SAFETY: the output, and the matrix it starts from, have `rows` rows and `columns` columns from (row, column)
        // on. Each block is put once, by the thread that computed it, and `multiply` checked that blocks overlap
        // neither each other nor a factor. `self.machine` is a `T`, so the CPU has the instructions of its packing.
        unsafe {
            match self.out {
                Output::Rounded { to, start, scale } => {
                    for i in 0..rows {
                        let start = start.map(|start| start.at(row + i, column).cast_const());
                        let [left, right] = beside(sums, i);
                        put_rounded::<T::Packing>(
                            [left, right],
                            scale,
                            start,
                            to.at(row + i, column),
                            columns,
                        );
                    }
                }
                Output::Added(to) => {
                    for i in 0..rows {
                        add(beside(sums, i), to.at(row + i, column), columns);
                    }
                }
                Output::AddedTransposed(to) => {
                    let mut across = [[0; SIDE * SIDE]; 4];
                    for (from, to) in [0, 2, 1, 3].into_iter().zip(&mut across) {
                        T::Packing::transpose(sums[from].as_ptr().cast(), ROW_BYTES, to);
                    }
                    let across: &Sums = bytemuck::cast_ref(&across);
                    for i in 0..columns {
                        add(beside(across, i), to.at(column + i, row), rows);
                    }
                }
            }
        }
    }
}

/// The tile at `place` and its neighbour in the column of tiles on the right, `depth` tiles on.
#[inline(always)]
fn both(packed: &mut [Tile], place: usize, depth: usize) -> [&mut Tile; 2] {
    let (first, second) = packed[place..].split_at_mut(depth);
    [&mut first[0], &mut second[0]]
}

fn depth_of(pass: &[DepthSlice]) -> usize {
    pass.last().map_or(0, |section| section.packed + section.along.len())
}

/// Row `i` of a block.
#[inline(always)]
fn beside(sums: &Sums, i: usize) -> [&[f32; SIDE]; 2] {
    let tile = i / SIDE * 2;
    [&sums[tile][i % SIDE], &sums[tile + 1][i % SIDE]]
}

/// to += sums, for n ≤ 32 numbers.
///
/// # Safety
/// `to` is n numbers that nothing else refers to.
#[inline(always)]
unsafe fn add(sums: [&[f32; SIDE]; 2], to: *mut f32, n: usize) {
    // SAFETY: the caller promises n numbers that nothing else refers to.
    let to = unsafe { std::slice::from_raw_parts_mut(to, n) };
    if let Some(to) = to.as_chunks_mut::<SIDE>().0.first_chunk_mut::<2>() {
        for (to, sums) in to.iter_mut().zip(sums) {
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
        }
    } else {
        to.iter_mut().zip(sums.into_iter().flatten()).for_each(|(to, sum)| *to += sum);
    }
}

/// to = start + scale·sums, rounded, for n ≤ 32 numbers.
///
/// # Safety
/// `to` is n numbers that nothing but `start` refers to, `start` n numbers: `to` itself or numbers apart from it. The
/// CPU has the instructions of `P`.
#[inline(always)]
unsafe fn put_rounded<P: Packing>(
    sums: [&[f32; SIDE]; 2],
    scale: f32,
    start: Option<*const bf16>,
    to: *mut bf16,
    n: usize,
) {
    // SAFETY: the caller promises n numbers at both, and the instructions of `P`. `P::put` touches 32 numbers: the
    // caller's where n is 32, and a row of this function elsewhere, of which n are copied.
    unsafe {
        if n == BLOCK {
            return P::put(sums, scale, start, to);
        }
        let mut row = [bf16::ZERO; BLOCK];
        if let Some(start) = start {
            std::ptr::copy_nonoverlapping(start, row.as_mut_ptr(), n);
        }
        let from = row;
        P::put(sums, scale, Some(from.as_ptr()), row.as_mut_ptr());
        std::ptr::copy_nonoverlapping(row.as_ptr(), to, n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        cpu::{amx::Emulated, tile::InTiles},
        testing::{distance, leaf},
    };
    use tch::{Kind, Tensor};

    fn random(rows: i64, columns: i64) -> Tensor {
        leaf(&[rows, columns]).detach().to_kind(Kind::BFloat16)
    }

    /// A view with a stride longer than its rows, and other rows behind it.
    fn inside(whole: &Tensor) -> Tensor {
        let size = whole.size();
        whole.narrow(0, 0, size[0] - BEHIND).narrow(1, 3, size[1] - 5)
    }

    /// The same as a matrix that may read the rows behind it.
    fn matrix_inside(whole: &Tensor) -> Matrix<'_, bf16> {
        let all = Matrix::of(whole);
        let [rows, columns] = all.shape();
        all.rows(&(0..rows - BEHIND as usize)).columns(&(3..columns - 2))
    }

    /// Rows behind a view: as many as a block may read beside the last one.
    const BEHIND: i64 = 31;

    /// A factor: its matrix, and true if it is read transposed.
    struct Given(Tensor, bool);

    impl Given {
        fn new(rows: i64, columns: i64, transposed: bool) -> Self {
            let [rows, columns] = if transposed { [columns, rows] } else { [rows, columns] };
            let whole = random(rows + BEHIND, columns + 5);
            // Numbers behind and beside the view must not count.
            for (dim, start, n) in [(0, rows, BEHIND), (1, 0, 3), (1, columns + 3, 2)] {
                let _ = whole.narrow(dim, start, n).fill_(f64::NAN);
            }
            Self(whole, transposed)
        }

        fn operand(&self) -> Operand<'_> {
            let matrix = matrix_inside(&self.0);
            if self.1 { Operand::Transposed(matrix) } else { Operand::Of(matrix) }
        }

        fn exact(&self) -> Tensor {
            let exact = inside(&self.0).to_kind(Kind::Double);
            if self.1 { exact.tr() } else { exact }
        }
    }

    /// Compares every output of the sum of two terms of these depths with fp64.
    fn check<T: Blocks>(machine: T, [rows, columns]: [i64; 2], depths: [i64; 2]) {
        let exact = |t: &Tensor| t.to_kind(Kind::Double);
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            let operands = depths.map(|depth| {
                [Given::new(rows, depth, transposed[0]), Given::new(depth, columns, transposed[1])]
            });
            let product: Tensor = operands.iter().map(|[a, b]| a.exact().matmul(&b.exact())).sum();
            // The error of fp32 sums of that many terms. Below, half a unit in the last place of a bf16 number is
            // added.
            let depth = depths.iter().sum::<i64>() as f64;
            let rounding =
                depth * f64::from(f32::EPSILON) * distance(&product, &product.zeros_like()).max(1.0);
            let terms =
                operands.each_ref().map(|[a, b]| Term { left: a.operand(), right: b.operand().into() });
            let (matrix, row) = (random(rows, columns), random(1, columns).view([-1]));
            let starts = [
                (None, Tensor::from(0.0)),
                (Some(Matrix::of(&matrix)), exact(&matrix)),
                (Some(Matrix::repeated(&row, rows as usize)), exact(&row)),
            ];
            for (start, added) in starts {
                let all = random(rows + BEHIND, columns + 5);
                let beside = all.copy();
                let to = inside(&all);
                multiply(machine, &terms, Output::Rounded { to: Matrix::of(&to), start, scale: 0.5 });
                let sum = &product * 0.5 + added;
                let off = ((exact(&to) - &sum).abs() - sum.abs() / 256.0).relu();
                let off = distance(&off, &off.zeros_like());
                assert!(off <= rounding, "{rows} {columns} {depths:?} {transposed:?}: {off}");
                inside(&beside).copy_(&to);
                assert_eq!(all, beside, "nothing else is written to");
            }
            let sums = |[rows, columns]: [i64; 2]| leaf(&[rows, columns]).detach().to_kind(Kind::Float);
            let (sum, across) = (sums([rows, columns]), sums([columns, rows]));
            let before = [exact(&sum), exact(&across)];
            multiply(machine, &terms, Output::Added(Matrix::sums(&sum)));
            multiply(machine, &terms, Output::AddedTransposed(Matrix::sums(&across)));
            assert!(distance(&sum, &(&before[0] + &product)) <= rounding, "{rows} {columns} {depths:?}");
            assert!(
                distance(&across, &(&before[1] + product.tr())) <= rounding,
                "{rows} {columns} {depths:?}"
            );
        }
    }

    fn check_all<T: Blocks>(machine: T) {
        let before = tch::get_num_threads();
        for threads in [1, 3] {
            tch::set_num_threads(threads);
            for shape in [[1, 1], [16, 40], [33, 16], [48, 176], [70, 33], [0, 5], [5, 0], [64, 64]] {
                for depths in [[1, 1], [32, 16], [33, 70], [300, 16], [16, 0], [0, 0]] {
                    check(machine, shape, depths);
                }
            }
            // Several passes, and more rows than are kept unfinished.
            check(machine, [40, 50], [PASS_TILES as i64 * DEPTH as i64 + 5, 40]);
            check(machine, [70, 50], [PASS_TILES as i64 * DEPTH as i64 + 64, 64]);
        }
        check(machine, [UNFINISHED_ROWS as i64 + 40, 3], [20, PASS_TILES as i64 * DEPTH as i64 + 1]);
        tch::set_num_threads(before);
    }

    /// x `[40, 64]` times itself, transposed, into columns of `all` from `column` on, and rows from `row` on.
    fn multiply_into(all: &Tensor, row: i64, column: i64) {
        let x = all.narrow(0, 0, 40).narrow(1, 0, 64);
        let (left, right) = (Operand::Of(Matrix::of(&x)), Operand::Transposed(Matrix::of(&x)).into());
        let to = all.narrow(0, row, 40).narrow(1, column, 40);
        let to = Output::Rounded { to: Matrix::of(&to), start: None, scale: 1.0 };
        multiply(InTiles(Emulated), &[Term { left, right }], to);
    }

    #[test]
    fn an_output_beside_its_factors_is_taken() {
        multiply_into(&random(80, 104), 0, 64);
        multiply_into(&random(80, 104), 40, 0);
    }

    #[test]
    #[should_panic(expected = "an output overlaps a factor")]
    fn an_output_of_the_columns_of_a_factor_is_refused() {
        multiply_into(&random(80, 104), 0, 63);
    }

    #[test]
    #[should_panic(expected = "an output overlaps a factor")]
    fn an_output_of_the_rows_behind_that_a_factor_reads_is_refused() {
        let all = random(80, 64);
        let [left, behind] = [0..40, 40..80].map(|rows| Matrix::of(&all).rows(&rows));
        let right = random(64, 64);
        let terms = [Term { left: Operand::Of(left), right: Operand::Of(Matrix::of(&right)).into() }];
        multiply(InTiles(Emulated), &terms, Output::Rounded { to: behind, start: None, scale: 1.0 });
    }

    #[test]
    #[should_panic(expected = "an output overlaps its start")]
    fn an_output_that_is_shifted_from_its_start_is_refused() {
        let all = random(41, 40);
        let [start, to] = [0..40, 1..41].map(|rows| Matrix::of(&all).rows(&rows));
        multiply(InTiles(Emulated), &[], Output::Rounded { to, start: Some(start), scale: 1.0 });
    }

    #[test]
    fn emulated_tiles_give_the_products() {
        check_all(InTiles(Emulated));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_give_the_products() {
        if let Some(amx) = crate::ops::cpu::amx::Amx::new() {
            check_all(InTiles(amx));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_of_pairs_give_the_products() {
        if let Some(pairs) = crate::ops::cpu::tile::Pairs::new(crate::ops::cpu::Isa::Avx512Bf16) {
            check_all(pairs);
        }
    }
}
