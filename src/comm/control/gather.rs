//! Rank 0's side of the start: connections whose other ends have proven nothing yet, and the ranks among them.
//!
//! Whoever connects and is no rank holds up nothing: connections wait beside each other, a few at a time and each for a
//! moment, and the first bytes that are no proof end them.

use super::{
    Status,
    frame::{Frame, FrameError, read_message},
    judge::{Peer, PeerName},
    link::{Link, wait},
    rendezvous::{CONNECT, GATHER, PAUSE},
    secret::{Challenge, End, Handshake, Secret, random},
    threads::{Connected, FromRoot, READ, ToRoot},
};
use std::{
    collections::{BTreeMap, VecDeque},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

/// Connections that wait for their proof at a time, each for [`CONNECT`] at most. The oldest makes room.
pub(super) const STRANGERS: usize = 128;
/// Time that each of them has at least.
const LEAST: Duration = Duration::from_millis(100);
/// Connections that are accepted before those that wait have their turn.
const ACCEPTED: usize = 64;

/// A connection whose other end has proven nothing yet.
struct Stranger {
    link: Link,
    challenge: Challenge,
    since: Instant,
}

/// The state of a stranger after a read.
enum Heard {
    /// Nothing whole yet.
    Nothing,
    /// He is rank `name.rank`, and has this challenge for rank 0.
    Rank(PeerName, Challenge),
    /// He has left, sent something else, or was silent for too long.
    Dropped,
}

impl Stranger {
    /// Takes a connection, and sends a challenge.
    fn of(stream: TcpStream) -> Option<Self> {
        let (mut link, challenge) = (Link::to_stranger(stream).ok()?, random().ok()?);
        link.say(&FromRoot::Challenge(challenge));
        link.write();
        Some(Self { link, challenge, since: Instant::now() })
    }

    fn hear(&mut self, buffer: &mut [u8], ranks: usize, secret: &Secret) -> Heard {
        let (mut first, mut more) = (None, false);
        self.link.read(buffer, |frame| {
            let Frame::Message(json) = frame else { return Err(FrameError::Direction) };
            let message = read_message(json)?;
            more |= first.is_some();
            first = first.take().or(Some(message));
            Ok(())
        });
        match first {
            // A rank that was not welcomed in time says goodbye, and may come again.
            _ if more || self.link.ended().is_some() => Heard::Dropped,
            None if self.since.elapsed() > CONNECT => Heard::Dropped,
            None => Heard::Nothing,
            Some(ToRoot::Hello { name, challenge, proof }) if (1..ranks).contains(&name.rank) => {
                let handshake = Handshake { of_root: &self.challenge, of_other: &challenge, name: &name };
                match secret.is_proven(End::Other, &handshake, &proof) {
                    true => Heard::Rank(name, challenge),
                    false => Heard::Dropped,
                }
            }
            Some(_) => Heard::Dropped,
        }
    }

    /// Proves to the rank `name` that this is rank 0.
    fn welcome(mut self, name: PeerName, theirs: &Challenge, secret: &Secret) -> Connected {
        let handshake = Handshake { of_root: &self.challenge, of_other: theirs, name: &name };
        self.link.say(&FromRoot::Welcome(secret.prove(End::Root, &handshake)));
        self.link.write();
        self.link.trust();
        let peer = Peer { name, silent: Duration::ZERO, lost: None, status: Status::default() };
        Connected { link: self.link, peer, heard: Instant::now(), left: false }
    }
}

/// True if another one can be accepted: there is room, or the oldest has had its time.
fn has_room(strangers: &VecDeque<Stranger>) -> bool {
    let is_old = |oldest: &Stranger| oldest.since.elapsed() > LEAST;
    strangers.len() < STRANGERS || strangers.front().is_some_and(is_old)
}

/// Accepts connections until every rank but 0 has proven itself, or the time is over. A rank that comes twice has given
/// up its first connection.
pub(super) fn gather(listener: &TcpListener, ranks: usize, secret: &Secret) -> BTreeMap<usize, Connected> {
    let begin = Instant::now();
    let (mut strangers, mut peers) = (VecDeque::<Stranger>::new(), BTreeMap::new());
    let mut buffer = vec![0; READ];
    while peers.len() + 1 < ranks
        && let Some(left) = GATHER.checked_sub(begin.elapsed())
    {
        // Until the oldest has waited long enough.
        let oldest = strangers.front().map_or(left, |oldest| CONNECT.saturating_sub(oldest.since.elapsed()));
        if has_room(&strangers) {
            wait(listener, strangers.iter().map(|stranger| &stranger.link), left.min(oldest + PAUSE));
        } else {
            std::thread::sleep(LEAST / 50);
        }
        for _ in 0..ACCEPTED {
            if !has_room(&strangers) {
                break;
            }
            let Ok((stream, _)) = listener.accept() else { break };
            if strangers.len() >= STRANGERS {
                strangers.pop_front();
            }
            strangers.extend(Stranger::of(stream));
        }
        for mut stranger in std::mem::take(&mut strangers) {
            match stranger.hear(&mut buffer, ranks, secret) {
                Heard::Nothing => strangers.push_back(stranger),
                Heard::Dropped => {}
                Heard::Rank(name, challenge) => {
                    peers.insert(name.rank, stranger.welcome(name, &challenge, secret));
                }
            }
        }
    }
    peers
}
