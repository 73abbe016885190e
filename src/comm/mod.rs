//! Communicators: the collectives that sharding needs, over MPI, over NCCL for tensors on a device, or within one
//! process.
//!
//! Every rank of a group calls the same collectives in the same order. Tensor collectives check dtype, contiguity and
//! length before they call C. Reductions are sums in fp32; bf16 never crosses a reduction. The control mesh
//! ([`Watcher`], [`Commands`]) calls no MPI.

mod control;
mod free;
mod hosts;
mod instrumented;
mod launcher;
mod ledger;
mod mpi;
mod nccl;
mod parts;
mod shared;
mod solo;

use crate::device::{
    self, CommStream, DeviceChoice, DeviceError, RankDevice,
    choose::{SHARES, VisibleDevices},
};
use std::{ops::Range, rc::Rc};
use tch::{Device, Kind, Tensor};

#[doc(hidden)]
pub use control::read_stream;
pub use control::{
    Command, CommandError, CommandReceiver, CommandSender, Commands, Delivery, Slow,
    WINDOW as COMMAND_WINDOW, Watcher,
};
pub use free::{FreeMemory, of_tightest};
pub use ledger::{Ledger, Operation, Received};
pub use parts::Parts;
pub use shared::{PAGE, SharedMemory};

/// Failures of starting ranks and of collectives.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    #[error(
        "{variable} says {launched} ranks but MPI started {actual}: this launcher does not match the MPI library that \
         xorl-dist was built with ({library}); use that library's mpirun, or srun --mpi=pmix"
    )]
    ForeignLauncher { variable: &'static str, launched: usize, actual: usize, library: String },
    #[error("MPI could not be initialised; is it initialised already in this process?")]
    Init,
    #[error("MPI grants thread level {granted} but a loader thread beside MPI needs Funneled")]
    Threading { granted: String },
    #[error("{operation} over {group}: {what} is not contiguous")]
    NotContiguous { operation: &'static str, group: String, what: &'static str },
    #[error("{operation} over {group}: {what} has {actual} bytes, expected {expected}")]
    Length { operation: &'static str, group: String, what: &'static str, actual: usize, expected: usize },
    #[error("{operation} over {group}: {what} is cut into pieces of {actual:?} rows, expected {expected:?}")]
    Pieces {
        operation: &'static str,
        group: String,
        what: &'static str,
        actual: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("{operation} over {group}: {what} has pieces for {actual} ranks, expected {expected}")]
    Ranks { operation: &'static str, group: String, what: &'static str, actual: usize, expected: usize },
    #[error("{operation} over {group}: rows {first:?} and {second:?} of {what} overlap")]
    Overlap {
        operation: &'static str,
        group: String,
        what: &'static str,
        first: Range<usize>,
        second: Range<usize>,
    },
    #[error("{operation} over {group}: {what} holds {actual:?}, expected {expected:?}")]
    Dtype { operation: &'static str, group: String, what: &'static str, actual: Kind, expected: Kind },
    #[error("{operation} over {group}: {bytes} bytes in one message are more than MPI's count can hold")]
    TooLarge { operation: &'static str, group: String, bytes: usize },
    #[error("{operation} over {group}: MPI error code {code}")]
    Mpi { operation: &'static str, group: String, code: i32 },
    #[error("{operation} over {group}: {code} of NCCL: {text}")]
    Nccl { operation: &'static str, group: String, code: String, text: String },
    #[error("{operation} over {group}: a tensor on {actual:?}, expected on {expected:?}")]
    Elsewhere { operation: &'static str, group: String, actual: Device, expected: Device },
    #[error("a rank's list of devices cannot be read (a bug): {0}")]
    VisibleDevices(String),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl CommError {
    /// The exit code of the process: 2 for user errors (a wrong launcher, a device that is missing), 1 for failures.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::ForeignLauncher { .. } => 2,
            Self::Device(error) => error.exit_code(),
            _ => 1,
        }
    }
}

/// Reduction of host values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
}

/// A collective that was started. It keeps its buffers alive; the caller must not touch them before
/// [`wait`](Self::wait).
#[must_use = "a started collective is complete only after wait()"]
pub struct Pending(Option<Box<dyn Completion>>);

/// The backend's part of completing a started collective.
trait Completion {
    fn wait(self: Box<Self>) -> Result<(), CommError>;
}

impl Pending {
    /// A collective that is complete.
    fn done() -> Self {
        Self(None)
    }

    fn new(completion: impl Completion + 'static) -> Self {
        Self(Some(Box::new(completion)))
    }

    /// Blocks until the result is in the output buffer.
    pub fn wait(mut self) -> Result<(), CommError> {
        self.0.take().map_or(Ok(()), |completion| completion.wait())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // A transfer must not outlive its buffers, also when an error returns early.
        if let Some(completion) = self.0.take() {
            let _ = completion.wait();
        }
    }
}

/// The collectives of one group of ranks.
pub trait Communicator {
    /// Rank of this process in the group.
    fn rank(&self) -> usize;
    /// Number of ranks in the group.
    fn size(&self) -> usize;
    /// Name of the group in errors and in the ledger: `world`, `shard`, `replicate`.
    fn group(&self) -> &str;

    /// Allocates now what the first collective of tensors would allocate, while there is memory for it. Collective.
    fn open(&self) -> Result<(), CommError> {
        Ok(())
    }

    /// `bytes` of memory shared by all ranks of the group; `None` where they are on several hosts or cannot map it.
    /// Collective.
    fn share(&self, _bytes: usize) -> Result<Option<SharedMemory>, CommError> {
        Ok(None)
    }

    /// Starts an all-gather of `input` `[n]` into `output` `[size × n]`, in rank order. Any dtype.
    ///
    /// If `output` lies in shared memory, it is complete already: every rank has written its piece there, and a
    /// barrier came after that.
    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError>;

    /// Reduce-scatter: sums `input` `[size × n]` fp32 over the ranks and writes piece `rank` to `output` `[n]` fp32.
    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError>;

    /// All-to-all: sends every rank its pieces of `sent` and writes the pieces from every rank to `received`. Both
    /// sides of a transfer have the same number of pieces, of the same lengths. Rows of `received` in no piece are
    /// unchanged. Any dtype.
    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError>;

    /// All-reduce: sums `values` fp32 over the ranks in place. The bits are equal on all ranks.
    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError>;

    /// All-reduce of a few host numbers, in place.
    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError>;

    /// All-gather of host bytes, in rank order. Lengths may differ.
    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// Waits until every rank of the group has entered.
    fn barrier(&self) -> Result<(), CommError>;

    /// All-gather that returns when `output` is complete.
    fn all_gather(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        self.start_all_gather(input, output)?.wait()
    }
}

/// The ranks of this run: MPI's where a launcher started this process, otherwise this process alone.
pub struct World {
    /// Declared before `mpi`, so that it is dropped before MPI is finalised.
    control: Option<control::Control>,
    mpi: Option<mpi::Runtime>,
    launcher: launcher::Launch,
    ledger: Ledger,
    device: RankDevice,
    /// The stream of collectives on the device.
    stream: Option<Rc<CommStream>>,
    /// Warning about the placement of ranks on hosts.
    placement: Option<String>,
}

impl World {
    /// Joins the ranks that the launcher started. MPI is not initialised for one rank.
    ///
    /// # Errors
    /// MPI cannot be initialised, or the launcher started more ranks than MPI knows.
    pub fn start() -> Result<Self, CommError> {
        let launcher = launcher::detect(|name| std::env::var(name).ok());
        let ledger = Ledger::default();
        let mpi = if launcher.is_single() { None } else { Some(mpi::Runtime::start(&launcher)?) };
        let control = mpi.as_ref().map(|mpi| control::Control::open(&mpi.group("control", 0))).transpose()?;
        Ok(Self { control, mpi, launcher, ledger, device: RankDevice::host(), stream: None, placement: None })
    }

    /// Opens this rank's device. Groups made later move tensors between devices. Collective; called before the first
    /// tensor is made.
    ///
    /// # Errors
    /// A device is required and cannot be used. The error is on one rank at least; the caller ends the other ranks.
    pub fn use_device(&mut self, choice: DeviceChoice) -> Result<(), CommError> {
        let local_rank = self.local_rank();
        let own = device::visible(choice).and_then(|devices| {
            if self.mpi.is_none() || devices.is_empty() {
                return Ok(devices);
            }
            // If they differ, ranks of one host do not share memory, and would choose the same GPU.
            match launcher::local_rank(|name| std::env::var(name).ok()) {
                Some((variable, says)) if says != local_rank && devices.len() > 1 => {
                    return Err(DeviceError::LocalRank { variable, says, mpi: local_rank });
                }
                _ => nccl::load()?,
            }
            Ok(devices)
        });
        let shares = std::env::var(SHARES).is_ok_and(|value| value == "1");
        let visible = |devices| VisibleDevices { host: control::host(), local_rank, devices, shares };
        let failed = own.as_ref().err().cloned();
        let own = serde_json::to_vec(&own.ok().map(visible)).unwrap_or_default();
        let mut all = Vec::with_capacity(self.size());
        for bytes in self.group("devices", 0).all_gather_host(&own)? {
            let visible: Option<VisibleDevices> = serde_json::from_slice(&bytes)
                .map_err(|error| CommError::VisibleDevices(error.to_string()))?;
            all.extend(visible);
        }
        if let Some(error) = failed {
            return Err(error.into());
        }
        if all.len() < self.size() {
            // Another rank has failed and reports it.
            return Ok(());
        }
        self.placement = device::choose::scattered(&all).map(|host| {
            format!(
                "ranks of {host} are not neighbours: more has to cross the network than need be; start ranks host by \
                 host (Open MPI: --map-by ppr:N:node, slurm: --distribution=block)"
            )
        });
        if let Some(index) = device::choose::choose(&all, self.rank())? {
            self.device = RankDevice::open(choice, index)?;
            self.stream = self.device.runtime().map(CommStream::new).transpose()?.map(Rc::new);
        }
        Ok(())
    }

    /// This rank's device.
    pub fn device(&self) -> &RankDevice {
        &self.device
    }

    pub fn rank(&self) -> usize {
        self.mpi.as_ref().map_or(0, mpi::Runtime::rank)
    }

    pub fn size(&self) -> usize {
        self.mpi.as_ref().map_or(1, mpi::Runtime::size)
    }

    /// The rank of this process among those of its host.
    pub fn local_rank(&self) -> usize {
        self.mpi.as_ref().map_or(0, mpi::Runtime::local_rank)
    }

    /// Returns true if the launcher passes SIGTERM and SIGINT on and leaves this rank time to act on them.
    pub fn leaves_signals(&self) -> bool {
        self.launcher.leaves_signals()
    }

    /// Returns true if no launcher started this process.
    pub fn is_by_hand(&self) -> bool {
        self.launcher.is_by_hand()
    }

    /// Bytes received by the collectives of all groups.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The group of all ranks that pass the same `color`, in the order of their world ranks. Collective over all ranks.
    pub fn group(&self, name: &str, color: usize) -> Rc<dyn Communicator> {
        match (&self.mpi, &self.control) {
            (Some(runtime), Some(control)) => {
                let (host, ledger) = (runtime.group(name, color), self.ledger.clone());
                let watch = control.group(name, color);
                match self.device.runtime().zip(self.stream.as_ref()) {
                    None => Rc::new(instrumented::Instrumented { inner: host, ledger, watch }),
                    Some((driver, stream)) => {
                        let inner =
                            nccl::Nccl::new(host, driver, stream, self.device.tensors(), watch.clone());
                        Rc::new(instrumented::Instrumented { inner, ledger, watch })
                    }
                }
            }
            _ => solo(name),
        }
    }

    /// Warnings for the user about the start of the ranks.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let unwatched = self.control.as_ref().and_then(|control| control.warning.as_deref());
        let placement = self.placement.as_deref().filter(|_| self.rank() == 0);
        [unwatched, placement].into_iter().flatten()
    }

    /// The handle by which the run reports its state to the watchdog.
    pub fn watcher(&self) -> Watcher {
        self.control.as_ref().map_or_else(Watcher::default, control::Control::watcher)
    }

    /// This rank's end of the command channel: rank 0 sends, every other rank receives.
    ///
    /// # Errors
    /// This rank has no connection to rank 0; on rank 0, some rank has none.
    pub fn commands(&self) -> Result<Commands, CommandError> {
        match &self.control {
            Some(control) => control.commands(),
            None => Ok(Commands::Sender(CommandSender::solo())),
        }
    }

    /// Ends all ranks at once with `code`. The caller has printed the reason.
    pub fn abort(&self, code: i32) -> ! {
        if let Some(control) = &self.control {
            control.close();
            control.abort();
        }
        match &self.mpi {
            Some(runtime) => runtime.abort(code),
            None => std::process::exit(code),
        }
    }
}

/// A group of this process alone.
pub fn solo(name: &str) -> Rc<dyn Communicator> {
    Rc::new(solo::Solo::new(name))
}

/// The rank of this process among those of its launcher, known before MPI starts; `None` without a launcher.
pub fn launched_rank() -> Option<usize> {
    launcher::rank(|name| std::env::var(name).ok())
}

/// Version line of the MPI library that this binary is linked to.
pub fn mpi_library_version() -> String {
    mpi::library_version()
}

/// Checks dtype (`kind`), contiguity and length (`expected` bytes) of one buffer of a collective.
fn check(
    operation: &'static str,
    group: &str,
    what: &'static str,
    tensor: &Tensor,
    kind: Option<Kind>,
    expected: usize,
) -> Result<(), CommError> {
    if let Some(expected) = kind.filter(|&kind| kind != tensor.kind()) {
        return Err(CommError::Dtype {
            operation,
            group: group.into(),
            what,
            actual: tensor.kind(),
            expected,
        });
    }
    if !tensor.is_contiguous() {
        return Err(CommError::NotContiguous { operation, group: group.into(), what });
    }
    let actual = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if actual != expected {
        return Err(CommError::Length { operation, group: group.into(), what, actual, expected });
    }
    Ok(())
}

/// Length of a contiguous tensor (bytes).
fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
