//! One end of a control connection: a non-blocking TCP stream with its unfinished input and output, and the poll(2)
//! that a control thread sleeps in.

use super::{
    commands::Outgoing,
    frame::{Decoder, Frame, FrameError, PART, message, part_head},
    judge::PeerName,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
};
use serde::Serialize;
use std::{
    collections::VecDeque,
    io::{self, ErrorKind, IoSlice, Read, Write},
    net::TcpStream,
    ops::Range,
    sync::Arc,
    time::Duration,
};

/// Most bytes that a link reads or writes before the other links have their turn.
const TURN: usize = 1 << 18;

/// Largest payload of a frame before a handshake (bytes).
const OF_STRANGERS: usize = 1 << 12;

/// Why a connection has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum EndCause {
    #[error("has died")]
    Closed,
    /// The process died while it was writing.
    #[error("has died")]
    Torn(FrameError),
    #[error("sent {0}")]
    Broken(FrameError),
}

/// The end of a connection that was not announced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{peer} {cause}")]
pub(super) struct LinkError {
    pub peer: PeerName,
    pub cause: EndCause,
}

/// Wakes a control thread that sleeps in [`wait`].
#[derive(Clone, Debug)]
pub(super) struct Wakeup(Arc<OwnedFd>);

impl Wakeup {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(super) fn wake(&self) {
        // It fails only where the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Ends the readiness that [`wake`](Self::wake) began. Called before the thread looks for work.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until `other` or one of `links` is readable, a link with output is writable, or `timeout` is over.
pub(super) fn wait<'a>(other: impl AsFd, links: impl Iterator<Item = &'a Link>, timeout: Duration) {
    let mut all = vec![PollFd::from_borrowed_fd(other.as_fd(), PollFlags::IN)];
    all.extend(links.filter_map(|link| {
        let output = if link.has_output() { PollFlags::OUT } else { PollFlags::empty() };
        link.polled(PollFlags::IN | output)
    }));
    poll_all(&mut all, timeout);
}

/// Sleeps until one of `links` is writable, or `timeout` is over.
pub(super) fn wait_writable<'a>(links: impl Iterator<Item = &'a Link>, timeout: Duration) {
    poll_all(&mut links.filter_map(|link| link.polled(PollFlags::OUT)).collect::<Vec<_>>(), timeout);
}

