//! Rows of host tensors as slices, for kernels that work row by row.

use super::{Element, Isa, Stored, pool};
use crate::ops::row_layout::{Footprint, RowLayout};
use std::{marker::PhantomData, ops::Range};
use tch::{Device, Tensor};

/// Elements below which another thread costs more than it saves.
const LEAST_ELEMENTS: usize = 1 << 14;

/// Elements of a piece of a flat vector, see [`Rows::pieces`].
const PIECE_ELEMENTS: usize = 1 << 12;

/// A host tensor `[..., columns]` with a dense last dimension and at most two strides in the others, as in
/// `[tokens, heads, dim]`, some heads of a wider tensor.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    first: *mut E,
    rows: usize,
    columns: usize,
    /// From a row to the next one.
    stride: usize,
    /// Rows that `stride` separates; the next as many start at `outer_stride`. All rows where there is one stride.
    inner: usize,
    outer_stride: usize,
    /// Columns of the last row.
    last: usize,
    footprint: Footprint,
    tensor: PhantomData<&'a Tensor>,
}

// SAFETY: safe methods read sizes alone. Memory is reached through unsafe methods, whose callers vouch that a row with
// a writer has no other reference on any thread; `E: Stored` is plain data.
unsafe impl<E: Stored> Sync for Rows<'_, E> {}

impl<'a, E: Stored> Rows<'a, E> {
    /// The rows of `tensor`; a vector is one row.
    ///
    /// # Panics
    /// The tensor is of another kind, not on the host, not dense in its columns, or has more than two strides.
    pub fn of(tensor: &'a Tensor) -> Self {
        assert_eq!((tensor.kind(), tensor.device()), (E::KIND, Device::Cpu), "a kernel's tensor");
        let (size, strides) = (tensor.size(), tensor.stride());
        let layout = RowLayout::of(&size, &strides)
            .unwrap_or_else(|| panic!("rows are dense and have at most two strides: {size:?} {strides:?}"));
        let RowLayout { rows, columns, stride, inner, outer_stride } = layout;
        // A tensor without elements may have no memory, but even an empty slice has an address.
        let first: *mut E =
            if tensor.numel() == 0 { std::ptr::dangling_mut() } else { tensor.data_ptr().cast() };
        let footprint = layout.footprint(first.addr(), size_of::<E>());
        Self {
            first,
            rows,
            columns,
            stride,
            inner,
            outer_stride,
            last: columns,
            footprint,
            tensor: PhantomData,
        }
    }

    /// A dense vector cut into rows, for threads to share. Vectors of one length are cut alike.
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

    /// No byte of one is a byte of the other.
    pub fn is_apart_from<F>(&self, other: &Rows<F>) -> bool {
        !self.footprint.overlaps(&other.footprint)
    }

    /// A byte of one may be one of `bytes`.
    pub fn overlaps(&self, bytes: &Footprint) -> bool {
        self.footprint.overlaps(bytes)
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The address of row `i`, and its length.
    #[inline(always)]
    fn at(&self, i: usize) -> (*mut E, usize) {
        assert!(i < self.rows);
        let offset = if i < self.inner {
            i * self.stride
        } else {
            i / self.inner * self.outer_stride + i % self.inner * self.stride
        };
        // SAFETY: i < rows, so the offset is of an element of the tensor, which is borrowed for 'a.
        let start = unsafe { self.first.add(offset) };
        (start, if i + 1 == self.rows { self.last } else { self.columns })
    }

    /// Row `i`. Nothing may write to it while the slice is in use.
    ///
    /// # Safety
    /// No `&mut` of the row exists.
    #[inline(always)]
    pub unsafe fn row(&self, i: usize) -> &'a [E] {
        let (start, columns) = self.at(i);
        // SAFETY: `at` gives a row of the tensor, which is borrowed for 'a; the caller promises that it has no writer.
        unsafe { std::slice::from_raw_parts(start, columns) }
    }

    /// Row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to the row exists.
    #[inline(always)]
    pub unsafe fn row_mut(&self, i: usize) -> &'a mut [E] {
        let (start, columns) = self.at(i);
        // SAFETY: `at` gives a row of the tensor, which is borrowed for 'a; the caller promises that no other reference
        // to it exists.
        unsafe { std::slice::from_raw_parts_mut(start, columns) }
    }

    /// Columns `columns` of row `i`.
    ///
    /// # Safety
    /// No `&mut` of these columns exists.
    #[inline(always)]
    pub unsafe fn part(&self, i: usize, columns: Range<usize>) -> &'a [E] {
        let (start, all) = self.at(i);
        assert!(columns.start <= columns.end && columns.end <= all);
        // SAFETY: the range is inside the row that `at` gives, of the tensor borrowed for 'a; the caller promises that
        // it has no writer.
        unsafe { std::slice::from_raw_parts(start.add(columns.start), columns.len()) }
    }

    /// Columns `columns` of row `i`, to write to.
    ///
    /// # Safety
    /// No other reference to these columns exists.
    #[inline(always)]
    pub unsafe fn part_mut(&self, i: usize, columns: Range<usize>) -> &'a mut [E] {
        let (start, all) = self.at(i);
        assert!(columns.start <= columns.end && columns.end <= all);
        // SAFETY: the range is inside the row that `at` gives, of the tensor borrowed for 'a; the caller promises that
        // no other reference to it exists.
        unsafe { std::slice::from_raw_parts_mut(start.add(columns.start), columns.len()) }
    }
}

