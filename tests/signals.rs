//! A run that is asked to stop saves where it stands and ends with 75; the same command then goes on as if nothing had
//! happened.

use crate::common::{
    ended, is_mpich, mpirun, rank_process, signal, started, succeeded,
    tiny::{TinyRun, differences},
    wait_for,
};
use serde_json::Value;
use std::{
    fs,
    path::Path,
    process::{Child, Command},
    time::Duration,
};
use xorl_dist::checkpoint::publish;

const LONG: usize = 200;
/// Long enough to be met while it runs; nothing is saved but where it stops and at its end.
const RUN: [&str; 8] = [
    "--train.num_train_epochs",
    "99",
    "--train.max_steps",
    "200",
    "--train.save_steps",
    "0",
    "--train.load_checkpoint_path",
    "auto",
];

/// Metrics that do not depend on what the slots held when a process began.
fn course(run: &TinyRun, out: &str) -> Vec<Value> {
    let mut lines = run.story(out);
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("comm_bytes");
    }
    lines
}

fn stops_and_goes_on(ranks: usize, signals: &[i32]) {
    stops_and_goes_on_under(ranks, signals, |run, out| run.command(ranks, out, &RUN));
}

/// `start` makes the run of `ranks` ranks that is sent the signals.
fn stops_and_goes_on_under(ranks: usize, signals: &[i32], start: impl Fn(&TinyRun, &str) -> Command) {
    let run = TinyRun::new();
    succeeded(&run.run(ranks, "whole", &RUN));
    for &number in signals {
        let out = format!("signal {number}");
        let child = started(start(&run, &out));
        let lines =
            || fs::read_to_string(run.at(&out).join("metrics.jsonl")).unwrap_or_default().lines().count();
        wait_for("the fifth step", || (lines() >= 5).then_some(()));
        signal(child.id(), number);
        let (said, code) = ended(child);
        // MPICH's mpiexec 4.0 forgets its ranks' code now and then when it has passed on a signal.
        let forgets = ranks > 1 && code == Some(0) && is_mpich();
        assert!(code == Some(75) || forgets, "signal {number}: {code:?} {said}");
        let [step] = run.steps(&out)[..] else { panic!("not one step: {:?}", run.steps(&out)) };
        assert!((5..LONG).contains(&step) && step == lines(), "step {step} of {} lines", lines());
        assert!(said.contains(&format!("stopped after step {step} of {LONG}")), "{said}");
        // Said at once, by one rank; between two steps it is not yet known which of them ends the run.
        let first: Vec<&str> = said.lines().filter(|line| line.starts_with("stopping: step ")).collect();
        assert_eq!(first.len(), 1, "{said}");
        let named = [step - 1, step, step + 1].map(|step| format!("step {step} is finished and saved"));
        assert!(named.iter().any(|words| first[0].contains(words)), "step {step}: {said}");

        succeeded(&run.run(ranks, &out, &RUN));
        assert_eq!(course(&run, &out), course(&run, "whole"));
        let different = differences(&run.step("whole", LONG), &run.step(&out, LONG));
        assert!(different.is_empty(), "{different:?}");
    }
}

/// True if `process` has a handler for SIGUSR1.
fn listens(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask & (1 << (libc::SIGUSR1 - 1)) != 0)
}

/// The processes of the ranks that `child` has started, or is.
fn processes(child: &Child, ranks: usize) -> Vec<u32> {
    if ranks == 1 {
        return vec![child.id()];
    }
    (0..ranks).map(|rank| wait_for("a rank", || rank_process(child.id(), rank))).collect()
}

/// Gives `run` its 30 rows so many `times`: a step has no more rows than an epoch.
fn repeat_rows(run: &TinyRun, times: usize) {
    let rows = fs::read_to_string(run.at("rows.jsonl")).unwrap();
    fs::write(run.at("rows.jsonl"), rows.repeat(times)).unwrap();
}

/// A phase of a run in which a signal comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Data,
    Load,
    /// A micro-batch of a step that is finished, or of one that is dropped.
    MicroBatch {
        dropped: bool,
    },
    Saving,
}

