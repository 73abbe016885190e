//! Mixers: the sublayers in which tokens see each other. Each is a file with a [`SubLayer`](super::sublayer::SubLayer).

mod gqa;

pub use gqa::{Gqa, GqaSpec, QkNorm};

use super::{
    declare::Declarations,
    sublayer::{Half, Residual},
};
use crate::ops::attention::Heads;
use std::rc::Rc;

/// The mixer of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    Gqa(GqaSpec),
}

impl Mixer {
    /// The half of the layer whose sublayer it is, behind the norm `norm`.
    pub fn declare(&self, norm: &str, eps: f64, declare: &mut Declarations) -> Rc<dyn Half> {
        match self {
            Self::Gqa(spec) => Residual::<Gqa>::declare(spec, norm, eps, declare),
        }
    }

    /// The heads whose keys and values generation caches.
    pub fn cached_heads(&self) -> Heads {
        match self {
            Self::Gqa(spec) => spec.heads(),
        }
    }
}
