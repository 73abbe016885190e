//! Every operation of `xorl_dist::ops` in the shapes of SmolLM2-135M: bf16, 1024 tokens, LoRA with r = 16.
//!
//!   cargo bench --bench ops                                     all
//!   cargo bench --bench ops -- 'attention|norm'                 what matches
//!   cargo bench --bench ops -- --measurement-time 1             criterion's options
//!   XORL_BENCH_LEVELS=all cargo bench --bench ops -- norm       norm and attention with every instruction set
//!   OMP_NUM_THREADS=1 cargo bench --bench ops                   as one of several ranks runs
//!
//! Criterion calls a FLOP `elem`. The table at the end has the median of each, and its share of what libtorch reached
//! at best on as many threads: in a product of bf16 matrices, or in moving as many bytes as the operation does, since
//! most of these fit in the cache. A FLOP counts where the formula needs it: masked scores do not, P computed again
//! does. Nothing else should run meanwhile: it would slow the medians, but hardly the best.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench may panic")]

mod measure;

use measure::{Benches, Work, random};
use tch::{Device::Cpu, Kind, Tensor};
use xorl_dist::loss::{CrossEntropy, HeadPass, Targets, TokenLoss};
use xorl_dist::ops::attention::{self, Documents, Heads};
use xorl_dist::ops::linear::{
    self, AdapterGradient, Base, BoundAdapter, GroupedLinear, Linear, Matrices, PackedMatrices, Part,
    RowSegments, Weight, one_adapter,
};
use xorl_dist::ops::{Buffer, adamw, norm, rope, swiglu};
use xorl_dist::quant::{Format, Grid, amax};
use xorl_dist::weights::{SafetensorsSource, WeightSource};

const TOKENS: i64 = 1024;
const HIDDEN: i64 = 576;
const INTERMEDIATE: i64 = 1536;
const VOCABULARY: i64 = 49152;
const HEADS: Heads = Heads { query: 9, key_value: 3, dim: 64, value_dim: 64, scale: 0.125, window: None };
const RANK: i64 = 16;
/// Bytes of a bf16 number.
const BF16: i64 = 2;

fn main() {
    // Only `cargo bench` says so; `cargo test --benches` has nothing to measure.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let _guard = tch::no_grad_guard();
    let mut benches = Benches::new();
    norms(&mut benches);
    ropes(&mut benches);
    swiglus(&mut benches);
    let (q, kv) = (HEADS.query * HEADS.dim, HEADS.key_value * HEADS.dim);
    let all = [0, TOKENS];
    linears(&mut benches, "qkv", HIDDEN, &[q, kv, kv], &all);
    linears(&mut benches, "o", q, &[HIDDEN], &all);
    linears(&mut benches, "gate_up", HIDDEN, &[INTERMEDIATE, INTERMEDIATE], &all);
    linears(&mut benches, "down", INTERMEDIATE, &[HIDDEN], &all);
    // Experts of the random Qwen3-MoE of benches/random_model.py, and of Qwen3-30B-A3B.
    for rows in [32, 64, 128] {
        let offsets: Vec<i64> = (0..=32).map(|expert| expert * rows).collect();
        frozen(
            &mut benches,
            &format!("gate_up of 32 experts, {rows} rows each, no adapter"),
            512,
            512,
            &offsets,
        );
        frozen(
            &mut benches,
            &format!("down of 32 experts, {rows} rows each, no adapter"),
            256,
            512,
            &offsets,
        );
        linears(&mut benches, &format!("gate_up of 32 experts, {rows} rows each"), 512, &[256; 2], &offsets);
        linears(&mut benches, &format!("down of 32 experts, {rows} rows each"), 256, &[512], &offsets);
    }
    let offsets: Vec<i64> = (0..=16).map(|expert| expert * 64).collect();
    linears(&mut benches, "gate_up of 16 experts, 64 rows each, 30B-A3B", 2048, &[768; 2], &offsets);
    linears(&mut benches, "down of 16 experts, 64 rows each, 30B-A3B", 768, &[2048], &offsets);
    attentions(&mut benches, "2x512", HEADS, &[512; 2]);
    attentions(&mut benches, "1x2048", HEADS, &[2048]);
    let large = Heads::new(16, 8, 128);
    attentions(&mut benches, "2x512, 16/8 heads of 128", large, &[512; 2]);
    quantised(&mut benches, 1024);
    quantised(&mut benches, 64);
    packing(&mut benches);
    cross_entropy(&mut benches);
    adamw(&mut benches);
    benches.finish();
}

