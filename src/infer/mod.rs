//! Continuing prompts with a sharded model and an adapter: the KV cache ([`cache`]), greedy decoding of many
//! sequences at a time ([`decode`]), and a whole `generate` ([`run`]).

pub mod cache;
pub mod decode;
pub mod request;
pub mod run;
pub mod step;

pub use decode::{Limits, greedy};
pub use run::{Generation, Prompts, Request};
