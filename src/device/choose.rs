//! Which device is whose. Pure.

use super::DeviceError;
use serde::{Deserialize, Serialize};

/// What a rank sees before devices are dealt out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VisibleDevices {
    pub host: String,
    /// Which of its host's ranks it is, in the order of their world ranks.
    pub local_rank: usize,
    /// The ids of the devices that it may use, in order; none: it computes on the CPU.
    pub devices: Vec<[u8; 16]>,
    /// Whether it may share one with others of its host: see [`SHARES`].
    pub shares: bool,
}

/// The variable by which NCCL (2.30 or newer) lets ranks share a device: 1. Slow; for trying several ranks on one GPU.
pub const SHARES: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// Which of its devices rank `rank` of `all` takes: the one of its place among its host's ranks; or the only one, where the
/// launcher has given each rank its own. Ranks that may share take them in turn. `None` where all compute on the CPU.
///
/// # Errors
/// Some ranks have devices and some have none, a host has more ranks than devices, or two ranks would share one that may not.
pub fn choose(all: &[VisibleDevices], rank: usize) -> Result<Option<usize>, DeviceError> {
    let without = all.iter().position(|visible| visible.devices.is_empty());
    let with = all.iter().position(|visible| !visible.devices.is_empty());
    if let (Some(without), Some(with)) = (without, with) {
        let host = |rank: usize| all[rank].host.clone();
        return Err(DeviceError::Mixed { with, host: host(with), without, other: host(without) });
    }
    if with.is_none() {
        return Ok(None);
    }
    let index = |visible: &VisibleDevices| match visible.devices.len() {
        1 => 0,
        devices if visible.shares => visible.local_rank % devices,
        _ => visible.local_rank,
    };
    let mut taken = Vec::with_capacity(all.len());
    for (rank, visible) in all.iter().enumerate() {
        let here = || all.iter().filter(|other| other.host == visible.host).count();
        let Some(id) = visible.devices.get(index(visible)) else {
            let (host, devices) = (visible.host.clone(), visible.devices.len());
            return Err(DeviceError::TooFew { host, ranks: here(), devices });
        };
        // Ids are the same on no two hosts, but for a virtual one that was copied.
        let own = (&visible.host, *id);
        let other = taken.iter().position(|taken| *taken == own);
        if let Some(other) = other.filter(|&other| !(visible.shares && all[other].shares)) {
            if visible.devices.len() == 1 && all[other].devices.len() == 1 {
                return Err(DeviceError::TooFew { host: visible.host.clone(), ranks: here(), devices: 1 });
            }
            return Err(DeviceError::Shared { host: visible.host.clone(), ranks: (other, rank) });
        }
        taken.push(own);
    }
    Ok(all.get(rank).map(index))
}

/// A host whose ranks are no neighbours, if there is one: others come between them.
pub fn scattered(all: &[VisibleDevices]) -> Option<&str> {
    let hosts: Vec<&str> = all.iter().map(|visible| visible.host.as_str()).collect();
    let again = |&at: &usize| hosts[at] != hosts[at - 1] && hosts[..at].contains(&hosts[at]);
    (1..hosts.len()).find(again).map(|at| hosts[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_parted_are_seen() {
        let on = |hosts: &[&str]| hosts.iter().map(|host| visible(host, 0, &[])).collect::<Vec<_>>();
        assert_eq!(scattered(&on(&["a", "a", "b", "b", "c"])), None);
        assert_eq!(scattered(&on(&["a", "b", "b", "a"])), Some("a"));
        assert_eq!(scattered(&on(&["a", "b", "a", "b"])), Some("a"));
        assert_eq!(scattered(&[]), None);
    }

    fn visible(host: &str, local_rank: usize, devices: &[u8]) -> VisibleDevices {
        let devices = devices.iter().map(|&id| [id; 16]).collect();
        VisibleDevices { host: host.into(), local_rank, devices, shares: false }
    }

    fn sharing(local_rank: usize, devices: &[u8]) -> VisibleDevices {
        VisibleDevices { shares: true, ..visible("a", local_rank, devices) }
    }

    fn chosen(all: &[VisibleDevices]) -> Vec<Option<usize>> {
        (0..all.len()).map(|rank| choose(all, rank).unwrap()).collect()
    }

    fn refused(all: &[VisibleDevices]) -> String {
        choose(all, 0).unwrap_err().to_string()
    }

    #[test]
    fn ranks_of_a_host_take_its_devices_in_turn() {
        let both = |host| [visible(host, 0, &[1, 2, 3]), visible(host, 1, &[1, 2, 3])];
        assert_eq!(chosen(&[both("a"), both("b")].concat()), [Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!(chosen(&[visible("a", 0, &[]), visible("a", 1, &[])]), [None, None]);
    }

    #[test]
    fn a_device_that_the_launcher_gave_is_taken() {
        // As slurm's --gpus-per-task does.
        assert_eq!(chosen(&[visible("a", 0, &[7]), visible("a", 1, &[8])]), [Some(0), Some(0)]);
    }

    #[test]
    fn devices_are_shared_by_ranks_that_all_may() {
        assert_eq!(chosen(&[sharing(0, &[1]), sharing(1, &[1])]), [Some(0), Some(0)]);
        let three = [sharing(0, &[1, 2]), sharing(1, &[1, 2]), sharing(2, &[1, 2])];
        assert_eq!(chosen(&three), [Some(0), Some(1), Some(0)]);
        let one = refused(&[sharing(0, &[1]), visible("a", 1, &[1])]);
        assert!(one.contains("NCCL_MULTI_RANK_GPU_ENABLE"), "{one}");
    }

    #[test]
    fn what_cannot_be_dealt_is_refused() {
        let few = refused(&[visible("a", 0, &[1, 2]), visible("a", 1, &[1, 2]), visible("a", 2, &[1, 2])]);
        assert!(few.starts_with("3 ranks on a, which has 2 GPUs"), "{few}");
        let one = refused(&[visible("a", 0, &[1]), visible("a", 1, &[1])]);
        assert!(one.starts_with("2 ranks on a, which has 1 GPUs"), "{one}");
        let mixed = refused(&[visible("a", 0, &[1]), visible("b", 0, &[])]);
        assert!(mixed.contains("rank 0 on a has a GPU, rank 1 on b has none"), "{mixed}");
        // One was given a device that another takes by its place.
        let shared = refused(&[visible("a", 0, &[1, 2]), visible("a", 1, &[1])]);
        assert!(shared.contains("ranks 0 and 1 on a"), "{shared}");
    }
}
