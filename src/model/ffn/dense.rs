//! The MLP of a dense layer.

use super::gated::{GatedIntermediate, GatedMlp, GatedPlan, GatedSaved, Rows};
use crate::{
    model::{
        context::BatchContext,
        declare::Declarations,
        gathered::GatheredLayer,
        sublayer::{BackwardContext, CostSizes, MicroBatch, SubLayer},
    },
    ops::Buffer,
    shard::ShardError,
};
use tch::Tensor;

/// Sizes and switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseSpec {
    pub width: usize,
    pub bias: bool,
}

/// The sublayer.
#[derive(Debug)]
pub struct Dense {
    width: usize,
    hidden_size: usize,
    mlp: GatedPlan,
}

impl SubLayer for Dense {
    type Spec = DenseSpec;
    type Weights = GatedMlp;
    type Intermediate = GatedIntermediate;
    type Saved = GatedSaved;
    type Replay = ();

    fn declare(spec: &DenseSpec, declare: &mut Declarations) -> Self {
        let DenseSpec { width, bias } = *spec;
        Self { width, hidden_size: declare.hidden_size, mlp: GatedPlan::declare("mlp", width, bias, declare) }
    }

    fn kept_bytes(&self, sizes: &CostSizes) -> usize {
        self.mlp.kept_bytes(self.width, sizes)
    }

    /// SwiGLU's output.
    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize {
        self.width * element * batch.tokens
    }

    fn flops(&self, _length: usize) -> f64 {
        4.0 * (3 * self.width * self.hidden_size) as f64
    }

    fn bind(&self, layer: &GatheredLayer) -> Result<GatedMlp, ShardError> {
        self.mlp.bind(layer)
    }

    fn intermediate(
        &self,
        mlp: &GatedMlp,
        x: Buffer,
        _replay: Option<&()>,
        batch: &BatchContext,
    ) -> Result<GatedIntermediate, ShardError> {
        Ok(mlp.intermediate(&x, Rows { segments: batch.adapters.dense().share(), scale: None }))
    }

    fn output(
        &self,
        mlp: &GatedMlp,
        intermediate: GatedIntermediate,
        add: &Tensor,
        _batch: &BatchContext,
    ) -> Result<(Buffer, GatedSaved), ShardError> {
        Ok(mlp.output(intermediate, Some(add)))
    }

    fn skip_output(
        &self,
        mlp: &GatedMlp,
        intermediate: GatedIntermediate,
        _batch: &BatchContext,
    ) -> GatedSaved {
        mlp.skip_output(intermediate)
    }

    fn replay(_saved: &GatedSaved) {}

    fn backward(
        &self,
        mlp: &GatedMlp,
        d_y: &Tensor,
        x: impl FnOnce() -> Buffer,
        saved: GatedSaved,
        _context: &BackwardContext,
    ) -> Result<Buffer, ShardError> {
        Ok(mlp.backward(d_y, || Ok(x()), saved)?.0)
    }
}
