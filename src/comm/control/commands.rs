//! Commands: bytes that rank 0 sends to all other ranks, which sleep until one arrives.
//!
//! The control thread moves them; no MPI call is made. A command is acknowledged when [`CommandReceiver::recv`]
//! returns it on the other rank. At most [`WINDOW`] commands are unacknowledged at a time: a slow rank holds
//! [`CommandSender::send`] back, not memory.

use super::{
    frame::{FrameError, MAX_COMMAND},
    link::Wakeup,
};
use crossbeam::channel::{Receiver, Sender};
use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Unacknowledged commands at a time.
pub const WINDOW: u64 = 8;

/// Failures of the command channel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("a command has {bytes} bytes, more than the {MAX_COMMAND} that one may have")]
    TooLong { bytes: usize },
    #[error("ranks {ranks:?} have no connection to the control port of rank 0: commands cannot reach them")]
    Unreachable { ranks: Vec<usize> },
    #[error("command {sequence} cannot reach rank {rank}, which has ended")]
    Left { sequence: u64, rank: usize },
    #[error("rank {rank} has not acknowledged command {sequence} within {seconds} s")]
    Late { sequence: u64, rank: usize, seconds: u64 },
    #[error("the command channel is closed")]
    Closed,
}

/// This rank's end of the command channel.
#[derive(Clone)]
pub enum Commands {
    /// Rank 0's end.
    Sender(CommandSender),
    /// The end of any other rank.
    Receiver(CommandReceiver),
}

/// A command, as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// 1 for the first command of a run, then 2, 3, ….
    pub sequence: u64,
    pub payload: Vec<u8>,
}

/// A command on its way to the other ranks.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub sequence: u64,
    pub payload: Vec<u8>,
}

/// Sends commands to all other ranks. With no other ranks, a command is acknowledged at once.
#[derive(Clone)]
pub struct CommandSender {
    progress: Arc<Progress>,
    /// The way to the control thread; `None` with no other ranks.
    thread: Option<(Sender<Arc<Outgoing>>, Wakeup)>,
}

impl CommandSender {
    pub(super) fn new(progress: Arc<Progress>, commands: Sender<Arc<Outgoing>>, wakeup: Wakeup) -> Self {
        Self { progress, thread: Some((commands, wakeup)) }
    }

    /// The sender of a world of one rank.
    pub(in crate::comm) fn solo() -> Self {
        Self { progress: Arc::new(Progress::new([])), thread: None }
    }

