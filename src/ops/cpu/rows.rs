//! The rows of host tensors, as slices that kernels work on.

use super::{Element, Isa, Stored, pool};
use crate::ops::row_layout::RowLayout;
use std::{marker::PhantomData, ops::Range};
use tch::{Device, Tensor};

/// Elements that are too few to be worth another thread.
const LEAST_ELEMENTS: usize = 1 << 14;

/// Elements of a piece of a flat vector: see [`Rows::pieces`].
const PIECE_ELEMENTS: usize = 1 << 12;

/// A host tensor `[..., columns]` whose last dimension is dense and whose other dimensions are at most two strides, as
/// in `[tokens, heads, dim]`, some heads of a wider tensor.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    first: *mut E,
    rows: usize,
    columns: usize,
    /// From a row to the next one.
    stride: usize,
    /// After so many rows `outer_stride` counts from the first of them: all rows where there is one stride.
    inner: usize,
    outer_stride: usize,
    /// Columns of the last row.
    last: usize,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: a `Rows` is an address; `row` and `each_row` say who may use it how.
unsafe impl<E: Stored> Send for Rows<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Stored> Sync for Rows<'_, E> {}

impl<'a, E: Stored> Rows<'a, E> {
    /// The rows of `tensor`, a vector being one row. A tensor that does not fit is a mistake of the caller.
    pub fn of(tensor: &'a Tensor) -> Self {
        assert_eq!((tensor.kind(), tensor.device()), (E::KIND, Device::Cpu), "a kernel's tensor");
        let (size, strides) = (tensor.size(), tensor.stride());
        let layout = RowLayout::of(&size, &strides)
            .unwrap_or_else(|| panic!("rows are dense and have at most two strides: {size:?} {strides:?}"));
        let RowLayout { rows, columns, stride, inner, outer_stride } = layout;
        // What has no element may have no memory, but even an empty slice has an address.
        let first = if tensor.numel() == 0 { std::ptr::dangling_mut() } else { tensor.data_ptr().cast() };
        Self { first, rows, columns, stride, inner, outer_stride, last: columns, tensor: PhantomData }
    }

    /// A dense vector as rows, so that threads can share it; all vectors of a length are cut alike.
    pub fn pieces(vector: &'a Tensor) -> Self {
        let whole = Self::of(vector);
        assert_eq!(whole.rows, 1, "pieces of a vector");
        let (rows, columns) = (whole.columns.div_ceil(PIECE_ELEMENTS), PIECE_ELEMENTS);
        let last = whole.columns - rows.saturating_sub(1) * columns;
        Self { rows, columns, stride: columns, inner: rows, last, ..whole }
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

    /// Where row `i` is, and its length.
    #[inline(always)]
    fn at(&self, i: usize) -> (*mut E, usize) {
        assert!(i < self.rows);
        let offset = if i < self.inner {
            i * self.stride
        } else {
            i / self.inner * self.outer_stride + i % self.inner * self.stride
        };
        // SAFETY: row i < rows lies in the tensor, which is borrowed for 'a.
        let start = unsafe { self.first.add(offset) };
        (start, if i + 1 == self.rows { self.last } else { self.columns })
    }

    /// Row `i`, which nothing may write to while the slice is in use.
    ///
    /// # Safety
    /// No `&mut` of the row exists.
    #[inline(always)]
    pub unsafe fn row(&self, i: usize) -> &'a [E] {
        let (start, columns) = self.at(i);
        // SAFETY: the row lies in the tensor, which is borrowed for 'a; the caller vouches for no writer.
        unsafe { std::slice::from_raw_parts(start, columns) }
    }

    /// Row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to the row exists.
    #[inline(always)]
    pub unsafe fn row_mut(&self, i: usize) -> &'a mut [E] {
        let (start, columns) = self.at(i);
        // SAFETY: the row lies in the tensor, which is borrowed for 'a; the caller vouches for being alone.
        unsafe { std::slice::from_raw_parts_mut(start, columns) }
    }

    /// Some columns of row `i`.
    ///
    /// # Safety
    /// No `&mut` of these columns exists.
    #[inline(always)]
    pub unsafe fn part(&self, i: usize, columns: Range<usize>) -> &'a [E] {
        let (start, all) = self.at(i);
        assert!(columns.start <= columns.end && columns.end <= all);
        // SAFETY: they lie in row i of the tensor, which is borrowed for 'a; the caller vouches for no writer.
        unsafe { std::slice::from_raw_parts(start.add(columns.start), columns.len()) }
    }

    /// Some columns of row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to these columns exists.
    #[inline(always)]
    pub unsafe fn part_mut(&self, i: usize, columns: Range<usize>) -> &'a mut [E] {
        let (start, all) = self.at(i);
        assert!(columns.start <= columns.end && columns.end <= all);
        // SAFETY: they lie in row i of the tensor, which is borrowed for 'a; the caller vouches for being alone.
        unsafe { std::slice::from_raw_parts_mut(start.add(columns.start), columns.len()) }
    }
}

