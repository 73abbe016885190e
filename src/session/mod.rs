//! A named adapter with its optimizer and clipping: what a training run and a training server both hold, one or many.

use crate::{
    comm::{Communicator, Reduce},
    lora::Adapter,
    optim::{ClippedNorm, Optimizer, global_norm},
    shard::{OwnedPiece, ShardError},
};
use tch::Tensor;

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
    /// Parameters whose gradient is not finite, or of [`Session::update_finite`] their value after the update. Not
    /// empty: no rank changed anything.
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
        let clipped = self.clipped_norm(1.0)?;
        if !clipped.norm.is_finite() {
            return self.without_update(clipped, world);
        }
        self.step(lr, clipped)
    }

    /// As [`update`](Self::update) along the gradient times `factor`, but an update after which a value or a moment
    /// would not be finite is not made, and `non_finite` names the parameters. Collective over `world`.
    pub fn update_finite(
        &mut self,
        lr: f64,
        factor: f64,
        world: &dyn Communicator,
    ) -> Result<Update, ShardError> {
        let clipped = self.clipped_norm(factor)?;
        if !clipped.norm.is_finite() {
            return self.without_update(clipped, world);
        }
        let stays_finite = self.optimizer.stays_finite(self.adapter.pieces(), lr, clipped.coefficient)?;
        let mut unfit = [if stays_finite { 0.0 } else { 1.0 }];
        world.all_reduce_host(&mut unfit, Reduce::Sum)?;
        if unfit[0] == 0.0 {
            return self.step(lr, clipped);
        }
        // Only the update itself shows which parameters these are.
        let (updates, mut state) = (self.optimizer.updates(), self.state());
        let before: Vec<Tensor> = state.iter().map(Tensor::copy).collect();
        let update = self.step(lr, clipped)?;
        let non_finite = union(&self.adapter.non_finite(|piece| self.changed_by_update(piece)), world)?;
        state.iter_mut().zip(&before).for_each(|(tensor, before)| tensor.copy_(before));
        self.optimizer.set_updates(updates);
        self.adapter.regions_mut().refresh()?;
        Ok(Update { non_finite, ..update })
    }

    /// The norm of the reduced gradient times `factor`, clipped.
    fn clipped_norm(&self, factor: f64) -> Result<ClippedNorm, ShardError> {
        let norm = global_norm(self.adapter.pieces(), &**self.adapter.regions().block())?;
        Ok(ClippedNorm::of_scaled(norm, factor, self.max_grad_norm))
    }

    fn step(&mut self, lr: f64, clipped: ClippedNorm) -> Result<Update, ShardError> {
        self.adapter.regions_mut().invalidate()?;
        self.optimizer.step(self.adapter.pieces(), lr, clipped.coefficient)?;
        Ok(Update { grad_norm: clipped.norm, non_finite: Vec::new() })
    }

    /// The outcome where the gradient is not finite, which changes nothing.
    fn without_update(&self, clipped: ClippedNorm, world: &dyn Communicator) -> Result<Update, ShardError> {
        let gradient = |piece: &OwnedPiece| vec![piece.gradient.shallow_clone()];
        let non_finite = union(&self.adapter.non_finite(gradient), world)?;
        Ok(Update { grad_norm: clipped.norm, non_finite })
    }

    /// This rank's masters and the optimizer's tensors, which an update changes: fp32 `[piece elements]` each, always
    /// in the same order.
    pub fn state(&self) -> Vec<Tensor> {
        let of_piece = |piece: OwnedPiece| self.state_of(&piece);
        self.adapter.pieces().flat_map(of_piece).collect()
    }

    fn state_of(&self, piece: &OwnedPiece) -> Vec<Tensor> {
        let moments = self.optimizer.state()[piece.region].values();
        [piece.master].into_iter().chain(moments).map(Tensor::shallow_clone).collect()
    }

    /// [`state_of`](Self::state_of) and the compute copy.
    fn changed_by_update(&self, piece: &OwnedPiece) -> Vec<Tensor> {
        let compute = piece.compute.as_ref().map(Tensor::shallow_clone);
        self.state_of(piece).into_iter().chain(compute).collect()
    }
}

/// The names that some rank gives, sorted. Collective.
fn union(own: &[String], world: &dyn Communicator) -> Result<Vec<String>, ShardError> {
    let mut names: Vec<String> = Vec::new();
    for part in world.all_gather_host(own.join("\n").as_bytes())? {
        let part = String::from_utf8_lossy(&part);
        names.extend(part.lines().filter(|line| !line.is_empty()).map(str::to_owned));
    }
    names.sort();
    names.dedup();
    Ok(names)
}
