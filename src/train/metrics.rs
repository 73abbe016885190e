//! Metrics of a run: `metrics.jsonl` (a line for every `train.logging_steps` steps, with the evaluation after the last
//! of them if there was one; line 0 is an evaluation before the first step), TensorBoard's files beside it, progress on
//! a terminal or in lines, and `training_metrics.json` at the end. Rank 0 writes; the other ranks hold a [`Metrics`]
//! that does nothing.

use super::{
    Evaluation, StepReport, output::remedy, progress::Progress, records::Records, tensorboard::EventFile,
};
use crate::{
    checkpoint::{CheckpointError, publish::replace},
    comm::{Ledger, Operation, Received},
    config::{LogFormat, OnSaveError, TrainArgs},
    console::{self, first_of},
    error::{Error, Result},
    loss::Rewards,
    model::router_load::RouterReport,
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// The file with the lines of steps.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The run in one object, written at its end.
pub const SUMMARY_FILE: &str = "training_metrics.json";

/// Metrics of one step.
pub struct StepMetrics<'a> {
    /// Counted from 1.
    pub step: usize,
    pub epoch: usize,
    pub report: &'a StepReport,
    /// Time from the end of the step before, or of its save, to the end of this one.
    pub seconds: f64,
    /// Seconds of this rank by phase.
    pub phases: BTreeMap<&'static str, f64>,
    /// Largest VmHWM of all ranks.
    pub peak_rss_bytes: u64,
    /// Memory in use on a device at the end of the step, by all processes; the largest of all ranks. libtorch keeps
    /// freed memory, so this is a peak too. `None` on the CPU.
    pub device_memory_bytes: Option<u64>,
    /// Bytes that this rank's collectives have received in the step.
    pub received: Received,
    /// The evaluation after the step.
    pub evaluation: Option<Evaluation>,
}

/// Rank 0's files in output_dir and its lines on stdout; nothing on other ranks.
pub struct Metrics {
    output: PathBuf,
    file: Option<Records>,
    events: Option<EventFile>,
    /// A line that cannot be written waits for the next.
    may_wait: bool,
    /// The user was told of lines that wait.
    warned: bool,
    total_steps: usize,
    progress: Option<Progress>,
    /// A line comes every this many steps.
    every: usize,
    /// Steps since the last line.
    window: Window,
    /// Steps made.
    done: usize,
    history: History,
}

/// The places and the pace of a run's metrics.
#[derive(Clone, Debug)]
pub struct Logging {
    pub format: LogFormat,
    /// Steps of a line, at least 1.
    pub every: usize,
    /// Folder of TensorBoard's files. `None`: none are written.
    pub tensorboard: Option<PathBuf>,
    /// A line that cannot be written waits for the next one, where the run goes on without a save, too.
    pub may_wait: bool,
}

impl From<&TrainArgs> for Logging {
    fn from(train: &TrainArgs) -> Self {
        let folder = || train.output_dir.join("tensorboard").join(&train.run_id);
        Self {
            format: train.log_format,
            every: train.logging_steps,
            tensorboard: train.use_tensorboard.then(folder),
            may_wait: train.on_save_error == OnSaveError::Continue,
        }
    }
}

/// Values by line; `None` for a line without one.
#[derive(Debug, Default, PartialEq)]
struct History {
    losses: Vec<Option<f64>>,
    grad_norms: Vec<Option<f64>>,
    /// Steps that were evaluated, 0 before the first, with the keys of their lines.
    evaluations: Vec<Value>,
}

/// Keys of an evaluation in the line of its step.
const EVALUATION: [&str; 3] = ["eval_loss", "eval_perplexity", "eval_tokens"];

/// Adds `evaluation` to the `line` of its step.
fn add(line: &mut Map<String, Value>, evaluation: &Evaluation) {
    let Evaluation { loss, tokens, rewards, seconds } = *evaluation;
    let values = [json!(loss), json!(evaluation.perplexity()), json!(tokens)];
    line.extend(EVALUATION.map(str::to_owned).into_iter().zip(values));
    line.insert("eval_seconds".into(), json!(seconds));
    for (name, mean) in rewards.iter().flat_map(Rewards::means) {
        line.insert(format!("eval_{name}"), json!(mean));
    }
}

