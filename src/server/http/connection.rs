//! Connections with limits below HTTP: a client that sends its request's head too slowly or at great length, is idle
//! for long, or takes nothing of its response loses the connection.

use super::HttpLimits;
use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep_until},
};

/// Bytes of a request's head after which no more are read of it.
const LONGEST_HEAD: usize = 64 << 10;

/// Accepts connections, up to a number at a time.
pub struct Connections {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    head_time: Duration,
    idle_time: Duration,
}

impl Connections {
    pub fn new(listener: TcpListener, limits: &HttpLimits) -> Self {
        let permits = Arc::new(Semaphore::new(limits.connections.max(1)));
        Self { listener, permits, head_time: limits.head_time, idle_time: limits.idle_time }
    }
}

impl Listener for Connections {
    type Io = TimedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TimedStream, SocketAddr) {
        loop {
            // The semaphore is never closed.
            let Ok(permit) = self.permits.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    // Without it a reply in two segments costs 40 ms.
                    let _ = stream.set_nodelay(true);
                    return (TimedStream::new(stream, permit, self.head_time, self.idle_time), address);
                }
                // Files may have run out; connections that end give some back.
                Err(error) => {
                    tracing::debug!("accepting a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection as its requests see it.
#[derive(Clone)]
pub struct Connection(Arc<Activity>);

impl Connection {
    /// A request is being answered until the guard is dropped: the limits on reading do not apply.
    pub fn busy(&self) -> Busy {
        self.0.requests.fetch_add(1, Ordering::AcqRel);
        Busy(self.0.clone())
    }
}

impl Connected<IncomingStream<'_, Connections>> for Connection {
    fn connect_info(stream: IncomingStream<'_, Connections>) -> Self {
        Self(stream.io().activity.clone())
    }
}

/// See [`Connection::busy`].
pub struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Idle::since_now();
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The time since which a connection waits for a request, and for the rest of its head once that has begun.
#[derive(Clone, Copy)]
struct Idle {
    since: Instant,
    has_begun: bool,
    /// Bytes that were read meanwhile.
    bytes: usize,
}

impl Idle {
    fn since_now() -> Self {
        Self { since: Instant::now(), has_begun: false, bytes: 0 }
    }
}

struct Activity {
    requests: AtomicUsize,
    idle_since: Mutex<Idle>,
}

/// A connection with limits of time.
pub struct TimedStream {
    stream: TcpStream,
    activity: Arc<Activity>,
    head_time: Duration,
    idle_time: Duration,
    reading: Pin<Box<Sleep>>,
    writing: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

impl TimedStream {
    fn new(
        stream: TcpStream,
        permit: OwnedSemaphorePermit,
        head_time: Duration,
        idle_time: Duration,
    ) -> Self {
        let activity = Activity { requests: AtomicUsize::new(0), idle_since: Mutex::new(Idle::since_now()) };
        Self {
            stream,
            activity: Arc::new(activity),
            head_time,
            idle_time,
            reading: Box::pin(sleep_until(Instant::now() + idle_time.min(head_time))),
            writing: None,
            _permit: permit,
        }
    }

    /// Ready when the head of a request is too late. Wakes the task when that may be.
    fn poll_late(&mut self, context: &mut Context) -> Poll<()> {
        loop {
            ready!(self.reading.as_mut().poll(context));
            let idle = *self.idle();
            let limit = if idle.has_begun { self.head_time } else { self.idle_time };
            let ends = if self.activity.requests.load(Ordering::Acquire) > 0 {
                Instant::now() + self.head_time.min(self.idle_time)
            } else {
                idle.since + limit
            };
            if ends <= Instant::now() {
                return Poll::Ready(());
            }
            // Looked at often enough that a head which begins late is noticed in its own time.
            self.reading.as_mut().reset(ends.min(Instant::now() + self.head_time));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.activity.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_read(&self, bytes: usize) {
        let mut idle = self.idle();
        if !idle.has_begun {
            *idle = Idle { since: Instant::now(), has_begun: true, bytes: 0 };
        }
        idle.bytes += bytes;
    }

    /// A client that takes its response is not idle, though its request is answered.
    fn note_write(&self) {
        let mut idle = self.idle();
        if !idle.has_begun {
            idle.since = Instant::now();
        }
    }

    /// True once a head has more bytes than it may: its request would be there otherwise.
    fn is_too_long(&self) -> bool {
        self.activity.requests.load(Ordering::Acquire) == 0 && self.idle().bytes >= LONGEST_HEAD
    }

    /// Passes the outcome of a write on, or an error once it has been pending for long.
    fn timed_write<T>(&mut self, context: &mut Context, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.writing = None;
            self.note_write();
            return outcome;
        }
        let ends = Instant::now() + self.idle_time;
        let writing = self.writing.get_or_insert_with(|| Box::pin(sleep_until(ends)));
        writing.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        if self.is_too_long() {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Ready(read) => {
                let bytes = buffer.filled().len() - before;
                if bytes > 0 {
                    self.note_read(bytes);
                    // A head that comes byte by byte is late all the same.
                    if self.poll_late(context).is_ready() {
                        return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                    }
                }
                Poll::Ready(read)
            }
            Poll::Pending => self.poll_late(context).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed_write(context, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        parts: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.timed_write(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
