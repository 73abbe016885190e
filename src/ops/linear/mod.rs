//! Frozen linear layers with LoRA adapters on slices of their output (Hu et al., 2021): one that all rows go through, or
//! one for each group of rows, as routed experts are.
//!
//! forward   h = s · x·Aᵀ,  y = x·W₀ᵀ + bias,  y[:, part] += h_part·B_partᵀ
//! backward  g_part = s · dy[:, part]·B_part,  dx = dy·W₀ + g·A,  dA += gᵀ·x,  dB_part += dy[:, part]ᵀ·h_part
//!
//! A is [Σ rank, in], the A's of all parts one below the other, so that one thin GEMM serves q, k and v. The
//! frozen weight has no gradient. Parameter gradients are added in fp32.
//!
//! The groups are slices of the same tensors, and so are their matrices, one GEMM each: nothing is padded or copied, and a group
//! without rows costs nothing. CPUs with AMX or AVX512-BF16 compute bf16 by products of our own (`tiled.rs`), devices that have
//! grouped GEMMs by those (`grouped.rs`); everything else is libtorch's products, of which a grouped one was measured no faster
//! on a CPU.

mod grouped;
mod matrices;
mod segments;
mod tiled;

use super::Buffer;
use grouped::Grouped;
use std::ops::Range;
use tch::{Device, Tensor};
use tiled::Tiled;
pub use {
    matrices::Matrices,
    segments::{RowSegments, sizes},
};

/// Frozen weight [out, in] and bias `[out]`, in compute dtype. Where groups have their own weights, they share the bias.
pub struct Base {
    pub weight: Matrices,
    pub bias: Option<Tensor>,
}

/// One logical adapter on output columns `out`.
pub struct Part {
    /// Columns of the output that it adds to.
    pub out: Range<i64>,
    /// Its rows of A.
    pub ranks: Range<i64>,
    /// B [out, rank].
    pub b: Matrices,
}

/// The adapters of one linear layer, gathered, in compute dtype.
pub struct Adapter {
    /// [Σ rank, in]
    pub a: Matrices,
    pub parts: Vec<Part>,
    /// alpha / rank
    pub scaling: f64,
}

/// Where the adapters' gradients are added: fp32 views of A's shape and of each B's.
pub struct AdapterGradient {
    pub a: Matrices,
    pub b: Vec<Matrices>,
}

/// A linear layer, or as many of the same widths as there are groups. `bases` are the frozen ones whose outputs lie side by side in
/// its own: one, or the split parts of a projection.
pub struct Linear {
    pub bases: Vec<Base>,
    pub adapter: Option<(Adapter, AdapterGradient)>,
}

impl Linear {
    /// Width of the output.
    pub fn output(&self) -> i64 {
        self.bases.iter().map(|base| base.weight.rows()).sum()
    }

    /// Width of the input.
    pub fn input(&self) -> i64 {
        self.bases.first().map_or(0, |base| base.weight.columns())
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|(adapter, _)| adapter)
    }
}

/// GroupedLinear with the rows that go through each: the matrices of group i compute its rows.
#[derive(Clone, Copy)]
pub struct GroupedLinear<'a> {
    pub linear: &'a Linear,
    pub groups: &'a RowSegments,
}

impl<'a> GroupedLinear<'a> {
    /// Each group that has rows, with them.
    fn with_rows(self) -> impl Iterator<Item = (usize, Range<i64>)> {
        let ranges = self.groups.offsets().windows(2).map(|pair| pair[0]..pair[1]);
        ranges.enumerate().filter(|(_, rows)| !rows.is_empty())
    }

    /// Σ rank of the adapters of a layer.
    fn ranks(self) -> Option<i64> {
        self.linear.adapter().map(|adapter| adapter.a.rows())
    }

    /// `[rows, Σ rank]` beside `x`.
    fn lora_hidden_like(self, x: &Tensor) -> Option<Buffer> {
        self.ranks().map(|ranks| Buffer::empty(&[x.size()[0], ranks], x.kind(), x.device()))
    }
}

