//! What a run leaves behind is whole or not there: killed while saving, with a rank that cannot write, with older steps
//! pruned, with the base beside the adapter; and one run at a time writes an output directory that all its ranks see.

use crate::common::{
    ended, failed, mpirun, rank_process, ranks_of, signal, started, succeeded,
    tiny::{STEPS, TinyRun, differences},
    wait_for,
};
use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use xorl_dist::{
    checkpoint::publish,
    weights::{RandomSource, SafetensorsSource, WeightSource},
};

const AUTO: [&str; 2] = ["--train.load_checkpoint_path", "auto"];
const EVERY_STEP: [&str; 4] = ["--train.save_steps", "1", "--train.global_batch_size", "4"];

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// The hidden directories of steps that are being written, or were abandoned.
fn hidden(run: &Path) -> Vec<String> {
    names(run).into_iter().filter(|name| name.starts_with(".tmp-")).collect()
}

/// Kills a run of `ranks` ranks in the middle of a save until it has left something half written; what was published
/// before is whole each time, and a resume ends where the run that nobody killed ends.
fn killed_while_saving(ranks: usize) {
    let run = TinyRun::new();
    succeeded(&run.run(ranks, "whole", &EVERY_STEP));
    for attempt in 0..40 {
        let out = format!("killed {attempt}");
        let dir = run.run_dir(&out);
        let mut child = started(run.command(ranks, &out, &EVERY_STEP));
        let last = 3 + attempt % 10;
        let in_a_save = || {
            let later = |name: &String| !name.starts_with(&format!(".tmp-step_{}-", last - 1));
            run.steps(&out).last() >= Some(&(last - 1)) && hidden(&dir).iter().any(later)
        };
        // On a busy machine the run may be over before anybody looks.
        wait_for("a save", || (in_a_save() || child.try_wait().unwrap().is_some()).then_some(()));
        // A different instant of the save each time.
        std::thread::sleep(Duration::from_micros(200 * (attempt as u64 % 5)));
        let victim = if ranks == 1 { Some(child.id()) } else { rank_process(child.id(), attempt % ranks) };
        victim.into_iter().for_each(|victim| signal(victim, libc::SIGKILL));
        if child.wait().unwrap().success() {
            continue;
        }
        let steps = run.steps(&out);
        assert!(steps.contains(&(last - 1)), "{steps:?}");
        for &step in &steps {
            publish::verify(&run.step(&out, step)).unwrap();
        }
        let latest = fs::read_to_string(dir.join("latest")).unwrap();
        publish::verify(&dir.join(latest.trim())).unwrap();
        if hidden(&dir).is_empty() {
            continue;
        }
        succeeded(&run.run(ranks, &out, &[&AUTO[..], &EVERY_STEP].concat()));
        assert_eq!(hidden(&dir), Vec::<String>::new(), "what was abandoned is swept");
        for step in 1..=STEPS {
            let different = differences(&run.step("whole", step), &run.step(&out, step));
            assert!(different.is_empty(), "step {step}: {different:?}");
        }
        assert_eq!(run.story("whole"), run.story(&out));
        return;
    }
    panic!("no kill met a save");
}

#[test]
fn killed_while_saving_resumes_from_the_previous_step() {
    killed_while_saving(1);
}

#[test]
fn mpi_a_rank_killed_while_saving_leaves_the_steps_before() {
    killed_while_saving(2);
}

#[test]
fn mpi_an_adapter_that_is_not_finite_is_not_published() {
    let run = TinyRun::new();
    for (ranks, settings) in [
        (1, &["--train.lr", "1e39"][..]),
        (2, &["--train.lr", "1e39", "--train.save_steps", "1"]),
        (1, &["--train.weight_decay", "1e300", "--lora.lora_b_init_std", "0.1"]),
    ] {
        let out = format!("{} {ranks}", settings[0]);
        let line = failed(&run.run(ranks, &out, settings), 1);
        assert!(line.contains("is not saved: NaN or infinity in ") && line.contains("lora_"), "{line}");
        assert_eq!(run.steps(&out), Vec::<usize>::new());
        assert_eq!(hidden(&run.run_dir(&out)), Vec::<String>::new());
    }
}

