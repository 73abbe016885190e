//! The control thread of a rank. It moves messages and commands, and ends the process when a rank has died, is silent
//! or is late.
//!
//! It sleeps in poll(2) until a connection or a command is ready, for a tick at most. Ticks are for the watchdog.

use super::{
    Shared, Status,
    commands::{Command, Outgoing, Progress},
    frame::{Assembler, Frame, FrameError, read_message},
    judge::{Peer, PeerName, judge},
    link::{Link, LinkError, Wakeup, wait, wait_writable},
    secret::{Challenge, Proof},
};
use crossbeam::channel::{Receiver, Sender};
use serde::{Deserialize, Serialize};
use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

/// Time between two looks at all ranks.
const TICK: Duration = Duration::from_millis(100);
/// Time between two signs of life.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// A tick that comes later than this shows that the process was stopped: what it knows of other ranks is old.
const STOPPED: Duration = Duration::from_secs(1);
/// Time after that without verdicts: ranks that have ended meanwhile have said why.
const WAKING: Duration = Duration::from_secs(2);
/// Time for the goodbye, and the commands before it, to arrive.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Bytes that one read takes.
pub(super) const READ: usize = 1 << 16;

/// Messages of a rank to rank 0.
#[derive(Serialize, Deserialize)]
pub(super) enum ToRoot {
    /// The answer to rank 0's challenge: a proof that this rank knows the run's secret, and its own challenge.
    Hello {
        name: PeerName,
        challenge: Challenge,
        proof: Proof,
    },
    Alive(Status),
    /// The command of this sequence number was received.
    Acknowledge(u64),
    /// The rank ends, in good order or with an error of its own.
    Bye,
}

/// Messages of rank 0.
#[derive(Serialize, Deserialize)]
pub(super) enum FromRoot {
    /// The first message on a connection.
    Challenge(Challenge),
    /// The answer to a rank that has proven itself, with the proof that this is rank 0.
    Welcome(Proof),
    Alive,
    /// All ranks end, for this reason.
    End(String),
    Bye,
}

/// Why a control thread stops.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// The mesh is closed, on this rank or on rank 0.
    Closed,
    /// The process ends. `says`: this rank prints the line.
    End { line: String, says: bool },
}

/// Times of the ticks, and of the last time that the process was stopped.
struct Ticks {
    last: Instant,
    woke: Option<Instant>,
}

impl Ticks {
    fn new() -> Self {
        Self { last: Instant::now(), woke: None }
    }

    /// Time until the next tick.
    fn left(&self) -> Duration {
        TICK.saturating_sub(self.last.elapsed())
    }

    /// Begins the next tick; whether the process was stopped before it.
    fn next_was_late(&mut self) -> bool {
        let late = self.last.elapsed() > STOPPED;
        self.last = Instant::now();
        if late {
            self.woke = Some(self.last);
        }
        late
    }

    /// Whether what this tick has seen of other ranks is new: the process was stopped neither before it, for
    /// [`WAKING`], nor within it.
    fn is_on_time(&self) -> bool {
        self.last.elapsed() < STOPPED && self.woke.is_none_or(|woke| woke.elapsed() >= WAKING)
    }
}

/// Another rank, connected to rank 0.
pub(super) struct Connected {
    pub link: Link,
    pub peer: Peer,
    /// When something came from it last.
    pub heard: Instant,
    /// It has said that it ends.
    pub left: bool,
}

/// Rank 0's thread.
pub(super) struct Root {
    shared: Shared,
    name: PeerName,
    wakeup: Wakeup,
    commands: Receiver<Arc<Outgoing>>,
    progress: Arc<Progress>,
    peers: Vec<Connected>,
    ticks: Ticks,
    spoke: Instant,
    buffer: Vec<u8>,
}

impl Root {
    pub(super) fn new(
        shared: Shared,
        name: PeerName,
        wakeup: Wakeup,
        commands: Receiver<Arc<Outgoing>>,
        progress: Arc<Progress>,
        peers: Vec<Connected>,
    ) -> Self {
        let (ticks, spoke, buffer) = (Ticks::new(), Instant::now(), vec![0; READ]);
        Self { shared, name, wakeup, commands, progress, peers, ticks, spoke, buffer }
    }

    pub(super) fn run(mut self) {
        let shared = self.shared.clone();
        if let Stop::End { line, says } = self.until_stopped() {
            end(&shared, 0, &line, says);
        }
    }

