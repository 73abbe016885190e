//! Ranks never hang: when one is killed or stops, all end soon, with a line that names it.

use crate::common::{is_mpich, rank_process, signal, started, tiny::TinyRun, wait_for};
use serde_json::{Value, json};
use std::{
    fs,
    io::Read,
    process::Child,
    time::{Duration, Instant},
};
use xorl_dist::rng::Stream;

const RANKS: usize = 4;
/// Long enough to be met at any moment; a save now and then is one of them.
const LONG: [&str; 10] = [
    "--train.num_train_epochs",
    "999",
    "--train.max_steps",
    "6000",
    "--train.save_steps",
    "40",
    "--train.comm_timeout_s",
    "3",
    "--train.save_total_limit",
    "2",
];
/// For the launcher to take away what is left.
const GRACE: Duration = Duration::from_secs(10);

/// A run of four ranks that has made a few steps, and its processes by rank.
struct Running {
    child: Child,
    processes: Vec<u32>,
}

impl Running {
    fn start(run: &TinyRun, out: &str, steps: usize) -> Self {
        Self::with(run, out, steps, &[])
    }

    fn with(run: &TinyRun, out: &str, steps: usize, more: &[&str]) -> Self {
        let mut command = run.command(RANKS, out, &[&LONG[..], more].concat());
        // With a second arena, glibc serves the refused request from that one's 64 MB.
        command.env_remove("RUST_BACKTRACE").env("MALLOC_ARENA_MAX", "1");
        let child = started(command);
        let metrics = run.at(out).join("metrics.jsonl");
        let made = || fs::read_to_string(&metrics).unwrap_or_default().lines().count();
        wait_for("the first steps", || (made() >= steps).then_some(()));
        let processes = (0..RANKS).map(|rank| rank_process(child.id(), rank).unwrap()).collect();
        Self { child, processes }
    }

    /// Does `number` to rank `rank`; how long until all are gone, and what was said.
    fn hit(mut self, rank: usize, number: i32, limit: Duration) -> (Duration, String) {
        let begin = Instant::now();
        signal(self.processes[rank], number);
        let exists = |process: &u32| fs::exists(format!("/proc/{process}")).unwrap();
        loop {
            let ended = self.child.try_wait().unwrap();
            if let Some(status) = ended.filter(|_| !self.processes.iter().any(exists)) {
                assert!(!status.success(), "a run that lost a rank is no success");
                break;
            }
            if begin.elapsed() > limit {
                let left: Vec<_> = self.processes.iter().filter(|process| exists(process)).collect();
                self.processes.iter().for_each(|&process| signal(process, libc::SIGKILL));
                panic!("rank {rank}, signal {number}: {left:?} are left after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let took = begin.elapsed();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (took, said)
    }
}

/// Hits ranks at moments that differ each time; how long it took at most.
fn hit_and_gone(
    times: usize,
    number: i32,
    limit: Duration,
    names: impl Fn(usize, u32, &str) -> bool,
) -> Duration {
    let run = TinyRun::new();
    let stream = Stream::new(3, &format!("moments of {number}"));
    let mut longest = Duration::ZERO;
    for time in 0..times {
        let (out, rank) = (format!("time {time}"), time % RANKS);
        let running = Running::start(&run, &out, 3);
        std::thread::sleep(Duration::from_millis(stream.below(time as u64, 700)));
        let process = running.processes[rank];
        let (took, said) = running.hit(rank, number, limit);
        assert!(names(rank, process, &said), "time {time}, rank {rank} (process {process}): {said}");
        longest = longest.max(took);
    }
    println!(
        "{{\"signal\": {number}, \"times\": {times}, \"longest_seconds\": {:.1}}}",
        longest.as_secs_f64()
    );
    longest
}

/// The launcher or one of ours says which.
fn a_killed_rank_ends_all(times: usize) {
    hit_and_gone(times, libc::SIGKILL, GRACE, |rank, process, said| {
        let ours = said.contains(&format!("rank {rank} (process {process}"));
        let theirs = said.contains(&format!("process rank {rank} with PID {process}"))
            || said.contains(&format!("RANK {rank} PID {process}"));
        // MPICH's launcher ends the others before they can say it, and names the process on its standard output.
        ours || theirs || is_mpich()
    });
}

fn a_stopped_rank_is_named(times: usize) {
    hit_and_gone(times, libc::SIGSTOP, Duration::from_secs(3) + GRACE, |rank, process, said| {
        let ours: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        ours.len() == 1 && ours[0].contains(&format!("rank {rank} (process {process}"))
    });
}

#[test]
fn mpi_a_killed_rank_ends_all_within_seconds() {
    a_killed_rank_ends_all(4);
}

#[test]
fn mpi_a_stopped_rank_is_named_within_its_deadline() {
    a_stopped_rank_is_named(4);
}

#[test]
#[ignore = "minutes: ci/long.sh watchdog"]
fn mpi_kills_at_20_moments() {
    a_killed_rank_ends_all(20);
}

#[test]
#[ignore = "minutes: ci/long.sh watchdog"]
fn mpi_stops_at_20_moments() {
    a_stopped_rank_is_named(20);
}

/// The ranks that were left say what they did last.
#[test]
fn mpi_the_last_collectives_of_each_rank_are_left_behind() {
    let run = TinyRun::new();
    Running::start(&run, "out", 3).hit(2, libc::SIGSTOP, Duration::from_secs(3) + GRACE);
    for rank in [0, 1, 3] {
        let text = fs::read_to_string(run.at("out").join(format!("flight/rank_{rank}.json"))).unwrap();
        let record: Value = serde_json::from_str(&text).unwrap();
        assert!(record["ended"].as_str().unwrap().contains("rank 2 (process"), "{record}");
        let last = record["last"].as_array().unwrap();
        let (before, in_it) = last.split_at(last.len() - 1);
        assert!(before.len() > 10 && before.iter().all(|flown| flown["step"].as_u64() >= Some(0)));
        assert!(in_it[0]["left"].is_null(), "it was waiting: {in_it:?}");
    }
}

/// libtorch panics where there is no memory: that ends all ranks, and is told in one line.
#[test]
fn mpi_a_rank_without_memory_ends_all() {
    let run = TinyRun::new();
    let row = |tokens: usize| {
        let ids: Vec<usize> = (0..tokens).map(|i| i * 7 % 503).collect();
        json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
    };
    // Long ones come when rank 1 may have no more than it has: a hundred steps of short ones take a slow machine half a
    // minute.
    let rows: Vec<String> = (0..1600).map(|_| row(6)).chain((0..16).map(|_| row(4000))).collect();
    fs::write(run.at("rows.jsonl"), rows.concat()).unwrap();
    // No save, which would fail first.
    let as_they_are = [
        "--data.shuffle_merged_datasets",
        "false",
        "--data.shuffle_before_merging_datasets",
        "false",
        "--train.save_steps",
        "0",
    ];
    let running = Running::with(&run, "out", 3, &as_they_are);
    let process = running.processes[1];
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let has: u64 = kilobytes.split_whitespace().next().unwrap().parse().unwrap();
    let most = (has << 10) + (8 << 20);
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: prlimit(2) reads `limit`, and writes nothing where the old limit is not asked for.
    let set = unsafe {
        libc::prlimit(process as i32, libc::RLIMIT_AS, &limit, std::ptr::null_mut::<libc::rlimit>())
    };
    assert_eq!(set, 0);
    // No signal: it comes by itself.
    let (_, said) = running.hit(1, 0, Duration::from_secs(180));
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].starts_with("error: rank 1: ") && lines[0].contains("can't allocate memory"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
