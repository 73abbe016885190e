//! The `xorl-dist` binary: parse, run, turn an error into one line and an exit code.

use std::process::ExitCode;
use xorl_dist::{Error, cli};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)).and_then(cli::run) {
        Ok(code) => code,
        Err(error) => {
            if !matches!(error, Error::Elsewhere { .. }) {
                eprintln!("error: {error}");
            }
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}
