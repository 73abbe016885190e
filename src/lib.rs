//! `xorl-dist`: FSDP-style sharded LoRA fine-tuning of language models.
//!
//! The map of the house, one line a room. A room imports only rooms below it (`tests/architecture.rs`):
//!
//! - [`cli`]: the commands and the command line
//! - [`server`]: the server: requests, wires, engine
//! - [`report`]: runs as they stand on disk: state and metrics, and the page that shows them
//! - [`train`]: the step (count, accumulate, reduce, update), the loop, metrics, progress, signals
//! - [`infer`]: sampling: requests and their books (pure), steps over a paged KV cache, generation
//! - [`plan`]: bytes, FLOPs and traffic of a configuration before it runs: pure
//! - [`checkpoint`]: PEFT adapter files, training state by name, atomic publish, resume and reshard
//! - [`session`]: a named adapter with its optimizer and clipping
//! - [`model`]: HF config, families; a layer is mixer and feed-forward
//! - [`lora`]: targets, plan, modules, initial values; an adapter with its shards
//! - [`loss`]: losses over the log-probabilities of a micro-batch, and the one pass over the head
//! - [`optim`]: optimizers with named state, schedule, clipping
//! - [`ops`]: operations as explicit forward/backward pairs, with kernels for CPUs and GPUs
//! - [`shard`]: layout (which rank owns which tile of which tensor: pure), slot pools, adapter shards, process
//!   groups, expert dispatch
//! - [`weights`]: sources of base weights: HF files, random values
//! - [`quant`]: packed formats of frozen matrices: tiles of nf4, block_fp8 and nvfp4: pure
//! - [`data`]: sources, chat template, tokenise, pack, deterministic order, loader
//! - [`comm`]: communicators (solo, MPI, NCCL), memory shared by the ranks of a host, launcher checks, ledger of
//!   bytes, control mesh and watchdog
//! - [`device`]: the device of a rank: driver, streams, memory, run-time compiler; memory of the host
//! - [`mesh`]: ranks to axes and every divisibility rule: pure
//! - [`config`]: typed `run.yaml` and `server.yaml`, defaults, validation
//! - [`page`]: style, curves and nodes of the pages for browsers
//! - [`hub`]: models and data sets of the Hugging Face hub: ids, downloads, the cache
//! - [`console`]: text for people: counted nouns, short lists, whole lines on stderr, the bar below them
//! - [`clock`]: seconds by phase of a step
//! - [`trace`]: spans of phases, operations and collectives, for Chrome's trace viewer
//! - [`buffers`]: host memory of activations and temporaries, reused; the allocator of small blocks
//! - [`rng`]: counter-based random numbers keyed by name
//! - [`dtype`]: element types of stored and gathered tensors
//! - [`regular_file`]: files of which reading comes to an end: no pipes, no devices
//! - [`json`]: faults of JSON files in words
//! - [`lfs`]: pointers that git-LFS leaves in place of files
//! - [`error`]: the one error type of the crate and its exit codes; it gathers the rooms' errors and is imported by
//!   the rooms at the top only

#![doc = include_str!("ARCHITECTURE.md")]

pub mod buffers;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod comm;
pub mod config;
pub mod console;
pub mod data;
pub mod device;
pub mod dtype;
pub mod error;
pub mod hub;
pub mod infer;
pub mod json;
pub mod lfs;
pub mod lora;
pub mod loss;
pub mod mesh;
pub mod model;
pub mod ops;
pub mod optim;
pub mod page;
pub mod plan;
pub mod quant;
pub mod regular_file;
pub mod report;
pub mod rng;
pub mod server;
pub mod session;
pub mod shard;
pub mod trace;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