/// Ranks whose files may suddenly grow no more: an ordinary error of write(2) instead of a signal.
fn forgiving(run: &TinyRun, ranks: usize, out: &str, more: &[&str]) -> Command {
    let mut command = ranks_of(Path::new("bash"), ranks);
    command.args(["-c", "trap '' XFSZ; exec \"$@\"", "--", env!("CARGO_BIN_EXE_xorl-dist")]);
    command.args(run.arguments(out, more));
    command
}

/// Has no file of `process` grow beyond `bytes`.
fn limit_files(process: u32, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: prlimit(2) reads `limit`, and writes nothing where the old limit is not asked for.
    let set = unsafe {
        libc::prlimit(process as i32, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut::<libc::rlimit>())
    };
    assert_eq!(set, 0);
}

#[test]
fn mpi_a_save_that_fails_on_one_rank_ends_all_with_its_error() {
    let run = TinyRun::new();
    for (rank, file) in [(1, "optimizer-1-of-2.safetensors"), (0, "")] {
        let out = format!("rank {rank}");
        let child = started(forgiving(&run, 2, &out, &EVERY_STEP));
        wait_for("the first step", || run.steps(&out).contains(&1).then_some(()));
        let process = wait_for("the rank", || rank_process(child.id(), rank));
        limit_files(process, 100);
        let (said, code) = ended(child);
        assert_eq!(code, Some(1), "{said}");
        let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(lines.len(), 1, "{said}");
        assert!(lines[0].starts_with(&format!("error: rank {rank}: ")) && lines[0].contains(file), "{said}");
        assert!(lines[0].contains("File too large") && lines[0].contains("ulimit -f"), "{said}");
        for step in run.steps(&out) {
            publish::verify(&run.step(&out, step)).unwrap();
        }
        succeeded(&run.run(2, &out, &[&AUTO[..], &EVERY_STEP].concat()));
        assert_eq!(run.steps(&out), (1..=STEPS).collect::<Vec<_>>());
    }
}

/// Enough steps for a fault to come and go while the run is on its way.
const MANY: [&str; 8] = [
    "--train.save_steps",
    "1",
    "--train.max_steps",
    "120",
    "--train.num_train_epochs",
    "99",
    "--train.global_batch_size",
    "4",
];
const GOES_ON: [&str; 2] = ["--train.on_save_error", "continue"];

#[test]
fn mpi_a_run_that_goes_on_after_failed_saves_ends_as_if_they_had_not_failed() {
    let run = TinyRun::new();
    let settings = [&MANY[..], &GOES_ON].concat();
    succeeded(&run.run(1, "whole", &MANY));
    for ranks in [1, 2] {
        let (out, away) = (format!("ranks {ranks}"), run.at(&format!("away {ranks}")));
        let child = started(forgiving(&run, ranks, &out, &settings));
        wait_for("the second step", || (run.steps(&out).last() >= Some(&2)).then_some(()));
        // Files of the last rank alone may not grow.
        let process =
            if ranks == 1 { child.id() } else { wait_for("the rank", || rank_process(child.id(), 1)) };
        limit_files(process, 100);
        std::thread::sleep(Duration::from_millis(60));
        limit_files(process, libc::RLIM_INFINITY);
        let before = run.steps(&out).into_iter().last().unwrap();
        wait_for("the next save", || (run.steps(&out).last() > Some(&before)).then_some(()));
        // The whole folder is away for a while.
        fs::rename(run.at(&out), &away).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        assert!(!run.at(&out).exists(), "a folder that was removed is not made anew");
        fs::rename(&away, run.at(&out)).unwrap();
        let (said, code) = ended(child);
        assert_eq!(code, Some(0), "{said}");
        for cause in ["File too large", "it was removed, or its file system is gone"] {
            let words = |line: &&str| line.contains(" is not saved: ") && line.contains(cause);
            let told = said.lines().filter(words).filter(|line| line.contains("WARN")).count();
            assert!(told > 0, "{cause}: {said}");
        }
        let steps = run.steps(&out);
        assert!(steps.len() < 120 && steps.last() == Some(&120), "{steps:?}");
        steps.iter().for_each(|&step| publish::verify(&run.step(&out, step)).unwrap());
        assert_eq!(hidden(&run.run_dir(&out)), Vec::<String>::new());
        let (one, other) = (run.story("whole"), run.story(&out));
        assert_eq!(one.len(), other.len(), "every line once");
        if ranks == 1 {
            assert_eq!(without_bytes(one), without_bytes(other));
            assert_eq!(differences(&run.step("whole", 120), &run.step(&out, 120)), Vec::<PathBuf>::new());
        }
    }
}

