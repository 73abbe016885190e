//! The connections of the mesh: every rank keeps one to rank 0, and both ends say a line of JSON now and then.

use super::{
    super::{CommError, Communicator},
    Shared, Status,
    judge::{Peer, judge},
};
use serde::{Deserialize, Serialize};
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Between two looks at everything.
const TICK: Duration = Duration::from_millis(100);
/// Between two signs of life.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// For one address of rank 0, and for all ranks to have come.
const CONNECT: Duration = Duration::from_secs(3);
const GATHER: Duration = Duration::from_secs(20);
/// A tick that takes so long was no tick: the process was stopped, and what it knows of others is old.
const STOPPED: Duration = Duration::from_secs(1);
/// After that it only listens for a while: if the others have ended meanwhile, they have said why.
const WAKING: Duration = Duration::from_secs(2);
/// Longer lines are not ours.
const LONGEST: usize = 1 << 20;

/// Where rank 0 can be reached, and by what it knows its own.
#[derive(Serialize, Deserialize)]
struct Invitation {
    addresses: Vec<IpAddr>,
    port: u16,
    token: String,
    host: String,
    process: u32,
}

/// What a rank says to rank 0.
#[derive(Serialize, Deserialize)]
enum ToFirst {
    Hello {
        token: String,
        rank: usize,
        host: String,
        process: u32,
    },
    Alive(Status),
    /// It ends, and nobody has to look for it.
    Bye,
}

/// What rank 0 says.
#[derive(Serialize, Deserialize)]
enum FromFirst {
    Welcome,
    Alive,
    /// All ranks end, for this reason.
    End(String),
    Bye,
}

/// What became of the mesh on this rank.
#[derive(Default)]
pub(super) struct Opened {
    /// None where the rank stays unwatched.
    pub thread: Option<JoinHandle<()>>,
    /// What rank 0 has to tell the user.
    pub warning: Option<String>,
}

/// Connects the ranks and starts this rank's thread. Collective.
pub(super) fn open(world: &dyn Communicator, shared: &Shared) -> Result<Opened, CommError> {
    let rank = world.rank();
    let listener = if rank == 0 { listen().ok() } else { None };
    let invitation =
        listener.as_ref().map(|(_, invitation)| serde_json::to_vec(invitation).unwrap_or_default());
    let all = world.all_gather_host(&invitation.unwrap_or_default())?;
    let invitation: Option<Invitation> = all.first().and_then(|bytes| serde_json::from_slice(bytes).ok());
    let shared = shared.clone();
    let Some(invitation) = invitation else {
        let warning = "no port for the control mesh: ranks that hang will not be noticed";
        return Ok(Opened { thread: None, warning: (rank == 0).then(|| warning.to_owned()) });
    };
    if let Some((listener, invitation)) = listener {
        // Others connect while this rank already waits for them, so that nobody waits for the end of the gather below.
        let (size, token) = (world.size(), invitation.token);
        let gathering = std::thread::spawn(move || gather(&listener, size, &token));
        world.all_gather_host(&[])?;
        let lines = gathering.join().unwrap_or_default();
        let absent = size - 1 - lines.len();
        let warning = (absent > 0).then(|| {
            format!(
                "{absent} ranks cannot reach the control port of rank 0: if they hang, it will not be noticed"
            )
        });
        let first = First { shared, peers: lines, spoke: Instant::now() };
        return Ok(Opened { thread: spawn(move || first.run()), warning });
    }
    let line = join(&invitation, rank);
    world.all_gather_host(&[])?;
    let thread =
        line.and_then(|line| spawn(move || Follower { rank, first: invitation, line, shared }.run()));
    Ok(Opened { thread, warning: None })
}

fn spawn(run: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    std::thread::Builder::new().name("watchdog".into()).spawn(run).ok()
}

fn listen() -> std::io::Result<(TcpListener, Invitation)> {
    // On Linux the one port of both kinds of addresses.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    listener.set_nonblocking(true)?;
    let mut token = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    let mut addresses: Vec<IpAddr> = if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect();
    // Of another host's loopback somebody else answers: last.
    addresses.sort_by_key(IpAddr::is_loopback);
    let invitation = Invitation {
        addresses,
        port: listener.local_addr()?.port(),
        token: token.iter().map(|byte| format!("{byte:02x}")).collect(),
        host: host(),
        process: std::process::id(),
    };
    Ok((listener, invitation))
}

