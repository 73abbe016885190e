//! Stochastic gradient descent without momentum: p ← p − lr·(g + wd·p).

use super::{ElementRule, Elements, Number, Update};
use tch::Tensor;

/// Gradient descent with weight decay in the gradient, as torch's SGD has it.
pub(super) struct Sgd {
    pub weight_decay: f64,
}

impl ElementRule for Sgd {
    fn state_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn numbers(&self) -> Vec<Number> {
        vec![Number::new("weight_decay", self.weight_decay)]
    }

    fn apply(&self, elements: &Elements, update: &Update) {
        let [mut master, mut compute] = [&elements.master, &elements.compute].map(Tensor::shallow_clone);
        let gradient = &elements.gradient * update.coefficient;
        let _ = master.g_sub_(&((gradient + &master * self.weight_decay) * update.lr));
        compute.copy_(&master);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Optimizer, Settings,
        testing::{Adapter, GRADIENTS, START, follows},
    };
    use crate::config::{self, TrainArgs};

    #[test]
    fn sgd_follows_its_formula() {
        follows(config::Optimizer::Sgd, |gradient, p, weight_decay| {
            0.01 * (f64::from(gradient) * 0.5 + weight_decay * p)
        });
    }

    #[test]
    fn what_would_not_stay_finite_is_known_before() {
        let train =
            TrainArgs { optimizer: config::Optimizer::Sgd, weight_decay: 0.1, ..TrainArgs::default() };
        let mut adapter = Adapter::new();
        let mut optimizer = Optimizer::new(&Settings::from(&train), adapter.pieces());
        adapter.update(&mut optimizer, GRADIENTS[0], 0.0, 1.0);
        for (lr, stays) in [(0.01, true), (1e38, true), (1e39, false), (f64::NAN, false)] {
            assert_eq!(optimizer.stays_finite(adapter.pieces(), lr, 1.0).unwrap(), stays, "{lr}");
        }
        adapter.equals(START.map(f64::from), "asking");
        assert_eq!(optimizer.updates(), 1);
    }
}
