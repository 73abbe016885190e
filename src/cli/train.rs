//! The command `train`.

use super::{RunArgs, ranks::on_all_ranks};
use crate::{error::Result, train::Run};
use std::process::ExitCode;

/// Carries the command out on this rank.
pub(super) fn run(args: &RunArgs) -> Result<ExitCode> {
    on_all_ranks(
        |world| Run::prepare(&args.config_path, &args.overrides, args.device, world.size()),
        |run, world| {
            if world.rank() == 0 {
                tracing::info!("{}", run.summary());
            }
            run.execute(world)
        },
    )
}
