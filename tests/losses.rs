//! Losses by token through a whole model, losses by name against autograd and in a run, and the pass over the head on a
//! device.
//!
//! `XORL_TEST_DEVICE=cuda` runs the pass on the first GPU instead of the CPU: `tests/gpu.sh` does.

use crate::common::{
    failed, metrics, python, succeeded,
    tiny::TinyRun,
    topology::{Case, Data, VOCAB, load, spec},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use tch::{Device, Kind, Tensor};
use xorl_dist::{
    device::{DeviceChoice, RankDevice},
    lora::{Adapter, LoraShape, targets::resolve},
    loss::{
        Absent, CrossEntropy, HeadPass, LogProbs, LossValues, NamedLoss, Param, Sequence, Targets, TokenLoss,
    },
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

/// A loss by name over some sequences, as the oracle takes it.
struct NamedCase {
    loss: NamedLoss,
    k: usize,
    lengths: Vec<usize>,
    targets: Vec<i64>,
    /// `[tokens × VOCABULARY]`
    logits: Vec<f64>,
    inputs: BTreeMap<String, Vec<f32>>,
}

impl NamedCase {
    const VOCABULARY: usize = 13;

    /// Five sequences, one empty and one of a single token. Neighbouring targets pair each log-ratio with each
    /// advantage.
    fn new(name: &str, params: Value, optional: &[&str], k: usize) -> Self {
        let lengths = vec![7, 0, 12, 1, 20];
        let count = lengths.iter().sum::<usize>() * k;
        let mut targets = ids(&format!("{name} targets"), count, Self::VOCABULARY);
        for absent in (4..count).step_by(11) {
            targets[absent] = -100;
        }
        let logits = ids("logits", count / k * Self::VOCABULARY, 4001).into_iter();
        let logits: Vec<f64> = logits.map(|logit| logit as f64 / 1000.0 - 2.0).collect();
        let log_p = Vec::<f64>::try_from(Self::log_p(&logits, &targets, k).view([-1])).unwrap();
        let log_ratios = |apart: &[f64]| -> Vec<f32> {
            log_p.iter().zip(apart.iter().cycle()).map(|(p, apart)| (p - apart) as f32).collect()
        };
        let cycle = |values: &[f32]| -> Vec<f32> { values.iter().copied().cycle().take(count).collect() };
        let all = [
            ("weights", cycle(&[1.0, -0.5, 0.0, 2.5, 0.125])),
            ("logprobs", log_ratios(&[0.0, 0.5, -0.5, 0.05, -0.05, 1.7, -1.7, 26.0])),
            ("advantages", cycle(&[1.0, -1.0, 0.5, 0.0, -2.5])),
            ("clip_low_threshold", cycle(&[0.5, 0.9, 0.25])),
            ("clip_high_threshold", cycle(&[1.5, 1.01, 5.0, 1.2])),
            ("sequence_ratio_mask", cycle(&[1.0, 0.0, 1.0, 0.5])),
            ("rollout_logprobs", log_ratios(&[0.1, 3.0, -3.0, -0.2, 0.6])),
            ("ref_logprobs", log_ratios(&[0.1, 2.0, -3.0, -0.4, 14.0, -14.0])),
        ];
        let params = serde_json::from_value(params).unwrap();
        let loss = NamedLoss::new(name, params).unwrap();
        let required = loss.inputs().unwrap().into_iter().filter(|input| input.absent == Absent::Refused);
        let given: Vec<&str> = required.map(|input| input.name).chain(optional.iter().copied()).collect();
        let inputs = all.into_iter().filter(|(name, _)| given.contains(name));
        let inputs = inputs.map(|(name, values)| (name.to_owned(), values)).collect();
        Self { loss, k, lengths, targets, logits, inputs }
    }

    /// log p of the targets `[tokens, k]`, 0 where absent.
    fn log_p(logits: &[f64], targets: &[i64], k: usize) -> Tensor {
        let all = Tensor::from_slice(logits).view([-1, Self::VOCABULARY as i64]).log_softmax(1, None);
        let at = Tensor::from_slice(targets).view([-1, k as i64]);
        all.gather(1, &at.clamp_min(0), false).where_scalarother(&at.ge(0), 0.0)
    }

    fn sequences(&self) -> Vec<BTreeMap<String, Vec<f32>>> {
        let mut start = 0;
        let own = |length: &usize| {
            let range = start..start + length * self.k;
            start = range.end;
            self.inputs.iter().map(|(name, values)| (name.clone(), values[range.clone()].to_vec())).collect()
        };
        self.lengths.iter().map(own).collect()
    }

    /// Compares our loss with the oracle's answer.
    fn compare(&self, theirs: &Value) {
        const FACTOR: f64 = 0.25;
        let inputs = self.sequences();
        let mut borders = vec![0];
        borders.extend(self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let own = |i: usize| borders[i] * self.k..borders[i + 1] * self.k;
        let sequences: Vec<Sequence> = (0..inputs.len())
            .map(|i| Sequence { targets: &self.targets[own(i)], k: self.k, inputs: &inputs[i] })
            .collect();
        let values = Self::log_p(&self.logits, &self.targets, self.k);
        let present = Tensor::from_slice(&self.targets).view([-1, self.k as i64]).ge(0);
        let log_probs = LogProbs { values: values.shallow_clone(), present, sequences: &borders };
        let found = self.loss.over(&sequences, FACTOR, Device::Cpu).unwrap().evaluate(&log_probs);
        let what = format!("{:?} {:?}", self.loss, self.inputs.keys());
        let close = |ours: f64, theirs: f64, most: f64| (ours - theirs).abs() <= most * (1.0 + theirs.abs());
        let (ours, loss) =
            (found.values.sum(Kind::Double).double_value(&[]), theirs["loss"].as_f64().unwrap());
        assert!(close(ours, loss, 1e-9), "{what}: {ours}, expected {loss}");
        let ours = Vec::<f64>::try_from(found.coefficients.view([-1])).unwrap();
        let expected: Vec<f64> = serde_json::from_value(theirs["coefficients"].clone()).unwrap();
        assert!(expected.iter().any(|c| *c != 0.0), "{what}: nothing to compare");
        for (i, (&ours, &theirs)) in
            ours.iter().zip(&expected).enumerate().filter(|&(i, _)| self.targets[i] >= 0)
        {
            assert!(
                close(ours / FACTOR, theirs, 1e-9),
                "{what}: target {i}: {}, expected {theirs}",
                ours / FACTOR
            );
        }
        // Log-probabilities reach the statistics in fp32.
        let values = Vec::<f32>::try_from(values.to_kind(Kind::Float).view([-1])).unwrap();
        let log_probs: Vec<&[f32]> = (0..inputs.len()).map(|i| &values[own(i)]).collect();
        let told = self.loss.report(&sequences, &log_probs).unwrap();
        let expected: BTreeMap<String, f64> = serde_json::from_value(theirs["statistics"].clone()).unwrap();
        assert_eq!(told.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
        for (key, &theirs) in &expected {
            assert!(close(told[key], theirs, 1e-5), "{what}: {key}: {}, expected {theirs}", told[key]);
            let share =
                key.ends_with("frac:mean") && !["importance_sampling", "dro"].contains(&&*self.loss.name);
            assert!(
                !share || (theirs > 0.0 && theirs < 1.0),
                "{what}: {key} is {theirs}: a branch is not taken"
            );
        }
    }
}

#[test]
fn python_every_loss_by_name_equals_autograd() {
    let thresholds = ["clip_low_threshold", "clip_high_threshold"];
    let clip = json!({"clip_low_threshold": 0.7, "clip_high_threshold": 1.4});
    let tis = json!({"use_tis": true, "eps_clip_c": 3.0});
    let limits = json!({"use_tis": true, "tis_clip_low": 0.5, "tis_clip_high": 1.5, "icepop_beta": 4.0, "eps_clip": 0.1,
        "eps_clip_high": 0.3, "eps_clip_c": 1.5});
    let grpo = |kl: &str, ratio: &str, beta: f64| json!({"kl_type": kl, "ratio_type": ratio, "beta": beta, "clip_low": 0.1, "clip_high": 0.4});
    let cases = [
        NamedCase::new("cross_entropy", json!({}), &[], 1),
        NamedCase::new("causallm_loss", json!({}), &["weights"], 1),
        NamedCase::new("cross_entropy", json!({}), &["weights"], 3),
        NamedCase::new("importance_sampling", json!({"compute_kl_stats": true}), &[], 1),
        NamedCase::new("importance_sampling", json!({}), &[], 3),
        NamedCase::new("ppo", json!({}), &[], 1),
        NamedCase::new("ppo", clip.clone(), &[], 1),
        NamedCase::new("ppo", json!({}), &thresholds, 1),
        NamedCase::new("cispo", json!({}), &[], 1),
        NamedCase::new("cispo", clip.clone(), &[], 1),
        NamedCase::new("cispo", json!({}), &thresholds, 1),
        NamedCase::new("dro", json!({}), &[], 1),
        NamedCase::new("dro", json!({"beta": 0.3}), &[], 1),
        NamedCase::new("gspo", json!({}), &[], 1),
        NamedCase::new("gspo", clip, &["sequence_ratio_mask"], 1),
        NamedCase::new("gspo", json!({}), &[thresholds[0], thresholds[1], "sequence_ratio_mask"], 1),
        NamedCase::new("policy_loss", json!({}), &[], 1),
        NamedCase::new(
            "policy_loss",
            json!({"eps_clip": 0.1, "eps_clip_high": 0.3, "eps_clip_c": 1.5}),
            &[],
            1,
        ),
        NamedCase::new("policy_loss", json!({"icepop_beta": 4.0}), &thresholds, 1),
        NamedCase::new("policy_loss", tis, &[], 1),
        NamedCase::new("policy_loss", limits, &[], 1),
        NamedCase::new("drgrpo", json!({}), &[], 1),
        NamedCase::new("drgrpo", grpo("k1", "token", 0.1), &[], 1),
        NamedCase::new("drgrpo", grpo("k2", "sequence", 0.2), &[], 1),
        NamedCase::new("drgrpo", grpo("k3", "token", 0.3), &[], 1),
        NamedCase::new("drgrpo", grpo("k3", "sequence", 0.0), &["sequence_ratio_mask"], 1),
    ];
    let ask = |case: &NamedCase| {
        json!({"loss": case.loss.name, "params": case.loss.params, "k": case.k, "lengths": case.lengths,
            "targets": case.targets, "logits": case.logits, "inputs": case.inputs})
    };
    let asked: Vec<Value> = cases.iter().map(ask).collect();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/losses.py");
    let mut command = Command::new(python());
    let mut oracle =
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("no Python");
    oracle.stdin.take().unwrap().write_all(json!(asked).to_string().as_bytes()).unwrap();
    let output = oracle.wait_with_output().unwrap();
    assert!(output.status.success(), "the oracle failed: {}", output.status);
    let told: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told.len(), cases.len());
    for (case, theirs) in cases.iter().zip(&told) {
        case.compare(theirs);
    }
}

#[test]
fn no_number_makes_a_loss_by_name_panic() {
    let numbers = [f64::NEG_INFINITY, f64::NAN, f64::INFINITY, -1e30, 0.0, -0.0];
    let names =
        ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "policy_loss", "drgrpo"];
    for name in names {
        let params: &[(&str, f64)] = match name {
            "policy_loss" => &[("use_tis", 1.0), ("icepop_beta", 2.0), ("eps_clip_c", 3.0)],
            "drgrpo" => &[("beta", 0.1)],
            _ => &[],
        };
        let params = params.iter().map(|&(name, value)| (name.to_owned(), Param::Number(value)));
        let loss = NamedLoss::new(name, params.collect()).unwrap();
        let extreme = vec![-f32::MAX, f32::MAX, 0.0, 1.0, f32::MAX, -f32::MAX];
        let inputs = loss.inputs().unwrap().iter().map(|i| (i.name.to_owned(), extreme.clone())).collect();
        for tokens in [6, 0] {
            let inputs = if tokens == 0 { BTreeMap::new() } else { BTreeMap::clone(&inputs) };
            let sequences = [Sequence { targets: &[1, 2, 3, 4, 5, 6][..tokens], k: 1, inputs: &inputs }];
            let sequences = if tokens == 0 { &[][..] } else { &sequences };
            let values = Tensor::from_slice(&numbers[..tokens]).view([-1, 1]);
            let log_probs =
                LogProbs { present: values.ones_like().to_kind(Kind::Bool), values, sequences: &[0, tokens] };
            let found = loss.over(sequences, 1.0, Device::Cpu).unwrap().evaluate(&log_probs);
            assert_eq!(
                (found.values.size(), found.coefficients.size()),
                (vec![tokens as i64], vec![tokens as i64, 1])
            );
            let told = loss.report(sequences, &[numbers.map(|number| number as f32)]).unwrap();
            assert!(told.values().all(|value| value.is_finite()), "{name}: {told:?}");
            assert!(told.keys().all(|key| key.matches(':').count() == 1), "{name}: {told:?}");
        }
    }
}

/// Weights of 0 and 1 are labels of -100 and others; dro without its penalty, and cispo with the ratio fixed at 1, are
/// cross-entropy weighted by the advantages.
#[test]
fn a_local_run_takes_its_loss_and_the_inputs_of_its_rows_by_name() {
    let run = TinyRun::new();
    let rows = std::fs::read_to_string(run.at("rows.jsonl")).unwrap();
    let marked: Vec<Value> = rows
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let labels: Vec<i64> = serde_json::from_value(row["labels"].clone()).unwrap();
            let marks: Vec<f64> = labels.iter().map(|&label| f64::from(u8::from(label != -100))).collect();
            let old = vec![-1.0; marks.len()];
            json!({"input_ids": row["input_ids"], "weights": marks, "advantages": marks, "logprobs": old})
        })
        .collect();
    let write = |name: &str, rows: &[Value]| {
        std::fs::write(run.at(name), rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        json!([{"path": run.at(name), "type": "tokenized"}]).to_string()
    };
    let data = write("marked.jsonl", &marked);
    let prepared = run.at("prepared").display().to_string();
    let losses = |out: &str, packing: &str, more: &[&str]| -> Vec<f64> {
        let packed = ["--data.sample_packing_method", packing, "--data.sample_packing_sequence_len", "32"];
        let short = ["--train.max_steps", "6", "--train.save_steps", "0"];
        succeeded(&run.run(1, out, &[&packed[..], &short, more].concat()));
        metrics(&run.at(out)).iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    let kept = ["--data.datasets", &data, "--data.dataset_prepared_path", &prepared];
    let loss =
        |name, params| [&kept[..], &["--train.loss_fn", name, "--train.loss_fn_params", params]].concat();
    let cispo = r#"{"clip_low_threshold": 1, "clip_high_threshold": 1}"#;
    for packing in ["none", "multipack"] {
        let expected = losses(&format!("labels {packing}"), packing, &[]);
        for (name, more) in [
            ("weights", kept.to_vec()),
            ("weights again", kept.to_vec()),
            ("dro", loss("dro", r#"{"beta": 0}"#)),
            ("cispo", loss("cispo", cispo)),
        ] {
            let found = losses(&format!("{name} {packing}"), packing, &more);
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let off = (found / expected - 1.0).abs();
                assert!(off < 1e-5, "{name}, {packing}, step {step}: {found}, expected {expected}");
            }
            assert_eq!(found.len(), expected.len());
        }
    }
    let mut holed = marked;
    holed[1].as_object_mut().unwrap().remove("advantages");
    let holed = write("holed.jsonl", &holed);
    let rows = json!([{"path": run.at("rows.jsonl"), "type": "tokenized"}]).to_string();
    let cases = [
        (
            "ppo",
            "{}",
            &rows,
            "rows.jsonl:1: expected field `logprobs`, found `input_ids`, `labels`; train.loss_fn",
        ),
        ("ppo", "{}", &holed, "holed.jsonl:2: expected field `advantages`"),
        ("stable_reinforce", "{}", &data, "--train.loss_fn: loss \"stable_reinforce\" is refused"),
        (
            "dro",
            r#"{"clip": 1}"#,
            &data,
            "--train.loss_fn_params: dro: parameter \"clip\" is unknown; it has beta",
        ),
    ];
    for (name, params, data, expected) in cases {
        let more = ["--data.datasets", data, "--train.loss_fn", name, "--train.loss_fn_params", params];
        let line = failed(&run.run(1, "refused", &more), 2);
        assert!(line.contains(expected), "{line}");
        assert!(!run.at("refused").exists());
    }
}
