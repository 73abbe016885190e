//! The matrices of a layer that computes groups of rows.

use tch::Tensor;

/// A matrix [rows, columns] for each group of rows.
#[derive(Debug)]
pub enum Matrices {
    /// One for all groups: [rows, columns].
    Shared(Tensor),
    /// [groups, rows, columns]
    Each(Tensor),
}

impl Matrices {
    /// That of `group`, as a view.
    pub fn of(&self, group: usize) -> Tensor {
        match self {
            Self::Shared(matrix) => matrix.shallow_clone(),
            Self::Each(all) => all.select(0, group as i64),
        }
    }

    /// Of each matrix.
    pub fn rows(&self) -> i64 {
        self.shape()[0]
    }

    /// Of each matrix.
    pub fn columns(&self) -> i64 {
        self.shape()[1]
    }

    fn shape(&self) -> [i64; 2] {
        let size = self.tensor().size();
        [size[size.len() - 2], size[size.len() - 1]]
    }

    /// All of them.
    pub fn tensor(&self) -> &Tensor {
        let (Self::Shared(tensor) | Self::Each(tensor)) = self;
        tensor
    }
}
