//! SwiGLU (Shazeer, 2020) over the fused gate|up output, with the sigmoid in fp32.
//!
//! forward   s = g·σ(g),  y = s ∘ u
//! backward  du = dy ∘ s,  dg = dy ∘ u ∘ (σ(g) + s·(1 − σ(g)))

use tch::{Kind, Tensor};

fn halves(gate_up: &Tensor) -> (Tensor, Tensor) {
    let kind = if gate_up.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let n = gate_up.size()[1] / 2;
    (gate_up.narrow(1, 0, n).to_kind(kind), gate_up.narrow(1, n, n).to_kind(kind))
}

/// y [tokens, n] from gate|up [tokens, 2n].
pub fn forward(gate_up: &Tensor) -> Tensor {
    let _span = crate::trace::operation("swiglu.forward");
    let (gate, up) = halves(gate_up);
    gate.silu().g_mul_(&up).to_kind(gate_up.kind())
}

/// The gradient of gate|up [tokens, 2n] from dy [tokens, n].
pub fn backward(d_y: &Tensor, gate_up: &Tensor) -> Tensor {
    let _span = crate::trace::operation("swiglu.backward");
    let (gate, up) = halves(gate_up);
    let n = gate.size()[1];
    let d_y = d_y.to_kind(gate.kind());
    let sigmoid = gate.sigmoid();
    let silu = &gate * &sigmoid;
    let slope = &sigmoid + &silu * (1.0 - &sigmoid);
    let d_gate_up = gate_up.empty_like();
    d_gate_up.narrow(1, n, n).copy_(&(&d_y * silu));
    d_gate_up.narrow(1, 0, n).copy_(&(d_y * up * slope));
    d_gate_up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    #[test]
    fn matches_autograd() {
        for tokens in [0, 1, 6] {
            let (gate_up, d_y) = (leaf(&[tokens, 14]), leaf(&[tokens, 7]).detach());
            let reference = gate_up.narrow(1, 0, 7).silu() * gate_up.narrow(1, 7, 7);
            let expected = autograd(&reference, &d_y, &[&gate_up]);
            assert!(distance(&tch::no_grad(|| forward(&gate_up)), &reference) < 1e-12);
            assert!(distance(&tch::no_grad(|| backward(&d_y, &gate_up)), &expected[0]) < 1e-12);
        }
    }
}
