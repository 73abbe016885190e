//! Rotary position embedding (Su et al., 2021) in the half-split layout of HF models.
//!
//! forward   y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin   with x = [x₁ | x₂]
//! backward  the rotation by the opposite angle

use super::{
    cpu::{Element, Real, Rows, dispatch, each_row},
    cuda,
};
use crate::device::has_kernels;
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
        if (self.cos.size()[0] as usize) < length {
            let steps = Tensor::arange(length as i64, (Kind::Float, self.inv_freq.device()));
            let angles = steps.outer(&self.inv_freq);
            (self.cos, self.sin) = (angles.cos(), angles.sin());
        }
        (self.cos.index_select(0, positions).unsqueeze(1), self.sin.index_select(0, positions).unsqueeze(1))
    }
}

/// Rotates the first `heads` heads of each row of `qkv` [tokens, all heads·head_dim], q and k of q|k|v, in place. cos and
/// sin [tokens, 1, head_dim / 2] are fp32, or fp64 for fp64 rows (tests).
pub fn forward(qkv: &Tensor, heads: i64, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.forward");
    rotate(qkv, heads, cos, sin, 1.0);
}

/// Turns the gradient of what [`forward`] gives into that of what it takes, in place.
pub fn backward(d_qkv: &Tensor, heads: i64, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.backward");
    rotate(d_qkv, heads, cos, sin, -1.0);
}

/// `direction` is 1 or −1: by the angle or the opposite one.
fn rotate(x: &Tensor, heads: i64, cos: &Tensor, sin: &Tensor, direction: f64) {
    if has_kernels(x) {
        dispatch!(x.kind(), E => rows::rotate::<E>(x, heads as usize, cos, sin, direction));
    } else if !cuda::kernels(x).is_some_and(|kernels| kernels.rope(x, heads, cos, sin, direction)) {
        torch::rotate(x, heads, cos, sin, direction);
    }
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    pub fn rotate<E: Element>(x: &Tensor, heads: usize, cos: &Tensor, sin: &Tensor, direction: f64) {
        let (cos, sin) = (Rows::of(cos), Rows::of(sin));
        let (half, direction) = (cos.columns(), E::Accum::of(direction));
        each_row::<E, _, _, _>(
            [],
            [Rows::of(x)],
            [cos, sin],
            #[inline(always)]
            |_, [], [row], [cos, sin]| {
                for head in row[..heads * 2 * half].chunks_exact_mut(2 * half) {
                    let (first, second) = head.split_at_mut(half);
                    rotate_head(first, second, cos, sin, direction);
                }
            },
        );
    }

    #[inline(always)]
    fn rotate_head<E: Element>(
        first: &mut [E],
        second: &mut [E],
        cos: &[E::Accum],
        sin: &[E::Accum],
        direction: E::Accum,
    ) {
        for (((first, second), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (a, b, sin) = (first.to_accum(), second.to_accum(), sin * direction);
            *first = E::narrow(a * cos - b * sin);
            *second = E::narrow(b * cos + a * sin);
        }
    }
}

/// The same in libtorch's operations, for tensors that no kernel takes.
mod torch {
    use super::*;

    pub fn rotate(x: &Tensor, heads: i64, cos: &Tensor, sin: &Tensor, direction: f64) {
        let (tokens, half) = (x.size()[0], cos.size()[2]);
        let x = x.narrow(1, 0, heads * 2 * half).view([tokens, heads, 2 * half]);
        let (mut first, mut second) = (x.narrow(2, 0, half), x.narrow(2, half, half));
        let (a, b, sin) = (first.to_kind(cos.kind()), second.to_kind(cos.kind()), sin * direction);
        // Both before one is written: where the kinds are the same, a and b are what is written to.
        let (y1, y2) = (&a * cos - &b * &sin, &b * cos + &a * &sin);
        first.copy_(&y1);
        second.copy_(&y2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{KINDS, autograd, distance, everywhere, leaf};

    #[test]
    fn matches_autograd() {
        let kernels = cuda::on_host::kernels();
        for (kind, tolerance) in KINDS {
            for (tokens, heads, dim) in [(5, 3, 8), (1, 1, 6), (0, 2, 4), (300, 5, 64), (7, 2, 128)] {
                // Two heads of v follow, which stay as they are.
                let rounded = |t: &Tensor| t.detach().to_kind(kind).to_kind(Kind::Double);
                let shape = [tokens, heads + 2, dim];
                let x = rounded(&leaf(&shape)).set_requires_grad(true);
                let d_y = rounded(&leaf(&shape));
                let wide = if kind == Kind::Double { kind } else { Kind::Float };
                let angles = Tensor::randn([tokens, 1, dim / 2], (wide, Device::Cpu)) * 3.0;
                let (cos, sin) = (angles.cos(), angles.sin());
                let part = x.narrow(1, 0, heads);
                let (a, b) = (part.narrow(2, 0, dim / 2), part.narrow(2, dim / 2, dim / 2));
                let twice = |t: &Tensor| Tensor::cat(&[t, t], 2).to_kind(Kind::Double);
                let rotated = &part * twice(&cos) + Tensor::cat(&[-b, a], 2) * twice(&sin);
                let y = Tensor::cat(&[rotated, x.narrow(1, heads, 2)], 1);
                let expected = autograd(&y, &d_y, &[&x]).remove(0);
                let near = |ours: &Tensor, exact: &Tensor| {
                    let off = distance(&ours.view(shape), exact);
                    assert!(off < tolerance * 5.0, "{kind:?} {shape:?}: {off}");
                };
                let flat = |t: &Tensor| t.detach().to_kind(kind).copy().view([tokens, (heads + 2) * dim]);
                everywhere(|| {
                    let (ours, d) = (flat(&x), flat(&d_y));
                    forward(&ours, heads, &cos, &sin);
                    backward(&d, heads, &cos, &sin);
                    near(&ours, &y);
                    near(&d, &expected);
                });
                let (ours, d) = (flat(&x), flat(&d_y));
                torch::rotate(&ours, heads, &cos, &sin, 1.0);
                torch::rotate(&d, heads, &cos, &sin, -1.0);
                near(&ours, &y);
                near(&d, &expected);
                let (ours, d) = (flat(&x), flat(&d_y));
                let taken = kernels.rope(&ours, heads, &cos, &sin, 1.0);
                assert_eq!(taken, kind != Kind::Double && dim % 16 == 0);
                if taken {
                    assert!(kernels.rope(&d, heads, &cos, &sin, -1.0));
                    near(&ours, &y);
                    near(&d, &expected);
                }
            }
        }
    }
}
