//! Losses over pairs of answers to one prompt, a chosen and a rejected one: DPO and its kin, as TRL defines them.
//!
//! The score of an answer is c = Σ_t (log p_t − log q_t) over its tokens, where q is the reference model; some forms
//! take the mean over the tokens. A loss depends on d = c_chosen − c_rejected alone, so that ∂L/∂log p_t = ∂L/∂d for
//! each token of the chosen answer and −∂L/∂d for the rejected one. With β and label smoothing ε:
//!
//! - `sigmoid`: −(1 − ε)·log σ(βd) − ε·log σ(−βd) (DPO, Rafailov et al., 2023);
//! - `sigmoid_norm`: the same of mean scores (Lambert et al., Tülu 3, 2024);
//! - `hinge`: max(0, 1 − βd) (SLiC, Zhao et al., 2023);
//! - `ipo`: (d − 1/(2β))² of mean scores (Azar et al., 2023);
//! - `robust`: (−(1 − ε)·log σ(βd) + ε·log σ(−βd))/(1 − 2ε) (Chowdhury et al., 2024);
//! - `simpo`: `sigmoid` of d − γ/β with mean scores and no reference (Meng et al., 2024).

use super::{LogProbs, LossError, LossValues, Param, TokenLoss, params::Params};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Names of losses over pairs.
pub const PAIR_LOSSES: [&str; 2] = ["dpo", "simpo"];

/// `loss_type` of `dpo`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Sigmoid,
    Hinge,
    Ipo,
    Robust,
}

/// A loss over pairs with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    form: Form,
    beta: f64,
    label_smoothing: f64,
    /// Scores are means over tokens.
    of_means: bool,
    /// γ/β, which d has to exceed.
    margin: f64,
    reads_reference: bool,
}

impl Preference {
    /// The loss `name`, one of [`PAIR_LOSSES`].
    ///
    /// # Errors
    /// There is no such loss of pairs, it has no such parameter, or a parameter has a wrong value.
    pub fn new(name: &str, given: &BTreeMap<String, Param>) -> Result<Self, LossError> {
        let loss = PAIR_LOSSES
            .into_iter()
            .find(|known| *known == name)
            .ok_or_else(|| LossError::Unknown { name: name.into(), known: PAIR_LOSSES.join(", ") })?;
        let mut params = Params::new(loss, given);
        let beta = params.positive("beta", 0.1)?;
        let label_smoothing = params.below_half("label_smoothing")?;
        let loss = if loss == "simpo" {
            let margin = params.number("simpo_gamma", 0.5, 0.0)? / beta;
            let form = Form::Sigmoid;
            Self { form, beta, label_smoothing, of_means: true, margin, reads_reference: false }
        } else {
            let forms = [
                ("sigmoid_norm", (Form::Sigmoid, true)),
                ("hinge", (Form::Hinge, false)),
                ("ipo", (Form::Ipo, true)),
                ("robust", (Form::Robust, false)),
            ];
            let (form, of_means) = params.choice("loss_type", ("sigmoid", (Form::Sigmoid, false)), &forms)?;
            let reads_reference = !params.flag("reference_free")?;
            Self { form, beta, label_smoothing, of_means, margin: 0.0, reads_reference }
        };
        params.end()?;
        Ok(loss)
    }

    /// True if it compares with the log-probabilities of a reference model.
    pub fn reads_reference(&self) -> bool {
        self.reads_reference
    }

    /// L and ∂L/∂d.
    fn term(&self, d: f64) -> (f64, f64) {
        let (beta, smooth) = (self.beta, self.label_smoothing);
        let d = d - self.margin;
        let (right, wrong) = (log_sigmoid(beta * d), log_sigmoid(-beta * d));
        // ∂ log σ(x)/∂x = σ(−x)
        let (of_right, of_wrong) = (beta * wrong.exp(), -beta * right.exp());
        match self.form {
            Form::Sigmoid => {
                let mix = |right: f64, wrong: f64| -(1.0 - smooth) * right - smooth * wrong;
                (mix(right, wrong), mix(of_right, of_wrong))
            }
            Form::Robust => {
                let mix = |right: f64, wrong: f64| {
                    (-(1.0 - smooth) * right + smooth * wrong) / (1.0 - 2.0 * smooth)
                };
                (mix(right, wrong), mix(of_right, of_wrong))
            }
            Form::Hinge if beta * d < 1.0 => (1.0 - beta * d, -beta),
            Form::Hinge => (0.0, 0.0),
            Form::Ipo => {
                let off = d - 1.0 / (2.0 * beta);
                (off * off, 2.0 * off)
            }
        }
    }
}

/// log σ(x), without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// An answer in a micro-batch.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    /// The tokens that predict one of the answer's.
    tokens: Vec<usize>,
    /// Σ log q over them; 0 without a reference.
    reference: f64,
}

/// A loss over the pairs of a micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Pairs {
    loss: Preference,
    /// Chosen and rejected.
    pairs: Vec<[Answer; 2]>,
}

