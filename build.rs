//! Makes our binaries find the libtorch that they were built with, without `LD_LIBRARY_PATH`.
//! torch-sys exports the directory as `DEP_TCH_LIBTORCH_LIB`; a link argument of a dependency never
//! reaches the final binary, so it is repeated here.

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    println!("cargo:rerun-if-changed=build.rs");
    // By which ranks see whether they run the same program.
    println!("cargo:rustc-link-arg=-Wl,--build-id=sha1");
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        println!("cargo:rustc-env=XORL_LIBTORCH_LIB={lib}");
    }
}
