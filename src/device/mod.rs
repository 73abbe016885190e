//! The device of a rank: its choice ([`choose`], pure), its driver ([`runtime`] is the interface, [`driver`] calls
//! CUDA), the communication stream ([`CommStream`]), staging memory ([`staging`]), kernels ([`kernels`]), libtorch's
//! CUDA library ([`torch`]), and the memory of the host ([`host`]).

pub mod choose;
mod comm_stream;
pub mod driver;
pub mod host;
pub mod kernels;
pub mod runtime;
pub mod staging;
pub mod torch;

pub use comm_stream::CommStream;
pub use runtime::{DeviceRuntime, Event, Memory};
pub use staging::Staging;

use libloading::Library;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};
use tch::{Device, Tensor};

/// Failures of a device, and reasons why it cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{what} is missing: {why}")]
    Missing { what: &'static str, why: String },
    #[error("CUDA's driver, {call}: {text} (error {code})")]
    Driver { call: &'static str, code: u32, text: String },
    #[error("CUDA's run-time compiler, for compute capability {generation}: {why}")]
    Compile { generation: i32, why: String },
    #[error("this machine has an NVIDIA driver but no GPU that may be used; see CUDA_VISIBLE_DEVICES")]
    None,
    #[error(
        "{ranks} ranks on {host}, which has {devices} GPUs for them: start one rank a GPU, or use --device cpu; \
         NCCL 2.30 lets ranks share a GPU, slowly, where {} is 1",
        choose::SHARES
    )]
    TooFew { host: String, ranks: usize, devices: usize },
    #[error(
        "{variable} says that this is rank {says} of its host, MPI that it is rank {mpi}: ranks of a host need shared \
         memory between them (one container for all, or one GPU visible to each with --device cuda)"
    )]
    LocalRank { variable: &'static str, says: usize, mpi: usize },
    #[error("ranks {} and {} on {host} would share a GPU: give each rank its own, or all of them all", ranks.0, ranks.1)]
    Shared { host: String, ranks: (usize, usize) },
    #[error(
        "rank {with} on {host} has a GPU, rank {without} on {other} has none: say --device cuda or --device cpu"
    )]
    Mixed { with: usize, host: String, without: usize, other: String },
}

impl DeviceError {
    /// The exit code of the process: 1 for failures of a device, 2 for user errors (no usable device).
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Self::Driver { .. }) { 1 } else { 2 }
    }
}

/// The kind of device that ranks use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// One GPU a rank where there are GPUs, else the CPU
    #[default]
    Auto,
    /// CPU ranks over MPI
    Cpu,
    /// One GPU a rank, over NCCL
    Cuda,
    /// As on GPUs, but with tensors in host memory, for tests: a library of theirs replaces CUDA's driver and NCCL
    #[value(hide = true)]
    StandIn,
}

/// The device of this rank.
#[derive(Clone, Debug)]
pub struct RankDevice {
    tensors: Device,
    runtime: Option<Arc<dyn DeviceRuntime>>,
}

impl RankDevice {
    /// The CPU.
    pub fn host() -> Self {
        Self { tensors: Device::Cpu, runtime: None }
    }

    /// Opens device `index` of the [`visible`] ones.
    ///
    /// # Errors
    /// The driver fails.
    pub fn open(choice: DeviceChoice, index: usize) -> Result<Self, DeviceError> {
        STANDS_IN.store(choice == DeviceChoice::StandIn, Ordering::Relaxed);
        let tensors = if choice == DeviceChoice::StandIn { Device::Cpu } else { Device::Cuda(index) };
        let driver = Arc::new(driver::Driver::open(index)?);
        // A process has one device.
        let _ = CURRENT.set(driver.clone());
        Ok(Self { tensors, runtime: Some(driver) })
    }

    /// Device of the tensors.
    pub fn tensors(&self) -> Device {
        self.tensors
    }

    /// Driver of the device; `None` for the CPU.
    pub fn runtime(&self) -> Option<&Arc<dyn DeviceRuntime>> {
        self.runtime.as_ref()
    }

    /// Memory of the device; `None` for the CPU.
    pub fn memory(&self) -> Result<Option<Memory>, DeviceError> {
        self.runtime.as_ref().map(|runtime| runtime.memory()).transpose()
    }
}

/// Checks that `library` has all `symbols`: cudarc panics at the call of a missing one.
///
/// # Errors
/// One is missing.
pub(crate) fn has_symbols(
    what: &'static str,
    library: &Library,
    symbols: &[&str],
) -> Result<(), DeviceError> {
    // SAFETY: the symbol is only looked up. It is not called, so its type does not matter.
    let has = |symbol: &&&str| unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_ok();
    match symbols.iter().find(|symbol| !has(symbol)) {
        Some(symbol) => Err(DeviceError::Missing { what, why: format!("it is too old, it has no {symbol}") }),
        None => Ok(()),
    }
}

/// Device tensors are in host memory: see [`DeviceChoice::StandIn`].
static STANDS_IN: AtomicBool = AtomicBool::new(false);

/// The device that [`current`] returns.
static CURRENT: OnceLock<Arc<driver::Driver>> = OnceLock::new();

/// This rank's device; `None` for the CPU.
pub fn current() -> Option<&'static Arc<driver::Driver>> {
    CURRENT.get()
}

/// Returns true if libtorch has FlashAttention for this rank's device (Ampere and later).
pub fn has_flash() -> bool {
    current().is_some_and(|driver| driver.generation >= 80)
}

/// Returns true if libtorch has grouped GEMMs for this rank's device (Hopper and Blackwell). On others libtorch
/// copies the group sizes to the host and computes one group after the other.
pub fn has_grouped_gemm() -> bool {
    current().is_some_and(|driver| matches!(driver.generation / 10, 9 | 10))
}

/// Returns true if our CPU kernels compute on `tensor`; libtorch's operations do otherwise.
pub fn has_kernels(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && !STANDS_IN.load(Ordering::Relaxed)
}

/// Ids of the devices that this process may use under `choice`; none: it computes on the CPU.
///
/// # Errors
/// GPUs are required or found, and cannot be used.
pub fn visible(choice: DeviceChoice) -> Result<Vec<[u8; 16]>, DeviceError> {
    let devices = match choice {
        DeviceChoice::Cpu => Vec::new(),
        // Without a driver, or with one that finds no device, the CPU is the choice.
        DeviceChoice::Auto => driver::visible().unwrap_or_default(),
        DeviceChoice::Cuda | DeviceChoice::StandIn => {
            Some(driver::visible()?).filter(|devices| !devices.is_empty()).ok_or(DeviceError::None)?
        }
    };
    if !devices.is_empty() && choice != DeviceChoice::StandIn {
        torch::load_cuda()?;
    }
    Ok(devices)
}
