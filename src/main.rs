//! The `xorl-dist` binary: parse, run, turn an error into one line and an exit code.

use std::{process::ExitCode, time::Duration};
use xorl_dist::{Error, buffers::SmallBlocks, cli, comm, console, device::torch};

/// Time in which a launcher ends all ranks after one has exited with an error.
const LAUNCHER_ENDS_RANKS: Duration = Duration::from_secs(5);

#[global_allocator]
static ALLOCATOR: SmallBlocks = SmallBlocks;

fn main() -> ExitCode {
    // SAFETY: the program has one thread yet.
    unsafe { torch::keep_few_products() };
    match cli::parse(std::env::args_os().skip(1)).and_then(cli::run) {
        Ok(code) => code,
        Err(error) => {
            if !matches!(error, Error::Elsewhere { .. }) {
                // All ranks have the same command line: the first prints its fault, and the launcher ends the others.
                if comm::launched_rank().is_some_and(|rank| rank > 0) {
                    std::thread::sleep(LAUNCHER_ENDS_RANKS);
                }
                console::say(&error.lines("error: "));
            }
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
