//! Feed-forward networks of a decoder layer.

pub mod dispatch;
pub mod gated;
pub mod moe;
