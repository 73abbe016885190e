//! Every CUDA source below src/ compiles for the GPUs that libtorch is built for, by the compiler that torch's wheel brings.
//! There is none now: on a device libtorch's own operations compute. That the compiler works, and refuses what is wrong, is
//! seen by two sources of the test's own.

use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use std::{
    fs,
    path::{Path, PathBuf},
};
use xorl_dist::device::torch;

const GPUS: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// y ← a·x + y.
const GOOD: &str = "extern \"C\" __global__ void axpy(float a, const float *x, float *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}";

/// Loads the wheel's compiler and what it looks for itself, so that each is found by its name.
fn load() {
    let torch = fs::canonicalize(torch::directory().unwrap()).unwrap();
    let packages = torch.parent().and_then(Path::parent).unwrap();
    for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"] {
        let library = packages.join("nvidia/cu13/lib").join(name);
        // SAFETY: its initialisers start nothing; it is never unloaded.
        let loaded = unsafe { libloading::Library::new(&library) };
        std::mem::forget(loaded.unwrap_or_else(|error| panic!("{}: {error}", library.display())));
    }
}

fn compile(source: &str, gpu: &'static str) -> Result<String, String> {
    let options = CompileOptions { arch: Some(gpu), ..CompileOptions::default() };
    let compiled = compile_ptx_with_opts(source, options);
    compiled.map(|ptx| ptx.to_src()).map_err(|error| format!("{error:?}"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            found.push(path);
        }
    }
    found
}

#[test]
fn cuda_sources_compile() {
    load();
    for gpu in GPUS {
        let ptx = compile(GOOD, gpu).unwrap();
        assert!(ptx.contains(".entry axpy") && ptx.contains(&format!(".target {gpu}")), "{ptx}");
        let error = compile(&GOOD.replace("a * x[i]", "b * x[i]"), gpu).unwrap_err();
        assert!(error.contains("identifier \\\"b\\\" is undefined"), "{error}");
        for path in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
            compile(&fs::read_to_string(&path).unwrap(), gpu)
                .unwrap_or_else(|error| panic!("{} for {gpu}: {error}", path.display()));
        }
    }
}
