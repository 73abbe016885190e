//! Report of `--version`: the libraries found on this machine now, not those of build time. An absent one is reported
//! as absent; nothing here fails.

use crate::device::torch;
use libloading::os::unix::{Library, Symbol};
use std::ffi::c_int;
use std::path::{Path, PathBuf};

const TCH: &str = "0.26";
const NOT_FOUND: &str = "not found";

/// The versions, one line a component.
pub fn version_report() -> String {
    let libtorch = torch::directory();
    let or_absent = |found: Option<String>| found.unwrap_or_else(|| NOT_FOUND.into());
    let torch_place = libtorch.as_ref().map_or_else(String::new, |dir| format!(" ({})", dir.display()));
    let lines = [
        ("xorl-dist", env!("CARGO_PKG_VERSION").to_owned()),
        ("tch", TCH.to_owned()),
        ("libtorch", or_absent(libtorch_version().map(|version| version + &torch_place))),
        ("MPI", or_absent(mpi_version())),
        ("CUDA driver", or_absent(cuda_driver_version())),
        ("CUDA libtorch", or_absent(cuda_backend(libtorch.as_deref()))),
        ("NCCL", or_absent(nccl_version(libtorch.as_deref()))),
    ];
    lines.iter().map(|(name, version)| format!("{name:<14}{version}\n")).collect()
}

/// The version that the loaded libtorch reports of itself.
fn libtorch_version() -> Option<String> {
    // SAFETY: the C function of this name in libtorch takes nothing and returns a u64 (aoti_torch/c/shim.h).
    let packed = unsafe {
        let version: Symbol<unsafe extern "C" fn() -> u64> =
            Library::this().get(b"aoti_torch_abi_version\0").ok()?;
        version()
    };
    let [major, minor, patch, ..] = packed.to_be_bytes();
    Some(format!("{major}.{minor}.{patch}"))
}

/// First line of the MPI library's version text, which may be asked for before MPI is initialised.
fn mpi_version() -> Option<String> {
    let text = mpi::environment::library_version().ok()?;
    let line = text.trim_matches(['\0', '\n', ' ']).lines().next()?;
    // Build host and date follow in Open MPI's line.
    Some(line.split(", package:").next()?.split(", ident:").next()?.trim().to_owned())
}

fn cuda_driver_version() -> Option<String> {
    let version = integer_from("libcuda.so.1".as_ref(), b"cuDriverGetVersion\0")?;
    Some(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The path of the CUDA library of this libtorch, if it has one.
fn cuda_backend(libtorch: Option<&Path>) -> Option<String> {
    let library = libtorch?.join(torch::CUDA_HALF);
    library.exists().then(|| library.display().to_string())
}

/// Version of the system's NCCL, else of the one beside libtorch in the torch wheel.
fn nccl_version(libtorch: Option<&Path>) -> Option<String> {
    let name = PathBuf::from("libnccl.so.2");
    let beside = libtorch.and_then(|lib| Some(lib.parent()?.parent()?.join("nvidia/nccl/lib").join(&name)));
    [Some(name), beside].into_iter().flatten().find_map(|library| {
        let code = integer_from(&library, b"ncclGetVersion\0")?;
        // NCCL packs 2.29.7 as 22907, and releases before 2.9 as 2804.
        let major = if code < 10_000 { 1000 } else { 10_000 };
        let version = format!("{}.{}.{}", code / major, code % major / 100, code % 100);
        let place = if library.is_absolute() { format!(" ({})", library.display()) } else { String::new() };
        Some(version + &place)
    })
}

/// Calls `int function(int *)` of a library and returns the number that it stored; `None` if any of it fails.
fn integer_from(library: &Path, function: &[u8]) -> Option<c_int> {
    let mut value = 0;
    // SAFETY: both callers name a function of exactly this signature that only writes its argument. The library
    // stays loaded (no drop), since CUDA libraries do not survive being unloaded.
    let status = unsafe {
        let library = std::mem::ManuallyDrop::new(Library::new(library).ok()?);
        let get: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> = library.get(function).ok()?;
        get(&mut value)
    };
    (status == 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tch_is_the_version_that_is_locked() {
        let locked = format!("name = \"tch\"\nversion = \"{TCH}.");
        assert!(include_str!("../../Cargo.lock").contains(&locked));
    }

    #[test]
    fn what_this_binary_is_linked_with_is_found() {
        let report = version_report();
        let line = |name: &str| report.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("libtorch").contains("2.13.0 (/"), "{report}");
        assert!(line("MPI").contains("MPI"), "{report}");
        assert_eq!(report.lines().count(), 7);
    }
}