/// The step and the results of an evaluated `line`, for the summary.
fn results(line: &Value) -> Option<Value> {
    let results = EVALUATION.map(|key| (key.to_owned(), line[key].clone())).into_iter();
    let all = [("step".to_owned(), line["step"].clone())].into_iter().chain(results);
    line.get("eval_tokens").map(|_| all.collect::<Map<_, _>>().into())
}

/// Sums over the steps since the last line.
#[derive(Default)]
struct Window {
    steps: usize,
    losses: Vec<f64>,
    tokens: u64,
    tokens_total: u64,
    tokens_padding: u64,
    seconds: f64,
    phases: BTreeMap<&'static str, f64>,
    received: Received,
    /// The values that are those of the last step.
    last: Option<Map<String, Value>>,
}

impl Window {
    fn add(&mut self, step: &StepMetrics) {
        let StepMetrics { report, .. } = step;
        self.steps += 1;
        self.losses.extend(report.loss.filter(|loss| loss.is_finite()));
        self.tokens += report.valid_tokens;
        self.tokens_total += report.total_tokens;
        self.tokens_padding += report.padding_tokens;
        self.seconds += step.seconds;
        for (phase, seconds) in &step.phases {
            *self.phases.entry(phase).or_default() += seconds;
        }
        for (key, bytes) in &step.received {
            *self.received.entry(key.clone()).or_default() += bytes;
        }
        let mut last = Map::from_iter(
            [
                ("step", json!(step.step)),
                ("epoch", json!(step.epoch)),
                ("grad_norm", json!(report.grad_norm)),
                ("lr", json!(report.lr)),
                ("peak_rss_bytes", json!(step.peak_rss_bytes)),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        if let Some(bytes) = step.device_memory_bytes {
            last.insert("device_memory_bytes".into(), bytes.into());
        }
        if let Some(RouterReport { max_over_mean, entropy, aux_loss }) = report.router {
            let router = json!({"max_over_mean": max_over_mean, "entropy": entropy, "aux_loss": aux_loss});
            last.insert("router".into(), router);
        }
        let rewards = report.rewards.iter().flat_map(Rewards::means);
        last.extend(rewards.map(|(name, mean)| (name.to_owned(), mean.into())));
        if let Some(evaluation) = &step.evaluation {
            add(&mut last, evaluation);
        }
        self.last = Some(last);
    }

    /// Mean of the losses.
    fn loss(&self) -> Option<f64> {
        (!self.losses.is_empty()).then(|| self.losses.iter().sum::<f64>() / self.losses.len() as f64)
    }

    /// Tokens by second. Padding is computed too, and teaches nothing.
    fn rate(&self) -> f64 {
        (self.tokens_total - self.tokens_padding) as f64 / self.seconds
    }

    /// The line of a run of `total_steps`; `None` without a step.
    fn line(&self, total_steps: usize) -> Option<Value> {
        let last = self.last.as_ref()?;
        let mut comm = Map::new();
        for ((operation, group), bytes) in &self.received {
            comm.insert(format!("{}/{group}", operation.name()), (*bytes).into());
        }
        let mut line = json!({
            "step": last["step"], "epoch": last["epoch"], "loss": self.loss(), "grad_norm": last["grad_norm"],
            "lr": last["lr"], "tokens": self.tokens, "tokens_total": self.tokens_total,
            "tokens_padding": self.tokens_padding, "tokens_per_second": self.rate(), "step_seconds": self.seconds,
            "phase_seconds": self.phases, "peak_rss_bytes": last["peak_rss_bytes"], "comm_bytes": comm,
            "total_steps": total_steps,
        });
        for (key, value) in last {
            if line.get(key).is_none() {
                line[key] = value.clone();
            }
        }
        if self.steps > 1 {
            line["steps"] = self.steps.into();
        }
        Some(line)
    }
}

impl Metrics {
    /// The metrics of a rank that does not write.
    pub fn silent() -> Self {
        Self {
            output: PathBuf::new(),
            file: None,
            events: None,
            may_wait: false,
            warned: false,
            total_steps: 0,
            progress: None,
            every: 1,
            window: Window::default(),
            done: 0,
            history: History::default(),
        }
    }

    /// Begins `metrics.jsonl` in `output` for a run of `total_steps`. A resumed run appends behind the line of step
    /// `resumed`; later lines are cut off. The summary of an earlier run goes.
    pub fn open(
        output: &Path,
        total_steps: usize,
        resumed: Option<usize>,
        logging: &Logging,
    ) -> Result<Self> {
        let path = output.join(METRICS_FILE);
        if std::fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
            let words = "no regular file, which the metrics go to; move it away";
            return Err(Error::Input(format!("{}: {words}", path.display())));
        }
        let (file, history) = match resumed {
            None => (open_at(&path, 0), History::default()),
            Some(step) => {
                let text = match std::fs::read(&path) {
                    Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
                    text => text.map_err(|error| with_remedy(fault(&path, error)))?,
                };
                let Kept { lines, last, history, damaged } = lines_up_to(step, &text);
                if damaged > 0 {
                    let aside = path.with_extension("jsonl.damaged");
                    let replaced = std::fs::copy(&path, &aside).and_then(|_| replace(&path, &lines));
                    replaced.map_err(|error| with_remedy(fault(&aside, error)))?;
                    tracing::warn!(
                        "{}: {} damaged between those of the run, and left out; the file as it was is {}",
                        path.display(),
                        console::count(damaged, "line"),
                        aside.display()
                    );
                }
                if last != step {
                    tracing::warn!("{}: knows steps up to {last}, the run resumes at {step}", path.display());
                }
                (open_at(&path, lines.len()), history)
            }
        };
        let file = file.map_err(|error| fault(&path, error))?;
        let summary = output.join(SUMMARY_FILE);
        if let Err(error) = std::fs::remove_file(&summary)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(with_remedy(fault(&summary, error)));
        }
        let first = resumed.map_or(0, |step| step + 1);
        let begin = |folder: &PathBuf| EventFile::begin(folder, first).map_err(|error| fault(folder, error));
        let events = logging.tensorboard.as_ref().map(begin).transpose()?;
        // The names of the files have to be on the disk, too, before a step is published.
        File::open(output).and_then(|folder| folder.sync_all()).map_err(|error| fault(output, error))?;
        let (output, done) = (output.to_owned(), resumed.unwrap_or(0));
        let progress = Some(Progress::new(total_steps, done, logging.format));
        let (every, window) = (logging.every.max(1), Window::default());
        Ok(Self {
            output,
            file: Some(file),
            events,
            may_wait: logging.may_wait,
            warned: false,
            total_steps,
            progress,
            every,
            window,
            done,
            history,
        })
    }

