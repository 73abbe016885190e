//! The layout of a tensor's rows in memory, for kernels of every device, and the bytes that they take.

/// Rows of dense columns with at most two strides, as in `[tokens, heads, dim]`, some heads of a wider tensor. Strides
/// count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    pub rows: usize,
    pub columns: usize,
    /// From a row to the next one.
    pub stride: usize,
    /// Rows that `stride` separates; the next as many start at `outer_stride`. All rows where there is one stride.
    pub inner: usize,
    pub outer_stride: usize,
}

impl RowLayout {
    /// The layout of a tensor `[..., columns]`; a vector is one row. `None` where columns are not dense or there are
    /// more than two strides.
    pub fn of(size: &[i64], strides: &[i64]) -> Option<Self> {
        let columns = size.last().map_or(1, |&n| n as usize);
        if columns > 1 && strides.last() != Some(&1) {
            return None;
        }
        let outer = size.len().saturating_sub(1);
        let rows: usize = size[..outer].iter().map(|&n| n as usize).product();
        // (rows, stride), the innermost first. Dimensions that one stride covers are merged.
        let mut levels: Vec<(usize, usize)> = Vec::new();
        for (n, stride) in (0..outer).rev().map(|i| (size[i] as usize, strides[i] as usize)) {
            match levels.last_mut() {
                _ if n == 1 => {}
                Some((inner, inner_stride)) if stride == *inner * *inner_stride => *inner *= n,
                _ => levels.push((n, stride)),
            }
        }
        let (inner, stride) = levels.first().copied().unwrap_or((rows, columns));
        let outer_stride = levels.get(1).map_or(0, |&(_, stride)| stride);
        (rows == 0 || levels.len() <= 2).then_some(Self { rows, columns, stride, inner, outer_stride })
    }

    /// The bytes of the rows whose first element, of `size` bytes, is at `address`.
    pub fn footprint(&self, address: usize, size: usize) -> Footprint {
        if self.rows == 0 || self.columns == 0 {
            return Footprint::default();
        }
        let outer = self.rows / self.inner;
        // The smaller stride is the inner one, also of a transposed view.
        let mut levels = [(self.inner, self.stride), (outer, self.outer_stride)];
        if outer == 1 {
            levels = [(1, self.columns), (self.inner, self.stride)];
        } else if self.stride > self.outer_stride {
            levels.swap(0, 1);
        }
        let [(inner, stride), (runs, period)] = levels;
        Footprint {
            first: address,
            runs,
            period: period * size,
            bytes: ((inner - 1) * stride + self.columns) * size,
            is_repeated: inner > 1 && stride < self.columns,
        }
    }
}

/// The bytes that rows take in memory: `runs` of `bytes` each, `period` bytes from the start of one to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    first: usize,
    runs: usize,
    period: usize,
    bytes: usize,
    /// True where rows inside a run overlap.
    is_repeated: bool,
}

impl Footprint {
    /// True where a byte may belong to two rows of the same tensor.
    pub fn is_repeated(&self) -> bool {
        self.is_repeated || self.runs > 1 && self.period < self.bytes
    }

    /// False only where the two share no byte: they lie apart, or side by side in rows of one period.
    pub fn overlaps(&self, other: &Self) -> bool {
        if self.runs == 0 || other.runs == 0 {
            return false;
        }
        let end = |f: &Self| f.first + (f.runs - 1) * f.period + f.bytes;
        if end(self) <= other.first || end(other) <= self.first {
            return false;
        }
        if self.period != other.period || self.period == 0 {
            return true;
        }
        let after = (other.first as isize - self.first as isize).rem_euclid(self.period as isize) as usize;
        after < self.bytes || after + other.bytes > self.period
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dimensions_of_one_stride_become_one() {
        let of = |size: &[i64], strides: &[i64]| {
            RowLayout::of(size, strides).map(|l| (l.rows, l.columns, l.stride, l.inner, l.outer_stride))
        };
        assert_eq!(of(&[5], &[1]), Some((1, 5, 5, 1, 0)));
        assert_eq!(of(&[4, 3, 5], &[15, 5, 1]), Some((12, 5, 5, 12, 0)));
        // Two of four heads.
        assert_eq!(of(&[7, 2, 8], &[32, 8, 1]), Some((14, 8, 8, 2, 32)));
        assert_eq!(of(&[0, 8], &[8, 1]), Some((0, 8, 8, 0, 0)));
        // Columns that are not dense, and a third stride.
        assert_eq!(of(&[4, 5], &[5, 2]), None);
        assert_eq!(of(&[2, 3, 4, 5], &[500, 100, 10, 1]), None);
    }

    /// Every element's bytes, one by one.
    fn bytes(address: usize, size: &[i64; 3], strides: &[i64; 3], element: usize) -> Vec<usize> {
        let mut all = Vec::new();
        for i in 0..size[0] {
            for j in 0..size[1] {
                for k in 0..size[2] {
                    let offset = i * strides[0] + j * strides[1] + k * strides[2];
                    all.extend((0..element).map(|byte| address + offset as usize * element + byte));
                }
            }
        }
        all
    }

    proptest! {
        #[test]
        fn footprints_share_a_byte_where_elements_do(
            rows in 0i64..4, heads in 0i64..4, columns in 0i64..4,
            strides in prop::array::uniform2(0i64..24), starts in prop::array::uniform2(0usize..24),
            other_columns in 0i64..4, wide in any::<bool>(),
        ) {
            let strides = [strides[0], strides[1], 1];
            let sizes = [[rows, heads, columns], [rows, heads, other_columns]];
            let element = if wide { 4 } else { 2 };
            let of = |i: usize| {
                let layout = RowLayout::of(&sizes[i], &strides).unwrap();
                (layout.footprint(starts[i] * 2, element), bytes(starts[i] * 2, &sizes[i], &strides, element))
            };
            let ((a, a_bytes), (b, b_bytes)) = (of(0), of(1));
            let shared = a_bytes.iter().any(|byte| b_bytes.contains(byte));
            prop_assert!(a.overlaps(&b) || !shared, "{a:?} {b:?}");
            prop_assert_eq!(a.overlaps(&b), b.overlaps(&a));
            let distinct: std::collections::HashSet<_> = a_bytes.iter().collect();
            prop_assert!(a.is_repeated() || distinct.len() == a_bytes.len(), "{a:?}");
        }
    }

    #[test]
    fn columns_of_one_tensor_lie_apart() {
        // Three of eight heads, in rows of 8 · 16 numbers of two bytes, from the address 1000 on.
        let heads = |first: usize, n: i64| {
            RowLayout::of(&[7, n, 16], &[128, 16, 1]).unwrap().footprint(1000 + first * 32, 2)
        };
        assert!(!heads(0, 3).overlaps(&heads(3, 5)) && !heads(3, 5).overlaps(&heads(0, 3)));
        assert!(heads(0, 4).overlaps(&heads(3, 5)));
        assert!(!heads(0, 3).is_repeated());
        // A vector as each of some rows.
        let repeated = RowLayout::of(&[7, 16], &[0, 1]).unwrap().footprint(1000, 2);
        assert!(
            repeated.is_repeated() && !repeated.overlaps(&heads(1, 2)) && repeated.overlaps(&heads(0, 2))
        );
        // Rows of heads, transposed: the runs interleave, but no two rows share a byte.
        let transposed = RowLayout::of(&[8, 7, 16], &[16, 128, 1]).unwrap().footprint(1000, 2);
        assert!(!transposed.is_repeated());
    }
}
