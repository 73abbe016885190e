//! Products of large matrices: out = start + scale · Σ left·right over some terms, bf16 in, fp32 sums.
//!
//! After Goto and van de Geijn (2008): right factors are packed into tiles by the thread that computes their columns of the
//! output, as many columns at a time as fit the second-level cache. Rows of a left factor are rows of tiles as they lie in
//! memory, and are read there. [Blocks](super::block) of the output are then summed over all terms in registers, so that an
//! adapter's part of a layer's output costs neither a pass over the output nor a rounding.
//!
//! Of few rows, as an expert has, most of the time is the reading of the right factor. Prefetching it, packing the next columns
//! while the last are multiplied, multiplying its transpose, and results that bypass the caches were all measured no faster with
//! AMX.

use super::{
    block::{Blocks, Place, Stretch, Sums, Tile},
    packing::{BLOCK, DEPTH, NUMBERS, Packing, ROW_BYTES, SIDE},
    pool,
    scratch::{Memory, words},
};
use crate::ops::row_layout::RowLayout;
use half::bf16;
use std::{marker::PhantomData, ops::Range};
use tch::{Device, Kind, Tensor};

/// Tiles along the sum that are packed at a time.
const PASS_TILES: usize = 48;

/// Rows whose unfinished sums are kept at a time, where a sum is longer than a pass.
const UNFINISHED_ROWS: usize = 1024;

/// A bf16 or fp32 matrix in host memory, whose rows are dense.
#[derive(Clone, Copy)]
pub struct Matrix<'a, E> {
    first: *mut E,
    rows: usize,
    columns: usize,
    /// Numbers from a row to the next.
    stride: usize,
    /// Rows from the first on that can be read, other ones behind its own among them.
    readable: usize,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: a `Matrix` is an address; those who read and write through it say why they may.
unsafe impl<E> Send for Matrix<'_, E> {}
// SAFETY: as above.
unsafe impl<E> Sync for Matrix<'_, E> {}

impl<'a, E> Matrix<'a, E> {
    /// A vector is one row. A tensor that is not such a matrix is a mistake of the caller.
    fn in_host(tensor: &'a Tensor, kind: Kind) -> Self {
        Self::strided(tensor, kind, &tensor.size(), &tensor.stride(), 0)
    }

    /// Matrix `index` of a tensor [matrices, rows, columns].
    fn nth_in_host(tensor: &'a Tensor, kind: Kind, index: usize) -> Self {
        let (size, stride) = (tensor.size(), tensor.stride());
        assert!(size.len() == 3 && index < size[0] as usize, "matrix {index} of {size:?}");
        Self::strided(tensor, kind, &size[1..], &stride[1..], index * stride[0] as usize)
    }

    /// The matrix of these sizes and strides that begins `offset` numbers into the tensor.
    fn strided(tensor: &'a Tensor, kind: Kind, size: &[i64], strides: &[i64], offset: usize) -> Self {
        assert_eq!((tensor.kind(), tensor.device()), (kind, Device::Cpu), "a matrix on the host");
        let layout = RowLayout::of(size, strides).filter(|layout| layout.inner == layout.rows);
        let Some(RowLayout { rows, columns, stride, .. }) = layout else {
            panic!("rows are dense and equally far apart: {size:?} {strides:?}")
        };
        let start = tensor.data_ptr().cast::<E>().wrapping_add(offset);
        let first = if rows * columns == 0 { std::ptr::dangling_mut() } else { start };
        Self { first, rows, columns, stride, readable: rows, tensor: PhantomData }
    }

    /// Some of its rows.
    pub fn rows(self, range: &Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let readable = self.readable - range.start;
        Self { first: self.at(range.start, 0), rows: range.len(), readable, ..self }
    }

    /// Some of its columns.
    pub fn columns(self, range: &Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.columns,
            "columns {range:?} of {}",
            self.columns
        );
        Self { first: self.at(0, range.start), columns: range.len(), ..self }
    }

    /// [rows, columns]
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Where a number is, if there is one.
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> *mut E {
        self.first.wrapping_add(row * self.stride + column)
    }
}

