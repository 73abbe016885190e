//! Optimizers over flat fp32 shards, learning-rate schedule, and the one global gradient norm.

pub mod clip;
pub mod schedule;

use crate::{
    config,
    ops::adamw::{State, Update},
    shard::{AdapterRegions, Owned, ShardError},
};
use tch::{Device, Kind, Tensor};

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

/// First and second moment of one piece, flat fp32 `[piece elements]`.
pub struct Moments {
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
}

/// The optimizer of a whole adapter. Moments live with the piece that they belong to.
pub struct Optimizer {
    settings: Settings,
    /// One for each piece that this rank owns; none for sgd.
    moments: Vec<Moments>,
    /// Updates made so far, which AdamW's bias correction counts.
    updates: u64,
}

impl Optimizer {
    /// A fresh optimizer for `adapter`.
    pub fn new(settings: Settings, adapter: &AdapterRegions) -> Self {
        let fresh = |Owned { master, .. }: Owned| Moments {
            exp_avg: master.zeros_like(),
            exp_avg_sq: master.zeros_like(),
        };
        let keeps_moments = settings.kind == config::Optimizer::Adamw;
        let moments = if keeps_moments { adapter.owned().map(fresh).collect() } else { Vec::new() };
        Self { settings, moments, updates: 0 }
    }

    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// For a resume: how many updates the moments have seen.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// For a resume: the moments of piece `piece`, each as long as that; nothing for sgd.
    pub fn set_moments(&mut self, piece: usize, exp_avg: &[f32], exp_avg_sq: &[f32]) {
        if let Some(own) = self.moments.get_mut(piece) {
            own.exp_avg.copy_(&Tensor::from_slice(exp_avg));
            own.exp_avg_sq.copy_(&Tensor::from_slice(exp_avg_sq));
        }
    }

    /// The moments, one for each piece that this rank owns; empty for sgd.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Moves every master against its gradient times `coefficient` (from clipping) at learning rate `lr`, and the
    /// compute copies with them.
    ///
    /// AdamW: see [`crate::ops::adamw`]. sgd: p ← p − lr·(g + wd·p).
    pub fn step(
        &mut self,
        adapter: &mut AdapterRegions,
        lr: f64,
        coefficient: f64,
    ) -> Result<(), ShardError> {
        let _span = crate::trace::operation("optimizer.step");
        let _guard = tch::no_grad_guard();
        self.updates += 1;
        let Settings { kind, weight_decay, betas, eps } = self.settings;
        match kind {
            config::Optimizer::Adamw => {
                let update = Update { lr, weight_decay, betas, eps, count: self.updates, coefficient };
                adapter.invalidate()?;
                for (owned, Moments { exp_avg, exp_avg_sq }) in adapter.owned().zip(&self.moments) {
                    let Some(compute) = &owned.compute else { continue };
                    update
                        .apply(owned.gradient, &State { master: owned.master, exp_avg, exp_avg_sq, compute });
                }
                Ok(())
            }
            config::Optimizer::Sgd => {
                for Owned { master, gradient, .. } in adapter.owned() {
                    let mut master = master.shallow_clone();
                    let gradient = gradient * coefficient;
                    let update = (gradient + &master * weight_decay) * lr;
                    let _ = master.g_sub_(&update);
                }
                adapter.refresh()
            }
        }
    }
}

/// Elements whose squares a CPU sums at a time, for libtorch writes down both the squares and what they are in fp64.
const SQUARES: i64 = 1 << 15;

/// Σ of squares of a flat tensor, accumulated in fp64: `[]` fp64.
fn sum_of_squares(values: &Tensor) -> Tensor {
    let sum = |values: &Tensor| values.square().sum(Kind::Double);
    if values.device() != Device::Cpu {
        return sum(values);
    }
    Tensor::stack(&values.split(SQUARES, 0).iter().map(sum).collect::<Vec<_>>(), 0).sum(Kind::Double)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::World,
        config::ReduceGradients,
        dtype::DType,
        shard::{EntrySpec, ProcessGroups, Region, RegionLayout, adapter::align_bytes},
    };

    #[test]
    fn adamw_follows_its_formula() {
        let spec = EntrySpec { name: "a".into(), shape: vec![3], dtype: DType::F32, spans: Vec::new() };
        let layout = RegionLayout::new("unit", vec![spec], 1, align_bytes(DType::F32));
        let world = World::start().unwrap();
        let groups = ProcessGroups::one_block(&world);
        let mut adapter = AdapterRegions::new(vec![layout], vec![], 1, &groups, ReduceGradients::Step);
        let start = [1.0f32, -2.0, 0.5];
        adapter.of_mut(Region::Dense).set_master(0, 0..3, &start);
        let settings = Settings::new(config::Optimizer::Adamw, 0.1);
        let mut optimizer = Optimizer::new(settings, &adapter);
        let (mut p, mut m, mut v) = (start.map(f64::from), [0.0f64; 3], [0.0f64; 3]);
        for t in 1..=5 {
            let gradient = [0.3 * t as f32, -0.1, 2.0];
            let dense = adapter.of(Region::Dense);
            dense.gradient(0).narrow(0, 0, 3).copy_(&Tensor::from_slice(&gradient));
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
        let dense = adapter.of(Region::Dense);
        assert_eq!(&dense.compute(0).unwrap(), dense.master(0));
        let ours: Vec<f32> = dense.master(0).narrow(0, 0, 3).try_into().unwrap();
        for (ours, expected) in ours.iter().zip(p) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
        }
        assert_eq!(optimizer.updates(), 5);
    }
}
