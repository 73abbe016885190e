//! Rotary position embedding (Su et al., 2021) in the half-split layout of HF models.
//!
//! forward   y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin   with a head's first `rotary` columns x = [x₁ | x₂]
//! backward  the rotation by the opposite angle
//!
//! Columns of a head beyond `rotary` stay as they are (partial rotary).

use super::{
    cpu::{Element, Real, Rows, dispatch, each_row},
    cuda,
};
use crate::device::has_kernels;
use tch::{Device, Kind, Tensor};

/// cos and sin of every position up to a length, times the attention factor: `[positions, rotary / 2]` fp32.
pub struct RopeTable {
    inv_freq: Tensor,
    attention_factor: f64,
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// A table that grows with the longest document seen. `inv_freq` `[rotary / 2]` in radians per position.
    /// cos and sin are multiplied by `attention_factor`.
    pub fn new(inv_freq: &[f32], attention_factor: f64, device: Device) -> Self {
        let empty = Tensor::zeros([0, inv_freq.len() as i64], (Kind::Float, device));
        let inv_freq = Tensor::from_slice(inv_freq).to_device(device);
        Self { inv_freq, attention_factor, cos: empty.copy(), sin: empty }
    }

    /// cos and sin of `positions` `[tokens]` i64, all below `length`: each `[tokens, 1, rotary / 2]`.
    pub fn at(&mut self, positions: &Tensor, length: usize) -> (Tensor, Tensor) {
        if (self.cos.size()[0] as usize) < length {
            let steps = Tensor::arange(length as i64, (Kind::Float, self.inv_freq.device()));
            let angles = steps.outer(&self.inv_freq);
            let scaled = |table: Tensor| table * self.attention_factor;
            (self.cos, self.sin) = (scaled(angles.cos()), scaled(angles.sin()));
        }
        (self.cos.index_select(0, positions).unsqueeze(1), self.sin.index_select(0, positions).unsqueeze(1))
    }
}

/// The leading heads of a row that are rotated: q and k of q|k|v.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotated {
    pub heads: i64,
    /// Width of a head; its first `rotary` columns are rotated, as many as cos and sin have angles twice.
    pub dim: i64,
}

/// Rotates the leading heads of each row of `qkv` `[tokens, columns]`, in place. cos and sin `[tokens, 1, rotary / 2]`
/// are fp32, or fp64 for fp64 rows (tests).
pub fn forward(qkv: &Tensor, rotated: Rotated, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.forward");
    rotate(qkv, rotated, cos, sin, 1.0);
}

/// Backward of [`forward`], in place.
pub fn backward(d_qkv: &Tensor, rotated: Rotated, cos: &Tensor, sin: &Tensor) {
    let _span = crate::trace::operation("rope.backward");
    rotate(d_qkv, rotated, cos, sin, -1.0);
}

/// Rotates by `direction` (1 or −1) times the angles.
fn rotate(x: &Tensor, rotated: Rotated, cos: &Tensor, sin: &Tensor, direction: f64) {
    if has_kernels(x) {
        dispatch!(x.kind(), E => rows::rotate::<E>(x, rotated, cos, sin, direction));
    } else if !cuda::kernels(x).is_some_and(|kernels| kernels.rope(x, rotated, cos, sin, direction)) {
        torch::rotate(x, rotated, cos, sin, direction);
    }
}

/// Kernels over the rows of host tensors.
mod rows {
    use super::*;

    pub fn rotate<E: Element>(x: &Tensor, rotated: Rotated, cos: &Tensor, sin: &Tensor, direction: f64) {
        let (cos, sin) = (Rows::of(cos), Rows::of(sin));
        let (half, direction) = (cos.columns(), E::Accum::of(direction));
        let (heads, dim) = (rotated.heads as usize, rotated.dim as usize);
        each_row::<E, _, _, _>(
            [],
            [Rows::of(x)],
            [cos, sin],
            #[inline(always)]
            |_, [], [row], [cos, sin]| {
                for head in row[..heads * dim].chunks_exact_mut(dim) {
                    let (first, second) = head[..2 * half].split_at_mut(half);
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

    pub fn rotate(x: &Tensor, Rotated { heads, dim }: Rotated, cos: &Tensor, sin: &Tensor, direction: f64) {
        let half = cos.size()[2];
        let x = x.narrow(1, 0, heads * dim).unflatten(1, [heads, dim]);
        let (mut first, mut second) = (x.narrow(2, 0, half), x.narrow(2, half, half));
        let (a, b, sin) = (first.to_kind(cos.kind()), second.to_kind(cos.kind()), sin * direction);
        // Computed before either is written: where the kinds are the same, a and b are views of x.
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
            for (tokens, heads, dim, rotary) in [
                (5, 3, 8, 8),
                (1, 1, 6, 6),
                (0, 2, 4, 4),
                (300, 5, 64, 64),
                (7, 2, 128, 128),
                // Partial rotary.
                (9, 3, 64, 32),
                (4, 2, 24, 6),
            ] {
                // Two heads of v follow, which stay as they are.
                let rounded = |t: &Tensor| t.detach().to_kind(kind).to_kind(Kind::Double);
                let shape = [tokens, heads + 2, dim];
                let x = rounded(&leaf(&shape)).set_requires_grad(true);
                let d_y = rounded(&leaf(&shape));
                let wide = if kind == Kind::Double { kind } else { Kind::Float };
                let half = rotary / 2;
                let angles = Tensor::randn([tokens, 1, half], (wide, Device::Cpu)) * 3.0;
                let (cos, sin) = (angles.cos(), angles.sin());
                let (part, rest) = (
                    x.narrow(1, 0, heads).narrow(2, 0, rotary),
                    x.narrow(1, 0, heads).slice(2, rotary, None, 1),
                );
                let (a, b) = (part.narrow(2, 0, half), part.narrow(2, half, half));
                let twice = |t: &Tensor| Tensor::cat(&[t, t], 2).to_kind(Kind::Double);
                let turned = &part * twice(&cos) + Tensor::cat(&[-b, a], 2) * twice(&sin);
                let y = Tensor::cat(&[Tensor::cat(&[turned, rest], 2), x.narrow(1, heads, 2)], 1);
                let rotated = Rotated { heads, dim };
                let expected = autograd(&y, &d_y, &[&x]).remove(0);
                let near = |ours: &Tensor, exact: &Tensor| {
                    let off = distance(&ours.view(shape), exact);
                    assert!(off < tolerance * 5.0, "{kind:?} {shape:?}: {off}");
                };
                let flat = |t: &Tensor| t.detach().to_kind(kind).copy().view([tokens, (heads + 2) * dim]);
                everywhere(|| {
                    let (ours, d) = (flat(&x), flat(&d_y));
                    forward(&ours, rotated, &cos, &sin);
                    backward(&d, rotated, &cos, &sin);
                    near(&ours, &y);
                    near(&d, &expected);
                });
                let (ours, d) = (flat(&x), flat(&d_y));
                torch::rotate(&ours, rotated, &cos, &sin, 1.0);
                torch::rotate(&d, rotated, &cos, &sin, -1.0);
                near(&ours, &y);
                near(&d, &expected);
                let (ours, d) = (flat(&x), flat(&d_y));
                let taken = kernels.rope(&ours, rotated, &cos, &sin, 1.0);
                assert_eq!(taken, kind != Kind::Double && rotary % 16 == 0 && dim % 8 == 0);
                if taken {
                    assert!(kernels.rope(&d, rotated, &cos, &sin, -1.0));
                    near(&ours, &y);
                    near(&d, &expected);
                }
            }
        }
    }
}
