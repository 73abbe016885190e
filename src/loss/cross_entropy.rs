//! The causal language-model loss.

use super::{LogProbs, LossValues, TokenLoss};

/// L = −scale·Σ log p over all targets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Factor of the gradient, 1 ÷ valid tokens of the whole step; the values are without it.
    pub scale: f64,
}

impl TokenLoss for CrossEntropy {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LogProbs { values, present, .. } = log_probs;
        LossValues {
            values: -values.sum_dim_intlist(1, false, None),
            coefficients: present.to_kind(values.kind()) * -self.scale,
        }
    }
}
