//! How tests start Python and ranks. Each test program uses a part of it.
#![allow(dead_code, reason = "every test program compiles its own copy")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The Python that has transformers and PEFT: launch/setup.sh makes it.
pub fn python() -> PathBuf {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    std::env::var_os("XORL_ORACLE_PYTHON").map_or(venv, PathBuf::from)
}

/// `program` on `ranks` ranks of one thread each; one rank needs no launcher.
pub fn ranks_of(program: &Path, ranks: usize) -> Command {
    let mut command = if ranks == 1 {
        Command::new(program)
    } else {
        let mut mpirun = Command::new("mpirun");
        mpirun.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]).arg(program);
        mpirun
    };
    command.env("OMP_NUM_THREADS", "1");
    command
}
