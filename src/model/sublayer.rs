//! The two halves of a decoder layer. A half is `x + sublayer(norm(x))`; the sublayer is a mixer
//! ([`mixer`](super::mixer)) or a feed-forward network ([`ffn`](super::ffn)).
//!
//! A new one implements [`SubLayer`]: declaration, costs, and the forward/backward pair with its own saved state.
//! [`Half`] and [`HalfState`] are the same without the types, for layers of any kinds; [`Residual`] implements them
//! once.

use super::{
    attend::AttendBackward,
    context::BatchContext,
    declare::{Declarations, ProjectionId, TensorId},
    gathered::GatheredLayer,
};
use crate::{
    ops::{Buffer, norm},
    shard::ShardError,
    trace::{self, Category},
};
use std::{fmt::Debug, rc::Rc};
use tch::Tensor;

/// Sizes that the costs of a sublayer depend on.
pub struct CostSizes<'a> {
    /// Bytes of an activation.
    pub element: usize,
    /// Σ rank of the adapters on a projection.
    pub lora_ranks: &'a dyn Fn(ProjectionId) -> usize,
    /// Some of the experts are on other ranks.
    pub experts_elsewhere: bool,
}

impl CostSizes<'_> {
    /// Bytes a token of the LoRA activations of `projections`.
    pub fn lora_hidden(&self, projections: &[ProjectionId]) -> usize {
        projections.iter().map(|&id| (self.lora_ranks)(id)).sum::<usize>() * self.element
    }
}

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// All tokens.
    pub tokens: usize,
    /// Tokens of its longest document.
    pub longest: usize,
}

/// A batch, with the backward of its attention.
pub struct BackwardContext<'a> {
    pub batch: &'a BatchContext<'a>,
    pub attend: &'a dyn AttendBackward,
}

/// A mixer or a feed-forward network.
///
/// Forward has two steps, so that a recompute can leave out the second: [`intermediate`](Self::intermediate) up to the
/// last projection, then [`output`](Self::output) or [`skip_output`](Self::skip_output). Saved state refers to no slot.
pub trait SubLayer: Debug + Sized + 'static {
    /// Description of the sublayer in a model's spec.
    type Spec;
    /// Gathered weights: views of slots.
    type Weights;
    /// State of a forward before its last projection.
    type Intermediate;
    /// Tensors kept for backward.
    type Saved;
    /// Decisions of a forward that a recompute repeats: the choice of experts.
    type Replay;

    /// Declares the tensors and projections: the only list of their names.
    fn declare(spec: &Self::Spec, declare: &mut Declarations) -> Self;

    /// Bytes of [`Saved`](Self::Saved), a token.
    fn kept_bytes(&self, sizes: &CostSizes) -> usize;
    /// Bytes of [`Replay`](Self::Replay), a token.
    fn replay_bytes(&self) -> usize {
        0
    }
    /// Bytes of temporaries at the largest moment of backward, the gradient of the output and the input not counted.
    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize;
    /// Floating-point operations of forward and backward of a token of a document of `length` tokens, adapters not
    /// counted: 4 a parameter of a frozen matrix that the token meets (y and dx, no dW), and those of mixing tokens.
    fn flops(&self, length: usize) -> f64;

    /// Views of the weights.
    fn bind(&self, layer: &GatheredLayer) -> Result<Self::Weights, ShardError>;
    /// Forward of x `[tokens, hidden]` up to the last projection. `replay`: the decisions of an earlier forward.
    fn intermediate(
        &self,
        weights: &Self::Weights,
        x: Buffer,
        replay: Option<&Self::Replay>,
        batch: &BatchContext,
    ) -> Result<Self::Intermediate, ShardError>;
    /// The last projection: y `[tokens, hidden]` plus `add` `[tokens, hidden]`.
    fn output(
        &self,
        weights: &Self::Weights,
        intermediate: Self::Intermediate,
        add: &Tensor,
        batch: &BatchContext,
    ) -> Result<(Buffer, Self::Saved), ShardError>;
    /// The part of the last projection that backward needs, without y.
    fn skip_output(
        &self,
        weights: &Self::Weights,
        intermediate: Self::Intermediate,
        batch: &BatchContext,
    ) -> Self::Saved;
    /// The decisions of a forward.
    fn replay(saved: &Self::Saved) -> Self::Replay;
    /// dx from dy `[tokens, hidden]`; adds the adapters' gradients. `x` computes x again.
    fn backward(
        &self,
        weights: &Self::Weights,
        d_y: &Tensor,
        x: impl FnOnce() -> Buffer,
        saved: Self::Saved,
        context: &BackwardContext,
    ) -> Result<Buffer, ShardError>;

    /// Choices of each expert by this rank's tokens, and the sum of its probabilities: `[2, experts]` fp64.
    fn router_load(_saved: &Self::Saved) -> Option<Tensor> {
        None
    }
}

/// One half of a layer, of any kind.
pub trait Half: Debug {
    /// Bytes of the tensors kept for backward, a token.
    fn kept_bytes(&self, sizes: &CostSizes) -> usize;
    /// See [`SubLayer::replay_bytes`].
    fn replay_bytes(&self) -> usize;
    /// See [`SubLayer::scratch_bytes`].
    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize;
    /// See [`SubLayer::flops`].
    fn flops(&self, length: usize) -> f64;
    /// y `[tokens, hidden]` of x `[tokens, hidden]`, and the state for its backward.
    fn forward(
        self: Rc<Self>,
        x: &Tensor,
        layer: &GatheredLayer,
        batch: &BatchContext,
    ) -> Result<(Buffer, Box<dyn HalfState>), ShardError>;
}

