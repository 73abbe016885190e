//! The training server: many named adapters over one sharded base, trained over HTTP.
//!
//! A wire (`wire`) turns what a client sends into a [`request::Request`]. The engine (`engine`), which alone talks to the
//! ranks, carries requests out and answers with a [`request::Reply`]. Neither knows the other. HTTP (`http`) takes
//! connections, holds keys and limits, and keeps answers until clients fetch them (`futures`).

pub mod engine;
pub mod order;
pub mod request;
pub mod run;
pub mod store;
pub mod wire {
    pub mod tinker;
}

pub use run::{Server, ServerPlan};
