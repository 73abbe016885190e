//! The command `train`.

use super::{RunArgs, ranks::on_all_ranks};
use crate::{
    error::{Result, agree},
    train::Run,
};
use std::process::ExitCode;

/// Carries the command out on this rank.
pub(super) fn run(args: &RunArgs) -> Result<ExitCode> {
    on_all_ranks(
        |world| {
            let everyone = world.group("world", 0);
            let run = Run::prepare(&args.config_path, &args.overrides, args.device, world.size());
            let mut run = agree(&*everyone, run)?;
            run.settle(&*everyone)?;
            Ok(run)
        },
        |run, world| {
            if world.rank() == 0 {
                tracing::info!("{}", run.summary());
            }
            run.execute(world)
        },
    )
}
