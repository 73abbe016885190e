//! Memory that all ranks of a group map, where they are on one host: no rank sends what another one has written there.
//!
//! The group's first rank makes an unnamed file (memfd), which the others open through its entry in /proc and map.
//! If that is impossible, as between containers, messages do the same.

use super::{CommError, Communicator, Reduce};
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
};
use tch::{Device, Kind, Tensor};

/// Shared memory, initially zeros. It stays mapped until the process ends, because tensors refer to it.
#[derive(Clone, Copy)]
pub struct SharedMemory(&'static MmapRaw);

impl SharedMemory {
    /// Maps `bytes` of memory that all ranks of `comm` share; `None` if one of them cannot map it. The memory is not
    /// reserved: a write for which the system has none kills the process. Collective; all ranks are on one host.
    ///
    /// # Errors
    /// A collective fails.
    pub(super) fn new(comm: &dyn Communicator, bytes: usize) -> Result<Option<Self>, CommError> {
        let own = if comm.rank() == 0 { unnamed_file(bytes).ok() } else { None };
        let location = own.as_ref().and_then(|file| Location::of(file).ok());
        let all = comm.all_gather_host(&serde_json::to_vec(&location).unwrap_or_default())?;
        let open = || serde_json::from_slice::<Option<Location>>(&all[0]).ok()??.open();
        // The file stays open until all ranks have opened it: the reduction below waits for them.
        let file = own.or_else(open);
        let mapping = file.as_ref().and_then(|file| map(file, bytes));
        let mut missing = [if mapping.is_none() { 1.0 } else { 0.0 }];
        comm.all_reduce_host(&mut missing, Reduce::Max)?;
        // If a rank has none, the others drop theirs, which unmaps it.
        Ok(mapping.filter(|_| missing[0] == 0.0).map(|mapping| Self(Box::leak(Box::new(mapping)))))
    }

    /// Checks that `range` lies in the mapping. A range that does not is a bug of the caller.
    fn check(&self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.0.len(), "{range:?} of {}", self.0.len());
    }

    /// A tensor over bytes `range`: `[range.len()]` u8.
    ///
    /// # Panics
    /// The range does not lie in the memory.
    pub fn tensor(&self, range: &Range<usize>) -> Tensor {
        self.check(range);
        let start = self.0.as_mut_ptr().wrapping_add(range.start);
        // SAFETY: the range was checked to lie in the mapping, which is never unmapped.
        unsafe { Tensor::from_blob(start, &[range.len() as i64], &[1], Kind::Uint8, Device::Cpu) }
    }

    /// Returns true if the first element of `tensor` lies in it.
    pub(super) fn has(&self, tensor: &Tensor) -> bool {
        let start = self.0.as_ptr().addr();
        (start..start + self.0.len()).contains(&tensor.data_ptr().addr())
    }

    /// Maps the pages of `range` into this process now, in place of a page fault for each later.
    ///
    /// # Panics
    /// The range does not lie in the memory.
    pub fn fetch(&self, range: &Range<usize>) {
        self.check(range);
        let start = range.start / PAGE * PAGE;
        // Only time depends on it: a kernel that does not know it (before Linux 5.14) may refuse.
        let _ = self.0.advise_range(Advice::PopulateRead, start, range.end - start);
    }

    /// Drops the pages that lie wholly in `range` from RSS (MADV_DONTNEED). Their contents stay, and are mapped again
    /// on the next access.
    ///
    /// # Panics
    /// The range does not lie in the memory.
    pub fn release(&self, range: &Range<usize>) {
        self.check(range);
        let end = range.end / PAGE * PAGE;
        let start = range.start.next_multiple_of(PAGE).min(end);
        // SAFETY: pages of a shared file keep their contents in the file: after MADV_DONTNEED the next access maps them
        // again. The range was checked to lie in the mapping.
        let _ = unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
    }
}

/// Maps `bytes` of `file`, shared, for reading and writing.
fn map(file: &File, bytes: usize) -> Option<MmapRaw> {
    let mapping = MmapOptions::new().len(bytes).map_raw(file).ok()?;
    // Large pages, where the host allows them (`shmem_enabled`), make `fetch` and `release` fast. A large page that a
    // range cuts is fetched or released as a whole.
    let _ = mapping.advise(Advice::HugePage);
    Some(mapping)
}

/// The path by which another process opens a file, and the numbers that prove it is the same file.
#[derive(serde::Serialize, serde::Deserialize)]
struct Location {
    path: String,
    device: u64,
    inode: u64,
}

impl Location {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok(Self { path, device: metadata.dev(), inode: metadata.ino() })
    }

    fn open(&self) -> Option<File> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path).ok()?;
        let metadata = file.metadata().ok()?;
        (metadata.dev() == self.device && metadata.ino() == self.inode).then_some(file)
    }
}

/// Alignment of units (bytes): a multiple of every page size but that of large pages, so that two units share no page.
pub const PAGE: usize = 1 << 16;

