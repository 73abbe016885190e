//! LoRA: which linear layers are adapted ([`targets`], pure), how an adapter is cut over ranks ([`plan`], pure), its
//! entries in the regions of a unit ([`module`]), the values it starts from ([`init`], [`pissa`]), the adapter with its
//! shards ([`adapter`]), and its sum with the base ([`merge`]), packed ([`requantise`]) or not.
//!
//! y = W₀·x + s·B·(A·x), A `[r, in]`, B `[out, r]` and s = alpha/r (Hu et al., 2021) or alpha/√r (rank-stabilized,
//! Kalajdzievski, 2023). [`shape`] has r and s of each site,
//! [`patterns`] finds them by name.

pub mod adapter;
pub mod init;
pub mod merge;
pub mod module;
pub mod patterns;
pub mod pissa;
pub mod plan;
pub mod requantise;
pub mod shape;
pub mod targets;

pub use adapter::Adapter;
pub use merge::{MergeInto, MergePlan, Survival};
pub use module::{FirstEntries, LORA_MAPPING, LoraLinear, LoraModule, MoeExpertsLora, Parameter, Stack};
pub use patterns::{PatternError, Patterns, shapes_of};
pub use plan::{AdapterPlan, LayerAdapterPlan};
pub use shape::{LoraShape, LoraShapes};
pub use targets::{Experts, Factor, MoeNames, Site, SiteKind, TargetError};