/// Lines without what a run that saves more seldom receives less.
fn without_bytes(mut lines: Vec<serde_json::Value>) -> Vec<serde_json::Value> {
    lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("comm_bytes")));
    lines
}

#[test]
fn mpi_a_run_whose_last_save_failed_says_so_and_ends_with_an_error() {
    let run = TinyRun::new();
    for ranks in [1, 2] {
        let out = format!("ranks {ranks}");
        let child = started(forgiving(&run, ranks, &out, &[&MANY[..], &GOES_ON].concat()));
        wait_for("the second step", || (run.steps(&out).last() >= Some(&2)).then_some(()));
        let process =
            if ranks == 1 { child.id() } else { wait_for("the rank", || rank_process(child.id(), 1)) };
        limit_files(process, 100);
        let (said, code) = ended(child);
        assert_eq!(code, Some(1), "{said}");
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains("step 120 is not saved: "), "{said}");
        let steps = run.steps(&out);
        assert!(steps.last() < Some(&120), "{steps:?}");
        steps.iter().for_each(|&step| publish::verify(&run.step(&out, step)).unwrap());
        assert_eq!(hidden(&run.run_dir(&out)), Vec::<String>::new(), "nothing fills the disk");
    }
}

#[test]
fn mpi_saves_that_training_does_not_wait_for_are_the_same_bytes() {
    let run = TinyRun::new();
    let replicas = ["--train.data_parallel_replicate_size", "2"];
    for (ranks, more) in [(1, &[][..]), (2, &[]), (2, &replicas)] {
        let [ahead, waits] = ["true", "false"].map(|is_async| {
            let out = format!("{ranks} {} {is_async}", more.len());
            let settings = [&EVERY_STEP[..], &["--train.save_async", is_async], more].concat();
            succeeded(&run.run(ranks, &out, &settings));
            out
        });
        assert_eq!(run.steps(&ahead), (1..=STEPS).collect::<Vec<_>>());
        for step in 1..=STEPS {
            let different = differences(&run.step(&ahead, step), &run.step(&waits, step));
            assert!(different.is_empty(), "{ahead}, step {step}: {different:?}");
        }
        assert_eq!(run.story(&ahead), run.story(&waits), "{ahead}");
    }
}

/// As behind `| head`, or where the terminal has gone.
#[test]
fn a_run_goes_on_where_nobody_reads_what_it_prints() {
    let run = TinyRun::new();
    let mut command = run.command(1, "out", &["--train.log_format", "structured"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().unwrap().success());
    assert_eq!(run.steps("out"), [5, 10, 15, 20]);
}

#[test]
fn a_save_beyond_the_limit_of_files_fails_as_on_a_full_disk() {
    let run = TinyRun::new();
    let plain = run.command(1, "out", &[]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 20; exec \"$0\" \"$@\""]).arg(plain.get_program()).args(plain.get_args());
    limited.env("OMP_NUM_THREADS", "1");
    let line = failed(&limited.output().unwrap(), 1);
    assert!(line.contains("File too large"), "{line}");
    assert_eq!(hidden(&run.run_dir("out")), Vec::<String>::new());
}

