//! The command `serve`.

use super::{Common, Fields, Runnable, models, ranks::on_all_ranks};
use crate::{
    config,
    error::{Result, agree},
    server::Start,
    train::{Program, STOPPED, StopSignals},
};
use std::{path::PathBuf, process::ExitCode};

/// Serve a base model over HTTP to clients that train and sample adapters; also sharded over the ranks of mpirun
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Serve {
    /// The server: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

impl Runnable for Serve {
    const USAGE: &'static str = "serve --config <FILE>";
    const FIELDS: Option<Fields> = Some(Fields {
        usage: "[--server.field <VALUE>]...",
        file: "server.yaml",
        help: config::server_help,
        schema: config::server_schema,
    });

    /// Serves until a signal asks for the end; then all adapters are saved.
    fn run(&self, common: &Common) -> Result<ExitCode> {
        on_all_ranks(
            common.device,
            common.debug,
            |world| {
                // Before signals are listened to: one ends a download at once.
                models::fetch(world, || models::of_server(&self.config, &common.overrides))?;
                let stop = StopSignals::listen(Program::Server, world)?;
                let everyone = world.group("world", 0);
                let start = Start::read(&self.config, &common.overrides, world.size(), common.debug);
                let mut start = agree(&*everyone, start)?;
                start.open(&*everyone)?;
                Ok((start, stop))
            },
            |(start, stop), world| start.execute(world, &stop).map(|()| ExitCode::from(STOPPED)),
        )
    }
}
