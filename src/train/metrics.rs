//! Metrics of a run: `metrics.jsonl` (a line a step, with the evaluation after it if there was one; row 0 is an
//! evaluation before the first step), progress on a terminal or in lines, and `training_metrics.json` at the end.
//! Rank 0 writes; the other ranks hold a [`Metrics`] that does nothing.

use super::{Evaluation, StepReport, progress::Progress};
use crate::{
    comm::{Ledger, Operation, Received},
    config::LogFormat,
    console::first_of,
    error::{Error, Result},
    loss::Rewards,
    model::router_load::RouterReport,
};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// The file with a line a step.
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
    /// The evaluation after the step, whose time and bytes are none of the step's.
    pub evaluation: Option<Evaluation>,
}

/// Rank 0's files in output_dir and its lines on stdout; nothing on other ranks.
pub struct Metrics {
    output: PathBuf,
    file: Option<File>,
    total_steps: usize,
    progress: Option<Progress>,
    /// Steps made.
    done: usize,
    history: History,
}

/// Values by step; `None` for a step without one.
#[derive(Debug, Default, PartialEq)]
struct History {
    losses: Vec<Option<f64>>,
    grad_norms: Vec<Option<f64>>,
    /// Steps that were evaluated, 0 before the first, with the keys of their rows.
    evaluations: Vec<Value>,
}

/// Keys of an evaluation in the row of its step.
const EVALUATION: [&str; 3] = ["eval_loss", "eval_perplexity", "eval_tokens"];

/// Adds `evaluation` to the `row` of its step.
fn add(row: &mut Map<String, Value>, evaluation: &Evaluation) {
    let Evaluation { loss, tokens, rewards, seconds } = *evaluation;
    let values = [json!(loss), json!(evaluation.perplexity()), json!(tokens)];
    row.extend(EVALUATION.map(str::to_owned).into_iter().zip(values));
    row.insert("eval_seconds".into(), json!(seconds));
    for (name, mean) in rewards.iter().flat_map(Rewards::means) {
        row.insert(format!("eval_{name}"), json!(mean));
    }
}

/// The step and the results of an evaluated `row`, for the summary.
fn results(row: &Value) -> Option<Value> {
    let results = EVALUATION.map(|key| (key.to_owned(), row[key].clone())).into_iter();
    let all = [("step".to_owned(), row["step"].clone())].into_iter().chain(results);
    row.get("eval_tokens").map(|_| all.collect::<Map<_, _>>().into())
}

impl Metrics {
    /// The metrics of a rank that does not write.
    pub fn silent() -> Self {
        Self {
            output: PathBuf::new(),
            file: None,
            total_steps: 0,
            progress: None,
            done: 0,
            history: History::default(),
        }
    }

    /// Begins `metrics.jsonl` in `output` for a run of `total_steps`. A resumed run appends behind the line of step
    /// `resumed`; later lines are cut off.
    pub fn open(
        output: &Path,
        total_steps: usize,
        resumed: Option<usize>,
        format: LogFormat,
    ) -> Result<Self> {
        let path = output.join(METRICS_FILE);
        let (file, history) = match resumed {
            None => (File::create(&path), History::default()),
            Some(step) => {
                let text = std::fs::read(&path).unwrap_or_default();
                let (length, last, history) = lines_up_to(step, &text);
                if last != step {
                    tracing::warn!("{}: knows steps up to {last}, the run resumes at {step}", path.display());
                }
                (open_at(&path, length), history)
            }
        };
        let file = file.map_err(|error| fault(&path, &error))?;
        let (output, done) = (output.to_owned(), resumed.unwrap_or(0));
        let progress = Some(Progress::new(total_steps, done, format));
        Ok(Self { output, file: Some(file), total_steps, progress, done, history })
    }

