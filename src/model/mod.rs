//! HF models: their specs by family, the sublayers that a decoder layer is made of, and the sharded transformer.
//!
//! A layer is a mixer and a feed-forward network ([`sublayer`], [`mixer`], [`ffn`]). A new mixer is a file in
//! [`mixer`], its variant of [`mixer::Mixer`], and the page of the [`family`] that has it.

pub mod attend;
pub mod base_plan;
pub mod context;
pub mod declare;
pub mod family;
pub mod ffn;
pub mod gathered;
pub mod hf_config;
pub mod layer;
pub mod mixer;
pub mod quantized;
pub mod recompute;
pub mod rope;
pub mod router_load;
pub mod rows;
pub mod spec;
pub mod stored_base;
pub mod sublayer;
pub mod transformer;

pub use ffn::{DenseSpec, Ffn, MoeSpec};
pub use mixer::{GqaSpec, Mixer, QkNorm};
pub use rope::{RopeScaling, RopeSpec};
pub use spec::{LayerSpec, ModelSpec, NormSpec};
