//! Rows of tokens sorted by expert, so that an expert's tokens are one slice, and their sums by token.
//!
//! gather    row i = x of its token
//! combine   y of a token = add + Σ of its rows, summed in fp32
//!
//! Each is the other's backward. Weights are applied before an expert's last matrix, see [`swiglu`](super::swiglu).
//!
//! libtorch's GEMMs on a CPU ([`takes_any_rows`](super::linear::takes_any_rows) is false) get slices padded with rows
//! of zeros ([`Assignment::padded`]). A zero row stays zero through a gated MLP, forward and backward, and adds nothing
//! to a gradient. Without padding nearly every expert of every layer and step would have a GEMM of a new shape, and
//! oneDNN compiles and keeps a kernel for each.

use super::{
    Buffer, accum_kind,
    cpu::{Element, Real, Rows, dispatch, each_row, values},
    cuda,
    linear::{Pattern, RowSegments, sizes},
};
use crate::device::has_kernels;
use tch::{Device, Kind, Tensor};

/// Padded slices have a multiple of so many rows.
const GRAIN: i64 = 32;

/// Rows of a padded slice of `count` rows: a multiple of an eighth of the next power of two, and of 32. From 128 rows
/// up at most a quarter more, a twelfth in the mean. Few different numbers of rows remain: oneDNN keeps megabytes for
/// each.
pub fn padded(count: i64) -> i64 {
    let eighth = (count as u64).next_power_of_two() as i64 / 8;
    (count as u64).next_multiple_of(eighth.max(GRAIN) as u64) as i64
}

/// Token and choice of a padding row.
const PADDING: i64 = -1;

/// Rows of the tokens, sorted by key: an expert, or a pair of an expert and an adapter.
pub struct Assignment {
    /// The token of each row: `[rows]` i64, sorted by key, then by token; or [`PADDING`].
    tokens: Tensor,
    /// The choice of each row, counted over all tokens: `[rows]` i64, or [`PADDING`].
    choices: Tensor,
    /// The row of each choice: `[tokens, k]` i64.
    rows: Tensor,
    segments: RowSegments,
    /// Choices of each key: `[keys]` i64.
    counts: Tensor,
    /// True if there are padding rows.
    is_padded: bool,
}

/// Columns summed at a time.
const COLUMNS: usize = 64;

impl Assignment {
    /// Sorts the rows of `chosen` `[tokens, k]` i64, keys below `keys`: experts, or pairs of an expert and an adapter
    /// of `pattern`, expert-major.
    pub fn new(chosen: &Tensor, keys: usize, pattern: &Pattern) -> Self {
        if chosen.device() == Device::Cpu {
            Self::on_host(chosen, keys, pattern, |count| count)
        } else {
            Self::on_device(chosen, keys, pattern)
        }
    }

    /// The same with [`padded`] slices, for a host whose GEMMs do not [take any number of
    /// rows](super::linear::takes_any_rows).
    pub fn padded(chosen: &Tensor, keys: usize, pattern: &Pattern) -> Self {
        Self::on_host(chosen, keys, pattern, padded)
    }

    /// Sorts by libtorch's operations, so that the host waits for no device.
    fn on_device(chosen: &Tensor, keys: usize, pattern: &Pattern) -> Self {
        let (k, device) = (chosen.size()[1], chosen.device());
        // Short numbers are sorted in fewer passes.
        let key = if keys < i16::MAX as usize { Kind::Int16 } else { Kind::Int64 };
        let (sorted, choices) = chosen.reshape([-1]).to_kind(key).sort_stable(true, 0, false);
        let next = Tensor::arange_start(1, keys as i64 + 1, (key, device));
        let ends = next.searchsorted(&sorted, true, false, "left", None::<Tensor>);
        let counts = sizes(&ends);
        let numbers = Tensor::arange(choices.size()[0], (Kind::Int64, device));
        let rows = choices.empty_like().scatter_(0, &choices, &numbers).view_as(chosen);
        let segments = RowSegments::on_device(&ends, &counts, pattern.clone());
        let tokens = choices.divide_scalar_mode(k, "floor");
        Self { tokens, choices, rows, segments, counts: counts.to_kind(Kind::Int64), is_padded: false }
    }

