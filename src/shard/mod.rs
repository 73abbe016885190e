//! Sharding: layout of regions and storage of their tensors ([`layout`], [`storage`], pure), slots for gathered units
//! ([`slots`]) and changes of them ([`update`]), the sharded adapter with its gradients ([`adapter`]) and its pieces by
//! name ([`piece`]), process groups ([`process_groups`]), dispatch of rows to experts ([`dispatcher`]). Knows nothing
//! of models.

pub mod adapter;
pub mod dispatcher;
pub mod layout;
pub mod piece;
pub mod process_groups;
pub mod slots;
pub mod storage;
pub mod update;

use crate::{comm::CommError, device::DeviceError, quant::QuantError, weights::SourceError};

pub use adapter::{AdapterRegions, AdapterShards};
pub use dispatcher::{ExpertDispatcher, ExpertRoute};
pub use layout::{Entry, EntrySpec, Piece, Region, RegionLayout, Span};
pub use piece::{FlatRegion, OwnedPart, OwnedPiece, PlacedParameter};
pub use process_groups::ProcessGroups;
pub use slots::SlotPool;
pub use storage::Storage;
pub use update::{Change, Scales};

/// Errors of sharding.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{pool}: {wanted} is used while its slot holds {held} (a bug: every use follows its gather)")]
    WrongUnit { pool: &'static str, wanted: String, held: String },
    #[error("rank {from} of the expert group counts its rows in {actual} bytes, expected {expected} (a bug)")]
    Counts { from: usize, actual: usize, expected: usize },
    #[error("layer {layer}, {pass}: {count} of {of} values are not finite")]
    NotFinite { layer: usize, pass: &'static str, count: usize, of: usize },
    #[error("tensor {tensor}: {error} (a bug)")]
    Packed { tensor: String, error: QuantError },
    #[error("another rank could not change unit {unit}")]
    UpdateElsewhere { unit: usize },
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