/// A disk of 600 kB: it is full after some steps. Run by `ci/long.sh full_disk` as root.
#[test]
#[ignore = "mounts a file system"]
fn a_full_disk_stops_a_run_or_lets_it_go_on() {
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let run = TinyRun::new();
    for (policy, ranks) in [("stop", 1), ("stop", 2), ("continue", 1), ("continue", 2)] {
        let out = format!("{policy} {ranks}");
        fs::create_dir(run.at(&out)).unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=600k", "none"]).arg(run.at(&out)).status();
        assert!(mount.unwrap().success(), "mount needs root");
        let _mounted = Mounted(run.at(&out));
        let settings = [&MANY[..], &["--train.on_save_error", policy]].concat();
        let line = failed(&run.run(ranks, &out, &settings), 1);
        assert!(line.contains("No space left on device") && line.contains("free space there"), "{line}");
        let steps = run.steps(&out);
        println!("{out}: {} steps fit; {line}", steps.len());
        assert!(!steps.is_empty() && steps.last() < Some(&120), "{steps:?}");
        steps.iter().for_each(|&step| publish::verify(&run.step(&out, step)).unwrap());
        assert_eq!(hidden(&run.run_dir(&out)), Vec::<String>::new(), "nothing fills the disk");
        // The user makes room as the error says, and keeps fewer steps.
        assert!(steps.len() > 3, "{steps:?}");
        steps[..2].iter().for_each(|&step| fs::remove_dir_all(run.step(&out, step)).unwrap());
        let fits = [&MANY[..], &AUTO, &["--train.save_total_limit", "1"]].concat();
        succeeded(&run.run(ranks, &out, &fits));
        assert_eq!(run.steps(&out).last(), Some(&120));
    }
}

#[test]
fn only_so_many_steps_stay_but_never_less_than_a_resume_needs() {
    let run = TinyRun::new();
    let limit = ["--train.save_total_limit", "2"];
    succeeded(&run.run(1, "out", &limit));
    assert_eq!(run.steps("out"), [15, 20]);
    succeeded(&run.run(1, "all", &["--train.max_steps", "10"]));
    // From step 5, which two newer ones would push out.
    let step = run.step("all", 5).display().to_string();
    let more =
        ["--train.load_checkpoint_path", &step, "--train.overwrite", "true", "--train.max_steps", "18"];
    succeeded(&run.run(1, "all", &[&limit[..], &more].concat()));
    assert_eq!(run.steps("all"), [5, 15, 18]);
    assert_eq!(hidden(&run.run_dir("all")), Vec::<String>::new());
}

#[test]
fn the_base_is_written_out_then_linked() {
    let run = TinyRun::new();
    let saving: Vec<&str> =
        "--lora.save_lora_only false --train.max_steps 10 --train.lr_decay_style constant \
        --train.lr_warmup_ratio 0"
            .split_whitespace()
            .collect();
    succeeded(&run.run(1, "random", &saving));
    let [first, second] = [5, 10].map(|step| run.step("random", step).join("model"));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let weights = |model: &Path| model.join("model.safetensors");
    assert_eq!(inode(&weights(&first)), inode(&weights(&second)), "written once");
    // What was written is what was trained on.
    let written = SafetensorsSource::open(&second).unwrap();
    let shapes = written.names().into_iter().map(|name| {
        let shape = written.meta(&name).unwrap().shape;
        (name, shape)
    });
    let random = RandomSource::new(shapes.collect(), 0.15, 42);
    for name in written.names() {
        let meta = written.meta(&name).unwrap();
        let elements: usize = meta.shape.iter().product();
        let read = |source: &dyn WeightSource| {
            let mut bytes = vec![0; elements * 4];
            source.read(&name, 0..elements, meta.dtype, &mut bytes).unwrap();
            bytes
        };
        assert!(read(&written) == read(&random), "{name}");
    }
    let adapter = fs::read_to_string(run.step("random", 10).join("adapter_config.json")).unwrap();
    assert!(adapter.contains(&second.display().to_string()), "{adapter}");

    // The same model from files: the same run, its files linked into each step, also after a resume.
    let model = run.at("hf");
    crate::common::tiny::copy_tree(&second, &model);
    let from_files = ["--model.model_path", &model.display().to_string()].map(str::to_owned);
    let from_files: Vec<&str> = saving.iter().copied().chain(from_files.iter().map(String::as_str)).collect();
    succeeded(&run.run(1, "files", &[&from_files[..], &["--train.max_steps", "5"]].concat()));
    succeeded(&run.run(1, "files", &[&from_files[..], &AUTO].concat()));
    assert_eq!(run.story("random"), run.story("files"));
    for step in [5, 10] {
        let linked = run.step("files", step).join("model");
        assert_eq!(inode(&weights(&linked)), inode(&weights(&model)), "step {step}");
        assert_eq!(differences(&linked, &model), Vec::<PathBuf>::new());
        publish::verify(&run.step("files", step)).unwrap();
    }
    // A base that has changed under the links is noticed.
    let mut bytes = fs::read(weights(&model)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(weights(&model), bytes).unwrap();
    let step = run.step("files", 10).display().to_string();
    let line = failed(
        &run.run(1, "files", &[&from_files[..], &["--train.load_checkpoint_path", &step]].concat()),
        2,
    );
    assert!(line.contains("model/model.safetensors is not the file that was published"), "{line}");
}

#[test]
fn a_locked_output_directory_is_refused() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &["--train.max_steps", "5"]));
    let lock = File::options().write(true).open(run.at("out/.lock")).unwrap();
    lock.try_lock().expect("free after the run");
    let line = failed(&run.run(1, "out", &AUTO), 2);
    assert!(line.contains("is in use by process") && line.contains("another output_dir"), "{line}");
    drop(lock);
    succeeded(&run.run(1, "out", &AUTO));
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_with_a_remedy() {
    let run = TinyRun::new();
    // Neither root nor anyone else makes files there; the one exists, the other does not.
    for output in ["/sys", "/sys/out"] {
        let line = failed(&run.run(1, output, &[]), 2);
        assert!(line.contains(output) && line.contains("another output_dir"), "{line}");
    }
}

