//! Losses by the names that clients and configurations use.

use super::{
    CrossEntropy, Input, LossError, Param, Sequence, TokenLoss,
    cross_entropy::Weighted,
    formula::{Formula, PolicyTerms},
    inputs::{self, ADVANTAGES, Columns, WEIGHTS},
    report,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// A loss by name, with its parameters.
///
/// `cross_entropy`, `importance_sampling`, `ppo`, `cispo`, `dro` and `gspo` have tinker's formulas and defaults,
/// `policy_loss` and `drgrpo` xorl's. All are sums over targets, absent ones left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NamedLoss {
    pub name: String,
    pub params: BTreeMap<String, Param>,
}

impl NamedLoss {
    /// # Errors
    /// There is no such loss, or it has no such parameter, or a parameter has a wrong value.
    pub fn new(name: impl Into<String>, params: BTreeMap<String, Param>) -> Result<Self, LossError> {
        let loss = Self { name: name.into(), params };
        loss.formula()?;
        Ok(loss)
    }

    fn formula(&self) -> Result<Formula, LossError> {
        Formula::new(&self.name, &self.params)
    }

    /// The inputs that it reads, with these parameters.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn inputs(&self) -> Result<Vec<Input>, LossError> {
        Ok(self.formula()?.inputs())
    }

    /// True for cross-entropy, which reads no input that has to be given.
    pub fn is_plain(&self) -> bool {
        self.formula() == Ok(Formula::CrossEntropy)
    }

    /// The targets of a sequence that count for the division of a step: those present with a weight that is not 0
    /// (cross-entropy), or an advantage that is not 0 (policy losses).
    ///
    /// # Errors
    /// An input is missing, has another length, or a value that is not finite; the loss cannot read so many targets
    /// a token.
    pub fn valid(&self, sequence: &Sequence) -> Result<u64, LossError> {
        let formula = self.formula()?;
        check(&formula, sequence)?;
        let decides = if formula == Formula::CrossEntropy { WEIGHTS } else { ADVANTAGES };
        let decides = sequence.inputs.get(decides);
        let counts = |i: usize| decides.is_none_or(|values| values[i] != 0.0);
        let present = sequence.targets.iter().enumerate().filter(|&(i, &id)| id >= 0 && counts(i));
        Ok(present.count() as u64)
    }

    /// The loss of neighbouring sequences, which are those of the micro-batch that it is evaluated for and have
    /// equally many targets a token. `factor` is that of the gradient; the values are without it.
    ///
    /// # Errors
    /// Those of [`valid`](Self::valid), for any of them.
    pub fn over(
        &self,
        sequences: &[Sequence],
        factor: f64,
        device: Device,
    ) -> Result<Box<dyn TokenLoss>, LossError> {
        let formula = self.formula()?;
        sequences.iter().try_for_each(|sequence| check(&formula, sequence))?;
        if formula != Formula::CrossEntropy {
            let columns = Columns::new(&formula.inputs(), sequences);
            return Ok(Box::new(PolicyTerms { formula, columns, factor }));
        }
        if sequences.iter().all(|sequence| !sequence.inputs.contains_key(WEIGHTS)) {
            return Ok(Box::new(CrossEntropy { scale: factor }));
        }
        let weights = Columns::new(&formula.inputs(), sequences).weights;
        let k = sequences.first().map_or(1, |sequence| sequence.k) as i64;
        let weights = Tensor::from_slice(&weights).view([-1, k]).to_device(device);
        Ok(Box::new(Weighted { weights, scale: factor }))
    }

    /// Statistics of a policy loss over sequences with the log-probabilities `[tokens × k]` of each. A key ends with
    /// the way in which values of several parts combine, `ratio_min:min`. Always the same keys, without a target too.
    ///
    /// # Errors
    /// Those of [`valid`](Self::valid), for any of the sequences.
    pub fn report(
        &self,
        sequences: &[Sequence],
        log_probs: &[impl AsRef<[f32]>],
    ) -> Result<BTreeMap<String, f64>, LossError> {
        let formula = self.formula()?;
        sequences.iter().try_for_each(|sequence| check(&formula, sequence))?;
        Ok(report::statistics(&formula, sequences, log_probs))
    }
}