    /// Brings all steps to the disk.
    pub fn sync(&mut self) -> Result<()> {
        let sync = |(path, file): (PathBuf, File)| file.sync_data().map_err(|error| fault(&path, error));
        self.lines().and_then(|files| files.into_iter().try_for_each(sync)).map_err(with_remedy)
    }

    /// metrics.jsonl and TensorBoard's file with the lines of all steps, for a save to bring them to the disk before it
    /// publishes a step: a resume goes on behind them. None on ranks that do not write.
    ///
    /// # Errors
    /// A line cannot be written.
    pub fn lines(&mut self) -> Result<Vec<(PathBuf, File)>, CheckpointError> {
        self.write_line()?;
        let (lines, events) = (self.output.join(METRICS_FILE), self.output.join("tensorboard"));
        let records = self.file.iter_mut().map(|file| (lines.clone(), file));
        let records = records.chain(self.events.iter_mut().map(|file| (events.clone(), &mut file.0)));
        let written = records.map(|(path, records)| {
            let file = records.flush().and_then(|()| records.file().try_clone());
            file.map_err(|error| fault(&path, error)).map(|file| (path, file))
        });
        written.collect()
    }

    /// Ends the bar, so that lines may follow.
    pub fn end_progress(&mut self) {
        self.progress = None;
    }

    /// Adds to the line of the step that the run resumed from the evaluation that this step still lacked.
    pub fn evaluated(&mut self, evaluation: &Evaluation) -> Result<()> {
        let Some(records) = &mut self.file else { return Ok(()) };
        let path = self.output.join(METRICS_FILE);
        let text = std::fs::read(&path).map_err(|error| with_remedy(fault(&path, error)))?;
        let before = text.len().saturating_sub(1);
        let start = text[..before].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let step = Map::from_iter([("step".to_owned(), json!(self.done))]);
        let mut line: Map<String, Value> =
            serde_json::from_slice(&text[start..]).unwrap_or_else(|_| step.clone());
        add(&mut line, evaluation);
        let line = Value::Object(line);
        let written = records.replace(start as u64, format!("{line}\n").as_bytes());
        written.map_err(|error| with_remedy(fault(&path, error)))?;
        self.history.evaluations.extend(results(&line));
        let mut results = step;
        add(&mut results, evaluation);
        let Some(events) = &mut self.events else { return Ok(()) };
        events
            .add(&results.into())
            .map_err(|error| with_remedy(fault(&self.output.join("tensorboard"), error)))
    }

