//! Makes our binaries find the libtorch that they were built with, without `LD_LIBRARY_PATH`.
//! The NCCL that torch's wheel brings lies elsewhere; whoever asks for it by name finds it by the same way.
//! torch-sys exports the directory as `DEP_TCH_LIBTORCH_LIB`; a link argument of a dependency never
//! reaches the final binary, so it is repeated here.

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    println!("cargo:rerun-if-changed=build.rs");
    // By which ranks see whether they run the same program.
    println!("cargo:rustc-link-arg=-Wl,--build-id=sha1");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        // site-packages/torch/lib, and beside torch: site-packages/nvidia/nccl/lib.
        let torch = std::fs::canonicalize(&lib).unwrap_or_else(|_| lib.clone().into());
        if let Some(packages) = torch.parent().and_then(|torch| torch.parent()) {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{}", packages.join("nvidia/nccl/lib").display());
        }
        println!("cargo:rustc-env=XORL_LIBTORCH_LIB={lib}");
    }
}
