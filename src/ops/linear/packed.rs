//! Frozen weights as they are stored: plain matrices, or packed tiles that are decoded where they are used. Products
//! of our own decode inside of the product; libtorch's need the whole matrix.

use super::{Matrices, matrix_of, on_device};
use crate::{
    device::has_kernels,
    ops::{
        Buffer,
        cpu::{
            decode::{PackedRows, decode, decode_with_noise},
            dots,
            operand::{Matrix, Operand, Right},
        },
    },
    quant::{Format, Grid, Noise, Packed},
};
use std::ops::{Deref, Range};
use tch::{Device, Kind, Tensor};

/// The frozen weight `[out, in]` of a layer, or one of each expert.
#[derive(Debug)]
pub enum Weight {
    Plain(Matrices),
    Packed(PackedMatrices),
    /// The same with noise added wherever they are decoded, `[bases · leaves]`: a training pass with
    /// [quantisation noise](crate::quant::Noise).
    Noisy(PackedMatrices, Vec<Noise>),
}

impl From<Matrices> for Weight {
    fn from(matrices: Matrices) -> Self {
        Self::Plain(matrices)
    }
}

/// Packed matrices `[rows, columns]`, one for each base: each is the matrices of some leaves, one below the other.
#[derive(Debug)]
pub struct PackedMatrices {
    pub format: Format,
    /// `[tiles, bytes]` u8: of each base and leaf.
    pub tiles: Tensor,
    /// `[bases · leaves]` fp32, in formats with a scale of the matrix.
    pub scales: Option<Tensor>,
    /// Rows of each leaf.
    pub widths: Vec<usize>,
    pub columns: usize,
    /// The kind in which they are decoded.
    pub kind: Kind,
}

impl PackedMatrices {
    /// Rows of one matrix.
    pub fn rows(&self) -> usize {
        self.widths.iter().sum()
    }

    /// The tiles of a leaf.
    pub fn grid(&self, rows: usize) -> Grid {
        Grid { format: self.format, rows, columns: self.columns }
    }

    /// Tiles of one base.
    pub fn tiles_of_base(&self) -> usize {
        self.widths.iter().map(|&rows| self.grid(rows).tiles()).sum()
    }

    /// Grid, tiles from the first on, and scale of each leaf of `base`.
    fn leaves(&self, base: usize) -> impl Iterator<Item = (Grid, Range<usize>, f32)> {
        let leaves = self.widths.iter().enumerate();
        leaves.scan(base * self.tiles_of_base(), move |tile, (leaf, &rows)| {
            let (grid, first) = (self.grid(rows), *tile);
            *tile += grid.tiles();
            let of_leaf = (base * self.widths.len() + leaf) as i64;
            let global = self.scales.as_ref().map_or(1.0, |scales| scales.double_value(&[of_leaf]) as f32);
            Some((grid, first..*tile, global))
        })
    }

    /// Writes the matrix of `base` to `out` `[rows, columns]`, with the `noise` of its leaf if there is any.
    fn decode(&self, base: usize, noise: &[Noise], out: &Tensor) {
        let mut row = 0;
        for (leaf, (grid, tiles, global)) in self.leaves(base).enumerate() {
            let tiles = self.tiles.narrow(0, tiles.start as i64, tiles.len() as i64);
            let out = out.narrow(0, row, grid.rows as i64);
            match noise.get(base * self.widths.len() + leaf) {
                None => decode(grid, &tiles, global, &out),
                Some(&noise) => decode_with_noise(grid, &tiles, global, noise, &out),
            }
            row += grid.rows as i64;
        }
    }

    /// Writes the matrices of `bases` to `out` `[bases, rows, columns]`. Noise is added on the host alone.
    fn decode_all(&self, bases: Range<usize>, noise: &[Noise], out: &Tensor) {
        if has_kernels(&self.tiles) || !noise.is_empty() {
            bases.enumerate().for_each(|(i, base)| self.decode(base, noise, &out.get(i as i64)));
        } else {
            on_device::decode(self, &bases, out);
        }
    }

    /// The leaves of `base` in host memory, to be decoded inside of products.
    ///
    /// # Panics
    /// The tiles are not dense bytes on the host, or too few.
    fn in_host(&self, base: usize) -> Vec<Packed<'_>> {
        let each = self.format.tile().bytes;
        assert_eq!((self.tiles.kind(), self.tiles.device()), (Kind::Uint8, Device::Cpu), "packed tiles");
        assert!(self.tiles.is_contiguous(), "packed tiles are dense");
        // SAFETY: the tensor is so many dense bytes on the host, is borrowed, and has no writer: weights are frozen.
        let all = unsafe {
            std::slice::from_raw_parts(self.tiles.data_ptr().cast::<u8>().cast_const(), self.tiles.numel())
        };
        let packed = |(grid, tiles, global): (Grid, Range<usize>, f32)| Packed {
            grid,
            bytes: &all[tiles.start * each..tiles.end * each],
            global,
        };
        self.leaves(base).map(packed).collect()
    }

    fn decoded(&self, base: usize, noise: &[Noise]) -> Buffer {
        let shape = [self.rows() as i64, self.columns as i64];
        let out = Buffer::empty(&shape, self.kind, self.tiles.device());
        self.decode_all(base..base + 1, noise, &out.unsqueeze(0));
        out
    }

    fn all(&self, noise: &[Noise]) -> AllMatrices<'_> {
        let bases = self.tiles.size()[0] / self.tiles_of_base().max(1) as i64;
        let shape = [bases, self.rows() as i64, self.columns as i64];
        let all = Buffer::empty(&shape, self.kind, self.tiles.device());
        self.decode_all(0..bases as usize, noise, &all);
        // One matrix is as a dense layer's: it is multiplied without segments.
        AllMatrices::Decoded(if bases == 1 {
            Matrices::Shared(all.get(0))
        } else {
            Matrices::Each(all.shallow_clone())
        })
    }
}

