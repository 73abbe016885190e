//! HF models: config, families, weight sources and the blocks.

pub mod source;
