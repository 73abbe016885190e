//! Saves of a server that is killed at any instant of an overwrite, a link, a new name or a deletion. A process of this
//! program does what the server does; the test looks at what it leaves.

use serde_json::json;
use std::{
    env, fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
};
use xorl_dist::checkpoint::{
    failpoints::{self, OF_SAVES},
    publish::KnownHashes,
    saves,
};

const ROOT: &str = "XORL_TEST_SAVES";

/// A save `folder` whose files say `text`.
fn save(folder: &Path, text: &str) {
    let writer = saves::begin(folder, true).unwrap();
    for name in ["first", "second"] {
        fs::write(writer.directory().join(name), text).unwrap();
    }
    saves::write_metadata(&writer, &json!({"text": text})).unwrap();
    writer.publish(&mut KnownHashes::default()).unwrap();
}

/// The part of the server: `a` is overwritten, linked as `b`, which becomes `c`, and deleted.
#[test]
fn worker() {
    let Some(root) = env::var_os(ROOT).map(PathBuf::from) else { return };
    failpoints::arm(0);
    saves::recover_below(&root).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| root.join(name));
    save(&a, "new");
    saves::link(&a, &b, &json!({"text": "new"})).unwrap();
    saves::rename(&b, &c).unwrap();
    saves::delete(&a).unwrap();
}

/// Starts the worker on `root`, killed at `instant`; true if it was.
fn killed(root: &Path, instant: &str) -> bool {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "crash::saves::worker", "--test-threads=1"]).env(ROOT, root);
    command.env(failpoints::VARIABLE, format!("{instant}:1:0"));
    let output = command.output().unwrap();
    match output.status.signal() {
        Some(signal) => signal == libc::SIGKILL,
        None => {
            assert!(output.status.success(), "{instant}: {output:?}");
            false
        }
    }
}

/// Names and texts of the saves in `root`, each of which has to be whole.
fn found(root: &Path, place: &str) -> Vec<(String, String)> {
    let text = |(name, folder): (String, PathBuf)| {
        let whole = saves::whole(&folder).unwrap_or_else(|error| panic!("{place}: torn: {error}"));
        let [first, second] = ["first", "second"].map(|file| fs::read_to_string(whole.join(file)).unwrap());
        assert_eq!(first, second, "{place}: {name} is of two saves");
        (name, first)
    };
    saves::list(root).into_iter().map(text).collect()
}

#[test]
fn a_server_killed_at_any_instant_keeps_the_earlier_save_or_has_the_new_one() {
    let of_publish = ["begun", "file_synced", "listed", "manifest_written", "manifest_synced"]
        .into_iter()
        .chain(["hidden_synced", "renamed", "parent_synced"])
        .map(|name| format!("publish.{name}"));
    let of_withdraw = ["begun", "renamed", "synced", "removed"].map(|name| format!("withdraw.{name}"));
    let own = OF_SAVES.iter().map(|name| (*name).to_owned());
    let instants: Vec<String> = own.chain(of_publish).chain(of_withdraw).collect();
    for instant in &instants {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        save(&root.join("a"), "old");
        if instant == "recover.renamed" {
            assert!(killed(root, "publish.replaced_away"));
        }
        assert!(killed(root, instant), "{instant}: never reached");
        let before = found(root, instant);
        let is_known = |(_, text): &(String, String)| ["old", "new"].contains(&text.as_str());
        assert!(!before.is_empty() && before.iter().all(is_known), "{instant}: {before:?}");
        // The next server tidies up, and nothing that was there goes.
        saves::recover_below(root).unwrap();
        assert_eq!(found(root, instant), before, "{instant}");
        let left: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{instant}: {left:?}");
    }
}
