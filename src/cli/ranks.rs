//! Frame of every command that runs on all ranks: join them, agree to go on, end together.

use crate::{
    comm::{Watcher, World},
    console, data,
    device::{self, DeviceChoice},
    error::{Error, Result, agree},
};
use std::{process::ExitCode, time::Duration};
use tracing::subscriber::{NoSubscriber, with_default};

/// Time in which the watchdog ends a process that it was asked to end.
const TOLD: Duration = Duration::from_secs(5);

/// Joins the ranks and has each `prepare`, which writes nothing but models of the hub into their cache. If all could,
/// each `execute`s. A fault in preparing ends all ranks with one line. A rank that fails later prints its line and ends
/// the others. Ranks compute on the device of `choice`. `debug`: every rank logs at level debug.
pub(super) fn on_all_ranks<P>(
    choice: DeviceChoice,
    debug: bool,
    prepare: impl FnOnce(&World) -> Result<P>,
    execute: impl FnOnce(P, &World) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let mut world = World::start()?;
    let rank = world.rank();
    end_on_panic(world.watcher());
    log(&world, debug);

    // The line is printed before any rank exits: after the first exit mpirun ends the others.
    let everyone = world.group("world", 0);
    let found = world.use_device(choice).map_err(Error::from);
    agree(&*everyone, found).map_err(|error| said("", error))?;
    world.warnings().for_each(|warning| tracing::warn!("{warning}"));
    if debug {
        device::torch::prefer_deterministic()?;
    }
    // The first call of libtorch comes after its CUDA library is loaded.
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        tch::set_num_threads((cores / world.size()).max(1) as i32);
    }
    // All ranks prepare the same, so one of them warns.
    let prepared = if rank == 0 || debug {
        prepare(&world)
    } else {
        with_default(NoSubscriber::default(), || prepare(&world))
    };
    let prepared = agree(&*everyone, prepared).map_err(|error| said("", error))?;
    execute(prepared, &world).map_err(|error| {
        // A rank without a line of its own waits in MPI_Finalize for the one that prints.
        if world.size() == 1 || matches!(error, Error::Elsewhere { .. }) {
            return error;
        }
        world.abort(said(&format!("rank {rank}: "), error).exit_code());
    })
}

/// Sends the log to stderr, above the bar. The first rank's lines have no number unless `debug` has all ranks speak.
fn log(world: &World, debug: bool) {
    let rank = world.rank();
    let level = match rank {
        _ if debug => "debug",
        0 => "info",
        _ => "warn",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let numbered = rank > 0 || debug && world.size() > 1;
    let lines = console::Lines { prefix: if numbered { format!("rank {rank}: ") } else { String::new() } };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(console::has_colours());
    // A line that stderr does not take is lost; to say so there would be a panic.
    let log = log.log_internal_errors(false);
    // A second initialisation is refused, which does no harm.
    let _ = log.with_writer(move || lines.clone()).try_init();
}

/// Makes a panic end all ranks with one line, which the watchdog prints if there is one. A panic is a bug, or memory
/// that libtorch could not get. Unwinding would wait for the other ranks in MPI_Finalize.
fn end_on_panic(watcher: Watcher) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if data::is_guarded() {
            return;
        }
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            default(panic);
        }
        let text = panic.payload_as_str().unwrap_or("a panic");
        // The message of libtorch includes its call stack, quoted by tch.
        let text = text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or(text);
        let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        let line = format!("{text}{place}");
        if watcher.fail(&line) {
            std::thread::sleep(TOLD);
        }
        console::say(&format!("error: {line}"));
        // SAFETY: _exit has no preconditions. It skips exit handlers, as those of MPI may wait for other ranks.
        unsafe { libc::_exit(1) }
    }));
}

/// Prints the lines of an error of this rank. The error that remains has been said.
fn said(whose: &str, error: Error) -> Error {
    if !matches!(error, Error::Elsewhere { .. }) {
        // Lines of several ranks do not mix, as all are one write.
        console::say(&error.lines(&format!("error: {whose}")));
    }
    Error::Elsewhere { code: error.exit_code() }
}