fn poll_all(all: &mut [PollFd<'_>], timeout: Duration) {
    // After an error, as by a signal, the thread finds nothing ready and comes back.
    let _ = poll(all, Timespec::try_from(timeout).ok().as_ref());
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    decoder: Decoder,
    outbox: Outbox,
    /// Why nothing more is read.
    ended: Option<EndCause>,
}

impl Link {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, decoder: Decoder::default(), outbox: Outbox::default(), ended: None })
    }

    /// A link to a process that has not proven yet that it is of this run: it may send small frames alone.
    pub(super) fn to_stranger(stream: TcpStream) -> io::Result<Self> {
        Ok(Self { decoder: Decoder::of_at_most(OF_STRANGERS), ..Self::new(stream)? })
    }

    /// Takes all frames from now on: the process is of this run.
    pub(super) fn trust(&mut self) {
        self.decoder.take_all();
    }

    /// Descriptor and events for poll(2): none once the connection has ended.
    fn polled(&self, events: PollFlags) -> Option<PollFd<'_>> {
        self.ended.is_none().then(|| PollFd::from_borrowed_fd(self.stream.as_fd(), events))
    }

    /// Why nothing more comes, if so.
    pub(super) fn ended(&self) -> Option<&EndCause> {
        self.ended.as_ref()
    }

    /// Reads what has arrived, without blocking, and calls `take` for each frame.
    pub(super) fn read(
        &mut self,
        buffer: &mut [u8],
        mut take: impl FnMut(Frame<'_>) -> Result<(), FrameError>,
    ) {
        let mut taken = 0;
        while self.ended.is_none() && taken < TURN {
            match self.stream.read(buffer) {
                Ok(0) => {
                    self.ended = Some(self.decoder.end().map_or_else(EndCause::Torn, |()| EndCause::Closed));
                }
                Ok(n) => {
                    taken += n;
                    self.decoder.push(&buffer[..n]);
                    if let Err(error) = self.take_frames(&mut take) {
                        self.ended = Some(EndCause::Broken(error));
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = Some(EndCause::Closed),
            }
        }
    }

    fn take_frames(
        &mut self,
        mut take: impl FnMut(Frame<'_>) -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        while let Some(frame) = self.decoder.next()? {
            take(frame)?;
        }
        Ok(())
    }

    /// Queues `text`. It comes before commands of which nothing is written, and between the parts of one that is
    /// being written.
    pub(super) fn say(&mut self, text: &impl Serialize) {
        // Messages are a few kilobytes of plain data: they can be written and are not too long.
        self.outbox.messages.extend(message(text).ok());
    }

    /// Queues a sign of life, unless a message waits already: a peer that does not read takes no more memory with time.
    pub(super) fn say_alive(&mut self, text: &impl Serialize) {
        if self.outbox.messages.is_empty() {
            self.say(text);
        }
    }

    /// Queues `text` as the last frame, after all commands.
    pub(super) fn say_last(&mut self, text: &impl Serialize) {
        self.outbox.last = message(text).ok();
    }

    /// Queues a command.
    pub(super) fn send(&mut self, command: Arc<Outgoing>) {
        self.outbox.commands.push_back((command, 0));
    }

    /// Returns true if anything waits to be written.
    pub(super) fn has_output(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Writes what is queued, as far as the connection takes it without blocking.
    pub(super) fn write(&mut self) {
        if self.ended.is_some() || self.outbox.write(&mut self.stream, TURN).is_err() {
            // The other end is gone. It is noticed where its last words are read.
            self.outbox = Outbox::default();
        }
    }
}

/// Frames that wait to be written.
#[derive(Debug, Default)]
struct Outbox {
    messages: VecDeque<Vec<u8>>,
    /// Commands and how many bytes of each are in frames so far.
    commands: VecDeque<(Arc<Outgoing>, usize)>,
    last: Option<Vec<u8>>,
    writing: Option<Writing>,
}

/// The frame that is being written: all of it for a message, head and piece for a part.
#[derive(Debug)]
struct Writing {
    head: Vec<u8>,
    piece: Option<(Arc<Outgoing>, Range<usize>)>,
    written: usize,
}

impl Writing {
    /// The bytes that are not written, of the head and of the piece.
    fn rest(&self) -> [&[u8]; 2] {
        let piece = self.piece.as_ref().map_or(&[][..], |(command, range)| &command.payload[range.clone()]);
        let of_head = self.written.min(self.head.len());
        [&self.head[of_head..], &piece[self.written - of_head..]]
    }
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.writing.is_none() && self.messages.is_empty() && self.commands.is_empty() && self.last.is_none()
    }

    /// The frame to write next: messages, then parts of commands, then the last message.
    fn next_frame(&mut self) -> Option<Writing> {
        if let Some(head) = self.messages.pop_front() {
            return Some(Writing { head, piece: None, written: 0 });
        }
        let Some((command, in_frames)) = self.commands.front_mut() else {
            return self.last.take().map(|head| Writing { head, piece: None, written: 0 });
        };
        let range = *in_frames..command.payload.len().min(*in_frames + PART);
        *in_frames = range.end;
        let head = part_head(command, range.start, range.len());
        let command = command.clone();
        if range.end == command.payload.len() {
            self.commands.pop_front();
        }
        Some(Writing { head, piece: Some((command, range)), written: 0 })
    }

    /// Writes frames to `stream` until it blocks, all are written, or `most` bytes are.
    fn write(&mut self, stream: &mut impl Write, most: usize) -> io::Result<()> {
        let mut total = 0;
        while total < most {
            if self.writing.is_none() {
                self.writing = self.next_frame();
            }
            let Some(frame) = &mut self.writing else { return Ok(()) };
            match stream.write_vectored(&frame.rest().map(IoSlice::new)) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    (frame.written, total) = (frame.written + n, total + n);
                    if frame.rest().iter().all(|rest| rest.is_empty()) {
                        self.writing = None;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::frame::Assembler, *};

    /// A stream that takes `room` bytes, at most `step` at a time, and then blocks.
    struct Narrow {
        room: usize,
        step: usize,
        taken: Vec<u8>,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.room).min(self.step);
            if n == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.room -= n;
            self.taken.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Values that were read, each with the number of bytes before it, to within 100.
    type Found<T> = Vec<(usize, T)>;

    /// Messages and commands in `bytes`.
    fn read(bytes: &[u8]) -> (Found<String>, Found<Vec<u8>>) {
        let (mut decoder, mut assembler) = (Decoder::default(), Assembler::default());
        let (mut messages, mut commands) = (Vec::new(), Vec::new());
        for (i, chunk) in bytes.chunks(100).enumerate() {
            decoder.push(chunk);
            while let Some(frame) = decoder.next().unwrap() {
                match frame {
                    Frame::Message(json) => messages.push((100 * i, serde_json::from_slice(json).unwrap())),
                    Frame::Part(part) => commands
                        .extend(assembler.add(&part).unwrap().map(|command| (100 * i, command.payload))),
                }
            }
        }
        decoder.end().unwrap();
        (messages, commands)
    }

    #[test]
    fn a_message_waits_for_one_part_of_a_command_at_most() {
        let (first, second) = (vec![1; 30 * PART + 5], vec![2; 3]);
        let mut outbox = Outbox::default();
        for (sequence, payload) in [(1, first.clone()), (2, second.clone())] {
            outbox.commands.push_back((Arc::new(Outgoing { sequence, payload }), 0));
        }
        outbox.last = message(&"bye").ok();
        let mut stream = Narrow { room: 2 * PART + 1000, step: 7777, taken: Vec::new() };
        outbox.write(&mut stream, usize::MAX).unwrap();
        assert_eq!(stream.taken.len(), 2 * PART + 1000, "as much as it takes");
        outbox.messages.extend(message(&"alive").ok());
        stream.room = usize::MAX;
        outbox.write(&mut stream, 10).unwrap();
        assert!(stream.taken.len() < 3 * PART, "a turn is limited");
        outbox.write(&mut stream, usize::MAX).unwrap();
        assert!(outbox.is_empty());
        let (messages, commands) = read(&stream.taken);
        let [(alive, ref text), (last, ref bye)] = messages[..] else { panic!("{messages:?}") };
        assert_eq!((text.as_str(), bye.as_str()), ("alive", "bye"));
        assert!(alive < 3 * PART + 1000, "after {alive} bytes, before the rest of the command");
        assert!(commands[0].1 == first && commands[1].1 == second);
        assert!(last >= commands[1].0, "the last message comes after all commands");
    }

    #[test]
    fn an_empty_command_is_a_frame() {
        let mut outbox = Outbox::default();
        outbox.commands.push_back((Arc::new(Outgoing { sequence: 1, payload: Vec::new() }), 0));
        let mut stream = Narrow { room: usize::MAX, step: 3, taken: Vec::new() };
        outbox.write(&mut stream, usize::MAX).unwrap();
        assert_eq!(read(&stream.taken).1, [(0, Vec::new())]);
    }

    #[test]
    fn a_wakeup_ends_a_wait_and_is_not_lost() {
        let wakeup = Wakeup::new().unwrap();
        let timed = |timeout| {
            let begin = std::time::Instant::now();
            wait(&wakeup, std::iter::empty(), timeout);
            begin.elapsed()
        };
        let (short, long) = (Duration::from_millis(30), Duration::from_secs(60));
        assert!(timed(short) >= short);
        wakeup.wake();
        assert!(timed(long) < long);
        assert!(timed(long) < long, "until it is cleared");
        wakeup.clear();
        assert!(timed(short) >= short);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(short);
                wakeup.wake();
            });
            assert!(timed(long) < long);
        });
    }
}
