//! The command `train`.

use super::{RunArgs, ranks::on_all_ranks};
use crate::{
    error::{Result, agree},
    train::{Ended, Run, StopSignals},
};
use std::process::ExitCode;

/// Exit code of a run that has saved and stopped because it was asked to.
const STOPPED: u8 = 75;

/// Carries the command out on this rank.
pub(super) fn run(args: &RunArgs) -> Result<ExitCode> {
    on_all_ranks(
        args.device,
        args.debug,
        |world| {
            let stop = StopSignals::listen(world.leaves_signals(), world.is_by_hand())?;
            let everyone = world.group("world", 0);
            let run = Run::prepare(&args.config_path, &args.overrides, world.size());
            let mut run = agree(&*everyone, run)?;
            run.set_debug(args.debug);
            run.same_on_all_ranks(&*everyone)?;
            run.settle(&*everyone)?;
            Ok((run, stop))
        },
        |(run, stop), world| {
            if world.rank() == 0 {
                tracing::info!("{}", run.summary());
            }
            Ok(match run.execute(world, &stop)? {
                Ended::Done => ExitCode::SUCCESS,
                Ended::Stopped => ExitCode::from(STOPPED),
            })
        },
    )
}