/// The values of a small host tensor, such as a weight that every row needs, as `E`.
pub fn values<E: Stored>(tensor: &Tensor) -> Vec<E> {
    let vector = tensor.to_kind(E::KIND).contiguous().view([-1]);
    // SAFETY: nothing writes to `vector`: it is this function's own, or a view of a tensor that is only read meanwhile.
    unsafe { Rows::of(&vector).row(0) }.to_vec()
}

/// Calls `kernel(row, inputs, outputs, wide)` for every row, on all threads and compiled for the current [`Isa`]. All
/// tensors have as many rows; outputs and wide tensors, which may be read and written, must not overlap any other tensor
/// of the call, nor may the rows of one.
pub fn each_row<E: Element, const I: usize, const O: usize, const W: usize>(
    inputs: [Rows<E>; I],
    outputs: [Rows<E>; O],
    wide: [Rows<E::Accum>; W],
    kernel: impl Fn(usize, [&[E]; I], [&mut [E]; O], [&mut [E::Accum]; W]) + Sync,
) {
    let lengths = inputs.iter().chain(&outputs).map(|r| r.rows).chain(wide.iter().map(|r| r.rows));
    let rows = lengths.clone().next().unwrap_or(0);
    assert!(lengths.into_iter().all(|n| n == rows), "all tensors of a kernel have as many rows");
    let columns: usize = inputs.iter().chain(&outputs).map(|r| r.columns).max().unwrap_or(1);
    let columns = columns.max(wide.iter().map(|r| r.columns).max().unwrap_or(1)).max(1);
    let level = Isa::current();
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    /// Adds 1 + row to every element.
    fn count(rows: Rows<f32>) {
        each_row([], [rows], [], |i, [], [row], []| row.iter_mut().for_each(|x| *x += 1.0 + i as f32));
    }

    #[test]
    fn rows_of_every_view() {
        let all = || Tensor::zeros([5, 4, 3], (Kind::Float, Device::Cpu));
        let views: [fn(&Tensor) -> Tensor; 7] = [
            |t| t.shallow_clone(),
            |t| t.narrow(1, 1, 2),
            |t| t.narrow(1, 2, 1),
            |t| t.narrow(2, 1, 2),
            |t| t.narrow(0, 2, 0),
            |t| t.get(3).get(2),
            |t| t.narrow(1, 0, 2).narrow(0, 4, 1),
        ];
        for view in views {
            let (ours, expected) = (all(), all());
            count(Rows::of(&view(&ours)));
            let mut target = view(&expected);
            let rows = target.size().iter().rev().skip(1).product::<i64>();
            let numbers = Tensor::arange(rows, (Kind::Float, Device::Cpu)) + 1;
            let shape: Vec<i64> = target.size().iter().rev().skip(1).rev().copied().chain([1]).collect();
            let _ = target.g_add_(&numbers.view(&shape[..]));
            assert_eq!(ours, expected, "{:?} {:?}", target.size(), target.stride());
        }
    }

    #[test]
    fn pieces_tile_a_vector() {
        for n in [0, 1, PIECE_ELEMENTS, 2 * PIECE_ELEMENTS + 7] {
            let vector = Tensor::zeros([n as i64], (Kind::Float, Device::Cpu));
            count(Rows::pieces(&vector));
            let seen = values::<f32>(&vector);
            assert_eq!(seen.len(), n);
            assert!(seen.iter().enumerate().all(|(i, &x)| x == 1.0 + (i / PIECE_ELEMENTS) as f32));
        }
    }

    #[test]
    #[should_panic(expected = "at most two strides")]
    fn three_strides_are_a_mistake() {
        let tensor = Tensor::zeros([5, 4, 3, 2], (Kind::Float, Device::Cpu));
        Rows::<f32>::of(&tensor.narrow(1, 0, 2).narrow(2, 0, 2));
    }
}
