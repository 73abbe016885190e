//! A frozen linear layer with LoRA adapters on slices of its output (Hu et al., 2021).
//!
//! forward   h = s · x·Aᵀ,  y = x·W₀ᵀ + bias,  y[:, part] += h_part·B_partᵀ
//! backward  g_part = s · dy[:, part]·B_part,  dx = dy·W₀ + g·A,  dA += gᵀ·x,  dB_part += dy[:, part]ᵀ·h_part
//!
//! A is [Σ rank, in], the A's of all parts one below the other, so that one thin GEMM serves q, k and v. The
//! frozen weight has no gradient. Parameter gradients are added in fp32.

use super::Buffer;
use std::ops::Range;
use tch::Tensor;

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

/// y `[tokens, out]` from x `[tokens, in]`, plus `add` `[tokens, out]` (the residual branch), written to `out`; returns s·h
/// `[tokens, Σ rank]` when there is an adapter. `bases` are the frozen layers whose outputs lie side by side in `out`: one,
/// or the split parts of a projection.
pub fn forward(
    x: &Tensor,
    bases: &[Base],
    adapter: Option<&Adapter>,
    add: Option<&Tensor>,
    out: &Tensor,
) -> Option<Buffer> {
    let _span = crate::trace::operation("linear.forward");
    for (base, range) in with_columns(bases) {
        let mut out = columns(out, &range);
        let weight = base.weight.tr();
        // The sum starts from what is added, so that it costs no pass of its own and no rounding.
        let start =
            add.map(|add| columns(add, &range)).or_else(|| base.bias.as_ref().map(Tensor::shallow_clone));
        let _ = match start {
            Some(start) => start.addmm_out(&out, x, &weight),
            None => x.mm_out(&out, &weight),
        };
        if let (Some(_), Some(bias)) = (add, &base.bias) {
            let _ = out.g_add_(bias);
        }
    }
    let adapter = adapter?;
    let h = thin(x, adapter);
    for part in &adapter.parts {
        let _ = columns(out, &part.out).addmm_(&columns(&h, &part.ranks), &part.b.tr());
    }
    Some(h)
}

/// The adapters' part of a backward: see [`backward_parameters`].
pub struct ThinGradient(Option<Buffer>);

/// dx `[tokens, in]` from dy `[tokens, out]`, and g for [`backward_parameters`].
pub fn backward_input(d_y: &Tensor, bases: &[Base], adapter: Option<&Adapter>) -> (Buffer, ThinGradient) {
    let _span = crate::trace::operation("linear.backward_input");
    let input = bases.first().map_or(0, |base| base.weight.size()[1]);
    let mut d_x = Buffer::empty(&[d_y.size()[0], input], d_y.kind(), d_y.device());
    for (i, (base, range)) in with_columns(bases).enumerate() {
        let d_part = columns(d_y, &range);
        let _ = if i == 0 { d_part.mm_out(&d_x, &base.weight) } else { d_x.addmm_(&d_part, &base.weight) };
    }
    let Some(adapter) = adapter else { return (d_x, ThinGradient(None)) };
    let mut g = Buffer::empty(&[d_y.size()[0], adapter.a.size()[0]], d_y.kind(), d_y.device());
    for part in &adapter.parts {
        let _ = columns(d_y, &part.out).mm_out(&columns(&g, &part.ranks), &part.b);
    }
    let _ = g.g_mul_scalar_(adapter.scaling);
    let _ = d_x.addmm_(&g, &adapter.a);
    (d_x, ThinGradient(Some(g)))
}

/// Adds the adapters' gradients from dy, x, what [`forward`] returned and what [`backward_input`] did. Apart from that
/// because x may become known only with dx, as SwiGLU's output does.
pub fn backward_parameters(
    d_y: &Tensor,
    x: &Tensor,
    h: Option<&Tensor>,
    ThinGradient(g): &ThinGradient,
    adapter: Option<(&Adapter, &AdapterGradient)>,
) {
    let _span = crate::trace::operation("linear.backward_parameters");
    let (Some((adapter, gradient)), Some(h), Some(g)) = (adapter, h, g) else { return };
    for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
        add_product(d_b, &columns(d_y, &part.out).tr(), &columns(h, &part.ranks));
    }
    add_product(&gradient.a, &g.tr(), x);
}

/// s·h `[tokens, Σ rank]` again, for a backward that did not keep it.
pub fn thin(x: &Tensor, adapter: &Adapter) -> Buffer {
    let mut h = Buffer::empty(&[x.size()[0], adapter.a.size()[0]], x.kind(), x.device());
    let _ = x.mm_out(&h, &adapter.a.tr());
    let _ = h.g_mul_scalar_(adapter.scaling);
    h
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
        let _ = sum.g_add_(&a.mm(b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{autograd, distance, leaf};
    use tch::Kind;

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
            let add = leaf(&[tokens, 10]).detach();
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
                let x = x.detach();
                forward(&x, &bases, Some(&adapter), Some(&add), &y);
                assert!(distance(&y, &(&reference + &add)) < 1e-12);
                let h = forward(&x, &bases, Some(&adapter), None, &y);
                assert!(distance(&y, &reference) < 1e-12);
                let (d_x, g) = backward_input(&d_y, &bases, Some(&adapter));
                backward_parameters(&d_y, &x, h.as_deref(), &g, Some((&adapter, &gradient)));
                let ours = [&*d_x, &gradient.a, &gradient.b[0], &gradient.b[1]];
                for (ours, theirs) in ours.into_iter().zip(&expected) {
                    assert!(distance(ours, theirs) < 1e-12, "{}", distance(ours, theirs));
                }
            }
        }
    }
}
