//! Losses by name: parameters with their defaults, inputs, and the sum over the targets of a micro-batch.

use super::{
    LogProbs, LossError, LossValues, Param, TokenLoss,
    inputs::{
        ADVANTAGES, Absent, CLIP_HIGH, CLIP_LOW, Columns, Input, LOGPROBS, RATIO_MASK, REFERENCE, ROLLOUT,
        WEIGHTS,
    },
    params::Params,
    policy::{self, Divergence, PolicyLoss, Ratio, Target, Term},
    sequence,
};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// A loss with its parameters. `clip` are thresholds of the ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Formula {
    CrossEntropy,
    ImportanceSampling,
    Ppo { clip: [f64; 2] },
    Cispo { clip: [f64; 2] },
    Dro { beta: f64 },
    Gspo { clip: [f64; 2] },
    PolicyLoss { clip: [f64; 2], parts: PolicyLoss },
    DrGrpo { clip: [f64; 2], beta: f64, of_sequence: bool, divergence: Divergence },
}

/// The losses, with their other names.
const NAMES: &str =
    "cross_entropy (causallm_loss), importance_sampling, ppo, cispo, dro, gspo, policy_loss, drgrpo";

/// Requests of a server are cut anywhere, so that both answers of a pair may be in different passes.
const PAIRS_ELSEWHERE: &str = "pairs of answers are for runs with data of type preference; on the server forward_backward_custom computes it";

impl Formula {
    /// The loss `name` with `given` parameters.
    pub fn new(name: &str, given: &BTreeMap<String, Param>) -> Result<Self, LossError> {
        const THRESHOLDS: [&str; 2] = [CLIP_LOW, CLIP_HIGH];
        let refused = |name, reason| Err(LossError::Refused { name, reason });
        let loss = match name {
            "cross_entropy" | "causallm_loss" => Self::CrossEntropy,
            "importance_sampling" => Self::ImportanceSampling,
            "ppo" => Self::Ppo { clip: [0.8, 1.2] },
            "cispo" => Self::Cispo { clip: [0.0, 4.0] },
            "dro" => Self::Dro { beta: 0.05 },
            "gspo" => Self::Gspo { clip: [0.8, 1.2] },
            "policy_loss" => {
                let parts = PolicyLoss { dual_clip: None, icepop: None, tis: None };
                Self::PolicyLoss { clip: [0.8, 1.2], parts }
            }
            "drgrpo" => {
                let divergence = Divergence::K3;
                Self::DrGrpo { clip: [0.8, 1.28], beta: 0.0, of_sequence: false, divergence }
            }
            "stable_reinforce" => {
                return refused("stable_reinforce", "its formula is not published; use importance_sampling");
            }
            "custom" => {
                let reason = "a traced loss is not run on the server; forward_backward_custom computes it on the client";
                return refused("custom", reason);
            }
            "dpo" => return refused("dpo", PAIRS_ELSEWHERE),
            "simpo" => return refused("simpo", PAIRS_ELSEWHERE),
            _ => return Err(LossError::Unknown { name: name.into(), known: NAMES.into() }),
        };
        let mut params = Params::new(loss.name(), given);
        let loss = match loss {
            Self::CrossEntropy | Self::ImportanceSampling => loss,
            Self::Ppo { clip } => Self::Ppo { clip: params.range(THRESHOLDS, clip)? },
            Self::Cispo { clip } => Self::Cispo { clip: params.range(THRESHOLDS, clip)? },
            Self::Gspo { clip } => Self::Gspo { clip: params.range(THRESHOLDS, clip)? },
            Self::Dro { beta } => Self::Dro { beta: params.number("beta", beta, 0.0)? },
            Self::PolicyLoss { .. } => {
                let clip = [
                    1.0 - params.number("eps_clip", 0.2, 0.0)?,
                    1.0 + params.number("eps_clip_high", 0.2, 0.0)?,
                ];
                let parts = PolicyLoss {
                    dual_clip: params.above_one("eps_clip_c")?,
                    icepop: params.above_one("icepop_beta")?,
                    tis: {
                        let used = params.flag("use_tis")?;
                        let limits = params.range(["tis_clip_low", "tis_clip_high"], [0.1, 2.0])?;
                        used.then_some(limits)
                    },
                };
                Self::PolicyLoss { clip, parts }
            }
            Self::DrGrpo { beta, .. } => Self::DrGrpo {
                clip: [
                    1.0 - params.number("clip_low", 0.2, 0.0)?,
                    1.0 + params.number("clip_high", 0.28, 0.0)?,
                ],
                beta: params.number("beta", beta, 0.0)?,
                of_sequence: params.choice("ratio_type", ("token", false), &[("sequence", true)])?,
                divergence: params.choice(
                    "kl_type",
                    ("k3", Divergence::K3),
                    &[("k1", Divergence::K1), ("k2", Divergence::K2)],
                )?,
            },
        };
        if loss != Self::CrossEntropy {
            // Statistics are always computed.
            params.flag("compute_kl_stats")?;
            params.neutral("compute_ref_logprobs", 0.0)?;
            params.neutral("compute_per_sample_k3", 0.0)?;
            params.neutral("logprob_temperature", 1.0)?;
        }
        params.end()?;
        Ok(loss)
    }

