//! MPI, for ranks whose tensors are in host memory. All calls come from the thread that started MPI.
//!
//! The fp32 reduce-scatter is pairwise exchange and add: `MPI_Reduce_scatter_block` was measured eight times
//! slower with Open MPI 4.1. The all-to-all is pairwise too: `MPI_Alltoallv` counts and places in C ints. Gathers are byte copies, so MPI needs no bf16 type.

use super::{
    CommError, Communicator, Completion, Parts, Pending, Reduce, bytes, check, check_rows, launcher::Launch,
    rows_of,
};
use mpi::{
    Threading,
    collective::SystemOperation,
    ffi,
    topology::{Color, SimpleCommunicator},
    traits::{AsRaw, Communicator as _, CommunicatorCollectives as _},
};
use std::{ffi::c_void, mem::MaybeUninit};
use tch::{Kind, Tensor};

/// MPI, initialised for as long as this value lives.
pub(super) struct Runtime {
    universe: mpi::environment::Universe,
}

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
        Ok(Self { universe })
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
        Mpi { comm, group: name.to_owned() }
    }

    /// This rank's place among the ranks of its host.
    pub(super) fn local_rank(&self) -> usize {
        let world = self.universe.world();
        world.split_shared(world.rank()).rank() as usize
    }

    pub(super) fn abort(&self, code: i32) -> ! {
        self.universe.world().abort(code)
    }
}

/// First line of what the linked MPI library says of itself.
pub(super) fn library_version() -> String {
    mpi::environment::library_version()
        .ok()
        .and_then(|text| text.lines().next().map(|line| line.trim_end_matches('\0').trim().to_owned()))
        .unwrap_or_else(|| "unknown MPI".into())
}

pub(super) struct Mpi {
    comm: SimpleCommunicator,
    group: String,
}

impl Mpi {
    fn ok(&self, operation: &'static str, code: i32) -> Result<(), CommError> {
        if code == ffi::MPI_SUCCESS as i32 {
            return Ok(());
        }
        Err(CommError::Mpi { operation, group: self.group.clone(), code })
    }

    /// MPI counts are C ints: long messages are counted in larger units. Returns (count, datatype).
    fn count(&self, operation: &'static str, bytes: usize) -> Result<(i32, ffi::MPI_Datatype), CommError> {
        // SAFETY: these are handles that MPI defines; reading them has no precondition after MPI_Init.
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

    /// Sends `sent` to rank `to` while `received` is filled by rank `from`.
    fn exchange(
        &self,
        operation: &'static str,
        (sent, to): (&Tensor, usize),
        (received, from): (&Tensor, usize),
    ) -> Result<(), CommError> {
        let (send_count, send_type) = self.count(operation, bytes(sent))?;
        let (receive_count, receive_type) = self.count(operation, bytes(received))?;
        // SAFETY: callers pass contiguous host memory that does not overlap; its lengths are those counted.
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
        self.ok(operation, code)
    }
}

/// A non-blocking all-gather in flight.
struct Gather {
    request: ffi::MPI_Request,
    // The library reads and writes these until the request completes.
    _buffers: [Tensor; 2],
    group: String,
}

impl Completion for Gather {
    fn wait(mut self: Box<Self>) -> Result<(), CommError> {
        // SAFETY: the request comes from MPI_Iallgather, is waited for once, and its buffers are alive in self.
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

    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError> {
        const NAME: &str = "all_gather";
        check(NAME, &self.group, "input", input, None, bytes(input))?;
        check(NAME, &self.group, "output", output, Some(input.kind()), bytes(input) * self.size())?;
        let (count, datatype) = self.count(NAME, bytes(input))?;
        let mut request = MaybeUninit::uninit();
        // SAFETY: both buffers are contiguous host memory of the lengths just checked; `Gather` keeps them alive
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
        // SAFETY: MPI_Iallgather succeeded, so it has written the request.
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
        let received = Tensor::empty([n as i64], (Kind::Float, output.device()));
        for distance in 1..size {
            let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
            self.exchange(NAME, (&piece(to), to), (&received, from))?;
            let _ = sum.g_add_(&received);
        }
        Ok(())
    }

    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError> {
        let (rank, size) = (self.rank(), self.size());
        check_rows(&self.group, rank, size, sent, received)?;
        rows_of(received, rank).copy_(&rows_of(sent, rank));
        for distance in 1..size {
            let (to, from) = ((rank + distance) % size, (rank + size - distance) % size);
            self.exchange("all_to_all", (&rows_of(sent, to), to), (&rows_of(received, from), from))?;
        }
        Ok(())
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "all_reduce";
        check(NAME, &self.group, "values", values, Some(Kind::Float), bytes(values))?;
        let too_large =
            || CommError::TooLarge { operation: NAME, group: self.group.clone(), bytes: bytes(values) };
        let count = i32::try_from(values.numel()).map_err(|_| too_large())?;
        let copy = values.copy();
        // SAFETY: `copy` and `values` are separate contiguous host buffers of `count` floats.
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
        // Padded to the longest: a host gather is for messages of a few kilobytes.
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