/// The state of one half between forward and backward.
pub trait HalfState {
    /// Drops all that can be computed again.
    fn release(&mut self);
    /// See [`SubLayer::router_load`]; `None` after [`release`](Self::release).
    fn router_load(&self) -> Option<Tensor>;
    /// Forward again with the same decisions: y, with the tensors for backward kept.
    fn forward_again(
        &mut self,
        x: &Tensor,
        layer: &GatheredLayer,
        batch: &BatchContext,
    ) -> Result<Buffer, ShardError>;
    /// dx from dy `[tokens, hidden]`, recomputing what was released; adds the adapters' gradients.
    fn backward(
        self: Box<Self>,
        d_y: Buffer,
        x: &Tensor,
        layer: &GatheredLayer,
        context: &BackwardContext,
    ) -> Result<Buffer, ShardError>;
}

/// y = x + sublayer(norm(x)), with RMSNorm.
#[derive(Debug)]
pub struct Residual<S> {
    norm: TensorId,
    eps: f64,
    sublayer: S,
}

struct ResidualState<S: SubLayer> {
    half: Rc<Residual<S>>,
    kept: Kept<S>,
}

enum Kept<S: SubLayer> {
    All(Saved<S>),
    Replay(S::Replay),
}

struct Saved<S: SubLayer> {
    /// The norm's statistics: 1/RMS of each token.
    r: Tensor,
    inner: S::Saved,
}

impl<S: SubLayer> Residual<S> {
    /// Declares the sublayer of `spec` and the norm `norm` before it.
    pub fn declare(spec: &S::Spec, norm: &str, eps: f64, declare: &mut Declarations) -> Rc<dyn Half> {
        let sublayer = S::declare(spec, declare);
        Rc::new(Self { norm: declare.norm(norm, declare.hidden_size), eps, sublayer })
    }

    fn run(
        &self,
        x: &Tensor,
        replay: Option<&S::Replay>,
        layer: &GatheredLayer,
        batch: &BatchContext,
    ) -> Result<(Buffer, Saved<S>), ShardError> {
        let weights = self.sublayer.bind(layer)?;
        let (normed, r) = norm::forward(x, &layer.tensor(self.norm)?, self.eps);
        let intermediate = self.sublayer.intermediate(&weights, normed, replay, batch)?;
        let (y, inner) = self.sublayer.output(&weights, intermediate, x, batch)?;
        Ok((y, Saved { r, inner }))
    }
}

impl<S: SubLayer> Half for Residual<S> {
    fn kept_bytes(&self, sizes: &CostSizes) -> usize {
        size_of::<f32>() + self.sublayer.kept_bytes(sizes)
    }

    fn replay_bytes(&self) -> usize {
        self.sublayer.replay_bytes()
    }

    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize {
        self.sublayer.scratch_bytes(element, batch)
    }

    fn flops(&self, length: usize) -> f64 {
        self.sublayer.flops(length)
    }

    fn forward(
        self: Rc<Self>,
        x: &Tensor,
        layer: &GatheredLayer,
        batch: &BatchContext,
    ) -> Result<(Buffer, Box<dyn HalfState>), ShardError> {
        let (y, saved) = self.run(x, None, layer, batch)?;
        Ok((y, Box::new(ResidualState { half: self, kept: Kept::All(saved) })))
    }
}

impl<S: SubLayer> HalfState for ResidualState<S> {
    fn release(&mut self) {
        if let Kept::All(saved) = &self.kept {
            self.kept = Kept::Replay(S::replay(&saved.inner));
        }
    }

    fn router_load(&self) -> Option<Tensor> {
        match &self.kept {
            Kept::All(saved) => S::router_load(&saved.inner),
            Kept::Replay(_) => None,
        }
    }

    fn forward_again(
        &mut self,
        x: &Tensor,
        layer: &GatheredLayer,
        batch: &BatchContext,
    ) -> Result<Buffer, ShardError> {
        let _recompute = recomputing(layer);
        let replay = match &self.kept {
            Kept::All(saved) => &S::replay(&saved.inner),
            Kept::Replay(replay) => replay,
        };
        let (y, saved) = self.half.run(x, Some(replay), layer, batch)?;
        self.kept = Kept::All(saved);
        Ok(y)
    }

    fn backward(
        self: Box<Self>,
        d_y: Buffer,
        x: &Tensor,
        layer: &GatheredLayer,
        context: &BackwardContext,
    ) -> Result<Buffer, ShardError> {
        let Self { half, kept } = *self;
        let Residual { norm, eps, sublayer } = &*half;
        let (weights, norm) = (sublayer.bind(layer)?, layer.tensor(*norm)?);
        let Saved { r, inner } = match kept {
            Kept::All(saved) => saved,
            Kept::Replay(replay) => {
                let _recompute = recomputing(layer);
                let (normed, r) = norm::forward(x, &norm, *eps);
                let intermediate = sublayer.intermediate(&weights, normed, Some(&replay), context.batch)?;
                Saved { r, inner: sublayer.skip_output(&weights, intermediate, context.batch) }
            }
        };
        let normed = || norm::recompute(x, &norm, &r);
        let d_normed = sublayer.backward(&weights, &d_y, normed, inner, context)?;
        Ok(norm::backward(d_normed, x, &norm, &r, Some(&d_y)))
    }
}

fn recomputing(layer: &GatheredLayer) -> trace::Span {
    trace::span(Category::Phase, "layer.recompute").with("unit", layer.unit)
}