/// This machine's name.
pub(in crate::comm) fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Rank 0 takes in the others, until all have come or it has been long enough.
fn gather(listener: &TcpListener, ranks: usize, token: &str) -> Vec<Heard> {
    let begin = Instant::now();
    let (mut strangers, mut heard): (Vec<Line>, Vec<Heard>) = (Vec::new(), Vec::new());
    while heard.len() + 1 < ranks && begin.elapsed() < GATHER {
        strangers.extend(listener.accept().ok().and_then(|(stream, _)| Line::new(stream)));
        for mut line in std::mem::take(&mut strangers) {
            match line.hear::<ToFirst>().first() {
                Some(ToFirst::Hello { token: theirs, rank, host, process }) if theirs == token => {
                    line.say(&FromFirst::Welcome);
                    let peer = Peer {
                        rank: *rank,
                        host: host.clone(),
                        process: *process,
                        silent: Duration::ZERO,
                        lost: false,
                        status: Status::default(),
                    };
                    heard.push(Heard { line, peer, at: Instant::now(), left: false });
                }
                None if !line.ended => strangers.push(line),
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    heard.sort_by_key(|heard| heard.peer.rank);
    heard
}

/// A connection to rank 0, if it can be had.
fn join(invitation: &Invitation, rank: usize) -> Option<Line> {
    let hello =
        ToFirst::Hello { token: invitation.token.clone(), rank, host: host(), process: std::process::id() };
    invitation.addresses.iter().find_map(|address| {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(*address, invitation.port), CONNECT).ok()?;
        let mut line = Line::new(stream)?;
        line.say(&hello);
        let begin = Instant::now();
        while begin.elapsed() < CONNECT && !line.ended {
            if matches!(line.hear().first(), Some(FromFirst::Welcome)) {
                return Some(line);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // It may have been taken in all the same.
        line.say(&ToFirst::Bye);
        None
    })
}

/// One end of a connection.
struct Line {
    stream: TcpStream,
    /// What was read and is no whole line yet.
    begun: Vec<u8>,
    ended: bool,
}

impl Line {
    fn new(stream: TcpStream) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        let _ = stream.set_nodelay(true);
        Some(Self { stream, begun: Vec::new(), ended: false })
    }

    /// All that has come since the last time, without waiting. What is not understood ends the connection.
    fn hear<M: for<'de> Deserialize<'de>>(&mut self) -> Vec<M> {
        let mut buffer = [0; 1 << 14];
        while !self.ended {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => self.begun.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
            self.ended |= self.begun.len() > LONGEST;
        }
        let mut messages = Vec::new();
        while let Some(end) = self.begun.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.begun.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(message) => messages.push(message),
                Err(_) => self.ended = true,
            }
        }
        messages
    }

    /// Says `message`, unless the other side does not listen: it will be noticed by its silence.
    fn say(&mut self, message: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        let mut rest = &line[..];
        let begin = Instant::now();
        while !rest.is_empty() && begin.elapsed() < TICK {
            match self.stream.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return,
            }
        }
        // Half a line would spoil the next.
        self.ended |= !rest.is_empty() && rest.len() < line.len();
    }
}

/// When this thread last looked, and whether the process was stopped since.
struct Ticks {
    last: Instant,
    woke: Option<Instant>,
}

