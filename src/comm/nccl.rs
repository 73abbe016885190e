//! NCCL, for ranks whose tensors are on a device, through cudarc; MPI carries what is in host memory.
//!
//! Collectives run on a stream of their own ([`CommStream`]), beside what libtorch computes: a gather that was started runs under
//! the computation that follows, and [`Pending::wait`] orders what comes after it. All other collectives come between what
//! was computed before and what is computed next; no call waits on the host. The stream is one for all groups, and one
//! thread enters their collectives in the same order on every rank: of communicators that share a device NCCL demands such
//! an order on the device too.
//!
//! A communicator is made at its group's first collective of tensors, or by [`open`](Communicator::open): groups that have
//! none cost no memory. None is destroyed: that is collective, and a rank that fails would wait in it for the others. The
//! process's end gives them back.

use super::{
    CommError, Communicator, Completion, Parts, Pending, Reduce, bytes, check,
    control::{DeviceComm, GroupWatch},
    mpi::Mpi,
    parts::check_parts,
};
use crate::device::{self, CommStream, DeviceError, DeviceRuntime, Event, runtime::RawStream};
use cudarc::nccl::{
    result::{self, NcclError, NcclStatus},
    sys::{self, ncclDataType_t, ncclRedOp_t},
};
use std::{
    cell::OnceCell,
    ffi::{CStr, c_void},
    ptr::{null_mut, without_provenance_mut},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tch::{Device, Kind, Tensor};

/// What is called of NCCL.
const SYMBOLS: [&str; 13] = [
    "ncclGetVersion",
    "ncclGetUniqueId",
    "ncclCommInitRank",
    "ncclCommAbort",
    "ncclCommGetAsyncError",
    "ncclGetLastError",
    "ncclAllGather",
    "ncclReduceScatter",
    "ncclAllReduce",
    "ncclSend",
    "ncclRecv",
    "ncclGroupStart",
    "ncclGroupEnd",
];

/// Loads NCCL, if it is there and has all that is called.
pub(super) fn load() -> Result<(), DeviceError> {
    // SAFETY: loading it runs no code of ours; it stays loaded.
    unsafe {
        if !sys::is_culib_present() {
            let why = "libnccl.so cannot be loaded: launch/setup.sh links it beside torch's libnccl.so.2; or name its \
                       folder in LD_LIBRARY_PATH";
            return Err(DeviceError::Missing { what: "NCCL", why: why.into() });
        }
        device::has_symbols("NCCL", sys::culib(), &SYMBOLS)
    }
}

/// A communicator of NCCL, which the watchdog's thread looks at too.
struct Handle {
    raw: sys::ncclComm_t,
    group: String,
    aborted: AtomicBool,
}

// SAFETY: the thread that made it enters its collectives. Others only ask for its errors and abort it, which NCCL allows
// at any time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Where it was aborted the process is about to end, and this thread must not enter it again.
    fn stay_out_if_aborted(&self) {
        while self.aborted.load(Ordering::Acquire) {
            std::thread::park();
        }
    }

    fn check(&self, operation: &'static str, status: Result<NcclStatus, NcclError>) -> Result<(), CommError> {
        status.map(drop).map_err(|error| failed(operation, &self.group, self.raw, &error))
    }
}

/// The error of a call over `group`.
fn failed(operation: &'static str, group: &str, comm: sys::ncclComm_t, error: &NcclError) -> CommError {
    // SAFETY: NCCL keeps the text, and takes a communicator that is none.
    let text = unsafe {
        let text = sys::ncclGetLastError(comm);
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    CommError::Nccl { operation, group: group.to_owned(), code: format!("{:?}", error.0), text }
}

impl DeviceComm for Handle {
    fn fault(&self) -> Option<String> {
        if self.aborted.load(Ordering::Acquire) {
            return None;
        }
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives as long as self and was not aborted; see `abort`.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.raw, &raw mut state) }.result();
        let error = asked.and_then(|_| state.result()).err()?;
        Some(failed("watch", &self.group, self.raw, &error).to_string())
    }

    fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            // SAFETY: it is aborted once. The process ends after it: no collective is entered.
            let _ = unsafe { result::comm_abort(self.raw) };
        }
    }
}

