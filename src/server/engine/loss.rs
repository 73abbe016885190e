//! The loss of a segment, from its name and the inputs of its data.

use crate::{
    loss::{CrossEntropy, LogProbs, LossValues, NamedLoss, TokenLoss},
    server::request::Datum,
};
use std::borrow::Borrow;
use tch::{Device, Tensor};

const CROSS_ENTROPY: &str = "cross_entropy";
const WEIGHTS: &str = "weights";

/// L = −Σ w·log p over all targets.
struct Weighted {
    /// `[tokens, K]`
    weights: Tensor,
}

impl TokenLoss for Weighted {
    fn evaluate(&self, log_probs: &LogProbs) -> LossValues {
        let LogProbs { values, present, .. } = log_probs;
        let weights = self.weights.to_kind(values.kind()) * present;
        LossValues { values: -(&weights * values).sum_dim_intlist(1, false, None), coefficients: -weights }
    }
}

/// The targets of `datum` that count for the division of a step.
///
/// # Errors
/// Nobody knows the loss, or the datum lacks one of its inputs.
pub fn valid(loss: &NamedLoss, datum: &Datum) -> Result<u64, String> {
    if loss.name != CROSS_ENTROPY {
        return Err(format!("loss {:?} is unknown; this server has {CROSS_ENTROPY}", loss.name));
    }
    let counts = datum.targets.iter().zip(weights(datum)).filter(|&(&id, weight)| id >= 0 && weight != 0.0);
    Ok(counts.count() as u64)
}

/// The loss of neighbouring sequences `data` with `k` targets a token.
///
/// # Errors
/// See [`valid`].
pub fn token_loss(
    loss: &NamedLoss,
    data: &[impl Borrow<Datum>],
    k: usize,
    device: Device,
) -> Result<Box<dyn TokenLoss>, String> {
    data.iter().try_for_each(|datum| valid(loss, datum.borrow()).map(drop))?;
    if data.iter().all(|datum| !datum.borrow().inputs.contains_key(WEIGHTS)) {
        return Ok(Box::new(CrossEntropy { scale: 1.0 }));
    }
    let weights: Vec<f32> = data.iter().flat_map(|datum| weights(datum.borrow())).collect();
    let weights = Tensor::from_slice(&weights).view([-1, k as i64]).to_device(device);
    Ok(Box::new(Weighted { weights }))
}

/// The weight of each target of `datum`, 1 where it has none.
fn weights(datum: &Datum) -> impl Iterator<Item = f32> {
    let given = datum.inputs.get(WEIGHTS);
    let each = given.map_or(1, |given| datum.targets.len() / given.len().max(1)).max(1);
    (0..datum.targets.len()).map(move |i| given.map_or(1.0, |given| given[i / each]))
}
