//! NCCL, for tensors on a device, through cudarc. MPI carries host values.
//!
//! Collectives run on a stream of their own ([`CommStream`]), beside libtorch's. A started gather overlaps the
//! computation that follows; [`Pending::wait`] orders later computation after it. All other collectives come after
//! the computation before the call and before the computation after it. No call waits on the host. All groups share
//! the stream, and one thread enters their collectives in the same order on every rank: NCCL requires one order for
//! communicators that share a device.
//!
//! A communicator is made at the group's first tensor collective, or by [`open`](Communicator::open): groups without
//! any take no memory. None is destroyed, because that is collective: a rank that fails would wait in it for the
//! others. The end of the process frees them.

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

/// Functions of NCCL that are called.
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

/// Loads NCCL.
///
/// # Errors
/// The library cannot be loaded, or lacks one of [`SYMBOLS`].
pub(super) fn load() -> Result<(), DeviceError> {
    // SAFETY: NCCL's initialisers have no preconditions, and cudarc never unloads the library.
    unsafe {
        if !sys::is_culib_present() {
            let why = "libnccl.so cannot be loaded: launch/setup.sh links it beside torch's libnccl.so.2; or name its \
                       folder in LD_LIBRARY_PATH";
            return Err(DeviceError::Missing { what: "NCCL", why: why.into() });
        }
        device::has_symbols("NCCL", sys::culib(), &SYMBOLS)
    }
}

/// A communicator of NCCL. The control thread uses it too, for errors and to abort it.
struct Handle {
    raw: sys::ncclComm_t,
    group: String,
    aborted: AtomicBool,
}

// SAFETY: a communicator is not tied to the thread that made it.
unsafe impl Send for Handle {}
// SAFETY: one thread enters collectives. Other threads call only ncclCommGetAsyncError, ncclGetLastError and
// ncclCommAbort, which NCCL allows at the same time.
unsafe impl Sync for Handle {}

impl Handle {
    /// Parks the thread if the communicator was aborted: the process is about to end, and must not enter it again.
    fn park_if_aborted(&self) {
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
    // SAFETY: ncclGetLastError takes a null communicator too. It returns null or a NUL-terminated text that NCCL
    // keeps; the text is copied at once.
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
        // SAFETY: the communicator is never destroyed, and `aborted` shows that it was not aborted. Only the control
        // thread calls this, and an abort comes after its last call: from its own end, or after `Control::close` has
        // ended it.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.raw, &raw mut state) }.result();
        let error = asked.and_then(|_| state.result()).err()?;
        Some(failed("watch", &self.group, self.raw, &error).to_string())
    }

    fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            // SAFETY: the swap lets one call through. The process ends after it: `park_if_aborted` keeps the other
            // thread out.
            let _ = unsafe { result::comm_abort(self.raw) };
        }
    }
}

/// A group of ranks over NCCL.
pub(super) struct Nccl {
    /// The same group over MPI.
    host: Mpi,
    runtime: Arc<dyn DeviceRuntime>,
    stream: Rc<CommStream>,
    /// The device of the tensors.
    device: Device,
    watch: GroupWatch,
    /// The communicator, once it is made.
    handle: OnceCell<Arc<Handle>>,
}

impl Nccl {
    pub(super) fn new(
        host: Mpi,
        runtime: &Arc<dyn DeviceRuntime>,
        stream: &Rc<CommStream>,
        device: Device,
        watch: GroupWatch,
    ) -> Self {
        Self {
            host,
            runtime: runtime.clone(),
            stream: stream.clone(),
            device,
            watch,
            handle: OnceCell::new(),
        }
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
        // The gather is entered also without an id: the others wait in it.
        let bytes = own.as_ref().ok().and_then(Option::as_ref).map(|id| id.internal.map(|byte| byte as u8));
        let all = self.host.all_gather_host(bytes.as_ref().map_or(&[], |bytes| &bytes[..]))?;
        own?;
        let first: [u8; 128] =
            all.first().and_then(|id| id.as_slice().try_into().ok()).ok_or_else(|| CommError::Nccl {
                operation: NAME,
                group: self.group().to_owned(),
                code: "no unique id".into(),
                text: "the group's first rank has none and reports why".into(),
            })?;
        let id = sys::ncclUniqueId { internal: first.map(|byte| byte as _) };
        let mut raw = null_mut();
        let (ranks, rank) = (self.size() as i32, self.rank() as i32);
        // SAFETY: `raw` is a valid place for the communicator, and this thread's device was attached. Every rank of
        // the group makes this call with the same id and a rank of its own.
        unsafe { result::comm_init_rank(&raw mut raw, ranks, id, rank) }.map_err(fail)?;
        let handle =
            Arc::new(Handle { raw, group: self.group().to_owned(), aborted: AtomicBool::new(false) });
        self.watch.look_after(handle.clone());
        Ok(handle)
    }

