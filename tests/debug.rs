//! `--debug` and `launch/debug.sh`: what is said, and that a value that is not finite is found where it arises.

use crate::common::{failed, succeeded, tiny::TinyRun};
use std::{path::Path, process::Command};

fn debug(run: &TinyRun, ranks: &str, more: &[&str]) -> std::process::Output {
    let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/debug.sh"));
    script.arg(run.at("run.yaml")).args(more).env("XORL_DIST", env!("CARGO_BIN_EXE_xorl-dist"));
    script.env("RANKS", ranks).env("TMPDIR", run.at("")).env("OMP_NUM_THREADS", "1").output().unwrap()
}

#[test]
fn every_layer_is_told() {
    let output = debug(&TinyRun::new(), "1", &[]);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stderr);
    for layer in 0..2 {
        for pass in ["forward", "backward"] {
            let lines = said.lines().filter(|line| line.contains(&format!("layer {layer}, {pass}: [")));
            // Three steps of two micro-batches, less what was empty.
            assert!(lines.count() >= 6, "{said}");
        }
    }
    assert!(String::from_utf8_lossy(&output.stdout).contains("[STEP 3/3] loss="), "{output:?}");
}

#[test]
fn the_layer_that_overflows_is_named() {
    // B so large that the second layer's adapters overflow; the first has none.
    let huge = ["--lora.lora_b_init_std", "1e38", "--lora.lora_target_modules", "layers.1.self_attn.q_proj"];
    let line = failed(&debug(&TinyRun::new(), "1", &huge), 1);
    assert!(line.contains("layer 1, forward: ") && line.contains("are not finite"), "{line}");
}

#[test]
fn mpi_lines_of_several_ranks_carry_the_rank() {
    let output = debug(&TinyRun::new(), "2", &["--train.max_steps", "1"]);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let layers: Vec<&str> = said.lines().filter(|line| line.contains("layer 0, forward: [")).collect();
    for rank in ["rank 0: ", "rank 1: "] {
        assert!(layers.iter().any(|line| line.starts_with(rank)), "{said}");
    }
    assert!(layers.iter().all(|line| line.starts_with("rank ")), "{said}");
}

/// Weights that are taken away after their layer change nothing: nobody looks at them again.
#[test]
fn mpi_a_run_that_is_looked_at_computes_the_same() {
    let run = TinyRun::of_experts();
    let over = ["--train.expert_parallel_size", "2", "--train.reshard_after_forward", "false"];
    for (out, more) in [("plain", &[][..]), ("looked at", &["--debug"])] {
        let output = run.run(4, out, &[&over[..], &["--train.max_steps", "4"], more].concat());
        succeeded(&output);
        let said = String::from_utf8_lossy(&output.stderr);
        // The first over the group are the numbers of rows.
        let told = said.contains("all_to_all #2 over expert") && said.contains("layer 1, forward: [");
        assert_eq!(told, !more.is_empty(), "{said}");
    }
    let losses = |out: &str| run.story(out).iter().map(|line| line["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses("plain"), losses("looked at"));
    let [plain, looked] = ["plain", "looked at"].map(|out| crate::common::tiny::adapter(&run.step(out, 4)));
    assert!(plain == looked);
}
