//! The command `generate`.

use super::{GenerateArgs, ranks::on_all_ranks};
use crate::{error::Result, infer::Generation};
use std::process::ExitCode;

/// Carries the command out on this rank.
pub(super) fn run(args: &GenerateArgs) -> Result<ExitCode> {
    on_all_ranks(
        args.device,
        false,
        |_| Generation::prepare(args.request.clone()),
        |generation, world| generation.execute(world).map(|()| ExitCode::SUCCESS),
    )
}
