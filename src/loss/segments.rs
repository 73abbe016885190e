//! Losses of several sessions in one micro-batch: each over its own rows.

use super::{LogProbs, LossValues, TokenLoss};
use std::ops::Range;
use tch::Tensor;

/// A loss for each segment of neighbouring rows. A segment begins and ends with a sequence.
pub struct BySegment<'a> {
    segments: Vec<(Range<usize>, &'a dyn TokenLoss)>,
}

impl<'a> BySegment<'a> {
    /// Losses of `segments` `(rows, loss)`, in order, which cover all rows of the micro-batch.
    pub fn new(segments: Vec<(Range<usize>, &'a dyn TokenLoss)>) -> Self {
        debug_assert!(segments.windows(2).all(|pair| pair[0].0.end == pair[1].0.start));
        Self { segments }
    }
}

impl TokenLoss for BySegment<'_> {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LogProbs { values, present, sequences } = log_probs;
        let (mut of_values, mut of_coefficients) = (Vec::new(), Vec::new());
        for (rows, loss) in &self.segments {
            let part = |all: &Tensor| all.narrow(0, rows.start as i64, rows.len() as i64);
            let inside = |border: &&usize| (rows.start..=rows.end).contains(border);
            let sequences: Vec<usize> =
                sequences.iter().filter(inside).map(|border| border - rows.start).collect();
            let own = LogProbs { values: part(values), present: part(present), sequences: &sequences };
            let LossValues { values, coefficients } = loss.evaluate(&own);
            of_values.push(values);
            of_coefficients.push(coefficients);
        }
        if self.segments.is_empty() {
            return LossValues {
                values: values.zeros_like().sum_dim_intlist(1, false, None),
                coefficients: values.zeros_like(),
            };
        }
        LossValues { values: Tensor::cat(&of_values, 0), coefficients: Tensor::cat(&of_coefficients, 0) }
    }

    fn is_policy(&self) -> bool {
        self.segments.iter().any(|(_, loss)| loss.is_policy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{loss::CrossEntropy, ops::testing::leaf};
    use tch::Kind;

    /// Sums log-probabilities by sequence, on the first token of each.
    struct BySequence;

    impl TokenLoss for BySequence {
        fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
            let values = log_probs.values.sum_dim_intlist(1, false, None).zeros_like();
            for pair in log_probs.sequences.windows(2).filter(|pair| pair[0] < pair[1]) {
                let own = log_probs.values.narrow(0, pair[0] as i64, (pair[1] - pair[0]) as i64);
                values.get(pair[0] as i64).copy_(&own.sum(None));
            }
            LossValues { values, coefficients: log_probs.values.ones_like() }
        }
    }

    #[test]
    fn each_segment_has_its_own_loss_and_sequences() {
        let values = -leaf(&[6, 1]).detach().abs();
        let present = Tensor::from_slice(&[true, false, true, true, true, false]).view([6, 1]);
        let values = values.where_self(&present, &values.zeros_like());
        let log_probs = LogProbs { values: values.shallow_clone(), present, sequences: &[0, 2, 4, 5, 6] };
        let scaled = CrossEntropy { scale: 0.5 };
        let loss = BySegment::new(vec![(0..2, &scaled), (2..5, &BySequence), (5..6, &scaled)]);
        let found = loss.evaluate(&log_probs);
        let number = |tensor: &Tensor, i: i64| tensor.view([-1]).double_value(&[i]);
        let expected =
            [-number(&values, 0), 0.0, number(&values, 2) + number(&values, 3), 0.0, number(&values, 4), 0.0];
        let expected = Tensor::from_slice(&expected);
        assert!((found.values - expected).abs().max().double_value(&[]) < 1e-15);
        let coefficients = Tensor::from_slice(&[-0.5, 0.0, 1.0, 1.0, 1.0, 0.0]).view([6, 1]);
        assert_eq!(found.coefficients.to_kind(Kind::Double).abs(), coefficients.abs());
        let none =
            LogProbs { values: values.narrow(0, 0, 0), present: values.narrow(0, 0, 0), sequences: &[0] };
        assert_eq!(BySegment::new(vec![]).evaluate(&none).values.size(), [0]);
    }
}
