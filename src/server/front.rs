//! The front of a server, on a thread of rank 0: brings adapters back, serves HTTP until a stop is asked for, and then
//! saves all adapters.

use super::{
    app::{App, DEFAULT_MODEL, Settings},
    engine::EngineHandle,
    http::{self, Shutdown},
    journal::Recorded,
    kept::{Kept, Lost},
    keys::Keys,
    labels,
    request::{Engine, Usage},
    sweep::Sweep,
};
use crate::{
    checkpoint::output::OutputLock,
    console::{count, first_of},
    error::{Error, Result},
    train::StopSignals,
};
use std::{net::TcpListener, sync::Arc, time::Duration};

/// Checks that memory holds one adapter of the default shape.
fn check_room(usage: &Usage, settings: &Settings) -> Result<()> {
    let (Some(0), Some(bytes)) = (usage.fits, usage.memory_limit) else { return Ok(()) };
    Err(Error::Input(format!(
        "no adapter fits: lora_rank {} needs more than the {:.3} GB of a rank's adapter_memory beside \
         max_tokens_per_pass {}; lower lora_rank or max_tokens_per_pass, or raise adapter_memory",
        settings.adapter.rank,
        bytes as f64 / 1e9,
        settings.max_datum,
    )))
}

/// Everything that rank 0 needs besides the model.
pub struct Front {
    listener: TcpListener,
    keys: Keys,
    settings: Settings,
    kept: Kept,
    /// Time without a request or heartbeat after which an adapter waits on disk; `None`: it never does.
    idle: Option<Duration>,
    shutdown: Shutdown,
    /// Held until all is saved.
    _lock: OutputLock,
}

impl Front {
    /// Finds the adapters that earlier servers have left in the output directory, whose lock this is.
    pub fn new(
        listener: TcpListener,
        keys: Keys,
        lock: OutputLock,
        settings: Settings,
        idle: Option<Duration>,
    ) -> Result<Self> {
        let kept = Kept::open(&settings.output_dir, keys.are_needed())?;
        Ok(Self { listener, keys, settings, kept, idle, shutdown: Shutdown::default(), _lock: lock })
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
        let Self { listener, keys, settings, kept, idle, shutdown, _lock } = self;
        check_room(&engine.state().usage, &settings)?;
        let back = kept.bring_back(&*engine)?;
        let recorded = Arc::new(Recorded { engine: engine.clone(), journal: kept.journal() });
        let app = App::new(recorded, settings, keys);
        app.resume_numbers(kept.last_numbers());
        for Lost { tenant, model, loss } in kept.lost() {
            let of = if tenant.is_only() { String::new() } else { format!("tenant {}: ", tenant.name()) };
            tracing::warn!("{of}{}", (loss.tell)(&loss.root, model));
            app.registry().lose(tenant.clone(), model.clone(), loss.clone());
        }
        app.create_declared().map_err(|fault| Error::Failure(fault.detail))?;
        let failed = |error: std::io::Error| Error::Failure(format!("HTTP: {error}"));
        let address = listener.local_addr().map_err(failed)?;
        let declared = app.settings.model_ids.iter().map(|model| model.as_str());
        let lost: Vec<String> = kept.lost().iter().map(Lost::name).collect();
        let declared = std::iter::once(DEFAULT_MODEL).chain(declared);
        let declared: Vec<&str> = declared.filter(|name| !lost.iter().any(|lost| lost == *name)).collect();
        let declared = if declared.is_empty() { "none".to_owned() } else { first_of(&declared) };
        let lost = if lost.is_empty() { String::new() } else { format!("; lost {}", first_of(&lost)) };
        tracing::info!(
            "listening on http://{address}: {} on {ranks}; adapters {}, and {} brought back{lost}",
            app.settings.base_model,
            declared,
            count(back, "adapter"),
        );
        let sweep = Sweep::start(app.clone(), idle, labels::sweep).map_err(failed)?;
        http::serve(listener, app.clone(), &shutdown).map_err(failed)?;
        drop(sweep);
        let saved = kept.save(&*engine, &app.last_numbers())?;
        tracing::warn!(
            "stopped, as a signal asked for it: {} saved; the same command brings them back",
            count(saved, "adapter")
        );
        Ok(())
    }
}
