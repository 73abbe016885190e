//! The `xorl-dist` binary: parse, run, turn an error into one line and an exit code.

use std::process::ExitCode;
use xorl_dist::cli;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)).and_then(cli::run) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
