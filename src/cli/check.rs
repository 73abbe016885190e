//! The command `check`.

use super::{Common, Fields, RUN_FIELDS, Runnable, at_least_one, models, ranks::on_all_ranks};
use crate::{comm::FreeMemory, error::Result, train::Run};
use std::{path::PathBuf, process::ExitCode};

/// Validate config, model and data without training; print the resolved run, mesh, memory and traffic
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Check {
    /// The run: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Ranks of the run to be; those that have been started when absent
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub ranks: Option<usize>,
    /// Print the first N rows as the model sees them, the tokens that carry loss between ⟦ and ⟧
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub show_samples: Option<usize>,
}

impl Runnable for Check {
    const USAGE: &'static str = "check --config <FILE> [--ranks <N>] [--show-samples <N>]";
    const FIELDS: Option<Fields> = Some(RUN_FIELDS);

    /// Finds the faults of a run before its first step, or prints its cost. Writes nothing but to stdout, and a
    /// model of the hub into its cache.
    fn run(&self, common: &Common) -> Result<ExitCode> {
        on_all_ranks(
            common.device,
            false,
            |world| {
                models::fetch(world, || models::of_run(&self.config, &common.overrides))?;
                let ranks = self.ranks.unwrap_or(world.size());
                let mut run = Run::prepare(&self.config, &common.overrides, ranks)?;
                run.start_afresh()?;
                run.foresee()?;
                Ok(run)
            },
            |mut run, world| {
                let device = world.device();
                let free = match self.ranks.filter(|&ranks| ranks != world.size()) {
                    Some(ranks) => FreeMemory::supposed(device, ranks)?,
                    None => FreeMemory::of_ranks(&*world.group("world", 0), device)?,
                };
                run.fit(&free)?;
                if world.rank() == 0 {
                    super::print(&run.report(device.memory()?, &free)?)?;
                    if let Some(rows) = self.show_samples {
                        super::print(&run.samples(rows)?)?;
                    }
                }
                Ok(ExitCode::SUCCESS)
            },
        )
    }
}
