//! Losses over the log-probabilities of a micro-batch, and the one pass over the head that gives them.
//!
//! [`HeadPass`] takes hidden states `[tokens, hidden]` and [`Targets`], up to K of them a token. It sees each chunk
//! of the head once and then gives [`LogProbs`] `[tokens, K]`. A [`TokenLoss`] turns them into values and into
//! coefficients c = ∂L/∂log p. The pass turns the coefficients into the gradient of the hidden states, without the
//! head: for the head rows w_v, targets t with coefficients c_t and C = Σ_t c_t,
//!
//! dx = Σ_t c_t·w_t − C·Σ_v p_v·w_v
//!
//! is linear in c, and Σ_v p_v·w_v is known when the last chunk is. So a loss over whole sequences costs no second
//! pass. [`crate::ops::cross_entropy`] has the form of this sum that loses no digits.
//!
//! A loss is pure: it knows no model, no ranks and no files. [`NamedLoss`] makes one from its name, its parameters and
//! inputs by token. Adding one is its formula in `policy.rs`, and its name, parameters and inputs in `formula.rs`.
//! [`Pairs`] is a loss over pairs of answers, which [`Preference`] names.

mod cross_entropy;
mod error;
mod formula;
mod head;
mod inputs;
mod named;
mod params;
mod policy;
mod preference;
mod report;
mod segments;
mod sequence;
mod targets;
mod top;

pub use cross_entropy::CrossEntropy;
pub use error::LossError;
pub use head::{HOST_ROWS, HeadPass};
pub use inputs::{Absent, Input, Sequence};
pub use named::NamedLoss;
pub use preference::{PAIR_LOSSES, Pairs, Preference, Rewards};
pub use segments::BySegment;
pub use targets::Targets;
pub use top::TopPass;

pub use crate::config::Param;

#[cfg(test)]
mod tests;

use tch::Tensor;

/// Log-probabilities of a micro-batch's targets.
pub struct LogProbs<'a> {
    /// `[tokens, K]` fp32 (fp64 for fp64 hidden states): log p of each target under the model, 0 where absent.
    pub values: Tensor,
    /// `[tokens, K]` bool: false where a target is absent.
    pub present: Tensor,
    /// Borders of the micro-batch's sequences: sequence i has the tokens `sequences[i]..sequences[i + 1]`. There is one
    /// border more than sequences, the first is 0, the last is the number of tokens.
    pub sequences: &'a [usize],
}

/// The result of a [`TokenLoss`].
pub struct LossValues {
    /// `[tokens]` in the kind of the log-probabilities: values that add up to the loss. A loss over sequences may put
    /// the value of a sequence on any token of it.
    pub values: Tensor,
    /// `[tokens, K]` in the same kind: ∂L/∂log p of each target, where L is the loss times the factor that the loss
    /// was made with. Values where a target is absent are ignored.
    pub coefficients: Tensor,
}

/// A loss of a micro-batch as a function of its log-probabilities.
pub trait TokenLoss {
    /// Values and coefficients. Called without autograd, on the device of the log-probabilities, and on ranks without a
    /// token too.
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues;

    /// True if the loss compares log-probabilities with those of a sampler, which should be equal before the first
    /// update.
    fn is_policy(&self) -> bool {
        false
    }
}
