//! The command `man`.

use super::{Common, Fields, Runnable};
use crate::error::{Error, Result};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Print the manual page, or write those of all commands into a folder
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Man {
    /// Folder for xorl-dist.1, xorl-dist-check.1 and the others, such as ~/.local/share/man/man1; stdout has the first
    /// alone when absent
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

impl Runnable for Man {
    const USAGE: &'static str = "man [--out <DIR>]";
    const FIELDS: Option<Fields> = None;

    fn run(&self, _: &Common) -> Result<ExitCode> {
        match &self.out {
            Some(folder) => {
                let fault = |error| Error::Input(format!("--out: {}: {error}", folder.display()));
                write_all(folder).map_err(fault)?;
                Ok(ExitCode::SUCCESS)
            }
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(super::parser())
                    .render(&mut page)
                    .map_err(|error| Error::Failure(error.to_string()))?;
                super::print(&String::from_utf8_lossy(&page))
            }
        }
    }
}

fn write_all(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(super::parser(), folder)
}
