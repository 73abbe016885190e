//! A named adapter with its optimizer and clipping: what a training run and a training server both hold, one or many.

use crate::{
    comm::Communicator,
    lora::Adapter,
    optim::{ClippedNorm, Optimizer, global_norm},
    shard::{OwnedPiece, ShardError},
};
use tch::{Kind, Tensor};

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
        let norm = global_norm(self.adapter.pieces(), &**self.adapter.regions().block())?;
        let clipped = ClippedNorm::new(norm, self.max_grad_norm);
        let mut update = Update { grad_norm: clipped.norm, non_finite: Vec::new() };
        if clipped.norm.is_finite() {
            self.adapter.regions_mut().invalidate()?;
            self.optimizer.step(self.adapter.pieces(), lr, clipped.coefficient)?;
        } else {
            let gradient = |piece: &OwnedPiece| vec![piece.gradient.shallow_clone()];
            update.non_finite = union(&self.adapter.non_finite(gradient), world)?;
        }
        Ok(update)
    }

    /// As [`update`](Self::update), but an update after which a value or a moment is not finite is undone, and
    /// `non_finite` names the parameters. Collective over `world`.
    pub fn update_finite(&mut self, lr: f64, world: &dyn Communicator) -> Result<Update, ShardError> {
        let (updates, before) = (self.optimizer.updates(), self.state());
        let before: Vec<Tensor> = before.iter().map(Tensor::copy).collect();
        let mut update = self.update(lr, world)?;
        if !update.non_finite.is_empty() || !update.grad_norm.is_finite() {
            return Ok(update);
        }
        update.non_finite = union(&self.non_finite_state(), world)?;
        if !update.non_finite.is_empty() {
            self.state().iter_mut().zip(&before).for_each(|(tensor, before)| tensor.copy_(before));
            self.optimizer.set_updates(updates);
            self.adapter.regions_mut().refresh()?;
        }
        Ok(update)
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

    /// Names of the parameters of which this rank owns a value, a moment or a compute copy that is not finite.
    fn non_finite_state(&self) -> Vec<String> {
        let all = |piece: &OwnedPiece| {
            let compute = piece.compute.as_ref().map(Tensor::shallow_clone);
            self.state_of(piece).into_iter().chain(compute).collect::<Vec<_>>()
        };
        // A double holds the sum of any finite floats.
        let sums: Vec<Tensor> = self
            .adapter
            .pieces()
            .flat_map(|piece| all(&piece))
            .map(|tensor| tensor.sum(Kind::Double))
            .collect();
        let is_finite = sums.is_empty() || Tensor::stack(&sums, 0).isfinite().all().int64_value(&[]) != 0;
        if is_finite { Vec::new() } else { self.adapter.non_finite(all) }
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
