//! RMSNorm (Zhang & Sennrich, 2019), as transformers computes it: statistics in fp32, weights in fp32.
//!
//! forward   r = (mean(x²) + eps)^-½,  y = w ∘ x · r
//! backward  dx = r · (w∘dy) − x · r³/n · Σ(w∘dy∘x)

use tch::{Kind, Tensor};

/// Kind in which statistics are taken: fp32, or fp64 for fp64 inputs (tests).
fn wide(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Normalises the last dimension of x [..., n] with weight w `[n]`; returns y in x's dtype and r [..., 1] fp32.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let _span = crate::trace::operation("norm.forward");
    let wide_x = x.to_kind(wide(x));
    let r = (wide_x.square().mean_dim(-1, true, None) + eps).rsqrt();
    (normalised(&wide_x, weight, &r).to_kind(x.kind()), r)
}

/// y again from saved x and r, for a backward that did not keep it.
pub fn recompute(x: &Tensor, weight: &Tensor, r: &Tensor) -> Tensor {
    let _span = crate::trace::operation("norm.recompute");
    normalised(&x.to_kind(wide(x)), weight, r).to_kind(x.kind())
}

fn normalised(wide_x: &Tensor, weight: &Tensor, r: &Tensor) -> Tensor {
    (wide_x * r).g_mul_(weight)
}

/// dx from dy [..., n] and saved x, r.
pub fn backward(d_y: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor) -> Tensor {
    let _span = crate::trace::operation("norm.backward");
    let kind = wide(x);
    let (wide_x, g) = (x.to_kind(kind), d_y.to_kind(kind) * weight);
    let n = x.size().last().copied().unwrap_or(1) as f64;
    let dot = (&g * &wide_x).sum_dim_intlist(-1, true, None);
    let c = r.pow_tensor_scalar(3) * dot / n;
    (g.g_mul(r) - wide_x * c).to_kind(x.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    #[test]
    fn matches_autograd() {
        for shape in [[1i64, 7], [5, 33], [0, 4]] {
            let (x, w, d_y) = (leaf(&shape), leaf(&[shape[1]]), leaf(&shape).detach());
            let reference = &x * (x.square().mean_dim(-1, true, None) + 1e-5).rsqrt() * &w;
            let expected = autograd(&reference, &d_y, &[&x]);
            let (y, r) = tch::no_grad(|| forward(&x, &w, 1e-5));
            assert!(distance(&y, &reference) < 1e-12);
            let d_x = tch::no_grad(|| backward(&d_y, &x, &w, &r));
            assert!(distance(&d_x, &expected[0]) < 1e-11, "{}", distance(&d_x, &expected[0]));
            assert!(distance(&tch::no_grad(|| recompute(&x, &w, &r)), &y) == 0.0);
        }
    }
}
