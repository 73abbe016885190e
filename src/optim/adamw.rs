//! AdamW, with first and second moment in fp32. Formula and kernels: [`ops::adamw`](crate::ops::adamw).

use super::{ElementRule, Elements, Number, Update};
use crate::ops::adamw;

pub(super) const EXP_AVG: &str = "exp_avg";
pub(super) const EXP_AVG_SQ: &str = "exp_avg_sq";

/// AdamW with decoupled weight decay.
pub(super) struct AdamW {
    pub weight_decay: f64,
    pub betas: (f64, f64),
    pub eps: f64,
}

impl ElementRule for AdamW {
    fn state_names(&self) -> &'static [&'static str] {
        &[EXP_AVG, EXP_AVG_SQ]
    }

    fn numbers(&self) -> Vec<Number> {
        numbers(self.betas, self.eps, self.weight_decay).into()
    }

    fn apply(&self, elements: &Elements, update: &Update) {
        self.update(update).apply(&elements.gradient, &tensors(elements));
    }

    fn stays_finite(&self, elements: &Elements, update: &Update) -> bool {
        self.update(update).stays_finite(&elements.gradient, &tensors(elements))
    }
}

impl AdamW {
    fn update(&self, update: &Update) -> adamw::Update {
        let &Self { weight_decay, betas, eps } = self;
        let &Update { lr, coefficient, count, .. } = update;
        adamw::Update { lr, weight_decay, betas, eps, count, coefficient }
    }
}

/// The numbers of a rule with the moments of AdamW.
pub(super) fn numbers(betas: (f64, f64), eps: f64, weight_decay: f64) -> [Number; 4] {
    // Bias correction takes it that all updates so far had the same betas.
    let shaping = |field, value| Number { field, value, shapes_state: true };
    [
        shaping("adam_beta1", betas.0),
        shaping("adam_beta2", betas.1),
        Number::new("adam_epsilon", eps),
        Number::new("weight_decay", weight_decay),
    ]
}

fn tensors(elements: &Elements) -> adamw::State<'_> {
    let Elements { master, compute, state, .. } = elements;
    adamw::State { master, exp_avg: &state[0], exp_avg_sq: &state[1], compute }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Optimizer, Settings,
        testing::{Adapter, GRADIENTS, START},
    };
    use crate::config::TrainArgs;

    #[test]
    fn adamw_follows_its_formula_for_every_setting() {
        for (beta1, beta2, eps, weight_decay) in
            [(0.9, 0.95, 1e-8, 0.1), (0.9, 0.999, 1e-6, 0.0), (0.0, 0.5, 1e-3, 0.3)]
        {
            let train = TrainArgs {
                adam_beta1: beta1,
                adam_beta2: beta2,
                adam_epsilon: eps,
                weight_decay,
                ..TrainArgs::default()
            };
            let mut adapter = Adapter::new();
            let mut optimizer = Optimizer::new(&Settings::from(&train), adapter.pieces());
            let (mut p, mut m, mut v) = (START.map(f64::from), [0.0f64; 3], [0.0f64; 3]);
            for (t, gradient) in (1..).zip(GRADIENTS) {
                adapter.update(&mut optimizer, gradient, 0.01, 0.5);
                for i in 0..3 {
                    let g = f64::from(gradient[i]) * 0.5;
                    m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                    v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                    p[i] -= 0.01 * weight_decay * p[i];
                    let (m_hat, v_hat) = (m[i] / (1.0 - beta1.powi(t)), v[i] / (1.0 - beta2.powi(t)));
                    p[i] -= 0.01 * m_hat / (v_hat.sqrt() + eps);
                }
            }
            adapter.equals(p, &format!("betas {beta1} {beta2}, eps {eps}"));
            assert_eq!(optimizer.updates(), GRADIENTS.len() as u64);
        }
    }

    #[test]
    fn other_numbers_keep_the_state() {
        let settings = |beta1| Settings::from(&TrainArgs { adam_beta1: beta1, ..TrainArgs::default() });
        let mut adapter = Adapter::new();
        let mut optimizer = Optimizer::new(&settings(0.9), adapter.pieces());
        adapter.update(&mut optimizer, [1.0, 2.0, -4.0], 0.01, 1.0);
        optimizer.set_numbers(&settings(0.5));
        adapter.update(&mut optimizer, [1.0, 0.0, 0.0], 0.01, 1.0);
        // 0.5·(0.1·g₁) + 0.5·g₂
        adapter.state_equals(&optimizer, "exp_avg", [0.55, 0.1, -0.2]);
        assert_eq!((optimizer.updates(), optimizer.numbers()[0].value), (2, 0.5));
    }

    #[test]
    fn its_state_is_found_by_region_and_name() {
        let mut adapter = Adapter::new();
        let mut optimizer = Optimizer::new(&Settings::from(&TrainArgs::default()), adapter.pieces());
        adapter.update(&mut optimizer, [1.0, 2.0, -4.0], 0.01, 0.5);
        for (name, expected) in [("exp_avg", [0.05, 0.1, -0.2]), ("exp_avg_sq", [0.0125, 0.05, 0.2])] {
            adapter.state_equals(&optimizer, name, expected);
        }
    }
}
