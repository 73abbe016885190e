//! libtorch's CUDA half. tch links libtorch without it, so that CUDA looks absent until it is loaded.

use super::DeviceError;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::{
    ffi::c_void,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// Its file, beside the libtorch that this program is linked to.
pub const CUDA_HALF: &str = "libtorch_cuda.so";

/// The directory of the loaded libtorch: from the process's memory map, else where it was at build time.
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

/// Has libtorch take the algorithm that gives the same bits each time, and warn where it has none. tch has no name for it, so
/// the functions of the libtorch that it is made for are found by theirs.
///
/// # Errors
/// This libtorch has them not.
pub fn prefer_deterministic() -> Result<(), DeviceError> {
    let missing = |error: libloading::Error| DeviceError::Missing {
        what: "libtorch's deterministic mode",
        why: error.to_string(),
    };
    // SAFETY: at::globalContext() returns a reference to what lives as long as the process, and
    // at::Context::setDeterministicAlgorithms(bool, bool) is a method of it; both as C++'s ABI passes them.
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

/// Loads it, before the first call of libtorch: costs 270 MB of RSS and up to a second, so only where it is wanted.
///
/// # Errors
/// This libtorch has none, or what it needs is missing.
pub fn load_cuda() -> Result<(), DeviceError> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        let path = directory().map(|directory| directory.join(CUDA_HALF));
        let path = path.ok_or_else(|| "where libtorch lies is not known".to_owned())?;
        // SAFETY: its initialisers register operations and start nothing; it is never unloaded.
        let loaded = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        loaded.map(std::mem::forget).map_err(|error| error.to_string())
    };
    LOADED.get_or_init(load).clone().map_err(|why| DeviceError::Missing { what: "libtorch's CUDA half", why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_told_to_be_deterministic() {
        // SAFETY: as above; at::Context::deterministicAlgorithms() const.
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
