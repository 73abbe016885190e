//! Frozen linear layers with LoRA adapters on slices of their output (Hu et al., 2021): one that all rows go through, or
//! one for each group of rows, as routed experts are.
//!
//! forward   h = s · x·Aᵀ,  y = x·W₀ᵀ + bias,  y[:, part] += h_part·B_partᵀ
//! backward  g_part = s · dy[:, part]·B_part,  dx = dy·W₀ + g·A,  dA += gᵀ·x,  dB_part += dy[:, part]ᵀ·h_part
//!
//! A is [Σ rank, in], the A's of all parts one below the other, so that one thin GEMM serves q, k and v. The
//! frozen weight has no gradient. Parameter gradients are added in fp32.
//!
//! The groups are slices of the same tensors, one GEMM each: nothing is padded or copied, and a group without rows costs
//! nothing. CPUs with tile registers compute bf16 by products of our own (`tiled.rs`), devices that have grouped GEMMs by those
//! (`grouped.rs`); everything else is libtorch's products, of which a grouped one was measured no faster on a CPU.

mod grouped;
#[cfg(any(test, target_arch = "x86_64"))]
mod tiled;

use super::Buffer;
use crate::device::has_grouped_gemm;
use grouped::Stacked;
use std::ops::Range;
use tch::{Device, Tensor};
#[cfg(any(test, target_arch = "x86_64"))]
use tiled::Tiled;

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

/// A linear layer. `bases` are the frozen ones whose outputs lie side by side in its own: one, or the split parts of a
/// projection.
pub struct Linear {
    pub bases: Vec<Base>,
    pub adapter: Option<(Adapter, AdapterGradient)>,
}

impl Linear {
    /// Width of the output.
    pub fn output(&self) -> i64 {
        self.bases.iter().map(|base| base.weight.size()[0]).sum()
    }

    /// Width of the input.
    pub fn input(&self) -> i64 {
        self.bases.first().map_or(0, |base| base.weight.size()[1])
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|(adapter, _)| adapter)
    }
}

/// Which rows are whose: group i has rows `borders[i]..borders[i + 1]`, and all rows are some group's.
#[derive(Debug)]
pub struct Groups {
    borders: Vec<i64>,
    /// For a device that computes all at once.
    at_once: Option<AtOnce>,
}

/// Groups as a device is told of them.
#[derive(Debug)]
struct AtOnce {
    /// Where each group ends: `[groups]` i32.
    ends: Tensor,
    /// The groups without rows, if there are any: i64.
    empty: Option<Tensor>,
}

impl AtOnce {
    fn new(borders: &[i64], device: Device) -> Self {
        let ends: Vec<i32> = borders[1..].iter().map(|&end| end as i32).collect();
        let without = (0..).zip(borders.windows(2)).filter(|(_, pair)| pair[0] == pair[1]);
        let empty: Vec<i64> = without.map(|(group, _)| group).collect();
        Self {
            ends: Tensor::from_slice(&ends).to_device(device),
            empty: (!empty.is_empty()).then(|| Tensor::from_slice(&empty).to_device(device)),
        }
    }

    fn share(&self) -> Self {
        Self { ends: self.ends.shallow_clone(), empty: self.empty.as_ref().map(Tensor::shallow_clone) }
    }
}

impl Groups {
    /// All of `rows` in one.
    pub fn one(rows: i64) -> Self {
        Self { borders: vec![0, rows], at_once: None }
    }

    /// Of rows on `device`.
    pub fn new(borders: Vec<i64>, device: Device) -> Self {
        let computes = device != Device::Cpu && has_grouped_gemm();
        Self { at_once: computes.then(|| AtOnce::new(&borders, device)), borders }
    }

    /// As a device computes them, on the CPU.
    #[cfg(test)]
    fn at_once(borders: Vec<i64>) -> Self {
        Self { at_once: Some(AtOnce::new(&borders, Device::Cpu)), borders }
    }

