//! Kernels of our own on a device: compiled at run time by NVRTC, which torch's wheel brings, and started on libtorch's
//! stream.

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

/// What is called of the compiler.
const SYMBOLS: [&str; 7] = [
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetPTXSize",
    "nvrtcGetPTX",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
];

/// What is called of the driver for kernels alone.
const DRIVER_SYMBOLS: [&str; 3] = ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"];

/// What starts kernels.
pub trait Launch: Send + Sync {
    /// Starts `kernel` over `blocks` blocks of `threads` threads, after all that libtorch was given so far.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameters, in order, and what it does with them is sound: memory is the
    /// device's, large enough, and nobody else's until then.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: u32,
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError>;
}

/// A program's kernels on a device.
pub struct Program {
    driver: Arc<Driver>,
    functions: HashMap<&'static str, usize>,
}

/// PTX of `source` for a GPU of compute capability `generation`, as in 90 for 9.0.
///
/// # Errors
/// There is no compiler, or it refuses the source.
pub fn compile(source: &str, generation: i32) -> Result<CString, DeviceError> {
    let what = "CUDA's run-time compiler";
    load_from_wheel();
    // SAFETY: its initialisers start nothing; it stays loaded.
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

/// Torch's wheel keeps the compiler, and a library which that looks for, where neither is found by its name, unless it is
/// loaded already.
fn load_from_wheel() {
    let folder = torch::directory().and_then(|torch| std::fs::canonicalize(torch).ok());
    let packages = folder.as_deref().and_then(|torch| torch.parent()?.parent());
    let files = packages.and_then(|packages| std::fs::read_dir(packages.join("nvidia/cu13/lib")).ok());
    for file in files.into_iter().flatten().flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("libnvrtc-builtins.so") || name.starts_with("libnvrtc.so") {
            // SAFETY: its initialisers start nothing; it is never unloaded.
            let loaded = unsafe { libloading::Library::new(file.path()) };
            // Where it cannot be loaded, who needs it says so.
            std::mem::forget(loaded);
        }
    }
}

impl Program {
    /// Compiles `source` for the device of `driver` and finds `kernels` in it.
    pub fn load(driver: &Arc<Driver>, source: &str, kernels: &[&'static str]) -> Result<Self, DeviceError> {
        let ptx = compile(source, driver.generation)?;
        driver.attach()?;
        // SAFETY: the driver is loaded and stays so. The text ends with a zero; the driver copies it.
        let module = unsafe {
            has_symbols("CUDA's driver", driver::sys::culib(), &DRIVER_SYMBOLS)?;
            module::load_data(ptx.as_ptr().cast()).map_err(failed("cuModuleLoadData"))?
        };
        let find = |&name: &&'static str| {
            let c_name = CString::new(name).unwrap_or_default();
            // SAFETY: the module is never unloaded.
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
        // SAFETY: the function is the module's; the arguments are the caller's to vouch for.
        unsafe { launch_kernel(function, (blocks, 1, 1), (threads, 1, 1), 0, stream, arguments) }
            .map_err(failed("cuLaunchKernel"))
    }
}
