//! Who owns which byte of which tensor ([`layout`], pure), the rings that make a unit whole while it computes
//! ([`ring`]), and the sharded adapter with its gradients and moments ([`adapter`]). Knows nothing of models.

pub mod adapter;
pub mod layout;
pub mod ring;

use crate::{comm::CommError, model::source::SourceError};

pub use adapter::AdapterShards;
pub use layout::{Entry, EntrySpec, Piece, RegionLayout, Span};
pub use ring::Ring;

/// Why a unit could not be made whole.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{ring}: {wanted} is used while its slot holds {held} (a bug: every use follows its gather)")]
    WrongUnit { ring: &'static str, wanted: String, held: String },
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
