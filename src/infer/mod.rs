//! Continuing prompts with a sharded model and adapters.
//!
//! Pure: requests ([`request`]) and the books of all ranks ([`sampler`]), which plan one forward after the other
//! ([`step`]), with the pages of each rank ([`pages`]), the choice of a token ([`choose`]) and the texts that end a
//! continuation ([`stops`]). Ranks compute a step ([`compute`]) over a paged KV cache ([`cache`]). Without a server
//! they keep the books themselves ([`local`]), for a whole `generate` ([`run`]).

pub mod cache;
pub mod choose;
pub mod compute;
pub mod local;
pub mod pages;
pub mod request;
pub mod run;
pub mod sampler;
pub mod step;
pub mod stops;

pub use run::{Generation, Prompts, Request};
