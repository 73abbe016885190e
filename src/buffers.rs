//! Host memory of activations and temporaries, reused from operation to operation and from step to step.
//!
//! A fresh allocation of megabytes costs a page fault for every 4 KiB, which was measured to cost as much as some of
//! the operations. So what is dropped here is kept for the next taker of about that size. When nothing fits and all
//! together would be more than was ever in use at a time, the longest unused is given back to the system: what a step
//! works with settles in one set of blocks, and never takes more than its own peak. For that to be true of the
//! process, malloc must return what it is given back: [`return_large_blocks`].
//!
//! Tensors of other devices come from libtorch, which has such a pool for them.

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::VecDeque,
    ops::{Deref, DerefMut},
};
use tch::{Device, Kind, Tensor};

/// What is smaller is left to malloc, which reuses it well.
const LEAST_BYTES: usize = 1 << 18;

/// A block of this many bytes has pages of its own, which are unmapped when it is freed.
const MAPPED_BYTES: i32 = 1 << 20;

/// Free bytes at the end of the heap that malloc keeps.
const KEPT_BYTES: i32 = 1 << 26;

/// Has malloc return large blocks to the system at once. By default glibc raises the size from which it does so to
/// 32 MiB as the process goes; then the heap's holes made SmolLM2's peak RSS up to 25 % larger from run to run, at the
/// same speed.
pub fn return_large_blocks() {
    // SAFETY: mallopt takes two numbers, and refuses what it does not know.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// Blocks `[bytes]` u8.
#[derive(Default)]
struct Pool {
    /// Those that nobody uses, the longest unused first.
    free: VecDeque<Tensor>,
    /// Bytes in use.
    used: usize,
    /// The most bytes that were in use at a time.
    most: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

impl Pool {
    /// A block of at least `bytes`.
    fn take(&mut self, bytes: usize) -> Tensor {
        let fitting = self.free.iter().enumerate().map(|(i, block)| (block.numel(), Reverse(i)));
        // Of those of a size the one that was used last: it may still be in a cache.
        let best = fitting.filter(|&(size, _)| (bytes..=bytes + bytes / 4).contains(&size)).min();
        let found = best.and_then(|(_, Reverse(i))| self.free.remove(i));
        self.used += found.as_ref().map_or(bytes, Tensor::numel);
        self.most = self.most.max(self.used);
        while self.used + self.unused() > self.most && self.free.pop_front().is_some() {}
        found.unwrap_or_else(|| Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu)))
    }

    fn put(&mut self, block: Tensor) {
        // One that another thread took is welcome too.
        self.used = self.used.saturating_sub(block.numel());
        self.free.push_back(block);
    }

    /// Bytes that nobody uses.
    fn unused(&self) -> usize {
        self.free.iter().map(Tensor::numel).sum()
    }
}

/// A tensor whose memory goes to the next taker when this is dropped. No other tensor may view it then.
#[derive(Debug)]
pub struct Buffer {
    tensor: Tensor,
    block: Option<Tensor>,
}

impl Buffer {
    /// A tensor of any content.
    pub fn empty(shape: &[i64], kind: Kind, device: Device) -> Self {
        let bytes = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        if device != Device::Cpu || bytes < LEAST_BYTES {
            return Self { tensor: Tensor::empty(shape, (kind, device)), block: None };
        }
        let block = POOL.with_borrow_mut(|pool| pool.take(bytes));
        let tensor = block.narrow(0, 0, bytes as i64).view_dtype(kind).view(shape);
        Self { tensor, block: Some(block) }
    }

    /// A tensor of any content, of the shape, kind and device of `tensor`.
    pub fn like(tensor: &Tensor) -> Self {
        Self::empty(&tensor.size(), tensor.kind(), tensor.device())
    }
}

impl From<Tensor> for Buffer {
    /// A tensor whose memory is its own.
    fn from(tensor: Tensor) -> Self {
        Self { tensor, block: None }
    }
}

impl Deref for Buffer {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        if cfg!(debug_assertions) {
            // All ones are NaN in every floating-point kind: who still reads it is found out.
            let _ = block.shallow_clone().fill_(255);
        }
        // At the end of a thread there is nobody to keep it for.
        let _ = POOL.try_with(|pool| pool.borrow_mut().put(block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(elements: i64) -> (Buffer, usize) {
        let buffer = Buffer::empty(&[elements], Kind::Float, Device::Cpu);
        let address = buffer.data_ptr().addr();
        (buffer, address)
    }

    fn unused() -> usize {
        POOL.with_borrow(Pool::unused)
    }

    #[test]
    fn what_is_dropped_is_taken_again() {
        let n = LEAST_BYTES as i64;
        let (first, at) = taken(n);
        let view = first.narrow(0, 0, 1);
        drop(first);
        if cfg!(debug_assertions) {
            assert!(view.double_value(&[0]).is_nan(), "a view of what was dropped is found out");
        }
        let (second, again) = taken(n - 5);
        assert_eq!((second.size(), at), (vec![n - 5], again));
        let (third, elsewhere) = taken(n);
        assert_ne!(elsewhere, at);
        drop(second);
        drop(third);
        assert_eq!(unused(), 8 * n as usize);
        // The last used one first.
        let (third, first_again) = taken(n);
        assert_eq!(first_again, elsewhere);
        drop(third);
        // What fits neither takes the place of both; what is much smaller does not use it up.
        let large = taken(2 * n).0;
        assert_eq!(unused(), 0);
        drop(large);
        let small = taken(n / 2).0;
        assert_eq!(unused(), 0);
        drop(small);
        assert_eq!(unused(), 2 * n as usize);
    }

    #[test]
    fn small_ones_are_not_kept() {
        drop(taken(7));
        assert_eq!(unused(), 0);
    }
}
