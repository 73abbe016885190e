//! The command `generate`.

use super::GenerateArgs;
use crate::error::{Error, Result};
use std::process::ExitCode;

/// Carries the command out.
pub(super) fn run(_args: &GenerateArgs) -> Result<ExitCode> {
    Err(Error::Failure("generate is not built".into()))
}