impl<'a> Matrix<'a, bf16> {
    pub fn of(tensor: &'a Tensor) -> Self {
        Self::in_host(tensor, Kind::BFloat16)
    }

    /// Matrix `index` of a tensor [matrices, rows, columns].
    pub fn one_of(tensor: &'a Tensor, index: usize) -> Self {
        Self::nth_in_host(tensor, Kind::BFloat16, index)
    }

    /// A vector as each of some rows, not to be written to.
    pub fn repeated(vector: &'a Tensor, rows: usize) -> Self {
        Self { rows, stride: 0, readable: rows, ..Self::of(vector) }
    }
}

impl<'a> Matrix<'a, f32> {
    pub fn sums(tensor: &'a Tensor) -> Self {
        Self::in_host(tensor, Kind::Float)
    }

    /// Matrix `index` of a tensor [matrices, rows, columns].
    pub fn one_of_sums(tensor: &'a Tensor, index: usize) -> Self {
        Self::nth_in_host(tensor, Kind::Float, index)
    }
}

/// A factor of a product.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// A matrix as it is.
    Of(Matrix<'a, bf16>),
    /// The transpose of one.
    Transposed(Matrix<'a, bf16>),
}

impl Operand<'_> {
    /// [rows, columns]
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Of(x) => x.shape(),
            Self::Transposed(x) => [x.columns, x.rows],
        }
    }

    /// Where the rows `row..row + 32` are as a left factor's tiles from `k` on, if they lie there already: rows of a matrix are
    /// rows of tiles. What becomes of rows behind the matrix is nobody's.
    #[inline(always)]
    fn in_place(&self, row: usize, k: usize) -> Option<Place> {
        let Self::Of(x) = self else { return None };
        let is_whole = row + BLOCK <= x.readable && x.columns.is_multiple_of(DEPTH);
        let stride = x.stride * size_of::<bf16>();
        is_whole.then(|| Place {
            first: x.at(row, k).cast_const().cast(),
            row: stride,
            along: ROW_BYTES,
            lower: SIDE * stride,
        })
    }

    /// As a left factor: two tiles of 16 rows of 32 numbers, from (row, k) and (row + 16, k) on.
    ///
    /// # Safety
    /// The machine has what `P` is compiled for.
    #[inline(always)]
    unsafe fn pack_left<P: Packing>(&self, row: usize, k: usize, both: [&mut Tile; 2]) {
        match self {
            Self::Of(x) => {
                for (tile, to) in both.into_iter().enumerate() {
                    copy(x, row + tile * SIDE, k, to);
                }
            }
            Self::Transposed(x) => {
                let mut pairs = [[0; SIDE * SIDE]; 2];
                // SAFETY: each of `pairs` is 16 rows of 64 bytes; the caller's.
                unsafe {
                    pack_pairs::<P>(x, k, row, pairs.each_mut());
                    for (pairs, to) in pairs.iter().zip(both) {
                        P::transpose(pairs.as_ptr().cast(), ROW_BYTES, bytemuck::cast_mut(to));
                    }
                }
            }
        }
    }

    /// As a right factor: two tiles of 16 pairs of rows of 16 columns, from (k, column) and (k, column + 16) on.
    ///
    /// # Safety
    /// The machine has what `P` is compiled for.
    #[inline(always)]
    unsafe fn pack_right<P: Packing>(&self, k: usize, column: usize, both: [&mut Tile; 2]) {
        match self {
            // SAFETY: the caller's.
            Self::Of(x) => unsafe { pack_pairs::<P>(x, k, column, both.map(bytemuck::cast_mut)) },
            Self::Transposed(x) => {
                for (tile, to) in both.into_iter().enumerate() {
                    let column = column + tile * SIDE;
                    if column + SIDE <= x.rows && k + DEPTH <= x.columns {
                        // SAFETY: 16 rows of 32 numbers from (column, k) on lie within x; the caller's.
                        unsafe { P::transpose(x.at(column, k).cast(), x.stride * 2, bytemuck::cast_mut(to)) };
                    } else {
                        let mut edge = [bf16::ZERO; NUMBERS];
                        copy(x, column, k, &mut edge);
                        // SAFETY: `edge` is 16 rows of 64 bytes; the caller's.
                        unsafe { P::transpose(edge.as_ptr().cast(), ROW_BYTES, bytemuck::cast_mut(to)) };
                    }
                }
            }
        }
    }
}

