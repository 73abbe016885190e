//! Quantized checkpoints as their own tools write them: matrices whose bytes become tiles of `crate::quant` without
//! being packed anew, and whose values are read like those of any tensor.

mod matrix;
mod scheme;

pub(super) use matrix::PackedMatrix;
pub use scheme::Scheme;

#[cfg(test)]
mod tests;
