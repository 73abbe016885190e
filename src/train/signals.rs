//! Signals that ask a run to save and stop: SIGUSR1 under any launcher, SIGTERM and SIGINT where nobody else acts on
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

/// Whether this process was asked to stop.
pub struct StopSignals(Arc<AtomicBool>);

impl StopSignals {
    /// Listens from now on. `terminal`: also to SIGTERM and SIGINT, of which a second one ends the process at once.
    pub fn listen(terminal: bool) -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        let failed = |error| Error::Failure(format!("listening to signals: {error}"));
        for signal in if terminal { &[SIGTERM, SIGINT][..] } else { &[] } {
            // Before the flag is registered, so that the first signal finds it unset.
            flag::register_conditional_shutdown(*signal, 128 + signal, asked.clone()).map_err(failed)?;
            flag::register(*signal, asked.clone()).map_err(failed)?;
        }
        flag::register(SIGUSR1, asked.clone()).map_err(failed)?;
        Ok(Self(asked))
    }

    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
