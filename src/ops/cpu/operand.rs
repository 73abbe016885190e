//! Factors of large products, and how their numbers become tiles: matrices in host memory, their transposes, and packed
//! leaves, which [`matmul`](super::matmul) decodes.

use super::{
    block::{Place, Tile},
    decode::PackedRows,
    packing::{BLOCK, DEPTH, NUMBERS, Packing, ROW_BYTES, SIDE},
};
use crate::ops::row_layout::{Footprint, RowLayout};
use half::bf16;
use std::{marker::PhantomData, ops::Range};
use tch::{Device, Kind, Tensor};

/// A bf16 or fp32 matrix `[rows, columns]` in host memory with dense rows.
#[derive(Clone, Copy)]
pub struct Matrix<'a, E> {
    first: *mut E,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Numbers from a row to the next.
    stride: usize,
    /// Rows from the first on that can be read: its own and those of the same tensor behind it.
    readable: usize,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: safe methods read sizes alone. Memory is reached in `matmul::multiply`, which checks that its output overlaps
// no factor; its threads read the factors together, and each writes blocks of the output that no other one has. `E` is
// bf16 or f32, plain data, for nothing else makes a `Matrix`.
unsafe impl<E> Sync for Matrix<'_, E> {}

impl<'a, E> Matrix<'a, E> {
    /// The matrix that `tensor` is; a vector is one row. Panics if it is none of `kind` on the host with dense rows.
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

    /// The bytes of its first `rows` rows.
    pub(super) fn footprint(&self, rows: usize) -> Footprint {
        let Self { columns, stride, .. } = *self;
        let layout = RowLayout { rows, columns, stride, inner: rows, outer_stride: 0 };
        layout.footprint(self.first.addr(), size_of::<E>())
    }

    /// True if it begins where `other` does, with rows as far apart.
    pub(super) fn is_in_place_of(&self, other: &Self) -> bool {
        (self.first, self.stride) == (other.first, other.stride)
    }

    /// The address of a number. It may be read or written only if the matrix has it.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, column: usize) -> *mut E {
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

    /// A matrix of `rows` rows that are all `vector`. [`multiply`](super::matmul::multiply) refuses it as an output.
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
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Of(x) => x.shape(),
            Self::Transposed(x) => [x.columns, x.rows],
        }
    }

    /// The bytes that a product reads of it: a block at the edge reads rows behind the matrix too, see
    /// [`in_place`](Self::in_place).
    pub(super) fn footprint(&self) -> Footprint {
        let (Self::Of(x) | Self::Transposed(x)) = self;
        x.footprint(x.readable.min(x.rows.next_multiple_of(BLOCK)))
    }

    /// The rows `row..row + 32` as a left factor's tiles from `k` on, in place: rows of a matrix are rows of tiles.
    /// Rows behind the matrix are read too, and their sums are not used. `None` where they have to be packed.
    #[inline(always)]
    pub(super) fn in_place(&self, row: usize, k: usize) -> Option<Place> {
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

    /// Packs a left factor: two tiles of 16 rows of 32 numbers, from (row, k) and (row + 16, k) on.
    ///
    /// # Safety
    /// The CPU has the instructions of `P`.
    #[inline(always)]
    pub(super) unsafe fn pack_left<P: Packing>(&self, row: usize, k: usize, both: [&mut Tile; 2]) {
        match self {
            Self::Of(x) => {
                for (tile, to) in both.into_iter().enumerate() {
                    copy(x, row + tile * SIDE, k, to);
                }
            }
            Self::Transposed(x) => {
                let mut pairs = [[0; SIDE * SIDE]; 2];
                // SAFETY: the caller promises the instructions of `P`; each of `pairs` is 16 rows of 64 bytes.
                unsafe {
                    pack_pairs::<P>(x, k, row, pairs.each_mut());
                    for (pairs, to) in pairs.iter().zip(both) {
                        P::transpose(pairs.as_ptr().cast(), ROW_BYTES, bytemuck::cast_mut(to));
                    }
                }
            }
        }
    }

    /// Packs a right factor: two tiles of 16 pairs of rows of 16 columns, from (k, column) and (k, column + 16) on.
    ///
    /// # Safety
    /// The CPU has the instructions of `P`.
    #[inline(always)]
    pub(super) unsafe fn pack_right<P: Packing>(&self, k: usize, column: usize, both: [&mut Tile; 2]) {
        match self {
            // SAFETY: the caller promises the instructions of `P`.
            Self::Of(x) => unsafe { pack_pairs::<P>(x, k, column, both.map(bytemuck::cast_mut)) },
            Self::Transposed(x) => {
                for (tile, to) in both.into_iter().enumerate() {
                    let column = column + tile * SIDE;
                    if column + SIDE <= x.rows && k + DEPTH <= x.columns {
                        // SAFETY: x has 16 rows of 32 numbers from (column, k) on, and no writer, see `multiply`; the
                        // caller promises the instructions of `P`.
                        unsafe { P::transpose(x.at(column, k).cast(), x.stride * 2, bytemuck::cast_mut(to)) };
                    } else {
                        let mut edge = [bf16::ZERO; NUMBERS];
                        copy(x, column, k, &mut edge);
                        // SAFETY: `edge` is 16 rows of 64 bytes; the caller promises the instructions of `P`.
                        unsafe { P::transpose(edge.as_ptr().cast(), ROW_BYTES, bytemuck::cast_mut(to)) };
                    }
                }
            }
        }
    }
}

