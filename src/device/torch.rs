//! What a process settles about libtorch before it computes: its CUDA library, its algorithms, what it keeps.

use super::DeviceError;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::{
    ffi::c_void,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// File name of libtorch's CUDA library, in the directory of the linked libtorch.
pub const CUDA_HALF: &str = "libtorch_cuda.so";

/// Directory of the loaded libtorch: from the process's memory map, else from build time.
pub fn directory() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapped = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    let loaded = mapped
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libtorch_cpu.so"))
        })
        .find_map(|path| path.parent().map(Path::to_owned));
    loaded.or_else(|| option_env!("XORL_LIBTORCH_LIB").map(PathBuf::from))
}

/// Variables of oneDNN and ideep, which compile libtorch's products on CPUs, one for each shape and dtype, and keep the
/// last 1024 of them.
const COMPILED_PRODUCTS: [&str; 2] = ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"];

/// Products that stay compiled. A layer has some dozen shapes, and the next layer the same ones: 64 are as fast as
/// 1024, 16 take 3 % more of a tiny model's time. Micro-batches of single rows bring new shapes in each step, up to
/// 0.8 MB each.
pub const KEPT_PRODUCTS: usize = 64;

/// Bounds the compiled products to [`KEPT_PRODUCTS`], unless the environment has a number.
///
/// # Safety
/// No other thread reads or writes the environment: the program has not begun any.
pub unsafe fn keep_few_products() {
    for name in COMPILED_PRODUCTS {
        if std::env::var_os(name).is_none() {
            // SAFETY: the caller's.
            unsafe { std::env::set_var(name, KEPT_PRODUCTS.to_string()) };
        }
    }
}

/// Makes libtorch choose deterministic algorithms, and warn where it has none. tch has no binding for it, so the C++
/// functions are looked up by their mangled names.
///
/// # Errors
/// This libtorch has no such functions.
pub fn prefer_deterministic() -> Result<(), DeviceError> {
    let missing = |error: libloading::Error| DeviceError::Missing {
        what: "libtorch's deterministic mode",
        why: error.to_string(),
    };
    // SAFETY: the types are those of at::globalContext() and at::Context::setDeterministicAlgorithms(bool, bool) in
    // the C++ ABI: a reference is a pointer, and a method takes its object first. The context lives as long as the
    // process.
    unsafe {
        let this = Library::this();
        let context: Symbol<unsafe extern "C" fn() -> *mut c_void> =
            this.get(b"_ZN2at13globalContextEv\0").map_err(missing)?;
        let set: Symbol<unsafe extern "C" fn(*mut c_void, bool, bool)> =
            this.get(b"_ZN2at7Context26setDeterministicAlgorithmsEbb\0").map_err(missing)?;
        let warn_only = true;
        set(context(), true, warn_only);
    }
    Ok(())
}

/// Loads libtorch's CUDA library, which tch does not link: CUDA looks absent until then. Called before the first call
/// of libtorch, and only where a GPU is used: it takes 270 MB of RSS and up to a second.
///
/// # Errors
/// This libtorch has no such library, or its dependencies are missing.
pub fn load_cuda() -> Result<(), DeviceError> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        let path = directory().map(|directory| directory.join(CUDA_HALF));
        let path = path.ok_or_else(|| "the directory of libtorch is not known".to_owned())?;
        // SAFETY: the library's initialisers only register operations. It is never unloaded.
        let loaded = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        loaded.map(std::mem::forget).map_err(|error| error.to_string())
    };
    LOADED
        .get_or_init(load)
        .clone()
        .map_err(|why| DeviceError::Missing { what: "libtorch's CUDA library", why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_becomes_deterministic() {
        // SAFETY: the types are those of at::globalContext() and at::Context::deterministicAlgorithms() const in the
        // C++ ABI.
        let is = || unsafe {
            let this = Library::this();
            let context: Symbol<unsafe extern "C" fn() -> *mut c_void> =
                this.get(b"_ZN2at13globalContextEv\0").unwrap();
            let asked: Symbol<unsafe extern "C" fn(*mut c_void) -> bool> =
                this.get(b"_ZNK2at7Context23deterministicAlgorithmsEv\0").unwrap();
            asked(context())
        };
        assert!(!is());
        prefer_deterministic().unwrap();
        assert!(is());
    }
}