fn norms(benches: &mut Benches) {
    let [x, d_y, add] = [(); 3].map(|()| random(&[TOKENS, HIDDEN]));
    let weight = Tensor::ones([HIDDEN], (Kind::Float, Cpu));
    let r = norm::forward(&x, &weight, 1e-5).1;
    let bytes = TOKENS * HIDDEN * BF16;
    benches.run("norm/forward", Work::Copied(2 * bytes), || norm::forward(&x, &weight, 1e-5));
    let backward = |d_y| norm::backward(d_y, &x, &weight, &r, Some(&add));
    benches.run_on(|| copy(&d_y), "norm/backward", Work::InPlace(4 * bytes), backward);
}

/// In place, so on the same numbers again and again: a rotation leaves them as large as they are.
fn ropes(benches: &mut Benches) {
    let half = HEADS.dim / 2;
    let heads = HEADS.query + HEADS.key_value;
    let rotated = rope::Rotated { heads, dim: HEADS.dim };
    let qkv = random(&[TOKENS, HEADS.widths().iter().sum()]);
    let inv_freq: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
    let positions = Tensor::arange(TOKENS, (Kind::Int64, Cpu));
    let (cos, sin) = rope::RopeTable::new(&inv_freq, 1.0, Cpu).at(&positions, TOKENS as usize);
    // q and k are read and written, cos and sin are read in fp32.
    let work = Work::InPlace(TOKENS * (2 * heads * HEADS.dim * BF16 + 2 * half * 4));
    benches.run("rope/forward", work, || rope::forward(&qkv, rotated, &cos, &sin));
    benches.run("rope/backward", work, || rope::backward(&qkv, rotated, &cos, &sin));
}

fn swiglus(benches: &mut Benches) {
    let (gate_up, d_y) = (random(&[TOKENS, 2 * INTERMEDIATE]), random(&[TOKENS, INTERMEDIATE]));
    let bytes = TOKENS * INTERMEDIATE * BF16;
    benches.run("swiglu/forward", Work::Copied(3 * bytes), || swiglu::forward(&gate_up, None));
    let inputs = || (copy(&d_y), copy(&gate_up));
    let backward = |(d_y, gate_up)| swiglu::backward(d_y, gate_up, None);
    benches.run_on(inputs, "swiglu/backward", Work::InPlace(6 * bytes), backward);
}

/// The layers `name` from `input` columns to those of `widths`, each with an adapter; one for each group of rows.
fn linears(benches: &mut Benches, name: &str, input: i64, widths: &[i64], offsets: &[i64]) {
    let linear = &layer(input, widths, offsets.len() as i64 - 1);
    let groups = &RowSegments::new(offsets.to_vec(), one_adapter());
    let layers = GroupedLinear { linear, segments: groups };
    let (rows, output) = (offsets[offsets.len() - 1], widths.iter().sum::<i64>());
    let ranks = RANK * widths.len() as i64;
    let x = random(&[rows, input]);
    let [d_y, residual] = [(); 2].map(|()| random(&[rows, output]));
    // o and down add it.
    let residual = (output == HIDDEN).then_some(&residual);

    let thin = 2 * rows * (input * ranks + output * RANK);
    let all = Work::Products(2 * rows * input * output + thin);
    let forward = || linear::forward(&x, layers, residual);
    let backward = || linear::backward_input(&d_y, layers);
    let (h, g) = (forward().1, backward().1);
    benches.run(&format!("linear/forward {name}"), all, forward);
    benches.run(&format!("linear/backward_input {name}"), all, backward);
    benches.run(&format!("linear/backward_parameters {name}"), Work::Products(thin), || {
        linear::backward_parameters(&d_y, &x, h.as_deref(), &g, layers);
    });
}