    /// Sends `payload` to all other ranks and returns before it has arrived. Blocks while [`WINDOW`] commands are
    /// unacknowledged.
    ///
    /// # Errors
    /// The payload is too long, another rank has ended, or the channel is closed.
    pub fn send(&self, payload: Vec<u8>) -> Result<Delivery, CommandError> {
        if payload.len() > MAX_COMMAND {
            return Err(CommandError::TooLong { bytes: payload.len() });
        }
        let mut state = self.progress.lock();
        let sequence = loop {
            let sequence = state.sent + 1;
            if state.closed {
                return Err(CommandError::Closed);
            }
            if let Some(rank) = state.first(|rank| rank.left) {
                return Err(CommandError::Left { sequence, rank });
            }
            if state.first(|rank| rank.acknowledged + WINDOW < sequence).is_none() {
                break sequence;
            }
            state = self.progress.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.sent = sequence;
        if let Some((commands, wakeup)) = &self.thread {
            // The lock is held: commands reach the control thread in the order of their sequence numbers.
            commands.send(Arc::new(Outgoing { sequence, payload })).map_err(|_| CommandError::Closed)?;
            wakeup.wake();
        }
        Ok(Delivery { sequence, progress: self.progress.clone() })
    }
}

/// A command that was sent.
pub struct Delivery {
    sequence: u64,
    progress: Arc<Progress>,
}

impl Delivery {
    /// Sequence number of the command.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Blocks until every other rank has acknowledged the command, for `timeout` at most.
    ///
    /// # Errors
    /// A rank has not acknowledged it in time, or has ended without it, or the channel is closed.
    pub fn wait(&self, timeout: Duration) -> Result<(), CommandError> {
        let (sequence, begin) = (self.sequence, Instant::now());
        let mut state = self.progress.lock();
        loop {
            if state.first(|rank| rank.acknowledged < sequence).is_none() {
                return Ok(());
            }
            if let Some(rank) = state.first(|rank| rank.acknowledged < sequence && rank.left) {
                return Err(CommandError::Left { sequence, rank });
            }
            if state.closed {
                return Err(CommandError::Closed);
            }
            let left = timeout.saturating_sub(begin.elapsed());
            let late = state.first(|rank| rank.acknowledged < sequence).filter(|_| left.is_zero());
            if let Some(rank) = late {
                return Err(CommandError::Late { sequence, rank, seconds: timeout.as_secs() });
            }
            state = self.progress.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Receives the commands of rank 0, in order. One thread of a rank receives them: clones share the commands between
/// them.
#[derive(Clone)]
pub struct CommandReceiver {
    commands: Receiver<Command>,
    acknowledged: Sender<u64>,
    wakeup: Wakeup,
}

impl CommandReceiver {
    pub(super) fn new(commands: Receiver<Command>, acknowledged: Sender<u64>, wakeup: Wakeup) -> Self {
        Self { commands, acknowledged, wakeup }
    }

    /// Sleeps until a command is here, and acknowledges it.
    ///
    /// # Errors
    /// The channel is closed: rank 0 has ended in good order, or this rank is about to.
    pub fn recv(&self) -> Result<Command, CommandError> {
        let command = self.commands.recv().map_err(|_| CommandError::Closed)?;
        // The control thread may have ended, and acknowledgements with it.
        if self.acknowledged.send(command.sequence).is_ok() {
            self.wakeup.wake();
        }
        Ok(command)
    }
}

/// Commands sent and acknowledged, as rank 0 knows it.
pub(super) struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Sequence number of the last command that was sent.
    sent: u64,
    /// The other ranks.
    ranks: BTreeMap<usize, Rank>,
    closed: bool,
}

#[derive(Default)]
struct Rank {
    /// Sequence number of the last command that it acknowledged.
    acknowledged: u64,
    /// It has ended in good order.
    left: bool,
}

impl State {
    /// The first rank for which `condition` holds.
    fn first(&self, condition: impl Fn(&Rank) -> bool) -> Option<usize> {
        self.ranks.iter().find(|(_, rank)| condition(rank)).map(|(&rank, _)| rank)
    }
}

impl Progress {
    /// No command sent so far to `ranks`.
    pub(super) fn new(ranks: impl IntoIterator<Item = usize>) -> Self {
        let ranks = ranks.into_iter().map(|rank| (rank, Rank::default())).collect();
        Self { state: Mutex::new(State { sent: 0, ranks, closed: false }), changed: Condvar::new() }
    }

    /// Records that `rank` has acknowledged command `sequence`.
    ///
    /// # Errors
    /// The command is not the next one of this rank.
    pub(super) fn acknowledge(&self, rank: usize, sequence: u64) -> Result<(), FrameError> {
        let mut state = self.lock();
        let sent = state.sent;
        let Some(of) = state.ranks.get_mut(&rank) else { return Ok(()) };
        let expected = of.acknowledged + 1;
        if sequence != expected || sequence > sent {
            return Err(FrameError::Acknowledgement { sequence, expected, sent });
        }
        of.acknowledged = sequence;
        self.changed.notify_all();
        Ok(())
    }

    /// Records that `rank` has ended in good order.
    pub(super) fn leave(&self, rank: usize) {
        if let Some(rank) = self.lock().ranks.get_mut(&rank) {
            rank.left = true;
        }
        self.changed.notify_all();
    }

    /// Closes the channel: senders stop waiting.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment: it is valid also after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(20);

    fn sender(ranks: &[usize]) -> (CommandSender, Receiver<Arc<Outgoing>>, Arc<Progress>) {
        let (commands, outgoing) = crossbeam::channel::unbounded();
        let progress = Arc::new(Progress::new(ranks.iter().copied()));
        (CommandSender::new(progress.clone(), commands, Wakeup::new().unwrap()), outgoing, progress)
    }

    #[test]
    fn a_world_of_one_rank_acknowledges_at_once() {
        let sender = CommandSender::solo();
        for sequence in 1..=3 * WINDOW {
            let delivery = sender.send(vec![1; 10]).unwrap();
            assert_eq!((delivery.sequence(), delivery.wait(Duration::ZERO)), (sequence, Ok(())));
        }
        let error = sender.send(vec![0; MAX_COMMAND + 1]).err();
        assert_eq!(error, Some(CommandError::TooLong { bytes: MAX_COMMAND + 1 }));
    }

    #[test]
    fn a_command_is_delivered_when_all_ranks_have_acknowledged_it() {
        let (sender, outgoing, progress) = sender(&[1, 2]);
        let delivery = sender.send(vec![7]).unwrap();
        assert_eq!(outgoing.recv().unwrap().payload, [7]);
        let late = |rank| Err(CommandError::Late { sequence: 1, rank, seconds: 0 });
        assert_eq!(delivery.wait(SHORT), late(1));
        progress.acknowledge(1, 1).unwrap();
        assert_eq!(delivery.wait(SHORT), late(2));
        progress.acknowledge(2, 1).unwrap();
        assert_eq!(delivery.wait(Duration::ZERO), Ok(()));
        let wrong = |sequence, expected| FrameError::Acknowledgement { sequence, expected, sent: 1 };
        assert_eq!(progress.acknowledge(1, 1), Err(wrong(1, 2)));
        assert_eq!(progress.acknowledge(1, 2), Err(wrong(2, 2)), "not sent so far");
    }

    #[test]
    fn a_full_window_holds_the_sender_back() {
        let (sender, outgoing, progress) = sender(&[1, 2]);
        (0..WINDOW).for_each(|_| drop(sender.send(Vec::new()).unwrap()));
        (1..=WINDOW).for_each(|sequence| progress.acknowledge(2, sequence).unwrap());
        let next = thread::spawn(move || sender.send(Vec::new()).map(|delivery| delivery.sequence()));
        thread::sleep(SHORT);
        assert_eq!((next.is_finished(), outgoing.len() as u64), (false, WINDOW));
        progress.acknowledge(1, 1).unwrap();
        assert_eq!(next.join().unwrap(), Ok(WINDOW + 1));
    }

    #[test]
    fn who_waits_hears_of_an_end() {
        let (sender, _outgoing, progress) = sender(&[1, 2]);
        let delivery = sender.send(Vec::new()).unwrap();
        let waiting = thread::spawn(move || delivery.wait(LONG));
        progress.acknowledge(1, 1).unwrap();
        progress.leave(1);
        thread::sleep(SHORT);
        assert!(!waiting.is_finished(), "rank 1 had acknowledged it before it left");
        progress.leave(2);
        assert_eq!(waiting.join().unwrap(), Err(CommandError::Left { sequence: 1, rank: 2 }));
        assert_eq!(sender.send(Vec::new()).err(), Some(CommandError::Left { sequence: 2, rank: 1 }));
        progress.close();
        assert_eq!(sender.send(Vec::new()).err(), Some(CommandError::Closed));
    }
}