    fn until_stopped(&mut self) -> Stop {
        loop {
            self.transfer(self.ticks.left());
            if self.shared.lock().closing {
                self.say_goodbye();
                return Stop::Closed;
            }
            if self.ticks.left().is_zero()
                && let ControlFlow::Break(stop) = self.tick()
            {
                return stop;
            }
        }
    }

    /// Moves bytes, after `timeout` at the latest.
    fn transfer(&mut self, timeout: Duration) {
        wait(&self.wakeup, self.peers.iter().map(|peer| &peer.link), timeout);
        self.wakeup.clear();
        self.queue_commands();
        let Self { progress, peers, buffer, .. } = self;
        for Connected { link, peer, heard, left } in peers {
            link.write();
            link.read(buffer, |frame| {
                *heard = Instant::now();
                let Frame::Message(json) = frame else { return Err(FrameError::Direction) };
                match read_message(json)? {
                    ToRoot::Alive(status) => peer.status = status,
                    ToRoot::Acknowledge(sequence) => progress.acknowledge(peer.name.rank, sequence)?,
                    ToRoot::Bye => {
                        *left = true;
                        progress.leave(peer.name.rank);
                    }
                    ToRoot::Hello { .. } => {}
                }
                Ok(())
            });
        }
    }

    /// Judges all ranks and gives a sign of life.
    fn tick(&mut self) -> ControlFlow<Stop> {
        if self.ticks.next_was_late() {
            self.peers.iter_mut().for_each(|peer| peer.heard = Instant::now());
        }
        let timeout = self.shared.lock().timeout;
        let verdict = judge(&self.seen(), timeout);
        if let Some(line) = verdict.filter(|_| self.ticks.is_on_time()) {
            self.tell(|link| link.say(&FromRoot::End(line.clone())));
            write_all(self.peers.iter_mut().map(|peer| &mut peer.link).collect(), TICK);
            return ControlFlow::Break(Stop::End { line, says: true });
        }
        if self.spoke.elapsed() > HEARTBEAT {
            self.spoke = Instant::now();
            self.tell(|link| link.say_alive(&FromRoot::Alive));
        }
        ControlFlow::Continue(())
    }

    /// All watched ranks, this one too.
    fn seen(&self) -> Vec<Peer> {
        let status = self.shared.status();
        let own = Peer { name: self.name.clone(), silent: Duration::ZERO, lost: None, status };
        let others = self.peers.iter().filter(|other| !other.left).map(|other| Peer {
            silent: other.heard.elapsed(),
            lost: other.link.ended().cloned(),
            ..other.peer.clone()
        });
        std::iter::once(own).chain(others).collect()
    }

    fn queue_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.tell(|link| link.send(command.clone()));
        }
    }

    fn tell(&mut self, say: impl Fn(&mut Link)) {
        self.peers.iter_mut().filter(|peer| !peer.left).for_each(|peer| say(&mut peer.link));
    }

    /// Sends the commands that are left and the goodbye, and waits until the other ranks have closed their
    /// connections: a socket that is closed with unread input drops its output.
    fn say_goodbye(&mut self) {
        let begin = Instant::now();
        self.queue_commands();
        self.tell(|link| link.say_last(&FromRoot::Bye));
        while self.peers.iter().any(|peer| peer.link.ended().is_none())
            && let Some(left) = LAST_WORDS.checked_sub(begin.elapsed())
        {
            self.transfer(left);
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.progress.close();
    }
}

/// The thread of any other rank.
pub(super) struct Follower {
    shared: Shared,
    rank: usize,
    root: PeerName,
    wakeup: Wakeup,
    link: Link,
    commands: Sender<Command>,
    acknowledgements: Receiver<u64>,
    assembler: Assembler,
    ticks: Ticks,
    heard: Instant,
    spoke: Option<Instant>,
    buffer: Vec<u8>,
}

impl Follower {
    pub(super) fn new(
        shared: Shared,
        rank: usize,
        root: PeerName,
        wakeup: Wakeup,
        link: Link,
        commands: Sender<Command>,
        acknowledgements: Receiver<u64>,
    ) -> Self {
        let (assembler, ticks, buffer) = (Assembler::default(), Ticks::new(), vec![0; READ]);
        let (heard, spoke) = (Instant::now(), None);
        Self {
            shared,
            rank,
            root,
            wakeup,
            link,
            commands,
            acknowledgements,
            assembler,
            ticks,
            heard,
            spoke,
            buffer,
        }
    }

