//! The matrices of a layer: one for all rows, or one for each base (expert).

use tch::Tensor;

/// A matrix `[rows, columns]` for the rows of each base.
#[derive(Debug)]
pub enum Matrices {
    /// One for all bases: `[rows, columns]`.
    Shared(Tensor),
    /// `[bases, rows, columns]`
    Each(Tensor),
}

impl Matrices {
    /// A view of the matrix of `base`.
    pub fn of(&self, base: usize) -> Tensor {
        match self {
            Self::Shared(matrix) => matrix.shallow_clone(),
            Self::Each(all) => all.select(0, base as i64),
        }
    }

    /// Rows of one matrix.
    pub fn rows(&self) -> i64 {
        self.shape()[0]
    }

    /// Columns of one matrix.
    pub fn columns(&self) -> i64 {
        self.shape()[1]
    }

    fn shape(&self) -> [i64; 2] {
        let size = self.tensor().size();
        [size[size.len() - 2], size[size.len() - 1]]
    }

    /// The tensor of all matrices.
    pub fn tensor(&self) -> &Tensor {
        let (Self::Shared(tensor) | Self::Each(tensor)) = self;
        tensor
    }
}