    /// A key with `count` choices has `rows(count)` rows.
    fn on_host(chosen: &Tensor, keys: usize, pattern: &Pattern, rows: fn(i64) -> i64) -> Self {
        let k = chosen.size()[1];
        let of_choice = values::<i64>(chosen);
        let mut counts = vec![0; keys];
        for &key in &of_choice {
            counts[key as usize] += 1;
        }
        let ends = counts.iter().scan(0, |end, &count: &i64| {
            *end += rows(count);
            Some(*end)
        });
        let offsets: Vec<i64> = std::iter::once(0).chain(ends).collect();
        let mut next = offsets.clone();
        let mut choices = vec![PADDING; offsets[keys] as usize];
        let mut rows = Vec::with_capacity(of_choice.len());
        for (choice, &key) in of_choice.iter().enumerate() {
            let row = &mut next[key as usize];
            choices[*row as usize] = choice as i64;
            rows.push(*row);
            *row += 1;
        }
        let tokens: Vec<i64> =
            choices.iter().map(|&choice| if choice == PADDING { PADDING } else { choice / k }).collect();
        let is_padded = choices.len() > of_choice.len();
        let [tokens, choices, rows, counts] =
            [tokens, choices, rows, counts].map(|values| Tensor::from_slice(&values));
        let rows = rows.view_as(chosen);
        Self {
            tokens,
            choices,
            rows,
            segments: RowSegments::new(offsets, pattern.clone()),
            counts,
            is_padded,
        }
    }

    /// The rows of each key.
    pub fn segments(&self) -> &RowSegments {
        &self.segments
    }

    /// Choices of each key: `[keys]` i64.
    pub fn counts(&self) -> &Tensor {
        &self.counts
    }

    /// All rows.
    pub fn rows(&self) -> i64 {
        self.tokens.size()[0]
    }

    /// Rows `[rows, n]` of x `[tokens, n]`.
    pub fn gather(&self, x: &Tensor) -> Buffer {
        let _span = crate::trace::operation("dispatch.gather");
        let rows = Buffer::empty(&[self.rows(), x.size()[1]], x.kind(), x.device());
        if has_kernels(x) {
            dispatch!(x.kind(), E => self.gather_rows::<E>(x, &rows));
        } else if !cuda::kernels(x).is_some_and(|kernels| kernels.gather_rows(x, &self.tokens, &rows)) {
            rows.shallow_clone().copy_(&self.pick(x, &self.tokens));
        }
        rows
    }

    /// Sums `[tokens, n]` of rows `[rows, n]` by token, plus `add` `[tokens, n]`.
    pub fn combine(&self, rows: &Tensor, add: Option<&Tensor>) -> Buffer {
        let _span = crate::trace::operation("dispatch.combine");
        let y = Buffer::empty(&[self.rows.size()[0], rows.size()[1]], rows.kind(), rows.device());
        if has_kernels(rows) {
            dispatch!(rows.kind(), E => self.combine_rows::<E>(rows, add, &y));
        } else if !cuda::kernels(rows).is_some_and(|kernels| kernels.combine_rows(rows, &self.rows, add, &y))
        {
            self.combine_torch(rows, add, &y);
        }
        y
    }

    /// Values `[rows, 1]` of rows from those of choices `[tokens, k]`.
    pub fn by_row(&self, by_choice: &Tensor) -> Tensor {
        self.pick(&by_choice.reshape([-1, 1]), &self.choices)
    }

    /// Values `[tokens, k]` of choices from those of rows `[rows, 1]`.
    pub fn by_choice(&self, by_row: &Tensor) -> Tensor {
        by_row.reshape([-1]).index_select(0, &self.rows.reshape([-1])).view_as(&self.rows)
    }

    /// Rows `at` of x `[n, columns]`, zeros for [`PADDING`].
    fn pick(&self, x: &Tensor, at: &Tensor) -> Tensor {
        if !self.is_padded {
            return x.index_select(0, at);
        }
        let padding = at.lt(0).unsqueeze(1);
        x.index_select(0, &at.clamp_min(0)).masked_fill_(&padding, 0.0)
    }

    fn gather_rows<E: Element>(&self, x: &Tensor, rows: &Tensor) {
        let (x, at) = (Rows::<E>::of(x), values::<i64>(&self.tokens));
        each_row::<E, _, _, _>(
            [],
            [Rows::of(rows)],
            [],
            #[inline(always)]
            |row, [], [out], []| match usize::try_from(at[row]) {
                // SAFETY: nothing writes to x while `rows`, another tensor, is written.
                Ok(token) => out.copy_from_slice(unsafe { x.row(token) }),
                Err(_) => out.fill(E::narrow(E::Accum::ZERO)),
            },
        );
    }