/// 16 rows of 32 numbers of x from (row, column) on, zeros where x ends.
#[inline(always)]
fn copy(x: &Matrix<bf16>, row: usize, column: usize, to: &mut Tile) {
    let rows = to.as_chunks_mut::<DEPTH>().0;
    if row + SIDE <= x.rows && column + DEPTH <= x.columns {
        for (i, to) in rows.iter_mut().enumerate() {
            // SAFETY: 32 numbers from (row + i, column) on lie within x, which nothing writes to.
            *to = unsafe { x.at(row + i, column).cast::<[bf16; DEPTH]>().read() };
        }
        return;
    }
    let n = x.columns.saturating_sub(column).min(DEPTH);
    for (i, to) in rows.iter_mut().enumerate() {
        let n = if row + i < x.rows { n } else { 0 };
        // SAFETY: n numbers from (row + i, column) on lie within x, which nothing writes to.
        to[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(x.at(row + i, column), n) });
        to[n..].fill(bf16::ZERO);
    }
}

/// 16 pairs of rows of two times 16 columns of x from (row, column) on, each pair in a word, zeros where x ends.
///
/// # Safety
/// The machine has what `P` is compiled for.
#[inline(always)]
unsafe fn pack_pairs<P: Packing>(
    x: &Matrix<bf16>,
    row: usize,
    column: usize,
    to: [&mut [u32; SIDE * SIDE]; 2],
) {
    if row + DEPTH <= x.rows && column + BLOCK <= x.columns {
        // SAFETY: 32 numbers of each of 32 rows from (row, column) on lie within x; the caller's.
        return unsafe { P::pair(x.at(row, column), x.stride, to) };
    }
    let mut edge = [[bf16::ZERO; NUMBERS]; 2];
    for (i, edge) in edge.iter_mut().enumerate() {
        copy(x, row + i * SIDE, column, edge);
    }
    // SAFETY: `edge` is 32 rows of 32 numbers; the caller's.
    unsafe { P::pair(edge.as_ptr().cast(), DEPTH, to) };
}

/// left `[rows, depth]` · right `[depth, columns]`
pub struct Term<'a> {
    pub left: Operand<'a>,
    pub right: Operand<'a>,
}

/// Where a product goes.
pub enum Output<'a> {
    /// to = start + scale·product, rounded to bf16; `start` has the shape of `to`.
    Rounded { to: Matrix<'a, bf16>, start: Option<Matrix<'a, bf16>>, scale: f32 },
    /// fp32 to += product
    Added(Matrix<'a, f32>),
    /// fp32 to += productᵀ
    AddedTransposed(Matrix<'a, f32>),
}

impl Output<'_> {
    /// Whether it has a row more than once.
    fn is_repeated(&self) -> bool {
        let (rows, columns, stride) = match self {
            Self::Rounded { to, .. } => (to.rows, to.columns, to.stride),
            Self::Added(to) | Self::AddedTransposed(to) => (to.rows, to.columns, to.stride),
        };
        rows > 1 && stride < columns
    }

    /// Of the product that fits.
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Rounded { to, .. } => to.shape(),
            Self::Added(to) => to.shape(),
            Self::AddedTransposed(to) => [to.columns, to.rows],
        }
    }
}

/// Tiles `along` of term `term`, `packed` tiles behind the first of their pass.
struct DepthSlice {
    term: usize,
    along: Range<usize>,
    packed: usize,
}

/// The tiles along the sum, in passes of at most [`PASS_TILES`].
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

/// All that the threads share.
struct Product<'a, T> {
    machine: T,
    terms: &'a [Term<'a>],
    passes: Vec<Vec<DepthSlice>>,
    rows: usize,
    columns: usize,
    out: Output<'a>,
}

