//! Commands of rank 0 reach ranks that sleep within milliseconds; a rank that dies meanwhile ends all.
//!
//! Each test starts this binary under mpirun; its ranks run [`mpi_worker`].

use crate::common::{is_mpich, ranks_of};
use serde_json::{Value, json};
use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};
use xorl_dist::comm::{CommandReceiver, CommandSender, Commands, World};

const RANKS: usize = 4;
const LARGE: usize = 4 << 20;
const TIMES: usize = 100;
/// Time between two commands, in which all ranks fall asleep.
const PAUSE: Duration = Duration::from_millis(20);
/// Time without any command.
const IDLE: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(30);

/// The bytes of command `sequence`: a formula, so that every rank knows what has to arrive.
fn payload(sequence: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| (i.wrapping_mul(sequence + 2) >> 3) as u8).collect()
}

/// CPU time of this process so far (user and system).
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // After the name, which may hold spaces: fields 14 and 15, in ticks of 10 ms.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}

/// One rank of a test. Does nothing unless a test started it.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_COMMANDS") else { return };
    let world = World::start().unwrap();
    let rank = world.rank();
    let seen = match (case.as_str(), world.commands().unwrap()) {
        ("times", Commands::Sender(sender)) => time_commands(&sender),
        ("times", Commands::Receiver(receiver)) => receive_and_check(&receiver),
        ("one", Commands::Sender(sender)) => {
            sender.send(payload(1, LARGE)).unwrap().wait(LIMIT).unwrap();
            Value::Null
        }
        ("one", Commands::Receiver(receiver)) => {
            assert!(receiver.recv().unwrap().payload == payload(1, LARGE));
            Value::Null
        }
        ("death", Commands::Sender(sender)) => loop {
            // The others end this rank.
            sender.send(vec![1; 16 * LARGE]).unwrap();
        },
        ("death", Commands::Receiver(receiver)) => {
            receiver.recv().unwrap();
            if rank == 2 {
                // SAFETY: kill(2) takes any numbers; getpid(2) has no preconditions. The signal is for this process.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
            loop {
                receiver.recv().unwrap();
            }
        }
        (other, _) => panic!("no case {other}"),
    };
    let out = std::env::var("XORL_TEST_OUT").unwrap();
    std::fs::write(Path::new(&out).join(format!("{rank}.json")), seen.to_string()).unwrap();
}

/// Milliseconds from sending to the acknowledgement of all ranks, for each command.
fn time_commands(sender: &CommandSender) -> Value {
    let mut milliseconds = Vec::new();
    for sequence in 1..=TIMES as u64 {
        let bytes = payload(sequence, LARGE);
        thread::sleep(PAUSE);
        let begin = Instant::now();
        let delivery = sender.send(bytes).unwrap();
        delivery.wait(LIMIT).unwrap();
        milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
        assert_eq!(delivery.sequence(), sequence);
    }
    let before = cpu_time();
    thread::sleep(IDLE);
    let idle = (cpu_time() - before).as_secs_f64();
    sender.send(Vec::new()).unwrap().wait(LIMIT).unwrap();
    json!({"milliseconds": milliseconds, "idle_cpu_seconds": idle})
}

/// Checks the commands of [`time_commands`], and measures the CPU time of the pause before the last one.
fn receive_and_check(receiver: &CommandReceiver) -> Value {
    for sequence in 1..=TIMES as u64 {
        let command = receiver.recv().unwrap();
        assert!(command.sequence == sequence && command.payload == payload(sequence, LARGE));
    }
    let (before, begin) = (cpu_time(), Instant::now());
    let last = receiver.recv().unwrap();
    assert_eq!(last.payload, b"");
    assert!(begin.elapsed() > IDLE / 2);
    json!({"idle_cpu_seconds": (cpu_time() - before).as_secs_f64()})
}

fn run(case: &str, out: &Path) -> Output {
    command(case, out).output().unwrap()
}

