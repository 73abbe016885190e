//! Host memory of activations and temporaries, reused from operation to operation and from step to step.
//!
//! A fresh allocation of megabytes costs a page fault for every 4 KiB, which was measured to cost as much as some of
//! the operations. So what is dropped here is kept for the next taker of about that size. When nothing fits, as much as
//! is newly taken is given back to the system, the longest unused first: the sum stays near the peak of what is in use.
//!
//! Tensors of other devices come from libtorch, which has such a pool for them.

use std::{
    cell::RefCell,
    collections::VecDeque,
    ops::{Deref, DerefMut},
};
use tch::{Device, Kind, Tensor};

/// What is smaller is left to malloc, which reuses it well.
const LEAST_BYTES: usize = 1 << 18;

thread_local! {
    /// Blocks `[bytes]` u8 that nobody uses, the longest unused first.
    static FREE: RefCell<VecDeque<Tensor>> = const { RefCell::new(VecDeque::new()) };
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
        let block = take(bytes);
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
        let _ = FREE.try_with(|free| free.borrow_mut().push_back(block));
    }
}

/// A block of at least `bytes`.
fn take(bytes: usize) -> Tensor {
    FREE.with_borrow_mut(|free| {
        let fitting = free.iter().enumerate().map(|(i, block)| (block.numel(), i));
        let best = fitting.filter(|&(size, _)| (bytes..=bytes + bytes / 4).contains(&size)).min();
        if let Some(block) = best.and_then(|(_, i)| free.remove(i)) {
            return block;
        }
        let mut given_back = 0;
        while given_back < bytes
            && let Some(block) = free.pop_front()
        {
            given_back += block.numel();
        }
        Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(elements: i64) -> (Buffer, usize) {
        let buffer = Buffer::empty(&[elements], Kind::Float, Device::Cpu);
        let address = buffer.data_ptr().addr();
        (buffer, address)
    }

    fn held() -> usize {
        FREE.with_borrow(|free| free.iter().map(Tensor::numel).sum())
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
        drop((second, third));
        assert_eq!(held(), 8 * n as usize);
        // What fits neither takes the place of both; what is much smaller does not use it up.
        let large = taken(2 * n).0;
        assert_eq!(held(), 0);
        drop(large);
        let small = taken(n / 2).0;
        assert_eq!(held(), 0);
        drop(small);
        assert_eq!(held(), 2 * n as usize);
    }

    #[test]
    fn small_ones_are_not_kept() {
        drop(taken(7));
        assert_eq!(held(), 0);
    }
}
