//! Frozen weights as they are stored: plain matrices, or packed tiles that are decoded where they are used.

use super::{Matrices, matrix_of, on_device};
use crate::{
    device::has_kernels,
    ops::{
        Buffer,
        cpu::{decode::decode, matmul::Matrix},
    },
    quant::{Format, Grid},
};
use half::bf16;
use std::ops::{Deref, Range};
use tch::{Kind, Tensor};

/// The frozen weight `[out, in]` of a layer, or one of each expert.
#[derive(Debug)]
pub enum Weight {
    Plain(Matrices),
    Packed(PackedMatrices),
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

    /// Writes the matrix of `base` to `out` `[rows, columns]`.
    fn decode(&self, base: usize, out: &Tensor) {
        let (mut tile, mut row) = (base * self.tiles_of_base(), 0);
        for (leaf, &rows) in self.widths.iter().enumerate() {
            let grid = self.grid(rows);
            let count = grid.tiles();
            let tiles = self.tiles.narrow(0, tile as i64, count as i64);
            let of_leaf = (base * self.widths.len() + leaf) as i64;
            let global = self.scales.as_ref().map_or(1.0, |scales| scales.double_value(&[of_leaf]) as f32);
            decode(grid, &tiles, global, &out.narrow(0, row, rows as i64));
            (tile, row) = (tile + count, row + rows as i64);
        }
    }

    /// Writes the matrices of `bases` to `out` `[bases, rows, columns]`.
    fn decode_all(&self, bases: Range<usize>, out: &Tensor) {
        if has_kernels(&self.tiles) {
            bases.enumerate().for_each(|(i, base)| self.decode(base, &out.get(i as i64)));
        } else {
            on_device::decode(self, &bases, out);
        }
    }

    fn decoded(&self, base: usize) -> Buffer {
        let shape = [self.rows() as i64, self.columns as i64];
        let out = Buffer::empty(&shape, self.kind, self.tiles.device());
        self.decode_all(base..base + 1, &out.unsqueeze(0));
        out
    }
}

impl Weight {
    /// Rows of one matrix.
    pub fn rows(&self) -> i64 {
        match self {
            Self::Plain(matrices) => matrices.rows(),
            Self::Packed(packed) => packed.rows() as i64,
        }
    }

    /// Columns of one matrix.
    pub fn columns(&self) -> i64 {
        match self {
            Self::Plain(matrices) => matrices.columns(),
            Self::Packed(packed) => packed.columns as i64,
        }
    }

    /// The matrix of `base` in plain numbers, decoded if need be.
    pub(super) fn of(&self, base: usize) -> OneMatrix<'_> {
        match self {
            Self::Plain(matrices) => OneMatrix::Of(matrices, base),
            Self::Packed(packed) => OneMatrix::Decoded(packed.decoded(base)),
        }
    }

    /// The matrices of all bases in plain numbers, decoded if need be.
    pub(super) fn all(&self) -> AllMatrices<'_> {
        match self {
            Self::Plain(matrices) => AllMatrices::Of(matrices),
            Self::Packed(packed) => {
                let bases = packed.tiles.size()[0] / packed.tiles_of_base().max(1) as i64;
                let shape = [bases, packed.rows() as i64, packed.columns as i64];
                let all = Buffer::empty(&shape, packed.kind, packed.tiles.device());
                packed.decode_all(0..bases as usize, &all);
                // One matrix is as a dense layer's: it is multiplied without segments.
                let all = if bases == 1 {
                    Matrices::Shared(all.get(0))
                } else {
                    Matrices::Each(all.shallow_clone())
                };
                AllMatrices::Decoded(all)
            }
        }
    }
}

/// The matrix of one base.
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

    pub fn matrix(&self) -> Matrix<'_, bf16> {
        match self {
            Self::Of(matrices, base) => matrix_of(matrices, *base),
            Self::Decoded(matrix) => Matrix::of(matrix),
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
