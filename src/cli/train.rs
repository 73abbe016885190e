//! The command `train`.

use super::{Common, Fields, RUN_FIELDS, Runnable, check::Check, models, ranks::on_all_ranks};
use crate::{
    checkpoint::output::note_failure,
    comm::FreeMemory,
    error::{Result, agree},
    train::{Ended, Program, Run, STOPPED, StopSignals},
};
use std::{path::PathBuf, process::ExitCode};

/// Train an adapter (the default)
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Train {
    /// The run: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Do what `check` does, and end without training
    #[arg(long)]
    pub dry_run: bool,
}

impl Runnable for Train {
    const USAGE: &'static str = "[train] --config <FILE> [--dry-run]";
    const FIELDS: Option<Fields> = Some(RUN_FIELDS);

    fn run(&self, common: &Common) -> Result<ExitCode> {
        if self.dry_run {
            return Check { config: self.config.clone(), ranks: None, show_samples: None }.run(common);
        }
        on_all_ranks(
            common.device,
            common.debug,
            |world| {
                let stop = StopSignals::listen(Program::Run, world)?;
                models::fetch(world, || models::of_run(&self.config, &common.overrides))?;
                let everyone = world.group("world", 0);
                let run = Run::prepare_to_train(&self.config, &common.overrides, world.size());
                let mut run = agree(&*everyone, run)?;
                run.set_debug(common.debug);
                run.same_on_all_ranks(&*everyone)?;
                run.settle(&*everyone)?;
                run.fit(&FreeMemory::of_ranks(&*everyone, world.device())?)?;
                Ok((run, stop))
            },
            |(run, stop), world| {
                if world.rank() == 0 {
                    tracing::info!("{}", run.summary());
                    run.tell_recompute();
                }
                let output = run.output().to_owned();
                match run.execute(world, &stop) {
                    Ok(Ended::Done) => Ok(ExitCode::SUCCESS),
                    Ok(Ended::Stopped) => Ok(ExitCode::from(STOPPED)),
                    Err(error) => {
                        if world.rank() == 0 {
                            note_failure(&output, &error.to_string());
                        }
                        Err(error)
                    }
                }
            },
        )
    }
}