    /// Brings all lines to the disk, so that they are there before a step is published.
    pub fn sync(&self) -> Result<()> {
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_data);
        synced.map_err(|error| fault(&self.output.join(METRICS_FILE), &error))
    }

    /// Adds the evaluation before the first step, as row 0.
    pub fn before_first_step(&mut self, evaluation: &Evaluation) -> Result<()> {
        let mut row = Map::from_iter([("step".to_owned(), json!(0))]);
        add(&mut row, evaluation);
        self.write(row.into())
    }

    /// Writes a row, with what the summary needs of its evaluation.
    fn write(&mut self, row: Value) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        // A kill leaves whole lines, as each is one write.
        file.write_all(format!("{row}\n").as_bytes())
            .map_err(|error| fault(&self.output.join(METRICS_FILE), &error))?;
        self.history.evaluations.extend(results(&row));
        Ok(())
    }

    /// Adds a step.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let StepMetrics { step: number, epoch, report, seconds, peak_rss_bytes: peak, .. } = *step;
        let mut comm = Map::new();
        for ((operation, group), bytes) in &step.received {
            comm.insert(format!("{}/{group}", operation.name()), (*bytes).into());
        }
        // Padding is computed too, and teaches nothing.
        let rate = (report.total_tokens - report.padding_tokens) as f64 / seconds;
        let mut line = json!({
            "step": number, "epoch": epoch, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr,
            "tokens": report.valid_tokens, "tokens_total": report.total_tokens,
            "tokens_padding": report.padding_tokens, "tokens_per_second": rate,
            "step_seconds": seconds, "phase_seconds": step.phases, "peak_rss_bytes": peak, "comm_bytes": comm,
        });
        if let Some(bytes) = step.device_memory_bytes {
            line["device_memory_bytes"] = bytes.into();
        }
        if let Some(RouterReport { max_over_mean, entropy, aux_loss }) = report.router {
            line["router"] =
                json!({"max_over_mean": max_over_mean, "entropy": entropy, "aux_loss": aux_loss});
        }
        for (name, mean) in report.rewards.iter().flat_map(Rewards::means) {
            line[name] = mean.into();
        }
        if let (Some(evaluation), Some(row)) = (&step.evaluation, line.as_object_mut()) {
            add(row, evaluation);
        }
        self.write(line)?;
        match report.loss {
            None => tracing::warn!("step {number} has no valid token: nothing was updated"),
            Some(_) if !report.non_finite.is_empty() => {
                tracing::warn!("step {number} was skipped, not finite: {}", first_of(&report.non_finite));
            }
            Some(loss) => {
                let peak = step.device_memory_bytes.unwrap_or(peak) as f64 / 1e9;
                let mut told = vec![
                    format!("loss={loss:.4}"),
                    format!("grad_norm={:.4}", report.grad_norm),
                    format!("lr={:.3e}", report.lr),
                    format!("tokens_per_sec={rate:.0}"),
                    format!("time={seconds:.3}"),
                    format!("peak_mem={peak:.2}GB"),
                ];
                for (name, mean) in report.rewards.iter().flat_map(Rewards::means) {
                    if let Some(name @ ("margins" | "accuracies")) = name.strip_prefix("rewards/") {
                        told.insert(1, format!("{name}={mean:.3}"));
                    }
                }
                if let Some(progress) = &mut self.progress {
                    progress.step(number, &told);
                }
            }
        }
        self.done = number;
        self.history.losses.push(report.loss);
        self.history.grad_norms.push(report.loss.map(|_| report.grad_norm));
        Ok(())
    }

    /// Writes `training_metrics.json`.
    pub fn finish(self) -> Result<()> {
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
        std::fs::write(&path, summary.to_string()).map_err(|error| fault(&path, &error))
    }
}

/// Reads the lines of `text` up to `step`: their length in bytes, the last step among them (0: none, or the evaluation
/// before the first), and their history. A torn or foreign line ends them.
fn lines_up_to(step: usize, text: &[u8]) -> (usize, usize, History) {
    let (mut length, mut last, mut history) = (0, None, History::default());
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let Ok(json) = serde_json::from_slice::<Value>(line) else { break };
        let number = json["step"].as_u64().and_then(|number| usize::try_from(number).ok());
        let is_next = |&number: &usize| Some(number) > last && number <= step && line.ends_with(b"\n");
        let Some(number) = number.filter(is_next) else { break };
        last = Some(number);
        length += line.len();
        history.evaluations.extend(results(&json));
        if number > 0 {
            history.losses.push(json["loss"].as_f64());
            history.grad_norms.push(json["loss"].as_f64().and(json["grad_norm"].as_f64()));
        }
    }
    (length, last.unwrap_or(0), history)
}

