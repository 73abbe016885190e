//! The program as it is installed: completions that a shell uses, manual pages, the release tarball.

use crate::common::{failed, succeeded};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_xorl-dist");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// bash with our program first on PATH.
fn bash(script: &str, home: &Path) -> Output {
    let bin = Path::new(PROGRAM).parent().unwrap().display().to_string();
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", script]).current_dir(root()).env("HOME", home);
    for name in ["XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command.env("PATH", format!("{bin}:{}", std::env::var("PATH").unwrap())).output().unwrap()
}

fn stdout(output: &Output) -> String {
    succeeded(output);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The words that bash offers for the last of `words`, by the completions in `script`.
fn completed(script: &str, words: &[&str], home: &Path) -> Vec<String> {
    let line = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let last = words.len() - 1;
    // As readline does: the function that `complete` has noted, with its three arguments.
    let script = format!(
        "{script}\nCOMP_WORDS=({line}); COMP_CWORD={last}\n\
         function=$(complete -p xorl-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n\
         \"$function\" xorl-dist '{}' '{}'\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words[last],
        words[last - 1]
    );
    stdout(&bash(&script, home)).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_fields() {
    let home = tempfile::tempdir().unwrap();
    let script = "eval \"$(xorl-dist completions bash)\"";
    for (words, expected) in [
        (&["xorl-dist", "gen"][..], &["generate"][..]),
        (&["xorl-dist", "che"], &["check"]),
        (&["xorl-dist", "check", "--show"], &["--show-samples"]),
        (&["xorl-dist", "generate", "--max"], &["--max-new-tokens"]),
        (&["xorl-dist", "merge", "--dtype", "b"], &["base", "bfloat16"]),
        (&["xorl-dist", "train", "--train.global"], &["--train.global_batch_size"]),
        (&["xorl-dist", "--model.rev"], &["--model.revision"]),
        (&["xorl-dist", "serve", "--server.api_h"], &["--server.api_host"]),
    ] {
        assert_eq!(completed(script, words, home.path()), expected, "{words:?}");
    }
    for (shell, word) in
        [("zsh", "#compdef xorl-dist"), ("fish", "complete -c xorl-dist"), ("elvish", "edit:completion")]
    {
        let output = Command::new(PROGRAM).args(["completions", shell]).output().unwrap();
        assert!(stdout(&output).contains(word), "{shell}");
    }
    let output = Command::new(PROGRAM).args(["completions", "csh"]).output().unwrap();
    assert!(failed(&output, 2).contains("[possible values: bash"));
}

#[test]
fn manual_pages_name_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let page = stdout(&Command::new(PROGRAM).arg("man").output().unwrap());
    assert!(page.contains(".TH xorl-dist 1") && page.contains("xorl\\-dist\\-generate(1)"), "{page}");
    let out = folder.path().join("man1");
    succeeded(&Command::new(PROGRAM).args(["man", "--out"]).arg(&out).output().unwrap());
    let help = stdout(&Command::new(PROGRAM).arg("--help").output().unwrap());
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // Names of commands stand in the second column, what follows of their text further right.
    let names =
        commands.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    let names: Vec<&str> = names.collect();
    assert!(names.contains(&"generate") && names.contains(&"man"), "{names:?}");
    for name in names {
        let page =
            fs::read_to_string(out.join(format!("xorl-dist-{name}.1"))).unwrap_or_else(|_| panic!("{name}"));
        assert!(page.contains("SYNOPSIS"), "{name}");
    }
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let output = Command::new(PROGRAM).args(["man", "--out"]).arg(&file).output().unwrap();
    assert!(failed(&output, 2).contains("--out: "));
}

/// As launch/setup.sh does at its end.
#[test]
fn setup_installs_completions_where_shells_look_for_them() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    let install = format!(". launch/lib.sh; install_completions '{PROGRAM}'");
    // Nothing is made in a home that has none of the folders.
    assert_eq!(stdout(&bash(&install, home.path())), "");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    fs::create_dir_all(at(".local/share")).unwrap();
    fs::create_dir_all(at(".config/fish")).unwrap();
    stdout(&bash(&install, home.path()));
    let file = at(".local/share/bash-completion/completions/xorl-dist");
    let loaded = format!(". '{}'", file.display());
    assert_eq!(completed(&loaded, &["xorl-dist", "mer"], home.path()), ["merge"]);
    assert!(at(".config/fish/completions/xorl-dist.fish").is_file() && !at(".local/share/zsh").exists());
    assert!(at(".local/share/man/man1/xorl-dist-train.1").is_file());
    let written = fs::metadata(&file).unwrap().modified().unwrap();
    stdout(&bash(&install, home.path()));
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written, "written once");
}

#[test]
fn the_tarball_runs_with_a_libtorch_of_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(root().join("ci/package.sh"))
        .args(["--binary", PROGRAM, "--out"])
        .arg(folder.path().join("package"))
        .output()
        .unwrap();
    let tarball = PathBuf::from(stdout(&output).trim());
    succeeded(&Command::new("tar").args(["-xzf"]).arg(&tarball).current_dir(folder.path()).output().unwrap());
    let name = tarball.file_name().unwrap().to_str().unwrap().trim_end_matches(".tar.gz");
    let unpacked = folder.path().join(name);
    for file in [
        "bin/xorl-dist",
        "launch/mpirun.sh",
        "launch/kubernetes/mpijob.yaml",
        "configs/README.md",
        "LICENSE",
        "README.md",
        "share/man/man1/xorl-dist-serve.1",
        "share/bash-completion/completions/xorl-dist",
    ] {
        assert!(unpacked.join(file).is_file(), "{file}");
    }
    // The libtorch that this test was built with.
    let version = stdout(&Command::new(PROGRAM).arg("--version").output().unwrap());
    let line = version.lines().find(|line| line.starts_with("libtorch")).unwrap();
    let torch = line.split_once('(').unwrap().1.trim_end_matches(')');
    let program = unpacked.join("bin/xorl-dist");
    let with = |value: Option<&str>| {
        let mut command = Command::new(&program);
        command.arg("--version").current_dir(folder.path()).env_remove("VIRTUAL_ENV");
        // An interpreter without torch.
        let path = folder.path().join("empty");
        fs::create_dir_all(&path).unwrap();
        for tool in ["bash", "dirname", "readlink", "realpath", "sed", "mkdir", "ln", "env"] {
            let found = stdout(&bash(&format!("type -P {tool}"), folder.path()));
            let _ = std::os::unix::fs::symlink(found.trim(), path.join(tool));
        }
        command.env("PATH", &path).env("HOME", folder.path());
        match value {
            Some(value) => command.env("XORL_LIBTORCH", value),
            None => command.env_remove("XORL_LIBTORCH"),
        };
        command.output().unwrap()
    };
    assert_eq!(stdout(&with(Some(torch))), version);
    assert_eq!(stdout(&with(Path::new(torch).parent().unwrap().to_str())), version);
    assert!(failed(&with(None), 2).starts_with("error: no libtorch: pip install torch==2.13.0 into a venv"));
    let line = failed(&with(folder.path().to_str()), 2);
    assert!(line.contains("has no libtorch_cpu.so: name the folder of libtorch 2.13.0"), "{line}");
    let old = folder.path().join("old/lib");
    fs::create_dir_all(&old).unwrap();
    fs::write(old.join("libtorch_cpu.so"), "").unwrap();
    fs::write(old.join("../version.py"), "__version__ = '2.9.1+cpu'\n").unwrap();
    assert!(failed(&with(old.to_str()), 2).ends_with("is of torch 2.9.1: this program needs 2.13.0"));
}