    /// Adds the evaluation before the first step, as line 0.
    pub fn before_first_step(&mut self, evaluation: &Evaluation) -> Result<()> {
        let mut line = Map::from_iter([("step".to_owned(), json!(0))]);
        add(&mut line, evaluation);
        self.write(&line.into()).map_err(with_remedy)
    }

    /// Adds a step. The first and the last have a line, every one at which `train.logging_steps` ends, and those that
    /// are evaluated.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let StepMetrics { step: number, report, peak_rss_bytes: peak, .. } = *step;
        self.window.add(step);
        let is_logged = number == 1
            || number == self.total_steps
            || number.is_multiple_of(self.every)
            || step.evaluation.is_some();
        match self.window.loss() {
            _ if report.loss.is_none() => {
                tracing::warn!("step {number} has no valid token: nothing was updated");
            }
            _ if !report.non_finite.is_empty() => {
                tracing::warn!("step {number} was skipped, not finite: {}", first_of(&report.non_finite));
            }
            loss => {
                let peak = step.device_memory_bytes.unwrap_or(peak) as f64 / 1e9;
                let mut told = vec![
                    format!("loss={:.4}", loss.unwrap_or(f64::NAN)),
                    format!("grad_norm={:.4}", report.grad_norm),
                    format!("lr={:.3e}", report.lr),
                    format!("tokens_per_sec={:.0}", self.window.rate()),
                    format!("time={:.3}", self.window.seconds),
                    format!("peak_mem={peak:.2}GB"),
                ];
                for (name, mean) in report.rewards.iter().flat_map(Rewards::means) {
                    if let Some(name @ ("margins" | "accuracies")) = name.strip_prefix("rewards/") {
                        told.insert(1, format!("{name}={mean:.3}"));
                    }
                }
                if let Some(progress) = &mut self.progress {
                    progress.step(number, &told, is_logged);
                }
            }
        }
        self.done = number;
        if is_logged { self.write_line().map_err(with_remedy) } else { Ok(()) }
    }

    /// Writes the line of the steps since the last one, if there are any.
    fn write_line(&mut self) -> Result<(), CheckpointError> {
        let window = std::mem::take(&mut self.window);
        let Some(line) = window.line(self.total_steps) else { return Ok(()) };
        self.history.losses.push(window.loss());
        self.history.grad_norms.push(window.loss().and(line["grad_norm"].as_f64()));
        self.write(&line)
    }

    /// Adds a line to metrics.jsonl and to TensorBoard's file.
    fn write(&mut self, line: &Value) -> Result<(), CheckpointError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        self.history.evaluations.extend(results(line));
        let path = self.output.join(METRICS_FILE);
        let mut written = file.add(format!("{line}\n").as_bytes()).map_err(|error| fault(&path, error));
        if let Some(events) = &mut self.events {
            let added = events.add(line).map_err(|error| fault(&self.output.join("tensorboard"), error));
            written = written.and(added);
        }
        match written {
            Err(error) if self.may_wait => {
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!("{error}: its lines wait in memory (train.on_save_error: continue)");
                }
                Ok(())
            }
            written => {
                self.warned &= written.is_err();
                written
            }
        }
    }

    /// Writes `training_metrics.json`.
    pub fn finish(mut self) -> Result<()> {
        self.lines().map_err(with_remedy)?;
        if self.file.is_none() {
            return Ok(());
        }
        drop(self.progress);
        let History { losses, grad_norms, evaluations } = self.history;
        let last = losses.iter().flatten().last();
        let mut summary = json!({"global_step": self.done, "total_train_steps": self.total_steps,
            "final_loss": last, "loss_history": losses, "grad_norm_history": grad_norms});
        if !evaluations.is_empty() {
            summary["evaluations"] = evaluations.into();
        }
        let path = self.output.join(SUMMARY_FILE);
        std::fs::write(&path, summary.to_string()).map_err(|error| with_remedy(fault(&path, error)))
    }
}

/// Lines of a file of metrics that a resumed run goes on behind.
#[derive(Default)]
struct Kept {
    lines: Vec<u8>,
    /// The last step among them; 0: none, or the evaluation before the first.
    last: usize,
    history: History,
    /// Lines between them that are torn or foreign.
    damaged: usize,
}

