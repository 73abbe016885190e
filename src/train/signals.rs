//! Signals that ask a run or a server to save and stop: SIGUSR1 under any launcher, SIGTERM and SIGINT where no
//! launcher acts on them. The handlers only set a flag; the ranks of a run agree on it at the end of each step. A
//! thread prints the reaction to the first signal at once, because a step may take long.

use crate::{
    comm::World,
    console,
    error::{Error, Result},
};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
    low_level::{self, pipe},
};
use std::{
    io::Read,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Requests to this process to stop.
pub struct StopSignals {
    asked: Arc<AtomicBool>,
    place: Place,
    /// The signals that are listened to.
    signals: &'static [i32],
}

/// The program that is asked to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Program {
    #[default]
    Run,
    Server,
}

/// Progress of a run, for the message about a signal.
#[derive(Clone, Default)]
struct Place {
    program: Program,
    /// The step that is being made, from 1; 0 before the first.
    step: Arc<AtomicUsize>,
    /// The step that was saved last; 0: none.
    saved: Arc<AtomicUsize>,
}

impl StopSignals {
    /// Listens from now on, on a rank of `world` that runs `program`; rank 0 prints the reaction. By hand, a second
    /// SIGTERM or SIGINT ends the process at once. slurm may send one signal twice, and kills later anyway.
    pub fn listen(program: Program, world: &World) -> Result<Self> {
        let (leaves_signals, by_hand, says) = (world.leaves_signals(), world.is_by_hand(), world.rank() == 0);
        let place = Place { program, ..Place::default() };
        let asked = Arc::new(AtomicBool::new(false));
        let failed = |error| Error::Failure(format!("listening to signals: {error}"));
        let ours = if leaves_signals { &[SIGTERM, SIGINT, SIGUSR1][..] } else { &[SIGUSR1] };
        for &signal in ours {
            if by_hand && signal != SIGUSR1 {
                // Registered before the flag, so that the first signal finds the flag unset.
                flag::register_conditional_shutdown(signal, 128 + signal, asked.clone()).map_err(failed)?;
            }
            flag::register(signal, asked.clone()).map_err(failed)?;
        }
        if says {
            let own = place.clone();
            on_first(ours, move || console::say(&own.stopping(by_hand))).map_err(failed)?;
        }
        if says && !leaves_signals {
            let own = place.clone();
            let ends = move || {
                console::say(&own.ending());
                let _ = low_level::emulate_default_handler(SIGTERM);
            };
            on_first(&[SIGTERM], ends).map_err(failed)?;
        }
        Ok(Self { asked, place, signals: ours })
    }

    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Has a thread call `act` at the first signal. One that has come already counts.
    pub fn on_asked(&self, act: impl Fn() + Send + Sync + 'static) -> Result<()> {
        let act = Arc::new(act);
        let own = act.clone();
        on_first(self.signals, move || own())
            .map_err(|error| Error::Failure(format!("listening to signals: {error}")))?;
        if self.asked() {
            act();
        }
        Ok(())
    }

    /// Notes that `step`, from 1, begins.
    pub fn at(&self, step: usize) {
        self.place.step.store(step, Ordering::Relaxed);
    }

    /// Notes that `step` is saved.
    pub fn saved(&self, step: usize) {
        self.place.saved.store(step, Ordering::Relaxed);
    }
}

impl Place {
    fn stopping(&self, by_hand: bool) -> String {
        let again = if by_hand { "; once more (Ctrl-C) ends at once, without saving" } else { "" };
        match self.step.load(Ordering::Relaxed) {
            _ if self.program == Program::Server => format!(
                "stopping: requests that were taken are finished, then all adapters are saved and the server ends{again}"
            ),
            0 => format!("stopping: the first step is made and saved, then the run ends{again}"),
            step => format!("stopping: step {step} is finished and saved, then the run ends{again}"),
        }
    }

    /// mpirun handles SIGTERM and SIGINT by ending its ranks about a second later.
    fn ending(&self) -> String {
        let saved = match self.saved.load(Ordering::Relaxed) {
            _ if self.program == Program::Server => "adapters are as they were last saved".to_owned(),
            0 => "nothing of this run is saved".to_owned(),
            step => format!("nothing after step {step} is saved"),
        };
        let launcher = match self.program {
            Program::Run => "launch/mpirun.sh",
            Program::Server => "launch/serve.sh",
        };
        format!(
            "SIGTERM from mpirun, which ends all ranks now: {saved}; {launcher} saves on Ctrl-C, and kill -USR1 to \
             mpirun saves too"
        )
    }
}

/// Calls `act` on a thread of its own at the first of `signals`.
fn on_first(signals: &[i32], act: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let (mut hears, writes) = UnixStream::pair()?;
    for &signal in signals {
        pipe::register(signal, writes.try_clone()?)?;
    }
    let wait = move || {
        // The other end stays open as long as the process: its handlers own it.
        if hears.read_exact(&mut [0]).is_ok() {
            act();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_that_is_saved_is_named() {
        let place = Place::default();
        assert!(place.stopping(false).contains("the first step is made and saved"));
        assert!(place.ending().contains("nothing of this run is saved"));
        place.step.store(8, Ordering::Relaxed);
        place.saved.store(5, Ordering::Relaxed);
        assert_eq!(place.stopping(false), "stopping: step 8 is finished and saved, then the run ends");
        assert!(place.stopping(true).ends_with("; once more (Ctrl-C) ends at once, without saving"));
        assert!(place.ending().contains("nothing after step 5 is saved"));
    }
}
