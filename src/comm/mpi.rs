//! MPI, for tensors in host memory. All calls come from the thread that initialised MPI.
//!
//! The fp32 reduce-scatter is a pairwise exchange and add: `MPI_Reduce_scatter_block` was measured eight times slower
//! with Open MPI 4.1. The all-to-all is a message per piece, because the counts and offsets of `MPI_Alltoallv` are C
//! ints. Gathers are byte copies, so MPI needs no bf16 type. Over several hosts they take the route of
//! [`hosts`](super::hosts).

use super::{
    CommError, Communicator, Completion, Parts, Pending, Reduce, bytes, check,
    hosts::{Hop, Round, Route},
    launcher::Launch,
    parts::{check_parts, copy_own},
    shared::SharedMemory,
};
use crate::buffers::Buffer;
use mpi::{
    Threading,
    collective::SystemOperation,
    ffi,
    topology::{Color, SimpleCommunicator},
    traits::{AsRaw, Communicator as _, CommunicatorCollectives as _},
};
use std::{cell::RefCell, ffi::c_void, mem::MaybeUninit, rc::Rc};
use tch::{Kind, Tensor};

/// MPI, initialised. It is finalised when this is dropped.
pub(super) struct Runtime {
    universe: mpi::environment::Universe,
    local_rank: usize,
    /// This rank's host, as the lowest world rank on it.
    host: usize,
}

/// Variable for tests on one machine: this many consecutive ranks count as one host.
const RANKS_PER_HOST: &str = "XORL_RANKS_PER_HOST";

impl Runtime {
    pub(super) fn start(launch: &Launch) -> Result<Self, CommError> {
        let (universe, granted) =
            mpi::initialize_with_threading(Threading::Funneled).ok_or(CommError::Init)?;
        if granted < Threading::Funneled {
            return Err(CommError::Threading { granted: format!("{granted:?}") });
        }
        let actual = universe.world().size() as usize;
        if let Some((variable, launched)) = launch.contradicts(actual) {
            return Err(CommError::ForeignLauncher {
                variable,
                launched,
                actual,
                library: library_version(),
            });
        }
        let world = universe.world();
        let rank = world.rank() as usize;
        let neighbours = world.split_shared(world.rank());
        let mut first = vec![0u64; neighbours.size() as usize];
        neighbours.all_gather_into(&(rank as u64), &mut first[..]);
        let pretended = std::env::var(RANKS_PER_HOST).ok().and_then(|text| text.parse::<usize>().ok());
        let host = match pretended.filter(|&ranks| ranks > 0) {
            Some(ranks) => rank / ranks * ranks,
            None => first.first().map_or(rank, |&first| first as usize),
        };
        let local_rank = neighbours.rank() as usize;
        Ok(Self { universe, local_rank, host })
    }

    pub(super) fn rank(&self) -> usize {
        self.universe.world().rank() as usize
    }

    pub(super) fn size(&self) -> usize {
        self.universe.world().size() as usize
    }

    pub(super) fn group(&self, name: &str, color: usize) -> Mpi {
        let color = Color::with_value(color as i32);
        let Some(comm) = self.universe.world().split_by_color(color) else {
            unreachable!("a rank that gives a color is in the group of that color");
        };
        let mut hosts = vec![0u64; comm.size() as usize];
        comm.all_gather_into(&(self.host as u64), &mut hosts[..]);
        let hosts: Vec<usize> = hosts.into_iter().map(|host| host as usize).collect();
        let route = Route::new(&hosts, comm.rank() as usize).map(Rc::new);
        let on_one_host = hosts.iter().all(|&host| host == self.host);
        Mpi { comm: Rc::new(comm), group: name.to_owned(), route, on_one_host, shared: Rc::default() }
    }

    /// Rank of this process among those of its host.
    pub(super) fn local_rank(&self) -> usize {
        self.local_rank
    }

    pub(super) fn abort(&self, code: i32) -> ! {
        self.universe.world().abort(code)
    }
}

/// First line of the version text of the linked MPI library.
pub(super) fn library_version() -> String {
    mpi::environment::library_version()
        .ok()
        .and_then(|text| text.lines().next().map(|line| line.trim_end_matches('\0').trim().to_owned()))
        .unwrap_or_else(|| "unknown MPI".into())
}

/// A group of ranks over MPI.
#[derive(Clone)]
pub(super) struct Mpi {
    comm: Rc<SimpleCommunicator>,
    group: String,
    /// Route of all-gathers, where the group is on several hosts.
    route: Option<Rc<Route>>,
    on_one_host: bool,
    /// Memory that the group shares.
    shared: Rc<RefCell<Vec<SharedMemory>>>,
}