impl Pairs {
    /// Pairs of neighbouring documents, each given by its targets `[tokens]`, negative where absent: a chosen answer,
    /// the rejected one, and so on. Documents without a target, as padding is, belong to none. `reference`
    /// `[tokens, 1]`: log q of the targets of all documents.
    ///
    /// # Errors
    /// [`LossError::OddAnswers`]: an answer has no other; [`LossError::MissingInput`]: there is no reference.
    pub fn new<'a>(
        loss: Preference,
        documents: impl IntoIterator<Item = &'a [i64]>,
        reference: Option<&Tensor>,
    ) -> Result<Self, LossError> {
        let reference = reference.filter(|_| loss.reads_reference).map(on_host);
        if loss.reads_reference && reference.is_none() {
            let input = "ref_logprobs";
            return Err(LossError::MissingInput { loss: PAIR_LOSSES[0], input, found: "none".into() });
        }
        let (mut first, mut answers) = (0, Vec::new());
        for targets in documents {
            let tokens: Vec<usize> =
                (0..targets.len()).filter(|&at| targets[at] >= 0).map(|at| first + at).collect();
            first += targets.len();
            if tokens.is_empty() {
                continue;
            }
            let of_reference = |&token: &usize| reference.as_ref()?.get(token).copied();
            let reference = tokens.iter().filter_map(of_reference).sum();
            answers.push(Answer { tokens, reference });
        }
        let answers_found = answers.len();
        let (pairs, []) = answers.as_chunks::<2>() else {
            return Err(LossError::OddAnswers { answers: answers_found });
        };
        Ok(Self { loss, pairs: pairs.to_vec() })
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Sums over the pairs with `log_probs` `[tokens, 1]`, of which means are told.
    pub fn rewards(&self, log_probs: &Tensor) -> Rewards {
        let (log_p, mut sums) = (on_host(log_probs), Rewards::default());
        for pair in &self.pairs {
            let [chosen, rejected] = pair.each_ref().map(|answer| self.log_prob(answer, &log_p));
            let of = |log_p: f64, answer: &Answer| {
                let score = log_p - answer.reference;
                // As TRL tells them: means where there is no reference at all (SimPO), else sums.
                let is_mean = self.loss.of_means && !self.loss.reads_reference;
                self.loss.beta * if is_mean { score / answer.tokens.len() as f64 } else { score }
            };
            let [good, bad] = [of(chosen, &pair[0]), of(rejected, &pair[1])];
            sums.pairs += 1.0;
            sums.chosen += good;
            sums.rejected += bad;
            sums.accuracy += f64::from(u8::from(good > bad));
            sums.log_prob_chosen += chosen;
            sums.log_prob_rejected += rejected;
        }
        sums
    }

    /// Σ log p of an answer.
    fn log_prob(&self, answer: &Answer, log_p: &[f64]) -> f64 {
        answer.tokens.iter().filter_map(|&token| log_p.get(token)).sum()
    }

    fn score(&self, answer: &Answer, log_p: &[f64]) -> f64 {
        let score = self.log_prob(answer, log_p) - answer.reference;
        if self.loss.of_means { score / answer.tokens.len() as f64 } else { score }
    }
}

impl TokenLoss for Pairs {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let all = &log_probs.values;
        let log_p = on_host(all);
        let (mut values, mut coefficients) = (vec![0.0; log_p.len()], vec![0.0; log_p.len()]);
        for [chosen, rejected] in &self.pairs {
            let d = self.score(chosen, &log_p) - self.score(rejected, &log_p);
            let (value, slope) = self.loss.term(d);
            for (answer, slope) in [(chosen, slope), (rejected, -slope)] {
                let each = if self.loss.of_means { slope / answer.tokens.len() as f64 } else { slope };
                answer.tokens.iter().for_each(|&token| coefficients[token] = each);
            }
            if let Some(&first) = chosen.tokens.first() {
                values[first] = value;
            }
        }
        let like = |values: &[f64]| Tensor::from_slice(values).to_kind(all.kind()).to_device(all.device());
        LossValues { values: like(&values), coefficients: like(&coefficients).view([-1, 1]) }
    }
}

/// Sums over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rewards {
    pub pairs: f64,
    /// Σ β·score of chosen answers.
    pub chosen: f64,
    /// Σ β·score of rejected answers.
    pub rejected: f64,
    /// Pairs whose chosen answer has the larger reward.
    pub accuracy: f64,
    /// Σ log p of chosen answers.
    pub log_prob_chosen: f64,
    /// Σ log p of rejected answers.
    pub log_prob_rejected: f64,
}

impl Rewards {
    /// Its numbers in the order of its fields.
    pub fn sums(&self) -> [f64; 6] {
        let Self { pairs, chosen, rejected, accuracy, log_prob_chosen, log_prob_rejected } = *self;
        [pairs, chosen, rejected, accuracy, log_prob_chosen, log_prob_rejected]
    }

    /// Adds those of other pairs.
    pub fn add(&mut self, other: &Self) {
        let sums = self.sums();
        let mut both = sums.iter().zip(other.sums()).map(|(a, b)| a + b);
        *self = Self::of(std::array::from_fn(|_| both.next().unwrap_or_default()));
    }