/// The layers `name` without adapters: the grouped product alone.
fn frozen(benches: &mut Benches, name: &str, input: i64, output: i64, offsets: &[i64]) {
    let weight = matrices(offsets.len() as i64 - 1, [output, input]);
    let linear = &Linear { bases: vec![Base { weight: weight.into(), bias: None }], adapters: vec![] };
    let groups = &RowSegments::new(offsets.to_vec(), one_adapter());
    let layers = GroupedLinear { linear, segments: groups };
    let rows = offsets[offsets.len() - 1];
    let (x, d_y) = (random(&[rows, input]), random(&[rows, output]));
    let work = Work::Products(2 * rows * input * output);
    benches.run(&format!("linear/forward {name}"), work, || linear::forward(&x, layers, None));
    benches.run(&format!("linear/backward_input {name}"), work, || linear::backward_input(&d_y, layers));
}

/// One for each of `groups`; a dense layer's where there is one.
fn matrices(groups: i64, [rows, columns]: [i64; 2]) -> Matrices {
    if groups == 1 {
        Matrices::Shared(random(&[rows, columns]))
    } else {
        Matrices::Each(random(&[groups, rows, columns]))
    }
}

/// GroupedLinear from `input` columns to those of `widths`, each with an adapter.
fn layer(input: i64, widths: &[i64], groups: i64) -> Linear {
    let (mut parts, mut output, mut ranks) = (Vec::new(), 0, 0);
    for width in widths {
        let b = matrices(groups, [*width, RANK]);
        parts.push(Part { out: output..output + width, ranks: ranks..ranks + RANK, scaling: 2.0, b });
        (output, ranks) = (output + width, ranks + RANK);
    }
    let a = matrices(groups, [ranks, input]);
    let sum = |of: &Matrices| {
        let zeros = of.tensor().zeros_like().to_kind(Kind::Float);
        if groups == 1 { Matrices::Shared(zeros) } else { Matrices::Each(zeros) }
    };
    let b = parts.iter().map(|part| sum(&part.b)).collect();
    let gradient = AdapterGradient { a: sum(&a), b };
    Linear {
        bases: vec![Base { weight: matrices(groups, [output, input]).into(), bias: None }],
        adapters: vec![Some(BoundAdapter { a, parts, dropout: None, magnitudes: None, gradient })],
    }
}

fn attentions(benches: &mut Benches, name: &str, heads: Heads, lengths: &[usize]) {
    let (tokens, documents) = (lengths.iter().sum::<usize>() as i64, Documents::new(lengths, Cpu));
    let qkv = random(&[tokens, (heads.query + 2 * heads.key_value) * heads.dim]);
    let d_out = random(&[tokens, heads.query * heads.dim]);
    let scores = heads.query * lengths.iter().map(|&n| (n * (n + 1) / 2) as i64).sum::<i64>();
    let products = |count: i64| Work::Products(count * 2 * scores * heads.dim);
    let forward = || attention::forward(&qkv, heads, &documents);
    let (out, lse) = forward();
    let backward = || attention::backward(&d_out, &qkv, &out, &lse, heads, &documents);
    benches.run(&format!("attention/forward {name}"), products(2), forward);
    benches.run(&format!("attention/backward {name}"), products(5), backward);
}

/// Values like those of a model's weights.
fn weights(elements: usize) -> Vec<f32> {
    (Tensor::randn([elements as i64], (Kind::Float, Cpu)) * 0.02).try_into().unwrap()
}

/// The matrix of `values`, packed, and its scale.
fn packed(grid: Grid, values: &[f32]) -> (Vec<u8>, f32) {
    let global = grid.format.global(amax(values).unwrap());
    let mut bytes = vec![0; grid.bytes()];
    grid.pack(0..grid.tiles(), values, global, &mut bytes).unwrap();
    (bytes, global)
}