    /// The first name of the loss.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross_entropy",
            Self::ImportanceSampling => "importance_sampling",
            Self::Ppo { .. } => "ppo",
            Self::Cispo { .. } => "cispo",
            Self::Dro { .. } => "dro",
            Self::Gspo { .. } => "gspo",
            Self::PolicyLoss { .. } => "policy_loss",
            Self::DrGrpo { .. } => "drgrpo",
        }
    }

    /// The inputs that it reads.
    pub fn inputs(&self) -> Vec<Input> {
        if *self == Self::CrossEntropy {
            return vec![Input::or(WEIGHTS, 1.0)];
        }
        let mut inputs = vec![Input::required(LOGPROBS), Input::required(ADVANTAGES)];
        if let Self::Ppo { clip }
        | Self::Cispo { clip }
        | Self::Gspo { clip }
        | Self::PolicyLoss { clip, .. }
        | Self::DrGrpo { clip, .. } = self
        {
            inputs.extend([Input::or(CLIP_LOW, clip[0]), Input::or(CLIP_HIGH, clip[1])]);
        }
        if self.is_of_sequences() {
            inputs.push(Input { name: RATIO_MASK, absent: Absent::Advantaged });
        }
        match self {
            Self::PolicyLoss { parts: PolicyLoss { tis: Some(_), .. }, .. } => {
                inputs.push(Input::required(ROLLOUT))
            }
            Self::DrGrpo { beta, .. } if *beta > 0.0 => inputs.push(Input::required(REFERENCE)),
            _ => {}
        }
        inputs
    }

    /// True if a token may have several targets.
    pub fn reads_many_targets(&self) -> bool {
        matches!(self, Self::CrossEntropy | Self::ImportanceSampling)
    }

    /// True if the ratio is that of a whole sequence.
    fn is_of_sequences(&self) -> bool {
        matches!(self, Self::Gspo { .. } | Self::DrGrpo { of_sequence: true, .. })
    }

    /// True if a target without an advantage has no part in the loss: it belongs to a prompt. The penalty of dro is on
    /// all targets.
    fn leaves_out(&self, target: &Target) -> bool {
        target.advantage == 0.0 && !matches!(self, Self::Dro { .. })
    }

    fn term(&self, of_sequence: f64, target: &Target) -> Term {
        match self {
            Self::CrossEntropy => Term { value: -target.log_p, slope: -1.0, ..Term::default() },
            Self::ImportanceSampling => policy::importance_sampling(target.ratio(), target),
            Self::Ppo { .. } => policy::clipped(target.ratio(), target),
            Self::Cispo { .. } => policy::cispo(target.ratio(), target),
            Self::Dro { beta } => policy::dro(*beta, target),
            Self::Gspo { .. } => policy::clipped(Ratio::of(of_sequence), target),
            Self::PolicyLoss { parts, .. } => parts.term(Ratio::bounded(target.log_p - target.old), target),
            Self::DrGrpo { beta, of_sequence: whole, divergence, .. } => {
                let log_ratio = if *whole { of_sequence } else { target.log_p - target.old };
                let term = policy::clipped(Ratio::bounded(log_ratio), target);
                if *beta == 0.0 {
                    return term;
                }
                let (value, slope) = divergence.of(target);
                Term { value: term.value + beta * value, slope: term.slope + beta * slope, ..term }
            }
        }
    }

    /// The divergence from the reference model of a target, if the loss has one.
    pub fn divergence(&self, target: &Target) -> Option<f64> {
        match self {
            Self::DrGrpo { beta, divergence, .. } if *beta > 0.0 => Some(divergence.of(target).0),
            _ => None,
        }
    }

    /// Hands every target that has a part in the loss to `each`, with its place and its term. `log_p` and `is_present`
    /// are `[tokens × k]`, `sequences` borders of tokens.
    pub fn for_each(
        &self,
        columns: &Columns,
        (sequences, k): (&[usize], usize),
        log_p: &[f64],
        is_present: impl Fn(usize) -> bool,
        mut each: impl FnMut(usize, &Target, &Term),
    ) {
        let value = |column: &[f64], i: usize| column.get(i).copied().unwrap_or_default();
        let target = |i: usize| Target {
            log_p: value(log_p, i),
            old: value(&columns.old, i),
            advantage: value(&columns.advantages, i),
            low: value(&columns.low, i),
            high: value(&columns.high, i),
            rollout: value(&columns.rollout, i),
            reference: value(&columns.reference, i),
        };
        for pair in sequences.windows(2) {
            let own = || (pair[0] * k..pair[1] * k).filter(|&i| is_present(i));
            let of_sequence = match self.is_of_sequences() {
                true => sequence::log_ratio(own().map(|i| (value(&columns.ratio_mask, i), target(i)))),
                false => 0.0,
            };
            for i in own() {
                let target = target(i);
                if !self.leaves_out(&target) {
                    each(i, &target, &self.term(of_sequence, &target));
                }
            }
        }
    }
}

