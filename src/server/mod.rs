//! The server: many named adapters over one sharded base, trained and sampled over HTTP.
//!
//! A wire (`wire`) turns what a client sends into a [`request::Request`]. The engine (`engine`), which alone talks to
//! the ranks, carries requests out and answers with a [`request::Reply`]. Neither knows the other. HTTP (`http`) takes
//! connections, holds keys and limits, and keeps answers until clients fetch them (`futures`).
//!
//! - [`app`]: the state that HTTP and the wires share
//! - [`registry`]: tenants, and the adapters that they know; [`sessions`]: the programs that made these
//! - [`order`]: which request is next, and which is a repeat; [`ordered`]: requests that wait for those before them
//! - [`paths`]: paths of clients as folders; [`checkpoints`]: the saved adapters in them; [`labels`]: what is known
//!   about these; [`runs`]: what was trained; [`downloads`] of it
//! - [`store`], [`merged`]: saves of an adapter, and of the base with one merged into it
//! - [`spill`], [`storage`], [`sweep`]: adapters on disk, bytes of output_dir, idle adapters
//! - [`history`], [`overview`]: curves of training, and what the page at `/` shows
//! - [`samplers`]: the weights that clients sample from; [`sampling`]: requests to sample; [`texts`]: the tokenizer
//! - [`keys`], [`fault`]: who may ask, and refusals
//! - [`start`], [`front`], [`run`]: the start of a server, what rank 0 does besides, and the whole of it
//! - [`kept`], [`journal`]: adapters over a restart

pub mod app;
pub mod checkpoints;
pub mod downloads;
pub mod engine;
pub mod fault;
pub mod front;
pub mod futures;
pub mod history;
pub mod http;
pub mod journal;
pub mod kept;
pub mod keys;
pub mod labels;
pub mod merged;
pub mod order;
pub mod ordered;
pub mod overview;
pub mod paths;
pub mod registry;
pub mod request;
pub mod run;
pub mod runs;
pub mod samplers;
pub mod sampling;
pub mod sessions;
pub mod spill;
pub mod start;
pub mod storage;
pub mod store;
pub mod sweep;
pub mod texts;
pub mod wire;

pub use run::{Server, ServerPlan};
pub use start::Start;
