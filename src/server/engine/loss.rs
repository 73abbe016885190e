//! The loss of a segment, from its name and the inputs of its data.

use crate::{
    loss::{LossError, NamedLoss, Sequence, TokenLoss},
    server::request::Datum,
};
use std::borrow::Borrow;
use tch::Device;

/// `datum` as its loss sees it.
pub fn sequence(datum: &Datum) -> Sequence<'_> {
    Sequence { targets: &datum.targets, k: datum.k, inputs: &datum.inputs }
}

/// The loss of neighbouring `data`, undivided.
///
/// # Errors
/// See [`NamedLoss::valid`].
pub fn token_loss(
    loss: &NamedLoss,
    data: &[impl Borrow<Datum>],
    device: Device,
) -> Result<Box<dyn TokenLoss>, LossError> {
    let sequences: Vec<Sequence> = data.iter().map(|datum| sequence(datum.borrow())).collect();
    loss.over(&sequences, 1.0, device)
}
