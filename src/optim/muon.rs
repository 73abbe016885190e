//! Muon (Jordan et al., 2024), as torch.optim.Muon of torch 2.13: the momentum of every matrix A and B, made orthogonal
//! by Newton-Schulz iterations.
//!
//! m ← μ·m + (1 − μ)·g; u = (1 − μ)·g + μ·m with `nesterov`, else m; p ← (1 − lr·wd)·p − lr·f(rows, columns)·NS(u).
//! NS works in bf16, as torch's does, and its rounding amplifies what the order of sums changes: runs on other numbers
//! of ranks agree to 1e-4 in their losses and 1e-2 in single elements, not to 1e-5 as with other optimizers. Momentum
//! is kept in a dtype of its own: in fp32 the steps are torch's, in bf16 xorl's, which computes u in it, too. A matrix
//! is one logical parameter: that of a fused target is one, and each expert's is one.
//!
//! The border of a shard may cut a matrix. A region with such a matrix is gathered, in bf16, which NS rounds to anyway;
//! each rank then makes the matrices orthogonal of which it owns elements.

use super::{Number, State, Update, UpdateRule};
use crate::{
    config::MuonAdjustLr,
    dtype::DType,
    shard::{FlatRegion, OwnedPart, OwnedPiece, PlacedParameter, ShardError},
};
use std::ops::Range;
use tch::{Kind, Tensor};

const MOMENTUM: &str = "momentum_buffer";

/// a, b and c of the iteration X ← a·X + (b·XXᵀ + c·(XXᵀ)²)·X.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// The least norm that a matrix is divided by.
const EPS: f64 = 1e-7;

/// Muon with decoupled weight decay.
pub(super) struct Muon {
    pub weight_decay: f64,
    pub momentum: f64,
    pub nesterov: bool,
    pub ns_steps: usize,
    pub adjust_lr: MuonAdjustLr,
    /// Dtype of the momentum.
    pub dtype: DType,
}

/// A piece's momentum `[piece elements]` and master `[piece elements]` after an update.
struct Moved {
    momentum: Tensor,
    master: Tensor,
}

impl UpdateRule for Muon {
    fn state_names(&self) -> &'static [&'static str] {
        &[MOMENTUM]
    }

    fn state_dtype(&self) -> DType {
        self.dtype
    }

    fn numbers(&self) -> Vec<Number> {
        vec![
            Number::new("muon_momentum", self.momentum),
            Number::new("muon_nesterov", f64::from(u8::from(self.nesterov))),
            Number::new("muon_ns_steps", self.ns_steps as f64),
            Number::new("muon_adjust_lr_fn", f64::from(u8::from(self.adjust_lr != MuonAdjustLr::Original))),
            Number::new("weight_decay", self.weight_decay),
            Number::of_dtype(self.dtype),
        ]
    }

    fn step(&self, pieces: &[OwnedPiece], state: &State, update: &Update) -> Result<(), ShardError> {
        for piece in pieces {
            let Some(mut compute) = piece.compute.as_ref().map(Tensor::shallow_clone) else { continue };
            let Moved { momentum, master } = self.moved(piece, state, update)?;
            state[piece.region][MOMENTUM].shallow_clone().copy_(&momentum);
            piece.master.shallow_clone().copy_(&master);
            compute.copy_(&master);
        }
        Ok(())
    }

    fn stays_finite(
        &self,
        pieces: &[OwnedPiece],
        state: &State,
        update: &Update,
    ) -> Result<bool, ShardError> {
        let mut stays = true;
        for piece in pieces {
            let Some(compute) = &piece.compute else { continue };
            // Every rank enters the gathers of all pieces.
            let Moved { momentum, master } = self.moved(piece, state, update)?;
            let compute = master.to_kind(compute.kind());
            stays &= [momentum, compute].iter().all(|after| after.isfinite().all().int64_value(&[]) != 0);
        }
        Ok(stays)
    }
}

impl Muon {
    /// `piece` after an update. Collective over its shards where a border cuts a matrix.
    fn moved(&self, piece: &OwnedPiece, state: &State, update: &Update) -> Result<Moved, ShardError> {
        let before = &state[piece.region][MOMENTUM];
        let gradient = (piece.gradient * update.coefficient).to_kind(before.kind());
        let momentum = before.lerp(&gradient, 1.0 - self.momentum);
        let direction =
            if self.nesterov { gradient.lerp(&momentum, self.momentum) } else { momentum.shallow_clone() };
        let (around, first) = gathered(piece, &direction.to_kind(Kind::BFloat16))?;
        let master = piece.master.copy();
        for OwnedPart { parameter, elements, at } in piece.parts() {
            let [rows, columns] = parameter.shape.map(|n| n as i64);
            let start = (parameter.first - first) as i64;
            let whole =
                orthogonal(&around.narrow(0, start, rows * columns).view([rows, columns]), self.ns_steps);
            let n = elements.len() as i64;
            let own = whole.reshape([-1]).narrow(0, elements.start as i64, n).to_kind(Kind::Float);
            let lr = update.lr_of(parameter);
            let mut target = master.narrow(0, at as i64, n);
            let _ = target.g_mul_scalar_(1.0 - lr * self.weight_decay);
            let _ = target.g_sub_(&(own * (lr * self.factor(parameter.shape))));
        }
        Ok(Moved { momentum, master })
    }