/// Copies 16 rows of 32 numbers of x from (row, column) on, zeros where x ends.
#[inline(always)]
fn copy(x: &Matrix<bf16>, row: usize, column: usize, to: &mut Tile) {
    let rows = to.as_chunks_mut::<DEPTH>().0;
    if row + SIDE <= x.rows && column + DEPTH <= x.columns {
        for (i, to) in rows.iter_mut().enumerate() {
            // SAFETY: x has 32 numbers from (row + i, column) on, and no writer: `multiply` checks that the output
            // overlaps no factor.
            *to = unsafe { x.at(row + i, column).cast::<[bf16; DEPTH]>().read() };
        }
        return;
    }
    let n = x.columns.saturating_sub(column).min(DEPTH);
    for (i, to) in rows.iter_mut().enumerate() {
        let n = if row + i < x.rows { n } else { 0 };
        // SAFETY: x has n numbers from (row + i, column) on, or n is 0; it has no writer: `multiply` checks that the
        // output overlaps no factor.
        to[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(x.at(row + i, column), n) });
        to[n..].fill(bf16::ZERO);
    }
}

/// Packs 16 pairs of rows of two times 16 columns of x from (row, column) on, each pair in a word, zeros where x ends.
///
/// # Safety
/// The CPU has the instructions of `P`.
#[inline(always)]
unsafe fn pack_pairs<P: Packing>(
    x: &Matrix<bf16>,
    row: usize,
    column: usize,
    to: [&mut [u32; SIDE * SIDE]; 2],
) {
    if row + DEPTH <= x.rows && column + BLOCK <= x.columns {
        // SAFETY: x has 32 rows of 32 numbers from (row, column) on, and no writer, see `multiply`; the caller promises
        // the instructions of `P`.
        return unsafe { P::pair(x.at(row, column), x.stride, to) };
    }
    let mut edge = [[bf16::ZERO; NUMBERS]; 2];
    for (i, edge) in edge.iter_mut().enumerate() {
        copy(x, row + i * SIDE, column, edge);
    }
    // SAFETY: `edge` is 32 rows of 32 numbers; the caller promises the instructions of `P`.
    unsafe { P::pair(edge.as_ptr().cast(), DEPTH, to) };
}

/// A right factor.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    Plain(Operand<'a>),
    /// A matrix of packed leaves, or its transpose.
    Packed {
        matrix: PackedRows<'a>,
        transposed: bool,
    },
}

impl<'a> From<Operand<'a>> for Right<'a> {
    fn from(operand: Operand<'a>) -> Self {
        Self::Plain(operand)
    }
}

impl Right<'_> {
    /// [rows, columns]
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Plain(operand) => operand.shape(),
            Self::Packed { matrix, transposed } => {
                let [rows, columns] = matrix.shape();
                if *transposed { [columns, rows] } else { [rows, columns] }
            }
        }
    }
}