/// Computes the sum of `terms`, whose shapes have to agree with each other and with the output's. The output overlaps nothing
/// that is read, but for what its sums start from, which may be itself.
pub fn multiply<T: Blocks>(machine: T, terms: &[Term], out: Output) {
    let [rows, columns] = out.shape();
    for Term { left, right } in terms {
        assert_eq!((left.shape()[0], left.shape()[1]), (rows, right.shape()[0]), "a left factor fits");
        assert_eq!(right.shape()[1], columns, "a right factor fits");
    }
    assert!(!out.is_repeated(), "each number of an output is one");
    if let Output::Rounded { start: Some(start), .. } = &out {
        assert_eq!(start.shape(), [rows, columns], "what a sum starts from fits");
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
        // As many parts as the threads can share evenly: columns first, for each of them has its own right factors.
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

    /// Some rows of the pairs of column tiles `pairs`, at most `deepest` tiles deep.
    #[inline(always)]
    fn part(&self, rows: Range<usize>, pairs: Range<usize>, deepest: usize) {
        let width = pairs.len();
        let passes = self.passes.len();
        // Where one pass is all, a block is done when it has been computed; else all of them wait for the next pass. What is
        // done is written while the next block is computed, for what tile registers store is not there for vectors at once.
        let height = if passes == 1 { rows.len() } else { rows.len().min(UNFINISHED_ROWS) };
        let kept = if passes == 1 { 2 } else { height.div_ceil(BLOCK) * width };
        let [left_tiles, right_tiles] = [2 * deepest, 2 * width * deepest];
        let mut memory = Memory::take(words::<Tile>(left_tiles + right_tiles) + words::<Sums>(kept));
        let mut scratch = memory.scratch();
        let left: &mut [Tile] = scratch.cut(left_tiles);
        let right: &mut [Tile] = scratch.cut(right_tiles);
        let sums: &mut [Sums] = scratch.cut(kept);
        let mut done = None;
        let mut places = Vec::with_capacity(self.terms.len());
        for first in rows.clone().step_by(height) {
            for (number, pass) in self.passes.iter().enumerate() {
                let depth = depth_of(pass);
                self.pack_right(pass, &pairs, right);
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
                        // SAFETY: each place is two rows of as many tiles as its section has, `right` begins with two columns, at a
                        // cache line as all tiles of the scratch do; `run` has called this.
                        unsafe { self.machine.block(stretches, shape, &mut sums[place], number > 0) };
                        if number + 1 == passes
                            && let Some((row, pair, place)) = done.replace((row, pair, place))
                        {
                            self.put(row, pair * BLOCK, &sums[place]);
                        }
                    }
                }
            }
            // The sums of the last block are written over by the next rows.
            if let Some((row, pair, place)) = done.take() {
                self.put(row, pair * BLOCK, &sums[place]);
            }
        }
    }

    /// Where the rows `row..row + 32` of a section are, packed if need be: `[2, tiles along the sum]`.
    #[inline(always)]
    fn place(&self, section: &DepthSlice, row: usize, packed: &mut [Tile]) -> Place {
        let left = &self.terms[section.term].left;
        if let Some(place) = left.in_place(row, section.along.start * DEPTH) {
            return place;
        }
        let along = section.along.len();
        let (upper, lower) = packed.split_at_mut(along);
        for ((k, upper), lower) in section.along.clone().zip(upper).zip(lower) {
            // SAFETY: `run` has called this.
            unsafe { left.pack_left::<T::Packing>(row, k * DEPTH, [upper, lower]) };
        }
        let tile = NUMBERS * size_of::<bf16>();
        Place { first: packed.as_ptr().cast(), row: ROW_BYTES, along: tile, lower: along * tile }
    }

    /// Packs a pass of pairs of column tiles: `[column tiles, tiles along the sum]`.
    #[inline(always)]
    fn pack_right(&self, pass: &[DepthSlice], pairs: &Range<usize>, packed: &mut [Tile]) {
        let depth = depth_of(pass);
        for section in pass {
            let right = &self.terms[section.term].right;
            let mut one = |k: usize, pair: usize| {
                let place = (pair - pairs.start) * 2 * depth + section.packed + k - section.along.start;
                let (first, second) = packed[place..].split_at_mut(depth);
                // SAFETY: `run` has called this.
                unsafe {
                    right.pack_right::<T::Packing>(k * DEPTH, pair * BLOCK, [&mut first[0], &mut second[0]])
                };
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

    /// Writes a finished block to where it goes.
    #[inline(always)]
    fn put(&self, row: usize, column: usize, sums: &Sums) {
        let rows = self.rows.saturating_sub(row).min(BLOCK);
        let columns = self.columns.saturating_sub(column).min(BLOCK);
        // SAFETY: `rows` rows and `columns` columns from (row, column) on lie within the output and what it starts from; nobody
        // else has this block, and an output overlaps nothing that is read; `run` has called this.
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

fn depth_of(pass: &[DepthSlice]) -> usize {
    pass.last().map_or(0, |section| section.packed + section.along.len())
}

/// Row `i` of a block.
#[inline(always)]
fn beside(sums: &Sums, i: usize) -> [&[f32; SIDE]; 2] {
    let tile = i / SIDE * 2;
    [&sums[tile][i % SIDE], &sums[tile + 1][i % SIDE]]
}

/// to += sums for n ≤ 32 numbers.
///
/// # Safety
/// They can be read and written.
#[inline(always)]
unsafe fn add(sums: [&[f32; SIDE]; 2], to: *mut f32, n: usize) {
    // SAFETY: the caller's.
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
/// They can be read and written, and the machine has what `P` is compiled for.
#[inline(always)]
unsafe fn put_rounded<P: Packing>(
    sums: [&[f32; SIDE]; 2],
    scale: f32,
    start: Option<*const bf16>,
    to: *mut bf16,
    n: usize,
) {
    // SAFETY: the caller's; where there are fewer numbers than a block has columns, no more are touched.
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

    fn random(rows: i64, columns: i64) -> Tensor {
        leaf(&[rows, columns]).detach().to_kind(Kind::BFloat16)
    }

    /// A view whose rows are farther apart than they are long, with other rows behind it.
    fn inside(whole: &Tensor) -> Tensor {
        let size = whole.size();
        whole.narrow(0, 0, size[0] - BEHIND).narrow(1, 3, size[1] - 5)
    }

    /// The same, of which the rows behind are known.
    fn matrix_inside(whole: &Tensor) -> Matrix<'_, bf16> {
        let all = Matrix::of(whole);
        let [rows, columns] = all.shape();
        all.rows(&(0..rows - BEHIND as usize)).columns(&(3..columns - 2))
    }

    /// Rows behind, as many as are read beside the last one.
    const BEHIND: i64 = 31;

    /// Such a matrix, and whether it is read as its transpose.
    struct Given(Tensor, bool);

    impl Given {
        fn new(rows: i64, columns: i64, transposed: bool) -> Self {
            let [rows, columns] = if transposed { [columns, rows] } else { [rows, columns] };
            let whole = random(rows + BEHIND, columns + 5);
            // What is behind and beside is nobody's.
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

    /// Every output of the sum of two terms of these depths, against fp64.
    fn check<T: Blocks>(machine: T, [rows, columns]: [i64; 2], depths: [i64; 2]) {
        let exact = |t: &Tensor| t.to_kind(Kind::Double);
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            let operands = depths.map(|depth| {
                [Given::new(rows, depth, transposed[0]), Given::new(depth, columns, transposed[1])]
            });
            let product: Tensor = operands.iter().map(|[a, b]| a.exact().matmul(&b.exact())).sum();
            // Sums in fp32 of as many terms, then half a unit in the last place of a bf16 number.
            let depth = depths.iter().sum::<i64>() as f64;
            let rounding =
                depth * f64::from(f32::EPSILON) * distance(&product, &product.zeros_like()).max(1.0);
            let terms = operands.each_ref().map(|[a, b]| Term { left: a.operand(), right: b.operand() });
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
