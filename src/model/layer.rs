//! A decoder layer: two residual halves, u = x + mixer(norm(x)), y = u + ffn(norm(u)).
//!
//! [`LayerPlan`] is pure: the entries of the layer's regions and its projections, as its halves declare them. Between
//! forward and backward a layer is a [`LayerState`]; the caller keeps x. [`CheckpointingMethod`] selects the parts to
//! recompute.

use super::{
    context::BatchContext,
    declare::{BaseEntries, Declarations, EntryForm, GemmEntries},
    gathered::GatheredLayer,
    spec::{LayerSpec, ModelSpec},
    sublayer::{BackwardContext, Half, HalfState},
};
use crate::{
    config::CheckpointingMethod,
    lora::targets::Projection,
    ops::Buffer,
    shard::{EntrySpec, ShardError},
};
use std::rc::Rc;
use tch::Tensor;

/// One decoder layer without tensors.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// Entries of the region that all ranks of a block share.
    pub specs: Vec<EntrySpec>,
    /// Entries of the region of this rank's experts.
    pub expert_specs: Vec<EntrySpec>,
    /// Projections, in the order of their [`ProjectionId`](super::declare::ProjectionId)s.
    pub projections: Vec<Projection>,
    pub mixer: Rc<dyn Half>,
    pub ffn: Rc<dyn Half>,
    /// HF names and shapes of all tensors, those of all experts included.
    tensors: Vec<(String, Vec<usize>)>,
    bases: Vec<BaseEntries>,
}

impl LayerPlan {
    /// The plan of layer `index` of `spec`, with entries in `form`.
    pub fn new(spec: &ModelSpec, index: usize, form: EntryForm) -> Self {
        let mut declare = Declarations::new(index, spec.hidden_size, form);
        let LayerSpec { mixer, ffn, norms } = &spec.layers[index];
        let mixer = mixer.declare(norms.mixer, norms.eps, &mut declare);
        let ffn = ffn.declare(norms.ffn, norms.eps, &mut declare);
        let Declarations { tensors, projections, bases, dense, experts, .. } = declare;
        Self { specs: dense, expert_specs: experts, projections, mixer, ffn, tensors, bases }
    }

    /// HF names and shapes of all tensors of the layer.
    pub fn tensors(&self) -> &[(String, Vec<usize>)] {
        &self.tensors
    }

    /// Elements of the largest projection of packed weights, which are decoded together. One expert counts, or all of
    /// this rank where they are computed `at_once`.
    pub fn decoded_elements(&self, at_once: bool) -> usize {
        let packed = |base: &BaseEntries| {
            let packed = base.gemms.iter().filter(|gemm| gemm.format.is_some());
            let elements = |gemm: &GemmEntries| {
                let one = gemm.widths.iter().sum::<usize>() * gemm.input;
                if at_once && base.experts { self.expert_specs[gemm.weight].shape[0] * one } else { one }
            };
            packed.map(elements).sum()
        };
        self.bases.iter().map(packed).max().unwrap_or(0)
    }

    /// Entries of each projection's frozen tensors.
    pub(super) fn bases(&self) -> &[BaseEntries] {
        &self.bases
    }
}

impl GatheredLayer<'_> {
    /// y `[tokens, hidden]` of x `[tokens, hidden]`, and the state for backward.
    pub fn forward(&self, x: &Tensor, batch: &BatchContext) -> Result<(Buffer, LayerState), ShardError> {
        let (middle, mixer) = self.plan.mixer.clone().forward(x, self, batch)?;
        let (y, ffn) = self.plan.ffn.clone().forward(&middle, self, batch)?;
        Ok((y, LayerState { middle: Some(middle), mixer, ffn }))
    }
}

/// A layer between its forward and its backward.
pub struct LayerState {
    /// u; `None` if it is computed again.
    middle: Option<Buffer>,
    mixer: Box<dyn HalfState>,
    ffn: Box<dyn HalfState>,
}

impl LayerState {
    /// Statistics of its routers: see [`SubLayer::router_load`](super::sublayer::SubLayer::router_load). To be read
    /// before [`release`](Self::release).
    pub fn router_loads(&self) -> impl Iterator<Item = Tensor> {
        [&self.mixer, &self.ffn].into_iter().filter_map(|half| half.router_load())
    }

    /// Drops the tensors that `method` recomputes.
    pub fn release(&mut self, method: CheckpointingMethod) {
        if !method.keeps_attention() {
            self.middle = None;
            self.mixer.release();
        }
        if !method.keeps_mlp() {
            self.ffn.release();
        }
    }

    /// dx from dy `[tokens, hidden]` and x; adds the adapters' gradients.
    pub fn backward(
        self,
        d_y: Buffer,
        x: &Tensor,
        layer: &GatheredLayer,
        context: &BackwardContext,
    ) -> Result<Buffer, ShardError> {
        let Self { middle, mut mixer, ffn } = self;
        let middle = match middle {
            Some(middle) => middle,
            None => mixer.forward_again(x, layer, context.batch)?,
        };
        let d_middle = ffn.backward(d_y, &middle, layer, context)?;
        drop(middle);
        mixer.backward(d_middle, x, layer, context)
    }
}
