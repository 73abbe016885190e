//! A named adapter with its optimizer and clipping: what a training run and a training server both hold, one or many.

use crate::{
    comm::Communicator,
    lora::Adapter,
    optim::{ClippedNorm, Optimizer, global_norm},
    shard::ShardError,
};

/// An adapter that is being trained.
pub struct Session {
    pub name: String,
    pub adapter: Adapter,
    pub optimizer: Optimizer,
    /// Largest norm of a gradient, beyond which it is scaled down; 0 or less: no limit.
    pub max_grad_norm: f64,
}

/// The outcome of an update, the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Global L2 norm before clipping.
    pub grad_norm: f64,
    /// Parameters whose gradient is not finite. Not empty: no rank changed anything.
    pub non_finite: Vec<String>,
}

impl Session {
    /// Sums the gradients of all micro-batches over the ranks that own them. Collective.
    pub fn reduce(&mut self) -> Result<(), ShardError> {
        self.adapter.regions_mut().step_done()
    }

    /// Clips the reduced gradient and steps the optimizer at learning rate `lr`. Collective over `world`, the ranks
    /// that train.
    pub fn update(&mut self, lr: f64, world: &dyn Communicator) -> Result<Update, ShardError> {
        let norm = global_norm(self.adapter.pieces(), &**self.adapter.regions().block())?;
        let clipped = ClippedNorm::new(norm, self.max_grad_norm);
        let mut update = Update { grad_norm: clipped.norm, non_finite: Vec::new() };
        if clipped.norm.is_finite() {
            self.adapter.regions_mut().invalidate()?;
            self.optimizer.step(self.adapter.pieces(), lr, clipped.coefficient)?;
        } else {
            update.non_finite = self.non_finite(world)?;
        }
        Ok(update)
    }

    /// Names of the parameters with a gradient that is not finite on some rank, sorted. Collective.
    fn non_finite(&self, world: &dyn Communicator) -> Result<Vec<String>, ShardError> {
        let own = self.adapter.non_finite_gradients().join("\n");
        let mut names: Vec<String> = Vec::new();
        for part in world.all_gather_host(own.as_bytes())? {
            let part = String::from_utf8_lossy(&part);
            names.extend(part.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
        names.sort();
        names.dedup();
        Ok(names)
    }
}