/// Forward and input gradient of a frozen layer `[2048, 1024]`, in bf16 and in each packed format, in turns.
fn quantised(benches: &mut Benches, rows: i64) {
    let (input, output) = (1024, 2048);
    let values = weights(output * input);
    let plain = Tensor::from_slice(&values).to_kind(Kind::BFloat16).view([output as i64, input as i64]);
    let mut bases = vec![("bf16", Matrices::Shared(plain).into())];
    for format in Format::ALL {
        let (tiles, global) = packed(Grid { format, rows: output, columns: input }, &values);
        let packed = PackedMatrices {
            format,
            tiles: Tensor::from_slice(&tiles).view([-1, format.tile().bytes as i64]),
            scales: format.has_global().then(|| Tensor::from_slice(&[global])),
            widths: vec![output],
            columns: input,
            kind: Kind::BFloat16,
        };
        bases.push((format.name(), Weight::Packed(packed)));
    }
    let (x, d_y) = (&random(&[rows, input as i64]), &random(&[rows, output as i64]));
    let segments = &RowSegments::new(vec![0, rows], one_adapter());
    let layers = bases
        .into_iter()
        .map(|(name, weight)| (name, Linear { bases: vec![Base { weight, bias: None }], adapters: vec![] }));
    let mut operations: Vec<_> = layers
        .map(|(name, linear)| {
            let run = move || {
                let layer = GroupedLinear { linear: &linear, segments };
                drop((linear::forward(x, layer, None), linear::backward_input(d_y, layer)));
            };
            (name, run)
        })
        .collect();
    let turns = operations.iter_mut().map(|(name, operation)| (*name, operation as &mut dyn FnMut()));
    let mut turns: Vec<(&str, &mut dyn FnMut())> = turns.collect();
    let work = Work::Products(4 * rows * (input * output) as i64);
    benches.run_in_turns(&format!("quantised/{rows} rows"), work, &mut turns);
}

/// Packing of a bf16 matrix `[2048, 1024]` from a file, as models are loaded, on one thread.
fn packing(benches: &mut Benches) {
    let (rows, columns) = (2048, 1024);
    let values = Tensor::from_slice(&weights(rows * columns)).to_kind(Kind::BFloat16);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    Tensor::write_safetensors(&[("w", values.view([rows as i64, columns as i64]))], &file).unwrap();
    let source = SafetensorsSource::open(folder.path()).unwrap();
    for format in Format::ALL {
        let grid = Grid { format, rows, columns };
        let mut bytes = vec![0; grid.bytes()];
        let work = Work::Copied((rows * columns) as i64 * BF16 + grid.bytes() as i64);
        benches.run(&format!("packing/{format}"), work, || {
            let global = if format.has_global() {
                format.global(source.amax("w", format, 0..grid.tiles()).unwrap())
            } else {
                1.0
            };
            source.read_packed("w", format, global, 0..grid.tiles(), &mut bytes).unwrap();
        });
    }
}

/// The losses and the gradient of the hidden states, with the whole head at once as by default.
fn cross_entropy(benches: &mut Benches) {
    let (x, weight) = (random(&[TOKENS, HIDDEN]), random(&[VOCABULARY, HIDDEN]) * 0.02);
    let ids: Vec<i64> = Tensor::randint(VOCABULARY, [TOKENS], (Kind::Int64, Cpu)).try_into().unwrap();
    let targets = Targets::new(&ids, 1, &[TOKENS as usize], Cpu);
    let work = Work::Products(2 * 2 * TOKENS * HIDDEN * VOCABULARY);
    benches.run("cross_entropy/loss and gradient", work, || {
        let mut pass = HeadPass::new(&x, &targets, TOKENS as usize, true);
        pass.add_rows(&weight, 0);
        let loss = CrossEntropy { scale: 1.0 / TOKENS as f64 }.evaluate(&pass.log_probs());
        (loss.values, pass.backward(&loss.coefficients))
    });
}

fn adamw(benches: &mut Benches) {
    let numbers = [(); 4].map(|()| random(&[4 << 20]).abs().to_kind(Kind::Float));
    let ([gradient, master, exp_avg, exp_avg_sq], compute) = (&numbers.each_ref(), &random(&[4 << 20]));
    let state = adamw::State { master, exp_avg, exp_avg_sq, compute };
    let (lr, weight_decay, betas, eps) = (1e-4, 0.01, (0.9, 0.999), 1e-8);
    let update = adamw::Update { lr, weight_decay, betas, eps, count: 10, coefficient: 0.5 };
    // g is read, p, m and v are read and written, p is also written in bf16.
    let work = Work::InPlace((4 << 20) * (4 + 3 * 8 + BF16));
    benches.run("adamw/4M elements", work, || update.apply(gradient, &state));
}

/// `tensor` for an operation that takes the memory of its input.
fn copy(tensor: &Tensor) -> Buffer {
    let mut buffer = Buffer::like(tensor);
    buffer.copy_(tensor);
    buffer
}