impl Mpi {
    /// The error of MPI's return `code`, if it is one.
    fn ok(&self, operation: &'static str, code: i32) -> Result<(), CommError> {
        if code == ffi::MPI_SUCCESS as i32 {
            return Ok(());
        }
        Err(CommError::Mpi { operation, group: self.group.clone(), code })
    }

    /// (count, datatype) of a message of `bytes`. MPI counts are C ints, so long messages are counted in larger units.
    fn count(&self, operation: &'static str, bytes: usize) -> Result<(i32, ffi::MPI_Datatype), CommError> {
        // SAFETY: the handles are constants of MPI after MPI_Init, which came before any group. They are only read.
        let units = unsafe { [(1, ffi::RSMPI_UINT8_T), (4, ffi::RSMPI_UINT32_T), (8, ffi::RSMPI_UINT64_T)] };
        for (unit, datatype) in units {
            if bytes.is_multiple_of(unit)
                && let Ok(count) = i32::try_from(bytes / unit)
            {
                return Ok((count, datatype));
            }
        }
        Err(CommError::TooLarge { operation, group: self.group.clone(), bytes })
    }

    /// One exchange of a reduce-scatter: sends `sent` to rank `to` and receives `received` from rank `from`. Both are
    /// contiguous host memory and do not overlap.
    fn exchange(
        &self,
        (sent, to): (&Tensor, usize),
        (received, from): (&Tensor, usize),
    ) -> Result<(), CommError> {
        const NAME: &str = "reduce_scatter";
        let (send_count, send_type) = self.count(NAME, bytes(sent))?;
        let (receive_count, receive_type) = self.count(NAME, bytes(received))?;
        // SAFETY: `reduce_scatter`, the only caller, passes contiguous host tensors: a piece of its input and a
        // buffer of its own. The counts are their lengths, and the call returns after both transfers.
        let code = unsafe {
            ffi::MPI_Sendrecv(
                sent.data_ptr() as *const c_void,
                send_count,
                send_type,
                to as i32,
                0,
                received.data_ptr(),
                receive_count,
                receive_type,
                from as i32,
                0,
                self.comm.as_raw(),
                ffi::RSMPI_STATUS_IGNORE,
            )
        };
        self.ok(NAME, code)
    }
}

/// Message tags: the two rounds of an all-gather over hosts, and an all-to-all. `exchange` uses 0.
const ACROSS: i32 = 1;
const WITHIN: i32 = 2;
const PIECE: i32 = 3;

/// A contiguous piece of host memory, to or from rank `peer`.
struct Message {
    at: *mut c_void,
    count: i32,
    datatype: ffi::MPI_Datatype,
    peer: i32,
}

/// Messages that were started.
struct Messages {
    operation: &'static str,
    group: String,
    requests: Vec<ffi::MPI_Request>,
    /// The tensors whose memory they read and write.
    _memory: Vec<Tensor>,
}

impl Messages {
    /// Starts all. Between two ranks, messages match in the order of the lists.
    ///
    /// # Safety
    /// Every piece lies in one of `memory`, with the length that it counts. Received pieces overlap no other piece. The
    /// caller does not write sent pieces, nor touch received ones, before [`wait`](Self::wait) returns.
    unsafe fn start(
        mpi: &Mpi,
        operation: &'static str,
        tag: i32,
        memory: Vec<Tensor>,
        received: impl Iterator<Item = Message>,
        sent: impl Iterator<Item = Message>,
    ) -> Result<Self, CommError> {
        let mut all = Self { operation, group: mpi.group.clone(), requests: Vec::new(), _memory: memory };
        let comm = mpi.comm.as_raw();
        let mut codes = Vec::new();
        let mut post = |post: &dyn Fn(*mut ffi::MPI_Request) -> i32| {
            // SAFETY: the handle is a constant of MPI after MPI_Init. It is only read.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            codes.push(post(&raw mut request));
            all.requests.push(request);
        };
        for Message { at, count, datatype, peer } in received {
            // SAFETY: the caller promises that the piece is valid and written by nothing else. `all` keeps its memory
            // alive, and waits for the request when it is dropped.
            post(&|request| unsafe { ffi::MPI_Irecv(at, count, datatype, peer, tag, comm, request) });
        }
        for Message { at, count, datatype, peer } in sent {
            // SAFETY: the caller promises that the piece is valid and only read. `all` keeps its memory alive, and
            // waits for the request when it is dropped.
            post(&|request| unsafe { ffi::MPI_Isend(at, count, datatype, peer, tag, comm, request) });
        }
        codes.into_iter().try_for_each(|code| mpi.ok(operation, code))?;
        Ok(all)
    }

