//! A frozen linear layer with LoRA adapters on slices of its output (Hu et al., 2021).
//!
//! forward   h = x·Aᵀ,  y = x·W₀ᵀ + bias,  y[:, part] += s · h_part·B_partᵀ
//! backward  g_part = s · dy[:, part]·B_part,  dx = dy·W₀ + g·A,  dA += gᵀ·x,  dB_part += s · dy[:, part]ᵀ·h_part
//!
//! A is [Σ rank, in], the A's of all parts one below the other, so that one thin GEMM serves q, k and v. The
//! frozen weight has no gradient. Parameter gradients are added in fp32.

use std::ops::Range;
use tch::{Kind, Tensor};

/// Frozen weight [out, in] and bias `[out]`, in compute dtype.
pub struct Base {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// One logical adapter on output columns `out`.
pub struct Part {
    /// Columns of the output that it adds to.
    pub out: Range<i64>,
    /// Its rows of A.
    pub ranks: Range<i64>,
    /// B [out, rank].
    pub b: Tensor,
}

/// The adapters of one linear layer, gathered, in compute dtype.
pub struct Adapter {
    /// [Σ rank, in]
    pub a: Tensor,
    pub parts: Vec<Part>,
    /// alpha / rank
    pub scaling: f64,
}

/// Where the adapters' gradients are added: fp32 views of A's shape and of each B's.
pub struct AdapterGradient {
    pub a: Tensor,
    pub b: Vec<Tensor>,
}

/// y `[tokens, out]` from x `[tokens, in]`, written to `out`; returns h `[tokens, Σ rank]` when there is an adapter.
/// `bases` are the frozen layers whose outputs lie side by side in `out`: one, or the split parts of a projection.
pub fn forward(x: &Tensor, bases: &[Base], adapter: Option<&Adapter>, out: &Tensor) -> Option<Tensor> {
    let _span = crate::trace::operation("linear.forward");
    for (base, range) in with_columns(bases) {
        let mut out = columns(out, &range);
        match &base.bias {
            Some(bias) => out.copy_(&bias.addmm(x, &base.weight.tr())),
            None if bases.len() == 1 => {
                let _ = x.mm_out(&out, &base.weight.tr());
            }
            None => out.copy_(&x.mm(&base.weight.tr())),
        }
    }
    let adapter = adapter?;
    let h = x.mm(&adapter.a.tr());
    for part in &adapter.parts {
        let mut slice = columns(out, &part.out);
        let scaled = columns(&h, &part.ranks) * adapter.scaling;
        let _ = slice.addmm_(&scaled, &part.b.tr());
    }
    Some(h)
}

/// dx `[tokens, in]` from dy `[tokens, out]`, with the saved x and h; adds the adapter's gradients.
pub fn backward(
    d_y: &Tensor,
    x: &Tensor,
    h: Option<&Tensor>,
    bases: &[Base],
    adapter: Option<(&Adapter, &AdapterGradient)>,
) -> Tensor {
    let _span = crate::trace::operation("linear.backward");
    let mut d_x = Tensor::empty(x.size(), (x.kind(), x.device()));
    for (i, (base, range)) in with_columns(bases).enumerate() {
        let d_part = columns(d_y, &range);
        if i == 0 {
            let _ = d_part.mm_out(&d_x, &base.weight);
        } else {
            let _ = d_x.addmm_(&d_part, &base.weight);
        }
    }
    let (Some((adapter, gradient)), Some(h)) = (adapter, h) else { return d_x };
    let g = h.empty_like();
    for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
        let d_part = columns(d_y, &part.out) * adapter.scaling;
        columns(&g, &part.ranks).copy_(&d_part.mm(&part.b));
        add_product(d_b, &d_part.tr(), &columns(h, &part.ranks));
    }
    add_product(&gradient.a, &g.tr(), x);
    let _ = d_x.addmm_(&g, &adapter.a);
    d_x
}

/// Each base with its output columns.
fn with_columns(bases: &[Base]) -> impl Iterator<Item = (&Base, Range<i64>)> {
    bases.iter().scan(0, |end, base| {
        let start = *end;
        *end += base.weight.size()[0];
        Some((base, start..*end))
    })
}

fn columns(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(1, range.start, range.end - range.start)
}

/// sum += a·b, where the sum is fp32 (or fp64) and a, b are in compute dtype.
fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) {
    let mut sum = sum.shallow_clone();
    if a.kind() == sum.kind() {
        let _ = sum.addmm_(a, b);
    } else {
        let _ = sum.g_add_(&a.mm(b).to_kind(Kind::Float));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};

    #[test]
    fn matches_autograd() {
        // q and v of a fused q|k|v of widths 4, 3, 3, with ranks 2 and 3; k has no adapter.
        for tokens in [0i64, 1, 5] {
            let (x, w, bias) = (leaf(&[tokens, 6]), leaf(&[10, 6]), leaf(&[10]));
            let (a, b_q, b_v) = (leaf(&[5, 6]), leaf(&[4, 2]), leaf(&[3, 3]));
            let d_y = leaf(&[tokens, 10]).detach();
            let h = x.matmul(&a.tr());
            let q = h.narrow(1, 0, 2).matmul(&b_q.tr()) * 0.5;
            let v = h.narrow(1, 2, 3).matmul(&b_v.tr()) * 0.5;
            let k = Tensor::zeros([tokens, 3], (Kind::Double, x.device()));
            let reference = x.matmul(&w.tr()) + &bias + Tensor::cat(&[q, k, v], 1);
            let expected = autograd(&reference, &d_y, &[&x, &a, &b_q, &b_v]);

            let _guard = tch::no_grad_guard();
            let (w, bias) = (w.detach(), bias.detach());
            let rows = |from, n| Base { weight: w.narrow(0, from, n), bias: Some(bias.narrow(0, from, n)) };
            let parts = vec![
                Part { out: 0..4, ranks: 0..2, b: b_q.detach() },
                Part { out: 7..10, ranks: 2..5, b: b_v.detach() },
            ];
            let adapter = Adapter { a: a.detach(), parts, scaling: 0.5 };
            for bases in [vec![rows(0, 10)], vec![rows(0, 4), rows(4, 3), rows(7, 3)]] {
                let gradient =
                    AdapterGradient { a: a.zeros_like(), b: vec![b_q.zeros_like(), b_v.zeros_like()] };
                let y = Tensor::zeros([tokens, 10], (Kind::Double, x.device()));
                let h = forward(&x.detach(), &bases, Some(&adapter), &y);
                assert!(distance(&y, &reference) < 1e-12);
                let d_x = backward(&d_y, &x.detach(), h.as_ref(), &bases, Some((&adapter, &gradient)));
                let ours = [&d_x, &gradient.a, &gradient.b[0], &gradient.b[1]];
                for (ours, theirs) in ours.into_iter().zip(&expected) {
                    assert!(distance(ours, theirs) < 1e-12, "{}", distance(ours, theirs));
                }
            }
        }
    }
}