    /// The rewards of [`sums`](Self::sums).
    pub fn of([pairs, chosen, rejected, accuracy, log_prob_chosen, log_prob_rejected]: [f64; 6]) -> Self {
        Self { pairs, chosen, rejected, accuracy, log_prob_chosen, log_prob_rejected }
    }

    /// Means over the pairs by TRL's names.
    pub fn means(&self) -> [(&'static str, f64); 6] {
        let mean = |sum: f64| sum / self.pairs;
        [
            ("rewards/chosen", mean(self.chosen)),
            ("rewards/rejected", mean(self.rejected)),
            ("rewards/margins", mean(self.chosen - self.rejected)),
            ("rewards/accuracies", mean(self.accuracy)),
            ("logps/chosen", mean(self.log_prob_chosen)),
            ("logps/rejected", mean(self.log_prob_rejected)),
        ]
    }
}

fn on_host(log_probs: &Tensor) -> Vec<f64> {
    let all = log_probs.to_device(Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
    let mut values = vec![0.0; all.numel()];
    let count = values.len();
    all.copy_data(&mut values, count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(name: &str, given: &[(&str, Param)]) -> Preference {
        let given = given.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        Preference::new(name, &given).unwrap()
    }

    fn forms() -> Vec<Preference> {
        let form = |name: &str| ("loss_type", Param::Text(name.into()));
        let smooth = |of: f64| ("label_smoothing", Param::Number(of));
        vec![
            loss("dpo", &[]),
            loss("dpo", &[smooth(0.2)]),
            loss("dpo", &[form("sigmoid_norm")]),
            loss("dpo", &[form("hinge"), ("beta", Param::Number(0.4))]),
            loss("dpo", &[form("ipo")]),
            loss("dpo", &[form("robust"), smooth(0.1)]),
            loss("dpo", &[("reference_free", Param::Number(1.0))]),
            loss("simpo", &[("beta", Param::Number(2.0))]),
        ]
    }

    /// Documents of 4, 3, 2 (padding), 2 and 3 tokens.
    const DOCUMENTS: [&[i64]; 5] =
        [&[-100, 5, 6, -100], &[-100, 7, -100], &[-100, -100], &[1, -100], &[-100, 2, 3]];

    fn log_probs(values: &[f64]) -> LogProbs<'static> {
        let values = Tensor::from_slice(values).view([-1, 1]);
        LogProbs { present: values.ones_like().to_kind(Kind::Bool), values, sequences: &[] }
    }

    #[test]
    fn coefficients_are_the_slopes_of_the_values() {
        let reference: Vec<f64> = (0..14).map(|i| -0.3 * f64::from(i % 5)).collect();
        let reference = Tensor::from_slice(&reference).view([-1, 1]);
        let at: Vec<f64> = (0..14).map(|i| -0.25 * f64::from((i * 7) % 11)).collect();
        for loss in forms() {
            let pairs = Pairs::new(loss, DOCUMENTS, Some(&reference)).unwrap();
            assert_eq!(pairs.len(), 2);
            let value = |log_p: &[f64]| pairs.evaluate(&log_probs(log_p)).values.sum(None).double_value(&[]);
            let coefficients = on_host(&pairs.evaluate(&log_probs(&at)).coefficients);
            for token in 0..at.len() {
                let moved = |by: f64| {
                    let mut log_p = at.clone();
                    log_p[token] += by;
                    value(&log_p)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((slope - coefficients[token]).abs() < 1e-8, "{loss:?}, token {token}: {slope}");
            }
            assert_eq!(coefficients.iter().filter(|slope| **slope != 0.0).count(), 6, "{loss:?}");
        }
    }

    #[test]
    fn an_answer_without_the_other_is_an_error() {
        let missing = Pairs::new(loss("simpo", &[]), DOCUMENTS.into_iter().take(4), None).unwrap_err();
        assert_eq!(missing, LossError::OddAnswers { answers: 3 });
        let missing = Pairs::new(loss("dpo", &[]), DOCUMENTS, None).unwrap_err();
        assert!(missing.to_string().contains("ref_logprobs is missing"), "{missing}");
    }

    #[test]
    fn wrong_parameters_say_what_is_right() {
        let wrong = |name: &str, param: &str, value: Param| {
            Preference::new(name, &BTreeMap::from([(param.to_owned(), value)])).unwrap_err().to_string()
        };
        let cases = [
            (
                wrong("dpo", "beta", Param::Number(0.0)),
                "dpo: parameter beta: expected a number above 0, got 0",
            ),
            (
                wrong("dpo", "label_smoothing", Param::Number(0.5)),
                "dpo: parameter label_smoothing: expected a number of at least 0 and below 0.5, got 0.5",
            ),
            (
                wrong("dpo", "loss_type", Param::Text("kto".into())),
                "dpo: parameter loss_type: expected sigmoid | sigmoid_norm | hinge | ipo | robust, got \"kto\"",
            ),
            (
                wrong("simpo", "loss_type", Param::Text("ipo".into())),
                "simpo: parameter \"loss_type\" is unknown; it has beta, label_smoothing, simpo_gamma",
            ),
        ];
        for (found, expected) in cases {
            assert_eq!(found, expected);
        }
    }
}
