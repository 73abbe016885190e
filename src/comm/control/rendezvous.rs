//! The start of the mesh: every rank connects to rank 0.

use super::{
    super::{CommError, Communicator},
    Shared, Status,
    commands::{CommandError, CommandReceiver, CommandSender, Commands, Progress},
    frame::{Frame, read_message},
    judge::{Peer, PeerName},
    link::{Link, Wakeup, wait},
    threads::{Connected, Follower, FromRoot, READ, Root, ToRoot},
};
use crossbeam::channel::unbounded;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Time for one address of rank 0 to answer.
const CONNECT: Duration = Duration::from_secs(3);
/// Time for all ranks to connect.
const GATHER: Duration = Duration::from_secs(20);

/// Addresses of rank 0's control port, and a token by which ranks of this run are known.
#[derive(Clone, Serialize, Deserialize)]
struct Invitation {
    addresses: Vec<IpAddr>,
    port: u16,
    token: String,
    root: PeerName,
}

/// This rank's part of the mesh.
pub(super) struct Opened {
    /// The control thread and its wakeup; `None` where the rank stays unwatched.
    pub thread: Option<(JoinHandle<()>, Wakeup)>,
    pub commands: Result<Commands, CommandError>,
    /// Line for the user, on rank 0.
    pub warning: Option<String>,
}

/// Connects the ranks and starts this rank's thread. Collective.
pub(super) fn open(world: &dyn Communicator, shared: &Shared) -> Result<Opened, CommError> {
    let (rank, size) = (world.rank(), world.size());
    let (listener, invitation) = match (rank == 0).then(|| Ok::<_, io::Error>((listen()?, Wakeup::new()?))) {
        Some(Ok(((listener, invitation), wakeup))) => (Some((listener, wakeup)), Some(invitation)),
        _ => (None, None),
    };
    let invitation = invitation.map(|invitation| serde_json::to_vec(&invitation).unwrap_or_default());
    let all = world.all_gather_host(&invitation.unwrap_or_default())?;
    let invitation: Option<Invitation> = all.first().and_then(|bytes| serde_json::from_slice(bytes).ok());
    let unwatched = |ranks: Vec<usize>, warning: Option<String>| Opened {
        thread: None,
        commands: Err(CommandError::Unreachable { ranks }),
        warning: warning.filter(|_| rank == 0),
    };
    let Some(invitation) = invitation else {
        let warning = "no port for the control mesh: ranks that hang will not be noticed";
        return Ok(unwatched((1..size).collect(), Some(warning.to_owned())));
    };
    let opened = if let Some((listener, wakeup)) = listener {
        // Others connect while this rank is in the second all-gather: none waits for the end of the connecting.
        let token = invitation.token.clone();
        let gathering = std::thread::spawn(move || gather(&listener, size, &token));
        world.all_gather_host(&[])?;
        open_root(shared, invitation.root, size, wakeup, gathering.join().unwrap_or_default())
    } else {
        let joined = join(&invitation, rank);
        world.all_gather_host(&[])?;
        joined.and_then(|(link, wakeup)| open_follower(shared, rank, invitation.root, wakeup, link))
    };
    Ok(opened.unwrap_or_else(|| unwatched(vec![rank], None)))
}

/// Starts rank 0's thread with the connections to all `peers`.
fn open_root(
    shared: &Shared,
    name: PeerName,
    size: usize,
    wakeup: Wakeup,
    peers: BTreeMap<usize, Connected>,
) -> Option<Opened> {
    let absent: Vec<usize> = (1..size).filter(|rank| !peers.contains_key(rank)).collect();
    let warning = (!absent.is_empty()).then(|| {
        format!(
            "{} ranks cannot reach the control port of rank 0: if they hang, it will not be noticed",
            absent.len()
        )
    });
    let (sender, outgoing) = unbounded();
    let progress = Arc::new(Progress::new(1..size));
    let commands = match absent.is_empty() {
        true => Ok(Commands::Sender(CommandSender::new(progress.clone(), sender, wakeup.clone()))),
        false => Err(CommandError::Unreachable { ranks: absent }),
    };
    let peers = peers.into_values().collect();
    let root = Root::new(shared.clone(), name, wakeup.clone(), outgoing, progress, peers);
    let thread = spawn(move || root.run())?;
    Some(Opened { thread: Some((thread, wakeup)), commands, warning })
}

/// Starts the thread of any other rank.
fn open_follower(shared: &Shared, rank: usize, root: PeerName, wakeup: Wakeup, link: Link) -> Option<Opened> {
    let (sender, commands) = unbounded();
    let (acknowledged, acknowledgements) = unbounded();
    let receiver = CommandReceiver::new(commands, acknowledged, wakeup.clone());
    let follower = Follower::new(shared.clone(), rank, root, wakeup.clone(), link, sender, acknowledgements);
    let thread = spawn(move || follower.run())?;
    Some(Opened { thread: Some((thread, wakeup)), commands: Ok(Commands::Receiver(receiver)), warning: None })
}