pub(super) struct Nccl {
    /// The same group over MPI.
    host: Mpi,
    runtime: Arc<dyn DeviceRuntime>,
    lane: Rc<CommStream>,
    /// Where tensors are.
    device: Device,
    watch: GroupWatch,
    handle: OnceCell<Arc<Handle>>,
}

impl Nccl {
    pub(super) fn new(
        host: Mpi,
        runtime: &Arc<dyn DeviceRuntime>,
        lane: &Rc<CommStream>,
        device: Device,
        watch: GroupWatch,
    ) -> Self {
        Self { host, runtime: runtime.clone(), lane: lane.clone(), device, watch, handle: OnceCell::new() }
    }

    /// The group's communicator. Collective the first time.
    fn handle(&self) -> Result<&Handle, CommError> {
        if let Some(handle) = self.handle.get() {
            return Ok(handle);
        }
        let handle = self.connect()?;
        Ok(self.handle.get_or_init(|| handle))
    }

    fn connect(&self) -> Result<Arc<Handle>, CommError> {
        const NAME: &str = "init";
        let fail = |error: NcclError| failed(NAME, self.group(), null_mut(), &error);
        self.runtime.attach()?;
        let own = if self.rank() == 0 { result::get_uniqueid().map_err(fail).map(Some) } else { Ok(None) };
        // Also where there is none: the others wait for it.
        let bytes = own.as_ref().ok().and_then(Option::as_ref).map(|id| id.internal.map(|byte| byte as u8));
        let all = self.host.all_gather_host(bytes.as_ref().map_or(&[], |bytes| &bytes[..]))?;
        own?;
        let first: [u8; 128] =
            all.first().and_then(|id| id.as_slice().try_into().ok()).ok_or_else(|| CommError::Nccl {
                operation: NAME,
                group: self.group().to_owned(),
                code: "no unique id".into(),
                text: "the group's first rank has none and says why".into(),
            })?;
        let id = sys::ncclUniqueId { internal: first.map(|byte| byte as _) };
        let mut raw = null_mut();
        let (ranks, rank) = (self.size() as i32, self.rank() as i32);
        // SAFETY: every rank of the group is here with the same id, and with a device of its own.
        unsafe { result::comm_init_rank(&raw mut raw, ranks, id, rank) }.map_err(fail)?;
        let handle =
            Arc::new(Handle { raw, group: self.group().to_owned(), aborted: AtomicBool::new(false) });
        self.watch.look_after(handle.clone());
        Ok(handle)
    }

    /// Gives `call` to the group's stream, after what was computed so far; `call` gets the communicator and the stream.
    fn launch(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        call: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<Arc<Event>, CommError> {
        if let Some(elsewhere) = tensors.iter().find(|tensor| tensor.device() != self.device) {
            let (group, expected) = (self.group().to_owned(), self.device);
            return Err(CommError::Elsewhere { operation, group, actual: elsewhere.device(), expected });
        }
        // Connecting, and a full queue of the device, may hold the rank.
        let _entering = self.watch.on_device();
        let handle = self.handle()?;
        handle.stay_out_if_aborted();
        let done = self.lane.run(|RawStream(stream)| {
            let status = call(handle.raw, without_provenance_mut(stream));
            handle.check(operation, status)
        })?;
        let done = Arc::new(done);
        self.watch.under_way(&done);
        Ok(done)
    }
}

/// An all-gather under way.
struct Gather {
    done: Arc<Event>,
    // The device reads and writes these until it is done.
    _buffers: [Tensor; 2],
}

impl Completion for Gather {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        // What libtorch does next with their memory comes after it too.
        Ok(CommStream::join(&self.done)?)
    }
}

