//! The verdict over all ranks: whether they have to end, and because of which one. Pure.

use super::{Group, Status, link::EndCause};
use serde::{Deserialize, Serialize};
use std::{
    fmt::{self, Write},
    time::Duration,
};

/// A rank and its process, as lines to the user name them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PeerName {
    pub rank: usize,
    pub process: u32,
    pub host: String,
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} (process {} on {})", self.rank, self.process, self.host)
    }
}

/// A rank as rank 0 sees it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub name: PeerName,
    /// Time since its last sign of life.
    pub silent: Duration,
    /// Why its connection ended, if it did so unannounced.
    pub lost: Option<EndCause>,
    pub status: Status,
}

/// The line that says why all ranks have to end; `None` where they need not. `peers` are all watched ranks that have
/// not left.
///
/// An error that a rank reports comes before a lost connection, that before silence, and that before a late
/// collective.
pub(super) fn judge(peers: &[Peer], timeout: Duration) -> Option<String> {
    let failed = |peer: &Peer| Some(format!("rank {}: {}", peer.name.rank, peer.status.fault.as_ref()?));
    let lost = |peer: &Peer| Some(format!("{} {}; {}", peer.name, peer.lost.as_ref()?, peer.last()));
    let silent = |peer: &Peer| {
        let seconds = peer.silent.as_secs();
        let line = || format!("no sign of life from {} for {seconds} s; {}", peer.name, peer.last());
        (peer.silent > timeout).then(line)
    };
    let first = peers.iter().find_map(failed).or_else(|| peers.iter().find_map(lost));
    let first = first.or_else(|| peers.iter().find_map(silent));
    first.or_else(|| peers.iter().find_map(|waiting| late(waiting, peers, timeout)))
}

/// The line about the rank for which `waiting` has waited longer than `timeout`, if there is one.
fn late(waiting: &Peer, peers: &[Peer], timeout: Duration) -> Option<String> {
    let inside = waiting.status.inside.as_ref()?;
    let group = waiting.status.groups.get(inside.group)?;
    if inside.seconds <= timeout.as_secs_f64() {
        return None;
    }
    let missing = |peer: &&Peer| {
        let own = peer.status.groups.iter().find(|own| (&own.name, own.color) == (&group.name, group.color));
        own.is_some_and(|own| own.entered < inside.number)
    };
    let missing: Vec<&Peer> = peers.iter().filter(missing).collect();
    if missing.iter().any(|peer| peer.status.slow.is_some()) {
        return None;
    }
    let (rank, seconds, step) = (waiting.name.rank, inside.seconds as u64, waiting.status.step);
    let (operation, name, number) = (&group.operation, &group.name, inside.number);
    if missing.is_empty() && inside.on_device {
        return Some(format!(
            "rank {rank}: #{number} over {name}, which every rank has started, is not done on the device within \
             {seconds} s (step {step})"
        ));
    }
    // A missing rank that waits in another collective is held up by a third one.
    let culprit = missing.iter().find(|peer| peer.status.inside.is_none()).or(missing.first())?;
    let (who, last) = (&culprit.name, culprit.last());
    Some(format!(
        "rank {rank}: no {operation} #{number} over {name} from {who} within {seconds} s (step {step}); {last}"
    ))
}