impl Weight {
    /// Rows of one matrix.
    pub fn rows(&self) -> i64 {
        match self {
            Self::Plain(matrices) => matrices.rows(),
            Self::Packed(packed) | Self::Noisy(packed, _) => packed.rows() as i64,
        }
    }

    /// Columns of one matrix.
    pub fn columns(&self) -> i64 {
        match self {
            Self::Plain(matrices) => matrices.columns(),
            Self::Packed(packed) | Self::Noisy(packed, _) => packed.columns as i64,
        }
    }

    /// The matrix of `base` in plain numbers, decoded if need be.
    pub(super) fn of(&self, base: usize) -> OneMatrix<'_> {
        match self {
            Self::Plain(matrices) => OneMatrix::Of(matrices, base),
            Self::Packed(packed) => OneMatrix::Decoded(packed.decoded(base, &[])),
            Self::Noisy(packed, noise) => OneMatrix::Decoded(packed.decoded(base, noise)),
        }
    }

    /// The matrix of `base` as a factor of our own products, which decode what they use.
    pub(super) fn factor(&self, base: usize) -> WeightFactor<'_> {
        match self {
            Self::Plain(matrices) => WeightFactor::Plain(matrices, base),
            Self::Packed(packed) => WeightFactor::Packed(packed.in_host(base)),
            Self::Noisy(packed, noise) => WeightFactor::Noisy(packed.decoded(base, noise)),
        }
    }

    /// The matrices of all bases in plain numbers, decoded if need be.
    pub(super) fn all(&self) -> AllMatrices<'_> {
        match self {
            Self::Plain(matrices) => AllMatrices::Of(matrices),
            Self::Packed(packed) => packed.all(&[]),
            Self::Noisy(packed, noise) => packed.all(noise),
        }
    }
}

/// The matrix of one base in plain numbers.
pub(super) enum OneMatrix<'a> {
    Of(&'a Matrices, usize),
    Decoded(Buffer),
}

impl OneMatrix<'_> {
    pub fn tensor(&self) -> Tensor {
        match self {
            Self::Of(matrices, base) => matrices.of(*base),
            Self::Decoded(matrix) => matrix.shallow_clone(),
        }
    }
}

/// The matrix of one base as a factor of our own products.
pub(super) enum WeightFactor<'a> {
    Plain(&'a Matrices, usize),
    Packed(Vec<Packed<'a>>),
    Noisy(Buffer),
}

impl WeightFactor<'_> {
    /// Wᵀ of its rows `rows`, `[in, rows]`, in bf16.
    pub fn transposed(&self, rows: &Range<usize>) -> Right<'_> {
        match self {
            Self::Plain(matrices, base) => Operand::Transposed(matrix_of(matrices, *base).rows(rows)).into(),
            Self::Noisy(matrix) => Operand::Transposed(Matrix::of(matrix).rows(rows)).into(),
            Self::Packed(leaves) => {
                Right::Packed { matrix: PackedRows::of(leaves).rows(rows), transposed: true }
            }
        }
    }

    /// W `[out, in]`, in bf16.
    pub fn whole(&self) -> Right<'_> {
        match self {
            Self::Plain(matrices, base) => Operand::Of(matrix_of(matrices, *base)).into(),
            Self::Noisy(matrix) => Operand::Of(Matrix::of(matrix)).into(),
            Self::Packed(leaves) => Right::Packed { matrix: PackedRows::of(leaves), transposed: false },
        }
    }

    /// out `[rows, out]` = start + x·Wᵀ of x `[rows, in]`, with one order of sums for each row.
    pub fn multiply_invariant(&self, x: &Tensor, start: dots::Start, out: &Tensor) {
        match self {
            Self::Plain(matrices, base) => dots::multiply(x, &matrices.of(*base), start, out),
            Self::Noisy(matrix) => dots::multiply(x, &**matrix, start, out),
            Self::Packed(leaves) => {
                dots::multiply(x, dots::Factor::Packed(PackedRows::of(leaves)), start, out);
            }
        }
    }
}

/// The matrices of all bases.
pub(super) enum AllMatrices<'a> {
    Of(&'a Matrices),
    Decoded(Matrices),
}

impl Deref for AllMatrices<'_> {
    type Target = Matrices;

    fn deref(&self) -> &Matrices {
        match self {
            Self::Of(matrices) => matrices,
            Self::Decoded(matrices) => matrices,
        }
    }
}
