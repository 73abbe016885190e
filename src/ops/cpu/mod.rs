//! What the CPU kernels of the operations are made of: the instruction set chosen at run time ([`level`]), element types
//! and their arithmetic ([`element`]), libtorch's own threads ([`pool`]), the rows of tensors
//! ([`rows`]), products of matrices in the cache ([`tile`]), and memory for those ([`scratch`]).
//!
//! A kernel is plain Rust over slices, marked `#[inline(always)]` and called inside [`Level::run`]: the compiler
//! vectorises it once for each instruction set. Sums run in [`LANES`] lanes, so they do not depend on the set.

pub mod element;
pub mod level;
pub mod pool;
pub mod rows;
pub mod scratch;
pub mod tile;

pub use element::{Element, Real};
pub use level::Level;
pub use rows::{Rows, each_row};

/// Partial sums of a reduction: a vector of AVX-512 in fp32.
pub const LANES: usize = 16;