    fn combine_rows<E: Element>(&self, rows: &Tensor, add: Option<&Tensor>, y: &Tensor) {
        let (rows, at) = (Rows::<E>::of(rows), values::<i64>(&self.rows));
        let k = self.rows.size()[1] as usize;
        let of = |token: usize| &at[token * k..(token + 1) * k];
        match add {
            None => each_row::<E, _, _, _>(
                [],
                [Rows::of(y)],
                [],
                #[inline(always)]
                |token, [], [y], []| sum(&rows, of(token), None, y),
            ),
            Some(add) => each_row::<E, _, _, _>(
                [Rows::of(add)],
                [Rows::of(y)],
                [],
                #[inline(always)]
                |token, [add], [y], []| sum(&rows, of(token), Some(add), y),
            ),
        }
    }

    /// The same in libtorch's operations, for tensors that no kernel takes.
    fn combine_torch(&self, rows: &Tensor, add: Option<&Tensor>, y: &Tensor) {
        let shape = [self.rows.size()[0], self.rows.size()[1], rows.size()[1]];
        let parts = rows.index_select(0, &self.rows.reshape([-1])).view(&shape[..]);
        let sum = parts.sum_dim_intlist(1, false, accum_kind(rows.kind()));
        y.shallow_clone().copy_(&add.map_or_else(|| sum.shallow_clone(), |add| &sum + add));
    }
}

