//! The sweep: moves idle adapters to disk, where they wait for their next request, unloads idle samplers, has saves
//! deleted whose time is over, and returns free memory to the system. A thread of the front does it now and then.

use super::{
    app::App,
    registry::Tenant,
    request::{Answer, Request, Task},
};
use crate::buffers::return_free_pages;
use std::{
    io,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

/// Time between two sweeps, at most; the first is at the start.
const PERIOD: Duration = Duration::from_secs(10);
/// Time after which free memory goes back to the system.
const RETURN: Duration = Duration::from_secs(60);

/// A sweep that goes on until this is dropped.
pub struct Sweep {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sweep {
    /// Starts to sweep `app`. See [`once`].
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(
        app: Arc<App>,
        idle: Option<Duration>,
        expire: impl Fn(&Path, SystemTime) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let period = idle.map_or(PERIOD, |idle| (idle / 2).clamp(Duration::from_millis(10), PERIOD));
        let run = move || {
            let mut returned = Instant::now();
            // A server that never lived for a period would keep them for ever.
            once(&app, idle, &expire, SystemTime::now());
            while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                once(&app, idle, &expire, SystemTime::now());
                if returned.elapsed() >= RETURN {
                    return_free_pages();
                    returned = Instant::now();
                }
            }
        };
        let thread = std::thread::Builder::new().name("sweep".into()).spawn(run)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Sweep {
    fn drop(&mut self) {
        drop(self.stop.take());
        // One that has panicked has said so.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sweeps once, at `now`: adapters without a request or heartbeat for the time `idle_time` go to disk and such samplers
/// are unloaded (`None`: none are), and `expire` deletes the saves below each tenant's folder whose time is over.
pub fn once(app: &App, idle_time: Option<Duration>, expire: &dyn Fn(&Path, SystemTime), now: SystemTime) {
    let idle = idle_time.map(|time| app.registry().idle(now, time)).unwrap_or_default();
    if let Some(time) = idle_time {
        app.unload_idle_samplers(now, time);
    }
    let models = app.engine.state().models;
    for (tenant, model) in idle {
        let Ok(id) = tenant.engine_id(&model) else { continue };
        if !models.get(id.as_str()).is_some_and(|state| state.in_memory) {
            continue;
        }
        let name = id.clone();
        let told = Box::new(move |answer: Answer| match answer {
            Ok(_) => tracing::debug!("adapter {name} is idle and waits on disk"),
            Err(why) => tracing::warn!("adapter {name} is idle and stays in memory: {why}"),
        });
        app.engine.submit(Request { model: id, task: Task::Spill }, told);
    }
    Tenant::roots(&app.settings.output_dir).iter().for_each(|root| expire(root, now));
}
