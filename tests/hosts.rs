//! Ranks on two hosts train what they train on one, and notice when the network between them is gone. The hosts are network
//! namespaces with names and addresses of their own; that takes root and Open MPI: `ci/long.sh hosts`.

mod common;

use common::{rank_process, started, succeeded, tiny::TinyRun, wait_for};
use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

const TIMEOUT: u64 = 4;

/// Two hosts, as long as this lives.
struct Hosts {
    name: String,
}

impl Hosts {
    fn up() -> Self {
        let hosts = Self { name: format!("x{}", std::process::id() % 100_000) };
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

    /// `run` on both.
    fn run(&self, run: &TinyRun, out: &str, more: &[&str]) -> Command {
        let mut command = self.command("run");
        command.arg(env!("CARGO_BIN_EXE_xorl-dist")).args(run.arguments(out, more));
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
    succeeded(&hosts.run(&run, "two", &over).output().unwrap());
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
    let mut child = started(hosts.run(&run, "cut", &[&over[..], &long].concat()));
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
