//! A kill at every instant that `checkpoint` names, on each rank.

use super::story::Story;
use crate::common::{succeeded, xorl};
use std::{collections::BTreeSet, fs, path::Path};
use xorl_dist::checkpoint::{
    failpoints::{OF_EVERY_RANK, OF_RUNS, OF_SAVES},
    publish,
};

/// A kill: the instant, the time that it is reached, the rank.
type Kill = (&'static str, usize, usize);

/// Kills a run at each of `kills`, one start after another, each a resume of what the one before has left. Every run
/// ends as the undisturbed one.
fn kill_at_each(ranks: usize, kills: &[Kill]) {
    let mut story = Story::new(ranks);
    for &(name, nth, rank) in kills {
        let place = format!("{name}, time {nth}, rank {rank} of {ranks}");
        // A run that is over has no such instant left: the next one has, from its second step on.
        let mut is_killed = false;
        for attempt in 0..2 {
            let output = story.until(name, nth, rank);
            if output.status.success() {
                story.finish(&place);
                if attempt == 0 {
                    assert!(!story.until("publish.listed", 2, 0).status.success());
                    story.check(&place);
                }
                continue;
            }
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(&format!("killed at {name}")), "{place}: {said}");
            story.check(&place);
            is_killed = true;
            break;
        }
        assert!(is_killed, "{place}: never reached");
    }
    if story.out().exists() {
        succeeded(&story.command().output().unwrap());
        story.finish("the last");
    }
    println!(
        "world {ranks}: {} kills, each at its instant; 0 torn, 0 lost, all resumed, bit-identical",
        kills.len()
    );
}

/// Every instant of a run, `times` each, on every rank that has it.
fn all_kills(ranks: usize, times: usize) -> Vec<Kill> {
    let mut kills = Vec::new();
    for &name in OF_RUNS {
        for rank in 0..ranks {
            if rank == 0 || OF_EVERY_RANK.contains(&name) {
                kills.extend((1..=times).map(|nth| (name, nth, rank)));
            }
        }
    }
    kills
}

/// Those that are reached once a start, at most: how often one start reaches them is not asked.
fn is_once(name: &str) -> bool {
    ["folder.", "recover.", "load."].iter().any(|prefix| name.starts_with(prefix))
}

#[test]
fn killed_at_any_instant_of_a_save_on_one_rank() {
    kill_at_each(1, &all_kills(1, 1));
}

#[test]
fn mpi_a_rank_killed_in_a_save_or_a_load_on_two_ranks() {
    kill_at_each(
        2,
        &[
            ("pieces.written", 2, 1),
            ("load.pieces", 1, 1),
            ("model.written", 1, 1),
            ("publish.hidden_synced", 1, 0),
            ("publish.renamed", 1, 0),
            ("withdraw.renamed", 1, 0),
        ],
    );
}

/// `ci/long.sh crashes`
#[test]
#[ignore = "minutes"]
fn mpi_every_instant_on_every_rank() {
    for ranks in [1, 2] {
        let all = all_kills(ranks, 3).into_iter();
        kill_at_each(ranks, &all.filter(|(name, nth, _)| *nth == 1 || !is_once(name)).collect::<Vec<_>>());
    }
    merge_killed_at(&["publish.begun", "model.created", "model.written", "model.synced"]);
    let publishing: Vec<&str> = OF_RUNS.iter().copied().filter(|name| name.starts_with("publish.")).collect();
    merge_killed_at(&publishing);
}

/// Kills `merge` at each instant: the model is there whole or not at all, and the next merge writes it.
fn merge_killed_at(instants: &[&str]) {
    let story = Story::new(1);
    let adapter = story.run.run_dir("undisturbed").display().to_string();
    let merge = |out: &Path, instant: Option<&str>| {
        let out = out.display().to_string();
        let arguments = ["merge", "--adapter", &adapter, "--out", &out];
        let Some(instant) = instant else { return xorl(1, &arguments) };
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_xorl-dist"));
        command.args(arguments).env("XORL_FAILPOINT", format!("{instant}:1:0")).output().unwrap()
    };
    let whole = story.run.at("whole");
    succeeded(&merge(&whole, None));
    for instant in instants {
        let out = story.run.at("merged");
        assert!(!merge(&out, Some(instant)).status.success(), "{instant} is never reached");
        if out.exists() {
            publish::verify(&out).unwrap_or_else(|error| panic!("{instant}: {error}"));
        } else {
            succeeded(&merge(&out, None));
        }
        let different = crate::common::tiny::differences(&whole, &out);
        assert!(different.is_empty(), "{instant}: {different:?}");
        fs::remove_dir_all(&out).unwrap();
    }
    println!(
        "merge: {} kills; the model is whole or not there, and the next merge writes it",
        instants.len()
    );
}

#[test]
fn a_merge_that_is_killed_leaves_the_whole_model_or_none() {
    merge_killed_at(&["model.written", "publish.manifest_written", "publish.renamed"]);
}

/// Each instant in the code is in one of the lists, by which the tests above go, and no other name is.
#[test]
fn every_instant_of_the_code_is_known() {
    fn named(folder: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                named(&path, names);
            } else {
                let text = fs::read_to_string(&path).unwrap_or_default();
                let points = text.split("fail_point!(\"").skip(1);
                names.extend(points.map(|rest| rest.split('"').next().unwrap().to_owned()));
            }
        }
    }
    let mut found = BTreeSet::new();
    named(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    let known: BTreeSet<String> = OF_RUNS.iter().chain(OF_SAVES).map(|name| (*name).to_owned()).collect();
    assert_eq!(found, known);
    assert!(OF_EVERY_RANK.iter().all(|name| OF_RUNS.contains(name)));
}
