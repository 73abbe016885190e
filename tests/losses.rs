//! Losses by token through a whole model, and the pass over the head on a device.
//!
//! `XORL_TEST_DEVICE=cuda` runs the pass on the first GPU instead of the CPU: `tests/gpu.sh` does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod common;

use common::topology::{Case, Data, VOCAB, load, spec};
use tch::{Device, Kind, Tensor};
use xorl_dist::{
    device::{DeviceChoice, RankDevice},
    lora::{Adapter, LoraShape, targets::resolve},
    loss::{CrossEntropy, HeadPass, LogProbs, LossValues, Targets, TokenLoss},
    model::{
        base_plan::all_projections,
        transformer::{Batch, Transformer},
    },
    rng::Stream,
    shard::{ProcessGroups, Region},
};

fn model() -> (Transformer, Adapter) {
    let (case, spec) = (Case { vocab_chunk_rows: 400, ..Case::one() }, spec(false));
    let sites = resolve(&all_projections(&spec), Some(&case.targets), &[]).unwrap();
    let mut model = Transformer::new(spec, case.options(), &ProcessGroups::alone()).unwrap();
    load(&mut model, Data::Random);
    let mut adapter = model.new_adapter(&sites, LoraShape::new(3, 6.0));
    adapter.init(3, 0.05).unwrap();
    (model, adapter)
}

/// `count` ids of a vocabulary of `below`.
fn ids(name: &str, count: usize, below: usize) -> Vec<i64> {
    let stream = Stream::new(11, name);
    (0..count as u64).map(|i| stream.below(i, below as u64) as i64).collect()
}

/// Gradients of all dense adapters after one micro-batch.
fn gradient(
    (model, adapter): &mut (Transformer, Adapter),
    batch: &Batch,
    loss: &dyn TokenLoss,
) -> (f64, Tensor) {
    adapter.regions_mut().zero_gradients();
    let sum = model.forward_backward(batch, &mut [&mut *adapter], loss).unwrap().sum;
    let units = adapter.plan().parameters().len();
    let of = |unit| adapter.regions().of(Region::Dense).gradient(unit).copy();
    (sum, Tensor::cat(&(0..units).map(of).collect::<Vec<_>>(), 0).to_kind(Kind::Double))
}

#[test]
fn log_probabilities_are_those_of_the_logits() {
    let (mut model, mut adapter) = model();
    let (lengths, k) = ([4, 3, 5], 3);
    let tokens: usize = lengths.iter().sum();
    let mut targets = ids("targets", tokens * k, VOCAB);
    for absent in [0, 4, 5, 9, 10, 11, 35] {
        targets[absent] = -100;
    }
    targets[13] = targets[12];
    let batch = Batch::with_targets(&ids("ids", tokens, VOCAB), &targets, k, &lengths, Device::Cpu);
    let logits = model.logits(&batch, &mut [&mut adapter]).unwrap().to_kind(Kind::Double);
    let at = Tensor::from_slice(&targets).view([-1, 3]);
    let expected = logits.log_softmax(1, None).gather(1, &at.clamp_min(0), false);
    let expected = expected.where_scalarother(&at.ge(0), 0.0);
    let ours = model.evaluate(&batch, &mut [&mut adapter], &CrossEntropy { scale: 1.0 }).unwrap();
    let off = (ours.log_probs.to_kind(Kind::Double) - &expected).abs().max().double_value(&[]);
    assert!(off < 1e-5, "{off}");
    assert_eq!(ours.tokens, tokens - 1);
    let apart = (ours.sum + expected.sum(None).double_value(&[])).abs();
    assert!(apart < 1e-4, "{}: {apart}", ours.sum);
    // Sums of the documents add up to the sum.
    let parts: f64 = batch
        .targets()
        .sequences()
        .windows(2)
        .map(|pair| batch.targets().sum(&ours.values, pair[0]..pair[1]))
        .sum();
    assert!((parts / ours.sum - 1.0).abs() < 1e-12);
}

#[test]
fn shifted_targets_are_the_labels() {
    let mut model = model();
    let tokens = ids("ids", 7, VOCAB);
    let shifted = [tokens[1], tokens[2], -100, tokens[4], tokens[5], tokens[6], -100];
    let loss = CrossEntropy { scale: 0.2 };
    let labelled = Batch::new(&tokens, &tokens, &[3, 4], Device::Cpu);
    let shifted = Batch::with_targets(&tokens, &shifted, 1, &[3, 4], Device::Cpu);
    assert_eq!(gradient(&mut model, &labelled, &loss), gradient(&mut model, &shifted, &loss));
}

/// Coefficients that are given, `[tokens, 1]`.
struct Given(Tensor);