/// Whether groups of any numbers of rows cost alike. Where libtorch's GEMMs compute on a CPU, each number of rows is a kernel that
/// oneDNN compiles and keeps; where they compute groups of few rows alone, these are few.
pub fn takes_any_rows(x: &Tensor) -> bool {
    x.device() != Device::Cpu || tiled::multiplier(x).is_some()
}

/// y `[rows, out]` from x `[rows, in]`, plus `add` `[rows, out]` (the residual branch), and s·h `[rows, Σ rank]` where there
/// are adapters.
pub fn forward(x: &Tensor, layers: GroupedLinear, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
    let _span = crate::trace::operation("linear.forward");
    if let Some(grouped) = Grouped::of(x, layers) {
        return grouped.forward(x, add);
    }
    if let Some(tiled) = Tiled::of(x, layers) {
        return tiled.forward(x, add);
    }
    let Linear { bases, adapter } = layers.linear;
    let y = Buffer::empty(&[x.size()[0], layers.linear.output()], x.kind(), x.device());
    for (group, rows) in layers.with_rows() {
        let (x, y, add) = (rows_of(x, &rows), rows_of(&y, &rows), add.map(|add| rows_of(add, &rows)));
        for (base, range) in with_columns(bases) {
            let mut y = columns(&y, &range);
            let weight = base.weight.of(group).tr();
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
    let h = lora_hidden(x, layers);
    if let (Some(h), Some((adapter, _))) = (&h, adapter) {
        for (group, rows) in layers.with_rows() {
            let (y, h) = (rows_of(&y, &rows), rows_of(h, &rows));
            for part in &adapter.parts {
                let _ = columns(&y, &part.out).addmm_(&columns(&h, &part.ranks), &part.b.of(group).tr());
            }
        }
    }
    (y, h)
}

/// s·h `[rows, Σ rank]`; again, for a backward that did not keep it.
pub fn lora_hidden(x: &Tensor, layers: GroupedLinear) -> Option<Buffer> {
    if let Some(grouped) = Grouped::of(x, layers) {
        return grouped.lora_hidden(x);
    }
    if let Some(tiled) = Tiled::of(x, layers) {
        return tiled.lora_hidden(x);
    }
    let (adapter, mut h) = layers.linear.adapter().zip(layers.lora_hidden_like(x))?;
    for (group, rows) in layers.with_rows() {
        let _ = rows_of(x, &rows).mm_out(&rows_of(&h, &rows), &adapter.a.of(group).tr());
    }
    let _ = h.g_mul_scalar_(adapter.scaling);
    Some(h)
}

/// The adapters' part of a backward: see [`backward_parameters`].
pub struct LoraHiddenGrad(Option<Buffer>);

/// dx `[rows, in]` from dy `[rows, out]`, and g for [`backward_parameters`].
pub fn backward_input(d_y: &Tensor, layers: GroupedLinear) -> (Buffer, LoraHiddenGrad) {
    let _span = crate::trace::operation("linear.backward_input");
    if let Some(grouped) = Grouped::of(d_y, layers) {
        return grouped.backward_input(d_y);
    }
    if let Some(tiled) = Tiled::of(d_y, layers) {
        return tiled.backward_input(d_y);
    }
    let d_x = Buffer::empty(&[d_y.size()[0], layers.linear.input()], d_y.kind(), d_y.device());
    let g = layers.lora_hidden_like(d_y);
    for (group, rows) in layers.with_rows() {
        let (d_y, mut d_x) = (rows_of(d_y, &rows), rows_of(&d_x, &rows));
        for (i, (base, range)) in with_columns(&layers.linear.bases).enumerate() {
            let (d_part, weight) = (columns(&d_y, &range), base.weight.of(group));
            let _ = if i == 0 { d_part.mm_out(&d_x, &weight) } else { d_x.addmm_(&d_part, &weight) };
        }
        let (Some(adapter), Some(g)) = (layers.linear.adapter(), &g) else { continue };
        let mut g = rows_of(g, &rows);
        for part in &adapter.parts {
            let _ = columns(&d_y, &part.out).mm_out(&columns(&g, &part.ranks), &part.b.of(group));
        }
        let _ = g.g_mul_scalar_(adapter.scaling);
        let _ = d_x.addmm_(&g, &adapter.a.of(group));
    }
    (d_x, LoraHiddenGrad(g))
}

/// Adds the adapters' gradients from dy, x, what [`forward`] returned and what [`backward_input`] did. Apart from that
/// because x may become known only with dx, as SwiGLU's output does.
pub fn backward_parameters(
    d_y: &Tensor,
    x: &Tensor,
    h: Option<&Tensor>,
    LoraHiddenGrad(g): &LoraHiddenGrad,
    layers: GroupedLinear,
) {
    let _span = crate::trace::operation("linear.backward_parameters");
    let (Some(h), Some(g)) = (h, g) else { return };
    if let Some(grouped) = Grouped::of(d_y, layers) {
        return grouped.backward_parameters(d_y, x, h, g);
    }
    if let Some(tiled) = Tiled::of(d_y, layers) {
        return tiled.backward_parameters(d_y, x, h, g);
    }
    let Some((adapter, gradient)) = &layers.linear.adapter else { return };
    for (group, rows) in layers.with_rows() {
        let [d_y, x, h, g] = [d_y, x, h, g].map(|tensor| rows_of(tensor, &rows));
        for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
            add_product(&d_b.of(group), &columns(&d_y, &part.out).tr(), &columns(&h, &part.ranks));
        }
        add_product(&gradient.a.of(group), &g.tr(), &x);
    }
}

/// Each base with its output columns.
fn with_columns(bases: &[Base]) -> impl Iterator<Item = (&Base, Range<i64>)> {
    bases.iter().scan(0, |end, base| {
        let start = *end;
        *end += base.weight.rows();
        Some((base, start..*end))
    })
}

fn rows_of(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(0, range.start, range.end - range.start)
}

fn columns(x: &Tensor, range: &Range<i64>) -> Tensor {
    x.narrow(1, range.start, range.end - range.start)
}

/// sum += a·b, where the sum is fp32 (or fp64) and a, b are in compute dtype: fp32 and bf16, or the same kind.
fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) {
    let mut sum = sum.shallow_clone();
    if a.kind() == sum.kind() {
        let _ = sum.addmm_(a, b);
    } else if sum.device() == Device::Cpu {
        let _ = sum.g_add_(&a.mm(b));
    } else {
        // Not rounded on the way, and no pass of its own. libtorch has it for CUDA alone: bf16 against the CPU in tests/gpu.sh.
        let _ = sum.addmm_dtype_out(&sum, a, b, sum.kind());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        accum_kind,
        cpu::{
            Isa,
            amx::Emulated,
            tile::{InTiles, Multiplier},
        },
        testing::{autograd, distance, leaf},
    };
    use tch::Kind;

    /// What layers give and add to their gradients: y, s·h, the same again, dx.
    type Compute = fn(GroupedLinear, &Tensor, &Tensor, Option<&Tensor>) -> Vec<Tensor>;

    fn everything(layers: GroupedLinear, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
        let (y, h) = forward(x, layers, add);
        let (d_x, g) = backward_input(d_y, layers);
        backward_parameters(d_y, x, h.as_deref(), &g, layers);
        [y, h.unwrap(), lora_hidden(x, layers).unwrap(), d_x].map(|buffer| buffer.shallow_clone()).into()
    }

    /// The same in tiles, as a machine that has their registers computes.
    fn in_tiles(layers: GroupedLinear, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
        let tiled = Tiled { multiplier: Multiplier::Emulated(InTiles(Emulated)), layers };
        let (y, h) = tiled.forward(x, add);
        let h = h.unwrap();
        let (d_x, LoraHiddenGrad(g)) = tiled.backward_input(d_y);
        tiled.backward_parameters(d_y, x, &h, &g.unwrap());
        [y, h, tiled.lora_hidden(x).unwrap(), d_x].map(|buffer| buffer.shallow_clone()).into()
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
        fn new(bias: &Tensor) -> Self {
            let b = [rounded(&[4, 2]), rounded(&[3, 3])];
            Self { w: rounded(&[10, 6]), bias: bias.shallow_clone(), a: rounded(&[5, 6]), b }
        }

        fn lora_hidden(&self, x: &Tensor) -> Tensor {
            x.matmul(&self.a.tr()) * 0.5
        }

        fn forward(&self, x: &Tensor) -> Tensor {
            let h = self.lora_hidden(x);
            let q = h.narrow(1, 0, 2).matmul(&self.b[0].tr());
            let v = h.narrow(1, 2, 3).matmul(&self.b[1].tr());
            let k = Tensor::zeros([x.size()[0], 3], (Kind::Double, x.device()));
            x.matmul(&self.w.tr()) + &self.bias + Tensor::cat(&[q, k, v], 1)
        }

        fn leaves(&self) -> [&Tensor; 3] {
            [&self.a, &self.b[0], &self.b[1]]
        }
    }

    /// Ours with the values of each group's, bases whole or split. Of one group the matrices are its own or shared, which is the same.
    fn ours(exact: &[Exact], split: bool, kind: Kind) -> Linear {
        let matrices = |of: &dyn Fn(&Exact) -> Tensor| {
            let all: Vec<Tensor> = exact.iter().map(|layer| of(layer).detach().to_kind(kind)).collect();
            if split && all.len() == 1 {
                Matrices::Shared(all[0].copy())
            } else {
                Matrices::Each(Tensor::stack(&all, 0))
            }
        };
        let sums = |of: &Matrices| {
            let zeros = Tensor::zeros(of.tensor().size(), (accum_kind(kind), Device::Cpu));
            if zeros.dim() == 2 { Matrices::Shared(zeros) } else { Matrices::Each(zeros) }
        };
        let bias = exact[0].bias.detach().to_kind(kind);
        let base = |(from, n): (i64, i64)| Base {
            weight: matrices(&|layer| layer.w.narrow(0, from, n)),
            bias: Some(bias.narrow(0, from, n)),
        };
        let a = matrices(&|layer| layer.a.shallow_clone());
        let [b_q, b_v] = [0, 1].map(|part| matrices(&|layer| layer.b[part].shallow_clone()));
        let gradient = AdapterGradient { a: sums(&a), b: vec![sums(&b_q), sums(&b_v)] };
        let parts = vec![Part { out: 0..4, ranks: 0..2, b: b_q }, Part { out: 7..10, ranks: 2..5, b: b_v }];
        let adapter = Adapter { a, parts, scaling: 0.5 };
        let bases = if split { vec![(0, 4), (4, 3), (7, 3)] } else { vec![(0, 10)] };
        Linear { bases: bases.into_iter().map(base).collect(), adapter: Some((adapter, gradient)) }
    }

    fn check(kind: Kind, tolerance: f64, compute: Compute) {
        // One layer for all rows, and groups of which some are empty.
        for offsets in
            [vec![0, 0], vec![0, 1], vec![0, 5], vec![0, 2, 2, 7], vec![0, 0, 3, 4, 4], vec![0, 40, 75]]
        {
            let tokens = *offsets.last().unwrap();
            let bias = rounded(&[10]).detach();
            let exact: Vec<Exact> = offsets[1..].iter().map(|_| Exact::new(&bias)).collect();
            let (x, add) = (rounded(&[tokens, 6]), rounded(&[tokens, 10]).detach());
            let d_y = rounded(&[tokens, 10]).detach();
            let of_groups = |f: fn(&Exact, &Tensor) -> Tensor| {
                let part = |(layer, pair): (&Exact, &[i64])| f(layer, &rows_of(&x, &(pair[0]..pair[1])));
                let parts: Vec<Tensor> = exact.iter().zip(offsets.windows(2)).map(part).collect();
                Tensor::cat(&parts, 0)
            };
            let (y, h) = (of_groups(Exact::forward), of_groups(Exact::lora_hidden));
            let leaves: Vec<&Tensor> =
                std::iter::once(&x).chain(exact.iter().flat_map(Exact::leaves)).collect();
            let gradients = autograd(&y, &d_y, &leaves);

            let _guard = tch::no_grad_guard();
            for (split, add) in [(false, None), (true, None), (false, Some(&add)), (true, Some(&add))] {
                let linear = ours(&exact, split, kind);
                let layers = GroupedLinear { linear: &linear, groups: &RowSegments::new(offsets.clone()) };
                let [x, d_y] = [&x, &d_y].map(|tensor| tensor.detach().to_kind(kind));
                let in_kind = add.map(|add| add.to_kind(kind));
                let mut found = compute(layers, &x, &d_y, in_kind.as_ref());
                let (_, gradient) = linear.adapter.as_ref().unwrap();
                for group in 0..exact.len() {
                    found.extend(std::iter::once(&gradient.a).chain(&gradient.b).map(|sums| sums.of(group)));
                }
                let y = add.map_or_else(|| y.shallow_clone(), |add| &y + add);
                let expected = [&y, &h, &h].into_iter().chain(&gradients);
                assert_eq!(found.len(), 3 + gradients.len());
                for (i, (ours, theirs)) in found.iter().zip(expected).enumerate() {
                    let most = 1.0 + distance(theirs, &theirs.zeros_like());
                    let off = distance(ours, theirs) / most;
                    assert!(off <= tolerance, "{kind:?} {offsets:?} {split}: {i} is {off} off");
                }
            }
        }
    }

    #[test]
    fn matches_autograd() {
        check(Kind::Double, 1e-12, everything);
        // A few roundings to bf16.
        for level in Isa::available() {
            level.forced(|| check(Kind::BFloat16, 4.0 / 256.0, everything));
        }
        check(Kind::BFloat16, 4.0 / 256.0, in_tiles);
    }

    #[test]
    fn bf16_is_multiplied_by_what_the_machine_has() {
        let x = |kind| Tensor::zeros([8, 8], (kind, Device::Cpu));
        for level in Isa::available() {
            level.forced(|| {
                let found = tiled::multiplier(&x(Kind::BFloat16));
                let fits = match level {
                    Isa::Portable | Isa::Avx2 | Isa::Avx512 => found.is_none(),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512Bf16 => matches!(found, Some(Multiplier::Vectors(_))),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Amx => matches!(found, Some(Multiplier::Registers(_))),
                    #[cfg(not(target_arch = "x86_64"))]
                    _ => false,
                };
                assert!(fits, "{level:?}: {found:?}");
                assert!(tiled::multiplier(&x(Kind::Float)).is_none());
            });
        }
    }

    /// Few rows are libtorch's, unless others come with them.
    #[test]
    fn groups_of_few_rows_are_not_packed() {
        let linear = ours(
            &[Exact::new(&rounded(&[10]).detach()), Exact::new(&rounded(&[10]).detach())],
            false,
            Kind::BFloat16,
        );
        let is_tiled = |offsets: &[i64]| {
            let x = Tensor::zeros([offsets[2], 6], (Kind::BFloat16, Device::Cpu));
            Tiled::of(&x, GroupedLinear { linear: &linear, groups: &RowSegments::new(offsets.to_vec()) })
                .is_some()
        };
        let has_tiles = Isa::current() >= Isa::Avx512Bf16;
        assert_eq!(
            [[0, 7, 14], [0, 0, 0], [0, 7, 15]].map(|offsets| is_tiled(&offsets)),
            [false, false, has_tiles]
        );
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
        let weight = Matrices::Each(bf16(&Tensor::stack(&[first, second], 0)));
        let bare = Linear { bases: vec![Base { weight, bias: None }], adapter: None };
        let layers = GroupedLinear { linear: &bare, groups: &RowSegments::new(vec![0, 3, 7]) };
        let tiled = Tiled { multiplier: Multiplier::Emulated(InTiles(Emulated)), layers };
        let in_tiles = (tiled.forward(&bf16(&x), None), tiled.backward_input(&bf16(&d_y)));
        for ((found, h), (d_found, LoraHiddenGrad(g))) in
            [in_tiles, (forward(&bf16(&x), layers, None), backward_input(&bf16(&d_y), layers))]
        {
            assert!(h.is_none() && g.is_none());
            for (ours, theirs) in [(&found, &y), (&d_found, &d_x)] {
                let most = 1.0 + distance(theirs, &theirs.zeros_like());
                assert!(distance(ours, theirs) / most <= 1.0 / 256.0);
            }
        }
        assert!(tiled.lora_hidden(&bf16(&x)).is_none() && lora_hidden(&bf16(&x), layers).is_none());
    }

    /// GroupedLinear in bf16 of `groups` from 32 columns to 48, with ranks 8 and 16 and 8 columns between that have no adapter.
    fn stacked(groups: i64, shared_a: bool, shared_b: bool, split: bool) -> Linear {
        // Rows beyond those taken, so that what lies between two matrices is not what one takes.
        let matrices = |shared: bool, [rows, columns]: [i64; 2], kind| {
            let all = leaf(&[groups, rows + 1, columns]).detach().to_kind(kind).narrow(1, 0, rows);
            if shared { Matrices::Shared(all.get(0)) } else { Matrices::Each(all) }
        };
        let base = |rows| Base { weight: matrices(false, [rows, 32], Kind::BFloat16), bias: None };
        let shapes = [(shared_a, [24, 32]), (shared_b, [16, 8]), (false, [24, 16])];
        let [a, b_first, b_second] = shapes.map(|(shared, shape)| matrices(shared, shape, Kind::BFloat16));
        let [d_a, d_first, d_second] = shapes.map(|(shared, shape)| matrices(shared, shape, Kind::Float));
        let parts = vec![
            Part { out: 0..16, ranks: 0..8, b: b_first },
            Part { out: 24..48, ranks: 8..24, b: b_second },
        ];
        let gradient = AdapterGradient { a: d_a, b: vec![d_first, d_second] };
        Linear {
            bases: if split { vec![base(16), base(32)] } else { vec![base(48)] },
            adapter: Some((Adapter { a, parts, scaling: 0.5 }, gradient)),
        }
    }

    fn gradients(linear: &Linear) -> impl Iterator<Item = &Tensor> {
        let (_, gradient) = linear.adapter.as_ref().unwrap();
        std::iter::once(&gradient.a).chain(&gradient.b).map(Matrices::tensor)
    }

    #[test]
    fn groups_at_once_and_in_tiles_equal_one_after_the_other() {
        let _guard = tch::no_grad_guard();
        let bf16 = |shape: &[i64]| leaf(shape).detach().to_kind(Kind::BFloat16);
        for offsets in [vec![0, 5, 5, 9, 32], vec![0, 0, 0, 1, 1], vec![0, 8, 16, 24, 32], vec![0, 3]] {
            let (groups, rows) = (offsets.len() as i64 - 1, offsets[offsets.len() - 1]);
            for (shared_a, shared_b, split) in
                [(false, false, false), (true, false, false), (false, true, true), (true, true, false)]
            {
                let linear = stacked(groups, shared_a, shared_b, split);
                let (x, d_y, add) = (bf16(&[rows, 32]), bf16(&[rows, 48]), bf16(&[rows, 48]));
                let start: Vec<Tensor> = gradients(&linear).map(Tensor::copy).collect();
                let run = |compute: Compute, groups: RowSegments, at_once: bool| {
                    gradients(&linear).zip(&start).for_each(|(sum, start)| sum.shallow_clone().copy_(start));
                    let all = GroupedLinear { linear: &linear, groups: &groups };
                    assert_eq!(Grouped::of(&x, all).is_some(), at_once);
                    let mut found = compute(all, &x, &d_y, Some(&add));
                    found.extend(gradients(&linear).map(Tensor::copy));
                    found
                };
                let each = run(everything, RowSegments::new(offsets.clone()), false);
                for other in [
                    run(everything, RowSegments::at_once(&offsets), true),
                    run(in_tiles, RowSegments::new(offsets.clone()), false),
                ] {
                    assert_eq!(other.len(), each.len());
                    for (i, (other, each)) in other.iter().zip(&each).enumerate() {
                        let most = 1.0 + distance(each, &each.zeros_like());
                        let off = distance(other, each) / most;
                        // A few roundings of bf16, in another order.
                        let case = format!("{offsets:?} {shared_a} {shared_b} {split}");
                        assert!(off < 4.0 / 256.0, "{case}: {i} is {off} off");
                    }
                }
            }
        }
    }

    #[test]
    fn what_grouped_kernels_refuse_is_computed_one_after_the_other() {
        let groups = RowSegments::at_once(&[0, 2, 4, 6]);
        let x = Tensor::zeros([6, 8], (Kind::BFloat16, Device::Cpu));
        let at_once =
            |x: &Tensor, linear: &Linear| Grouped::of(x, GroupedLinear { linear, groups: &groups }).is_some();
        let all = Tensor::zeros([1000], (Kind::BFloat16, Device::Cpu));
        // Matrices of 8 rows: `apart` elements from one to the next, `wide` from a row to the next, the first at `start`.
        let bare = |start: i64, apart: i64, wide: i64| {
            let weight =
                Matrices::Each(all.narrow(0, start, 900).as_strided([3, 8, 8], [apart, wide, 1], None));
            Linear { bases: vec![Base { weight, bias: None }], adapter: None }
        };
        assert!(at_once(&x, &bare(0, 104, 8)) && at_once(&x, &bare(8, 136, 16)));
        for refused in [bare(1, 104, 8), bare(0, 100, 8), bare(0, 104, 9)] {
            assert!(!at_once(&x, &refused));
        }
        assert!(
            !at_once(&x.to_kind(Kind::Float), &bare(0, 104, 8))
                && !at_once(&x.narrow(0, 0, 0), &bare(0, 104, 8))
        );
        let biased = |mut linear: Linear| {
            linear.bases[0].bias = Some(all.narrow(0, 0, 8));
            linear
        };
        assert!(!at_once(&x, &biased(bare(0, 104, 8))));
        // Four ranks: their activations' rows are too near each other.
        let with_ranks = |ranks: i64| {
            let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
            let [a, d_a] =
                [Kind::BFloat16, Kind::Float].map(|kind| Matrices::Each(zeros(&[3, ranks, 8], kind)));
            let [b, d_b] =
                [Kind::BFloat16, Kind::Float].map(|kind| Matrices::Shared(zeros(&[8, ranks], kind)));
            let adapter = Adapter { a, parts: vec![Part { out: 0..8, ranks: 0..ranks, b }], scaling: 1.0 };
            let gradient = AdapterGradient { a: d_a, b: vec![d_b] };
            Linear { adapter: Some((adapter, gradient)), ..bare(0, 104, 8) }
        };
        assert!(at_once(&x, &with_ranks(8)) && !at_once(&x, &with_ranks(4)));
    }

    #[test]
    fn what_a_device_knows_of_groups_the_host_can_ask() {
        let (ends, sizes) = (Tensor::from_slice(&[2i32, 2, 7]), Tensor::from_slice(&[2i32, 0, 5]));
        let groups = RowSegments::on_device(&ends, &sizes);
        assert!(groups.computed_at_once().is_none(), "a CPU computes one after the other");
        assert_eq!(groups.share().offsets(), [0, 2, 2, 7]);
        assert_eq!(groups.offsets(), [0, 2, 2, 7]);
    }
}
