//! The command `check`.

use super::{CheckArgs, ranks::on_all_ranks};
use crate::{error::Result, train::Run};
use std::process::ExitCode;

/// Carries the command out: what a run would find wrong before its first step, or what it would cost. Writes nothing
/// but to stdout.
pub(super) fn run(args: &CheckArgs) -> Result<ExitCode> {
    on_all_ranks(
        args.run.device,
        false,
        |world| {
            let CheckArgs { run, ranks } = args;
            let ranks = ranks.unwrap_or(world.size());
            let mut run = Run::prepare(&run.config_path, &run.overrides, ranks)?;
            run.start_afresh()?;
            Ok(run)
        },
        |run, world| {
            if world.rank() == 0 {
                super::print(&run.report(world.device().memory()?)?);
            }
            Ok(ExitCode::SUCCESS)
        },
    )
}
