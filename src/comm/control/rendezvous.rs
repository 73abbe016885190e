//! The start of the mesh: every rank connects to rank 0, and both prove that they know the run's secret. The port is
//! open until all have come. Whoever else connects holds up nothing: he waits beside the others for a moment, and is
//! dropped when he sends what is no proof.

use super::{
    super::{CommError, Communicator},
    Shared,
    commands::{CommandError, CommandReceiver, CommandSender, Commands, Progress},
    frame::{Frame, read_message},
    gather::gather,
    judge::PeerName,
    link::{Link, Wakeup, wait},
    secret::{End, Handshake, Secret, random},
    threads::{Connected, Follower, FromRoot, READ, Root, ToRoot},
};
use crossbeam::channel::unbounded;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Time for one address of rank 0 to answer.
pub(super) const CONNECT: Duration = Duration::from_secs(3);
/// Time for all ranks to connect.
pub(super) const GATHER: Duration = Duration::from_secs(20);
/// Times that a rank connects again to an address that has dropped it, as where it was the oldest of many strangers.
const AGAIN: usize = 20;
/// Time before it does.
pub(super) const PAUSE: Duration = Duration::from_millis(50);
/// Variable with the port of rank 0, for networks that let few through. Any free one where it is absent.
const PORT: &str = "XORL_CONTROL_PORT";

/// Addresses of rank 0's control port, and the secret by which ranks of this run are known.
#[derive(Clone, Serialize, Deserialize)]
struct Invitation {
    addresses: Vec<IpAddr>,
    port: u16,
    secret: Secret,
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
        let secret = invitation.secret.clone();
        let gathering = std::thread::spawn(move || gather(&listener, size, &secret));
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
    let port = match std::env::var(PORT) {
        Ok(port) => port.parse().map_err(io::Error::other)?,
        Err(_) => 0,
    };
    // On Linux an IPv6 socket takes IPv4 connections too.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    listener.set_nonblocking(true)?;
    let mut addresses: Vec<IpAddr> = if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect();
    // Loopback comes last: on another host another program may answer there.
    addresses.sort_by_key(IpAddr::is_loopback);
    let invitation = Invitation {
        addresses,
        port: listener.local_addr()?.port(),
        secret: Secret::new().map_err(io::Error::other)?,
        root: PeerName { rank: 0, process: std::process::id(), host: host() },
    };
    Ok((listener, invitation))
}

/// Name of this machine.
pub(in crate::comm) fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// A connection to rank 0, and this rank's wakeup; `None` where no address of rank 0 answers as rank 0 does.
fn join(invitation: &Invitation, rank: usize) -> Option<(Link, Wakeup)> {
    let name = PeerName { rank, process: std::process::id(), host: host() };
    let (wakeup, mut buffer) = (Wakeup::new().ok()?, vec![0; READ]);
    let begin = Instant::now();
    let link = invitation.addresses.iter().find_map(|address| {
        let address = SocketAddr::new(*address, invitation.port);
        for _ in 0..AGAIN {
            if begin.elapsed() > GATHER {
                break;
            }
            match introduce(address, &invitation.secret, &name, &wakeup, &mut buffer) {
                Introduced::Welcome(link) => return Some(*link),
                Introduced::Dropped => std::thread::sleep(PAUSE),
                Introduced::Unanswered => break,
            }
        }
        None
    })?;
    Some((link, wakeup))
}

/// The end of an attempt to connect to rank 0.
enum Introduced {
    Welcome(Box<Link>),
    /// The other end has closed the connection.
    Dropped,
    /// No connection, or no answer on it in time.
    Unanswered,
}

