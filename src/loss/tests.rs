//! The pass and losses of each kind against libtorch autograd in fp64 through a head whose logits are whole.

use super::*;
use crate::ops::testing::{distance, leaf};
use tch::{Device, Kind};

/// Everything that a pass gives.
struct Result {
    log_probs: Tensor,
    sum: f64,
    d_x: Tensor,
}

/// One pass in chunks of `chunks.0` tokens and `chunks.1` rows of the head.
fn pass(
    x: &Tensor,
    weight: &Tensor,
    targets: &Targets,
    loss: &dyn TokenLoss,
    chunks: (usize, i64),
) -> Result {
    let _guard = tch::no_grad_guard();
    let mut pass = HeadPass::new(x, targets, chunks.0, true);
    let rows = weight.size()[0];
    for first in (0..rows).step_by(chunks.1 as usize) {
        pass.add_rows(&weight.narrow(0, first, chunks.1.min(rows - first)), first as usize);
    }
    let log_probs = pass.log_probs();
    let LossValues { values, coefficients } = loss.evaluate(&log_probs);
    let d_x = pass.backward(&coefficients).expect("asked for").copy();
    Result { sum: targets.sum(&values, 0..targets.tokens()), log_probs: log_probs.values, d_x }
}

fn cross_entropy(x: &Tensor, weight: &Tensor, ids: &[i64], chunks: (usize, i64)) -> Result {
    let targets = Targets::new(ids, 1, &[ids.len()], Device::Cpu);
    pass(x, weight, &targets, &CrossEntropy { scale: 0.25 }, chunks)
}

/// Per-token clipped policy loss −Σ min(ρ·A, clip(ρ)·A), ρ = p / p_old. `old` and `advantages` are `[tokens]`.
struct Policy {
    old: Tensor,
    advantages: Tensor,
}

impl Policy {
    const CLIP: (f64, f64) = (0.8, 1.2);

    fn formula(&self, log_probs: &Tensor) -> Tensor {
        let (ratio, advantages) = ((log_probs.select(1, 0) - &self.old).exp(), &self.advantages);
        -(&ratio * advantages).minimum(&(ratio.clamp(Self::CLIP.0, Self::CLIP.1) * advantages)).sum(None)
    }
}

impl TokenLoss for Policy {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let kind = log_probs.values.kind();
        let [old, advantages] = [&self.old, &self.advantages].map(|t| t.to_kind(kind));
        let ratio = (log_probs.values.select(1, 0) - old).exp();
        let clipped = ratio.clamp(Self::CLIP.0, Self::CLIP.1) * &advantages;
        let free = ratio * &advantages;
        let coefficients = (-&free).where_scalarother(&free.le_tensor(&clipped), 0.0).unsqueeze(1);
        let here = log_probs.present.select(1, 0);
        LossValues { values: (-free.minimum(&clipped)).where_scalarother(&here, 0.0), coefficients }
    }
}

/// Preference loss over pairs of sequences: softplus(−β·(S_0 − R_0 − S_1 + R_1)), S the sum of a sequence's
/// log-probabilities.
struct Preference {
    beta: f64,
    /// R `[sequences]`
    reference: Tensor,
    borders: Vec<usize>,
}

impl Preference {
    /// Sums `[sequences]` of `values` `[tokens]`.
    fn sums(&self, values: &Tensor) -> Tensor {
        let own = |pair: &[usize]| values.narrow(0, pair[0] as i64, (pair[1] - pair[0]) as i64).sum(None);
        Tensor::stack(&self.borders.windows(2).map(own).collect::<Vec<_>>(), 0)
    }

    /// β·(S_0 − R_0 − S_1 + R_1) `[pairs]`
    fn margins(&self, log_probs: &Tensor) -> Tensor {
        let gain = self.sums(&log_probs.select(1, 0)) - self.reference.to_kind(log_probs.kind());
        let pairs = gain.view([-1, 2]);
        (pairs.select(1, 0) - pairs.select(1, 1)) * self.beta
    }

    fn formula(&self, log_probs: &Tensor) -> Tensor {
        (-self.margins(log_probs)).softplus().sum(None)
    }
}

impl TokenLoss for Preference {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        assert_eq!(log_probs.sequences, self.borders);
        let margins = self.margins(&log_probs.values);
        let (values, slope) = ((-&margins).softplus(), -(-margins).sigmoid() * self.beta);
        let lengths: Vec<i64> = self.borders.windows(2).map(|pair| (pair[1] - pair[0]) as i64).collect();
        let by_token = |t: Tensor| t.repeat_interleave_self_tensor(&Tensor::from_slice(&lengths), 0, None);
        let signs = Tensor::stack(&[slope.shallow_clone(), -slope], 1).view([-1]);
        // A pair's value is on the first token of its second sequence.
        let all = log_probs.values.select(1, 0).zeros_like();
        let at: Vec<i64> = self.borders.iter().skip(1).step_by(2).map(|&at| at as i64).collect();
        LossValues {
            values: all.index_add(0, &Tensor::from_slice(&at), &values),
            coefficients: by_token(signs).unsqueeze(1),
        }
    }
}

