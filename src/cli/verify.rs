//! The command `verify`.

use super::{Common, Fields, Runnable};
use crate::{
    checkpoint::{
        CheckpointError,
        contents::{self, Contents},
        publish::{MANIFEST, published_name},
        steps,
    },
    console::{count, size},
    error::{Error, Result},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Check that steps of runs and saves of a server are whole: manifest, sizes, hashes, shapes, shards, finite values.
/// The exit code is 0 if all are, 2 if one is not
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Verify {
    /// A step or a save, or a folder of several: a run's (weights/run), an output_dir
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Print a JSON object: an object a step, and the step that auto takes by run
    #[arg(long)]
    pub json: bool,
}

impl Runnable for Verify {
    const USAGE: &'static str = "verify <DIR> [--json]";
    const FIELDS: Option<Fields> = None;

    fn run(&self, _: &Common) -> Result<ExitCode> {
        let root = &self.folder;
        if !root.is_dir() {
            let found = if root.exists() { "a file" } else { "no such folder" };
            return Err(Error::Input(format!(
                "{}: {found}; expected a step, or a folder that has some",
                root.display()
            )));
        }
        let found = if is_step(root) { vec![root.clone()] } else { steps_below(root)? };
        if found.is_empty() {
            return Err(Error::Input(format!(
                "{}: no step: expected a folder with {MANIFEST}, or one that has such below it",
                root.display()
            )));
        }
        let mut all = Vec::new();
        let mut taken: BTreeMap<String, Option<String>> = BTreeMap::new();
        let mut is_whole = true;
        for (place, path) in found.iter().enumerate() {
            // What auto looks at, and beyond it what only this command does.
            let published = steps::whole(path);
            let run = path.parent().filter(|_| path != root && steps::number(path).is_some());
            if let Some(run) = run {
                let newest = taken.entry(name_in(root, run)).or_default();
                if published.is_ok() {
                    *newest = Some(name_in(run, path));
                }
            }
            let checked = published.and_then(|()| contents::check(path));
            is_whole &= checked.is_ok();
            let name = if path == root { path.display().to_string() } else { name_in(root, path) };
            match self.json {
                true => all.push(object(&name, &checked)),
                false => drop(super::print(&line(&name, &checked))?),
            }
            let goes_on = found.get(place + 1).is_some_and(|next| next.parent() == path.parent());
            if let Some(run) = run.filter(|_| !goes_on && !self.json) {
                let run = name_in(root, run);
                let newest = taken.get(&run).cloned().flatten();
                super::print(&told(&run, newest.as_deref()))?;
            }
        }
        if self.json {
            super::print(&(json!({"steps": all, "auto": taken}).to_string() + "\n"))?;
        }
        Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(2) })
    }
}

/// True for the folder of a step or a save, damaged ones included.
fn is_step(folder: &Path) -> bool {
    folder.join(MANIFEST).is_file() || (folder.is_dir() && steps::number(folder).is_some())
}

/// The steps and saves below `root`: by folder, steps in their order, saves by name. Saves that a killed overwrite has
/// left under their hidden name are among them, other hidden folders are not.
fn steps_below(root: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| Error::Input(format!("{}: {error}", root.display()));
    let (mut steps, mut folders) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // One that was replaced has lost its place if there is another.
        let Some(place) = published_name(&name).map(|name| root.join(name)) else { continue };
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || (place != path && place.exists()) {
            continue;
        }
        if is_step(&path) { steps.push(path) } else { folders.push(path) }
    }
    steps.sort_by_key(|path| (steps::number(path), path.clone()));
    folders.sort();
    for folder in folders {
        steps.extend(steps_below(&folder)?);
    }
    Ok(steps)
}

/// `path` as it is called from `root`.
fn name_in(root: &Path, path: &Path) -> String {
    match path.strip_prefix(root).unwrap_or(path) {
        own if own.as_os_str().is_empty() => ".".to_owned(),
        below => below.display().to_string(),
    }
}

/// The reason alone: a line begins with the step.
fn reason(error: &CheckpointError) -> String {
    match error {
        CheckpointError::Damaged { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

fn line(name: &str, checked: &Result<Contents, CheckpointError>) -> String {
    match checked {
        Ok(Contents { files, bytes }) => {
            format!("{name}: whole, {}, {}\n", count(*files, "file"), size(*bytes))
        }
        Err(error) => format!("{name}: damaged: {}\n", reason(error)),
    }
}

fn object(name: &str, checked: &Result<Contents, CheckpointError>) -> Value {
    match checked {
        Ok(Contents { files, bytes }) => json!({"step": name, "whole": true, "files": files, "bytes": bytes}),
        Err(error) => json!({"step": name, "whole": false, "reason": reason(error)}),
    }
}

/// The step of `run` that a resume takes.
fn told(run: &str, newest: Option<&str>) -> String {
    let run = if run == "." { String::new() } else { format!("{run}: ") };
    match newest {
        Some(step) => format!("{run}load_checkpoint_path: auto takes {step}\n"),
        None => format!("{run}load_checkpoint_path: auto starts afresh, as no step is whole\n"),
    }
}
