//! The wire of the `tinker` clients: protobuf and JSON bodies to requests of the engine, and its replies back. Pure:
//! HTTP, keys and futures are elsewhere.

pub mod answers;
pub mod calls;
pub mod data;
pub mod proto;
pub mod reply;
mod tensor;