    /// The same once more.
    pub fn share(&self) -> Self {
        Self { borders: self.borders.clone(), at_once: self.at_once.as_ref().map(AtOnce::share) }
    }

    /// Where each group begins, and the end: `[groups + 1]`.
    pub fn borders(&self) -> &[i64] {
        &self.borders
    }
}

/// Layers with the rows that go through each: layer i computes group i. All have the same widths, and all have an adapter or
/// none has.
#[derive(Clone, Copy)]
pub struct Layers<'a> {
    pub layers: &'a [Linear],
    pub groups: &'a Groups,
}

impl<'a> Layers<'a> {
    /// Each layer that has rows, with them.
    fn with_rows(self) -> impl Iterator<Item = (&'a Linear, Range<i64>)> {
        let ranges = self.groups.borders.windows(2).map(|pair| pair[0]..pair[1]);
        self.layers.iter().zip(ranges).filter(|(_, rows)| !rows.is_empty())
    }

    /// Σ rank of the adapters of a layer.
    fn ranks(self) -> Option<i64> {
        self.layers.first()?.adapter().map(|adapter| adapter.a.size()[0])
    }

    /// `[rows, Σ rank]` beside `x`.
    fn thin_like(self, x: &Tensor) -> Option<Buffer> {
        self.ranks().map(|ranks| Buffer::empty(&[x.size()[0], ranks], x.kind(), x.device()))
    }
}