    pub(super) fn run(mut self) {
        if let Stop::End { line, says } = self.until_stopped() {
            end(&self.shared, self.rank, &line, says);
        }
    }

    fn until_stopped(&mut self) -> Stop {
        loop {
            if let Some(stop) = self.transfer(self.ticks.left()) {
                return stop;
            }
            if self.shared.lock().closing {
                self.queue_acknowledgements();
                self.link.say_last(&ToRoot::Bye);
                write_all(vec![&mut self.link], LAST_WORDS);
                return Stop::Closed;
            }
            if self.ticks.left().is_zero()
                && let ControlFlow::Break(stop) = self.tick()
            {
                return stop;
            }
        }
    }

    /// Moves bytes, after `timeout` at the latest. Returns what rank 0 has decided, if it has.
    fn transfer(&mut self, timeout: Duration) -> Option<Stop> {
        wait(&self.wakeup, std::iter::once(&self.link), timeout);
        self.wakeup.clear();
        self.queue_acknowledgements();
        let Self { link, commands, assembler, heard, buffer, .. } = self;
        link.write();
        let mut stop = None;
        link.read(buffer, |frame| {
            *heard = Instant::now();
            match frame {
                Frame::Part(part) => {
                    if let Some(command) = assembler.add(&part)? {
                        // Without a receiver the command is dropped.
                        let _ = commands.send(command);
                    }
                }
                Frame::Message(json) => match read_message(json)? {
                    FromRoot::End(line) => stop = Some(Stop::End { line, says: false }),
                    FromRoot::Bye => stop = stop.take().or(Some(Stop::Closed)),
                    FromRoot::Challenge(_) | FromRoot::Welcome(_) | FromRoot::Alive => {}
                },
            }
            Ok(())
        });
        stop
    }

    fn queue_acknowledgements(&mut self) {
        self.acknowledgements.try_iter().for_each(|sequence| self.link.say(&ToRoot::Acknowledge(sequence)));
    }

    /// Judges rank 0 and gives a sign of life.
    fn tick(&mut self) -> ControlFlow<Stop> {
        if self.ticks.next_was_late() {
            self.heard = Instant::now();
        }
        let (timeout, silent) = (self.shared.lock().timeout, self.heard.elapsed());
        let root = &self.root;
        let verdict = match self.link.ended() {
            Some(cause) => Some(LinkError { peer: root.clone(), cause: cause.clone() }.to_string()),
            None if silent > timeout => {
                Some(format!("no sign of life from {root} for {} s", silent.as_secs()))
            }
            None => None,
        };
        if let Some(line) = verdict.filter(|_| self.ticks.is_on_time()) {
            // All followers see it at the same time: one of them prints it.
            return ControlFlow::Break(Stop::End { line, says: self.rank == 1 });
        }
        if self.spoke.is_none_or(|spoke| spoke.elapsed() > HEARTBEAT) {
            self.spoke = Some(Instant::now());
            self.link.say_alive(&ToRoot::Alive(self.shared.status()));
        }
        ControlFlow::Continue(())
    }
}

/// Writes all that is queued on `links`, for `limit` at most.
fn write_all(mut links: Vec<&mut Link>, limit: Duration) {
    let begin = Instant::now();
    loop {
        links.iter_mut().for_each(|link| link.write());
        links.retain(|link| link.has_output());
        let left = limit.saturating_sub(begin.elapsed());
        if links.is_empty() || left.is_zero() {
            return;
        }
        wait_writable(links.iter().map(|link| &**link), left);
    }
}

