//! Ranks that are not about to run the same are refused before anything is written, in one line that says what differs.

use crate::common::{failed, is_mpich, mpirun, succeeded, tiny::TinyRun};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Two folders that a rank each starts in, alike: everything in its configuration is relative to them.
struct TwoHosts {
    run: TinyRun,
}

impl TwoHosts {
    fn new() -> Self {
        let run = TinyRun::new();
        for host in ["a", "b"] {
            fs::create_dir_all(run.at(host).join("model")).unwrap();
            fs::copy(run.at("config.json"), run.at(host).join("model/config.json")).unwrap();
            fs::copy(run.at("rows.jsonl"), run.at(host).join("rows.jsonl")).unwrap();
            std::os::unix::fs::symlink(run.at("out"), run.at(host).join("out")).unwrap();
        }
        fs::create_dir(run.at("out")).unwrap();
        Self { run }
    }

    /// One rank in each folder, the second with `program` and `more`.
    fn started(&self, program: &Path, more: &[&str]) -> std::process::Output {
        self.ranks(1, program, more)
    }

    /// `first` ranks in the first folder, then one in the second.
    fn ranks(&self, first: usize, program: &Path, more: &[&str]) -> std::process::Output {
        let first = first.to_string();
        let config = self.run.at("run.yaml").display().to_string();
        let datasets = "[{\"path\": \"rows.jsonl\", \"type\": \"tokenized\"}]";
        let common = ["--config", &config, "--model.config_path", "model", "--data.datasets", datasets];
        let short = ["--train.output_dir", "out", "--train.max_steps", "1"];
        let mut launcher = mpirun();
        let own = Path::new(env!("CARGO_BIN_EXE_xorl-dist"));
        for (host, ranks, program, more) in [("a", &first[..], own, &[][..]), ("b", "1", program, more)] {
            if host == "b" {
                launcher.arg(":");
            }
            launcher.args(["-n", ranks, "-wdir"]).arg(self.run.at(host)).arg(program);
            launcher.args(common).args(short).args(more);
        }
        launcher.output().unwrap()
    }

    /// What rank 1 is refused for.
    fn refused(&self, program: &Path, more: &[&str]) -> String {
        let line = failed(&self.started(program, more), 2);
        let left: Vec<_> = fs::read_dir(self.run.at("out")).unwrap().collect();
        assert!(left.is_empty(), "something was written: {left:?}");
        line
    }
}

/// This program with another build id.
fn rebuilt(folder: &Path) -> PathBuf {
    let own = Path::new(env!("CARGO_BIN_EXE_xorl-dist"));
    let mut bytes = fs::read(own).unwrap();
    // An ELF note: lengths of name and content, type 3, "GNU".
    let head = [&20u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"GNU\0"].concat();
    let at = bytes.windows(head.len()).position(|window| window == head).expect("a build id") + head.len();
    bytes[at] ^= 1;
    let path = folder.join("xorl-dist");
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::metadata(own).unwrap().permissions()).unwrap();
    path
}

#[test]
fn mpi_ranks_that_differ_are_refused_with_what_differs() {
    let own = Path::new(env!("CARGO_BIN_EXE_xorl-dist"));
    let hosts = TwoHosts::new();
    let line = hosts.refused(own, &["--train.lr", "0.25"]);
    assert!(
        line.contains("rank 1 has another configuration than rank 0: `lr: 0.25`, not `lr: 0.005`"),
        "{line}"
    );

    let line = hosts.refused(&rebuilt(&hosts.run.at("b")), &[]);
    assert!(line.contains("rank 1 runs another xorl-dist"), "{line}");

    let model = hosts.run.at("b/model/config.json");
    let config = fs::read_to_string(&model).unwrap();
    fs::write(&model, config.replace("0.15", "0.151")).unwrap();
    let line = hosts.refused(own, &[]);
    assert!(line.contains("rank 1 sees other model files than rank 0"), "{line}");
    fs::write(&model, config).unwrap();

    let rows = hosts.run.at("b/rows.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    fs::write(&rows, text.lines().rev().collect::<Vec<_>>().join("\n")).unwrap();
    let line = hosts.refused(own, &[]);
    assert!(line.contains("rank 1 sees other data than rank 0"), "{line}");
    fs::write(&rows, text).unwrap();

    succeeded(&hosts.started(own, &[]));
}

#[test]
fn mpi_a_bad_row_that_only_rank_2_has_is_the_one_error() {
    let hosts = TwoHosts::new();
    let rows = hosts.run.at("b/rows.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    let bad =
        |(i, row): (usize, &str)| if i == 6 { "{\"input_ids\": [4, 503]}" } else { row }.to_owned() + "\n";
    fs::write(&rows, text.lines().enumerate().map(bad).collect::<String>()).unwrap();
    let own = Path::new(env!("CARGO_BIN_EXE_xorl-dist"));
    // The only line that begins so, whatever the launcher says after it.
    let line = failed(&hosts.ranks(2, own, &[]), 2);
    assert!(line.contains("rows.jsonl:7") && line.contains("503"), "{line}");
}

/// As mpirun of another MPI would start it: each process finds itself alone, and must not train by itself.
#[test]
fn mpi_a_foreign_launcher_is_refused() {
    let run = TinyRun::new();
    // Open MPI and MPICH each know the other's variable as foreign.
    let (variable, own) =
        if is_mpich() { ("OMPI_COMM_WORLD_SIZE", "MPICH") } else { ("PMI_SIZE", "Open MPI") };
    let output = run.command(1, "out", &[]).env(variable, "4").output().unwrap();
    let line = failed(&output, 2);
    assert!(
        line.contains(&format!("{variable} says 4 ranks but MPI started 1")) && line.contains(own),
        "{line}"
    );
    assert!(!run.at("out").exists());
}
