//! The causal language-model loss.

use super::{LogProbs, LossValues, TokenLoss};
use tch::Tensor;

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

/// L = −scale·Σ w·log p over all targets, ∂L/∂log p = −scale·w; weights of any sign.
pub(super) struct Weighted {
    /// `[tokens, K]` fp64
    pub weights: Tensor,
    /// As that of [`CrossEntropy`].
    pub scale: f64,
}

impl TokenLoss for Weighted {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LogProbs { values, present, .. } = log_probs;
        let weights = self.weights.to_kind(values.kind()).where_scalarother(present, 0.0);
        LossValues {
            values: -(&weights * values).sum_dim_intlist(1, false, None),
            coefficients: weights * -self.scale,
        }
    }
}