/// An unnamed file in memory of `bytes` zeros.
fn unnamed_file(bytes: usize) -> io::Result<File> {
    let file = File::from(memfd_create(c"xorl-dist", MemfdFlags::CLOEXEC)?);
    file.set_len(bytes as u64)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Parts, Pending, solo};

    #[test]
    fn contents_outlive_their_pages_in_rss() {
        let comm = solo("test");
        let shared = SharedMemory::new(&*comm, 3 * PAGE).unwrap().unwrap();
        let part = shared.tensor(&(PAGE - 5..2 * PAGE + 5));
        assert_eq!(part.sum(Kind::Int64).int64_value(&[]), 0);
        let _ = part.shallow_clone().fill_(7);
        let resident = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let header = format!("{:x}-", shared.0.as_ptr().addr());
            let mut lines = maps.lines().skip_while(|line| !line.starts_with(&header));
            let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
        };
        let before = resident();
        shared.release(&(PAGE..2 * PAGE));
        assert!(resident() <= before - PAGE);
        assert_eq!(part.sum(Kind::Int64).int64_value(&[]), 7 * (PAGE as i64 + 10));
        shared.release(&(0..3 * PAGE));
        assert_eq!(resident(), 0);
        shared.fetch(&(PAGE..3 * PAGE));
        // A page fault may map neighbouring pages too.
        assert!(resident() >= 2 * PAGE, "mapped before the first access");
        assert_eq!(part.sum(Kind::Int64).int64_value(&[]), 7 * (PAGE as i64 + 10));
        assert!(shared.has(&part) && !shared.has(&Tensor::from(1.0)));
        // No page lies wholly in less than a page.
        let before = resident();
        shared.release(&(PAGE + 1..2 * PAGE - 1));
        assert_eq!(resident(), before);
    }

    #[test]
    #[should_panic(expected = "of 65536")]
    fn a_tensor_lies_within() {
        let _ = SharedMemory::new(&*solo("test"), PAGE).unwrap().unwrap().tensor(&(1..PAGE + 1));
    }

    /// The second of two ranks. `root_sends` is what rank 0 contributes to a gather.
    struct Second {
        root_sends: Vec<u8>,
        root_misses: bool,
    }

    impl Communicator for Second {
        fn rank(&self) -> usize {
            1
        }

        fn size(&self) -> usize {
            2
        }

        fn group(&self) -> &str {
            "test"
        }

        fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
            Ok(vec![self.root_sends.clone(), bytes.to_vec()])
        }

        fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
            assert_eq!(how, Reduce::Max);
            values[0] = values[0].max(f64::from(u8::from(self.root_misses)));
            Ok(())
        }

        fn start_all_gather(&self, _: &Tensor, _: &Tensor) -> Result<Pending, CommError> {
            unreachable!()
        }

        fn reduce_scatter(&self, _: &Tensor, _: &Tensor) -> Result<(), CommError> {
            unreachable!()
        }

        fn all_to_all(&self, _: Parts, _: Parts) -> Result<(), CommError> {
            unreachable!()
        }

        fn all_reduce(&self, _: &Tensor) -> Result<(), CommError> {
            unreachable!()
        }

        fn barrier(&self) -> Result<(), CommError> {
            unreachable!()
        }
    }

    #[test]
    fn all_ranks_have_it_or_none() {
        let file = unnamed_file(PAGE).unwrap();
        let location = Location::of(&file).unwrap();
        let inode = location.inode.to_string();
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count()
        };
        let present = serde_json::to_vec(&Some(&location)).unwrap();
        let absent = serde_json::to_vec(&Some(Location { path: "/proc/0/fd/0".into(), ..location })).unwrap();
        let nothing = serde_json::to_vec(&None::<Location>).unwrap();
        for (root_sends, root_misses) in
            [(&present, true), (&absent, false), (&nothing, true), (&vec![7], true)]
        {
            let second = Second { root_sends: root_sends.clone(), root_misses };
            assert!(SharedMemory::new(&second, PAGE).unwrap().is_none());
            assert_eq!(mapped(), 0, "an unused mapping is unmapped");
        }
        let shared =
            SharedMemory::new(&Second { root_sends: present, root_misses: false }, PAGE).unwrap().unwrap();
        let _ = shared.tensor(&(3..5)).fill_(9);
        let mut first = [0; 6];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!((first, mapped()), ([0, 0, 0, 9, 9, 0], 1));
    }

    #[test]
    fn another_file_at_the_same_path_is_refused() {
        let [one, other] = [0, 1].map(|_| unnamed_file(PAGE).unwrap());
        let location = Location::of(&one).unwrap();
        assert!(location.open().is_some());
        let path = Location::of(&other).unwrap().path;
        assert!(Location { path, ..Location::of(&one).unwrap() }.open().is_none());
        drop(one);
        assert!(location.open().is_none(), "closed");
    }
}
