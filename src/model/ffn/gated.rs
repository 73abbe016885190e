//! A gated MLP: y = down(c · swiglu(gate_up(x))).
//!
//! A dense layer has one, a mixture one for each expert, whose rows are segments. c is the scale of each row, if there
//! is one. Saved: gate|up and the LoRA activations. The caller keeps x; SwiGLU's output is computed again.

use crate::{
    model::{
        declare::{Declarations, ProjectionId},
        gathered::GatheredLayer,
        sublayer::CostSizes,
    },
    ops::{
        Buffer,
        linear::{self, GroupedLinear, Linear, RowSegments},
        swiglu,
    },
    shard::ShardError,
};
use tch::Tensor;

/// Names of the projections, as targets have them.
pub const GATE_UP: &str = "gate_up_proj";
pub const GATE: &str = "gate_proj";
pub const UP: &str = "up_proj";
pub const DOWN: &str = "down_proj";

/// The projections of one MLP, or of the same of each expert.
#[derive(Clone, Copy, Debug)]
pub struct GatedPlan {
    pub gate_up: ProjectionId,
    pub down: ProjectionId,
}

/// The two matrices, of one MLP or of each expert.
pub struct GatedMlp {
    /// Gate above up.
    gate_up: Linear,
    down: Linear,
}

/// The rows of each MLP.
pub struct Rows {
    /// Base i is MLP i.
    pub segments: RowSegments,
    /// `[rows, 1]` fp32
    pub scale: Option<Tensor>,
}

/// State before the last matrix.
pub struct GatedIntermediate {
    rows: Rows,
    gate_up: Buffer,
    h_gate_up: Option<Buffer>,
    /// Input of the last matrix.
    activated: Buffer,
}

/// Tensors kept for backward.
pub struct GatedSaved {
    rows: Rows,
    gate_up: Buffer,
    h_gate_up: Option<Buffer>,
    h_down: Option<Buffer>,
}

impl GatedPlan {
    /// Declares an MLP `[hidden → width → hidden]` in module `parent`.
    pub fn declare(parent: &str, width: usize, bias: bool, declare: &mut Declarations) -> Self {
        let hidden = declare.hidden_size;
        let gate_up = declare.projection(parent, Some(GATE_UP), &[(GATE, width), (UP, width)], hidden, bias);
        let down = declare.projection(parent, None, &[(DOWN, hidden)], width, bias);
        Self { gate_up, down }
    }

    /// Views of the weights.
    pub fn bind(&self, layer: &GatheredLayer) -> Result<GatedMlp, ShardError> {
        Ok(GatedMlp { gate_up: layer.linear(self.gate_up)?, down: layer.linear(self.down)? })
    }

    /// Bytes of [`GatedSaved`] without its rows, a row.
    pub fn kept_bytes(&self, width: usize, sizes: &CostSizes) -> usize {
        2 * width * sizes.element + sizes.lora_hidden(&[self.gate_up, self.down])
    }
}

impl Rows {
    fn of<'a>(&'a self, linear: &'a Linear) -> GroupedLinear<'a> {
        GroupedLinear { linear, segments: &self.segments }
    }
}

impl GatedSaved {
    /// The scale that forward was given.
    pub fn scale(&self) -> Option<&Tensor> {
        self.rows.scale.as_ref()
    }
}

impl GatedMlp {
    /// Forward of x `[rows, hidden]` up to the last matrix.
    pub fn intermediate(&self, x: &Tensor, rows: Rows) -> GatedIntermediate {
        let (gate_up, h_gate_up) = linear::forward(x, rows.of(&self.gate_up), None);
        let activated = swiglu::forward(&gate_up, rows.scale.as_ref());
        GatedIntermediate { rows, gate_up, h_gate_up, activated }
    }

    /// y `[rows, hidden]`, plus `add`.
    pub fn output(&self, intermediate: GatedIntermediate, add: Option<&Tensor>) -> (Buffer, GatedSaved) {
        let GatedIntermediate { rows, gate_up, h_gate_up, activated } = intermediate;
        let (y, h_down) = linear::forward(&activated, rows.of(&self.down), add);
        (y, GatedSaved { rows, gate_up, h_gate_up, h_down })
    }

    /// The part of the last matrix that backward needs, without y.
    pub fn skip_output(&self, intermediate: GatedIntermediate) -> GatedSaved {
        let GatedIntermediate { rows, gate_up, h_gate_up, activated } = intermediate;
        let h_down = linear::lora_hidden(&activated, rows.of(&self.down));
        GatedSaved { rows, gate_up, h_gate_up, h_down }
    }

    /// dx from dy `[rows, hidden]`, and the gradient of the scale `[rows, 1]`; adds the adapters' gradients. `x`
    /// computes x, after the gradient of gate|up.
    pub fn backward(
        &self,
        d_y: &Tensor,
        x: impl FnOnce() -> Result<Buffer, ShardError>,
        saved: GatedSaved,
    ) -> Result<(Buffer, Option<Tensor>), ShardError> {
        let GatedSaved { rows, gate_up, h_gate_up, h_down } = saved;
        let (d_activated, g) = linear::backward_input(d_y, rows.of(&self.down));
        let gradients = swiglu::backward(d_activated, gate_up, rows.scale.as_ref());
        let swiglu::Gradients { gate_up: d_gate_up, y: activated, scale: d_scale } = gradients;
        linear::backward_parameters(d_y, &activated, h_down.as_deref(), &g, rows.of(&self.down));
        drop(activated);
        let layer = rows.of(&self.gate_up);
        let (d_x, g) = linear::backward_input(&d_gate_up, layer);
        linear::backward_parameters(&d_gate_up, &*x()?, h_gate_up.as_deref(), &g, layer);
        Ok((d_x, d_scale))
    }
}