#[test]
fn two_runs_at_once_cannot_share_an_output_directory() {
    let run = TinyRun::new();
    let mut child =
        started(run.command(1, "out", &["--train.max_steps", "2000", "--train.num_train_epochs", "999"]));
    wait_for("the first step", || run.steps("out").contains(&5).then_some(()));
    let line = failed(&run.run(1, "out", &AUTO), 2);
    assert!(line.contains(&format!("process {} on", child.id())), "{line}");
    signal(child.id(), libc::SIGKILL);
    child.wait().unwrap();
    // The lock went with its holder.
    succeeded(&run.run(1, "out", &[&AUTO[..], &["--train.max_steps", "6"]].concat()));
}

#[test]
fn mpi_an_output_directory_that_ranks_do_not_share_is_refused() {
    let run = TinyRun::new();
    let mut command = mpirun();
    // The same relative path, from a folder of its own for each rank.
    for (rank, folder) in ["here", "there"].iter().enumerate() {
        fs::create_dir(run.at(folder)).unwrap();
        if rank > 0 {
            command.arg(":");
        }
        command.args(["-n", "1", "-wdir"]).arg(run.at(folder)).arg(env!("CARGO_BIN_EXE_xorl-dist"));
        command.arg("--config").arg(run.at("run.yaml")).args(["--train.output_dir", "out"]);
    }
    let line = failed(&command.output().unwrap(), 2);
    assert!(line.contains("out is not the directory that rank 0 writes"), "{line}");
    assert!(!run.at("here/out/metrics.jsonl").exists() && !run.at("there/out").exists());
}

/// B so large that the second layer's adapters overflow in every step.
#[test]
fn a_run_whose_steps_are_all_skipped_publishes_nothing() {
    let run = TinyRun::new();
    let huge = ["--lora.lora_b_init_std", "1e38", "--lora.lora_target_modules", "layers.1.self_attn.q_proj"];
    for (most, expected) in [
        ("50", "nothing was learned: every step was skipped"),
        ("2", "2 steps in a row (train.max_skipped_steps)"),
    ] {
        let skipped = ["--train.max_skipped_steps", most, "--train.save_steps", "1"];
        let line = failed(&run.run(1, most, &[&huge[..], &skipped].concat()), 1);
        assert!(line.contains(expected), "{line}");
        assert!(!run.run_dir(most).join("latest").exists());
        assert!(!run.run_dir(most).join("step_1").exists());
    }
}
