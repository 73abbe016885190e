//! Linear layers against autograd in fp64, and every backend against the others.

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
use crate::quant::{Format, Grid, amax};
use tch::Kind;

/// Segments of one adapter, a base each.
fn segments(offsets: &[i64]) -> RowSegments {
    RowSegments::new(offsets.to_vec(), one_adapter())
}

/// Outputs of a layer: y, s·h, s·h recomputed, dx.
type Compute = fn(GroupedLinear, &Tensor, &Tensor, Option<&Tensor>) -> Vec<Tensor>;

fn everything(layers: GroupedLinear, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
    let (y, h) = forward(x, layers, add);
    let (d_x, g) = backward_input(d_y, layers);
    backward_parameters(d_y, x, h.as_deref(), &g, layers);
    [y, h.unwrap(), lora_hidden(x, layers).unwrap(), d_x].map(|buffer| buffer.shallow_clone()).into()
}

/// The same in tiles, as a machine that has their registers computes.
fn in_tiles(layers: GroupedLinear, x: &Tensor, d_y: &Tensor, add: Option<&Tensor>) -> Vec<Tensor> {
    let tiled = Tiled { multiplier: Multiplier::Emulated(InTiles(Emulated)), layer: layers };
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

/// Our layer with each group's values, bases whole or split. One group may have its own matrices or shared ones.
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
        weight: matrices(&|layer| layer.w.narrow(0, from, n)).into(),
        bias: Some(bias.narrow(0, from, n)),
    };
    let a = matrices(&|layer| layer.a.shallow_clone());
    let [b_q, b_v] = [0, 1].map(|part| matrices(&|layer| layer.b[part].shallow_clone()));
    let gradient = AdapterGradient { a: sums(&a), b: vec![sums(&b_q), sums(&b_v)] };
    let parts = vec![
        Part { out: 0..4, ranks: 0..2, scaling: 0.5, b: b_q },
        Part { out: 7..10, ranks: 2..5, scaling: 0.5, b: b_v },
    ];
    let adapter = BoundAdapter { a, parts, dropout: None, magnitudes: None, gradient };
    let bases = if split { vec![(0, 4), (4, 3), (7, 3)] } else { vec![(0, 10)] };
    Linear { bases: bases.into_iter().map(base).collect(), adapters: vec![Some(adapter)] }
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
        let leaves: Vec<&Tensor> = std::iter::once(&x).chain(exact.iter().flat_map(Exact::leaves)).collect();
        let gradients = autograd(&y, &d_y, &leaves);

        let _guard = tch::no_grad_guard();
        for (split, add) in [(false, None), (true, None), (false, Some(&add)), (true, Some(&add))] {
            let linear = ours(&exact, split, kind);
            let layers = GroupedLinear { linear: &linear, segments: &segments(&offsets) };
            let [x, d_y] = [&x, &d_y].map(|tensor| tensor.detach().to_kind(kind));
            let in_kind = add.map(|add| add.to_kind(kind));
            let mut found = compute(layers, &x, &d_y, in_kind.as_ref());
            let gradient = &linear.adapters[0].as_ref().unwrap().gradient;
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
        Tiled::of(&x, GroupedLinear { linear: &linear, segments: &segments(offsets) }).is_some()
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
    let bare = Linear { bases: vec![Base { weight: weight.into(), bias: None }], adapters: vec![] };
    let layers = GroupedLinear { linear: &bare, segments: &segments(&[0, 3, 7]) };
    let tiled = Tiled { multiplier: Multiplier::Emulated(InTiles(Emulated)), layer: layers };
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

/// A bf16 layer of `groups` bases from 32 columns to 48, with parts of rank 8 and 16 and 8 columns without an adapter.
fn stacked(groups: i64, shared_a: bool, shared_b: bool, split: bool) -> Linear {
    // Rows beyond those taken, so that what lies between two matrices is not what one takes.
    let matrices = |shared: bool, [rows, columns]: [i64; 2], kind| {
        let all = leaf(&[groups, rows + 1, columns]).detach().to_kind(kind).narrow(1, 0, rows);
        if shared { Matrices::Shared(all.get(0)) } else { Matrices::Each(all) }
    };
    let base = |rows| Base { weight: matrices(false, [rows, 32], Kind::BFloat16).into(), bias: None };
    let shapes = [(shared_a, [24, 32]), (shared_b, [16, 8]), (false, [24, 16])];
    let [a, b_first, b_second] = shapes.map(|(shared, shape)| matrices(shared, shape, Kind::BFloat16));
    let [d_a, d_first, d_second] = shapes.map(|(shared, shape)| matrices(shared, shape, Kind::Float));
    let parts = vec![
        Part { out: 0..16, ranks: 0..8, scaling: 0.5, b: b_first },
        Part { out: 24..48, ranks: 8..24, scaling: 0.25, b: b_second },
    ];
    let gradient = AdapterGradient { a: d_a, b: vec![d_first, d_second] };
    Linear {
        bases: if split { vec![base(16), base(32)] } else { vec![base(48)] },
        adapters: vec![Some(BoundAdapter { a, parts, dropout: None, magnitudes: None, gradient })],
    }
}

fn gradients(linear: &Linear) -> impl Iterator<Item = &Tensor> {
    let gradient = &linear.adapters[0].as_ref().unwrap().gradient;
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
                let all = GroupedLinear { linear: &linear, segments: &groups };
                assert_eq!(Grouped::of(&x, all).is_some(), at_once);
                let mut found = compute(all, &x, &d_y, Some(&add));
                found.extend(gradients(&linear).map(Tensor::copy));
                found
            };
            let each = run(everything, segments(&offsets), false);
            for other in [
                run(everything, RowSegments::at_once(&offsets, one_adapter()), true),
                run(in_tiles, segments(&offsets), false),
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
    let groups = RowSegments::at_once(&[0, 2, 4, 6], one_adapter());
    let x = Tensor::zeros([6, 8], (Kind::BFloat16, Device::Cpu));
    let at_once =
        |x: &Tensor, linear: &Linear| Grouped::of(x, GroupedLinear { linear, segments: &groups }).is_some();
    let all = Tensor::zeros([1000], (Kind::BFloat16, Device::Cpu));
    // Matrices of 8 rows: `apart` elements from one to the next, `wide` from a row to the next, the first at `start`.
    let bare = |start: i64, apart: i64, wide: i64| {
        let weight = Matrices::Each(all.narrow(0, start, 900).as_strided([3, 8, 8], [apart, wide, 1], None));
        Linear { bases: vec![Base { weight: weight.into(), bias: None }], adapters: vec![] }
    };
    assert!(at_once(&x, &bare(0, 104, 8)) && at_once(&x, &bare(8, 136, 16)));
    for refused in [bare(1, 104, 8), bare(0, 100, 8), bare(0, 104, 9)] {
        assert!(!at_once(&x, &refused));
    }
    assert!(
        !at_once(&x.to_kind(Kind::Float), &bare(0, 104, 8)) && !at_once(&x.narrow(0, 0, 0), &bare(0, 104, 8))
    );
    let biased = |mut linear: Linear| {
        linear.bases[0].bias = Some(all.narrow(0, 0, 8));
        linear
    };
    assert!(!at_once(&x, &biased(bare(0, 104, 8))));
    // Four ranks: their activations' rows are too near each other.
    let with_ranks = |ranks: i64| {
        let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        let [a, d_a] = [Kind::BFloat16, Kind::Float].map(|kind| Matrices::Each(zeros(&[3, ranks, 8], kind)));
        let [b, d_b] = [Kind::BFloat16, Kind::Float].map(|kind| Matrices::Shared(zeros(&[8, ranks], kind)));
        let gradient = AdapterGradient { a: d_a, b: vec![d_b] };
        let parts = vec![Part { out: 0..8, ranks: 0..ranks, scaling: 1.0, b }];
        let adapter = BoundAdapter { a, parts, dropout: None, magnitudes: None, gradient };
        Linear { adapters: vec![Some(adapter)], ..bare(0, 104, 8) }
    };
    assert!(at_once(&x, &with_ranks(8)) && !at_once(&x, &with_ranks(4)));
}

#[test]
fn what_a_device_knows_of_groups_the_host_can_ask() {
    let (ends, sizes) = (Tensor::from_slice(&[2i32, 2, 7]), Tensor::from_slice(&[2i32, 0, 5]));
    let groups = RowSegments::on_device(&ends, &sizes, one_adapter());
    assert!(groups.computed_at_once().is_none(), "a CPU computes one after the other");
    assert_eq!(groups.share().offsets(), [0, 2, 2, 7]);
    assert_eq!(groups.offsets(), [0, 2, 2, 7]);
}

/// Adapters of ranks 8, 4 and 16 on a layer from 16 columns to 24 of 3 bases: on all columns, on two parts, and on
/// the last columns with an A that all bases share. Values that bf16 has too.
struct Mixed {
    w: Tensor,
    adapters: Vec<Option<BoundAdapter>>,
}

const MIXED_BASES: i64 = 3;

impl Mixed {
    fn new(kind: Kind) -> Self {
        let values = |shape: &[i64]| leaf(shape).detach().to_kind(Kind::BFloat16).to_kind(kind);
        let sums = |of: &Matrices| {
            let zeros = Tensor::zeros(of.tensor().size(), (accum_kind(kind), Device::Cpu));
            if zeros.dim() == 2 { Matrices::Shared(zeros) } else { Matrices::Each(zeros) }
        };
        let each = |rows, columns| Matrices::Each(values(&[MIXED_BASES, rows, columns]));
        let adapter = |a: Matrices, parts: Vec<Part>| {
            let gradient =
                AdapterGradient { a: sums(&a), b: parts.iter().map(|part| sums(&part.b)).collect() };
            Some(BoundAdapter { a, parts, dropout: None, magnitudes: None, gradient })
        };
        let part = |out: Range<i64>, ranks: Range<i64>, scaling| {
            let b = each(out.end - out.start, ranks.end - ranks.start);
            Part { out, ranks, scaling, b }
        };
        let adapters = vec![
            adapter(each(8, 16), vec![part(0..24, 0..8, 2.0)]),
            adapter(each(8, 16), vec![part(0..8, 0..4, 0.5), part(8..16, 4..8, 1.5)]),
            None,
            adapter(Matrices::Shared(values(&[16, 16])), vec![part(16..24, 0..16, 1.0)]),
        ];
        Self { w: values(&[MIXED_BASES, 24, 16]), adapters }
    }

    fn linear(&self) -> Linear {
        let share = |matrices: &Matrices| match matrices {
            Matrices::Shared(matrix) => Matrices::Shared(matrix.shallow_clone()),
            Matrices::Each(all) => Matrices::Each(all.shallow_clone()),
        };
        let adapter = |adapter: &BoundAdapter| BoundAdapter {
            a: share(&adapter.a),
            parts: adapter
                .parts
                .iter()
                .map(|Part { out, ranks, scaling, b }| Part {
                    out: out.clone(),
                    ranks: ranks.clone(),
                    scaling: *scaling,
                    b: share(b),
                })
                .collect(),
            dropout: None,
            magnitudes: None,
            gradient: AdapterGradient {
                a: share(&adapter.gradient.a),
                b: adapter.gradient.b.iter().map(share).collect(),
            },
        };
        let bases = vec![Base { weight: Matrices::Each(self.w.shallow_clone()).into(), bias: None }];
        Linear { bases, adapters: self.adapters.iter().map(|of| of.as_ref().map(adapter)).collect() }
    }

    /// y, dx and the gradients of every A and B, by the formulas, each segment alone: fp64.
    fn expected(&self, x: &Tensor, d_y: &Tensor, segments: &RowSegments) -> Vec<Tensor> {
        let exact = |tensor: &Tensor| tensor.to_kind(Kind::Double);
        let y = Tensor::zeros(d_y.size(), (Kind::Double, Device::Cpu));
        let d_x = Tensor::zeros(x.size(), (Kind::Double, Device::Cpu));
        let tensors = || {
            self.adapters.iter().flatten().flat_map(|adapter| {
                std::iter::once(&adapter.a).chain(adapter.parts.iter().map(|part| &part.b))
            })
        };
        let sums: Vec<Tensor> = tensors().map(|of| exact(&of.tensor().zeros_like())).collect();
        for Segment { base, adapter, rows } in segments.iter() {
            let [x, d_y] = [x, d_y].map(|tensor| exact(&rows_of(tensor, &rows)));
            let w = exact(&self.w.get(base as i64));
            rows_of(&y, &rows).copy_(&x.matmul(&w.tr()));
            rows_of(&d_x, &rows).copy_(&d_y.matmul(&w));
            let Some(bound) = adapter.and_then(|adapter| self.adapters.get(adapter)?.as_ref()) else {
                continue;
            };
            let before =
                self.adapters[..adapter.unwrap()].iter().flatten().map(|a| 1 + a.parts.len()).sum::<usize>();
            let of = |index: usize| {
                let sum = &sums[before + index];
                if sum.dim() == 2 { sum.shallow_clone() } else { sum.get(base as i64) }
            };
            let a = exact(&bound.a.of(base));
            for (i, part) in bound.parts.iter().enumerate() {
                let (b, a) = (
                    exact(&part.b.of(base)),
                    a.narrow(0, part.ranks.start, part.ranks.end - part.ranks.start),
                );
                let d_part = columns(&d_y, &part.out);
                let _ = columns(&rows_of(&y, &rows), &part.out)
                    .g_add_(&(x.matmul(&a.tr()).matmul(&b.tr()) * part.scaling));
                let g = d_part.matmul(&b) * part.scaling;
                let _ = rows_of(&d_x, &rows).g_add_(&g.matmul(&a));
                let _ = of(0).narrow(0, part.ranks.start, a.size()[0]).g_add_(&g.tr().matmul(&x));
                let _ = of(1 + i).g_add_(&(d_part.tr().matmul(&x.matmul(&a.tr())) * part.scaling));
            }
        }
        [vec![y, d_x], sums].into_iter().flatten().collect()
    }
}

#[test]
fn every_segment_gets_what_its_adapter_gives_alone() {
    let _guard = tch::no_grad_guard();
    let pattern: Pattern = [Some(0), Some(1), Some(2), Some(3), None].into();
    // 3 bases of 5 segments, some without rows; a base of one segment; a base without any.
    let offsets = vec![0, 9, 20, 24, 41, 44, 44, 60, 60, 60, 60, 60, 60, 60, 60, 60];
    let rows = 60;
    let plain = |layer: GroupedLinear, x: &Tensor, d_y: &Tensor| run_backend(&Plain(layer), x, d_y);
    let tiled = |layer: GroupedLinear, x: &Tensor, d_y: &Tensor| {
        let multiplier = Multiplier::Emulated(InTiles(Emulated));
        run_backend(&Tiled { multiplier, layer }, x, d_y)
    };
    let grouped = |layer: GroupedLinear, x: &Tensor, d_y: &Tensor| {
        run_backend(&Grouped::of(x, layer).expect("kernels take it"), x, d_y)
    };
    type Run<'a> = &'a dyn Fn(GroupedLinear, &Tensor, &Tensor) -> [Tensor; 2];
    let cases: [(Kind, f64, bool, Run); 4] = [
        (Kind::Double, 1e-13, false, &plain),
        (Kind::BFloat16, 4.0 / 256.0, false, &plain),
        (Kind::BFloat16, 4.0 / 256.0, false, &tiled),
        (Kind::BFloat16, 4.0 / 256.0, true, &grouped),
    ];
    for (i, (kind, tolerance, at_once, run)) in cases.into_iter().enumerate() {
        let mixed = Mixed::new(kind);
        let values = |shape: &[i64]| leaf(shape).detach().to_kind(kind);
        let (x, d_y) = (values(&[rows, 16]), values(&[rows, 24]));
        let segments = if at_once {
            RowSegments::at_once(&offsets, pattern.clone())
        } else {
            RowSegments::new(offsets.clone(), pattern.clone())
        };
        let linear = mixed.linear();
        let [y, d_x] = run(GroupedLinear { linear: &linear, segments: &segments }, &x, &d_y);
        let mut found = vec![y, d_x];
        for adapter in linear.adapters.iter().flatten() {
            found.extend(
                std::iter::once(&adapter.gradient.a)
                    .chain(&adapter.gradient.b)
                    .map(|m| m.tensor().shallow_clone()),
            );
        }
        let expected = mixed.expected(&x, &d_y, &segments);
        assert_eq!(found.len(), expected.len());
        for (j, (ours, theirs)) in found.iter().zip(&expected).enumerate() {
            let off = distance(ours, theirs) / (1.0 + distance(theirs, &theirs.zeros_like()));
            assert!(off < tolerance, "case {i} {kind:?}: {j} is {off} off");
        }
    }
}

/// y and dx; adds the gradients.
fn run_backend(backend: &dyn Backend, x: &Tensor, d_y: &Tensor) -> [Tensor; 2] {
    let (y, h) = backend.forward(x, None);
    let (d_x, LoraHiddenGrad(g)) = backend.backward_input(d_y);
    backend.backward_parameters(d_y, x, &h.unwrap(), &g.unwrap());
    [y.copy(), d_x.copy()]
}

#[test]
fn segments_are_runs_of_bases_and_of_adapters() {
    let pattern: Pattern = [Some(1), None].into();
    let segments = RowSegments::new(vec![0, 2, 2, 5, 6, 6, 6], pattern);
    let found: Vec<_> = segments.iter().map(|s| (s.base, s.adapter, s.rows)).collect();
    assert_eq!(found, [(0, Some(1), 0..2), (1, Some(1), 2..5), (1, None, 5..6)]);
    assert_eq!(segments.base_runs().collect::<Vec<_>>(), [(0, 0..2), (1, 2..6)]);
    assert_eq!(segments.adapter_runs().collect::<Vec<_>>(), [(Some(1), 0..5), (None, 5..6)]);
}

/// Packed weights of three bases, each of leaves of `widths` rows, and the same in plain numbers of `kind`.
fn packed_and_plain(format: Format, widths: &[usize], columns: usize, kind: Kind) -> [Weight; 2] {
    let groups = 3;
    let (mut tiles, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for &rows in std::iter::repeat_n(widths, groups).flatten() {
        let grid = Grid { format, rows, columns };
        let numbers = Tensor::randn([(rows * columns) as i64], (Kind::Float, Device::Cpu));
        let numbers = Vec::<f32>::try_from(numbers).unwrap();
        let global = format.global(amax(&numbers).unwrap());
        let mut packed = vec![0; grid.bytes()];
        grid.pack(0..grid.tiles(), &numbers, global, &mut packed).unwrap();
        let mut exact = vec![0f32; numbers.len()];
        grid.unpack(0..grid.tiles(), &packed, global, &mut exact).unwrap();
        tiles.extend(packed);
        scales.push(global);
        values.extend(exact);
    }
    let tiles = Tensor::from_slice(&tiles).view([-1, format.tile().bytes as i64]);
    let scales = format.has_global().then(|| Tensor::from_slice(&scales));
    let packed = PackedMatrices { format, tiles, scales, widths: widths.to_vec(), columns, kind };
    let shape = [groups as i64, widths.iter().sum::<usize>() as i64, columns as i64];
    let plain = Tensor::from_slice(&values).to_kind(kind).view(shape);
    [Weight::Packed(packed), Matrices::Each(plain).into()]
}

/// Every path gives bits of decoded weights: one by one, at once, batch-invariant, and in emulated tiles. The wide
/// leaves are longer than a decoded band and than a pass of our GEMM, and their borders are no multiple of a tile.
#[test]
fn packed_weights_compute_as_the_numbers_that_they_stand_for() {
    let _guard = tch::no_grad_guard();
    let kinds = [Kind::Float, Kind::BFloat16];
    for (format, kind) in Format::ALL.into_iter().flat_map(|format| kinds.map(|kind| (format, kind))) {
        for (widths, columns) in [([20, 132], 24), ([40, 30], 1600)] {
            let [ours, theirs] = packed_and_plain(format, &widths, columns, kind)
                .map(|weight| Linear { bases: vec![Base { weight, bias: None }], adapters: vec![] });
            let (input, output) = (ours.input(), ours.output());
            for offsets in [[0, 0, 12, 15], [0, 1, 2, 3]] {
                let random = |columns| Tensor::randn([offsets[3], columns], (kind, Device::Cpu));
                let (x, d_y) = (random(input), random(output));
                let computed = |linear: &Linear, segments: &RowSegments| {
                    let layer = GroupedLinear { linear, segments };
                    let mut found = vec![forward(&x, layer, None).0, backward_input(&d_y, layer).0];
                    let _invariant = batch_invariant::Guard::new(true);
                    found.push(forward(&x, layer, None).0);
                    if kind == Kind::BFloat16 {
                        let multiplier = Multiplier::Emulated(InTiles(Emulated));
                        let tiled = Tiled { multiplier, layer };
                        found.extend([tiled.forward(&x, None).0, tiled.backward_input(&d_y).0]);
                    }
                    found
                };
                for segments in [segments(&offsets), RowSegments::at_once(&offsets, one_adapter())] {
                    let pairs = [&ours, &theirs].map(|linear| computed(linear, &segments));
                    for (i, (ours, theirs)) in pairs[0].iter().zip(&pairs[1]).enumerate() {
                        assert_eq!(**ours, **theirs, "{format} {kind:?} {offsets:?} {columns} {i}");
                    }
                }
            }
        }
    }
}