/// Soft targets −Σ w·log p. `weights` are `[tokens, K]`.
struct Distillation {
    weights: Tensor,
}

impl TokenLoss for Distillation {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let weights = self.weights.to_kind(log_probs.values.kind());
        let values = -(&log_probs.values * &weights).sum_dim_intlist(1, false, None);
        LossValues { values, coefficients: -weights }
    }
}

/// A micro-batch with its head, in fp64.
struct Case {
    x: Tensor,
    weight: Tensor,
    ids: Vec<i64>,
    k: usize,
    lengths: Vec<usize>,
}

impl Case {
    /// Rounded to bf16, so that each kind computes from the same numbers.
    fn new(ids: &[i64], k: usize, lengths: &[usize], vocabulary: i64) -> Self {
        let rounded = |shape: &[i64]| leaf(shape).detach().to_kind(Kind::BFloat16).to_kind(Kind::Double);
        let x = rounded(&[(ids.len() / k) as i64, 16]).set_requires_grad(true);
        Self { x, weight: rounded(&[vocabulary, 16]) * 0.5, ids: ids.to_vec(), k, lengths: lengths.to_vec() }
    }

    /// `[tokens, K]` with a graph, 0 where absent.
    fn log_probs(&self) -> Tensor {
        let ids = Tensor::from_slice(&self.ids).view([-1, self.k as i64]);
        let all = self.x.matmul(&self.weight.tr()).log_softmax(-1, Kind::Double);
        all.gather(1, &ids.clamp_min(0), false).where_scalarother(&ids.ge(0), 0.0)
    }

    /// `loss` in each kind and chunking against autograd of `formula`.
    fn check(&self, loss: &dyn TokenLoss, formula: &dyn Fn(&Tensor) -> Tensor) {
        let log_probs = self.log_probs();
        let expected = formula(&log_probs);
        expected.backward();
        let (expected, d_x) = (expected.double_value(&[]), self.x.grad());
        assert!(d_x.norm().double_value(&[]) > 0.1, "there is something to compare");
        let targets = Targets::new(&self.ids, self.k, &self.lengths, Device::Cpu);
        let vocabulary = self.weight.size()[0];
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
            let [x, weight] = [&self.x.detach(), &self.weight].map(|t| t.to_kind(kind));
            for chunks in [(1, vocabulary / 2), (2, vocabulary), (100, vocabulary), (3, vocabulary / 3)] {
                let ours = pass(&x, &weight, &targets, loss, chunks);
                assert_eq!(ours.d_x.kind(), kind);
                let off =
                    |what: &str, off: f64| assert!(off < tolerance, "{kind:?} {chunks:?} {what}: {off}");
                off("sum", (ours.sum - expected).abs() / (1.0 + expected.abs()));
                let scale = 1.0 + log_probs.abs().max().double_value(&[]);
                off("log p", distance(&ours.log_probs, &log_probs) / scale);
                let apart = (ours.d_x.to_kind(Kind::Double) - &d_x).norm() / d_x.norm();
                off("dx", apart.double_value(&[]));
            }
        }
    }
}

#[test]
fn cross_entropy_equals_autograd_for_every_chunking() {
    // The second is more than a CPU takes at a time.
    for vocabulary in [11, 2 * HOST_ROWS + 3] {
        let last = vocabulary - 1;
        let case = Case::new(&[3, -100, 0, last, last, -100, 4], 1, &[4, 3], vocabulary);
        let targets = Targets::new(&case.ids, 1, &case.lengths, Device::Cpu);
        assert_eq!(targets.valid_in(0..7), 5);
        let loss = CrossEntropy { scale: 1.0 };
        case.check(&loss, &|log_probs| -log_probs.sum(None));
    }
}

#[test]
fn cross_entropy_scales_the_gradient_alone() {
    let case = Case::new(&[3, -100, 0], 1, &[3], 11);
    let targets = Targets::new(&case.ids, 1, &case.lengths, Device::Cpu);
    let [whole, quarter] = [1.0, 0.25]
        .map(|scale| pass(&case.x.detach(), &case.weight, &targets, &CrossEntropy { scale }, (100, 11)));
    assert_eq!(whole.sum, quarter.sum);
    assert_eq!(whole.d_x, quarter.d_x * 4.0);
}

#[test]
fn a_clipped_policy_loss_equals_autograd() {
    let ids = [3, 7, -1, 300, 7, 150, 149, -1, 0, 12];
    let case = Case::new(&ids, 1, &[4, 6], 301);
    // Ratios of 1, clipped above and below, and between: none close to where it is clipped.
    let apart = Tensor::from_slice(&[0.0, 0.5, 0.0, -0.5, 0.05, 0.5, -0.5, 0.0, -0.05, 0.1f64]);
    let advantages = Tensor::from_slice(&[1.0, 2.0, 0.0, -1.0, 0.5, -2.0, 1.5, 0.0, -0.5, 1.0f64]);
    let old = case.log_probs().detach().select(1, 0) - apart;
    let loss = Policy { old, advantages };
    case.check(&loss, &|log_probs| loss.formula(log_probs));
}

