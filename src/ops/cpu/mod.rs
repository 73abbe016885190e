//! What the CPU kernels of the operations are made of: the instruction set chosen at run time ([`level`]), element types
//! and their arithmetic ([`element`]), sums and maxima ([`lanes`]), libtorch's own threads ([`pool`]), the rows of tensors
//! ([`rows`]), tiles of bf16 ([`packing`]) and the registers for them ([`amx`]), products of matrices in the cache ([`tile`]), of large
//! ones ([`matmul`]) block by block ([`block`]), and memory for those ([`scratch`]).
//!
//! A kernel is plain Rust over slices, marked `#[inline(always)]` and called inside [`Isa::run`]: the compiler
//! vectorises it once for each instruction set. Sums run in [`LANES`] lanes, so they do not depend on the set. A kernel
//! takes its slices as arguments, not in arrays: only so does the compiler know that they do not overlap.

pub mod amx;
pub mod block;
pub mod element;
pub mod isa;
pub mod lanes;
pub mod matmul;
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
