//! The README is short, its configuration loads and its commands parse.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

fn readme() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut inside = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(name), None) => {
                inside = Some(name == language);
                if name == language {
                    found.push(String::new());
                }
            }
            (Some(_), Some(_)) => inside = None,
            (None, Some(true)) => found.last_mut().unwrap().push_str(&format!("{line}\n")),
            (None, _) => {}
        }
    }
    found
}

#[test]
fn the_readme_is_read_in_five_minutes() {
    let text = readme();
    assert!(
        text.lines().count() <= 200 && text.len() <= 14 << 10,
        "{} lines, {} bytes",
        text.lines().count(),
        text.len()
    );
}

#[test]
fn its_configuration_loads_without_a_warning() {
    let text = readme();
    let yaml = blocks(&text, "yaml");
    assert_eq!(yaml.len(), 1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.yaml");
    std::fs::write(&path, &yaml[0]).unwrap();
    let loaded = xorl_dist::config::load(&path, &[]).unwrap();
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn its_commands_parse_and_the_first_mpirun_has_what_root_and_two_cores_need() {
    let text = readme();
    let commands = blocks(&text, "sh");
    assert!(commands.len() >= 7, "{}", commands.len());
    for block in &commands {
        let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all(block.as_bytes()).unwrap();
        assert!(bash.wait().unwrap().success(), "{block}");
    }
    let first = commands.iter().position(|block| block.contains("\nmpirun ")).unwrap();
    let before = commands[..=first].concat();
    let before = before.split("\nmpirun ").next().unwrap();
    for name in ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_MCA_rmaps_base_oversubscribe=1", "OMP_NUM_THREADS=1"] {
        assert!(before.contains(name), "{name} is set before the first mpirun");
    }
}
