//! [`DeviceRuntime`] by CUDA's driver, through cudarc.
//!
//! cudarc panics where a library or a symbol is missing. Both are checked first, and are typed errors.

use super::{
    DeviceError, has_symbols,
    runtime::{DeviceRuntime, Memory, RawEvent, RawStream},
};
use cudarc::driver::{
    DriverError,
    result::{ctx, device, event, free_host, init, malloc_host, mem_get_info, primary_ctx, stream},
    sys,
};
use std::{
    ffi::c_int,
    ptr::{NonNull, without_provenance_mut},
};

/// Functions of the driver that are called.
const SYMBOLS: [&str; 19] = [
    "cuInit",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuDeviceGetAttribute",
];

/// CU_MEMHOSTALLOC_PORTABLE: memory is page-locked for all contexts, not only for the current one.
const PORTABLE: u32 = 1;

/// The primary context of a device, which libtorch uses too.
#[derive(Debug)]
pub struct Driver {
    device: sys::CUdevice,
    context: usize,
    /// Compute capability (90 means 9.0).
    pub generation: i32,
}

/// Converts an error of the driver's function `call`.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        DeviceError::Driver { call, code: error.0 as u32, text: text.unwrap_or_else(|_| "unknown".into()) }
    }
}

/// Loads and initialises the driver.
///
/// # Errors
/// The library cannot be loaded, lacks one of [`SYMBOLS`], or fails.
fn load() -> Result<(), DeviceError> {
    let what = "CUDA's driver";
    // SAFETY: the driver's initialisers have no preconditions, and cudarc never unloads the library.
    unsafe {
        if !sys::is_culib_present() {
            let why = "libcuda.so.1 cannot be loaded: is an NVIDIA driver installed?".to_owned();
            return Err(DeviceError::Missing { what, why });
        }
        has_symbols(what, sys::culib(), &SYMBOLS)?;
    }
    init().map_err(failed("cuInit"))
}

/// Ids (UUIDs) of the devices that the driver shows to this process, in order.
///
/// # Errors
/// The driver is missing, or fails.
pub fn visible() -> Result<Vec<[u8; 16]>, DeviceError> {
    load()?;
    let count = device::get_count().map_err(failed("cuDeviceGetCount"))?;
    let id = |index| {
        let id = device::get_uuid(device::get(index).map_err(failed("cuDeviceGet"))?);
        Ok(id.map_err(failed("cuDeviceGetUuid"))?.bytes.map(|byte| byte as u8))
    };
    (0..count).map(id).collect()
}

impl Driver {
    /// Opens device `index` of the [`visible`] ones.
    ///
    /// # Errors
    /// The driver is missing, or fails.
    pub fn open(index: usize) -> Result<Self, DeviceError> {
        load()?;
        let device = device::get(index as c_int).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the driver returned this device for a valid index.
        let attribute =
            |which| unsafe { device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"));
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: the driver returned this device for a valid index. Dropping self releases the context.
        let context = unsafe { primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        Ok(Self { device, context: context.expose_provenance(), generation: 10 * major + minor })
    }
}

fn raw_stream(stream: RawStream) -> sys::CUstream {
    without_provenance_mut(stream.0)
}

fn raw_event(event: RawEvent) -> sys::CUevent {
    without_provenance_mut(event.0)
}

// The driver may be called from any thread on which a context is current: each function calls `attach` first.
impl DeviceRuntime for Driver {
    fn create_stream(&self) -> Result<RawStream, DeviceError> {
        self.attach()?;
        let stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        Ok(RawStream(stream.expose_provenance()))
    }

    unsafe fn destroy_stream(&self, stream: RawStream) {
        // A stream that cannot be destroyed stays until the process ends.
        // SAFETY: the caller promises that the stream comes from this driver and is not destroyed.
        let _ = self.attach().map(|()| unsafe { stream::destroy(raw_stream(stream)) });
    }

    fn create_event(&self) -> Result<RawEvent, DeviceError> {
        self.attach()?;
        let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(RawEvent(event.map_err(failed("cuEventCreate"))?.expose_provenance()))
    }

    unsafe fn destroy_event(&self, event: RawEvent) {
        // SAFETY: the caller promises that the event comes from this driver and is not destroyed.
        let _ = self.attach().map(|()| unsafe { event::destroy(raw_event(event)) });
    }

    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError> {
        self.attach()?;
        // SAFETY: the caller promises that event and stream come from this driver and are not destroyed.
        unsafe { event::record(raw_event(event), raw_stream(stream)) }.map_err(failed("cuEventRecord"))
    }

    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.attach()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the caller promises that stream and event come from this driver and are not destroyed.
        unsafe { stream::wait_event(raw_stream(stream), raw_event(event), flags) }
            .map_err(failed("cuStreamWaitEvent"))
    }

    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.attach()?;
        // SAFETY: the caller promises that the event comes from this driver and is not destroyed.
        match unsafe { event::query(raw_event(event)) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(failed("cuEventQuery")(error)),
        }
    }

    fn memory(&self) -> Result<Memory, DeviceError> {
        self.attach()?;
        let (free, total) = mem_get_info().map_err(failed("cuMemGetInfo"))?;
        Ok(Memory { free, total })
    }

    fn attach(&self) -> Result<(), DeviceError> {
        // libtorch may have made another context current on this thread.
        // SAFETY: the context was retained in `open`, and is released only when self is dropped.
        unsafe { ctx::set_current(without_provenance_mut(self.context)) }.map_err(failed("cuCtxSetCurrent"))
    }

    fn lock_memory(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        self.attach()?;
        // SAFETY: a context is current. The memory is not read before it is written: callers get a raw pointer.
        let start = unsafe { malloc_host(bytes, PORTABLE) }.map_err(failed("cuMemHostAlloc"))?;
        NonNull::new(start.cast())
            .ok_or_else(|| failed("cuMemHostAlloc")(DriverError(sys::CUresult::CUDA_ERROR_UNKNOWN)))
    }

    unsafe fn unlock_memory(&self, start: NonNull<u8>) {
        // SAFETY: the caller promises that the memory comes from `lock_memory` and is not freed.
        let _ = self.attach().map(|()| unsafe { free_host(start.as_ptr().cast()) });
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: `open` has retained the context once for this value.
        let _ = unsafe { primary_ctx::release(self.device) };
    }
}