/// Reads the lines of `text` up to `step`.
fn lines_up_to(step: usize, text: &[u8]) -> Kept {
    let (mut kept, mut last, mut behind) = (Kept::default(), None, 0);
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let json = serde_json::from_slice::<Value>(line).unwrap_or_default();
        let number = json["step"].as_u64().and_then(|number| usize::try_from(number).ok());
        let is_next = |&number: &usize| Some(number) > last && number <= step && line.ends_with(b"\n");
        let Some(number) = number.filter(is_next) else {
            behind += 1;
            continue;
        };
        last = Some(number);
        kept.lines.extend(line);
        kept.damaged += std::mem::take(&mut behind);
        let history = &mut kept.history;
        history.evaluations.extend(results(&json));
        if number > 0 {
            history.losses.push(json["loss"].as_f64());
            history.grad_norms.push(json["loss"].as_f64().and(json["grad_norm"].as_f64()));
        }
    }
    kept.last = last.unwrap_or(0);
    kept
}

/// Opens `path` for writing behind its first `length` bytes; the rest is cut off.
fn open_at(path: &Path, length: usize) -> std::io::Result<Records> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    Records::after(file, length as u64)
}

/// Bytes that `ledger` has counted since it stood at `before`.
pub fn received_since(before: &Received, ledger: &Ledger) -> Received {
    let since = |(key, bytes): ((Operation, String), u64)| {
        let earlier = before.get(&key).copied().unwrap_or(0);
        (key, bytes - earlier)
    };
    ledger.totals().into_iter().map(since).filter(|(_, bytes)| *bytes > 0).collect()
}

/// VmHWM of this process; 0 if /proc does not have it.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn fault(path: &Path, error: std::io::Error) -> CheckpointError {
    CheckpointError::Io { path: path.to_owned(), error }
}