fn check(formula: &Formula, sequence: &Sequence) -> Result<(), LossError> {
    let (loss, k) = (formula.name(), sequence.k);
    inputs::check(loss, &formula.inputs(), sequence)?;
    if k > 1 && !formula.reads_many_targets() {
        return Err(LossError::ManyTargets { loss, k });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss, its parameters, and the start of the error.
    type Case<'a> = (&'a str, &'a [(&'a str, Param)], &'a str);

    fn params(given: &[(&str, Param)]) -> BTreeMap<String, Param> {
        given.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
    }

    fn number(value: f64) -> Param {
        Param::Number(value)
    }

    #[test]
    fn each_wrong_name_and_parameter_says_what_is_right() {
        let text = |value: &str| Param::Text(value.into());
        let cases: [Case; 12] = [
            (
                "sft",
                &[],
                "loss \"sft\" is unknown; there are cross_entropy (causallm_loss), importance_sampling, ppo",
            ),
            (
                "stable_reinforce",
                &[],
                "loss \"stable_reinforce\" is refused: its formula is not published; use importance_sampling",
            ),
            ("custom", &[], "loss \"custom\" is refused: a traced loss"),
            (
                "causallm_loss",
                &[("eps", number(1.0))],
                "cross_entropy: parameter \"eps\" is unknown; it has none",
            ),
            (
                "ppo",
                &[("clip_low", number(1.0))],
                "ppo: parameter \"clip_low\" is unknown; it has clip_low_threshold, ",
            ),
            (
                "ppo",
                &[("clip_low_threshold", number(1.3))],
                "ppo: parameter clip_low_threshold: expected at most clip_high_threshold, 1.2, got 1.3",
            ),
            (
                "dro",
                &[("beta", number(-1.0))],
                "dro: parameter beta: expected a number of at least 0, got -1",
            ),
            (
                "dro",
                &[("beta", text("x"))],
                "dro: parameter beta: expected a number of at least 0, got \"x\"",
            ),
            (
                "policy_loss",
                &[("eps_clip_c", number(1.0))],
                "policy_loss: parameter eps_clip_c: expected a number above 1, got 1",
            ),
            (
                "policy_loss",
                &[("use_tis", text("yes"))],
                "policy_loss: parameter use_tis: expected true or false, got \"yes\"",
            ),
            (
                "drgrpo",
                &[("kl_type", text("k4"))],
                "drgrpo: parameter kl_type: expected k3 | k1 | k2, got \"k4\"",
            ),
            (
                "drgrpo",
                &[("logprob_temperature", number(0.7))],
                "drgrpo: parameter logprob_temperature: expected 1, as others are not built, got 0.7",
            ),
        ];
        for (name, given, expected) in cases {
            let message = NamedLoss::new(name, params(given)).unwrap_err().to_string();
            assert!(message.starts_with(expected), "got {message:?}, expected {expected:?}");
        }
    }

    #[test]
    fn truth_values_are_numbers_in_json() {
        let loss: NamedLoss =
            serde_json::from_str(r#"{"name": "policy_loss", "params": {"use_tis": true}}"#).unwrap();
        assert_eq!(loss.params["use_tis"], number(1.0));
        let required = loss.inputs().unwrap();
        assert!(required.iter().any(|input| input.name == "rollout_logprobs"), "{required:?}");
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused_by_name() {
        let loss = |name: &str| NamedLoss::new(name, BTreeMap::new()).unwrap();
        let inputs = |given: &[(&str, &[f32])]| -> BTreeMap<String, Vec<f32>> {
            given.iter().map(|(name, values)| (name.to_string(), values.to_vec())).collect()
        };
        let cases = [
            (
                "ppo",
                1,
                inputs(&[("logprobs", &[0.0; 4])]),
                "ppo: input advantages is missing; there are logprobs",
            ),
            ("ppo", 1, inputs(&[]), "ppo: input logprobs is missing; there are none"),
            (
                "ppo",
                1,
                inputs(&[("logprobs", &[0.0; 4]), ("advantages", &[1.0; 3])]),
                "ppo: input advantages: expected 4 values, one a target, got 3",
            ),
            (
                "dro",
                1,
                inputs(&[("logprobs", &[0.0, f32::NAN, 0.0, 0.0]), ("advantages", &[1.0; 4])]),
                "dro: logprobs[1]: expected a finite number, got NaN",
            ),
            (
                "gspo",
                2,
                inputs(&[("logprobs", &[0.0; 4]), ("advantages", &[1.0; 4])]),
                "gspo: one target a token is read, got 2; ",
            ),
            ("cross_entropy", 3, inputs(&[]), "cross_entropy: 4 targets are no multiple of the 3 of a token"),
            (
                "cross_entropy",
                2,
                inputs(&[("weights", &[1.0; 2])]),
                "cross_entropy: input weights: expected 4",
            ),
        ];
        for (name, k, inputs, expected) in &cases {
            let sequence = Sequence { targets: &[1, 2, 3, 4], k: *k, inputs };
            for message in [
                loss(name).valid(&sequence).unwrap_err(),
                loss(name).over(&[sequence], 1.0, Device::Cpu).err().unwrap(),
                loss(name).report(&[sequence], &[[0.0f32; 4]]).unwrap_err(),
            ] {
                assert!(message.to_string().starts_with(expected), "got {message}, expected {expected}");
            }
        }
    }

    #[test]
    fn targets_count_where_their_weight_or_advantage_is_not_zero() {
        let given: BTreeMap<String, Vec<f32>> = [
            ("weights", vec![1.0, 0.0, -0.5, 1.0]),
            ("advantages", vec![0.0, 0.0, 1.0, -1.0]),
            ("logprobs", vec![0.0; 4]),
        ]
        .map(|(name, values)| (name.to_owned(), values))
        .into();
        let none = BTreeMap::new();
        let valid = |name: &str, inputs| {
            let loss = NamedLoss::new(name, BTreeMap::new()).unwrap();
            loss.valid(&Sequence { targets: &[3, 4, 5, -100], k: 1, inputs }).unwrap()
        };
        assert_eq!((valid("cross_entropy", &given), valid("cross_entropy", &none)), (2, 3));
        assert_eq!((valid("ppo", &given), valid("dro", &given)), (1, 1));
    }
}