    /// Starts the messages of `round`, each a piece of `whole` with (count, datatype).
    fn of_round(
        mpi: &Mpi,
        round: &Round,
        tag: i32,
        whole: &Tensor,
        (count, datatype): (i32, ffi::MPI_Datatype),
    ) -> Result<Self, CommError> {
        let bytes_of_piece = bytes(whole) / mpi.size();
        let start = whole.data_ptr().cast::<u8>();
        let message = |hop: &Hop| {
            let at = start.wrapping_add(hop.piece * bytes_of_piece).cast();
            Message { at, count, datatype, peer: hop.peer as i32 }
        };
        let (received, sent) = (round.received.iter().map(message), round.sent.iter().map(message));
        // SAFETY: every piece is one of `size` equal parts of `whole`. A route receives each piece once and sends
        // only pieces that are complete. The caller touches none of them before the wait (contract of `Pending`).
        unsafe { Self::start(mpi, "all_gather", tag, vec![whole.shallow_clone()], received, sent) }
    }

    /// Waits for all, also after an error: their memory is freed afterwards.
    fn wait(&mut self) -> Result<(), CommError> {
        // SAFETY: the requests come from MPI_Irecv and MPI_Isend, and `drain` gives each out once. Their memory is
        // alive in self.
        let wait = |mut request| unsafe { ffi::MPI_Wait(&mut request, ffi::RSMPI_STATUS_IGNORE) };
        let codes: Vec<i32> = self.requests.drain(..).map(wait).collect();
        match codes.into_iter().find(|&code| code != ffi::MPI_SUCCESS as i32) {
            Some(code) => Err(CommError::Mpi { operation: self.operation, group: self.group.clone(), code }),
            None => Ok(()),
        }
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}

/// An all-gather over hosts, in its first round.
struct HostGather {
    across: Messages,
    /// The output, whose pieces the second round sends and receives.
    whole: Tensor,
    mpi: Mpi,
    route: Rc<Route>,
    piece: (i32, ffi::MPI_Datatype),
}

impl Completion for HostGather {
    fn wait(mut self: Box<Self>) -> Result<(), CommError> {
        self.across.wait()?;
        Messages::of_round(&self.mpi, &self.route.within, WITHIN, &self.whole, self.piece)?.wait()
    }
}

/// A non-blocking all-gather that was started.
struct Gather {
    request: ffi::MPI_Request,
    // MPI reads and writes these until the request completes.
    _buffers: [Tensor; 2],
    group: String,
}

impl Completion for Gather {
    fn wait(mut self: Box<Self>) -> Result<(), CommError> {
        // SAFETY: the request comes from MPI_Iallgather. `wait` consumes self, so this is the only wait, and self
        // keeps the buffers alive until it returns.
        let code = unsafe { ffi::MPI_Wait(&mut self.request, ffi::RSMPI_STATUS_IGNORE) };
        if code == ffi::MPI_SUCCESS as i32 {
            return Ok(());
        }
        Err(CommError::Mpi { operation: "all_gather", group: self.group.clone(), code })
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.comm.rank() as usize
    }

    fn size(&self) -> usize {
        self.comm.size() as usize
    }

    fn group(&self) -> &str {
        &self.group
    }

