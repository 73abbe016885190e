//! The choice of a device for each rank. Pure.

use super::DeviceError;
use serde::{Deserialize, Serialize};

/// The devices that a rank may use, before the choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VisibleDevices {
    pub host: String,
    /// Rank among those of its host, in the order of their world ranks.
    pub local_rank: usize,
    /// Ids of the devices, in order; none: the rank computes on the CPU.
    pub devices: Vec<[u8; 16]>,
    /// The rank may share a device with others of its host: see [`SHARES`].
    pub shares: bool,
}

/// The variable by which NCCL (2.30 or newer) lets ranks share a device: 1. Slow; for trying several ranks on one GPU.
pub const SHARES: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// Index of the device that rank `rank` of `all` uses: its local rank, or 0 where the launcher gave it one device.
/// Ranks that may share take devices round-robin. `None` where all ranks compute on the CPU.
///
/// # Errors
/// Some ranks have devices and some have none, a host has more ranks than devices, or two ranks would share a device
/// that they may not share.
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
        // Ids differ between hosts, except on copies of a virtual machine: the host is compared too.
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

/// A host whose ranks are not consecutive, if there is one.
pub fn scattered(all: &[VisibleDevices]) -> Option<&str> {
    let hosts: Vec<&str> = all.iter().map(|visible| visible.host.as_str()).collect();
    let again = |&at: &usize| hosts[at] != hosts[at - 1] && hosts[..at].contains(&hosts[at]);
    (1..hosts.len()).find(again).map(|at| hosts[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_ranks_of_a_host_are_found() {
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
    fn the_only_device_of_a_rank_is_chosen() {
        // As slurm's --gpus-per-task does.
        assert_eq!(chosen(&[visible("a", 0, &[7]), visible("a", 1, &[8])]), [Some(0), Some(0)]);
    }

    #[test]
    fn devices_are_shared_where_all_ranks_may() {
        assert_eq!(chosen(&[sharing(0, &[1]), sharing(1, &[1])]), [Some(0), Some(0)]);
        let three = [sharing(0, &[1, 2]), sharing(1, &[1, 2]), sharing(2, &[1, 2])];
        assert_eq!(chosen(&three), [Some(0), Some(1), Some(0)]);
        let one = refused(&[sharing(0, &[1]), visible("a", 1, &[1])]);
        assert!(one.contains("NCCL_MULTI_RANK_GPU_ENABLE"), "{one}");
    }

    #[test]
    fn impossible_choices_are_refused() {
        let few = refused(&[visible("a", 0, &[1, 2]), visible("a", 1, &[1, 2]), visible("a", 2, &[1, 2])]);
        assert!(few.starts_with("3 ranks on a, which has 2 GPUs"), "{few}");
        let one = refused(&[visible("a", 0, &[1]), visible("a", 1, &[1])]);
        assert!(one.starts_with("2 ranks on a, which has 1 GPUs"), "{one}");
        let mixed = refused(&[visible("a", 0, &[1]), visible("b", 0, &[])]);
        assert!(mixed.contains("rank 0 on a has a GPU, rank 1 on b has none"), "{mixed}");
        // Rank 1's only device is the one that rank 0 chooses by its local rank.
        let shared = refused(&[visible("a", 0, &[1, 2]), visible("a", 1, &[1])]);
        assert!(shared.contains("ranks 0 and 1 on a"), "{shared}");
    }
}