/// A policy loss over the sequences of a micro-batch.
pub(super) struct PolicyTerms {
    pub formula: Formula,
    pub columns: Columns,
    /// Factor of the coefficients; the values are without it.
    pub factor: f64,
}

impl TokenLoss for PolicyTerms {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LogProbs { values: all, present, sequences } = log_probs;
        let (tokens, k) = (all.size()[0] as usize, all.size()[1] as usize);
        let (mut log_p, mut here) = (vec![0.0; tokens * k], vec![0u8; tokens * k]);
        host(all, Kind::Double).copy_data(&mut log_p, tokens * k);
        host(present, Kind::Uint8).copy_data(&mut here, tokens * k);
        let (mut values, mut coefficients) = (vec![0.0; tokens], vec![0.0; tokens * k]);
        self.formula.for_each(
            &self.columns,
            (sequences, k),
            &log_p,
            |i| here[i] != 0,
            |i, _, term| {
                values[i / k] += term.value;
                coefficients[i] = term.slope * self.factor;
            },
        );
        let like = |values: &[f64]| Tensor::from_slice(values).to_kind(all.kind()).to_device(all.device());
        LossValues {
            values: like(&values),
            coefficients: like(&coefficients).view([tokens as i64, k as i64]),
        }
    }

    fn is_policy(&self) -> bool {
        true
    }
}

fn host(tensor: &Tensor, kind: Kind) -> Tensor {
    tensor.to_device(Device::Cpu).to_kind(kind).contiguous()
}
