//! Memory that the ranks of a group see, all being on one host: what one writes, the others read, and nobody sends it.
//!
//! The first rank makes a file without a name, which the others open through its entry in /proc and map, too. Where that is not
//! to be had, as between containers, messages do what the memory would.

use super::{CommError, Communicator, Reduce};
use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::MetadataExt,
    },
    ptr::NonNull,
};
use tch::{Device, Kind, Tensor};

/// Shared memory, zeros at first. It stays mapped until the process ends, for tensors refer to it.
#[derive(Clone, Copy)]
pub struct SharedMemory {
    first: NonNull<u8>,
    bytes: usize,
}

impl SharedMemory {
    /// `bytes` of memory of all ranks of `comm`, or none if one of them cannot have it. It is not reserved: what a system has no
    /// memory for ends a process when that writes. Collective; all are on one host.
    pub(super) fn new(comm: &dyn Communicator, bytes: usize) -> Result<Option<Self>, CommError> {
        let own = if comm.rank() == 0 { nameless(bytes).ok() } else { None };
        let name = own.as_ref().and_then(|file| Name::of(file).ok());
        let told = comm.all_gather_host(&serde_json::to_vec(&name).unwrap_or_default())?;
        let open = || serde_json::from_slice::<Option<Name>>(&told[0]).ok()??.open();
        // Open until the others have opened it, which they have when all know of each other.
        let file = own.or_else(open);
        let mapped = file.as_ref().and_then(|file| Self::map(file, bytes));
        let mut missing = [if mapped.is_none() { 1.0 } else { 0.0 }];
        comm.all_reduce_host(&mut missing, Reduce::Max)?;
        if missing[0] > 0.0 {
            if let Some(Self { first, bytes }) = mapped {
                // SAFETY: it was mapped just now, and nothing refers to it.
                unsafe { libc::munmap(first.as_ptr().cast(), bytes) };
            }
            return Ok(None);
        }
        Ok(mapped)
    }

    fn map(file: &File, bytes: usize) -> Option<Self> {
        // SAFETY: a new mapping, of a file of that length.
        let first = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        let first = NonNull::new(first.cast()).filter(|_| first != libc::MAP_FAILED)?;
        let mapped = Self { first, bytes };
        // Where the host allows them (`shmem_enabled`), large pages are put on and taken off the books in next to no time. One that
        // a range cuts goes off the books whole, or comes on them.
        mapped.advise(&(0..bytes), libc::MADV_HUGEPAGE);
        Some(mapped)
    }

    /// Where `range` begins. A range that is not part of it is a mistake of the caller.
    fn at(&self, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {}", self.bytes);
        self.first.as_ptr().wrapping_add(range.start)
    }

    /// A tensor of part of it: `[bytes]` u8.
    pub fn tensor(&self, range: &Range<usize>) -> Tensor {
        // SAFETY: the range lies in the mapping, which is never unmapped.
        unsafe { Tensor::from_blob(self.at(range), &[range.len() as i64], &[1], Kind::Uint8, Device::Cpu) }
    }

    /// Whether `tensor` lies in it.
    pub(super) fn has(&self, tensor: &Tensor) -> bool {
        let start = self.first.as_ptr().addr();
        (start..start + self.bytes).contains(&tensor.data_ptr().addr())
    }

    /// Has this process see the pages of `range` at once, rather than one after the other when they are looked at.
    pub fn fetch(&self, range: &Range<usize>) {
        self.advise(&(range.start / PAGE * PAGE..range.end), libc::MADV_POPULATE_READ);
    }

    /// Takes the pages that are wholly in `range` off this process's books. What they hold stays, and is seen again.
    pub fn release(&self, range: &Range<usize>) {
        let end = range.end / PAGE * PAGE;
        self.advise(&(range.start.next_multiple_of(PAGE).min(end)..end), libc::MADV_DONTNEED);
    }

    /// Advice is about time and books alone: a system that does not know it may refuse.
    fn advise(&self, range: &Range<usize>, advice: libc::c_int) {
        // SAFETY: the range lies in the mapping; pages of a shared file lose nothing by any of it.
        unsafe { libc::madvise(self.at(range).cast(), range.len(), advice) };
    }
}

