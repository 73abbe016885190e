//! The command `train`.

use super::RunArgs;
use crate::error::{Error, Result};
use std::process::ExitCode;

/// Carries the command out.
pub(super) fn run(_args: &RunArgs) -> Result<ExitCode> {
    Err(Error::Failure("train is not built".into()))
}
