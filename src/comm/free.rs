//! Memory that is free for each rank: of its device, or of its host, which the ranks there share.

use super::{CommError, Communicator};
use crate::device::{RankDevice, host};
use std::collections::BTreeMap;
use tch::Device;

/// Memory that is free for each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// Bytes, of the rank that has the least. `None`: a rank cannot tell.
    pub bytes: Option<u64>,
    /// It is that of devices, not of hosts.
    pub on_device: bool,
    /// So many ranks, which are not started, are supposed to be on this host.
    pub supposed: Option<usize>,
}

impl FreeMemory {
    /// The memory that is free now for each rank of `comm`, which computes on `device`; the same on every rank. Ranks
    /// of a host share what it has evenly. Collective.
    ///
    /// # Errors
    /// The driver fails, or a rank is lost.
    pub fn of_ranks(comm: &dyn Communicator, device: &RankDevice) -> Result<Self, CommError> {
        // No other rank has this rank's GPU.
        let of_gpu = || format!("GPU of rank {}", comm.rank());
        let own = on_device(device);
        let (place, bytes) = match &own {
            Ok(None) => (host::boot_id(), host::free_memory()),
            Ok(bytes) => (of_gpu(), *bytes),
            // The others have entered the collective.
            Err(_) => (of_gpu(), None),
        };
        let bytes = of_tightest(comm, &place, bytes)?;
        Ok(Self { bytes, on_device: own?.is_some(), supposed: None })
    }

    /// The memory that would be free for each of `ranks` ranks, which are not started: they are supposed to be on this
    /// host, each with a `device` like this if it is a GPU.
    ///
    /// # Errors
    /// The driver fails.
    pub fn supposed(device: &RankDevice, ranks: usize) -> Result<Self, CommError> {
        let on_device = on_device(device)?;
        let of_host = || host::free_memory().map(|bytes| bytes / ranks.max(1) as u64);
        Ok(Self { bytes: on_device.or_else(of_host), on_device: on_device.is_some(), supposed: Some(ranks) })
    }
}

/// Bytes that are free on a GPU. A stand-in for one has its tensors in host memory.
fn on_device(device: &RankDevice) -> Result<Option<u64>, CommError> {
    let memory = if device.tensors() == Device::Cpu { None } else { device.memory()? };
    Ok(memory.map(|memory| memory.free as u64))
}

/// Bytes that are free for the rank of `comm` that has the least, where this one sees `bytes` at `place`, a name that
/// ranks which share its memory have in common. The same on every rank; `None`: a rank cannot tell. Collective.
///
/// # Errors
/// A rank is lost.
pub fn of_tightest(
    comm: &dyn Communicator,
    place: &str,
    bytes: Option<u64>,
) -> Result<Option<u64>, CommError> {
    let own = format!("{}\n{place}", bytes.map_or_else(String::new, |bytes| bytes.to_string()));
    let read = |bytes: &Vec<u8>| {
        let text = String::from_utf8_lossy(bytes);
        let (bytes, place) = text.split_once('\n').unwrap_or_default();
        (place.to_owned(), bytes.parse().ok())
    };
    Ok(shared(&comm.all_gather_host(own.as_bytes())?.iter().map(read).collect::<Vec<_>>()))
}

/// The bytes that are free for a rank, where each has told the place of its memory and the bytes that are free there.
fn shared(ranks: &[(String, Option<u64>)]) -> Option<u64> {
    let mut sharing: BTreeMap<&str, u64> = BTreeMap::new();
    for (place, _) in ranks {
        *sharing.entry(place).or_default() += 1;
    }
    let each: Option<Vec<u64>> =
        ranks.iter().map(|(place, free)| Some((*free)? / sharing[&**place])).collect();
    each?.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_rank_counts_and_ranks_of_a_host_share() {
        let of = |ranks: &[(&str, Option<u64>)]| {
            let ranks: Vec<_> = ranks.iter().map(|&(place, free)| (place.to_owned(), free)).collect();
            shared(&ranks)
        };
        assert_eq!(of(&[("a", Some(90)), ("a", Some(100)), ("b", Some(48))]), Some(45));
        assert_eq!(of(&[("a", Some(90)), ("a", Some(100)), ("b", Some(40))]), Some(40));
        assert_eq!(of(&[("a", Some(90)), ("b", None)]), None);
    }

    #[test]
    fn ranks_that_are_not_started_share_this_host() {
        let of = |ranks| FreeMemory::supposed(&RankDevice::host(), ranks).unwrap();
        let (one, four) = (of(1), of(4));
        let share = four.bytes.unwrap() as f64 / one.bytes.unwrap() as f64;
        assert!((0.2..0.3).contains(&share), "{one:?} {four:?}");
        assert_eq!((four.on_device, four.supposed), (false, Some(4)));
    }
}