    /// Factor of the learning rate for a matrix.
    fn factor(&self, [rows, columns]: [usize; 2]) -> f64 {
        match self.adjust_lr {
            MuonAdjustLr::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
            MuonAdjustLr::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
        }
    }
}

/// Elements of the flat space of `piece`'s region around `own`, which this rank has `[piece elements]`, so that every
/// matrix of the piece is whole, and the place of the first of them in that space. Collective over the shards of the
/// piece where a border between any two of them cuts a matrix.
fn gathered(piece: &OwnedPiece, own: &Tensor) -> Result<(Tensor, usize), ShardError> {
    let (shards, n) = (piece.shards, piece.region.piece);
    let first = piece.owned.start - shards.rank() * n;
    if !has_cut_matrix(piece.region, first, shards.size()) {
        return Ok((own.shallow_clone(), piece.owned.start));
    }
    let all = Tensor::empty([(n * shards.size()) as i64], (own.kind(), own.device()));
    shards.all_gather(own, &all)?;
    Ok((all, first))
}

/// Elements that an update gathers of `region`, in bf16: those of all `shards` pieces of a shard group, or none.
pub fn gathered_elements(region: &FlatRegion, shards: usize) -> usize {
    // Every group of experts has the same matrices in the same places.
    if has_cut_matrix(region, 0, shards) { region.piece * shards } else { 0 }
}

/// True if a border between two of the `shards` pieces of `region` from element `first` on cuts a matrix.
fn has_cut_matrix(region: &FlatRegion, first: usize, shards: usize) -> bool {
    let is_cut = |parameter: &PlacedParameter| {
        cuts(parameter.elements().unwrap_or_default(), first, region.piece, shards)
    };
    region.parameters.iter().any(is_cut)
}

/// True if `elements` lie in more than one of the `shards` pieces of `n` elements from `first` on.
fn cuts(elements: Range<usize>, first: usize, n: usize, shards: usize) -> bool {
    let within = first..first + n * shards;
    let is_inside = !elements.is_empty() && within.contains(&elements.start);
    is_inside && (elements.start - first) / n != (elements.end - 1 - first) / n
}

/// U·S'·Vᵀ of `matrix` = U·S·Vᵀ, bf16 `[rows, columns]`, with singular values S' near 1: `steps` Newton-Schulz
/// iterations.
fn orthogonal(matrix: &Tensor, steps: usize) -> Tensor {
    let [a, b, c] = COEFFICIENTS;
    let is_tall = matrix.size()[0] > matrix.size()[1];
    let mut x = if is_tall { matrix.tr() } else { matrix.shallow_clone() };
    x = &x / x.norm().clamp_min(EPS);
    for _ in 0..steps {
        let gram = x.mm(&x.tr());
        let change = sum(&gram, [&gram, &gram], b, c);
        x = sum(&x, [&change, &x], a, 1.0);
    }
    if is_tall { x.tr() } else { x }
}

/// β·`start` + α·`left`·`right` of matrices, rounded once: tch's `addmm` has no factors.
fn sum(start: &Tensor, [left, right]: [&Tensor; 2], beta: f64, alpha: f64) -> Tensor {
    let one = |tensor: &Tensor| tensor.unsqueeze(0);
    one(start).baddbmm(&one(left), &one(right), beta, alpha).squeeze_dim(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_that_cut_a_matrix_are_seen() {
        // Pieces 10..18, 18..26, 26..34.
        for (elements, expected) in [
            (10..18, false),
            (11..19, true),
            (17..18, false),
            (18..18, false),
            (16..30, true),
            (26..34, false),
            // Another group of experts has these.
            (2..12, false),
            (34..50, false),
        ] {
            assert_eq!(cuts(elements.clone(), 10, 8, 3), expected, "{elements:?}");
        }
    }

    #[test]
    fn singular_values_come_near_one() {
        for shape in [[4, 40], [40, 4], [16, 16]] {
            let matrix = Tensor::randn(shape, (Kind::Float, tch::Device::Cpu)) * 1e-3;
            let (_, values, _) =
                orthogonal(&matrix.to_kind(Kind::BFloat16), 5).to_kind(Kind::Float).svd(true, true);
            let [least, most] = [values.min(), values.max()].map(|x| x.double_value(&[]));
            assert!(0.2 < least && most < 1.4, "{shape:?}: {least} to {most}");
        }
        let zeros = Tensor::zeros([3, 5], (Kind::BFloat16, tch::Device::Cpu));
        assert_eq!(orthogonal(&zeros, 5), zeros);
    }
}
