//! Whether all ranks have to end, and because of whom. Pure.

use super::{Group, Status};
use std::{fmt::Write, time::Duration};

/// A rank as rank 0 sees it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub rank: usize,
    pub host: String,
    pub process: u32,
    /// Since it was last heard.
    pub silent: Duration,
    /// Its connection ended, and it had not said that it would.
    pub lost: bool,
    pub status: Status,
}

/// What is wrong, in one line; `None` where nothing is. `peers` are all that are watched and have not said goodbye.
pub(super) fn judge(peers: &[Peer], timeout: Duration) -> Option<String> {
    if let Some((rank, fault)) = peers.iter().find_map(|peer| Some((peer.rank, peer.status.fault.as_ref()?)))
    {
        return Some(format!("rank {rank}: {fault}"));
    }
    if let Some(peer) = peers.iter().find(|peer| peer.lost) {
        return Some(format!("{} has died; {}", peer.who(), peer.last()));
    }
    if let Some(peer) = peers.iter().find(|peer| peer.silent > timeout) {
        let seconds = peer.silent.as_secs();
        return Some(format!("no sign of life from {} for {seconds} s; {}", peer.who(), peer.last()));
    }
    peers.iter().find_map(|waiting| late(waiting, peers, timeout))
}

/// Who keeps `waiting` waiting for too long, if anybody does.
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
    let (rank, seconds, step) = (waiting.rank, inside.seconds as u64, waiting.status.step);
    let (operation, name, number) = (&group.operation, &group.name, inside.number);
    if missing.is_empty() && inside.on_device {
        return Some(format!(
            "rank {rank}: #{number} over {name}, which every rank has started, is not done on the device within \
             {seconds} s (step {step})"
        ));
    }
    // One that waits elsewhere is kept by somebody else.
    let culprit = missing.iter().find(|peer| peer.status.inside.is_none()).or(missing.first())?;
    let (who, last) = (culprit.who(), culprit.last());
    Some(format!(
        "rank {rank}: no {operation} #{number} over {name} from {who} within {seconds} s (step {step}); {last}"
    ))
}

impl Peer {
    fn who(&self) -> String {
        format!("rank {} (process {} on {})", self.rank, self.process, self.host)
    }

    /// Where it was last seen.
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
            Some(what) => write!(text, ", in {what}"),
            None => write!(text, ", in step {step}"),
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::Inside;
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(100);

    /// Rank `rank` of a world, in shards of two, that has entered `world` and `shard` collectives.
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
            rank,
            host: "node7".into(),
            process: 100 + rank as u32,
            silent: Duration::from_millis(300),
            lost: false,
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
    fn ranks_that_work_are_left_alone() {
        let peers = [
            peer(0, 3, 9),
            inside(peer(1, 3, 10), 1, 99.0),
            peer(2, 3, 12),
            inside(peer(3, 3, 12), 1, 500.0),
        ];
        // Rank 3 waits for nobody that has not come: MPI is moving bytes.
        assert_eq!(judge(&peers, TIMEOUT), None);
    }

    #[test]
    fn the_dead_are_named_before_the_silent_and_these_before_the_late() {
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
        peers[3].lost = true;
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.starts_with("rank 3 (process 103 on node7) has died; it last entered"), "{said}");
    }

    #[test]
    fn devices_have_a_deadline_of_their_own() {
        let on_device = |peer: Peer, number, seconds| {
            let inside = Some(Inside { group: 1, number, seconds, on_device: true });
            Peer { status: Status { inside, ..peer.status }, ..peer }
        };
        // Rank 0's device is in the 8th, though the rank has started two more.
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
    fn who_waits_elsewhere_is_not_to_blame() {
        // 0 waits in the world for 2, which waits in its shard for 3.
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
    fn what_is_slow_has_no_deadline_but_has_to_live() {
        let mut peers = [slow(peer(0, 4, 9), "save"), inside(peer(1, 5, 9), 0, 5000.0)];
        assert_eq!(judge(&peers, TIMEOUT), None);
        peers[0].silent = Duration::from_secs(200);
        let said = judge(&peers, TIMEOUT).unwrap();
        assert!(said.contains("from rank 0") && said.ends_with("in save"), "{said}");
    }
}
