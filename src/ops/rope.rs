//! Rotary position embedding (Su et al., 2021) in the half-split layout of HF models.
//!
//! forward   y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin   with x = [x₁ | x₂]
//! backward  the rotation by the opposite angle

use tch::{Device, Kind, Tensor};

/// cos and sin of every position up to a length: [positions, head_dim / 2] fp32.
pub struct RopeTable {
    inv_freq: Tensor,
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// A table that grows as longer documents come. `inv_freq` [head_dim / 2] in radians per position.
    pub fn new(inv_freq: &[f32], device: Device) -> Self {
        let empty = Tensor::zeros([0, inv_freq.len() as i64], (Kind::Float, device));
        let inv_freq = Tensor::from_slice(inv_freq).to_device(device);
        Self { inv_freq, cos: empty.copy(), sin: empty }
    }

    /// cos and sin of `positions` `[tokens]` i64, which are below `length`: each [tokens, 1, head_dim / 2].
    pub fn at(&mut self, positions: &Tensor, length: usize) -> (Tensor, Tensor) {
        let _span = crate::trace::operation("rope.table");
        if (self.cos.size()[0] as usize) < length {
            let steps = Tensor::arange(length as i64, (Kind::Float, self.inv_freq.device()));
            let angles = steps.outer(&self.inv_freq);
            (self.cos, self.sin) = (angles.cos(), angles.sin());
        }
        (self.cos.index_select(0, positions).unsqueeze(1), self.sin.index_select(0, positions).unsqueeze(1))
    }
}

/// Rotates x [tokens, heads, head_dim] in place.
pub fn forward(x: &Tensor, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.forward");
    rotate(x, cos, sin, false);
}

/// Turns the gradient of the rotated tensor [tokens, heads, head_dim] into that of its input, in place.
pub fn backward(d_x: &Tensor, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.backward");
    rotate(d_x, cos, sin, true);
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, reverse: bool) {
    let half = x.size()[2] / 2;
    let (mut first, mut second) = (x.narrow(2, 0, half), x.narrow(2, half, half));
    let kind = cos.kind();
    let (a, b) = (first.to_kind(kind), second.to_kind(kind));
    let (b_sin, a_sin) = (&b * sin, &a * sin);
    let (a_cos, b_cos) = (a * cos, b * cos);
    if reverse {
        first.copy_(&(a_cos + b_sin));
        second.copy_(&(b_cos - a_sin));
    } else {
        first.copy_(&(a_cos - b_sin));
        second.copy_(&(b_cos + a_sin));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    #[test]
    fn matches_autograd() {
        let (x, d_y) = (leaf(&[5, 3, 8]), leaf(&[5, 3, 8]).detach());
        let angles = Tensor::randn([5, 1, 4], (Kind::Double, Device::Cpu));
        let (cos, sin) = (angles.cos(), angles.sin());
        let rotated_half = Tensor::cat(&[x.narrow(2, 4, 4).neg(), x.narrow(2, 0, 4)], 2);
        let twice = |t: &Tensor| Tensor::cat(&[t, t], 2);
        let reference = &x * twice(&cos) + rotated_half * twice(&sin);
        let expected = autograd(&reference, &d_y, &[&x]);
        let y = x.detach().copy();
        forward(&y, &cos, &sin);
        assert!(distance(&y, &reference) < 1e-12);
        let d_x = d_y.copy();
        backward(&d_x, &cos, &sin);
        assert!(distance(&d_x, &expected[0]) < 1e-12);
    }
}
