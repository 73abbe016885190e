//! What every command does that runs on all ranks: join them, agree on whether to go on, end together.

use crate::{
    comm::{Watcher, World},
    device::{self, DeviceChoice},
    error::{Error, Result, agree},
};
use std::{io::Write, process::ExitCode, time::Duration};

/// In which the watchdog has ended a process that it was asked to end.
const TOLD: Duration = Duration::from_secs(5);

/// Joins the ranks, lets each `prepare` (nothing written) and, when all could, `execute`. A fault that
/// is found while preparing ends all ranks with one line; a rank that fails later says so and takes the others with it.
/// They compute on what `choice` says. `debug`: every rank logs all that it has to say.
pub(super) fn on_all_ranks<P>(
    choice: DeviceChoice,
    debug: bool,
    prepare: impl FnOnce(&World) -> Result<P>,
    execute: impl FnOnce(P, &World) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let mut world = World::start()?;
    let rank = world.rank();
    end_on_panic(world.watcher());
    let level = match rank {
        _ if debug => "debug",
        0 => "info",
        _ => "warn",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    // A second initialisation is refused, and harmless.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();

    // Said before the ranks part: where one has exited, mpirun ends the others.
    let everyone = world.group("world", 0);
    let found = world.use_device(choice).map_err(Error::from);
    agree(&*everyone, found).map_err(|error| said("", error))?;
    world.warnings().for_each(|warning| tracing::warn!("{warning}"));
    if debug {
        device::torch::prefer_deterministic()?;
    }
    // libtorch is first called when its half for the device is loaded.
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        tch::set_num_threads((cores / world.size()).max(1) as i32);
    }
    let prepared = agree(&*everyone, prepare(&world)).map_err(|error| said("", error))?;
    execute(prepared, &world).map_err(|error| {
        // A rank that has nothing to say waits, in MPI's end, for the one that has.
        if world.size() == 1 || matches!(error, Error::Elsewhere { .. }) {
            return error;
        }
        world.abort(said(&format!("rank {rank}: "), error).exit_code());
    })
}

/// A panic is a bug, or memory that libtorch could not have: it ends all ranks, and is told in one line, by the watchdog where
/// there is one. To unwind would be to wait for the other ranks in MPI's end.
fn end_on_panic(watcher: Watcher) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            default(panic);
        }
        let text = panic.payload_as_str().unwrap_or("a panic");
        // libtorch adds its call stack, and tch quotes the whole.
        let text = text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or(text);
        let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        let line = format!("{text}{place}");
        if watcher.fail(&line) {
            std::thread::sleep(TOLD);
        }
        let _ = std::io::stderr().write_all(format!("error: {line}\n").as_bytes());
        // SAFETY: ends the process without running what was registered for its exit, which may wait for others.
        unsafe { libc::_exit(1) }
    }));
}

/// Writes the line of an error that is this rank's own, and leaves nothing to say.
fn said(whose: &str, error: Error) -> Error {
    if !matches!(error, Error::Elsewhere { .. }) {
        // One write, or the lines of several ranks mix.
        let _ = std::io::stderr().write_all(format!("error: {whose}{error}\n").as_bytes());
    }
    Error::Elsewhere { code: error.exit_code() }
}
