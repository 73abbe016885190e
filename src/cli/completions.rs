//! The command `completions`.

use super::{Common, Fields, Runnable};
use crate::error::Result;
use clap_complete::Shell;
use std::process::ExitCode;

/// Print a shell's completions of commands, options and fields
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Completions {
    /// The shell, whose startup file may have: eval "$(xorl-dist completions bash)"
    #[arg(value_enum)]
    pub shell: Shell,
}

impl Runnable for Completions {
    const USAGE: &'static str = "completions <SHELL>";
    const FIELDS: Option<Fields> = None;

    fn run(&self, _: &Common) -> Result<ExitCode> {
        // For bash, clap_complete writes a dash in the program's name in two ways, so that commands have no options.
        let name = if self.shell == Shell::Bash { "xorl_dist" } else { "xorl-dist" };
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::parser_with_fields(), name, &mut script);
        let script = String::from_utf8_lossy(&script).replace("default xorl_dist\n", "default xorl-dist\n");
        super::print(&script)
    }
}