/// The error of a file with what to do.
fn with_remedy(error: CheckpointError) -> Error {
    match &error {
        CheckpointError::Io { error: cause, .. } => {
            Error::Failure(format!("{error}; {}", remedy(cause.kind())))
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_the_resumed_step_are_cut() {
        let output = tempfile::tempdir().unwrap();
        let path = output.path().join(METRICS_FILE);
        let line = |step: usize| format!("{{\"step\":{step},\"loss\":{}}}\n", step as f64 / 2.0);
        let lines = |steps: std::ops::RangeInclusive<usize>| steps.map(line).collect::<String>();
        for (text, kept, losses) in [
            (lines(1..=5), lines(1..=3), vec![0.5, 1.0, 1.5]),
            (lines(1..=3), lines(1..=3), vec![0.5, 1.0, 1.5]),
            // A torn last line, and one that a crash of the machine has emptied.
            (lines(1..=2) + "{\"step\":3,\"lo", lines(1..=2), vec![0.5, 1.0]),
            (lines(1..=2) + line(3).trim_end(), lines(1..=2), vec![0.5, 1.0]),
            (lines(1..=1) + "\0\0\n" + &line(3), line(1) + &line(3), vec![0.5, 1.5]),
            (lines(1..=2) + &line(1), lines(1..=2), vec![0.5, 1.0]),
            // The evaluation before the first step.
            (line(0) + &lines(1..=4), lines(0..=3), vec![0.5, 1.0, 1.5]),
            (line(0) + &line(0), line(0), vec![]),
            ("{\"step\":\"x\"}\n".into(), String::new(), vec![]),
            (String::new(), String::new(), vec![]),
        ] {
            std::fs::write(&path, &text).unwrap();
            let metrics = Metrics::open(output.path(), 9, Some(3), &logging(1)).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), kept, "{text}");
            assert_eq!(
                metrics.history.losses.iter().flatten().copied().collect::<Vec<_>>(),
                losses,
                "{text}"
            );
        }
        Metrics::open(output.path(), 9, None, &logging(1)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        let aside = output.path().join("metrics.jsonl.damaged");
        assert_eq!(std::fs::read_to_string(aside).unwrap(), line(1) + "\0\0\n" + &line(3));
    }

    #[test]
    fn metrics_go_to_a_regular_file_alone() {
        let output = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/zero", output.path().join(METRICS_FILE)).unwrap();
        for resumed in [None, Some(3)] {
            let error = Metrics::open(output.path(), 9, resumed, &logging(1)).err().unwrap();
            assert!(error.to_string().contains("metrics.jsonl: no regular file"), "{error}");
        }
    }

    fn logging(every: usize) -> Logging {
        Logging { format: LogFormat::Structured, every, tensorboard: None, may_wait: false }
    }

    fn report(loss: Option<f64>) -> StepReport {
        StepReport {
            loss,
            grad_norm: 0.0,
            lr: 0.1,
            valid_tokens: 3,
            total_tokens: 4,
            padding_tokens: 1,
            router: None,
            rewards: None,
            non_finite: Vec::new(),
        }
    }

    fn evaluation(loss: f64) -> Evaluation {
        Evaluation { loss, tokens: 3, rewards: None, seconds: 1.0 }
    }

    fn step(step: usize, report: &StepReport) -> StepMetrics<'_> {
        StepMetrics {
            step,
            epoch: 0,
            report,
            seconds: 0.5,
            phases: BTreeMap::from([("forward", 0.25)]),
            peak_rss_bytes: step as u64,
            device_memory_bytes: None,
            received: Received::from([((Operation::AllGather, "shard".to_owned()), 10)]),
            evaluation: None,
        }
    }

    fn lines(output: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(output.join(METRICS_FILE)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_resumed_run_goes_on_in_the_same_file() {
        let output = tempfile::tempdir().unwrap();
        let report = report(None);
        let write = |resumed: Option<usize>, steps: std::ops::RangeInclusive<usize>| {
            let mut metrics = Metrics::open(output.path(), 4, resumed, &logging(1)).unwrap();
            assert!(!output.path().join(SUMMARY_FILE).exists(), "the summary of an earlier run");
            for number in steps {
                if number == 1 {
                    metrics.before_first_step(&evaluation(2.0)).unwrap();
                }
                let evaluation = (number % 2 == 0).then(|| evaluation(1.0));
                metrics.step(&StepMetrics { evaluation, ..step(number, &report) }).unwrap();
            }
            metrics.finish().unwrap();
        };
        write(None, 1..=3);
        write(Some(2), 3..=4);
        let lines = lines(output.path());
        let told = |line: &Value| (line["step"].as_u64().unwrap(), line["eval_loss"].as_f64());
        let expected = [(0, Some(2.0)), (1, None), (2, Some(1.0)), (3, None), (4, Some(1.0))];
        assert_eq!(lines.iter().map(told).collect::<Vec<_>>(), expected);
        assert_eq!(lines[2]["eval_perplexity"], 1f64.exp());
        let summary = std::fs::read_to_string(output.path().join(SUMMARY_FILE)).unwrap();
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!(summary["global_step"], 4);
        let evaluated = summary["evaluations"].as_array().unwrap();
        assert_eq!(evaluated.iter().map(told).collect::<Vec<_>>(), [expected[0], expected[2], expected[4]]);
        for history in ["loss_history", "grad_norm_history"] {
            assert_eq!(summary[history].as_array().unwrap().len(), 4, "{history}");
        }
    }

    #[test]
    fn a_line_has_the_mean_loss_and_the_sums_of_its_steps() {
        let output = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(output.path(), 11, None, &logging(4)).unwrap();
        for number in 1..=11 {
            let loss = (number != 3).then_some(number as f64);
            metrics.step(&step(number, &report(loss))).unwrap();
            if number == 6 {
                // A step is published.
                metrics.sync().unwrap();
            }
        }
        metrics.finish().unwrap();
        let lines = lines(output.path());
        let of = |key: &str| lines.iter().map(|line| line[key].clone()).collect::<Vec<_>>();
        assert_eq!(of("step"), [1, 4, 6, 8, 11]);
        assert_eq!(of("steps"), [Value::Null, json!(3), json!(2), json!(2), json!(3)]);
        assert_eq!(of("loss"), [1.0, 3.0, 5.5, 7.5, 10.0]);
        assert_eq!(of("tokens"), [3, 9, 6, 6, 9]);
        assert_eq!(of("step_seconds"), [0.5, 1.5, 1.0, 1.0, 1.5]);
        assert_eq!(of("tokens_per_second"), [6.0; 5]);
        assert_eq!(of("peak_rss_bytes"), [1, 4, 6, 8, 11]);
        assert_eq!(lines[1]["phase_seconds"]["forward"], 0.75);
        assert_eq!(lines[1]["comm_bytes"]["all_gather/shard"], 30);
    }
}
