//! Checks of requests, before any rank begins with one: pure.

use super::{loss, plan::Size};
use crate::server::request::{AdapterSpec, Datum, OptimStep, Pass, Refusal};

/// Limits of the data of a pass.
#[derive(Clone, Copy, Debug)]
pub struct DataLimits {
    pub vocab_size: usize,
    /// Tokens of a datum at most.
    pub max_tokens: usize,
}

/// A pass that can be computed.
#[derive(Debug, PartialEq)]
pub struct Checked {
    pub sizes: Vec<Size>,
    /// Targets that count for the division of a step.
    pub valid: u64,
}

/// Checks all of `pass`.
///
/// # Errors
/// The first datum that cannot be computed, by its place, and what would be right.
pub fn pass(pass: &Pass, limits: DataLimits) -> Result<Checked, Refusal> {
    let mut checked = Checked { sizes: Vec::with_capacity(pass.data.len()), valid: 0 };
    if pass.data.is_empty() {
        return Err(Refusal::User("the pass has no datum; send at least one".into()));
    }
    for (place, datum) in pass.data.iter().enumerate() {
        let refused = |why: String| Refusal::User(format!("datum {place}: {why}"));
        shape(datum, limits).map_err(refused)?;
        let valid = pass.loss.valid(&loss::sequence(datum));
        checked.valid += valid.map_err(|error| refused(error.to_string()))?;
        checked.sizes.push(Size { tokens: datum.ids.len(), k: datum.k });
    }
    Ok(checked)
}

/// Checks ids and lengths.
fn shape(datum: &Datum, limits: DataLimits) -> Result<(), String> {
    let Datum { ids, targets, k, .. } = datum;
    let DataLimits { vocab_size, max_tokens } = limits;
    let (tokens, vocab) = (ids.len(), vocab_size as i64);
    if tokens == 0 || *k == 0 {
        return Err(format!("{tokens} tokens with {k} targets each; at least 1 of both is needed"));
    }
    if tokens > max_tokens {
        return Err(format!(
            "{tokens} tokens, more than the {max_tokens} that a rank takes at a time (max_tokens_per_pass)"
        ));
    }
    let place = |place: Option<usize>| place.map_or_else(|| Ok(()), Err);
    place(ids.iter().position(|id| !(0..vocab).contains(id)))
        .map_err(|at| format!("token {at} is {}, but ids go from 0 to {}", ids[at], vocab - 1))?;
    let each = tokens.saturating_mul(*k);
    if targets.len() != each {
        return Err(format!("{} targets, but {tokens} tokens with {k} each have {each}", targets.len()));
    }
    place(targets.iter().position(|&id| id >= vocab))
        .map_err(|at| format!("target {at} is {}, but the last id is {}", targets[at], vocab - 1))
}

/// Checks the shape of an adapter on `sites` places of the model.
///
/// # Errors
/// A number that no adapter can have, or no place.
pub fn spec(spec: &AdapterSpec, max_rank: Option<usize>, sites: usize) -> Result<(), Refusal> {
    let &AdapterSpec { rank, alpha, .. } = spec;
    let wrong = match max_rank {
        _ if sites == 0 => "train_attn and train_mlp leave none of the targets; set one of them".to_owned(),
        _ if rank == 0 => "rank: expected 1 or more, got 0".to_owned(),
        Some(most) if rank > most => {
            format!("rank: expected at most {most}, the server's max_lora_rank, got {rank}")
        }
        _ if !(alpha.is_finite() && alpha > 0.0) => {
            format!("alpha: expected a finite number above 0, got {alpha}")
        }
        _ => return Ok(()),
    };
    Err(Refusal::User(wrong))
}

