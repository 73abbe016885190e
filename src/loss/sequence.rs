//! Ratios of whole sequences.
//!
//! s = exp(Σ m·(log p − log q) ÷ Σ m) over the targets of a sequence with mask m. Each target has the ratio
//! s_t = sg(s)·p/sg(p): the value of s, with ∂s_t/∂log p = s for its own log p alone (GSPO-token, Zheng et al., 2025).

use super::policy::Target;

/// log s of the targets `(mask, target)` of a sequence; 0 where no mask has a value.
pub(super) fn log_ratio(targets: impl Iterator<Item = (f64, Target)>) -> f64 {
    let (mut sum, mut weight) = (0.0, 0.0);
    for (mask, target) in targets.filter(|&(mask, _)| mask != 0.0) {
        sum += mask * (target.log_p - target.old);
        weight += mask;
    }
    if weight == 0.0 { 0.0 } else { sum / weight }
}
