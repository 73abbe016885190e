//! Signals that ask a run or a server to save and stop: SIGUSR1 under any launcher, SIGTERM and SIGINT where no
//! launcher acts on them. The handlers only set a flag; the ranks of a run agree on it after each micro-batch and at
//! the end of each step. Threads print the reaction to a signal at once, because a micro-batch may take long.
//!
//! Before [`StopSignals::begin`] a run has nothing to save: a thread ends the process, and the launcher the others.

use crate::{
    comm::{CommError, Communicator, Reduce, Watcher, World},
    console,
    error::{Error, Result},
};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ},
    flag,
    low_level::{self, pipe},
};
use std::{
    io::Read,
    os::unix::net::UnixStream,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Exit code of a run or a server that has stopped because a signal asked for it.
pub const STOPPED: u8 = 75;
/// Time for rank 0 to print, before another rank ends and the launcher ends all.
const FIRST_SAYS: Duration = Duration::from_millis(300);

/// Has a write beyond the limit of `ulimit -f` fail as one on a full disk does, where else the process would end.
pub fn outlive_file_limit() {
    // A signal that cannot be heard ends the process as before.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// Requests to this process to stop.
pub struct StopSignals {
    asked: Arc<AtomicBool>,
    /// When the first signal came.
    since: Arc<OnceLock<Instant>>,
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
    /// There is something to save.
    begun: Arc<AtomicBool>,
    /// The step that is being made, from 1; 0 before the first.
    step: Arc<AtomicUsize>,
    saved: SavedStep,
}

/// The step that was published last; 0: none. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct SavedStep(Arc<AtomicUsize>);

impl SavedStep {
    /// Notes that `step` is published.
    pub fn set(&self, step: usize) {
        self.0.store(step, Ordering::Relaxed);
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Requests to stop of all ranks, the same on each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Asked {
    No,
    /// The first signal to any rank came so many seconds ago.
    Since(f64),
}

impl Asked {
    /// True if a step is dropped of which `left` micro-batches are left that take `seconds` each: with them the answer
    /// to the signal would take longer than `grace` seconds.
    pub fn drops(self, left: usize, seconds: f64, grace: f64) -> bool {
        match self {
            Self::No => false,
            Self::Since(passed) => passed + left as f64 * seconds > grace,
        }
    }
}

impl StopSignals {
    /// Listens from now on, on a rank of `world` that runs `program`; rank 0 prints the reaction. By hand, a second
    /// SIGTERM or SIGINT ends the process at once. slurm may send one signal twice, and kills later anyway.
    pub fn listen(program: Program, world: &World) -> Result<Self> {
        let (leaves_signals, by_hand, says) = (world.leaves_signals(), world.is_by_hand(), world.rank() == 0);
        let place = Place { program, ..Place::default() };
        // A server saves nothing while it loads, and ends in good order.
        place.begun.store(program == Program::Server, Ordering::Relaxed);
        let (asked, since) = (Arc::new(AtomicBool::new(false)), Arc::new(OnceLock::new()));
        let failed = |error| Error::Failure(format!("listening to signals: {error}"));
        let ours = if leaves_signals { &[SIGTERM, SIGINT, SIGUSR1][..] } else { &[SIGUSR1] };
        let (own, first) = (place.clone(), since.clone());
        let answered = asked.clone();
        let watcher = world.watcher();
        let answer = move |before, signal| {
            if before == 0 {
                let _ = first.set(Instant::now());
                answered.store(true, Ordering::Relaxed);
                own.stop(&watcher, says, by_hand);
            } else if by_hand && signal != SIGUSR1 {
                // Where stderr takes no line, a third signal ends the process. The action is new: were it there before,
                // the handler of this second one could still find it and end the process without the line.
                for signal in [SIGTERM, SIGINT] {
                    let always = Arc::new(AtomicBool::new(true));
                    let _ = flag::register_conditional_shutdown(signal, 128 + signal, always);
                }
                console::say(&own.quitting());
                console::end_bar();
                low_level::exit(128 + signal);
            }
        };
        // Registered first: from then on no signal is lost.
        on_each(ours, answer).map_err(failed)?;
        for &signal in ours {
            flag::register(signal, asked.clone()).map_err(failed)?;
        }
        if says && !leaves_signals {
            let own = place.clone();
            let ends = move |_, _| {
                console::say(&own.ending());
                let _ = low_level::emulate_default_handler(SIGTERM);
            };
            on_each(&[SIGTERM], ends).map_err(failed)?;
        }
        Ok(Self { asked, since, place, signals: ours })
    }

    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Seconds since the first signal; negative without one. Of all ranks' the largest counts: see
    /// [`Asked`](Asked::from).
    pub(super) fn passed(&self) -> f64 {
        let since = self.asked().then(|| self.since.get().map_or(Duration::ZERO, Instant::elapsed));
        since.map_or(-1.0, |since| since.as_secs_f64())
    }

    /// Requests of all ranks of `world`, with the largest of their `seconds`. Collective: one exchange of two host
    /// numbers.
    pub(super) fn agreed(&self, world: &dyn Communicator, seconds: f64) -> Result<(Asked, f64), CommError> {
        let mut all = [self.passed(), seconds];
        world.all_reduce_host(&mut all, Reduce::Max)?;
        Ok((all[0].into(), all[1]))
    }

    /// Has a thread call `act` at the first signal. One that has come already counts.
    pub fn on_asked(&self, act: impl Fn() + Send + Sync + 'static) -> Result<()> {
        let act = Arc::new(act);
        let own = act.clone();
        let first = move |before, _| {
            if before == 0 {
                own();
            }
        };
        on_each(self.signals, first)
            .map_err(|error| Error::Failure(format!("listening to signals: {error}")))?;
        if self.asked() {
            act();
        }
        Ok(())
    }

    /// From now on the run answers signals itself: it may have something to save.
    pub(super) fn begin(&self) {
        self.place.begun.store(true, Ordering::Relaxed);
    }

    /// Notes that `step`, from 1, begins.
    pub fn at(&self, step: usize) {
        self.place.step.store(step, Ordering::Relaxed);
    }

    /// The note of the step that was published last.
    pub(super) fn saved(&self) -> SavedStep {
        self.place.saved.clone()
    }
}

impl From<f64> for Asked {
    /// Reads the largest [`StopSignals::passed`] of all ranks.
    fn from(passed: f64) -> Self {
        if passed < 0.0 { Self::No } else { Self::Since(passed) }
    }
}

impl Place {
    /// Says that the process stops. One that has nothing to save ends.
    fn stop(&self, watcher: &Watcher, says: bool, by_hand: bool) {
        if self.begun.load(Ordering::Relaxed) {
            if says {
                console::say(&self.stopping(by_hand));
            }
            return;
        }
        watcher.last_act(|| {
            if says {
                console::say(&self.stopping(by_hand));
            } else {
                std::thread::sleep(FIRST_SAYS);
            }
            low_level::exit(i32::from(STOPPED))
        })
    }

    fn stopping(&self, by_hand: bool) -> String {
        let again = if by_hand { "; once more (Ctrl-C) ends at once, without saving" } else { "" };
        match self.step.load(Ordering::Relaxed) {
            _ if self.program == Program::Server => format!(
                "stopping: requests that were taken are finished, then all adapters are saved and the server ends{again}"
            ),
            _ if !self.begun.load(Ordering::Relaxed) => {
                "stopping: no step is made yet, and nothing is saved".to_owned()
            }
            step => {
                let step = if step == 0 { "the first step".to_owned() } else { format!("step {step}") };
                format!(
                    "stopping: {step} is finished and saved, or dropped where that takes longer than train.stop_grace_s, \
                     then the run ends{again}"
                )
            }
        }
    }

    fn quitting(&self) -> String {
        format!("ended at once by a second signal: {}", self.rest())
    }

    /// The state that the program leaves behind.
    fn rest(&self) -> String {
        match self.saved.get() {
            _ if self.program == Program::Server => "adapters are as they were last saved".to_owned(),
            0 => "nothing of this run is saved".to_owned(),
            step => format!("nothing after step {step} is saved"),
        }
    }

    /// mpirun handles SIGTERM and SIGINT by ending its ranks about a second later.
    fn ending(&self) -> String {
        let launcher = match self.program {
            Program::Run => "launch/mpirun.sh",
            Program::Server => "launch/serve.sh",
        };
        format!(
            "SIGTERM from mpirun, which ends all ranks now: {}; {launcher} saves on Ctrl-C, and kill -USR1 to mpirun saves \
             too",
            self.rest()
        )
    }
}

/// Calls `act` at each of `signals`, on a thread of that signal, with the number of those before it and the signal.
fn on_each(signals: &[i32], act: impl Fn(usize, i32) + Send + Sync + 'static) -> std::io::Result<()> {
    let (act, count) = (Arc::new(act), Arc::new(AtomicUsize::new(0)));
    for &signal in signals {
        let (mut hears, writes) = UnixStream::pair()?;
        pipe::register(signal, writes)?;
        let (act, count) = (act.clone(), count.clone());
        let wait = move || {
            // The other end stays open as long as the process: its handler owns it.
            while hears.read_exact(&mut [0]).is_ok() {
                act(count.fetch_add(1, Ordering::Relaxed), signal);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_that_is_saved_is_named() {
        let place = Place::default();
        assert!(place.stopping(false).contains("no step is made yet, and nothing is saved"));
        place.begun.store(true, Ordering::Relaxed);
        assert!(place.stopping(false).contains("the first step is finished and saved"));
        assert!(place.ending().contains("nothing of this run is saved"));
        place.step.store(8, Ordering::Relaxed);
        place.saved.set(5);
        assert!(place.stopping(false).starts_with("stopping: step 8 is finished and saved, or dropped"));
        assert!(place.stopping(true).ends_with("; once more (Ctrl-C) ends at once, without saving"));
        assert!(place.ending().contains("nothing after step 5 is saved"));
        assert_eq!(place.quitting(), "ended at once by a second signal: nothing after step 5 is saved");
    }

    #[test]
    fn a_step_is_dropped_if_its_rest_takes_longer_than_the_grace() {
        for (passed, left, seconds, dropped) in [
            (-1.0, 1000, 60.0, false),
            (0.0, 3, 10.0, false),
            (0.5, 3, 10.0, true),
            (29.0, 1, 1.0, false),
            (29.5, 1, 1.0, true),
            (0.0, 0, 60.0, false),
        ] {
            assert_eq!(Asked::from(passed).drops(left, seconds, 30.0), dropped, "{passed} {left} {seconds}");
        }
        assert!(Asked::Since(0.0).drops(1, 0.001, 0.0));
    }
}
