//! The command `report`.

use super::{
    Common, Fields, Runnable,
    runs::{now, runs_below},
};
use crate::{
    console::count,
    error::{Error, Result},
    report::{self, Standing},
};
use std::{path::PathBuf, process::ExitCode};

/// Write one HTML page that shows runs over each other: losses, rates, norms, throughput, memory, phases, traffic. It
/// loads nothing from elsewhere
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Report {
    /// An output_dir, or a folder of several; runs that go on are shown as they stand
    #[arg(value_name = "OUTPUT_DIR", required = true)]
    pub folders: Vec<PathBuf>,
    /// File to write; an earlier one is replaced
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub out: PathBuf,
}

impl Runnable for Report {
    const USAGE: &'static str = "report <OUTPUT_DIR>... [--out <FILE>]";
    const FIELDS: Option<Fields> = None;

    fn run(&self, _: &Common) -> Result<ExitCode> {
        let mut runs: Vec<Standing> = Vec::new();
        for folder in &self.folders {
            for run in runs_below(folder)? {
                // Folders may be named twice, or be one inside the other.
                if !runs.iter().any(|other| other.output == run.output && other.run_id == run.run_id) {
                    runs.push(run);
                }
            }
        }
        let names = report::names(&runs);
        let failed =
            |path: &PathBuf, error: std::io::Error| Error::Failure(format!("{}: {error}", path.display()));
        let page = report::html(&runs, &names, now()).map_err(|error| failed(&self.folders[0], error))?;
        std::fs::write(&self.out, page)
            .map_err(|error| Error::Input(format!("--out {}: {error}", self.out.display())))?;
        super::print(&format!("{}: {}\n", self.out.display(), count(runs.len(), "run")))
    }
}