/// How another process finds a file, and knows it from others that have its number elsewhere.
#[derive(serde::Serialize, serde::Deserialize)]
struct Name {
    path: String,
    device: u64,
    inode: u64,
}

impl Name {
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

/// Units that begin at multiples of this share no page, whatever a page is here, unless it is a large one.
pub const PAGE: usize = 1 << 16;

/// A file of `bytes` zeros in memory.
fn nameless(bytes: usize) -> io::Result<File> {
    // SAFETY: a NUL-terminated name, and a descriptor that is this process's own.
    let file = unsafe {
        match libc::memfd_create(c"xorl-dist".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(io::Error::last_os_error()),
            descriptor => File::from_raw_fd(descriptor),
        }
    };
    file.set_len(bytes as u64)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Parts, Pending, solo};

    #[test]
    fn what_was_written_is_seen_whatever_is_on_the_books() {
        let comm = solo("test");
        let shared = SharedMemory::new(&*comm, 3 * PAGE).unwrap().unwrap();
        let part = shared.tensor(&(PAGE - 5..2 * PAGE + 5));
        assert_eq!(part.sum(Kind::Int64).int64_value(&[]), 0);
        let _ = part.shallow_clone().fill_(7);
        let resident = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let header = format!("{:x}-", shared.first.as_ptr().addr());
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
        // A fault may bring in neighbours too.
        assert!(resident() >= 2 * PAGE, "there before anyone has looked");
        assert_eq!(part.sum(Kind::Int64).int64_value(&[]), 7 * (PAGE as i64 + 10));
        assert!(shared.has(&part) && !shared.has(&Tensor::from(1.0)));
        // Nothing is wholly in what is less than a page.
        let before = resident();
        shared.release(&(PAGE + 1..2 * PAGE - 1));
        assert_eq!(resident(), before);
    }

    #[test]
    #[should_panic(expected = "of 65536")]
    fn a_tensor_lies_within() {
        let _ = SharedMemory::new(&*solo("test"), PAGE).unwrap().unwrap().tensor(&(1..PAGE + 1));
    }

    /// The second of two ranks, who is told what the first says, and whether the first has the memory.
    struct Second {
        told: Vec<u8>,
        first_misses: bool,
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
            Ok(vec![self.told.clone(), bytes.to_vec()])
        }

        fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
            assert_eq!(how, Reduce::Max);
            values[0] = values[0].max(f64::from(u8::from(self.first_misses)));
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
        let file = nameless(PAGE).unwrap();
        let name = Name::of(&file).unwrap();
        let inode = name.inode.to_string();
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count()
        };
        let told = serde_json::to_vec(&Some(&name)).unwrap();
        let absent = serde_json::to_vec(&Some(Name { path: "/proc/0/fd/0".into(), ..name })).unwrap();
        let nothing = serde_json::to_vec(&None::<Name>).unwrap();
        for (told, first_misses) in [(&told, true), (&absent, false), (&nothing, true), (&vec![7], true)] {
            let second = Second { told: told.clone(), first_misses };
            assert!(SharedMemory::new(&second, PAGE).unwrap().is_none());
            assert_eq!(mapped(), 0, "what is not used is given back");
        }
        let shared = SharedMemory::new(&Second { told, first_misses: false }, PAGE).unwrap().unwrap();
        let _ = shared.tensor(&(3..5)).fill_(9);
        let mut first = [0; 6];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!((first, mapped()), ([0, 0, 0, 9, 9, 0], 1));
    }

    #[test]
    fn a_file_of_another_is_not_taken_for_it() {
        let [one, other] = [0, 1].map(|_| nameless(PAGE).unwrap());
        let name = Name::of(&one).unwrap();
        assert!(name.open().is_some());
        let path = Name::of(&other).unwrap().path;
        assert!(Name { path, ..Name::of(&one).unwrap() }.open().is_none());
        drop(one);
        assert!(name.open().is_none(), "closed");
    }
}