impl Peer {
    /// The collectives that it reported last.
    fn last(&self) -> String {
        let Status { step, slow, groups, inside, .. } = &self.status;
        let of = |group: &Group| format!("{} #{} over {}", group.operation, group.entered, group.name);
        let all: Vec<String> = groups.iter().filter(|group| group.entered > 0).map(of).collect();
        let mut text = match inside.as_ref().and_then(|inside| groups.get(inside.group)) {
            Some(group) => format!("it is in {}", of(group)),
            None if all.is_empty() => "it has entered no collective".to_owned(),
            None => format!("it last entered {}", all.join(", ")),
        };
        let _ = match slow {
            Some(phase) => write!(text, ", in {phase}"),
            None => write!(text, ", in step {step}"),
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Inside, frame::FrameError};
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(100);

    /// Rank `rank` with shard groups of two ranks, after `world` and `shard` collectives.
    fn peer(rank: usize, world: u64, shard: u64) -> Peer {
        let group = |name: &str, color, entered, operation: &str| Group {
            name: name.into(),
            color,
            entered,
            operation: operation.into(),
        };
        let groups =
            vec![group("world", 0, world, "all_reduce_host"), group("shard", rank / 2, shard, "all_gather")];
        Peer {
            name: PeerName { rank, process: 100 + rank as u32, host: "node7".into() },
            silent: Duration::from_millis(300),
            lost: None,
            status: Status { step: 4, slow: None, groups, inside: None, fault: None },
        }
    }

    fn inside(peer: Peer, group: usize, seconds: f64) -> Peer {
        let number = peer.status.groups[group].entered;
        let inside = Some(Inside { group, number, seconds, on_device: false });
        Peer { status: Status { inside, ..peer.status }, ..peer }
    }

    fn slow(peer: Peer, what: &str) -> Peer {
        let status = Status { slow: Some(what.into()), ..peer.status };
        Peer { status, ..peer }
    }

    #[test]
    fn ranks_at_work_get_no_verdict() {
        let peers = [
            peer(0, 3, 9),
            inside(peer(1, 3, 10), 1, 99.0),
            peer(2, 3, 12),
            inside(peer(3, 3, 12), 1, 500.0),
        ];
        // All ranks of rank 3's shard group have entered its collective: MPI is moving bytes.
        assert_eq!(judge(&peers, TIMEOUT), None);
    }

    #[test]
    fn a_dead_rank_is_named_before_a_silent_one_and_that_before_a_late_one() {
        let mut peers = [inside(peer(0, 3, 10), 1, 300.0), peer(1, 3, 9), peer(2, 3, 9), peer(3, 3, 9)];
        let said = judge(&peers, TIMEOUT).unwrap();
        assert_eq!(
            said,
            "rank 0: no all_gather #10 over shard from rank 1 (process 101 on node7) within 300 s (step 4); it last \
             entered all_reduce_host #3 over world, all_gather #9 over shard, in step 4"
        );
        peers[2].silent = Duration::from_secs(101);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(
            said.starts_with("no sign of life from rank 2 (process 102 on node7) for 101 s; it last"),
            "{said}"
        );
        peers[3].lost = Some(EndCause::Closed);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.starts_with("rank 3 (process 103 on node7) has died; it last entered"), "{said}");
        peers[3].lost = Some(EndCause::Torn(FrameError::Torn(7)));
        assert_eq!(judge(&peers, TIMEOUT), Some(said));
        peers[3].lost = Some(EndCause::Broken(FrameError::Kind(9)));
        let said = judge(&peers, TIMEOUT).unwrap();
        let expected =
            "rank 3 (process 103 on node7) sent a control frame of unknown kind 9; it last entered";
        assert!(said.starts_with(expected), "{said}");
    }

    #[test]
    fn devices_have_a_deadline_of_their_own() {
        let on_device = |peer: Peer, number, seconds| {
            let inside = Some(Inside { group: 1, number, seconds, on_device: true });
            Peer { status: Status { inside, ..peer.status }, ..peer }
        };
        // Rank 0's device is in collective 8; the rank has started two more.
        let mut peers = [on_device(peer(0, 3, 10), 8, 99.0), peer(1, 3, 8), peer(2, 3, 9), peer(3, 3, 9)];
        assert_eq!(judge(&peers, TIMEOUT), None);
        peers[0] = on_device(peer(0, 3, 10), 8, 101.0);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert_eq!(
            said,
            "rank 0: #8 over shard, which every rank has started, is not done on the device within 101 s (step 4)"
        );
        peers[1] = peer(1, 3, 7);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.starts_with("rank 0: no all_gather #8 over shard from rank 1"), "{said}");
        peers[3].status.fault = Some("ncclRemoteError of NCCL".into());
        assert_eq!(judge(&peers, TIMEOUT).unwrap(), "rank 3: ncclRemoteError of NCCL");
    }

    #[test]
    fn a_rank_that_waits_elsewhere_is_not_blamed() {
        // Rank 0 waits in the world group for rank 2, which waits in its shard group for rank 3.
        let peers = [
            inside(peer(0, 5, 9), 0, 200.0),
            inside(peer(1, 5, 9), 0, 200.0),
            inside(peer(2, 4, 8), 1, 150.0),
            peer(3, 4, 7),
        ];
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.contains("from rank 3 (process 103"), "{said}");
    }

    #[test]
    fn a_slow_phase_has_no_deadline_but_needs_signs_of_life() {
        let mut peers = [slow(peer(0, 4, 9), "save"), inside(peer(1, 5, 9), 0, 5000.0)];
        assert_eq!(judge(&peers, TIMEOUT), None);
        peers[0].silent = Duration::from_secs(200);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.contains("from rank 0") && said.ends_with("in save"), "{said}");
    }
}