fn at(tensor: &Tensor) -> *mut c_void {
    tensor.data_ptr()
}

// SAFETY of every call of NCCL below: the buffers are contiguous memory of the communicator's device, of the lengths and
// types that are checked first. They stay allocated until the event that ends the call: libtorch uses their memory again
// only after it, since its stream is made to wait for that event before anybody can let go of them.
impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn group(&self) -> &str {
        self.host.group()
    }

    fn open(&self) -> Result<(), CommError> {
        let _entering = self.watch.on_device();
        self.handle().map(drop)
    }

    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError> {
        const NAME: &str = "all_gather";
        check(NAME, self.group(), "input", input, None, bytes(input))?;
        check(NAME, self.group(), "output", output, Some(input.kind()), bytes(input) * self.size())?;
        let done = self.launch(NAME, &[input, output], |comm, stream| unsafe {
            result::all_gather(at(input), at(output), bytes(input), ncclDataType_t::ncclUint8, comm, stream)
        })?;
        let _buffers = [input.shallow_clone(), output.shallow_clone()];
        Ok(Pending::new(Gather { done, _buffers }))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "reduce_scatter";
        check(NAME, self.group(), "output", output, Some(Kind::Float), bytes(output))?;
        check(NAME, self.group(), "input", input, Some(Kind::Float), bytes(output) * self.size())?;
        let (count, float, sum) = (output.numel(), ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        let done = self.launch(NAME, &[input, output], |comm, stream| unsafe {
            result::reduce_scatter(at(input), at(output), count, float, sum, comm, stream)
        })?;
        Ok(CommStream::join(&done)?)
    }

    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError> {
        const NAME: &str = "all_to_all";
        let size = self.size();
        check_parts(self.group(), self.rank(), size, sent, received)?;
        let byte = ncclDataType_t::ncclUint8;
        let done = self.launch(NAME, &[sent.rows, received.rows], |comm, stream| {
            result::group_start()?;
            let post = || {
                // Also to itself: a copy of each piece would be a start each.
                for peer in 0..size {
                    for out in sent.of(peer) {
                        unsafe { result::send(at(&out), bytes(&out), byte, peer as i32, comm, stream)? };
                    }
                    for back in received.of(peer) {
                        unsafe { result::recv(at(&back), bytes(&back), byte, peer as i32, comm, stream)? };
                    }
                }
                Ok(())
            };
            // A group that stays open would swallow what comes after it.
            let (posted, ended) = (post(), result::group_end());
            posted.and(ended)
        })?;
        Ok(CommStream::join(&done)?)
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "all_reduce";
        check(NAME, self.group(), "values", values, Some(Kind::Float), bytes(values))?;
        let (count, float, sum) = (values.numel(), ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        let done = self.launch(NAME, &[values], |comm, stream| unsafe {
            result::all_reduce(at(values), at(values), count, float, sum, comm, stream)
        })?;
        Ok(CommStream::join(&done)?)
    }

    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError> {
        self.host.all_reduce_host(values, how)
    }

    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.host.all_gather_host(bytes)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.host.barrier()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library itself, not what stands in for it in tests/nccl.rs.
    #[test]
    fn the_library_that_torch_brings_has_what_is_called() {
        load().expect("launch/setup.sh has linked libnccl.so");
        let version = result::get_nccl_version().expect("a version");
        assert!(version >= 22_700, "{version}");
        if std::path::Path::new("/dev/nvidiactl").exists() {
            return;
        }
        // It works up to where it needs a driver, and then says so.
        let id = result::get_uniqueid().expect("an id");
        let mut raw = null_mut();
        // SAFETY: one rank of one, with an id of its own.
        let error = unsafe { result::comm_init_rank(&raw mut raw, 1, id, 0) }.err().expect("no device");
        let said = failed("init", "shard", null_mut(), &error).to_string();
        assert!(said.starts_with("init over shard: ncclUnhandledCudaError of NCCL: "), "{said}");
    }
}
