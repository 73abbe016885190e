//! Our own kernels on a device. NVRTC, which comes with torch's wheel, compiles them at run time. They run on
//! libtorch's stream.

use super::{
    DeviceError, DeviceRuntime,
    driver::{Driver, failed},
    has_symbols,
    runtime::COMPUTE,
    torch,
};
use cudarc::{
    driver::{
        self,
        result::{launch_kernel, module},
    },
    nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts, sys},
};
use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    ptr::without_provenance_mut,
    sync::Arc,
};

/// Functions of the compiler that are called.
const SYMBOLS: [&str; 7] = [
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetPTXSize",
    "nvrtcGetPTX",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
];

/// Functions of the driver that are called for kernels only.
const DRIVER_SYMBOLS: [&str; 3] = ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"];

/// Launches kernels.
pub trait Launch: Send + Sync {
    /// Enqueues `kernel` on libtorch's stream, with `blocks` blocks of `threads` threads.
    ///
    /// # Errors
    /// The program has no such kernel, or the driver fails.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameters, in order and of their types. Pointers among them refer
    /// to device memory of the length that the kernel accesses, which stays allocated until the kernel has ended and
    /// which no work on another stream writes meanwhile.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: u32,
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError>;
}

/// Compiled kernels, loaded on a device.
pub struct Program {
    driver: Arc<Driver>,
    functions: HashMap<&'static str, usize>,
}

/// Compiles `source` to PTX for compute capability `generation` (90 means 9.0).
///
/// # Errors
/// The compiler is missing, or rejects the source.
pub fn compile(source: &str, generation: i32) -> Result<CString, DeviceError> {
    let what = "CUDA's run-time compiler";
    load_from_wheel();
    // SAFETY: the compiler's initialisers have no preconditions, and cudarc never unloads the library.
    unsafe {
        if !sys::is_culib_present() {
            let why = "libnvrtc.so cannot be loaded: torch's wheel brings it in nvidia/cu13/lib".to_owned();
            return Err(DeviceError::Missing { what, why });
        }
        has_symbols(what, sys::culib(), &SYMBOLS)?;
    }
    let options = vec![format!("--gpu-architecture=sm_{generation}")];
    let compiled = compile_ptx_with_opts(source, CompileOptions { options, ..CompileOptions::default() });
    let refused = |why: String| DeviceError::Compile { generation, why };
    let ptx = compiled.map_err(|error| match error {
        CompileError::CompileError { log, .. } => refused(log.to_string_lossy().into_owned()),
        other => refused(format!("{other:?}")),
    })?;
    CString::new(ptx.to_src()).map_err(|error| refused(error.to_string()))
}

/// Loads the compiler, and the library that it opens by name, from torch's wheel. Its folder is not in the library
/// path, but loaded libraries are found by name.
fn load_from_wheel() {
    let folder = torch::directory().and_then(|torch| std::fs::canonicalize(torch).ok());
    let packages = folder.as_deref().and_then(|torch| torch.parent()?.parent());
    let files = packages.and_then(|packages| std::fs::read_dir(packages.join("nvidia/cu13/lib")).ok());
    for file in files.into_iter().flatten().flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("libnvrtc-builtins.so") || name.starts_with("libnvrtc.so") {
            // SAFETY: the libraries' initialisers have no preconditions. They are never unloaded.
            let loaded = unsafe { libloading::Library::new(file.path()) };
            // An error is ignored here: the first use reports that the library is missing.
            std::mem::forget(loaded);
        }
    }
}

impl Program {
    /// Compiles `source` for the device of `driver`, and looks up `kernels` in it.
    ///
    /// # Errors
    /// The compiler rejects the source, the driver fails, or a kernel is missing.
    pub fn load(driver: &Arc<Driver>, source: &str, kernels: &[&'static str]) -> Result<Self, DeviceError> {
        let ptx = compile(source, driver.generation)?;
        driver.attach()?;
        // SAFETY: `has_symbols` shows that the functions exist, and the driver is never unloaded. The PTX ends with
        // NUL, and the driver copies it.
        let module = unsafe {
            has_symbols("CUDA's driver", driver::sys::culib(), &DRIVER_SYMBOLS)?;
            module::load_data(ptx.as_ptr().cast()).map_err(failed("cuModuleLoadData"))?
        };
        let find = |&name: &&'static str| {
            let c_name = CString::new(name).unwrap_or_default();
            // SAFETY: the module was loaded above and is never unloaded, and the name ends with NUL.
            let function = unsafe { module::get_function(module, c_name) };
            Ok((name, function.map_err(failed("cuModuleGetFunction"))?.expose_provenance()))
        };
        let functions = kernels.iter().map(find).collect::<Result<_, DeviceError>>()?;
        Ok(Self { driver: driver.clone(), functions })
    }
}

impl Launch for Program {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: u32,
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        let function = self.functions.get(kernel).copied().ok_or_else(|| DeviceError::Missing {
            what: "a kernel",
            why: format!("the program has no {kernel}"),
        })?;
        self.driver.attach()?;
        let (function, stream) = (without_provenance_mut(function), without_provenance_mut(COMPUTE.0));
        // SAFETY: the function belongs to a module that is never unloaded, and the device was attached. The caller
        // promises that the arguments fit the kernel.
        unsafe { launch_kernel(function, (blocks, 1, 1), (threads, 1, 1), 0, stream, arguments) }
            .map_err(failed("cuLaunchKernel"))
    }
}