/// 150 micro-batches of a row in each step, 75 on each of 2 ranks.
const LONG_STEPS: [&str; 8] = [
    "--train.max_steps",
    "6",
    "--train.num_train_epochs",
    "99",
    "--train.micro_batch_size",
    "1",
    "--train.global_batch_size",
    "150",
];

/// Sends SIGUSR1 to a run of `ranks` ranks in `phase`, `rounds` times. What was published is whole, and a resume ends
/// as the run that nobody stopped.
fn stops_in(phase: Phase, ranks: usize, rounds: usize) {
    let run = TinyRun::new();
    // Many values to draw.
    let model = fs::read_to_string(run.at("config.json")).unwrap().replace("503", "300000");
    fs::write(run.at("large.json"), model).unwrap();
    let large = run.at("large.json").display().to_string();
    repeat_rows(&run, 5);
    let settings: Vec<&str> = match phase {
        Phase::Data => RUN.to_vec(),
        Phase::Load => vec!["--model.config_path", &large, "--train.max_steps", "2"],
        Phase::MicroBatch { dropped: false } => [&LONG_STEPS[..], &["--train.save_steps", "0"]].concat(),
        Phase::MicroBatch { dropped: true } => {
            [&LONG_STEPS[..], &["--train.save_steps", "0", "--train.stop_grace_s", "0"]].concat()
        }
        Phase::Saving => [&RUN[..], &["--train.save_steps", "1", "--train.max_steps", "40"]].concat(),
    };
    let settings = [&settings[..], &["--train.load_checkpoint_path", "auto"]].concat();
    let is_early = matches!(phase, Phase::Data | Phase::Load);
    if !is_early {
        succeeded(&run.run(ranks, "whole", &settings));
    }
    let (mut round, mut attempts) = (0, 0);
    while round < rounds {
        attempts += 1;
        assert!(attempts <= 3 * rounds + 3, "{phase:?} was not met");
        let out = format!("out {attempts}");
        let child = started(run.command(ranks, &out, &settings));
        let lines =
            || fs::read_to_string(run.at(&out).join("metrics.jsonl")).unwrap_or_default().lines().count();
        match phase {
            Phase::Data => {
                let all = processes(&child, ranks);
                wait_for("handlers", || all.iter().all(|&process| listens(process)).then_some(()));
            }
            Phase::Load => wait_for("the lock", || run.at(&out).join(".lock").exists().then_some(())),
            Phase::MicroBatch { .. } => {
                wait_for("the second step", || (lines() >= 2).then_some(()));
                // Somewhere in the third.
                std::thread::sleep(Duration::from_millis(3 + 7 * (attempts as u64 % 5)));
            }
            Phase::Saving => {
                wait_for("the fifth save", || (run.steps(&out).last() >= Some(&5)).then_some(()));
                std::thread::sleep(Duration::from_micros(300 * (attempts as u64 % 7)));
            }
        }
        signal(child.id(), libc::SIGUSR1);
        let (said, code) = ended(child);
        let forgets = ranks > 1 && code == Some(0) && is_mpich();
        assert!(code == Some(75) || forgets, "{phase:?}: {code:?} {said}");
        let steps = run.steps(&out);
        if is_early {
            assert!(said.contains("stopping: no step is made yet, and nothing is saved"), "{said}");
            assert!(steps.is_empty() && lines() == 0, "{steps:?}: {said}");
            round += 1;
            continue;
        }
        assert!(said.contains(&format!("stopped after step {} of", lines())), "{said}");
        assert_eq!(steps.last(), Some(&lines()), "{said}");
        steps.iter().for_each(|&step| publish::verify(&run.step(&out, step)).unwrap());
        let met = match phase {
            Phase::MicroBatch { dropped } => said.contains("was dropped (train.stop_grace_s)") == dropped,
            _ => true,
        };
        round += usize::from(met);
        succeeded(&run.run(ranks, &out, &settings));
        assert_eq!(course(&run, &out), course(&run, "whole"));
        let last = *run.steps("whole").last().unwrap();
        let different = differences(&run.step("whole", last), &run.step(&out, last));
        assert!(different.is_empty(), "{phase:?}: {different:?}");
    }
}

