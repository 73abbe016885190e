//! `xorl-dist`: FSDP-style sharded LoRA fine-tuning of language models.
//!
//! The map of the house, one line a room; arrows point down only:
//!
//! - [`cli`]: the commands and the command line
//! - [`train`]: the step, the loop, metrics, progress, signals
//! - [`plan`]: bytes, memory and arithmetic of a configuration before it runs: pure
//! - [`infer`]: KV cache, greedy decoding, generation
//! - [`checkpoint`]: PEFT adapter files, training state, atomic publish, resume and reshard
//! - [`session`]: a named adapter with its optimizer and clipping
//! - [`optim`]: AdamW and SGD over flat shards, schedule, clipping
//! - [`loss`]: causal language-model loss, chunked over tokens and vocabulary
//! - [`model`]: HF config, families, blocks
//! - [`lora`]: targets, initialisation, modules and their registry
//! - [`ops`]: operations as explicit forward/backward pairs, with kernels for CPUs and GPUs
//! - [`weights`]: weight sources: HF files, random values
//! - [`data`]: sources, chat template, tokenise, pack, deterministic order, loader
//! - [`shard`]: who owns which byte of which tensor; ring, adapter shards, groups of ranks, the way of rows to their experts
//! - [`comm`]: communicators (solo, MPI, NCCL), memory that ranks of a host share, launcher checks, ledger of bytes, control mesh
//!   and watchdog
//! - [`device`]: which device a rank computes on; its driver, streams, memory, run-time compiler and way to it
//! - [`buffers`]: host memory of activations and temporaries, reused
//! - [`mesh`]: ranks to axes and every divisibility rule: pure
//! - [`config`]: typed `run.yaml`, defaults, validation
//! - [`clock`]: seconds by phase of a step
//! - [`trace`]: spans of phases, operations and collectives, for Chrome's trace viewer
//! - [`rng`]: counter-based random numbers keyed by name
//! - [`dtype`]: element types of stored and gathered tensors
//! - [`error`]: the one error type of the crate and its exit codes

pub mod buffers;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod comm;
pub mod config;
pub mod data;
pub mod device;
pub mod dtype;
pub mod error;
pub mod infer;
pub mod lora;
pub mod loss;
pub mod mesh;
pub mod model;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod rng;
pub mod session;
pub mod shard;
pub mod trace;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