    fn share(&self, bytes: usize) -> Result<Option<SharedMemory>, CommError> {
        if !self.on_one_host || bytes == 0 {
            return Ok(None);
        }
        let shared = SharedMemory::new(self, bytes)?;
        self.shared.borrow_mut().extend(shared);
        Ok(shared)
    }

    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError> {
        const NAME: &str = "all_gather";
        check(NAME, &self.group, "input", input, None, bytes(input))?;
        check(NAME, &self.group, "output", output, Some(input.kind()), bytes(input) * self.size())?;
        if self.shared.borrow().iter().any(|shared| shared.has(output)) {
            return Ok(Pending::done());
        }
        let (count, datatype) = self.count(NAME, bytes(input))?;
        if let Some(route) = &self.route {
            // The own piece is copied here: the route moves pieces within `output`.
            let n = input.numel() as i64;
            output.view([-1]).narrow(0, self.rank() as i64 * n, n).copy_(&input.view([-1]));
            let (mpi, piece) = (self.clone(), (count, datatype));
            let across = Messages::of_round(self, &route.across, ACROSS, output, piece)?;
            let (whole, route) = (output.shallow_clone(), route.clone());
            return Ok(Pending::new(HostGather { across, whole, mpi, route, piece }));
        }
        let mut request = MaybeUninit::uninit();
        // SAFETY: both buffers are contiguous host memory of the lengths just checked. `Gather` keeps them alive
        // until the request has completed, and the caller does not touch them before (contract of `Pending`).
        let code = unsafe {
            ffi::MPI_Iallgather(
                input.data_ptr() as *const c_void,
                count,
                datatype,
                output.data_ptr(),
                count,
                datatype,
                self.comm.as_raw(),
                request.as_mut_ptr(),
            )
        };
        self.ok(NAME, code)?;
        // SAFETY: MPI_Iallgather returned success, which `ok` checked, so it has written the request.
        let request = unsafe { request.assume_init() };
        let buffers = [input.shallow_clone(), output.shallow_clone()];
        Ok(Pending::new(Gather { request, _buffers: buffers, group: self.group.clone() }))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "reduce_scatter";
        let (rank, size) = (self.rank(), self.size());
        check(NAME, &self.group, "output", output, Some(Kind::Float), bytes(output))?;
        check(NAME, &self.group, "input", input, Some(Kind::Float), bytes(output) * size)?;
        let n = output.numel();
        let piece = |peer: usize| input.narrow(0, (peer * n) as i64, n as i64);
        let mut sum = output.shallow_clone();
        sum.copy_(&piece(rank));
        let received = Buffer::like(output);
        for distance in 1..size {
            let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
            self.exchange((&piece(to), to), (&received, from))?;
            let _ = sum.g_add_(&received);
        }
        Ok(())
    }

    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError> {
        const NAME: &str = "all_to_all";
        let (rank, size) = (self.rank(), self.size());
        check_parts(&self.group, rank, size, sent, received)?;
        let messages = |parts: Parts, peers: &dyn Fn(usize) -> usize| {
            let with = |peer: usize| parts.of(peer).map(move |piece| (peer, piece));
            let message = |(peer, piece): (usize, Tensor)| {
                let (count, datatype) = self.count(NAME, bytes(&piece))?;
                Ok(Message { at: piece.data_ptr(), count, datatype, peer: peer as i32 })
            };
            (1..size).map(peers).flat_map(with).map(message).collect::<Result<Vec<_>, CommError>>()
        };
        // Each rank starts with a different peer.
        let to = messages(sent, &|distance| (rank + distance) % size)?;
        let from = messages(received, &|distance| (rank + size - distance) % size)?;
        let memory = vec![sent.rows.shallow_clone(), received.rows.shallow_clone()];
        // SAFETY: `check_parts` found both tensors contiguous, every piece within them, and received pieces without
        // overlap. The messages are complete before this function returns.
        let mut started =
            unsafe { Messages::start(self, NAME, PIECE, memory, from.into_iter(), to.into_iter())? };
        copy_own(rank, sent, received);
        started.wait()
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "all_reduce";
        check(NAME, &self.group, "values", values, Some(Kind::Float), bytes(values))?;
        let too_large =
            || CommError::TooLarge { operation: NAME, group: self.group.clone(), bytes: bytes(values) };
        let count = i32::try_from(values.numel()).map_err(|_| too_large())?;
        let copy = values.copy();
        // SAFETY: `copy` is a new tensor, and `values` was checked to be contiguous fp32. Both hold `count` floats in
        // host memory, and the call returns after the reduction.
        let code = unsafe {
            ffi::MPI_Allreduce(
                copy.data_ptr() as *const c_void,
                values.data_ptr(),
                count,
                ffi::RSMPI_FLOAT,
                ffi::RSMPI_SUM,
                self.comm.as_raw(),
            )
        };
        self.ok(NAME, code)?;
        Ok(())
    }

    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
        let mine = values.to_vec();
        let operation = match how {
            Reduce::Sum => SystemOperation::sum(),
            Reduce::Max => SystemOperation::max(),
        };
        self.comm.all_reduce_into(&mine[..], values, operation);
        Ok(())
    }

    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let mut lengths = vec![0u64; self.size()];
        self.comm.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
        // All are padded to the longest: host gathers are for a few kilobytes.
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if longest == 0 {
            return Ok(vec![Vec::new(); self.size()]);
        }
        self.count("all_gather_host", longest)?;
        let mut mine = bytes.to_vec();
        mine.resize(longest, 0);
        let mut all = vec![0u8; longest * self.size()];
        self.comm.all_gather_into(&mine[..], &mut all[..]);
        Ok(all.chunks_exact(longest).zip(&lengths).map(|(chunk, &n)| chunk[..n as usize].to_vec()).collect())
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.comm.barrier();
        Ok(())
    }
}
