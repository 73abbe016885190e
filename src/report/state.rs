//! The runs of an output directory, each with its state: from the lock, metrics.jsonl, the summary of a run that has
//! ended, flight records and the published steps.

use super::{
    folders_in,
    rows::{self, Row},
    run_directory,
};
use crate::{
    checkpoint::{
        output::{self, Lock},
        state::progress_of,
        steps,
    },
    regular_file,
    train::metrics::{METRICS_FILE, SUMMARY_FILE},
};
use serde::Serialize;
use serde_json::Value;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The configuration that a run leaves in its output directory.
const CONFIG_FILE: &str = "config.yaml";
/// Records of collectives that ranks leave when the watchdog ends them.
const FLIGHT: &str = "flight";

/// The file of a run that names its best step.
const BEST: &str = "best";

/// State of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A process has the output directory.
    Running,
    /// It came to its end.
    Finished,
    /// It ended before its end and has saved its last step: a resume loses nothing.
    Stopped,
    /// It ended with an error.
    Failed,
    /// It was ended, and steps since the last save are lost.
    Interrupted,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A run as it stands on disk. Its fields are those of `runs --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Standing {
    /// The output directory.
    pub output: PathBuf,
    pub run_id: String,
    pub state: State,
    /// The error of a run that failed; the process and host of one that runs.
    pub reason: Option<String>,
    /// The last step of which anything is known.
    pub step: Option<usize>,
    /// Steps of the whole run.
    pub total_steps: Option<usize>,
    /// Loss of the last step that has one.
    pub loss: Option<f64>,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// The best step so far by the run's own measure, else that of the lowest evaluation loss.
    pub best_step: Option<usize>,
    /// The newest step that is published.
    pub saved_step: Option<usize>,
    /// Seconds since the epoch of the last sign of the run.
    pub updated: Option<u64>,
    /// `model.model_path` of its configuration, else `model.config_path`.
    pub model: Option<String>,
    /// True of the run that has the output directory's metrics and configuration.
    #[serde(skip)]
    pub is_current: bool,
}

impl Standing {
    /// A run of which nothing but its place is known.
    pub(super) fn of_path(output: PathBuf, run_id: &str) -> Self {
        Self {
            output,
            run_id: run_id.to_owned(),
            state: State::Interrupted,
            reason: None,
            step: None,
            total_steps: None,
            loss: None,
            eval_loss: None,
            best_step: None,
            saved_step: None,
            updated: None,
            model: None,
            is_current: false,
        }
    }
}

/// The run_ids of `output` that have published a step, sorted.
pub(super) fn run_ids(output: &Path) -> Vec<String> {
    let runs = folders_in(&output.join(steps::WEIGHTS));
    let runs = runs.iter().filter(|run| !steps::published(run).is_empty());
    runs.filter_map(|run| Some(run.file_name()?.to_str()?.to_owned())).collect()
}

/// The configuration in `output`; null where there is none that can be read.
pub(super) fn config_of(output: &Path) -> Value {
    let text = regular_file::read_to_string(&output.join(CONFIG_FILE)).unwrap_or_default();
    serde_yaml::from_str(&text).unwrap_or_default()
}

/// The runs of `output`: that of its metrics first, then others that have published steps.
///
/// # Errors
/// Metrics that cannot be read.
pub fn runs_of(output: &Path) -> io::Result<Vec<Standing>> {
    let config = config_of(output);
    let mut ids = run_ids(output);
    // The configuration is that of the run that began last.
    let current = config["train"]["run_id"].as_str().map(str::to_owned);
    let current = current.or_else(|| ids.first().cloned()).unwrap_or_else(|| "run".to_owned());
    ids.retain(|id| *id != current);
    let mut runs = vec![current_run(output, &current, &config, &rows::read(output)?)];
    runs.extend(ids.iter().map(|id| earlier_run(output, id)));
    Ok(runs)
}

/// The run to which the metrics `rows` and the configuration of `output` belong.
fn current_run(output: &Path, run_id: &str, config: &Value, rows: &[Row]) -> Standing {
    let saved = saved(output, run_id);
    let summary = regular_file::read_to_string(&output.join(SUMMARY_FILE)).unwrap_or_default();
    let summary: Value = serde_json::from_str(&summary).unwrap_or_default();
    let count = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok());
    let last = rows.last().map(|row| row.step);
    let step = last.max(saved.step);
    let total = rows.iter().rev().find_map(|row| count(&row.values["total_steps"]));
    let total = total.or_else(|| count(&summary["total_train_steps"])).or(saved.total);
    let last_of = |key: &str| rows.iter().rev().find_map(|row| row.number(key));
    let lowest = rows.iter().filter_map(|row| Some((row.number("eval_loss")?, row.step)));
    let lowest = lowest.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, step)| step);
    let written = modified(&output.join(METRICS_FILE));
    let (state, reason) = match output::look(output) {
        Lock::Held { holder } => (State::Running, Some(holder)),
        // A summary of an earlier run in the same place has another step.
        _ if step.is_some() && count(&summary["global_step"]) == step => (State::Finished, None),
        // The watchdog's reason names the rank that failed; this one may only know that another has.
        Lock::Free { failure } => match ended_by_watchdog(output, written).or(failure) {
            Some(reason) => (State::Failed, Some(reason)),
            None if step.is_some() && saved.step == step => (State::Stopped, None),
            None => (State::Interrupted, None),
        },
    };
    let model = &config["model"];
    let model = model["model_path"].as_str().or_else(|| model["config_path"].as_str());
    Standing {
        state,
        reason,
        step,
        total_steps: total.or_else(|| count(&config["train"]["max_steps"])),
        loss: last_of("loss"),
        eval_loss: last_of("eval_loss"),
        best_step: best(&run_directory(output, run_id)).or(lowest),
        saved_step: saved.step,
        updated: seconds(written.max(saved.time)),
        model: model.map(str::to_owned),
        is_current: true,
        ..Standing::of_path(output.to_owned(), run_id)
    }
}

/// A run that is known by its published steps alone, as a later one has its place.
fn earlier_run(output: &Path, run_id: &str) -> Standing {
    let saved = saved(output, run_id);
    let state = if saved.step == saved.total { State::Finished } else { State::Stopped };
    Standing {
        state,
        step: saved.step,
        total_steps: saved.total,
        best_step: best(&run_directory(output, run_id)),
        saved_step: saved.step,
        updated: seconds(saved.time),
        ..Standing::of_path(output.to_owned(), run_id)
    }
}

/// The newest published step of a run.
struct Saved {
    step: Option<usize>,
    total: Option<usize>,
    time: Option<SystemTime>,
}

fn saved(output: &Path, run_id: &str) -> Saved {
    let run = run_directory(output, run_id);
    let step = steps::published(&run).last().copied();
    let folder = step.map(|step| steps::directory(&run, step));
    Saved {
        step,
        total: folder.as_deref().and_then(progress_of).map(|(_, total)| total),
        time: folder.as_deref().and_then(modified),
    }
}

/// The step that the file `best` of the folder `run` names, as `latest` names the newest.
fn best(run: &Path) -> Option<usize> {
    steps::number(Path::new(regular_file::read_to_string(&run.join(BEST)).ok()?.trim()))
}

/// The reason in a flight record that is not older than the metrics, `written` then.
fn ended_by_watchdog(output: &Path, written: Option<SystemTime>) -> Option<String> {
    let records = fs::read_dir(output.join(FLIGHT)).into_iter().flatten().flatten();
    let mut records: Vec<PathBuf> =
        records.map(|record| record.path()).filter(|path| modified(path) >= written).collect();
    records.sort();
    records.iter().find_map(|path| {
        let record: Value = serde_json::from_slice(&regular_file::read(path).ok()?).ok()?;
        record["ended"].as_str().map(str::to_owned)
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|file| file.modified()).ok()
}

fn seconds(time: Option<SystemTime>) -> Option<u64> {
    Some(time?.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::output::{OutputLock, note_failure};

    /// An output directory with `rows` steps of metrics out of 9, and published steps.
    fn output(rows: usize, saved: &[usize]) -> tempfile::TempDir {
        let output = tempfile::tempdir().unwrap();
        let line = |step: usize| format!("{{\"step\":{step},\"loss\":{step}.5,\"total_steps\":9}}\n");
        fs::write(output.path().join(METRICS_FILE), (1..=rows).map(line).collect::<String>()).unwrap();
        fs::write(output.path().join(CONFIG_FILE), "train: {run_id: mine}\nmodel: {model_path: org/base}\n")
            .unwrap();
        for step in saved {
            fs::create_dir_all(output.path().join(format!("weights/mine/step_{step}"))).unwrap();
        }
        output
    }

    fn only(output: &Path) -> Standing {
        let runs = runs_of(output).unwrap();
        assert_eq!(runs.len(), 1);
        runs[0].clone()
    }

    #[test]
    fn the_state_of_a_run_is_told() {
        let stopped = output(4, &[2, 4]);
        let run = only(stopped.path());
        assert_eq!((run.state, run.step, run.total_steps), (State::Stopped, Some(4), Some(9)));
        assert_eq!((run.loss, run.saved_step, &*run.run_id), (Some(4.5), Some(4), "mine"));
        assert_eq!(run.model.as_deref(), Some("org/base"));

        let running = output(4, &[2]);
        let lock = OutputLock::take(running.path()).unwrap();
        let run = only(running.path());
        assert_eq!(run.state, State::Running);
        assert!(run.reason.unwrap().contains(&format!("process {}", std::process::id())));
        drop(lock);
        assert_eq!(only(running.path()).state, State::Interrupted);
        note_failure(running.path(), "the disk is full");
        let run = only(running.path());
        assert_eq!((run.state, run.reason.as_deref()), (State::Failed, Some("the disk is full")));
        // The next run is not the one that failed.
        drop(OutputLock::take(running.path()).unwrap());
        assert_eq!(only(running.path()).state, State::Interrupted);

        let finished = output(9, &[9]);
        let summary = |step: usize| {
            let text = format!("{{\"global_step\":{step},\"total_train_steps\":9}}");
            fs::write(finished.path().join(SUMMARY_FILE), text).unwrap();
        };
        summary(9);
        assert_eq!(only(finished.path()).state, State::Finished);
        // The summary of an earlier run is not believed.
        summary(7);
        assert_eq!(only(finished.path()).state, State::Stopped);

        let dead = output(3, &[]);
        fs::create_dir(dead.path().join(FLIGHT)).unwrap();
        fs::write(dead.path().join("flight/rank_0.json"), "{\"rank\":0,\"ended\":\"rank 1 is gone\"}")
            .unwrap();
        let run = only(dead.path());
        assert_eq!((run.state, run.reason.as_deref()), (State::Failed, Some("rank 1 is gone")));

        let empty = output(0, &[]);
        let run = only(empty.path());
        assert_eq!((run.state, run.step, run.loss), (State::Interrupted, None, None));
    }

    #[test]
    fn every_run_id_of_an_output_directory_is_a_run() {
        let output = output(4, &[4]);
        fs::create_dir_all(output.path().join("weights/earlier/step_6")).unwrap();
        fs::create_dir_all(output.path().join("weights/empty")).unwrap();
        let runs = runs_of(output.path()).unwrap();
        let found: Vec<_> = runs.iter().map(|run| (&*run.run_id, run.step, run.is_current)).collect();
        assert_eq!(found, [("mine", Some(4), true), ("earlier", Some(6), false)]);
    }

    #[test]
    fn the_best_step_is_that_of_the_lowest_evaluation() {
        let output = output(2, &[]);
        let lines = "{\"step\":0,\"eval_loss\":3.0}\n{\"step\":4,\"eval_loss\":1.0}\n{\"step\":8,\"eval_loss\":2.0}\n";
        fs::write(output.path().join(METRICS_FILE), lines).unwrap();
        let run = only(output.path());
        assert_eq!((run.best_step, run.eval_loss, run.loss), (Some(4), Some(2.0), None));
    }
}
