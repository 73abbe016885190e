//! A run that is asked to stop saves where it stands and ends with 75; the same command then goes on as if nothing had
//! happened.

mod common;

use common::{signal, started, succeeded, tiny::TinyRun, tiny::differences, wait_for};
use serde_json::Value;
use std::{fs, io::Read};

const LONG: usize = 300;
/// Long enough to be met while it runs; nothing is saved but where it stops and at its end.
const RUN: [&str; 8] = [
    "--train.num_train_epochs",
    "99",
    "--train.max_steps",
    "300",
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
    let run = TinyRun::new();
    succeeded(&run.run(ranks, "whole", &RUN));
    for &number in signals {
        let out = format!("signal {number}");
        let mut child = started(run.command(ranks, &out, &RUN));
        let lines =
            || fs::read_to_string(run.at(&out).join("metrics.jsonl")).unwrap_or_default().lines().count();
        wait_for("the fifth step", || (lines() >= 5).then_some(()));
        signal(child.id(), number);
        let (mut said, status) = (String::new(), child.wait().unwrap());
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(75), "signal {number}: {said}");
        let [step] = run.steps(&out)[..] else { panic!("not one step: {:?}", run.steps(&out)) };
        assert!((5..LONG).contains(&step) && step == lines(), "step {step} of {} lines", lines());
        assert!(said.contains(&format!("stopped after step {step} of {LONG}")), "{said}");

        succeeded(&run.run(ranks, &out, &RUN));
        assert_eq!(course(&run, &out), course(&run, "whole"));
        let different = differences(&run.step("whole", LONG), &run.step(&out, LONG));
        assert!(different.is_empty(), "{different:?}");
    }
}

#[test]
fn one_process_stops_for_usr1_term_and_int() {
    stops_and_goes_on(1, &[libc::SIGUSR1, libc::SIGTERM, libc::SIGINT]);
}

#[test]
fn mpi_usr1_to_mpirun_stops_all_ranks() {
    stops_and_goes_on(2, &[libc::SIGUSR1]);
}
