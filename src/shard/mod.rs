//! Who owns which byte of which tensor ([`layout`], pure), the rings that make a unit whole while it computes
//! ([`ring`]), the sharded adapter with its gradients and moments ([`adapter`]), the groups of ranks that all this is
//! cut over ([`groups`]), and the way of rows to the rank that has their expert ([`exchange`]). Knows nothing of models.

pub mod adapter;
pub mod exchange;
pub mod groups;
pub mod layout;
pub mod ring;

use crate::{comm::CommError, device::DeviceError, model::source::SourceError};

pub use adapter::{AdapterShards, Adapters, Owned};
pub use exchange::{Exchange, Route};
pub use groups::Groups;
pub use layout::{Entry, EntrySpec, Piece, Region, RegionLayout, Span};
pub use ring::Ring;

/// Why a unit could not be made whole.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{ring}: {wanted} is used while its slot holds {held} (a bug: every use follows its gather)")]
    WrongUnit { ring: &'static str, wanted: String, held: String },
    #[error("rank {from} of the expert group counts its rows in {actual} bytes, expected {expected} (a bug)")]
    Counts { from: usize, actual: usize, expected: usize },
    #[error("layer {layer}, {pass}: {count} of {of} values are not finite")]
    NotFinite { layer: usize, pass: &'static str, count: usize, of: usize },
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
