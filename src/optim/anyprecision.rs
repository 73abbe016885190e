//! AnyPrecisionAdamW of torchdistx and llama-recipes, which xorl calls `anyprecision_adamw`: AdamW whose moments are
//! kept in a dtype of their own, without Kahan summation.
//!
//! p ← (1 − lr·wd)·p; m ← β₁·m, then m ← m + (1 − β₁)·g; v ← β₂·v, then v ← v + (1 − β₂)·g²;
//! p ← p − lr/(1 − β₁ᵗ)·m/d with d = √v/√(1 − β₂ᵗ) + ε. As there, m, v and d are rounded to that dtype after each of
//! these operations; masters and gradients are fp32.

use super::{
    ElementRule, Elements, Number, Update,
    adamw::{EXP_AVG, EXP_AVG_SQ, numbers},
};
use crate::dtype::DType;
use tch::Tensor;

/// AdamW with decoupled weight decay and moments in `dtype`.
pub(super) struct AnyPrecisionAdamW {
    pub weight_decay: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub dtype: DType,
}

impl ElementRule for AnyPrecisionAdamW {
    fn state_names(&self) -> &'static [&'static str] {
        &[EXP_AVG, EXP_AVG_SQ]
    }

    fn state_dtype(&self) -> DType {
        self.dtype
    }

    fn numbers(&self) -> Vec<Number> {
        let of_adamw = numbers(self.betas, self.eps, self.weight_decay);
        of_adamw.into_iter().chain([Number::of_dtype(self.dtype)]).collect()
    }

    fn apply(&self, elements: &Elements, update: &Update) {
        let (beta1, beta2) = self.betas;
        let gradient = &elements.gradient * update.coefficient;
        let [mut p, mut compute] = [&elements.master, &elements.compute].map(Tensor::shallow_clone);
        let [mut m, mut v] = [0, 1].map(|i: usize| elements.state[i].shallow_clone());
        let _ = p.g_mul_scalar_(1.0 - update.lr * self.weight_decay);
        // libtorch's product with a scalar in place would round β to the dtype first.
        m.copy_(&(m.to_kind(p.kind()) * beta1));
        v.copy_(&(v.to_kind(p.kind()) * beta2));
        let _ = m.g_add_(&(&gradient * (1.0 - beta1)));
        let _ = v.g_add_(&(gradient.square() * (1.0 - beta2)));
        let correction = |beta: f64| 1.0 - beta.powf(update.count as f64);
        let denominator = v.sqrt() / correction(beta2).sqrt() + self.eps;
        let direction = m.to_kind(p.kind()) / denominator;
        let _ = p.g_sub_(&(direction * (update.lr / correction(beta1))));
        compute.copy_(&p);
    }
}
