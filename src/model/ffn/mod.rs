//! Feed-forward networks, which compute token by token. Each is a file with a [`SubLayer`](super::sublayer::SubLayer).

mod dense;
mod dispatch;
mod gated;
mod moe;

pub use dense::{Dense, DenseSpec};
pub use moe::{Moe, MoeSpec};

use super::{
    declare::Declarations,
    sublayer::{Half, Residual},
};
use std::rc::Rc;

/// The feed-forward network of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ffn {
    Dense(DenseSpec),
    Moe(MoeSpec),
}

impl Ffn {
    /// The half of the layer whose sublayer it is, behind the norm `norm`.
    pub fn declare(&self, norm: &str, eps: f64, declare: &mut Declarations) -> Rc<dyn Half> {
        match self {
            Self::Dense(spec) => Residual::<Dense>::declare(spec, norm, eps, declare),
            Self::Moe(spec) => Residual::<Moe>::declare(spec, norm, eps, declare),
        }
    }

    /// Its routed experts, if it has any.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(spec) => Some(spec),
        }
    }
}
