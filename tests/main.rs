//! All tests that run the program or use the library from outside, one program: each program of its own would link
//! libtorch, arrow and the rest again. What each file shows is in README.md.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod adapters;
mod architecture;
mod broken_input;
mod chat_template;
mod check;
mod cli;
mod clients;
mod commands;
mod common;
mod config;
mod crash;
mod cuda;
mod data;
mod debug;
mod dependencies;
mod engine;
mod engine_life;
mod engine_sampling;
mod evaluation;
mod experts;
mod first_use;
mod fuzz_corpus;
mod generate;
mod hosts;
mod hub;
mod installing;
mod losses;
mod merge;
mod mixed;
mod models;
mod nccl;
mod nvrtc;
mod old_steps;
mod optimizers;
mod oracle;
mod packed_files;
mod page;
mod preference;
mod profile;
mod quant;
mod quantized;
mod readme;
mod relora;
mod report;
mod resume;
mod rows;
mod same_run;
mod sampling;
mod saving;
mod serve;
mod server_config;
mod server_http;
mod server_openapi;
mod server_store;
mod signals;
mod slurm;
mod tinker_bodies;
mod tinker_wire;
mod topology;
mod train_command;
mod update;
mod variants;
mod watchdog;
mod words;

/// Counts for the tests that bound what a reader takes.
#[global_allocator]
static ALLOCATOR: fuzz_corpus::targets::Counted = fuzz_corpus::targets::Counted;
