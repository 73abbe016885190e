//! The front of a server, on a thread of rank 0: brings adapters back, serves HTTP until a stop is asked for, and then
//! saves all adapters.

use super::{
    app::{App, DEFAULT_MODEL, Settings},
    engine::EngineHandle,
    http::{self, Shutdown},
    journal::Recorded,
    kept::Kept,
    keys::Keys,
};
use crate::{
    checkpoint::output::OutputLock,
    console::{count, first_of},
    error::{Error, Result},
    train::StopSignals,
};
use std::{net::TcpListener, sync::Arc};

/// Everything that rank 0 needs besides the model.
pub struct Front {
    listener: TcpListener,
    keys: Keys,
    settings: Settings,
    kept: Kept,
    shutdown: Shutdown,
    /// Held until all is saved.
    _lock: OutputLock,
}

impl Front {
    /// Finds the adapters that earlier servers have left in the output directory, whose lock this is.
    pub fn new(listener: TcpListener, keys: Keys, lock: OutputLock, settings: Settings) -> Result<Self> {
        let kept = Kept::open(&settings.output_dir, keys.are_needed())?;
        Ok(Self { listener, keys, settings, kept, shutdown: Shutdown::default(), _lock: lock })
    }

    /// Has the server stop at the first of `signals`.
    pub fn stop_at(&self, signals: &StopSignals) -> Result<()> {
        let shutdown = self.shutdown.clone();
        signals.on_asked(move || shutdown.begin())
    }

    /// Serves `engine` on `ranks` until it is told to stop and all is saved.
    ///
    /// # Errors
    /// An adapter cannot be brought back or saved, or the listener fails.
    pub fn serve(self, engine: Arc<EngineHandle>, ranks: &str) -> Result<()> {
        let Self { listener, keys, settings, kept, shutdown, _lock } = self;
        let back = kept.bring_back(&*engine)?;
        let recorded = Arc::new(Recorded { engine: engine.clone(), journal: kept.journal() });
        let app = App::new(recorded, settings, keys);
        app.resume_numbers(kept.last_numbers());
        for lost in kept.lost() {
            tracing::warn!("{}", lost.text);
            app.registry().lose(lost.tenant.clone(), lost.model.clone(), lost.text.clone());
        }
        app.create_declared().map_err(|fault| Error::Failure(fault.detail))?;
        let failed = |error| Error::Failure(format!("HTTP: {error}"));
        let address = listener.local_addr().map_err(failed)?;
        let declared = app.settings.model_ids.iter().map(|model| model.as_str());
        let declared: Vec<&str> = std::iter::once(DEFAULT_MODEL).chain(declared).collect();
        tracing::info!(
            "listening on http://{address}: {} on {ranks}; adapters {}, and {} brought back",
            app.settings.base_model,
            first_of(&declared),
            count(back, "adapter"),
        );
        http::serve(listener, app.clone(), &shutdown).map_err(failed)?;
        let saved = kept.save(&*engine, &app.last_numbers())?;
        tracing::warn!(
            "stopped, as a signal asked for it: {} saved; the same command brings them back",
            count(saved, "adapter")
        );
        Ok(())
    }
}
