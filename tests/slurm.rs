//! The batch scripts on a real slurm cluster, which the test makes of this machine: they run to the end, and a job that
//! is requeued saves, goes on by itself, and ends as if nothing had happened.

use crate::common::{
    serving::{address_in, exchange},
    succeeded,
    tiny::{TinyRun, differences},
    wait_for_at_most,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

/// Long enough to be met while it runs.
const LONG: &str = "150";
const PATIENCE: Duration = Duration::from_secs(120);
const SERVE: &str = "launch/slurm/serve.sbatch";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// slurm on this machine, as long as this lives.
struct Cluster {
    folder: tempfile::TempDir,
}

impl Cluster {
    fn start() -> Self {
        let cluster = Self { folder: tempfile::tempdir().unwrap() };
        let output = cluster.script("start");
        assert!(
            output.status.success(),
            "launch/setup.sh installs slurm as root: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        cluster
    }

    fn script(&self, what: &str) -> Output {
        // Not output(): the daemons keep the pipes open.
        let log = self.folder.path().join("script.log");
        let file = || fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut script = Command::new(root().join("tests/slurm/cluster.sh"));
        let status = script.arg(what).arg(self.folder.path()).stdout(file()).stderr(file()).status().unwrap();
        Output { status, stdout: Vec::new(), stderr: fs::read(&log).unwrap() }
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf")).current_dir(root());
        command
    }

    fn run(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.tool(name).args(arguments).output().unwrap();
        succeeded(&output);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Submits `script` for `run` into its folder `out`; the job's number.
    fn submit(
        &self,
        run: &TinyRun,
        out: &str,
        script: &[&str],
        environment: &[(&str, &str)],
        more: &[&str],
    ) -> String {
        let log = run.at(&format!("{out}.batch.log"));
        let mut sbatch = self.tool("sbatch");
        sbatch.args(["--parsable", "-o", log.to_str().unwrap()]).args(script);
        let config = if script.contains(&SERVE) { "server.yaml" } else { "run.yaml" };
        sbatch.arg(run.at(config)).args(more);
        sbatch
            .env("XORL_DIST", env!("CARGO_BIN_EXE_xorl-dist"))
            .env("OUT", run.at(out))
            .envs(environment.iter().copied());
        let output = sbatch.output().unwrap();
        succeeded(&output);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn state(&self, job: &str) -> String {
        let shown = self.run("scontrol", &["show", "job", "-o", job]);
        let word = shown.split_whitespace().find_map(|word| word.strip_prefix("JobState="));
        word.unwrap_or_default().to_owned()
    }

    /// Waits until `job` is over; what the batch script said.
    fn ended(&self, job: &str, run: &TinyRun, out: &str) -> String {
        let state = || {
            let state = self.state(job);
            ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"]
                .contains(&state.as_str())
                .then_some(state)
        };
        let state = wait_for_at_most(PATIENCE, "the end of the job", state);
        let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
        let (batch, ranks) = (read(run.at(&format!("{out}.batch.log"))), read(run.at(out).join("slurm.log")));
        assert_eq!(state, "COMPLETED", "{batch}\n{ranks}");
        batch + &ranks
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.script("stop");
    }
}

/// Loss and norm of every step.
fn course(run: &TinyRun, out: &str) -> Vec<[Value; 3]> {
    run.story(out).iter().map(|line| ["step", "loss", "grad_norm"].map(|field| line[field].clone())).collect()
}

/// The last step's directory of the only run in `out`.
fn last_step(run: &TinyRun, out: &str, step: &str) -> PathBuf {
    let mut runs: Vec<_> =
        fs::read_dir(run.at(out).join("weights")).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(runs.len(), 1, "{runs:?}");
    runs.remove(0).join(format!("step_{step}"))
}

#[test]
fn mpi_batch_scripts_run_and_requeued_jobs_go_on_by_themselves() {
    let (cluster, run) = (Cluster::start(), TinyRun::new());
    let short = ["--train.max_steps", "6", "--train.save_steps", "0"];
    let long = ["--train.num_train_epochs", "99", "--train.max_steps", LONG, "--train.save_steps", "0"];
    succeeded(&run.run(2, "short", &short));
    succeeded(&run.run(2, "long", &long));

    let node = "launch/slurm/node.sbatch";
    for (out, script, environment) in [
        ("srun", &[node][..], &[][..]),
        ("mpirun", &[node], &[("XORL_LAUNCHER", "mpirun")]),
        ("nodes", &["-N", "1", "--ntasks-per-node", "2", "launch/slurm/nodes.sbatch"], &[]),
    ] {
        let job = cluster.submit(&run, out, script, environment, &short);
        cluster.ended(&job, &run, out);
        assert_eq!(course(&run, out), course(&run, "short"), "{out}");
        assert!(last_step(&run, out, "6").ends_with(format!("slurm-{job}/step_6")));
    }

    // Requeued by hand, by slurm's warning before the time limit, and under mpirun.
    for (out, launcher, by_hand) in
        [("by hand", "srun", true), ("warned", "srun", false), ("warned mpirun", "mpirun", false)]
    {
        let job = cluster.submit(&run, out, &[node], &[("XORL_LAUNCHER", launcher)], &long);
        let made =
            || fs::read_to_string(run.at(out).join("metrics.jsonl")).unwrap_or_default().lines().count();
        wait_for_at_most(PATIENCE, "the fifth step", || (made() >= 5).then_some(()));
        if by_hand {
            cluster.run("scontrol", &["requeue", &job]);
        } else {
            cluster.run("scancel", &["--signal=USR1", "--batch", &job]);
        }
        let said = cluster.ended(&job, &run, out);
        assert!(said.contains("stopped after step"), "{out}: {said}");
        assert!(said.contains("on from"), "{out}: {said}");
        assert_eq!(course(&run, out), course(&run, "long"), "{out}");
        let different = differences(&last_step(&run, "long", LONG), &last_step(&run, out, LONG));
        let but_the_name: Vec<_> = different
            .iter()
            .filter(|file| !file.ends_with("trainer_state.json") && !file.ends_with("manifest.json"))
            .collect();
        assert!(but_the_name.is_empty(), "{out}: {different:?}");
    }

    // A sweep of two learning rates.
    let lines = run.at("sweep.txt");
    fs::write(&lines, "--train.lr 1e-3\n--train.lr 4e-3 --lora.lora_rank '2'\n").unwrap();
    // OUT is one place for both, where one run at a time may write.
    let sweep = ["--array", "1-2%1", "launch/slurm/sweep.sbatch"];
    let job = cluster.submit(&run, "sweep", &sweep, &[], &[lines.to_str().unwrap()]);
    for task in ["1", "2"] {
        let task = format!("{job}_{task}");
        wait_for_at_most(PATIENCE, "a task", || (cluster.state(&task) == "COMPLETED").then_some(()));
        assert!(run.at("sweep").join(format!("weights/slurm-{task}/step_20")).is_dir());
    }
    let config = |task: &str| {
        fs::read_to_string(
            run.at("sweep").join(format!("weights/slurm-{job}_{task}/step_20/adapter_config.json")),
        )
        .unwrap()
    };
    assert!(config("1").contains("\"r\": 4") && config("2").contains("\"r\": 2"));
}

/// Requeueing is that of all batch scripts, above; slurm waits for seconds before it.
#[test]
fn mpi_a_batch_server_saves_when_it_is_cancelled_and_the_next_job_goes_on() {
    let (cluster, run) = (Cluster::start(), TinyRun::new());
    let yaml = format!("config_path: {}\nenable_mixed_precision: false\napi_port: 0\n", run.at("").display());
    fs::write(run.at("server.yaml"), yaml).unwrap();
    let job = cluster.submit(&run, "served", &[SERVE], &[], &["--device", "cpu"]);
    let log = || fs::read_to_string(run.at("served/slurm.log")).unwrap_or_default();
    // The address of the server after `starts` starts.
    let listens = |starts: usize| {
        wait_for_at_most(PATIENCE, "a server that listens", || {
            let text = log();
            let at = text.match_indices("listening on").nth(starts - 1)?.0;
            address_in(&text[at..])
        })
    };
    let address = listens(1);
    let post = |name: &str, body: Value| {
        let (status, reply) =
            exchange(address, "POST", &format!("/api/v1/{name}"), &body.to_string()).unwrap();
        assert_eq!(status, 200, "{name}: {reply}");
        reply
    };
    for (name, body) in [
        ("forward_backward", json!({"batches": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]})),
        ("optim_step", json!({})),
    ] {
        let id = post(name, body)["request_id"].take();
        assert!(post("retrieve_future", json!({"request_id": id})).get("error").is_none());
    }
    cluster.run("scancel", &[&job]);
    let saved = || log().contains("1 adapter saved; the same command").then_some(());
    wait_for_at_most(PATIENCE, "the save", saved);
    let ends = |job: &str| {
        let ended = || cluster.run("squeue", &["--noheader", "--jobs", job]).trim().is_empty().then_some(());
        wait_for_at_most(PATIENCE, "the end of a job", ended);
    };
    // The output directory is the first job's until its process has ended.
    ends(&job);
    let job = cluster.submit(&run, "served", &[SERVE], &[], &["--device", "cpu"]);
    let (_, info) = exchange(listens(2), "GET", "/api/v1/session_info?model_id=default", "").unwrap();
    assert_eq!(info["step"], 1, "{info}");
    // Without a cluster it would run on.
    cluster.run("scancel", &[&job]);
    ends(&job);
}