/// Opens `path` for writing behind its first `length` bytes; the rest is cut off.
fn open_at(path: &Path, length: usize) -> std::io::Result<File> {
    let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.set_len(length as u64)?;
    file.seek(SeekFrom::End(0))?;
    Ok(file)
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

fn fault(path: &Path, error: &std::io::Error) -> Error {
    Error::Failure(format!("{}: {error}", path.display()))
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
            (lines(1..=1) + "\0\0\n" + &line(3), lines(1..=1), vec![0.5]),
            (lines(1..=2) + &line(1), lines(1..=2), vec![0.5, 1.0]),
            // The evaluation before the first step.
            (line(0) + &lines(1..=4), lines(0..=3), vec![0.5, 1.0, 1.5]),
            (line(0) + &line(0), line(0), vec![]),
            ("{\"step\":\"x\"}\n".into(), String::new(), vec![]),
            (String::new(), String::new(), vec![]),
        ] {
            std::fs::write(&path, &text).unwrap();
            let metrics = Metrics::open(output.path(), 9, Some(3), LogFormat::Structured).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), kept, "{text}");
            assert_eq!(
                metrics.history.losses.iter().flatten().copied().collect::<Vec<_>>(),
                losses,
                "{text}"
            );
        }
        Metrics::open(output.path(), 9, None, LogFormat::Structured).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_resumed_run_goes_on_in_the_same_file() {
        let output = tempfile::tempdir().unwrap();
        let report = StepReport {
            loss: None,
            grad_norm: 0.0,
            lr: 0.1,
            valid_tokens: 0,
            total_tokens: 4,
            padding_tokens: 0,
            router: None,
            rewards: None,
            non_finite: Vec::new(),
        };
        let write = |resumed: Option<usize>, steps: std::ops::RangeInclusive<usize>| {
            let mut metrics = Metrics::open(output.path(), 4, resumed, LogFormat::Structured).unwrap();
            for step in steps {
                let received = Received::new();
                let report = &report;
                let (seconds, phases) = (1.0, BTreeMap::new());
                let evaluation =
                    (step % 2 == 0).then_some(Evaluation { loss: 1.0, tokens: 3, rewards: None, seconds });
                if step == 1 {
                    metrics
                        .before_first_step(&Evaluation { loss: 2.0, tokens: 3, rewards: None, seconds })
                        .unwrap();
                }
                metrics
                    .step(&StepMetrics {
                        step,
                        epoch: 0,
                        report,
                        seconds,
                        phases,
                        peak_rss_bytes: 0,
                        device_memory_bytes: None,
                        received,
                        evaluation,
                    })
                    .unwrap();
            }
            metrics.finish().unwrap();
        };
        write(None, 1..=3);
        write(Some(2), 3..=4);
        let text = std::fs::read_to_string(output.path().join(METRICS_FILE)).unwrap();
        let steps = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let rows: Vec<Value> = steps.collect();
        let told = |row: &Value| (row["step"].as_u64().unwrap(), row["eval_loss"].as_f64());
        let expected = [(0, Some(2.0)), (1, None), (2, Some(1.0)), (3, None), (4, Some(1.0))];
        assert_eq!(rows.iter().map(told).collect::<Vec<_>>(), expected);
        assert_eq!(rows[2]["eval_perplexity"], 1f64.exp());
        let summary = std::fs::read_to_string(output.path().join(SUMMARY_FILE)).unwrap();
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!(summary["global_step"], 4);
        let evaluated = summary["evaluations"].as_array().unwrap();
        assert_eq!(evaluated.iter().map(told).collect::<Vec<_>>(), [expected[0], expected[2], expected[4]]);
        for history in ["loss_history", "grad_norm_history"] {
            assert_eq!(summary[history].as_array().unwrap().len(), 4, "{history}");
        }
    }
}
