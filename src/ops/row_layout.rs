//! Where the rows of a tensor are in its memory.

/// Rows of dense columns, as kernels on any device take them: at most two strides, as in `[tokens, heads, dim]`, some
/// heads of a wider tensor. Strides count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    pub rows: usize,
    pub columns: usize,
    /// From a row to the next one.
    pub stride: usize,
    /// After so many rows `outer_stride` counts from the first of them: all rows where there is one stride.
    pub inner: usize,
    pub outer_stride: usize,
}

impl RowLayout {
    /// Of a tensor `[..., columns]`, a vector being one row. `None` where columns are not dense or strides are more.
    pub fn of(size: &[i64], strides: &[i64]) -> Option<Self> {
        let columns = size.last().map_or(1, |&n| n as usize);
        if columns > 1 && strides.last() != Some(&1) {
            return None;
        }
        let outer = size.len().saturating_sub(1);
        let rows: usize = size[..outer].iter().map(|&n| n as usize).product();
        // (rows, stride), the innermost first; dimensions that are one stride become one.
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