fn spawn(run: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    std::thread::Builder::new().name("watchdog".into()).spawn(run).ok()
}

fn listen() -> io::Result<(TcpListener, Invitation)> {
    // On Linux an IPv6 socket takes IPv4 connections too.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    listener.set_nonblocking(true)?;
    let mut token = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    let mut addresses: Vec<IpAddr> = if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect();
    // Loopback comes last: on another host another program may answer there.
    addresses.sort_by_key(IpAddr::is_loopback);
    let invitation = Invitation {
        addresses,
        port: listener.local_addr()?.port(),
        token: token.iter().map(|byte| format!("{byte:02x}")).collect(),
        root: PeerName { rank: 0, process: std::process::id(), host: host() },
    };
    Ok((listener, invitation))
}

/// Name of this machine.
pub(in crate::comm) fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Accepts connections until every rank but 0 has said hello, or the time is over. A rank that comes twice has given
/// up its first connection.
fn gather(listener: &TcpListener, ranks: usize, token: &str) -> BTreeMap<usize, Connected> {
    let begin = Instant::now();
    let (mut strangers, mut peers) = (Vec::<Link>::new(), BTreeMap::new());
    let mut buffer = vec![0; READ];
    while peers.len() + 1 < ranks
        && let Some(left) = GATHER.checked_sub(begin.elapsed())
    {
        wait(listener, strangers.iter(), left);
        while let Ok((stream, _)) = listener.accept() {
            strangers.extend(Link::new(stream));
        }
        for mut link in std::mem::take(&mut strangers) {
            let (mut first, mut left) = (None, false);
            link.read(&mut buffer, |frame| {
                if let Frame::Message(json) = frame {
                    let message = read_message(json)?;
                    left |= matches!(message, ToRoot::Bye);
                    first = first.take().or(Some(message));
                }
                Ok(())
            });
            // A rank that was not welcomed in time says goodbye, and may come again.
            if left || link.ended().is_some() {
                continue;
            }
            match first {
                Some(ToRoot::Hello { token: theirs, name })
                    if theirs == token && (1..ranks).contains(&name.rank) =>
                {
                    link.say(&FromRoot::Welcome);
                    link.write();
                    let rank = name.rank;
                    let peer = Peer { name, silent: Duration::ZERO, lost: None, status: Status::default() };
                    peers.insert(rank, Connected { link, peer, heard: Instant::now(), left: false });
                }
                None => strangers.push(link),
                _ => {}
            }
        }
    }
    peers
}

/// A connection to rank 0, and this rank's wakeup; `None` where no address of rank 0 answers.
fn join(invitation: &Invitation, rank: usize) -> Option<(Link, Wakeup)> {
    let name = PeerName { rank, process: std::process::id(), host: host() };
    let hello = ToRoot::Hello { token: invitation.token.clone(), name };
    let wakeup = Wakeup::new().ok()?;
    let mut buffer = vec![0; READ];
    let link = invitation.addresses.iter().find_map(|address| {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(*address, invitation.port), CONNECT).ok()?;
        let mut link = Link::new(stream).ok()?;
        link.say(&hello);
        let (begin, mut welcome) = (Instant::now(), false);
        while link.ended().is_none()
            && let Some(left) = CONNECT.checked_sub(begin.elapsed())
        {
            link.write();
            wait(&wakeup, std::iter::once(&link), left);
            link.read(&mut buffer, |frame| {
                let Frame::Message(json) = frame else { return Ok(()) };
                welcome |= matches!(read_message(json)?, FromRoot::Welcome);
                Ok(())
            });
            if welcome {
                return Some(link);
            }
        }
        // Rank 0 may have taken the connection all the same.
        link.say(&ToRoot::Bye);
        link.write();
        None
    })?;
    Some((link, wakeup))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn invited() -> (TcpListener, Invitation) {
        let (listener, invitation) = listen().unwrap();
        let addresses = vec![Ipv4Addr::LOCALHOST.into()];
        (listener, Invitation { addresses, ..invitation })
    }

    #[test]
    fn strangers_do_not_take_the_place_of_a_rank() {
        let (listener, invitation) = invited();
        let address = (Ipv4Addr::LOCALHOST, invitation.port);
        let mut web = TcpStream::connect(address).unwrap();
        web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let silent = TcpStream::connect(address).unwrap();
        let other_run = Invitation { token: "other".into(), ..invitation.clone() };
        let (token, root) = (invitation.token.clone(), invitation.root.clone());
        let peers = std::thread::scope(|scope| {
            let gathering = scope.spawn(|| gather(&listener, 3, &token));
            assert!(join(&other_run, 1).is_none());
            assert!(join(&invitation, 3).is_none(), "there is no rank 3");
            let links = [2, 1].map(|rank| join(&invitation, rank).unwrap());
            let peers = gathering.join().unwrap();
            drop(links);
            peers
        });
        drop((web, silent));
        assert_eq!(peers.keys().copied().collect::<Vec<_>>(), [1, 2]);
        let expected = PeerName { rank: 2, ..root };
        assert_eq!(peers[&2].peer.name, expected);
    }
}
