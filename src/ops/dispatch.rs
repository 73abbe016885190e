//! The way of tokens to their experts and back: rows of one tensor, sorted by expert, so that an expert's tokens are one
//! slice.
//!
//! gather    row i = x of its token
//! combine   y of a token = add + Σ of its rows, summed in fp32
//!
//! Each is the other's backward. Weights are applied before an expert's last matrix, see [`swiglu`](super::swiglu).

use super::{
    Buffer,
    cpu::{Element, Real, Rows, dispatch, each_row, values},
    wide,
};
use tch::{Device, Kind, Tensor};

/// Which row is which token's.
pub struct Assignment {
    /// The token of each row: `[rows]` i64, by expert, then by token.
    tokens: Tensor,
    /// Which of all tokens' choices each row is: `[rows]` i64.
    choices: Tensor,
    /// The row of each choice: `[tokens, k]` i64.
    rows: Tensor,
    /// Expert e has rows `borders[e]..borders[e + 1]`.
    borders: Vec<i64>,
}

/// Columns that are summed at a time.
const COLUMNS: usize = 64;

impl Assignment {
    /// Of `chosen` `[tokens, k]` i64, each an expert below `experts`.
    pub fn new(chosen: &Tensor, experts: usize) -> Self {
        let k = chosen.size()[1];
        let flat = chosen.reshape([-1]);
        let choices = flat.argsort_stable(true, 0, false);
        let numbers = Tensor::arange(choices.size()[0], (Kind::Int64, chosen.device()));
        let rows = choices.empty_like().index_copy(0, &choices, &numbers).view_as(chosen);
        let counts = flat.bincount(None::<&Tensor>, experts as i64);
        let ends = values::<i64>(&counts.cumsum(0, Kind::Int64).to_device(Device::Cpu));
        let borders = std::iter::once(0).chain(ends).collect();
        let tokens = choices.divide_scalar_mode(k, "floor");
        Self { tokens, choices, rows, borders }
    }

    /// Where each expert's rows begin, and the end: `[experts + 1]`.
    pub fn borders(&self) -> &[i64] {
        &self.borders
    }

    /// `[rows, n]` from x `[tokens, n]`.
    pub fn gather(&self, x: &Tensor) -> Buffer {
        let _span = crate::trace::operation("dispatch.gather");
        let rows = Buffer::empty(&[self.tokens.size()[0], x.size()[1]], x.kind(), x.device());
        let _ = x.index_select_out(&rows, 0, &self.tokens);
        rows
    }

    /// `[tokens, n]` from `[rows, n]`, plus `add` `[tokens, n]`.
    pub fn combine(&self, rows: &Tensor, add: Option<&Tensor>) -> Buffer {
        let _span = crate::trace::operation("dispatch.combine");
        let y = Buffer::empty(&[self.rows.size()[0], rows.size()[1]], rows.kind(), rows.device());
        if rows.device() != Device::Cpu {
            self.combine_torch(rows, add, &y);
        } else {
            dispatch!(rows.kind(), E => self.combine_rows::<E>(rows, add, &y));
        }
        y
    }

    /// `[rows, 1]` from what each choice has, `[tokens, k]`.
    pub fn by_row(&self, by_choice: &Tensor) -> Tensor {
        by_choice.reshape([-1]).index_select(0, &self.choices).unsqueeze(1)
    }

    /// `[tokens, k]` from what each row has, `[rows, 1]`.
    pub fn by_choice(&self, by_row: &Tensor) -> Tensor {
        by_row.reshape([-1]).index_select(0, &self.rows.reshape([-1])).view_as(&self.rows)
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

    /// The same in libtorch's operations, for devices without kernels.
    fn combine_torch(&self, rows: &Tensor, add: Option<&Tensor>, y: &Tensor) {
        let n = rows.size()[1];
        let parts = rows.index_select(0, &self.rows.reshape([-1])).view([self.rows.size()[0], -1, n]);
        let sum = parts.sum_dim_intlist(1, false, wide(rows.kind()));
        y.shallow_clone().copy_(&add.map_or_else(|| sum.shallow_clone(), |add| &sum + add));
    }
}

/// y = add + Σ of the rows `at`.
#[inline(always)]
fn sum<E: Element>(rows: &Rows<E>, at: &[i64], add: Option<&[E]>, y: &mut [E]) {
    for first in (0..y.len()).step_by(COLUMNS) {
        let columns = first..y.len().min(first + COLUMNS);
        let mut sums = [E::Wide::ZERO; COLUMNS];
        if let Some(add) = add {
            sums.iter_mut().zip(&add[columns.clone()]).for_each(|(sum, x)| *sum = x.wide());
        }
        for &row in at {
            // SAFETY: nothing writes to `rows` while y, another tensor, is written.
            let row = unsafe { rows.part(row as usize, columns.clone()) };
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.wide());
        }
        y[columns].iter_mut().zip(sums).for_each(|(y, sum)| *y = E::narrow(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, distance, everywhere, leaf};

    /// Experts of 5 tokens, two each, of which expert 2 has none.
    fn assignment() -> Assignment {
        let chosen = [3i64, 0, 1, 3, 0, 1, 3, 0, 3, 1];
        Assignment::new(&Tensor::from_slice(&chosen).view([5, 2]), 4)
    }

    #[test]
    fn rows_are_sorted_by_expert_then_by_token() {
        let assignment = assignment();
        assert_eq!(assignment.borders(), [0, 3, 6, 6, 10]);
        assert_eq!(values::<i64>(&assignment.tokens), [0, 2, 3, 1, 2, 4, 0, 1, 3, 4]);
        let by_choice = Tensor::arange(10, (Kind::Int64, Device::Cpu)).view([5, 2]);
        let by_row = assignment.by_row(&by_choice);
        assert_eq!(values::<i64>(&by_row.view([-1])), [1, 4, 7, 2, 5, 9, 0, 3, 6, 8]);
        assert_eq!(assignment.by_choice(&by_row), by_choice);
    }

    #[test]
    fn no_token_is_no_row() {
        let none = Assignment::new(&Tensor::zeros([0, 2], (Kind::Int64, Device::Cpu)), 3);
        assert_eq!(none.borders(), [0; 4]);
        let x = leaf(&[0, 7]).detach();
        assert_eq!(none.gather(&x).size(), [0, 7]);
        assert_eq!(none.combine(&none.gather(&x), Some(&x)).size(), [0, 7]);
    }

    #[test]
    fn each_is_the_others_adjoint() {
        let assignment = assignment();
        for (kind, tolerance) in KINDS {
            for n in [1i64, COLUMNS as i64, 200] {
                let [x, rows, add] =
                    [[5, n], [10, n], [5, n]].map(|shape| leaf(&shape).detach().to_kind(kind));
                let [exact_rows, exact_add] = [&rows, &add].map(|tensor| tensor.to_kind(Kind::Double));
                let sums =
                    exact_rows.zeros_like().narrow(0, 0, 5).index_add(0, &assignment.tokens, &exact_rows);
                everywhere(|| {
                    assert_eq!(*assignment.gather(&x), x.index_select(0, &assignment.tokens));
                    assert!(distance(&assignment.combine(&rows, None), &sums) < 8.0 * tolerance);
                    let plus = assignment.combine(&rows, Some(&add));
                    assert!(distance(&plus, &(&sums + &exact_add)) < 8.0 * tolerance);
                });
                let y = add.empty_like();
                assignment.combine_torch(&rows, Some(&add), &y);
                assert!(distance(&y, &(&sums + &exact_add)) < 8.0 * tolerance);
            }
        }
    }
}
