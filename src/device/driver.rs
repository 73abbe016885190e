//! [`DeviceRuntime`] by CUDA's driver, through cudarc.
//!
//! cudarc panics where a library or a symbol is missing: both are looked for first, and are typed errors.

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

/// What is called of the driver.
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

/// Page-locked for every context, not only for the one in which it is allocated.
const PORTABLE: u32 = 1;

/// The primary context of one device, which libtorch uses too.
#[derive(Debug)]
pub struct Driver {
    device: sys::CUdevice,
    context: usize,
    /// Its compute capability, as in 90 for 9.0.
    pub generation: i32,
}

/// Error of the driver's `call`.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
        DeviceError::Driver { call, code: error.0 as u32, text: text.unwrap_or_else(|_| "unknown".into()) }
    }
}

/// Loads the driver, if it is there and has all that is called.
fn load() -> Result<(), DeviceError> {
    let what = "CUDA's driver";
    // SAFETY: loading the driver runs no code of ours; it stays loaded.
    unsafe {
        if !sys::is_culib_present() {
            let why = "libcuda.so.1 cannot be loaded: is an NVIDIA driver installed?".to_owned();
            return Err(DeviceError::Missing { what, why });
        }
        has_symbols(what, sys::culib(), &SYMBOLS)?;
    }
    init().map_err(failed("cuInit"))
}

/// The ids of the devices that this process sees, in order.
///
/// # Errors
/// There is no driver, or it does not work.
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
    /// Of device `index` of those that are [`visible`].
    pub fn open(index: usize) -> Result<Self, DeviceError> {
        load()?;
        let device = device::get(index as c_int).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device is the driver's own, here and below.
        let attribute =
            |which| unsafe { device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"));
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
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

// SAFETY of every block below: handles are this driver's and were not given back, as the trait demands of callers, and the
// context was retained. The driver may be called from any thread that has a context, which `attach` sees to.
impl DeviceRuntime for Driver {
    fn create_stream(&self) -> Result<RawStream, DeviceError> {
        self.attach()?;
        let stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        Ok(RawStream(stream.expose_provenance()))
    }

    unsafe fn destroy_stream(&self, stream: RawStream) {
        // Nothing can be done about a stream that does not end.
        let _ = self.attach().map(|()| unsafe { stream::destroy(raw_stream(stream)) });
    }

    fn create_event(&self) -> Result<RawEvent, DeviceError> {
        self.attach()?;
        let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(RawEvent(event.map_err(failed("cuEventCreate"))?.expose_provenance()))
    }

    unsafe fn destroy_event(&self, event: RawEvent) {
        let _ = self.attach().map(|()| unsafe { event::destroy(raw_event(event)) });
    }

    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError> {
        self.attach()?;
        unsafe { event::record(raw_event(event), raw_stream(stream)) }.map_err(failed("cuEventRecord"))
    }

    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.attach()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        unsafe { stream::wait_event(raw_stream(stream), raw_event(event), flags) }
            .map_err(failed("cuStreamWaitEvent"))
    }

    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.attach()?;
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
        // libtorch may have made another device the thread's.
        unsafe { ctx::set_current(without_provenance_mut(self.context)) }.map_err(failed("cuCtxSetCurrent"))
    }

    fn lock_memory(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        self.attach()?;
        let start = unsafe { malloc_host(bytes, PORTABLE) }.map_err(failed("cuMemHostAlloc"))?;
        NonNull::new(start.cast())
            .ok_or_else(|| failed("cuMemHostAlloc")(DriverError(sys::CUresult::CUDA_ERROR_UNKNOWN)))
    }

    unsafe fn unlock_memory(&self, start: NonNull<u8>) {
        let _ = self.attach().map(|()| unsafe { free_host(start.as_ptr().cast()) });
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: it was retained once.
        let _ = unsafe { primary_ctx::release(self.device) };
    }
}
