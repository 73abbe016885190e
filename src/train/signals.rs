//! Signals that ask a run to save and stop: SIGUSR1 under any launcher, SIGTERM and SIGINT where no launcher acts on
//! them. The handlers only set a flag; ranks agree on it at the end of each step.

use crate::error::{Error, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Requests to this process to stop.
pub struct StopSignals(Arc<AtomicBool>);

impl StopSignals {
    /// Listens from now on. `ours`: also to SIGTERM and SIGINT. `by_hand`: a second one of these ends the process at
    /// once. slurm may send one signal twice, and kills later anyway.
    pub fn listen(ours: bool, by_hand: bool) -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        let failed = |error| Error::Failure(format!("listening to signals: {error}"));
        for signal in if ours { &[SIGTERM, SIGINT][..] } else { &[] } {
            if by_hand {
                // Registered before the flag, so that the first signal finds the flag unset.
                flag::register_conditional_shutdown(*signal, 128 + signal, asked.clone()).map_err(failed)?;
            }
            flag::register(*signal, asked.clone()).map_err(failed)?;
        }
        flag::register(SIGUSR1, asked.clone()).map_err(failed)?;
        Ok(Self(asked))
    }

    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
