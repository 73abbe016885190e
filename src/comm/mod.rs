//! Communicators: the collectives that sharding needs, over MPI, over NCCL where tensors are on a device, or over nothing (a
//! lone process).
//!
//! Every rank of a group calls the same collectives in the same order. Tensor collectives check dtype,
//! contiguity and length before they call C. Reductions are sums in fp32; bf16 never crosses a reduction.

mod control;
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

pub use control::{
    Command, CommandError, CommandReceiver, CommandSender, Commands, Delivery, Slow,
    WINDOW as COMMAND_WINDOW, Watcher,
};
pub use ledger::{Ledger, Operation, Received};
pub use parts::Parts;
pub use shared::{PAGE, SharedMemory};

/// Why ranks could not be started or a collective could not be entered.
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
    #[error("the ranks do not understand what one of them says of its devices (a bug): {0}")]
    VisibleDevices(String),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl CommError {
    /// A wrong launcher and a device that cannot be had are the user's to mend, anything else is a failure.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::ForeignLauncher { .. } => 2,
            Self::Device(error) => error.exit_code(),
            _ => 1,
        }
    }
}

/// How small host values are combined over a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
}

/// A collective that was started; its buffers stay alive, and must not be touched, until it is waited for.
#[must_use = "a started collective is complete only after wait()"]
pub struct Pending(Option<Box<dyn Completion>>);

/// What a backend has to do to complete a started collective.
trait Completion {
    fn wait(self: Box<Self>) -> Result<(), CommError>;
}

impl Pending {
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
        // A transfer in flight must not outlive its buffers, also when an error unwinds past it.
        if let Some(completion) = self.0.take() {
            let _ = completion.wait();
        }
    }
}

/// The collectives of one group of ranks.
pub trait Communicator {
    /// This process's rank in the group.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn size(&self) -> usize;
    /// The group's name in errors and in the ledger: `world`, `shard`, `replicate`.
    fn group(&self) -> &str;

    /// Makes now what the first collective of tensors would make, while there is memory for it. Collective.
    fn open(&self) -> Result<(), CommError> {
        Ok(())
    }

    /// Memory of so many bytes that all ranks of the group see, where they are on one host and can. Collective.
    fn share(&self, _bytes: usize) -> Result<Option<SharedMemory>, CommError> {
        Ok(None)
    }

    /// Starts gathering `input` `[bytes]` of every rank into `output` `[size × bytes]`, in rank order. Any dtype.
    ///
    /// Where `output` is shared, the pieces are in it already: each rank has written its own, and knows from a barrier that the
    /// others have.
    fn start_all_gather(&self, input: &Tensor, output: &Tensor) -> Result<Pending, CommError>;

    /// Sums `input` `[size × n]` fp32 over the ranks and leaves piece `rank` in `output` `[n]` fp32.
    fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError>;

    /// Sends each rank its pieces of `sent`, and leaves in `received` those that came from each, which has to send as many of
    /// the same lengths. What is in no piece stays as it is. Any dtype.
    fn all_to_all(&self, sent: Parts, received: Parts) -> Result<(), CommError>;

    /// Sums `values` fp32 over the ranks in place; every rank ends with the same bits.
    fn all_reduce(&self, values: &Tensor) -> Result<(), CommError>;

    /// Combines a few host numbers in place.
    fn all_reduce_host(&self, values: &mut [f64], how: Reduce) -> Result<(), CommError>;

    /// Every rank's bytes, in rank order; lengths may differ.
    fn all_gather_host(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// Waits until every rank is here.
    fn barrier(&self) -> Result<(), CommError>;

    /// Gathers `input` of every rank into `output` and waits.
    fn all_gather(&self, input: &Tensor, output: &Tensor) -> Result<(), CommError> {
        self.start_all_gather(input, output)?.wait()
    }
}

/// The processes of this run: MPI when a launcher started us, a lone process otherwise.
pub struct World {
    /// Ends before MPI does.
    control: Option<control::Control>,
    mpi: Option<mpi::Runtime>,
    launcher: launcher::Launch,
    ledger: Ledger,
    device: RankDevice,
    /// The stream of collectives on the device.
    stream: Option<Rc<CommStream>>,
    /// What the user should know of where ranks are.
    placement: Option<String>,
}

impl World {
    /// Joins the ranks that the launcher started. A lone process never touches MPI.
    pub fn start() -> Result<Self, CommError> {
        let launcher = launcher::detect(|name| std::env::var(name).ok());
        let ledger = Ledger::default();
        let mpi = if launcher.is_lone() { None } else { Some(mpi::Runtime::start(&launcher)?) };
        let control = mpi.as_ref().map(|mpi| control::Control::open(&mpi.group("control", 0))).transpose()?;
        Ok(Self { control, mpi, launcher, ledger, device: RankDevice::host(), stream: None, placement: None })
    }

    /// Finds this rank's device. Groups that are made from now on move tensors between devices. Collective; before the
    /// first tensor.
    ///
    /// # Errors
    /// A device is asked for and cannot be had. Then all ranks have an error, or one has, and the others have to be told.
    pub fn use_device(&mut self, choice: DeviceChoice) -> Result<(), CommError> {
        let local_rank = self.mpi.as_ref().map_or(0, mpi::Runtime::local_rank);
        let own = device::visible(choice).and_then(|devices| {
            if self.mpi.is_none() || devices.is_empty() {
                return Ok(devices);
            }
            // Where they disagree, ranks of one host do not see each other's memory, and would take the same GPU.
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
        let told = serde_json::to_vec(&own.ok().map(visible)).unwrap_or_default();
        let mut all = Vec::with_capacity(self.size());
        for told in self.group("devices", 0).all_gather_host(&told)? {
            let visible: Option<VisibleDevices> = serde_json::from_slice(&told)
                .map_err(|error| CommError::VisibleDevices(error.to_string()))?;
            all.extend(visible);
        }
        if let Some(error) = failed {
            return Err(error.into());
        }
        if all.len() < self.size() {
            // Others have failed, and say so.
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

    /// What this rank computes on.
    pub fn device(&self) -> &RankDevice {
        &self.device
    }

    pub fn rank(&self) -> usize {
        self.mpi.as_ref().map_or(0, mpi::Runtime::rank)
    }

    pub fn size(&self) -> usize {
        self.mpi.as_ref().map_or(1, mpi::Runtime::size)
    }

    /// Whether SIGTERM and SIGINT come to this rank as they are sent, with time to act on them.
    pub fn leaves_signals(&self) -> bool {
        self.launcher.leaves_signals()
    }

    /// Whether no launcher started this process.
    pub fn is_by_hand(&self) -> bool {
        self.launcher.is_by_hand()
    }

    /// The bytes that collectives of any group have received.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The group of ranks that pass the same `color`, ordered by world rank. Collective over all ranks.
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

    /// What the user should know of how the ranks were joined.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let unwatched = self.control.as_ref().and_then(|control| control.warning.as_deref());
        let placement = self.placement.as_deref().filter(|_| self.rank() == 0);
        [unwatched, placement].into_iter().flatten()
    }

    /// What a run tells the watchdog of itself.
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

    /// Ends all ranks at once with `code`. What the failing rank had to say must be on stderr already.
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

/// A group of this process alone: nothing moves.
pub fn solo(name: &str) -> Rc<dyn Communicator> {
    Rc::new(solo::Solo::new(name))
}

/// The version line of the MPI library that this binary is linked to.
pub fn mpi_library_version() -> String {
    mpi::library_version()
}

/// Checks one buffer of a collective.
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

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
