//! How tests start Python and ranks.

pub mod engine;
pub mod serving;
pub mod tiny;
pub mod topology;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::LazyLock,
    time::{Duration, Instant},
};
use xorl_dist::rng::Stream;

/// The Python that has transformers and PEFT: launch/setup.sh makes it.
pub fn python() -> PathBuf {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    std::env::var_os("XORL_ORACLE_PYTHON").map_or(venv, PathBuf::from)
}

/// The Python of a client's own venv: that of `$VARIABLE`, else of the repository's folder `venv`.
pub fn client_python(variable: &str, venv: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(venv).join("bin/python");
    let python = std::env::var_os(variable).map_or(own, PathBuf::from);
    assert!(python.exists(), "{} is missing: launch/setup.sh makes it", python.display());
    python
}

/// Whether mpirun is MPICH's.
pub fn is_mpich() -> bool {
    static MPICH: LazyLock<bool> = LazyLock::new(|| {
        let version = Command::new("mpirun").arg("--version").output().unwrap();
        String::from_utf8_lossy(&version.stdout).contains("HYDRA")
    });
    *MPICH
}

/// mpirun as root and of more ranks than cores, which Open MPI allows only when told; MPICH does not read that.
pub fn mpirun() -> Command {
    let told =
        ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"];
    let mut command = Command::new("mpirun");
    command.envs(told.map(|name| (name, "1"))).env("OMP_NUM_THREADS", "1");
    command
}

/// `program` on `ranks` ranks of one thread each; one rank needs no launcher.
pub fn ranks_of(program: &Path, ranks: usize) -> Command {
    let mut command = if ranks == 1 {
        Command::new(program)
    } else {
        let mut launcher = mpirun();
        launcher.args(["-n", &ranks.to_string()]).arg(program);
        launcher
    };
    command.env("OMP_NUM_THREADS", "1");
    command
}

/// `xorl-dist` on `ranks` ranks.
pub fn xorl(ranks: usize, arguments: &[&str]) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_xorl-dist"));
    ranks_of(program, ranks).args(arguments).env("HF_HUB_OFFLINE", "1").output().unwrap()
}

/// Has `command` find our library in place of CUDA's driver and NCCL, and leave in `folder` what it is called for.
pub fn stand_in(command: &mut Command, folder: &Path) {
    let libraries = folder.join("libraries");
    std::fs::create_dir_all(&libraries).unwrap();
    let built = Path::new(env!("CARGO_BIN_EXE_xorl-dist")).with_file_name("examples").join("libstand_in.so");
    assert!(built.is_file(), "{} is missing: cargo build --example stand_in", built.display());
    for name in ["libcuda.so", "libnccl.so"] {
        std::os::unix::fs::symlink(&built, libraries.join(name)).unwrap();
    }
    command.env("LD_LIBRARY_PATH", &libraries).env("XORL_STAND_IN", folder);
    // Streams are late, each time by something else.
    command.env("XORL_STAND_IN_JITTER_US", "300");
}

/// Starts this test program once for each of `world` ranks; each runs the test `worker`, which finds `case` in
/// XORL_TEST_CASE and leaves its results in `folder`. `prepare` may change the command.
pub fn run_workers<C: serde::Serialize + ?Sized>(
    worker: &str,
    world: usize,
    case: &C,
    folder: &Path,
    prepare: impl FnOnce(&mut Command),
) {
    let mut command = ranks_of(&std::env::current_exe().unwrap(), world);
    command.args(["--exact", worker, "--nocapture", "--test-threads=1"]);
    let case = serde_json::to_string(case).unwrap();
    command.env("XORL_TEST_CASE", &case).env("XORL_TEST_OUT", folder);
    prepare(&mut command);
    let output = command.output().unwrap();
    let text = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{case}: {text}");
    assert!(text.contains("1 passed"), "{case}: {text}");
}

/// What the run said is part of the failure.
pub fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The one `error:` line of a run that ended with `code`.
pub fn failed(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0].to_owned()
}

/// 30 rows of token ids below 503, of different lengths, the first two tokens of each without a label.
pub fn make_rows(path: &Path) {
    let row = |i: u64| {
        let stream = Stream::new(11, &format!("row {i}"));
        let ids: Vec<u64> = (0..5 + i % 9).map(|j| stream.below(j, 503)).collect();
        let labels: Vec<i64> =
            ids.iter().enumerate().map(|(j, &id)| if j < 2 { -100 } else { id as i64 }).collect();
        json!({"input_ids": ids, "labels": labels}).to_string() + "\n"
    };
    std::fs::write(path, (0..30).map(row).collect::<String>()).unwrap();
}

/// The lines of metrics.jsonl.
pub fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The values of a file's fp32 tensor.
pub fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap_or_else(|_| panic!("{name} is not in the file"));
    view.data().as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

/// Relative L2 distance ‖a − b‖ / ‖b‖.
pub fn relative<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| a.into() - b.into()));
    difference / norm(&mut b.iter().map(|&b| b.into())).max(1e-30)
}

/// Polls until `found` has something.
pub fn wait_for<T>(what: &str, found: impl FnMut() -> Option<T>) -> T {
    wait_for_at_most(Duration::from_secs(60), what, found)
}

/// The same with a limit of its own.
pub fn wait_for_at_most<T>(limit: Duration, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(begin.elapsed() < limit, "{what} did not come");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Starts a program of which only stderr is heard.
pub fn started(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end of such a program: its stderr and its exit code, `None` if a signal ended it.
pub fn ended(child: Child) -> (String, Option<i32>) {
    let output = child.wait_with_output().unwrap();
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
}

/// Sends `signal` to a child that was not waited for.
pub fn signal(process: u32, signal: i32) {
    // SAFETY: kill(2) takes any numbers; the process is a child of this test that was not waited for.
    unsafe { libc::kill(process as i32, signal) };
}

/// The process of rank `rank`, somewhere below `launcher`.
pub fn rank_process(launcher: u32, rank: usize) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).ok()?;
    children.split_whitespace().filter_map(|child| child.parse().ok()).find_map(|child: u32| {
        let environment = std::fs::read(format!("/proc/{child}/environ")).ok()?;
        let rank = rank.to_string();
        let is_rank = environment.split(|&byte| byte == 0).any(|variable| {
            ["OMPI_COMM_WORLD_RANK=", "PMI_RANK="]
                .iter()
                .any(|name| variable == format!("{name}{rank}").as_bytes())
        });
        if is_rank { Some(child) } else { rank_process(child, rank.parse().ok()?) }
    })
}
