//! Ranks on two hosts train what they train on one, and notice when the network between them is gone. The hosts are
//! network namespaces with names and addresses of their own; that takes root and Open MPI: `ci/long.sh hosts`.

use crate::common::{rank_process, started, succeeded, tiny::TinyRun, wait_for};
use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

const TIMEOUT: u64 = 4;

/// Two hosts, as long as this lives.
struct Hosts {
    name: String,
}

impl Hosts {
    fn up() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let hosts = Self { name: format!("x{}n{number}", std::process::id() % 100_000) };
        succeeded(&hosts.script("up"));
        hosts
    }

    fn command(&self, what: &str) -> Command {
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/two.sh"));
        script.args([what, &self.name]).env("OMP_NUM_THREADS", "1");
        script
    }

    fn script(&self, what: &str) -> Output {
        self.command(what).output().unwrap()
    }

    /// `run` on both, with `each` ranks on one.
    fn run(&self, each: usize, run: &TinyRun, out: &str, more: &[&str]) -> Command {
        let mut command = self.command("run");
        command.arg(each.to_string()).arg(env!("CARGO_BIN_EXE_xorl-dist")).args(run.arguments(out, more));
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.script("down");
    }
}

#[test]
#[ignore = "takes root and network namespaces: ci/long.sh hosts"]
fn mpi_two_hosts_train_what_one_trains_and_notice_a_cut() {
    let (hosts, run) = (Hosts::up(), TinyRun::of_experts());
    let over = ["--train.expert_parallel_size", "2"];
    succeeded(&run.run(2, "one", &over));
    succeeded(&hosts.run(1, &run, "two", &over).output().unwrap());
    assert_eq!(run.story("two"), run.story("one"), "every metric but times and memory");

    let timeout = TIMEOUT.to_string();
    let long = [
        "--train.num_train_epochs",
        "9999",
        "--train.max_steps",
        "90000",
        "--train.comm_timeout_s",
        &timeout,
    ];
    let mut child = started(hosts.run(1, &run, "cut", &[&over[..], &long].concat()));
    let made = || fs::read_to_string(run.at("cut").join("metrics.jsonl")).unwrap_or_default().lines().count();
    wait_for("the first steps", || (made() >= 5).then_some(()));
    let ranks: Vec<u32> = (0..2).map(|rank| rank_process(child.id(), rank).unwrap()).collect();
    succeeded(&hosts.script("cut"));
    let begin = Instant::now();
    let exists = |process: &u32| fs::exists(format!("/proc/{process}")).unwrap();
    while ranks.iter().any(exists) {
        assert!(begin.elapsed() < Duration::from_secs(TIMEOUT + 10), "ranks are left");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{{\"gone_after_seconds\": {:.1}}}", begin.elapsed().as_secs_f64());
    // mpirun itself waits for its other host for longer.
    drop(hosts);
    let _ = child.kill();
    assert!(!child.wait().unwrap().success());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let line = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("rank 1 (process") && line.contains("on host-b) for"), "{line}");
}

/// What one host has to be told of the other's pieces goes over the cable once, not once for each of its ranks.
#[test]
#[ignore = "takes root and network namespaces: ci/long.sh hosts"]
fn mpi_gathers_cross_the_network_once_for_a_host() {
    let (hosts, run) = (Hosts::up(), TinyRun::new());
    let config = fs::read_to_string(run.at("config.json")).unwrap();
    let large = config.replace("\"hidden_size\":48", "\"hidden_size\":512").replace(":80", ":2048");
    assert_ne!(large, config);
    fs::write(run.at("config.json"), large).unwrap();
    let carried =
        || -> f64 { String::from_utf8_lossy(&hosts.script("carried").stdout).trim().parse().unwrap() };
    let before = carried();
    let short = ["--train.global_batch_size", "8", "--train.max_steps", "4"];
    succeeded(&hosts.run(2, &run, "two", &short).output().unwrap());
    let carried = carried() - before;
    succeeded(&run.run(4, "one", &short));
    assert_eq!(run.story("two"), run.story("one"), "every metric but times and memory");
    let received = |operation: &str| -> f64 {
        let lines = crate::common::metrics(&run.at("two"));
        lines.iter().map(|line| line["comm_bytes"][operation].as_f64().unwrap()).sum()
    };
    // A rank receives 3 of 4 pieces, two of which are of the other host: once for both ranks. A gradient's pieces come
    // to each of the two ranks by themselves.
    let needed = received("all_gather/shard") * 2.0 / 3.0 + received("reduce_scatter/shard") * 4.0 / 3.0;
    println!("{{\"carried\": {carried}, \"needed\": {needed}}}");
    assert!(carried >= needed && carried < 1.15 * needed, "{carried} bytes, {needed} are needed");
}
