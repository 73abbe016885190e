//! Building blocks of the operations' CPU kernels:
//! - [`isa`] the instruction set chosen at run time, [`element`] element types and their arithmetic,
//! - [`rows`] rows of tensors, [`lanes`] sums and maxima over them, [`pool`] libtorch's own threads,
//! - [`packing`] tiles of bf16, [`amx`] registers for them, [`tile`] products of matrices in the cache,
//! - [`matmul`] products of large matrices, [`block`] by block, of [`operand`]s, with memory from [`scratch`],
//! - [`dots`] products whose rows do not depend on each other, to the bit,
//! - [`decode`] packed matrices.
//!
//! A kernel is plain Rust over slices, marked `#[inline(always)]` and called inside [`Isa::run`]: the compiler
//! vectorises it once for each instruction set. Sums run in [`LANES`] lanes, so they do not depend on the set. A kernel
//! takes its slices as arguments, not in arrays, for then the compiler knows that they do not overlap.

pub mod amx;
pub mod block;
pub mod decode;
pub mod dots;
pub mod element;
pub mod isa;
pub mod lanes;
pub mod matmul;
pub mod operand;
pub mod packing;
pub mod pool;
pub mod rows;
pub mod scratch;
pub mod tile;

pub(crate) use element::dispatch;
pub use element::{Element, Real, Stored};
pub use isa::Isa;
pub use lanes::LANES;
pub use rows::{Rows, each_row, values};