fn command(case: &str, out: &Path) -> Command {
    let mut command = ranks_of(&std::env::current_exe().unwrap(), RANKS);
    command.args(["--exact", "commands::mpi_worker", "--nocapture", "--test-threads=1"]);
    command.env("XORL_TEST_COMMANDS", case).env("XORL_TEST_OUT", out).env_remove("RUST_BACKTRACE");
    command
}

/// 4 MiB to 3 idle ranks, acknowledged by all, within 20 ms (median).
#[test]
fn mpi_a_large_command_reaches_idle_ranks_in_20_ms() {
    let folder = tempfile::tempdir().unwrap();
    crate::common::succeeded(&run("times", folder.path()));
    let seen: Vec<Value> = (0..RANKS)
        .map(|rank| std::fs::read_to_string(folder.path().join(format!("{rank}.json"))).unwrap())
        .map(|text| serde_json::from_str(&text).unwrap())
        .collect();
    let mut milliseconds: Vec<f64> =
        seen[0]["milliseconds"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
    assert_eq!(milliseconds.len(), TIMES);
    milliseconds.sort_by(f64::total_cmp);
    let (median, maximum) = (milliseconds[TIMES / 2], milliseconds[TIMES - 1]);
    let idle: Vec<f64> = seen.iter().map(|rank| rank["idle_cpu_seconds"].as_f64().unwrap()).collect();
    println!(
        "{}",
        json!({
            "command_bytes": LARGE, "ranks": RANKS, "times": TIMES, "median_ms": median, "maximum_ms": maximum,
            "idle_cpu_seconds_in_2_s": idle,
        })
    );
    assert!(median <= 20.0, "median {median} ms, maximum {maximum} ms");
    // A rank that polls without sleeping takes all of it.
    assert!(idle.iter().all(|&seconds| seconds < 0.1 * IDLE.as_secs_f64()), "{idle:?}");
}

#[test]
fn mpi_a_rank_that_dies_in_a_large_command_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let output = run("death", folder.path());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    // The launcher or the watchdog names the rank, whichever notices first.
    let ours =
        said.lines().any(|line| line.starts_with("error: rank 2 (process ") && line.contains(" has died; "));
    assert!(ours || said.contains("process rank 2 with PID") || is_mpich(), "{said}");
}

/// A world of one rank has a command channel too, with no rank to wait for.
#[test]
fn one_rank_sends_commands_to_nobody() {
    let world = World::start().unwrap();
    let Commands::Sender(sender) = world.commands().unwrap() else { panic!("rank 0 sends") };
    for sequence in 1..20 {
        let delivery = sender.send(vec![1; 100]).unwrap();
        assert_eq!((delivery.sequence(), delivery.wait(Duration::ZERO)), (sequence, Ok(())));
    }
}

/// Strangers connect to the control port as fast as they can, from before it opens until the end.
#[test]
fn mpi_strangers_that_flood_the_control_port_end_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port();
    let (is_over, made, begin) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
    let output = thread::scope(|scope| {
        for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"XC\x01\x01\x05\0\0\0\"Bye\""] {
            let (is_over, made) = (&is_over, &made);
            scope.spawn(move || {
                let mut open = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let address = (Ipv4Addr::LOCALHOST, port).into();
                    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200))
                    else {
                        thread::sleep(Duration::from_micros(200));
                        continue;
                    };
                    made.fetch_add(1, Ordering::Relaxed);
                    let _ = stream.write_all(bytes);
                    open.push(stream);
                    if open.len() > 200 {
                        open.clear();
                    }
                }
            });
        }
        let output =
            command("one", folder.path()).env("XORL_CONTROL_PORT", port.to_string()).output().unwrap();
        is_over.store(true, Ordering::Relaxed);
        output
    });
    crate::common::succeeded(&output);
    println!("{} connections of strangers in {:?}", made.load(Ordering::Relaxed), begin.elapsed());
    assert!(made.into_inner() > 0, "the port was never open to them");
    assert!(begin.elapsed() < LIMIT);
}
