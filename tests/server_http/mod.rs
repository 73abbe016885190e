//! HTTP of the training server over real sockets, with an engine that answers by itself.
//!
//! - `server`: the engine and a client
//! - `wire`: the calls of `xorl-client`, futures and paths
//! - `tinker`: the calls of `tinker` by hand; `clients`: the same by real clients
//! - `sampling`: the calls of both that sample
//! - `idle`: adapters without requests
//! - `tenants`: what belongs to one tenant alone
//! - `hostile`: clients that mean harm or are broken; `memory`: bytes that bodies take while they are read
//! - `openai`: the calls of the `openai` client, by hand and by it
//! - `limits`: keys, limits, slow and broken clients, the end of the server

mod clients;
mod hostile;
mod idle;
mod limits;
mod memory;
mod openai;
mod sampling;
pub mod server;
mod tenants;
mod tinker;
mod wire;
