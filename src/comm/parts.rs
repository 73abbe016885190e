//! The rows of a tensor that an all-to-all sends to each rank, or receives from it.

use super::{CommError, bytes, check};
use std::ops::Range;
use tch::Tensor;

/// Rows of a contiguous tensor `[rows, …]` by rank of a group: the pieces for each rank, or from each rank. Both
/// sides of a transfer list their pieces in the same order. Received pieces must not overlap.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    pub rows: &'a Tensor,
    pub pieces: &'a [Vec<Range<usize>>],
}

const NAME: &str = "all_to_all";

impl<'a> Parts<'a> {
    /// The non-empty pieces of `rank`.
    pub(super) fn of(self, rank: usize) -> impl Iterator<Item = Tensor> + use<'a> {
        let pieces = self.pieces[rank].iter().filter(|piece| !piece.is_empty());
        pieces.map(move |piece| self.rows.narrow(0, piece.start as i64, piece.len() as i64))
    }

    /// Bytes of the pieces of all ranks except `rank`.
    pub(super) fn bytes_of_others(self, rank: usize) -> usize {
        let others = self.pieces.iter().enumerate().filter(|(peer, _)| *peer != rank);
        others.flat_map(|(_, pieces)| pieces).map(Range::len).sum::<usize>() * self.row_bytes()
    }

    /// Length of a row (bytes).
    fn row_bytes(self) -> usize {
        bytes(self.rows) / (self.rows.size()[0] as usize).max(1)
    }

    /// Lengths (rows) of the non-empty pieces of `rank`.
    fn lengths(self, rank: usize) -> Vec<usize> {
        self.pieces[rank].iter().map(Range::len).filter(|&rows| rows > 0).collect()
    }
}

/// Checks the buffers of an all-to-all on rank `rank` of `size`.
///
/// # Errors
/// A buffer has the wrong dtype, is not contiguous, or does not hold its pieces; received pieces overlap; or the pieces
/// that the rank sends to itself do not match those that it receives from itself.
pub(super) fn check_parts(
    group: &str,
    rank: usize,
    size: usize,
    sent: Parts,
    received: Parts,
) -> Result<(), CommError> {
    let (operation, kind) = (NAME, Some(sent.rows.kind()));
    for (what, parts) in [("input", sent), ("output", received)] {
        check(NAME, group, what, parts.rows, kind, bytes(parts.rows))?;
        let (actual, expected) = (parts.pieces.len(), size);
        if actual != expected {
            return Err(CommError::Ranks { operation, group: group.into(), what, actual, expected });
        }
        let (rows, row) = (parts.rows.size()[0] as usize, parts.row_bytes());
        if let Some(outside) = parts.pieces.iter().flatten().find(|piece| piece.end > rows) {
            let (actual, expected) = (rows * row, outside.end * row);
            return Err(CommError::Length { operation, group: group.into(), what, actual, expected });
        }
    }
    let mut all: Vec<_> =
        received.pieces.iter().flatten().filter(|piece| !piece.is_empty()).cloned().collect();
    all.sort_by_key(|piece| piece.start);
    if let Some(pair) = all.windows(2).find(|pair| pair[0].end > pair[1].start) {
        let (group, what) = (group.to_owned(), "output");
        let (first, second) = (pair[0].clone(), pair[1].clone());
        return Err(CommError::Overlap { operation, group, what, first, second });
    }
    let (expected, actual) = (sent.lengths(rank), received.lengths(rank));
    if actual != expected {
        return Err(CommError::Pieces { operation, group: group.into(), what: "own rows", actual, expected });
    }
    Ok(())
}

/// Copies the pieces that `rank` sends to itself.
pub(super) fn copy_own(rank: usize, sent: Parts, received: Parts) {
    received.of(rank).zip(sent.of(rank)).for_each(|(mut to, from)| to.copy_(&from));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn pieces_that_do_not_fit_are_refused() {
        let [sent, received] = [6, 9].map(|rows| Tensor::zeros([rows, 2], (Kind::Float, Device::Cpu)));
        let check =
            |sent: &Tensor, own: &[Vec<Range<usize>>], received: &Tensor, theirs: &[Vec<Range<usize>>]| {
                let (sent, received) =
                    (Parts { rows: sent, pieces: own }, Parts { rows: received, pieces: theirs });
                check_parts("expert", 1, 2, sent, received).map_err(|error| error.to_string())
            };
        let own = [vec![0..1, 1..1, 1..3], vec![3..4, 4..4, 4..6]];
        let theirs = [vec![2..3, 8..8], vec![0..1, 7..9]];
        assert_eq!(check(&sent, &own, &received, &theirs), Ok(()));
        let parts = Parts { rows: &received, pieces: &theirs };
        assert_eq!((parts.bytes_of_others(1), parts.of(1).count()), (8, 2));
        let refused = |received: &Tensor, theirs: &[Vec<Range<usize>>], why: &str| {
            let error = check(&sent, &own, received, theirs).unwrap_err();
            assert_eq!(error, format!("all_to_all over expert: {why}"));
        };
        refused(&received, &theirs[1..], "output has pieces for 1 ranks, expected 2");
        let outside = [vec![8..10, 2..2], theirs[1].clone()];
        refused(&received, &outside, "output has 72 bytes, expected 80");
        refused(&received, &[vec![6..8, 2..2], theirs[1].clone()], "rows 6..8 and 7..9 of output overlap");
        let cut_otherwise = [vec![], vec![0..2, 7..8]];
        refused(&received, &cut_otherwise, "own rows is cut into pieces of [2, 1] rows, expected [1, 2]");
        refused(&received.to_kind(Kind::Half), &theirs, "output holds Half, expected Float");
        let transposed = Tensor::zeros([2, 9], (Kind::Float, Device::Cpu)).tr();
        refused(&transposed, &theirs, "output is not contiguous");
    }
}