impl Ticks {
    fn new() -> Self {
        Self { last: Instant::now(), woke: None }
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

    fn is_waking(&self) -> bool {
        self.woke.is_some_and(|woke| woke.elapsed() < WAKING)
    }
}

/// Another rank, as rank 0 hears it.
struct Heard {
    line: Line,
    peer: Peer,
    at: Instant,
    /// It has said goodbye.
    left: bool,
}

/// Rank 0's thread.
struct First {
    shared: Shared,
    peers: Vec<Heard>,
    spoke: Instant,
}

impl First {
    fn run(mut self) {
        let mut ticks = Ticks::new();
        loop {
            if ticks.next_was_late() {
                self.peers.iter_mut().for_each(|heard| heard.at = Instant::now());
            }
            self.hear();
            if self.shared.lock().closing {
                return self.tell(&FromFirst::Bye);
            }
            let timeout = self.shared.lock().timeout;
            if !ticks.is_waking()
                && let Some(line) = judge(&self.seen(), timeout)
            {
                self.tell(&FromFirst::End(line.clone()));
                end(&self.shared, 0, &line, true);
            }
            if self.spoke.elapsed() > HEARTBEAT {
                self.spoke = Instant::now();
                self.tell(&FromFirst::Alive);
            }
            std::thread::park_timeout(TICK);
        }
    }

    fn hear(&mut self) {
        for Heard { line, peer, at, left } in &mut self.peers {
            for message in line.hear() {
                *at = Instant::now();
                match message {
                    ToFirst::Alive(status) => peer.status = status,
                    ToFirst::Bye => *left = true,
                    ToFirst::Hello { .. } => {}
                }
            }
            peer.silent = at.elapsed();
            peer.lost = line.ended && !*left;
        }
    }

    /// All that are watched, rank 0 too.
    fn seen(&self) -> Vec<Peer> {
        let own = Peer {
            rank: 0,
            host: host(),
            process: std::process::id(),
            silent: Duration::ZERO,
            lost: false,
            status: self.shared.status(),
        };
        let others = self.peers.iter().filter(|heard| !heard.left).map(|heard| heard.peer.clone());
        std::iter::once(own).chain(others).collect()
    }

    fn tell(&mut self, message: &FromFirst) {
        self.peers
            .iter_mut()
            .filter(|heard| !heard.left && !heard.line.ended)
            .for_each(|heard| heard.line.say(message));
    }
}

/// The thread of any other rank.
struct Follower {
    rank: usize,
    first: Invitation,
    line: Line,
    shared: Shared,
}

impl Follower {
    fn run(mut self) {
        let (mut heard, mut spoke, mut ticks) = (Instant::now(), None::<Instant>, Ticks::new());
        loop {
            if ticks.next_was_late() {
                heard = Instant::now();
            }
            for message in self.line.hear() {
                heard = Instant::now();
                match message {
                    FromFirst::Bye => return,
                    FromFirst::End(line) => end(&self.shared, self.rank, &line, false),
                    FromFirst::Welcome | FromFirst::Alive => {}
                }
            }
            if self.shared.lock().closing {
                return self.line.say(&ToFirst::Bye);
            }
            let Invitation { host, process, .. } = &self.first;
            let timeout = self.shared.lock().timeout;
            let verdict = if self.line.ended {
                Some(format!("rank 0 (process {process} on {host}) has died"))
            } else if heard.elapsed() > timeout {
                let seconds = heard.elapsed().as_secs();
                Some(format!("no sign of life from rank 0 (process {process} on {host}) for {seconds} s"))
            } else {
                None
            };
            if let Some(line) = verdict.filter(|_| !ticks.is_waking()) {
                // All find out at once: one says it.
                end(&self.shared, self.rank, &line, self.rank == 1);
            }
            if spoke.is_none_or(|spoke| spoke.elapsed() > HEARTBEAT) {
                spoke = Some(Instant::now());
                self.line.say(&ToFirst::Alive(self.shared.status()));
            }
            std::thread::park_timeout(TICK);
        }
    }
}

/// Ends this process: says why if it is the one to say it, and leaves its last collectives behind.
fn end(shared: &Shared, rank: usize, line: &str, says: bool) -> ! {
    if says {
        let _ = std::io::stderr().write_all(format!("error: {line}\n").as_bytes());
    }
    shared.write_flight(rank, line);
    shared.abort();
    // The launcher kills the others when the first is gone: whoever has something to say or to write comes first.
    std::thread::sleep(Duration::from_millis(if says { 300 } else { 1000 }));
    // SAFETY: ends the process without running what was registered for its exit, which may wait for a hung MPI.
    unsafe { libc::_exit(1) }
}