/// Connects to `address` and proves to be `name`.
fn introduce(
    address: SocketAddr,
    secret: &Secret,
    name: &PeerName,
    wakeup: &Wakeup,
    buffer: &mut [u8],
) -> Introduced {
    let connected = TcpStream::connect_timeout(&address, CONNECT).and_then(Link::to_stranger);
    let (Ok(mut link), Ok(own)) = (connected, random()) else { return Introduced::Unanswered };
    let (begin, mut theirs, mut is_root) = (Instant::now(), None, false);
    while link.ended().is_none()
        && let Some(left) = CONNECT.checked_sub(begin.elapsed())
    {
        link.write();
        wait(wakeup, std::iter::once(&link), left);
        let mut asked = None;
        link.read(buffer, |frame| {
            let Frame::Message(json) = frame else { return Ok(()) };
            match (read_message(json)?, theirs) {
                (FromRoot::Challenge(challenge), None) => {
                    theirs = Some(challenge);
                    asked = theirs;
                }
                (FromRoot::Welcome(proof), Some(theirs)) => {
                    let handshake = Handshake { of_root: &theirs, of_other: &own, name };
                    is_root |= secret.is_proven(End::Root, &handshake, &proof);
                }
                _ => {}
            }
            Ok(())
        });
        if let Some(challenge) = asked {
            let handshake = Handshake { of_root: &challenge, of_other: &own, name };
            let proof = secret.prove(End::Other, &handshake);
            link.say(&ToRoot::Hello { name: name.clone(), challenge: own, proof });
        }
        if is_root {
            link.trust();
            return Introduced::Welcome(Box::new(link));
        }
    }
    if link.ended().is_some() {
        return Introduced::Dropped;
    }
    // Rank 0 may have taken the connection all the same.
    link.say(&ToRoot::Bye);
    link.write();
    Introduced::Unanswered
}

#[cfg(test)]
mod tests {
    use super::{super::gather::STRANGERS, *};
    use std::{
        collections::VecDeque,
        io::{Read, Write},
        sync::{
            Mutex,
            atomic::{AtomicBool, AtomicUsize, Ordering},
        },
        thread,
    };

    fn invited() -> (TcpListener, Invitation) {
        let (listener, invitation) = listen().unwrap();
        let addresses = vec![Ipv4Addr::LOCALHOST.into()];
        (listener, Invitation { addresses, ..invitation })
    }