    /// Enqueues a collective on the communication stream, after the computation so far. `call` gets the communicator
    /// and the stream. The event is done when the collective is.
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
        // The rank may block here, in connecting or at a full queue of the device.
        let _entering = self.watch.on_device();
        let handle = self.handle()?;
        handle.park_if_aborted();
        let done = self.stream.run(|RawStream(stream)| {
            let status = call(handle.raw, without_provenance_mut(stream));
            handle.check(operation, status)
        })?;
        let done = Arc::new(done);
        self.watch.under_way(&done);
        Ok(done)
    }
}

/// An all-gather that was started.
struct Gather {
    done: Arc<Event>,
    // The device reads and writes these until the event is done.
    _buffers: [Tensor; 2],
}

impl Completion for Gather {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        // The buffers may be freed after this: libtorch reuses their memory in the order of its stream.
        Ok(CommStream::join(&self.done)?)
    }
}

fn at(tensor: &Tensor) -> *mut c_void {
    tensor.data_ptr()
}

// Buffers of a collective stay allocated until it is done. libtorch reuses freed memory in the order of its stream,
// and that stream waits for the collective's event (`CommStream::join`) before the caller can free them.
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
        // SAFETY: both buffers were checked to be contiguous, on the communicator's device, and of these lengths.
        // `Gather` keeps them until libtorch's stream waits for the event.
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
        // SAFETY: both buffers were checked to be contiguous fp32, on the communicator's device, and of these
        // lengths. The join below keeps their memory from being reused too early.
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
                // Own pieces are sent too: copies would be a kernel launch each.
                for peer in 0..size {
                    for out in sent.of(peer) {
                        // SAFETY: `check_parts` found the tensor contiguous and the piece within it; `launch` checked
                        // the device. The join below keeps the memory from being reused too early.
                        unsafe { result::send(at(&out), bytes(&out), byte, peer as i32, comm, stream)? };
                    }
                    for back in received.of(peer) {
                        // SAFETY: as for sent pieces; received pieces do not overlap either.
                        unsafe { result::recv(at(&back), bytes(&back), byte, peer as i32, comm, stream)? };
                    }
                }
                Ok(())
            };
            // The group is closed also after an error: an open one would take in all later calls.
            let (posted, ended) = (post(), result::group_end());
            posted.and(ended)
        })?;
        Ok(CommStream::join(&done)?)
    }

    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError> {
        const NAME: &str = "all_reduce";
        check(NAME, self.group(), "values", values, Some(Kind::Float), bytes(values))?;
        let (count, float, sum) = (values.numel(), ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        // SAFETY: `values` was checked to be contiguous fp32 and on the communicator's device; NCCL reduces in place.
        // The join below keeps the memory from being reused too early.
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

    /// Tests the real library; tests/nccl.rs uses a stand-in.
    #[test]
    fn the_library_of_torch_has_all_functions_that_are_called() {
        load().expect("launch/setup.sh has linked libnccl.so");
        let version = result::get_nccl_version().expect("a version");
        assert!(version >= 22_700, "{version}");
        if std::path::Path::new("/dev/nvidiactl").exists() {
            return;
        }
        // Without a driver it fails where it needs one, with an error.
        let id = result::get_uniqueid().expect("an id");
        let mut raw = null_mut();
        // SAFETY: `raw` is a valid place for the communicator. The group has one rank and an id of its own.
        let error = unsafe { result::comm_init_rank(&raw mut raw, 1, id, 0) }.err().expect("no device");
        let said = failed("init", "shard", null_mut(), &error).to_string();
        assert!(said.starts_with("init over shard: ncclUnhandledCudaError of NCCL: "), "{said}");
    }
}