/// y = add + Σ of the rows `at`.
#[inline(always)]
fn sum<E: Element>(rows: &Rows<E>, at: &[i64], add: Option<&[E]>, y: &mut [E]) {
    for first in (0..y.len()).step_by(COLUMNS) {
        let columns = first..y.len().min(first + COLUMNS);
        let mut sums = [E::Accum::ZERO; COLUMNS];
        if let Some(add) = add {
            sums.iter_mut().zip(&add[columns.clone()]).for_each(|(sum, x)| *sum = x.to_accum());
        }
        for &row in at {
            // SAFETY: nothing writes to `rows` while y, another tensor, is written.
            let row = unsafe { rows.part(row as usize, columns.clone()) };
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_accum());
        }
        y[columns].iter_mut().zip(sums).for_each(|(y, sum)| *y = E::narrow(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        linear::one_adapter,
        testing::{KINDS, distance, everywhere, leaf},
    };

    /// Experts of 5 tokens, two each, of which expert 2 has none.
    fn assignment() -> Assignment {
        let chosen = [3i64, 0, 1, 3, 0, 1, 3, 0, 3, 1];
        Assignment::padded(&Tensor::from_slice(&chosen).view([5, 2]), 4, &one_adapter())
    }

    /// A slice of `GRAIN` rows.
    fn slice(of: &[i64]) -> Vec<i64> {
        of.iter().copied().chain(std::iter::repeat(PADDING)).take(GRAIN as usize).collect()
    }

    #[test]
    fn rows_are_sorted_by_expert_then_by_token() {
        let assignment = assignment();
        assert_eq!(values::<i64>(assignment.counts()), [3, 3, 0, 4]);
        assert_eq!(assignment.segments().offsets(), [0, GRAIN, 2 * GRAIN, 2 * GRAIN, 3 * GRAIN]);
        let expected = [slice(&[0, 2, 3]), slice(&[1, 2, 4]), slice(&[0, 1, 3, 4])].concat();
        assert_eq!(values::<i64>(&assignment.tokens), expected);
        let by_choice = Tensor::arange(10, (Kind::Int64, Device::Cpu)).view([5, 2]);
        let by_row = assignment.by_row(&by_choice);
        let zeros = |of: &[i64]| slice(of).into_iter().map(|choice| choice.max(0)).collect::<Vec<_>>();
        let expected = [zeros(&[1, 4, 7]), zeros(&[2, 5, 9]), zeros(&[0, 3, 6, 8])].concat();
        assert_eq!(values::<i64>(&by_row.view([-1])), expected);
        assert_eq!(assignment.by_choice(&by_row), by_choice);
    }

    #[test]
    fn a_device_sorts_as_the_host_does() {
        for (tokens, k, experts) in
            [(5, 2, 4), (1, 1, 1), (0, 3, 5), (40, 3, 7), (300, 8, 128), (9, 2, 40_000)]
        {
            // No token chooses expert 2.
            let of =
                |i: i64| Some((i * i + i / 3) % experts as i64).filter(|&expert| expert != 2).unwrap_or(0);
            let chosen: Vec<i64> = (0..tokens * k).map(of).collect();
            let chosen = Tensor::from_slice(&chosen).view([tokens, k]);
            let host = Assignment::new(&chosen, experts, &one_adapter());
            let device = Assignment::on_device(&chosen, experts, &one_adapter());
            assert_eq!(device.segments().offsets(), host.segments().offsets());
            let all = |a: &Assignment| [&a.tokens, &a.choices, &a.rows, &a.counts].map(Tensor::shallow_clone);
            assert_eq!(all(&device), all(&host), "{tokens} {k} {experts}");
            // Kernels of devices take only this kind.
            assert!(all(&device).iter().all(|tensor| tensor.kind() == Kind::Int64));
            assert!(!host.is_padded && !device.is_padded);
        }
    }

    #[test]
    fn few_numbers_of_rows_are_computed_and_hardly_more_than_needed() {
        assert_eq!([0, 1, 32, 33, 256, 257, 513].map(padded), [0, 32, 32, 64, 256, 320, 640]);
        let distinct: std::collections::BTreeSet<i64> = (0..4096).map(padded).collect();
        assert!(distinct.len() < 30, "{}", distinct.len());
        assert!((128..9999).all(|count| padded(count) >= count && padded(count) * 4 <= count * 5));
    }

    #[test]
    fn no_token_is_no_row() {
        let none = Assignment::padded(&Tensor::zeros([0, 2], (Kind::Int64, Device::Cpu)), 3, &one_adapter());
        assert_eq!(none.segments().offsets(), [0; 4]);
        let x = leaf(&[0, 7]).detach();
        assert_eq!(none.gather(&x).size(), [0, 7]);
        assert_eq!(none.combine(&none.gather(&x), Some(&x)).size(), [0, 7]);
        assert_eq!(none.by_row(&leaf(&[0, 2]).detach()).size(), [0, 1]);
    }

    #[test]
    fn each_is_the_others_adjoint() {
        let kernels = cuda::on_host::kernels();
        let assignment = assignment();
        let count = 3 * GRAIN;
        // The tokens' rows as a matrix: gather is its product with x, combine that of its transpose.
        let matrix = Tensor::zeros([count, 5], (Kind::Double, Device::Cpu));
        for (row, token) in values::<i64>(&assignment.tokens).into_iter().enumerate().filter(|(_, t)| *t >= 0)
        {
            let _ = matrix.get(row as i64).get(token).fill_(1.0);
        }
        for (kind, tolerance) in KINDS {
            for n in [1i64, COLUMNS as i64, 200] {
                let [x, rows, add] =
                    [[5, n], [count, n], [5, n]].map(|shape| leaf(&shape).detach().to_kind(kind));
                let exact = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                let gathered = matrix.matmul(&exact(&x));
                let sums = matrix.tr().matmul(&exact(&rows));
                everywhere(|| {
                    assert_eq!(distance(&assignment.gather(&x), &gathered), 0.0);
                    assert!(distance(&assignment.combine(&rows, None), &sums) < 8.0 * tolerance);
                    let plus = assignment.combine(&rows, Some(&add));
                    assert!(distance(&plus, &(&sums + exact(&add))) < 8.0 * tolerance);
                });
                assert_eq!(distance(&assignment.pick(&x, &assignment.tokens), &gathered), 0.0);
                let y = add.empty_like();
                assignment.combine_torch(&rows, Some(&add), &y);
                assert!(distance(&y, &(&sums + exact(&add))) < 8.0 * tolerance);

                let out = rows.empty_like();
                let taken = kernels.gather_rows(&x, &assignment.tokens, &out);
                assert_eq!(taken, kind != Kind::Double && n % 8 == 0);
                if taken {
                    assert_eq!(distance(&out, &gathered), 0.0);
                    assert!(kernels.combine_rows(&rows, &assignment.rows, None, &y));
                    assert!(distance(&y, &sums) < 8.0 * tolerance);
                    assert!(kernels.combine_rows(&rows, &assignment.rows, Some(&add), &y));
                    assert!(distance(&y, &(&sums + exact(&add))) < 8.0 * tolerance);
                }
            }
        }
    }
}
