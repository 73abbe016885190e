//! Runs as they stand on disk: found below a folder, with their state and metrics, and shown on one page. Only reads;
//! called by the commands `runs` and `report`, also while a run goes on.
//!
//! - `rows`: the lines of metrics.jsonl
//! - `state`: the runs of an output directory, each with its state
//! - `table`: runs as a table for a terminal
//! - `page`: the page of several runs

mod page;
mod rows;
mod state;
mod table;

pub use page::html;
pub use rows::{Row, read as read_rows};
pub use state::{Standing, State, runs_of};
pub use table::table;

use crate::{checkpoint::steps, train::metrics::METRICS_FILE};
use std::path::{Path, PathBuf};

/// Folders below the one that is named in which output directories are looked for.
const DEPTH: usize = 4;

/// A folder in which no run is.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("{}: no such folder; expected the output_dir of a run, or a folder of several", .0.display())]
    Absent(PathBuf),
    #[error("{}: a file, where the output_dir of a run belongs", .0.display())]
    File(PathBuf),
    #[error("{}: no run is in it; expected {METRICS_FILE}, or weights/RUN_ID/step_N, there or in a folder below", .0.display())]
    Empty(PathBuf),
}

/// The output directories of runs at or below `folder`, sorted by name.
///
/// # Errors
/// [`ReportError`]: there is none.
pub fn outputs_below(folder: &Path) -> Result<Vec<PathBuf>, ReportError> {
    if folder.is_file() {
        return Err(ReportError::File(folder.to_owned()));
    }
    if !folder.is_dir() {
        return Err(ReportError::Absent(folder.to_owned()));
    }
    let mut found = Vec::new();
    search(folder, DEPTH, &mut found);
    if found.is_empty() { Err(ReportError::Empty(folder.to_owned())) } else { Ok(found) }
}

/// Adds the output directories at or below `folder` to `found`. One inside another is not looked for.
fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if is_output(folder) {
        found.push(folder.to_owned());
        return;
    }
    if depth == 0 {
        return;
    }
    folders_in(folder).iter().for_each(|below| search(below, depth - 1, found));
}

/// True of a folder that a run has written to.
fn is_output(folder: &Path) -> bool {
    folder.join(METRICS_FILE).is_file() || !state::run_ids(folder).is_empty()
}

/// The folders in `folder` that are not hidden, sorted by name.
fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_hidden = |path: &Path| path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir() && !is_hidden(path)).collect();
    folders.sort();
    folders
}

/// Names of `runs` for people: the end of each path by which it differs from all others, with the run_id where one
/// output directory has several.
pub fn names(runs: &[Standing]) -> Vec<String> {
    let parts = |run: &Standing| -> Vec<String> {
        let path = run.output.canonicalize().unwrap_or_else(|_| run.output.clone());
        path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect()
    };
    let all: Vec<Vec<String>> = runs.iter().map(parts).collect();
    let end = |path: &[String], length: usize| path[path.len().saturating_sub(length)..].join("/");
    let name = |(run, path): (&Standing, &Vec<String>)| {
        let is_other = |other: &&Vec<String>| *other != path;
        let differs = |length: &usize| {
            all.iter().filter(is_other).all(|other| end(other, *length) != end(path, *length))
        };
        let length = (1..path.len()).find(differs).unwrap_or(path.len());
        let several = all.iter().filter(|other| *other == path).count() > 1;
        let name = end(path, length);
        if several { format!("{name} {}", run.run_id) } else { name }
    };
    runs.iter().zip(&all).map(name).collect()
}

/// The folder of a run's steps.
fn run_directory(output: &Path, run_id: &str) -> PathBuf {
    output.join(steps::WEIGHTS).join(run_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn outputs_are_found_at_and_below_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for output in ["b", "a/one", "a/two", ".hidden", "1/2/3/4/5"] {
            fs::create_dir_all(at(output)).unwrap();
            fs::write(at(output).join(METRICS_FILE), "").unwrap();
        }
        fs::create_dir_all(at("c/weights/mine/step_4")).unwrap();
        fs::create_dir_all(at("d/weights/model/checkpoint")).unwrap();
        let found = outputs_below(folder.path()).unwrap();
        assert_eq!(found, ["a/one", "a/two", "b", "c"].map(at));
        assert_eq!(outputs_below(&at("b")).unwrap(), [at("b")]);
        for (name, words) in
            [("d", "no run is in it"), ("e", "no such folder"), ("b/metrics.jsonl", "a file")]
        {
            let error = outputs_below(&at(name)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
    }

    #[test]
    fn runs_are_named_by_what_they_differ_in() {
        let run = |output: &str, run_id: &str| Standing::of_path(output.into(), run_id);
        let runs = [run("/x/a/out", "run"), run("/x/b/out", "run"), run("/x/c", "old"), run("/x/c", "new")];
        assert_eq!(names(&runs), ["a/out", "b/out", "c old", "c new"]);
        assert_eq!(names(&runs[..1]), ["out"]);
    }
}