const PHASES: [Phase; 5] = [
    Phase::Data,
    Phase::Load,
    Phase::MicroBatch { dropped: false },
    Phase::MicroBatch { dropped: true },
    Phase::Saving,
];

#[test]
fn a_signal_in_any_phase_stops_one_process() {
    PHASES.into_iter().for_each(|phase| stops_in(phase, 1, 1));
}

#[test]
fn mpi_a_signal_in_any_phase_stops_all_ranks() {
    PHASES.into_iter().for_each(|phase| stops_in(phase, 2, 1));
}

/// Run by `ci/long.sh signals`.
#[test]
#[ignore = "takes minutes"]
fn ten_signals_in_each_phase_stop_one_and_two_ranks() {
    for phase in PHASES {
        for ranks in [1, 2] {
            stops_in(phase, ranks, 10);
            println!("{phase:?}, {ranks} ranks: 10 of 10");
        }
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once_and_says_so() {
    let run = TinyRun::new();
    repeat_rows(&run, 500);
    // The step goes on, so that the second signal is in time on a busy machine.
    let goes_on = ["--train.global_batch_size", "20000", "--train.stop_grace_s", "3600"];
    let child = started(run.command(1, "out", &[&LONG_STEPS[..], &goes_on].concat()));
    wait_for("the run", || run.at("out/metrics.jsonl").exists().then_some(()));
    for number in [libc::SIGUSR1, libc::SIGINT] {
        signal(child.id(), number);
        std::thread::sleep(Duration::from_millis(50));
    }
    let (said, code) = ended(child);
    assert_eq!(code, Some(128 + libc::SIGINT), "{said}");
    assert!(said.contains("ended at once by a second signal: nothing of this run is saved"), "{said}");
    assert_eq!(run.steps("out"), Vec::<usize>::new());
}

#[test]
fn one_process_stops_for_usr1_term_and_int() {
    stops_and_goes_on(1, &[libc::SIGUSR1, libc::SIGTERM, libc::SIGINT]);
}

#[test]
fn mpi_usr1_to_mpirun_stops_all_ranks() {
    stops_and_goes_on(2, &[libc::SIGUSR1]);
}

#[test]
fn mpi_the_launch_script_passes_on_usr1_term_and_int() {
    stops_and_goes_on_under(2, &[libc::SIGUSR1, libc::SIGTERM, libc::SIGINT], |run, out| {
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
        script
            .args(["-n", "2"])
            .args(run.arguments(out, &RUN))
            .env("XORL_DIST", env!("CARGO_BIN_EXE_xorl-dist"));
        script
    });
}

/// mpirun alone leaves its ranks no time to save: nothing is published, and nothing is torn.
#[test]
fn mpi_term_to_mpirun_alone_saves_nothing_and_tears_nothing() {
    let run = TinyRun::new();
    for number in [libc::SIGTERM, libc::SIGINT] {
        let out = format!("signal {number}");
        let mut launcher = mpirun();
        // It takes mpirun half a second and more to end its ranks.
        let steps = [&RUN[..], &["--train.max_steps", "5000"]].concat();
        launcher.args(["-n", "2", env!("CARGO_BIN_EXE_xorl-dist")]).args(run.arguments(&out, &steps));
        let child = started(launcher);
        let lines =
            || fs::read_to_string(run.at(&out).join("metrics.jsonl")).unwrap_or_default().lines().count();
        wait_for("the fifth step", || (lines() >= 5).then_some(()));
        signal(child.id(), number);
        let (said, code) = ended(child);
        let failed = code != Some(0) || is_mpich();
        assert!(failed && code != Some(75), "{code:?}");
        let told = said.matches("which ends all ranks now: nothing of this run is saved").count();
        assert!(told == 1 || is_mpich(), "{said}");
        assert_eq!(run.steps(&out), Vec::<usize>::new());
        succeeded(&run.run(2, &out, &RUN));
        assert_eq!(run.steps(&out), [LONG]);
    }
}
