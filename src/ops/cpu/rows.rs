//! The rows of host tensors, as slices that kernels work on.

use super::{Element, Level, pool};
use std::{marker::PhantomData, ops::Range};
use tch::{Device, Tensor};

/// Elements that are too few to be worth another thread.
const LEAST_ELEMENTS: usize = 1 << 14;

/// A host tensor `[..., columns]` whose last dimension is dense and whose other dimensions are one stride.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    first: *mut E,
    rows: usize,
    columns: usize,
    stride: usize,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: a `Rows` is an address; `row` and `each_row` say who may use it how.
unsafe impl<E: Element> Send for Rows<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Element> Sync for Rows<'_, E> {}

impl<'a, E: Element> Rows<'a, E> {
    /// The rows of `tensor`, a vector being one row. A tensor that does not fit is a mistake of the caller.
    pub fn of(tensor: &'a Tensor) -> Self {
        assert_eq!((tensor.kind(), tensor.device()), (E::KIND, Device::Cpu), "a kernel's tensor");
        let (size, strides) = (tensor.size(), tensor.stride());
        let columns = size.last().map_or(1, |&n| n as usize);
        assert!(columns <= 1 || strides.last() == Some(&1), "rows are dense: {size:?} {strides:?}");
        let outer = size.len().saturating_sub(1);
        let rows: usize = size[..outer].iter().map(|&n| n as usize).product();
        let stride = if outer == 0 { columns } else { strides[outer - 1] as usize };
        for i in 0..outer.saturating_sub(1) {
            let dense = strides[i] == strides[i + 1] * size[i + 1];
            assert!(rows <= 1 || size[i] == 1 || dense, "rows have one stride: {size:?} {strides:?}");
        }
        Self { first: tensor.data_ptr().cast(), rows, columns, stride, tensor: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.rows
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Row `i`, which nothing may write to while the slice is in use.
    ///
    /// # Safety
    /// No `&mut` of the row exists.
    #[inline(always)]
    pub unsafe fn row(&self, i: usize) -> &'a [E] {
        assert!(i < self.rows);
        // SAFETY: the row lies in the tensor, which is borrowed for 'a; the caller vouches for no writer.
        unsafe { std::slice::from_raw_parts(self.first.add(i * self.stride), self.columns) }
    }

    /// Row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to the row exists.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller vouches for being the only one")]
    pub unsafe fn row_mut(&self, i: usize) -> &'a mut [E] {
        assert!(i < self.rows);
        // SAFETY: the row lies in the tensor, which is borrowed for 'a; the caller vouches for being alone.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(i * self.stride), self.columns) }
    }

    /// Some columns of row `i`.
    ///
    /// # Safety
    /// No `&mut` of these columns exists.
    #[inline(always)]
    pub unsafe fn part(&self, i: usize, columns: Range<usize>) -> &'a [E] {
        assert!(i < self.rows && columns.start <= columns.end && columns.end <= self.columns);
        // SAFETY: they lie in the tensor, which is borrowed for 'a; the caller vouches for no writer.
        unsafe { std::slice::from_raw_parts(self.first.add(i * self.stride + columns.start), columns.len()) }
    }

    /// Some columns of row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to these columns exists.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller vouches for being the only one")]
    pub unsafe fn part_mut(&self, i: usize, columns: Range<usize>) -> &'a mut [E] {
        assert!(i < self.rows && columns.start <= columns.end && columns.end <= self.columns);
        // SAFETY: they lie in the tensor, which is borrowed for 'a; the caller vouches for being alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.add(i * self.stride + columns.start), columns.len())
        }
    }
}

/// Calls `kernel(row, inputs, outputs, wide outputs)` for every row, on all threads and compiled for the current
/// [`Level`]. All tensors have as many rows; an output must not overlap any other tensor of the call.
pub fn each_row<E: Element, const I: usize, const O: usize, const W: usize>(
    inputs: [Rows<E>; I],
    outputs: [Rows<E>; O],
    wide: [Rows<E::Wide>; W],
    kernel: impl Fn(usize, [&[E]; I], [&mut [E]; O], [&mut [E::Wide]; W]) + Sync,
) {
    let lengths = inputs.iter().chain(&outputs).map(|r| r.rows).chain(wide.iter().map(|r| r.rows));
    let rows = lengths.clone().next().unwrap_or(0);
    assert!(lengths.into_iter().all(|n| n == rows), "all tensors of a kernel have as many rows");
    let columns: usize = inputs.iter().chain(&outputs).map(|r| r.columns).max().unwrap_or(1).max(1);
    let level = Level::current();
    pool::ranges(rows, LEAST_ELEMENTS.div_ceil(columns), |range| {
        level.run(
            #[inline(always)]
            || {
                for i in range {
                    // SAFETY: ranges are disjoint and an output overlaps nothing, so row i of an output has this one
                    // reference, and no row of an input has a writer.
                    unsafe {
                        let inputs = inputs.each_ref().map(|r| r.row(i));
                        let outputs = outputs.each_ref().map(|r| r.row_mut(i));
                        kernel(i, inputs, outputs, wide.each_ref().map(|r| r.row_mut(i)));
                    }
                }
            },
        );
    });
}