/// Copies a small host tensor, such as a weight that every row needs, and converts it to `E`.
pub fn values<E: Stored>(tensor: &Tensor) -> Vec<E> {
    let vector = tensor.to_kind(E::KIND).contiguous().view([-1]);
    // SAFETY: `vector` is this function's own, or a view of `tensor`, which is borrowed and copied before this returns,
    // so nothing writes to it meanwhile.
    unsafe { Rows::of(&vector).row(0) }.to_vec()
}

/// Calls `kernel(row, inputs, outputs, accums)` for every row, on all threads and compiled for the current [`Isa`].
/// Outputs and `accums` may be read and written.
///
/// # Panics
/// The tensors differ in their rows. An output or accum overlaps another tensor of the call, or itself.
pub fn each_row<E: Element, const I: usize, const O: usize, const W: usize>(
    inputs: [Rows<E>; I],
    outputs: [Rows<E>; O],
    accums: [Rows<E::Accum>; W],
    kernel: impl Fn(usize, [&[E]; I], [&mut [E]; O], [&mut [E::Accum]; W]) + Sync,
) {
    let lengths = inputs.iter().chain(&outputs).map(|r| r.rows).chain(accums.iter().map(|r| r.rows));
    let rows = lengths.clone().next().unwrap_or(0);
    assert!(lengths.into_iter().all(|n| n == rows), "all tensors of a kernel have as many rows");
    let written = || outputs.iter().map(|r| &r.footprint).chain(accums.iter().map(|r| &r.footprint));
    for (i, output) in written().enumerate() {
        assert!(!output.is_repeated(), "rows of an output overlap: {output:?}");
        for other in inputs.iter().map(|r| &r.footprint).chain(written().skip(i + 1)) {
            assert!(!output.overlaps(other), "an output overlaps another tensor: {output:?} and {other:?}");
        }
    }
    let columns: usize = inputs.iter().chain(&outputs).map(|r| r.columns).max().unwrap_or(1);
    let columns = columns.max(accums.iter().map(|r| r.columns).max().unwrap_or(1)).max(1);
    let level = Isa::current();
    pool::ranges(rows, LEAST_ELEMENTS.div_ceil(columns), |range| {
        level.run(
            #[inline(always)]
            || {
                for i in range {
                    // SAFETY: ranges are disjoint, so row i is this thread's alone. As asserted above, an output's rows
                    // overlap neither each other nor another tensor: row i of an output has this one reference, and no
                    // row of an input has a writer.
                    unsafe {
                        let inputs = inputs.each_ref().map(|r| r.row(i));
                        let outputs = outputs.each_ref().map(|r| r.row_mut(i));
                        kernel(i, inputs, outputs, accums.each_ref().map(|r| r.row_mut(i)));
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

    /// Adds 1 + its row's number to every element.
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
    #[should_panic(expected = "an output overlaps another tensor")]
    fn outputs_that_overlap_inputs_are_refused() {
        let x = Tensor::zeros([4, 8], (Kind::Float, Device::Cpu));
        // Side by side in the same rows is fine, one column more is not.
        let copy = |from: &Tensor, to: &Tensor| {
            each_row::<f32, _, _, _>([Rows::of(from)], [Rows::of(to)], [], |_, [x], [y], []| {
                y.copy_from_slice(x)
            });
        };
        copy(&x.narrow(1, 0, 4), &x.narrow(1, 4, 4));
        copy(&x.narrow(1, 0, 4), &x.narrow(1, 3, 4));
    }

    #[test]
    #[should_panic(expected = "rows of an output overlap")]
    fn an_output_that_has_a_row_twice_is_refused() {
        count(Rows::of(&Tensor::zeros([1, 8], (Kind::Float, Device::Cpu)).expand([4, 8], false)));
    }

    #[test]
    #[should_panic(expected = "at most two strides")]
    fn three_strides_are_a_mistake() {
        let tensor = Tensor::zeros([5, 4, 3, 2], (Kind::Float, Device::Cpu));
        Rows::<f32>::of(&tensor.narrow(1, 0, 2).narrow(2, 0, 2));
    }
}
