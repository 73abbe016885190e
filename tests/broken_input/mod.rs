//! Whatever a user gets wrong in a config, a model, a tokenizer, data, an adapter, a resume, a server or a command:
//! exit code 2, one line that names place, cause and remedy, and nothing written. The
//! tables are in the files beside; nothing in them gets so far that a step is trained or a port listened on.

mod adapters;
mod commands;
mod configs;
mod data;
mod evaluation;
mod mesh;
mod models;
mod server;
mod workplace;

use std::{collections::BTreeSet, sync::Mutex, thread};
use workplace::{Fixtures, Workplace};

/// Commands of most cases, and of those of a server.
const RUN: &[&str] = &["--config", "run.yaml"];
const SERVE: &[&str] = &["serve", "--config", "server.yaml"];
/// A file in a clone without git-LFS.
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 18784\n";
/// Cases that run at once.
const AT_ONCE: usize = 2;

/// A mistake.
#[derive(Clone, Copy)]
pub struct Case {
    what: &'static str,
    command: &'static [&'static str],
    /// Parts of the one line: place, cause, remedy.
    words: &'static [&'static str],
    spoil: fn(&Workplace),
}

/// A run that `spoil` breaks.
const fn case(what: &'static str, words: &'static [&'static str], spoil: fn(&Workplace)) -> Case {
    Case { what, command: RUN, words, spoil }
}

impl Case {
    /// The same of another command.
    const fn of(self, command: &'static [&'static str]) -> Self {
        Self { command, ..self }
    }

    /// Runs it: the difference from what is promised, if there is one.
    fn wrong(&self, fixtures: &Fixtures) -> Option<String> {
        let workplace = Workplace::new(fixtures);
        (self.spoil)(&workplace);
        let before = workplace.files();
        let (code, stderr) = workplace.run(self.command);
        let lines: Vec<&str> =
            stderr.lines().filter(|line| !line.contains(" WARN ") && !line.contains(" INFO ")).collect();
        let named = matches!(lines[..], [line] if line.starts_with("error: ")
            && self.words.iter().all(|word| line.contains(word)));
        let new: BTreeSet<_> = workplace.files().difference(&before).cloned().collect();
        let Self { what, command, words, .. } = self;
        (code != Some(2) || !named || !new.is_empty()).then(|| {
            format!("{what}: {command:?}: expected {words:?}, exit {code:?}, written {new:?}: {stderr}")
        })
    }
}

#[test]
fn python_broken_input_is_named_in_one_line_and_nothing_is_written() {
    let mut fixtures = Fixtures::new();
    let good = Workplace::new(&fixtures);
    let (code, stderr) = good.run(RUN);
    assert_eq!(code, Some(0), "what is broken below must be what stops it: {stderr}");
    fixtures.keep_run(&good);

    let cases: Vec<&Case> = [
        configs::CASES,
        models::CASES,
        data::CASES,
        evaluation::CASES,
        adapters::CASES,
        mesh::CASES,
        commands::CASES,
        server::CASES,
    ]
    .into_iter()
    .flatten()
    .collect();
    assert!(cases.len() >= 140, "{} mistakes", cases.len());
    let (left, wrong) = (Mutex::new(cases.iter()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = left.lock().unwrap().next();
            let Some(case) = next else { return };
            let found = case.wrong(&fixtures);
            wrong.lock().unwrap().extend(found);
        }
    };
    thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(work))));
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
