//! A gated MLP, and what of it waits for backward: y = down(c · swiglu(gate_up(x))).
//!
//! Of a dense layer all rows go through one; experts are several, each with its own slice of the rows. c is the scale of
//! each row, where it has one. Saved: gate|up and the thin LoRA activations. The caller keeps x; SwiGLU's output is
//! computed again.

use crate::ops::{
    Buffer,
    linear::{self, GroupedLinear, Linear, RowSegments},
    swiglu,
};
use crate::shard::ShardError;
use tch::Tensor;

/// The two matrices, of one MLP or of each expert.
pub struct GatedMlp {
    /// Gate above up.
    pub gate_up: Linear,
    pub down: Linear,
}

/// Which rows go where.
pub struct Share {
    /// Base i is MLP i.
    pub segments: RowSegments,
    /// `[rows, 1]` fp32
    pub scale: Option<Tensor>,
}

/// What backward needs.
pub struct GatedSaved {
    share: Share,
    gate_up: Buffer,
    h_gate_up: Option<Buffer>,
    h_down: Option<Buffer>,
    /// What goes into the last matrix, until it has.
    activated: Option<Buffer>,
}

impl Share {
    fn of<'a>(&'a self, linear: &'a Linear) -> GroupedLinear<'a> {
        GroupedLinear { linear, segments: &self.segments }
    }
}

impl GatedSaved {
    /// The scale that forward was given.
    pub fn scale(&self) -> Option<&Tensor> {
        self.share.scale.as_ref()
    }

    fn take_activated(&mut self) -> Buffer {
        let again = || swiglu::forward(&self.gate_up, self.share.scale.as_ref());
        self.activated.take().unwrap_or_else(again)
    }
}

impl GatedMlp {
    /// Up to the last matrix, of x `[rows, hidden]`; [`output`](Self::output) or [`skip_output`](Self::skip_output) follows.
    pub fn forward(&self, x: &Tensor, share: Share) -> GatedSaved {
        let (gate_up, h_gate_up) = linear::forward(x, share.of(&self.gate_up), None);
        let activated = Some(swiglu::forward(&gate_up, share.scale.as_ref()));
        GatedSaved { share, gate_up, h_gate_up, h_down: None, activated }
    }

    /// y `[rows, hidden]`, plus `add`.
    pub fn output(&self, saved: &mut GatedSaved, add: Option<&Tensor>) -> Buffer {
        let activated = saved.take_activated();
        let (y, h_down) = linear::forward(&activated, saved.share.of(&self.down), add);
        saved.h_down = h_down;
        y
    }

    /// What backward needs of the last matrix, where y is known already.
    pub fn skip_output(&self, saved: &mut GatedSaved) {
        let activated = saved.take_activated();
        saved.h_down = linear::lora_hidden(&activated, saved.share.of(&self.down));
    }

    /// dx from dy `[rows, hidden]`, and the gradient of the scale `[rows, 1]`; adds the adapters' gradients. `x` is asked
    /// for x when dx is there.
    pub fn backward(
        &self,
        d_y: &Tensor,
        x: impl FnOnce() -> Result<Buffer, ShardError>,
        saved: GatedSaved,
    ) -> Result<(Buffer, Option<Tensor>), ShardError> {
        let GatedSaved { share, gate_up, h_gate_up, h_down, activated: _ } = saved;
        let (d_activated, g) = linear::backward_input(d_y, share.of(&self.down));
        let gradients = swiglu::backward(d_activated, gate_up, share.scale.as_ref());
        let swiglu::Gradients { gate_up: d_gate_up, y: activated, scale: d_scale } = gradients;
        linear::backward_parameters(d_y, &activated, h_down.as_deref(), &g, share.of(&self.down));
        drop(activated);
        let layers = share.of(&self.gate_up);
        let (d_x, g) = linear::backward_input(&d_gate_up, layers);
        linear::backward_parameters(&d_gate_up, &*x()?, h_gate_up.as_deref(), &g, layers);
        Ok((d_x, d_scale))
    }
}
