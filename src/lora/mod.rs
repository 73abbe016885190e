//! LoRA: which linear layers are adapted ([`targets`], pure), what an adapter puts into its unit's region
//! ([`module`]), and the values it starts from ([`init`]).
//!
//! y = W₀·x + (alpha/r)·B·(A·x), A `[r, in]` and B `[out, r]` (Hu et al., 2021).

pub mod init;
pub mod module;
pub mod targets;

pub use module::{FirstEntries, LORA_MAPPING, LoraLinear, LoraModule, MoeExpertsLora, Parameter, Stack};
pub use targets::{Experts, Factor, MoeNames, Site, SiteKind, TargetError};