/// The factor of the accumulated gradient in `step`, with `valid` targets accumulated.
///
/// # Errors
/// A number that AdamW cannot take, or a division by no target.
pub fn factor(step: &OptimStep, valid: u64) -> Result<f64, Refusal> {
    step.check().map_err(|error| Refusal::User(error.to_string()))?;
    match (step.divide, valid) {
        (false, _) => Ok(1.0),
        (true, 0) => Err(Refusal::User(
            "the gradient is divided by the valid targets of the passes since the last step, and there are none: \
             send forward_backward with targets that count first"
                .into(),
        )),
        (true, valid) => Ok(1.0 / valid as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::NamedLoss;
    use std::collections::BTreeMap;

    const LIMITS: DataLimits = DataLimits { vocab_size: 10, max_tokens: 4 };

    fn datum(ids: &[i64], targets: &[i64], k: usize, weights: Option<&[f32]>) -> Datum {
        let inputs = weights.map(|weights| ("weights".to_owned(), weights.to_vec()));
        Datum { ids: ids.into(), targets: targets.into(), k, inputs: inputs.into_iter().collect() }
    }

    fn of(data: Vec<Datum>) -> Pass {
        let loss = NamedLoss { name: "cross_entropy".into(), params: BTreeMap::new() };
        Pass { data, loss, backward: true }
    }

    #[test]
    fn targets_with_a_weight_count() {
        let good = of(vec![
            datum(&[0, 9], &[9, -100], 1, None),
            datum(&[1, 2], &[3, -1, 4, 5], 2, Some(&[1.0, 1.0, 0.0, 0.0])),
            datum(&[1, 2], &[3, 4, 4, 5], 2, Some(&[0.5, 0.0, 1.0, -1.0])),
        ]);
        let sizes = [(2, 1), (2, 2), (2, 2)].map(|(tokens, k)| Size { tokens, k }).to_vec();
        assert_eq!(pass(&good, LIMITS), Ok(Checked { sizes, valid: 1 + 1 + 3 }));
    }

    #[test]
    fn a_refusal_names_the_datum_and_what_would_be_right() {
        let good = datum(&[1], &[2], 1, None);
        for (bad, text) in [
            (datum(&[], &[], 1, None), "datum 1: 0 tokens with 1 targets each"),
            (datum(&[1], &[], 0, None), "datum 1: 1 tokens with 0 targets each"),
            (datum(&[1; 5], &[1; 5], 1, None), "datum 1: 5 tokens, more than the 4"),
            (datum(&[1, 10], &[1, 1], 1, None), "datum 1: token 1 is 10, but ids go from 0 to 9"),
            (datum(&[-1], &[1], 1, None), "datum 1: token 0 is -1"),
            (datum(&[1, 2], &[1], 1, None), "datum 1: 1 targets, but 2 tokens with 1 each have 2"),
            (datum(&[1], &[10], 1, None), "datum 1: target 0 is 10, but the last id is 9"),
            (
                datum(&[1], &[1, 1], 2, Some(&[1.0; 3])),
                "datum 1: cross_entropy: input weights: expected 2 values, one a target, got 3",
            ),
        ] {
            let Err(Refusal::User(said)) = pass(&of(vec![good.clone(), bad]), LIMITS) else {
                panic!("{text}");
            };
            assert!(said.starts_with(text), "{said}");
        }
        assert!(pass(&of(vec![]), LIMITS).is_err());
        let mut unknown = of(vec![good]);
        unknown.loss.name = "hinge".into();
        assert!(pass(&unknown, LIMITS).unwrap_err().to_string().contains("there are cross_entropy"));
    }

    #[test]
    fn an_adapter_without_places_or_of_no_rank_is_refused() {
        let good =
            AdapterSpec { rank: 8, alpha: 16.0, targets: None, train_attn: true, train_mlp: true, seed: 1 };
        assert_eq!(spec(&good, None, 1), Ok(()));
        assert_eq!(spec(&good, Some(8), 1), Ok(()));
        let refused = |bad: &AdapterSpec, sites| spec(bad, Some(8), sites).unwrap_err().to_string();
        assert!(refused(&good, 0).contains("leave none of the targets"));
        assert!(refused(&AdapterSpec { rank: 9, ..good.clone() }, 1).contains("at most 8"));
        assert!(refused(&AdapterSpec { rank: 0, ..good.clone() }, 1).contains("1 or more, got 0"));
        assert!(refused(&AdapterSpec { alpha: f64::NAN, ..good.clone() }, 1).contains("got NaN"));
    }

    #[test]
    fn a_step_with_numbers_that_adamw_cannot_take_is_refused() {
        let good = OptimStep {
            lr: 1e-4,
            betas: (0.9, 0.95),
            eps: 1e-12,
            weight_decay: 0.0,
            max_grad_norm: 0.0,
            divide: true,
        };
        assert_eq!(factor(&good, 4), Ok(0.25));
        assert_eq!(factor(&OptimStep { divide: false, ..good }, 0), Ok(1.0));
        let refused = |step: OptimStep, valid| factor(&step, valid).unwrap_err().to_string();
        assert!(refused(good, 0).contains("send forward_backward"));
        for (bad, name) in [
            (OptimStep { lr: f64::NAN, ..good }, "learning_rate"),
            (OptimStep { lr: -1.0, ..good }, "learning_rate"),
            (OptimStep { betas: (1.0, 0.5), ..good }, "beta1"),
            (OptimStep { betas: (0.5, -0.1), ..good }, "beta2"),
            (OptimStep { eps: 0.0, ..good }, "eps"),
            (OptimStep { weight_decay: f64::INFINITY, ..good }, "weight_decay"),
            (OptimStep { max_grad_norm: f64::NAN, ..good }, "grad_clip_norm"),
        ] {
            assert!(refused(bad, 1).starts_with(name), "{name}");
        }
    }
}
