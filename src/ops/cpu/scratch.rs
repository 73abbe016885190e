//! Scratch memory of a thread's kernels, kept from call to call.

use bytemuck::Pod;
use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// Words in a cache line.
const LINE: usize = 8;

/// Slices of any content. Each starts at a cache line, as `block.rs` needs.
pub struct Scratch<'a>(&'a mut [u64]);

impl<'a> Scratch<'a> {
    /// The next `n` numbers.
    pub fn cut<T: Pod>(&mut self, n: usize) -> &'a mut [T] {
        let (own, rest) = std::mem::take(&mut self.0).split_at_mut(words::<T>(n));
        self.0 = rest;
        &mut bytemuck::cast_slice_mut(own)[..n]
    }
}

/// Words that [`Scratch::cut`] uses for `n` numbers.
pub const fn words<T>(n: usize) -> usize {
    (n * size_of::<T>()).div_ceil(8).next_multiple_of(LINE)
}

/// This thread's memory, given back when this is dropped.
pub struct Memory(Vec<u64>, usize);

impl Memory {
    /// Takes at least `words` words, of any content.
    pub fn take(words: usize) -> Self {
        let mut memory = KEPT.take();
        if memory.len() < words + LINE {
            memory = vec![0; words + LINE];
        }
        let first = memory.as_ptr().align_offset(LINE * 8);
        Self(memory, first)
    }

    pub fn scratch(&mut self) -> Scratch<'_> {
        Scratch(&mut self.0[self.1..])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.0));
    }
}