/// Whether groups of any numbers of rows cost alike. Where libtorch's GEMMs compute, each number of rows is a kernel that oneDNN
/// compiles and keeps.
pub fn takes_any_rows(x: &Tensor) -> bool {
    #[cfg(target_arch = "x86_64")]
    return tiled::registers(x).is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// y `[rows, out]` from x `[rows, in]`, plus `add` `[rows, out]` (the residual branch), and s·h `[rows, Σ rank]` where there
/// are adapters.
pub fn forward(x: &Tensor, layers: Layers, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
    let _span = crate::trace::operation("linear.forward");
    if let Some(stacked) = Stacked::of(x, layers) {
        return stacked.forward(x, add);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiled) = Tiled::of(x, layers) {
        return tiled.forward(x, add);
    }
    let width = layers.layers.first().map_or(0, Linear::output);
    let y = Buffer::empty(&[x.size()[0], width], x.kind(), x.device());
    for (layer, rows) in layers.with_rows() {
        let (x, y, add) = (rows_of(x, &rows), rows_of(&y, &rows), add.map(|add| rows_of(add, &rows)));
        for (base, range) in with_columns(&layer.bases) {
            let mut y = columns(&y, &range);
            let weight = base.weight.tr();
            // The sum starts from what is added, so that it costs no pass of its own and no rounding.
            let added = add.as_ref().map(|add| columns(add, &range));
            let _ = match added.or_else(|| base.bias.as_ref().map(Tensor::shallow_clone)) {
                Some(start) => start.addmm_out(&y, &x, &weight),
                None => x.mm_out(&y, &weight),
            };
            if let (Some(_), Some(bias)) = (&add, &base.bias) {
                let _ = y.g_add_(bias);
            }
        }
    }
    let h = thin(x, layers);
    if let Some(h) = &h {
        for (layer, rows) in layers.with_rows() {
            let (y, h) = (rows_of(&y, &rows), rows_of(h, &rows));
            for part in layer.adapter().iter().flat_map(|adapter| &adapter.parts) {
                let _ = columns(&y, &part.out).addmm_(&columns(&h, &part.ranks), &part.b.tr());
            }
        }
    }
    (y, h)
}

/// s·h `[rows, Σ rank]`; again, for a backward that did not keep it.
pub fn thin(x: &Tensor, layers: Layers) -> Option<Buffer> {
    if let Some(stacked) = Stacked::of(x, layers) {
        return stacked.thin(x);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiled) = Tiled::of(x, layers) {
        return tiled.thin(x);
    }
    let mut h = layers.thin_like(x)?;
    let mut scaling = 1.0;
    for (layer, rows) in layers.with_rows() {
        let Some(adapter) = layer.adapter() else { continue };
        let _ = rows_of(x, &rows).mm_out(&rows_of(&h, &rows), &adapter.a.tr());
        scaling = adapter.scaling;
    }
    let _ = h.g_mul_scalar_(scaling);
    Some(h)
}

/// The adapters' part of a backward: see [`backward_parameters`].
pub struct ThinGradient(Option<Buffer>);

/// dx `[rows, in]` from dy `[rows, out]`, and g for [`backward_parameters`].
pub fn backward_input(d_y: &Tensor, layers: Layers) -> (Buffer, ThinGradient) {
    let _span = crate::trace::operation("linear.backward_input");
    if let Some(stacked) = Stacked::of(d_y, layers) {
        return stacked.backward_input(d_y);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiled) = Tiled::of(d_y, layers) {
        return tiled.backward_input(d_y);
    }
    let input = layers.layers.first().map_or(0, Linear::input);
    let d_x = Buffer::empty(&[d_y.size()[0], input], d_y.kind(), d_y.device());
    let g = layers.thin_like(d_y);
    for (layer, rows) in layers.with_rows() {
        let (d_y, mut d_x) = (rows_of(d_y, &rows), rows_of(&d_x, &rows));
        for (i, (base, range)) in with_columns(&layer.bases).enumerate() {
            let d_part = columns(&d_y, &range);
            let _ =
                if i == 0 { d_part.mm_out(&d_x, &base.weight) } else { d_x.addmm_(&d_part, &base.weight) };
        }
        let (Some(adapter), Some(g)) = (layer.adapter(), &g) else { continue };
        let mut g = rows_of(g, &rows);
        for part in &adapter.parts {
            let _ = columns(&d_y, &part.out).mm_out(&columns(&g, &part.ranks), &part.b);
        }
        let _ = g.g_mul_scalar_(adapter.scaling);
        let _ = d_x.addmm_(&g, &adapter.a);
    }
    (d_x, ThinGradient(g))
}

/// Adds the adapters' gradients from dy, x, what [`forward`] returned and what [`backward_input`] did. Apart from that
/// because x may become known only with dx, as SwiGLU's output does.
pub fn backward_parameters(
    d_y: &Tensor,
    x: &Tensor,
    h: Option<&Tensor>,
    ThinGradient(g): &ThinGradient,
    layers: Layers,
) {
    let _span = crate::trace::operation("linear.backward_parameters");
    let (Some(h), Some(g)) = (h, g) else { return };
    if let Some(stacked) = Stacked::of(d_y, layers) {
        return stacked.backward_parameters(d_y, x, h, g);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(tiled) = Tiled::of(d_y, layers) {
        return tiled.backward_parameters(d_y, x, h, g);
    }
    for (layer, rows) in layers.with_rows() {
        let Some((adapter, gradient)) = &layer.adapter else { continue };
        let [d_y, x, h, g] = [d_y, x, h, g].map(|tensor| rows_of(tensor, &rows));
        for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
            add_product(d_b, &columns(&d_y, &part.out).tr(), &columns(&h, &part.ranks));
        }
        add_product(&gradient.a, &g.tr(), &x);
    }
}

/// Each base with its output columns.
fn with_columns(bases: &[Base]) -> impl Iterator<Item = (&Base, Range<i64>)> {
    bases.iter().scan(0, |end, base| {
        let start = *end;
        *end += base.weight.size()[0];
        Some((base, start..*end))
    })
}

fn rows_of(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(0, range.start, range.end - range.start)
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
    use crate::ops::{
        cpu::amx::Emulated,
        testing::{autograd, distance, leaf},
        wide,
    };
    use tch::Kind;

    /// What layers give and add to their gradients: y, s·h, the same again, dx.
    type Compute = fn(Layers, &Tensor, &Tensor, Option<&Tensor>) -> Vec<Tensor>;

    fn everything(layers: Layers, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
        let (y, h) = forward(x, layers, add);
        let (d_x, g) = backward_input(d_y, layers);
        backward_parameters(d_y, x, h.as_deref(), &g, layers);
        [y, h.unwrap(), thin(x, layers).unwrap(), d_x].map(|buffer| buffer.shallow_clone()).into()
    }

    /// The same in tiles, as a machine that has their registers computes.
    fn in_tiles(layers: Layers, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
        let tiled = Tiled { tiles: Emulated, layers };
        let (y, h) = tiled.forward(x, add);
        let h = h.unwrap();
        let (d_x, ThinGradient(g)) = tiled.backward_input(d_y);
        tiled.backward_parameters(d_y, x, &h, &g.unwrap());
        [y, h, tiled.thin(x).unwrap(), d_x].map(|buffer| buffer.shallow_clone()).into()
    }

    /// q and v of a fused q|k|v of widths 4, 3, 3, with ranks 2 and 3; k has no adapter. Numbers that bf16 has too.
    struct Exact {
        w: Tensor,
        bias: Tensor,
        a: Tensor,
        b: [Tensor; 2],
    }

    fn rounded(shape: &[i64]) -> Tensor {
        leaf(shape).detach().to_kind(Kind::BFloat16).to_kind(Kind::Double).set_requires_grad(true)
    }

    impl Exact {
        fn new() -> Self {
            let b = [rounded(&[4, 2]), rounded(&[3, 3])];
            Self { w: rounded(&[10, 6]), bias: rounded(&[10]), a: rounded(&[5, 6]), b }
        }

        fn thin(&self, x: &Tensor) -> Tensor {
            x.matmul(&self.a.tr()) * 0.5
        }

        fn forward(&self, x: &Tensor) -> Tensor {
            let h = self.thin(x);
            let q = h.narrow(1, 0, 2).matmul(&self.b[0].tr());
            let v = h.narrow(1, 2, 3).matmul(&self.b[1].tr());
            let k = Tensor::zeros([x.size()[0], 3], (Kind::Double, x.device()));
            x.matmul(&self.w.tr()) + &self.bias + Tensor::cat(&[q, k, v], 1)
        }

        fn leaves(&self) -> [&Tensor; 3] {
            [&self.a, &self.b[0], &self.b[1]]
        }

        /// Ours with the same values, its base whole or split.
        fn ours(&self, split: bool, kind: Kind) -> Linear {
            let [w, bias, a, b_q, b_v] = [&self.w, &self.bias, &self.a, &self.b[0], &self.b[1]]
                .map(|tensor| tensor.detach().to_kind(kind));
            let rows = |(from, n)| Base { weight: w.narrow(0, from, n), bias: Some(bias.narrow(0, from, n)) };
            let bases = if split { vec![(0, 4), (4, 3), (7, 3)] } else { vec![(0, 10)] };
            let sum = |of: &Tensor| Tensor::zeros(of.size(), (wide(kind), of.device()));
            let gradient = AdapterGradient { a: sum(&a), b: vec![sum(&b_q), sum(&b_v)] };
            let parts =
                vec![Part { out: 0..4, ranks: 0..2, b: b_q }, Part { out: 7..10, ranks: 2..5, b: b_v }];
            let adapter = Adapter { a, parts, scaling: 0.5 };
            Linear { bases: bases.into_iter().map(rows).collect(), adapter: Some((adapter, gradient)) }
        }
    }

    fn check(kind: Kind, tolerance: f64, compute: Compute) {
        // One layer for all rows, and groups of which some are empty.
        for borders in
            [vec![0, 0], vec![0, 1], vec![0, 5], vec![0, 2, 2, 7], vec![0, 0, 3, 4, 4], vec![0, 40, 75]]
        {
            let tokens = *borders.last().unwrap();
            let exact: Vec<Exact> = borders[1..].iter().map(|_| Exact::new()).collect();
            let (x, add) = (rounded(&[tokens, 6]), rounded(&[tokens, 10]).detach());
            let d_y = rounded(&[tokens, 10]).detach();
            let of_groups = |f: fn(&Exact, &Tensor) -> Tensor| {
                let part = |(layer, pair): (&Exact, &[i64])| f(layer, &rows_of(&x, &(pair[0]..pair[1])));
                let parts: Vec<Tensor> = exact.iter().zip(borders.windows(2)).map(part).collect();
                Tensor::cat(&parts, 0)
            };
            let (y, h) = (of_groups(Exact::forward), of_groups(Exact::thin));
            let leaves: Vec<&Tensor> =
                std::iter::once(&x).chain(exact.iter().flat_map(Exact::leaves)).collect();
            let gradients = autograd(&y, &d_y, &leaves);

            let _guard = tch::no_grad_guard();
            for (split, add) in [(false, None), (true, None), (false, Some(&add)), (true, Some(&add))] {
                let ours: Vec<Linear> = exact.iter().map(|layer| layer.ours(split, kind)).collect();
                let groups = Groups::new(borders.clone(), Device::Cpu);
                let layers = Layers { layers: &ours, groups: &groups };
                let [x, d_y] = [&x, &d_y].map(|tensor| tensor.detach().to_kind(kind));
                let in_kind = add.map(|add| add.to_kind(kind));
                let mut found = compute(layers, &x, &d_y, in_kind.as_ref());
                for (_, gradient) in ours.iter().filter_map(|layer| layer.adapter.as_ref()) {
                    found.extend(std::iter::once(&gradient.a).chain(&gradient.b).map(Tensor::shallow_clone));
                }
                let y = add.map_or_else(|| y.shallow_clone(), |add| &y + add);
                let expected = [&y, &h, &h].into_iter().chain(&gradients);
                assert_eq!(found.len(), 3 + gradients.len());
                for (i, (ours, theirs)) in found.iter().zip(expected).enumerate() {
                    let most = 1.0 + distance(theirs, &theirs.zeros_like());
                    let off = distance(ours, theirs) / most;
                    assert!(off <= tolerance, "{kind:?} {borders:?} {split}: {i} is {off} off");
                }
            }
        }
    }

    #[test]
    fn matches_autograd() {
        check(Kind::Double, 1e-12, everything);
        // A few roundings to bf16.
        check(Kind::BFloat16, 4.0 / 256.0, everything);
        check(Kind::BFloat16, 4.0 / 256.0, in_tiles);
    }

    #[test]
    fn layers_without_adapters_are_products_alone() {
        let _guard = tch::no_grad_guard();
        let [first, second] = [0, 1].map(|_| rounded(&[5, 6]).detach());
        let (x, d_y) = (rounded(&[7, 6]).detach(), rounded(&[7, 5]).detach());
        let (y, d_x) = {
            let halves = |of: &Tensor| (of.narrow(0, 0, 3), of.narrow(0, 3, 4));
            let ((x1, x2), (d1, d2)) = (halves(&x), halves(&d_y));
            let y = Tensor::cat(&[x1.matmul(&first.tr()), x2.matmul(&second.tr())], 0);
            (y, Tensor::cat(&[d1.matmul(&first), d2.matmul(&second)], 0))
        };
        let bf16 = |tensor: &Tensor| tensor.to_kind(Kind::BFloat16);
        let bare = |weight| Linear { bases: vec![Base { weight: bf16(weight), bias: None }], adapter: None };
        let (bare, groups) = ([bare(&first), bare(&second)], Groups::new(vec![0, 3, 7], Device::Cpu));
        let layers = Layers { layers: &bare, groups: &groups };
        let tiled = Tiled { tiles: Emulated, layers };
        let in_tiles = (tiled.forward(&bf16(&x), None), tiled.backward_input(&bf16(&d_y)));
        for ((found, h), (d_found, ThinGradient(g))) in
            [in_tiles, (forward(&bf16(&x), layers, None), backward_input(&bf16(&d_y), layers))]
        {
            assert!(h.is_none() && g.is_none());
            for (ours, theirs) in [(&found, &y), (&d_found, &d_x)] {
                let most = 1.0 + distance(theirs, &theirs.zeros_like());
                assert!(distance(ours, theirs) / most <= 1.0 / 256.0);
            }
        }
        assert!(tiled.thin(&bf16(&x)).is_none() && thin(&bf16(&x), layers).is_none());
    }

    #[test]
    fn groups_at_once_equal_one_after_the_other() {
        let _guard = tch::no_grad_guard();
        let bf16 = |shape: &[i64]| leaf(shape).detach().to_kind(Kind::BFloat16);
        let (input, out, ranks) = (32, 48, 24);
        for borders in [vec![0, 5, 5, 9, 32], vec![0, 0, 0, 1, 1], vec![0, 8, 16, 24, 32]] {
            let (groups, rows) = (borders.len() as i64 - 1, borders[borders.len() - 1]);
            for (shared_a, shared_b, split) in
                [(false, false, false), (true, false, false), (false, true, true), (true, true, false)]
            {
                // One more than there is, so that what lies between two is not what one takes.
                let several = |shared: bool, shape: [i64; 2]| {
                    let all = bf16(&[groups, shape[0] + 1, shape[1]]);
                    (0..groups).map(move |i| all.get(if shared { 0 } else { i }).narrow(0, 0, shape[0]))
                };
                let w: Vec<Tensor> = several(false, [out, input]).collect();
                let a: Vec<Tensor> = several(shared_a, [ranks, input]).collect();
                let b1: Vec<Tensor> = several(shared_b, [16, 8]).collect();
                let b2: Vec<Tensor> = several(false, [24, 16]).collect();
                let layers = || -> Vec<Linear> {
                    let sums = |of: &[Tensor], shared: bool| {
                        let size = of[0].size();
                        let all = Tensor::zeros([groups, size[0], size[1]], (Kind::Float, Device::Cpu));
                        (0..groups).map(move |i| all.get(if shared { 0 } else { i })).collect::<Vec<_>>()
                    };
                    let (d_a, d_b1, d_b2) = (sums(&a, shared_a), sums(&b1, shared_b), sums(&b2, false));
                    let layer = |i: usize| {
                        let base = |from, n| Base { weight: w[i].narrow(0, from, n), bias: None };
                        let bases = if split { vec![base(0, 16), base(16, 32)] } else { vec![base(0, out)] };
                        let part = |out: Range<i64>, ranks: Range<i64>, b: &Tensor| Part {
                            out,
                            ranks,
                            b: b.shallow_clone(),
                        };
                        // Eight columns between have no adapter.
                        let parts = vec![part(0..16, 0..8, &b1[i]), part(24..48, 8..24, &b2[i])];
                        let adapter = Adapter { a: a[i].shallow_clone(), parts, scaling: 0.5 };
                        let b = vec![d_b1[i].shallow_clone(), d_b2[i].shallow_clone()];
                        Linear {
                            bases,
                            adapter: Some((adapter, AdapterGradient { a: d_a[i].shallow_clone(), b })),
                        }
                    };
                    (0..groups as usize).map(layer).collect()
                };
                let (x, d_y, add) = (bf16(&[rows, input]), bf16(&[rows, out]), bf16(&[rows, out]));
                let run = |groups: &Groups| {
                    let layers = layers();
                    let all = Layers { layers: &layers, groups };
                    assert_eq!(Stacked::of(&x, all).is_some(), groups.at_once.is_some());
                    let mut found = everything(all, &x, &d_y, Some(&add));
                    for (_, gradient) in layers.iter().filter_map(|layer| layer.adapter.as_ref()) {
                        found.extend(std::iter::once(&gradient.a).chain(&gradient.b).map(Tensor::copy));
                    }
                    found
                };
                let (once, each) =
                    (run(&Groups::at_once(borders.clone())), run(&Groups::new(borders.clone(), Device::Cpu)));
                assert_eq!(once.len(), each.len());
                for (i, (once, each)) in once.iter().zip(&each).enumerate() {
                    let most = 1.0 + distance(each, &each.zeros_like());
                    let off = distance(once, each) / most;
                    // A few roundings of bf16, in another order.
                    assert!(off < 4.0 / 256.0, "{borders:?} {shared_a} {shared_b} {split}: {i} is {off} off");
                }
            }
        }
    }

    #[test]
    fn layers_that_are_no_stack_are_computed_one_after_the_other() {
        let layers = |widths: [i64; 3], apart: i64| -> Vec<Linear> {
            let all = Tensor::zeros([1000], (Kind::BFloat16, Device::Cpu));
            let weight =
                |(i, width): (usize, i64)| all.narrow(0, [0, 100, 200 + apart][i], 64).view([8, width]);
            let layer = |weight| Linear { bases: vec![Base { weight, bias: None }], adapter: None };
            widths.into_iter().enumerate().map(weight).map(layer).collect()
        };
        let x = Tensor::zeros([6, 8], (Kind::BFloat16, Device::Cpu));
        let groups = Groups::at_once(vec![0, 2, 4, 6]);
        let at_once =
            |layers: &[Linear], groups: &Groups| Stacked::of(&x, Layers { layers, groups }).is_some();
        // 100 is no multiple of 8 elements; then one lies elsewhere.
        assert!(!at_once(&layers([8; 3], 0), &groups));
        assert!(!at_once(&layers([8; 3], 8), &groups));
        assert!(!at_once(&layers([8; 3], 0)[..1], &groups));
        // As far apart as a stack's, but each for itself.
        let memory = vec![0u64; 3 * 16 + 2];
        let start = memory.as_ptr().addr().next_multiple_of(16) - memory.as_ptr().addr();
        let own = |i: usize| {
            // SAFETY: 128 bytes from there lie in the memory, which outlives them.
            let weight = unsafe {
                let first = memory.as_ptr().cast::<u8>().add(start + i * 128);
                Tensor::from_blob(first, &[8, 8], &[8, 1], Kind::BFloat16, Device::Cpu)
            };
            Linear { bases: vec![Base { weight, bias: None }], adapter: None }
        };
        assert!(!at_once(&[own(0), own(1), own(2)], &groups));
        let stack = Tensor::zeros([3, 8, 8], (Kind::BFloat16, Device::Cpu));
        let of_one = |i| Linear { bases: vec![Base { weight: stack.get(i), bias: None }], adapter: None };
        assert!(at_once(&[of_one(0), of_one(1), of_one(2)], &groups));
        // Four ranks: their activations' rows are too near each other.
        let with_ranks = |ranks: i64| -> Vec<Linear> {
            let a = Tensor::zeros([3, ranks, 8], (Kind::BFloat16, Device::Cpu));
            let b = Tensor::zeros([8, ranks], (Kind::BFloat16, Device::Cpu));
            let sums = |t: &Tensor| t.to_kind(Kind::Float);
            let (d_a, d_b) = (sums(&a), sums(&b));
            let layer = |i: i64| {
                let parts = vec![Part { out: 0..8, ranks: 0..ranks, b: b.shallow_clone() }];
                let adapter = Adapter { a: a.get(i), parts, scaling: 1.0 };
                let gradient = AdapterGradient { a: d_a.get(i), b: vec![d_b.shallow_clone()] };
                Linear { adapter: Some((adapter, gradient)), ..of_one(i) }
            };
            (0..3).map(layer).collect()
        };
        assert!(at_once(&with_ranks(8), &groups) && !at_once(&with_ranks(4), &groups));
    }
}
