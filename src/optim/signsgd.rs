//! SignSGD (Bernstein et al., 2018) without momentum, as xorl's `signsgd`: p ← p − lr·wd·p − lr·sign(g), with the sign
//! of the gradient that is reduced over all ranks. It has no state.

use super::{ElementRule, Elements, Number, Update};
use tch::Tensor;

/// Descent along the sign of the gradient, with decoupled weight decay. Clipping does not change its steps.
pub(super) struct SignSgd {
    pub weight_decay: f64,
}

impl ElementRule for SignSgd {
    fn state_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn numbers(&self) -> Vec<Number> {
        vec![Number::new("weight_decay", self.weight_decay)]
    }

    fn apply(&self, elements: &Elements, update: &Update) {
        let [mut master, mut compute] = [&elements.master, &elements.compute].map(Tensor::shallow_clone);
        // The factor of a gradient that counts 0 times, or not a number, has to show.
        let sign = (&elements.gradient * update.coefficient).sign();
        let _ = master.g_mul_scalar_(1.0 - update.lr * self.weight_decay);
        let _ = master.g_sub_(&(sign * update.lr));
        compute.copy_(&master);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::follows;
    use crate::config::Optimizer;

    #[test]
    fn signsgd_follows_its_formula() {
        follows(Optimizer::Signsgd, |gradient, p, weight_decay| {
            let sign = if gradient == 0.0 { 0.0 } else { f64::from(gradient.signum()) };
            0.01 * (weight_decay * p + sign)
        });
    }
}
