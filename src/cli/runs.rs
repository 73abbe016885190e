//! The command `runs`.

use super::{Common, Fields, Runnable};
use crate::{
    error::{Error, Result},
    report::{self, Standing},
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

/// List the runs in a folder and below: state, last step, losses, best step, age and model
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Runs {
    /// An output_dir, or a folder of several
    #[arg(value_name = "DIR", default_value = ".")]
    pub folder: PathBuf,
    /// Print a JSON array with an object a run
    #[arg(long)]
    pub json: bool,
}

impl Runnable for Runs {
    const USAGE: &'static str = "runs [DIR] [--json]";
    const FIELDS: Option<Fields> = None;

    fn run(&self, _: &Common) -> Result<ExitCode> {
        let runs = runs_below(&self.folder)?;
        if self.json {
            return super::print(&(serde_json::json!(runs).to_string() + "\n"));
        }
        super::print(&report::table(&runs, &report::names(&runs), now()))
    }
}

/// The runs at and below `folder`.
pub(super) fn runs_below(folder: &Path) -> Result<Vec<Standing>> {
    let outputs = report::outputs_below(folder).map_err(|error| Error::Input(error.to_string()))?;
    let read = |output: &PathBuf| {
        report::runs_of(output).map_err(|error| Error::Failure(format!("{}: {error}", output.display())))
    };
    let runs: Vec<Vec<Standing>> = outputs.iter().map(read).collect::<Result<_>>()?;
    Ok(runs.into_iter().flatten().collect())
}

/// Seconds since the epoch.
pub(super) fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs()
}