/// Ends this process: prints the reason if it `says` it, tells who has asked to know, and writes the flight record.
fn end(shared: &Shared, rank: usize, line: &str, says: bool) -> ! {
    if says {
        crate::console::say(&format!("error: {line}"));
    }
    let on_end = shared.lock().on_end.take();
    let is_told = on_end.map(|act| act()).is_some();
    shared.write_flight(rank, line);
    shared.abort();
    // The launcher kills all ranks when the first has ended: those that print or write need time before it.
    std::thread::sleep(Duration::from_millis(if says && !is_told { 300 } else { 1000 }));
    // SAFETY: _exit takes any status and returns never. It runs no exit handlers: MPI's may wait for the rank that
    // hangs.
    unsafe { libc::_exit(1) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            commands::{CommandError, CommandReceiver, CommandSender},
            frame::{MAX_COMMAND, PART},
        },
        *,
    };
    use crossbeam::channel::unbounded;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        thread,
    };

    const LONG: Duration = Duration::from_secs(20);
    const LARGE: usize = 4 << 20;

    fn name(rank: usize) -> PeerName {
        PeerName { rank, process: 100 + rank as u32, host: "node7".into() }
    }

    /// Both ends of a TCP connection.
    fn pair() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [listener.accept().unwrap().0, far]
    }

    /// Rank 0 of `streams.len() + 1` ranks, at the near ends of `streams`.
    fn root(streams: Vec<TcpStream>) -> (Root, CommandSender) {
        let (commands, outgoing) = unbounded();
        let (wakeup, progress) = (Wakeup::new().unwrap(), Arc::new(Progress::new(1..=streams.len())));
        let sender = CommandSender::new(progress.clone(), commands, wakeup.clone());
        let peers = streams.into_iter().enumerate().map(|(i, stream)| {
            let status = Status::default();
            let peer = Peer { name: name(i + 1), silent: Duration::ZERO, lost: None, status };
            Connected { link: Link::new(stream).unwrap(), peer, heard: Instant::now(), left: false }
        });
        (Root::new(Shared::new(), name(0), wakeup, outgoing, progress, peers.collect()), sender)
    }

    fn follower(rank: usize, stream: TcpStream) -> (Follower, CommandReceiver) {
        let (commands, received) = unbounded();
        let (acknowledged, acknowledgements) = unbounded();
        let wakeup = Wakeup::new().unwrap();
        let receiver = CommandReceiver::new(received, acknowledged, wakeup.clone());
        let link = Link::new(stream).unwrap();
        let (shared, root) = (Shared::new(), name(0));
        (Follower::new(shared, rank, root, wakeup, link, commands, acknowledgements), receiver)
    }

    /// Runs a thread until it stops.
    fn spawn(until_stopped: impl FnOnce() -> Stop + Send + 'static) -> thread::JoinHandle<Stop> {
        thread::spawn(until_stopped)
    }

    fn closing(shared: &Shared) {
        shared.lock().closing = true;
    }

    #[test]
    fn a_rank_that_was_stopped_blames_no_other() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let is_on_time =
            |last, woke: Option<u64>| Ticks { last: ago(last), woke: woke.map(ago) }.is_on_time();
        assert!(is_on_time(0, None) && is_on_time(0, Some(3)));
        assert!(!is_on_time(0, Some(1)), "stopped before the tick");
        assert!(!is_on_time(2, None), "stopped within the tick");
    }

    #[test]
    fn commands_reach_all_ranks_in_order_before_the_end() {
        let [(near_1, far_1), (near_2, far_2)] = [pair().into(), pair().into()];
        let (mut root, sender) = root(vec![near_1, near_2]);
        let shared = root.shared.clone();
        let payload = |i: usize| vec![i as u8; [0, 1, PART, PART + 1, LARGE][i % 5]];
        let receive = |(mut follower, receiver): (Follower, CommandReceiver)| {
            let thread = spawn(move || follower.until_stopped());
            let receiving = thread::spawn(move || {
                let all: Vec<Command> = std::iter::from_fn(|| receiver.recv().ok()).collect();
                (all.len(), all.iter().enumerate().all(|(i, command)| command.payload == payload(i)))
            });
            (thread, receiving)
        };
        let others = [follower(1, far_1), follower(2, far_2)].map(receive);
        let thread = spawn(move || root.until_stopped());
        for i in 0..20 {
            sender.send(payload(i)).unwrap();
        }
        // Not waited for: the last commands are still on their way.
        closing(&shared);
        assert_eq!(thread.join().unwrap(), Stop::Closed);
        for (thread, receiving) in others {
            assert_eq!((thread.join().unwrap(), receiving.join().unwrap()), (Stop::Closed, (20, true)));
        }
        assert_eq!(sender.send(Vec::new()).err(), Some(CommandError::Closed));
    }

    #[test]
    fn a_rank_that_leaves_is_named_to_the_sender() {
        let [near, far] = pair();
        let (mut root, sender) = root(vec![near]);
        let (mut follower, receiver) = follower(1, far);
        let (shared, others) = (root.shared.clone(), follower.shared.clone());
        let thread = spawn(move || root.until_stopped());
        let other = spawn(move || follower.until_stopped());
        let delivery = sender.send(vec![1]).unwrap();
        assert_eq!(receiver.recv().unwrap().payload, [1]);
        delivery.wait(LONG).unwrap();
        closing(&others);
        assert_eq!(other.join().unwrap(), Stop::Closed);
        let delivery = sender.send(vec![2; LARGE]);
        let error = delivery.and_then(|delivery| delivery.wait(LONG)).unwrap_err();
        assert_eq!(error, CommandError::Left { sequence: 2, rank: 1 });
        closing(&shared);
        assert_eq!(thread.join().unwrap(), Stop::Closed);
    }

    #[test]
    fn a_rank_that_dies_in_a_large_command_ends_all_with_its_name() {
        let [(near_1, far_1), (near_2, mut far_2)]: [(TcpStream, TcpStream); 2] =
            [pair().into(), pair().into()];
        let (mut root, sender) = root(vec![near_1, near_2]);
        let (mut follower, receiver) = follower(1, far_1);
        let thread = spawn(move || root.until_stopped());
        let other = spawn(move || follower.until_stopped());
        // Larger than what a socket buffers: the command is still being written when rank 2 dies.
        sender.send(vec![3; MAX_COMMAND / 4]).unwrap();
        far_2.read_exact(&mut vec![0; 3 * PART / 2]).unwrap();
        drop(far_2);
        let Stop::End { line, says } = thread.join().unwrap() else { panic!("a death is no good end") };
        assert!(says && line.starts_with("rank 2 (process 102 on node7) has died; it has entered"), "{line}");
        assert_eq!(other.join().unwrap(), Stop::End { line, says: false });
        drop(receiver);
    }

    #[test]
    fn broken_frames_end_all_with_the_name_of_their_rank() {
        let torn = [&b"XC\x01\x01"[..], &100u32.to_le_bytes()[..], b"{"].concat();
        let long = [&b"XC\x01\x01"[..], &u32::MAX.to_le_bytes()[..]].concat();
        let command = [&b"XC\x01\x02"[..], &24u32.to_le_bytes()[..], &[0; 24]].concat();
        let acknowledgement = super::super::frame::message(&ToRoot::Acknowledge(1)).unwrap();
        for (bytes, expected) in [
            (&torn, "has died; "),
            (&long, "sent a control frame of 4294967295 bytes, more than 1048576; "),
            (&command, "sent a command, which only rank 0 sends; "),
            (&acknowledgement, "sent an acknowledgement of command 1, expected 1 of 0 sent; "),
        ] {
            let [near, mut far] = pair();
            let mut root = root(vec![near]).0;
            far.write_all(bytes).unwrap();
            drop(far);
            let Stop::End { line, .. } = root.until_stopped() else { panic!("{expected}") };
            let expected = format!("rank 1 (process 101 on node7) {expected}");
            assert!(line.starts_with(&expected), "{line}");
        }
        let [mut near, far] = pair();
        near.write_all(b"HTTP/1.1 400 Bad Request").unwrap();
        let line = "rank 0 (process 100 on node7) sent bytes that are no control frame ([48, 54])".to_owned();
        assert_eq!(follower(1, far).0.until_stopped(), Stop::End { line, says: true });
    }

    /// The far end reads a command slowly; signs of life still come, and the other way too.
    #[test]
    fn signs_of_life_pass_a_command_that_is_being_written() {
        let [near, mut far] = pair();
        let (mut root, sender) = root(vec![near]);
        let shared = root.shared.clone();
        let thread = spawn(move || root.until_stopped());
        sender.send(vec![5; MAX_COMMAND / 4]).unwrap();
        let mut decoder = super::super::frame::Decoder::default();
        let (begin, mut alive, mut bytes, mut buffer) = (Instant::now(), 0, 0, vec![0; PART]);
        while begin.elapsed() < 4 * HEARTBEAT {
            let n = far.read(&mut buffer).unwrap();
            decoder.push(&buffer[..n]);
            while let Some(frame) = decoder.next().unwrap() {
                match frame {
                    Frame::Message(_) => alive += 1,
                    Frame::Part(part) => bytes += part.piece.len(),
                }
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert!(bytes < MAX_COMMAND / 4, "the command is not written: {bytes}");
        assert!(alive >= 1, "a sign of life came between its parts, after {bytes} bytes");
        closing(&shared);
        drop(far);
        assert!(matches!(thread.join().unwrap(), Stop::Closed | Stop::End { .. }));
    }
}
