//! HTTP: takes connections and requests, checks keys and limits, and hands the rest to the wires. It has threads of
//! its own; [`serve`] runs until it is told to stop.

mod body;
mod connection;
mod metrics;
mod openapi;
mod page;
mod pages;
mod routes;

pub use body::{Bodies, failed};
pub use metrics::Metrics;

use super::app::App;
use crate::console::count;
use connection::{Connection, Connections};
use pages::Hosts;
use std::{io, net::TcpListener, sync::Arc, time::Duration};
use tokio::sync::watch;

/// Bounds on connections and requests.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Connections at a time; more wait to be accepted.
    pub connections: usize,
    /// Bytes of a body, as it is sent and after it is unpacked.
    pub body: usize,
    /// Bytes of all bodies that are being received or read, and of results that are being sent; more wait. JSON takes
    /// up to 16 times its bytes while it is read.
    pub bodies: usize,
    /// Time for which a body waits for room among the others.
    pub room_time: Duration,
    /// Time for the head of a request, from its first byte.
    pub head_time: Duration,
    /// Time for the body of a request.
    pub body_time: Duration,
    /// Time that a connection may be idle, or that a client may take no byte of a response.
    pub idle_time: Duration,
    /// Time for clients to fetch results after the last was computed, when the server stops.
    pub linger: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            body: 64 << 20,
            bodies: 512 << 20,
            room_time: Duration::from_secs(20),
            head_time: Duration::from_secs(20),
            body_time: Duration::from_secs(60),
            idle_time: Duration::from_secs(120),
            linger: Duration::from_secs(5),
        }
    }
}

/// Bodies that are read, and results that are written, at a time; each may be large.
const BLOCKING: usize = 64;

/// Tells [`serve`] to stop.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Sender<bool>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(watch::channel(false).0)
    }
}

impl Shutdown {
    /// New requests are refused from now on; those that were taken are carried out.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }
}

/// Serves `listener` until `shutdown` begins and the requests that were taken are carried out; then clients have some
/// time to fetch results. Blocks the calling thread.
///
/// # Errors
/// The listener or a thread fails.
pub fn serve(listener: TcpListener, app: Arc<App>, shutdown: &Shutdown) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut begun = shutdown.0.subscribe();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING)
        .thread_name("http")
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let limits = app.settings.http.clone();
        let hosts = Hosts::new(listener.local_addr()?, &app.settings.api_host);
        let service = routes::router(app.clone(), hosts).into_make_service_with_connect_info::<Connection>();
        let closing = watch::channel(false).0;
        let mut closed = closing.subscribe();
        let server =
            axum::serve(Connections::new(listener, &limits), service).with_graceful_shutdown(async move {
                let _ = closed.wait_for(|closed| *closed).await;
            });
        let server = tokio::spawn(async move { server.await });
        tokio::spawn(app.clone().keep_orders());
        let _ = begun.wait_for(|begun| *begun).await;
        app.drain();
        drained(&app, limits.linger).await;
        closing.send_replace(true);
        match tokio::time::timeout(limits.linger, server).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(error)) => Err(io::Error::other(error)),
            // A client that still holds its connection loses it.
            Err(_) => Ok(()),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// Waits until nothing is pending, and then, for `linger` at most, until every result was fetched.
async fn drained(app: &App, linger: Duration) {
    const TICK: Duration = Duration::from_millis(20);
    const SAYS: Duration = Duration::from_secs(10);
    let mut next = tokio::time::Instant::now();
    loop {
        let pending = app.futures.counts().pending;
        if pending == 0 {
            break;
        }
        if tokio::time::Instant::now() >= next {
            tracing::warn!("stopping: {} left", count(pending, "request"));
            next += SAYS;
        }
        tokio::time::sleep(TICK).await;
    }
    let ends = tokio::time::Instant::now() + linger;
    while app.futures.counts().unread > 0 && tokio::time::Instant::now() < ends {
        tokio::time::sleep(TICK).await;
    }
}
