//! Optimizers over flat fp32 shards, learning-rate schedule, and the one global gradient norm.

pub mod clip;
pub mod schedule;

use crate::{
    config,
    ops::adamw::{State, Update},
    shard::{AdapterShards, ShardError},
};
use tch::{Kind, Tensor};

pub use clip::{ClippedNorm, global_norm};
pub use schedule::Schedule;

/// What an optimizer step depends on besides gradient and learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub kind: config::Optimizer,
    pub weight_decay: f64,
    pub betas: (f64, f64),
    pub eps: f64,
}

impl Settings {
    /// AdamW's betas (.9, .95) and eps 1e-8, as xorl has them.
    pub fn new(kind: config::Optimizer, weight_decay: f64) -> Self {
        Self { kind, weight_decay, betas: (0.9, 0.95), eps: 1e-8 }
    }
}

/// First and second moment of one unit's piece, flat fp32 `[piece elements]`.
pub struct Moments {
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
}

/// The optimizer of a whole adapter. Moments live with the piece that they belong to.
pub struct Optimizer {
    settings: Settings,
    /// One per unit; none for sgd.
    moments: Vec<Moments>,
    /// Updates made so far, which AdamW's bias correction counts.
    updates: u64,
}

impl Optimizer {
    /// A fresh optimizer for `adapter`.
    pub fn new(settings: Settings, adapter: &AdapterShards) -> Self {
        let fresh = |unit| {
            let master = adapter.master(unit);
            Moments { exp_avg: master.zeros_like(), exp_avg_sq: master.zeros_like() }
        };
        let units = if settings.kind == config::Optimizer::Adamw { adapter.len() } else { 0 };
        Self { settings, moments: (0..units).map(fresh).collect(), updates: 0 }
    }

    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// For a resume: how many updates the moments have seen.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// For a resume: the moments of `unit`, each as long as this rank's piece; nothing for sgd.
    pub fn set_moments(&mut self, unit: usize, exp_avg: &[f32], exp_avg_sq: &[f32]) {
        if let Some(own) = self.moments.get_mut(unit) {
            own.exp_avg.copy_(&Tensor::from_slice(exp_avg));
            own.exp_avg_sq.copy_(&Tensor::from_slice(exp_avg_sq));
        }
    }

    /// The moments, one per unit; empty for sgd.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Moves every master against its gradient times `coefficient` (from clipping) at learning rate `lr`, and the
    /// compute copies with them.
    ///
    /// AdamW: see [`crate::ops::adamw`]. sgd: p ← p − lr·(g + wd·p).
    pub fn step(&mut self, adapter: &mut AdapterShards, lr: f64, coefficient: f64) -> Result<(), ShardError> {
        let _span = crate::trace::operation("optimizer.step");
        let _guard = tch::no_grad_guard();
        self.updates += 1;
        let Settings { kind, weight_decay, betas, eps } = self.settings;
        match kind {
            config::Optimizer::Adamw => {
                let update = Update { lr, weight_decay, betas, eps, count: self.updates, coefficient };
                adapter.invalidate()?;
                for (unit, Moments { exp_avg, exp_avg_sq }) in self.moments.iter().enumerate() {
                    let Some(compute) = &adapter.compute(unit) else { continue };
                    let state = State { master: adapter.master(unit), exp_avg, exp_avg_sq, compute };
                    update.apply(adapter.gradient(unit), &state);
                }
                Ok(())
            }
            config::Optimizer::Sgd => {
                for unit in 0..adapter.len() {
                    let mut master = adapter.master(unit).shallow_clone();
                    let gradient = adapter.gradient(unit) * coefficient;
                    let update = (gradient + &master * weight_decay) * lr;
                    let _ = master.g_sub_(&update);
                }
                adapter.refresh()
            }
        }
    }
}

/// Σ of squares of a flat tensor, accumulated in fp64.
fn sum_of_squares(values: &Tensor) -> f64 {
    values.square().sum(Kind::Double).double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::World,
        config::ReduceGradients,
        dtype::DType,
        shard::{EntrySpec, RegionLayout, adapter::align_bytes},
    };
    use tch::Device;

    #[test]
    fn adamw_follows_its_formula() {
        let spec = EntrySpec { name: "a".into(), shape: vec![3], dtype: DType::F32, spans: Vec::new() };
        let layout = RegionLayout::new("unit", vec![spec], 1, align_bytes(DType::F32));
        let world = World::start().unwrap();
        let (shard, replicate) = (world.group("shard", 0), world.group("replicate", 0));
        let mut adapter =
            AdapterShards::new(vec![layout], 1, shard, replicate, ReduceGradients::Step, Device::Cpu);
        let start = [1.0f32, -2.0, 0.5];
        adapter.set_master(0, 0..3, &start);
        let settings = Settings::new(config::Optimizer::Adamw, 0.1);
        let mut optimizer = Optimizer::new(settings, &adapter);
        let (mut p, mut m, mut v) = (start.map(f64::from), [0.0f64; 3], [0.0f64; 3]);
        for t in 1..=5 {
            let gradient = [0.3 * t as f32, -0.1, 2.0];
            adapter.gradient(0).narrow(0, 0, 3).copy_(&Tensor::from_slice(&gradient));
            optimizer.step(&mut adapter, 0.01, 0.5).unwrap();
            for i in 0..3 {
                let g = f64::from(gradient[i]) * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                p[i] -= 0.01 * 0.1 * p[i];
                let (m_hat, v_hat) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.95f64.powi(t)));
                p[i] -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        assert_eq!(&adapter.compute(0).unwrap(), adapter.master(0));
        let ours: Vec<f32> = adapter.master(0).narrow(0, 0, 3).try_into().unwrap();
        for (ours, expected) in ours.iter().zip(p) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
        }
        assert_eq!(optimizer.updates(), 5);
    }
}