    fn connect(invitation: &Invitation) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, invitation.port)).unwrap()
    }

    /// The ranks that rank 0 of `ranks` gathers, while `others` connect.
    fn gathered(
        (listener, invitation): &(TcpListener, Invitation),
        ranks: usize,
        others: impl FnOnce() + Send,
    ) -> Vec<usize> {
        thread::scope(|scope| {
            let gathering = scope.spawn(|| gather(listener, ranks, &invitation.secret));
            scope.spawn(others);
            gathering.join().unwrap().keys().copied().collect()
        })
    }

    /// True if the other end closes `stream`, whatever it sends before.
    fn is_closed(mut stream: TcpStream) -> bool {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        match stream.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[test]
    fn strangers_do_not_take_the_place_of_a_rank() {
        let own = invited();
        let invitation = &own.1;
        let mut web = connect(invitation);
        web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let silent = connect(invitation);
        let mut large = connect(invitation);
        large.write_all(&[&b"XC\x01\x01"[..], &(1u32 << 20).to_le_bytes(), &[b' '; 5000]].concat()).unwrap();
        let other_run = Invitation { secret: Secret::new().unwrap(), ..invitation.clone() };
        let ranks = gathered(&own, 3, || {
            assert!(is_closed(web) && is_closed(large), "dropped while others come");
            assert!(join(&other_run, 1).is_none());
            assert!(join(invitation, 3).is_none(), "there is no rank 3");
            let links = [2, 1].map(|rank| join(invitation, rank).unwrap());
            drop(links);
        });
        drop(silent);
        assert_eq!(ranks, [1, 2]);
    }

    #[test]
    fn a_thousand_strangers_end_and_delay_nothing() {
        let own = invited();
        let invitation = &own.1;
        let (begin, made, is_over) = (Instant::now(), AtomicUsize::new(0), AtomicBool::new(false));
        let ranks = thread::scope(|scope| {
            for kind in 0..4 {
                let (made, is_over) = (&made, &is_over);
                scope.spawn(move || {
                    let mut silent = VecDeque::new();
                    while !is_over.load(Ordering::Relaxed) {
                        // The system takes no more where many wait to be accepted.
                        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), invitation.port);
                        let stream = TcpStream::connect_timeout(&address, Duration::from_millis(200));
                        let Ok(mut stream) = stream else { continue };
                        made.fetch_add(1, Ordering::Relaxed);
                        let bytes: &[u8] = match kind {
                            0 => b"",
                            1 => b"XC\x01\x01\xff\0\0\0{",
                            2 => b"XC\x01\x01\x05\0\0\0\"Bye\"",
                            _ => b"\x16\x03\x01 garbage",
                        };
                        let _ = stream.write_all(bytes);
                        silent.push_back(stream);
                        if silent.len() > STRANGERS + 20 {
                            silent.pop_front();
                        }
                    }
                });
            }
            while made.load(Ordering::Relaxed) < 50 {
                thread::sleep(Duration::from_millis(1));
            }
            let ranks = gathered(&own, 3, || {
                while made.load(Ordering::Relaxed) < 1000 {
                    thread::sleep(Duration::from_millis(1));
                }
                let links = [1, 2].map(|rank| join(invitation, rank).unwrap());
                drop(links);
            });
            is_over.store(true, Ordering::Relaxed);
            ranks
        });
        assert_eq!(ranks, [1, 2]);
        assert!(made.into_inner() >= 1000);
        assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    }

    /// Passes bytes on from a rank to rank 0 and back, and keeps both.
    fn overhear(invitation: &Invitation) -> (Invitation, JoinHandle<[Vec<u8>; 2]>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = Invitation { port: listener.local_addr().unwrap().port(), ..invitation.clone() };
        let root = connect(invitation);
        let passing = thread::spawn(move || {
            let rank = listener.accept().unwrap().0;
            let kept = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];
            thread::scope(|scope| {
                for (mut from, mut to, kept) in [
                    (rank.try_clone().unwrap(), root.try_clone().unwrap(), &kept[0]),
                    (root.try_clone().unwrap(), rank.try_clone().unwrap(), &kept[1]),
                ] {
                    scope.spawn(move || {
                        let mut buffer = [0; 1024];
                        while let Ok(n @ 1..) = from.read(&mut buffer) {
                            kept.lock().unwrap().extend_from_slice(&buffer[..n]);
                            if to.write_all(&buffer[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            });
            kept.map(|kept| kept.into_inner().unwrap())
        });
        (near, passing)
    }

    #[test]
    fn what_is_overheard_has_no_secret_and_cannot_be_sent_again() {
        let own = invited();
        let invitation = &own.1;
        let ranks = gathered(&own, 3, || {
            let (near, passing) = overhear(invitation);
            drop(join(&near, 1).unwrap());
            let [hello, welcome] = passing.join().unwrap();
            let text = serde_json::to_string(&invitation.secret).unwrap();
            for bytes in [&hello, &welcome] {
                let said = String::from_utf8_lossy(bytes).into_owned();
                assert!(said.len() > 100 && !said.contains(&text), "{said}");
            }
            let mut again = connect(invitation);
            again.write_all(&hello).unwrap();
            assert!(is_closed(again), "an old answer to a new challenge");
            drop(join(invitation, 2).unwrap());
        });
        assert_eq!(ranks, [1, 2]);
    }

    #[test]
    fn a_program_that_is_not_rank_0_is_not_joined() {
        let says = |messages: Vec<FromRoot>| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let (_, invitation) = invited();
            let invitation = Invitation { port: listener.local_addr().unwrap().port(), ..invitation };
            let is_over = AtomicBool::new(false);
            listener.set_nonblocking(true).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| {
                    // A rank that is dropped comes again some times.
                    while !is_over.load(Ordering::Relaxed) {
                        let Ok((stream, _)) = listener.accept() else { continue };
                        let mut link = Link::new(stream).unwrap();
                        messages.iter().for_each(|message| link.say(message));
                        link.write();
                        thread::sleep(Duration::from_millis(5));
                    }
                });
                let joined = join(&invitation, 1).is_some();
                is_over.store(true, Ordering::Relaxed);
                joined
            })
        };
        assert!(!says(vec![FromRoot::Welcome([0; 32])]));
        assert!(!says(vec![FromRoot::Challenge([1; 32]), FromRoot::Welcome([0; 32])]));
    }
}
