//! A step that an older build saved goes on with this build as it went on with that one.
//!
//! The steps of tests/fixtures/steps were written by the build of commit 61338af, whose training state has format 2;
//! make.py there says how. Beside each lie the metrics and the adapter of the run that was not stopped.

use crate::common::{
    metrics, ranks_of, relative, succeeded,
    tiny::{adapter, copy_tree, differences},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

const STOPPED: usize = 6;
const STEPS: usize = 12;
/// Between worlds, or between CPUs: libtorch's sums go in another order.
const TOLERANCE: f64 = 1e-5;

/// What the fixture's numbers may depend on, as make.py writes it.
fn cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map_or("", |(_, value)| value.trim()).to_owned()
    };
    ["vendor_id", "cpu family", "model"].map(field).join(" ")
}

/// Fails unless two numbers are equal, or close where `exact` is false; other values have to be equal.
fn same(found: &Value, expected: &Value, exact: bool, at: &str) {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            for (field, expected) in expected {
                same(found.get(field).unwrap_or(&Value::Null), expected, exact, &format!("{at}.{field}"));
            }
        }
        (Value::Number(found), Value::Number(expected)) if !exact => {
            let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((found - expected).abs() <= TOLERANCE * expected.abs(), "{at}: {found}, was {expected}");
        }
        _ => assert_eq!(found, expected, "{at}"),
    }
}

/// Resumes the fixture `name` on `ranks` ranks and holds what follows against what the older build did.
fn goes_on(name: &str, ranks: usize, more: &[&str]) {
    let fixture: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/steps").join(name);
    let folder = tempfile::tempdir().unwrap();
    copy_tree(&fixture, folder.path());
    let run = folder.path().join("out/weights/run");
    let old = run.join(format!("step_{STOPPED}"));
    let state = fs::read_to_string(old.join("training_state/trainer_state.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&state).unwrap()["format"], 2, "not an old step");

    let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), ranks);
    command
        .args(["--device", "cpu", "--config", "run.yaml", "--train.load_checkpoint_path", "auto"])
        .args(more);
    succeeded(&command.current_dir(folder.path()).output().unwrap());

    let expected = fs::read_to_string(fixture.join("expected/steps.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    // The run that is continued had 2 ranks. Another CPU has other kernels of libtorch.
    let exact = ranks == 2 && expected["cpu"] == cpu();
    let found = metrics(&folder.path().join("out"));
    assert_eq!(found.len(), STEPS);
    let later = expected["steps"].as_array().unwrap();
    assert_eq!(later.len(), STEPS - STOPPED);
    for (found, expected) in found[STOPPED..].iter().zip(later) {
        same(found, expected, exact, &format!("{name} on {ranks} ranks: step {}", expected["step"]));
    }

    let last = run.join(format!("step_{STEPS}"));
    let (found, was) = (adapter(&last), adapter(&fixture.join("expected")));
    assert_eq!(found.keys().collect::<Vec<_>>(), was.keys().collect::<Vec<_>>());
    for (tensor, was) in &was {
        let apart = relative(&found[tensor], was);
        let limit = if exact { 0.0 } else { TOLERANCE };
        assert!(apart <= limit, "{name} on {ranks} ranks: {tensor} is {apart} away");
    }
    if exact {
        let bytes = |step: &Path| fs::read(step.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(&last) == bytes(&fixture.join("expected")), "{name}: equal tensors in another file");
    }
    let changed = differences(&old, &fixture.join("out/weights/run").join(format!("step_{STOPPED}")));
    assert!(changed.is_empty(), "the old step was changed: {changed:?}");
}

#[test]
fn old_dense_step_goes_on_on_one_rank() {
    goes_on("dense", 1, &[]);
}

#[test]
fn mpi_old_dense_step_goes_on_bit_for_bit() {
    goes_on("dense", 2, &[]);
}

#[test]
fn old_step_of_a_mixture_goes_on_on_one_rank() {
    goes_on("mixture", 1, &["--train.expert_parallel_size", "1"]);
}

#[test]
fn mpi_old_step_of_a_mixture_goes_on_bit_for_bit() {
    goes_on("mixture", 2, &[]);
}