impl TokenLoss for Given {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        assert_eq!(log_probs.sequences, [0, 3, 7]);
        LossValues { values: log_probs.values.select(1, 0), coefficients: self.0.shallow_clone() }
    }
}

/// A gradient with a coefficient by token is the sum of the tokens' own, each computed with one scalar.
#[test]
fn coefficients_scale_the_gradients_of_their_tokens() {
    let mut model = model();
    let (tokens, targets) = (ids("ids", 7, VOCAB), ids("targets", 7, VOCAB));
    let lengths = [3, 4];
    let coefficients = [0.5, -2.0, 0.0, 1.0, 3.0, -0.25, 1.5f32];
    let given = Given(Tensor::from_slice(&coefficients).view([-1, 1]));
    let batch = |targets: &[i64]| Batch::with_targets(&tokens, targets, 1, &lengths, Device::Cpu);
    let (_, all) = gradient(&mut model, &batch(&targets), &given);
    let mut sum = all.zeros_like();
    for (token, &coefficient) in coefficients.iter().enumerate() {
        let mut own = vec![-1; 7];
        own[token] = targets[token];
        sum += gradient(&mut model, &batch(&own), &CrossEntropy { scale: -f64::from(coefficient) }).1;
    }
    assert!(sum.norm().double_value(&[]) > 1e-3);
    let off = ((all - &sum).norm() / sum.norm()).double_value(&[]);
    assert!(off < 1e-5, "{off}");
}

/// −Σ w·log p with weights of both signs.
struct Weighted(Tensor);

impl TokenLoss for Weighted {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let weights = self.0.to_device(log_probs.values.device()).to_kind(log_probs.values.kind());
        let values = -(&log_probs.values * &weights).sum_dim_intlist(1, false, None);
        LossValues { values, coefficients: -weights }
    }
}

/// Log-probabilities, sum and dx of one pass over a head that comes in two chunks.
fn pass(x: &Tensor, weight: &Tensor, targets: &Targets, loss: &dyn TokenLoss) -> (Tensor, f64, Tensor) {
    let _guard = tch::no_grad_guard();
    let mut pass = HeadPass::new(x, targets, 24, true);
    let cut = weight.size()[0] * 3 / 5;
    pass.add_rows(&weight.narrow(0, 0, cut), 0);
    pass.add_rows(&weight.narrow(0, cut, weight.size()[0] - cut), cut as usize);
    let log_probs = pass.log_probs();
    let LossValues { values, coefficients } = loss.evaluate(&log_probs);
    let d_x = pass.backward(&coefficients).unwrap().copy();
    (log_probs.values, targets.sum(&values, 0..targets.tokens()), d_x)
}

#[test]
fn the_pass_on_a_device_equals_fp64_on_the_host() {
    let device = match std::env::var("XORL_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            xorl_dist::device::torch::load_cuda().unwrap();
            RankDevice::open(DeviceChoice::Cuda, 0).unwrap()
        }
        _ => RankDevice::host(),
    };
    let (tokens, vocabulary) = (61, 1000);
    // Rows of 20 are no packs: on a GPU libtorch takes them.
    for (k, hidden) in [(1, 64), (3, 64), (3, 20)] {
        let mut targets = ids(&format!("targets {k}"), tokens * k, vocabulary);
        for absent in (0..targets.len()).step_by(7) {
            targets[absent] = -1;
        }
        let weights: Vec<f64> = (0..tokens * k).map(|i| (i * 13 % 17) as f64 / 8.0 - 0.5).collect();
        let loss = Weighted(Tensor::from_slice(&weights).view([-1, k as i64]));
        let random = |rows: usize| {
            let values = Tensor::randn([rows as i64, hidden], (Kind::Double, Device::Cpu));
            values.to_kind(Kind::BFloat16).to_kind(Kind::Double)
        };
        let (x, weight) = (random(tokens), random(vocabulary) * 0.25);
        let on = |device| Targets::new(&targets, k, &[tokens], device);
        let (log_probs, sum, d_x) = pass(&x, &weight, &on(Device::Cpu), &loss);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            let [x, weight] = [&x, &weight].map(|t| t.to_kind(kind).to_device(device.tensors()));
            let ours = pass(&x, &weight, &on(device.tensors()), &loss);
            let apart = |ours: &Tensor, exact: &Tensor| {
                let ours = ours.to_device(Device::Cpu).to_kind(Kind::Double);
                ((ours - exact).norm() / exact.norm()).double_value(&[])
            };
            let off =
                [apart(&ours.0, &log_probs), (ours.1 - sum).abs() / sum.abs().max(1.0), apart(&ours.2, &d_x)];
            assert!(off.iter().all(|&off| off < tolerance), "{kind:?} {k} {hidden}: {off:?}");
        }
    }
}
