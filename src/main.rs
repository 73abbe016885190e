//! The `xorl-dist` binary: parse, run, turn an error into one line and an exit code.

use std::{process::ExitCode, time::Duration};
use xorl_dist::{Error, cli, comm, console};

/// Time after which a launcher has ended the ranks that are left, when the first has ended with an error.
const HEARD: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)).and_then(cli::run) {
        Ok(code) => code,
        Err(error) => {
            if !matches!(error, Error::Elsewhere { .. }) {
                // A fault of the command line is on all ranks: one says it.
                if comm::launched_rank().is_some_and(|rank| rank > 0) {
                    std::thread::sleep(HEARD);
                }
                console::say(&error.lines("error: "));
            }
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
