//! HF models: weight sources, what a layer is made of, and the blocks that compute it.

pub mod base_plan;
pub mod block;
pub mod family;
pub mod ffn;
pub mod hf_config;
pub mod layer;
pub mod router_load;
pub mod rows;
pub mod spec;
pub mod transformer;

pub use spec::{ModelSpec, MoeSpec, QkNorm, RopeScaling, RopeSpec};