#[test]
fn a_preference_between_sequences_equals_autograd() {
    // Prompts have no targets; one sequence has none at all.
    let ids = [-1, 3, 7, -1, -1, 30, 7, 15, -1, 9, -1, -1, -1];
    let (lengths, borders) = ([3, 5, 3, 2], vec![0, 3, 8, 11, 13]);
    let case = Case::new(&ids, 1, &lengths, 41);
    let loss = Preference { beta: 0.3, reference: Tensor::from_slice(&[-4.0, -9.0, -2.0, 0.5f64]), borders };
    case.check(&loss, &|log_probs| loss.formula(log_probs));
}

#[test]
fn three_soft_targets_equal_autograd() {
    // Absent, repeated, all three, none, and the same target over and over.
    let ids = [3, 7, 9, 7, -1, 7, -1, -1, -1, 0, 299, 300, -1, 5, -1, 8, 8, 8];
    let case = Case::new(&ids, 3, &[2, 4], 301);
    let weights: Vec<f64> = (0..18).map(|i| f64::from(i * 7 % 11) / 10.0 - 0.2).collect();
    let weights = Tensor::from_slice(&weights).view([6, 3]);
    let loss = Distillation { weights: weights.shallow_clone() };
    case.check(&loss, &|log_probs| -(log_probs * &weights).sum(None));
}

#[test]
fn coefficients_that_cancel_equal_autograd() {
    let case = Case::new(&[3, 7, 9, 2], 2, &[2], 31);
    let weights = Tensor::from_slice(&[1.0, -1.0, 0.0, 0.0f64]).view([2, 2]);
    let loss = Distillation { weights: weights.shallow_clone() };
    case.check(&loss, &|log_probs| -(log_probs * &weights).sum(None));
}

#[test]
fn a_target_asked_for_twice_counts_twice() {
    let (x, weight) = (leaf(&[2, 5]).detach(), leaf(&[11, 5]).detach());
    let run = |ids: &[i64], k| {
        let targets = Targets::new(ids, k, &[2], Device::Cpu);
        pass(&x, &weight, &targets, &CrossEntropy { scale: 1.0 }, (2, 4))
    };
    let (once, twice) = (run(&[3, 5], 1), run(&[3, 3, 5, 5], 2));
    assert_eq!(twice.sum, 2.0 * once.sum);
    assert_eq!(twice.d_x, once.d_x * 2.0);
}

#[test]
fn log_probabilities_come_without_a_gradient() {
    let case = Case::new(&[3, -1, 7, 9], 2, &[2], 31);
    let _guard = tch::no_grad_guard();
    let targets = Targets::new(&case.ids, 2, &case.lengths, Device::Cpu);
    let mut pass = HeadPass::new(&case.x, &targets, 1, false);
    pass.add_rows(&case.weight, 0);
    let LogProbs { values, present, sequences } = pass.log_probs();
    assert!(distance(&values, &case.log_probs()) < 1e-12);
    assert_eq!(present, Tensor::from_slice(&[true, false, true, true]).view([2, 2]));
    assert_eq!(sequences, [0, 2]);
    assert!(pass.backward(&values).is_none());
}

#[test]
fn confident_and_lost_tokens_keep_their_digits() {
    let weight = Tensor::from_slice(&[40.0f32, -40.0]).view([2, 1]);
    let x = Tensor::from_slice(&[1.0f32, 1.0]).view([2, 1]);
    let result = cross_entropy(&x, &weight, &[0, 1], (8, 2));
    assert!((result.sum - 80.0).abs() < 1e-4, "{}", result.sum);
    let d_x: Vec<f32> = result.d_x.view([-1]).try_into().expect("floats");
    // d = 0.25·(1 − p_t)·(w_other − w_t)
    assert!((f64::from(d_x[0]) / (-0.25 * 80.0 * (-80.0f64).exp()) - 1.0).abs() < 1e-3, "{}", d_x[0]);
    assert!((f64::from(d_x[1]) - 20.0).abs() < 1e-4, "{}", d_x[1]);
}

#[test]
fn no_target_is_no_loss() {
    let weight = leaf(&[6, 4]).detach();
    for (tokens, k) in [(3, 1), (3, 2), (0, 1), (0, 3)] {
        let targets = Targets::new(&vec![-100; tokens * k], k, &[tokens], Device::Cpu);
        let x = leaf(&[tokens as i64, 4]).detach();
        let result = pass(&x, &weight, &targets, &CrossEntropy { scale: 0.25 }, (2, 3));
        assert_eq!((result.sum, targets.valid_in(0..tokens)), (0.0, 0));
        assert_eq!(result.log_probs.size(), [tokens as i64, k as i64]);
        assert_eq!(distance(&result.d_x, &x.zeros_like()), 0.0);
    }
}
