//! What a run tells: `metrics.jsonl` (a line a step), a line a step on stdout, `training_metrics.json` at the end.
//! Rank 0 writes; the other ranks hold a [`Metrics`] that does nothing.

use super::StepReport;
use crate::{
    comm::{Ledger, Operation},
    error::{Error, Result},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

/// A line a step.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The run in one object, written at its end.
pub const SUMMARY_FILE: &str = "training_metrics.json";

/// What one step has to tell.
pub struct StepMetrics<'a> {
    /// Counted from 1.
    pub step: usize,
    pub epoch: usize,
    pub report: &'a StepReport,
    /// From the end of the data of this step to the end of its update.
    pub seconds: f64,
    /// The largest of all ranks.
    pub peak_rss_bytes: u64,
    /// What this rank's collectives have received in the step.
    pub received: Received,
}

/// Bytes by operation and group.
pub type Received = BTreeMap<(Operation, String), u64>;

/// Rank 0's files in output_dir and its lines on stdout; nothing on other ranks.
pub struct Metrics {
    output: PathBuf,
    file: Option<File>,
    total_steps: usize,
    losses: Vec<Option<f64>>,
}

impl Metrics {
    /// For a rank that does not write.
    pub fn silent() -> Self {
        Self { output: PathBuf::new(), file: None, total_steps: 0, losses: Vec::new() }
    }

    /// Begins `metrics.jsonl` in `output` for a run of `total_steps`.
    pub fn open(output: &Path, total_steps: usize) -> Result<Self> {
        let path = output.join(METRICS_FILE);
        let file = File::create(&path).map_err(|error| fault(&path, &error))?;
        Ok(Self { output: output.to_owned(), file: Some(file), total_steps, losses: Vec::new() })
    }

    /// Adds a step.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let StepMetrics { step: number, epoch, report, seconds, peak_rss_bytes: peak, .. } = *step;
        let mut comm = serde_json::Map::new();
        for ((operation, group), bytes) in &step.received {
            comm.insert(format!("{}/{group}", operation.name()), (*bytes).into());
        }
        let rate = report.total_tokens as f64 / seconds;
        let line = json!({
            "step": number, "epoch": epoch, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr,
            "tokens": report.valid_tokens, "tokens_total": report.total_tokens, "tokens_per_second": rate,
            "step_seconds": seconds, "peak_rss_bytes": peak, "comm_bytes": comm,
        });
        // One write, so that a kill leaves whole lines.
        file.write_all(format!("{line}\n").as_bytes())
            .map_err(|error| fault(&self.output.join(METRICS_FILE), &error))?;
        match report.loss {
            None => tracing::warn!("step {number} has no valid token: nothing was updated"),
            Some(_) if !report.non_finite.is_empty() => {
                tracing::warn!("step {number} was skipped, not finite: {}", report.non_finite.join(", "));
            }
            Some(loss) => println!(
                "[STEP {number}/{}] loss={loss:.4} grad_norm={:.4} lr={:.3e} tokens_per_sec={rate:.0} time={seconds:.3} \
                 peak_mem={:.2}GB",
                self.total_steps,
                report.grad_norm,
                report.lr,
                peak as f64 / 1e9
            ),
        }
        self.losses.push(report.loss);
        Ok(())
    }

    /// Writes `training_metrics.json`.
    pub fn finish(self) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let last = self.losses.iter().flatten().last();
        let summary = json!({"global_step": self.losses.len(), "total_train_steps": self.total_steps,
            "final_loss": last, "loss_history": self.losses});
        let path = self.output.join(SUMMARY_FILE);
        std::fs::write(&path, summary.to_string()).map_err(|error| fault(&path, &error))
    }
}

/// What `ledger` has received since it stood at `before`.
pub fn received_since(before: &Received, ledger: &Ledger) -> Received {
    let since = |(key, bytes): ((Operation, String), u64)| {
        let earlier = before.get(&key).copied().unwrap_or(0);
        (key, bytes - earlier)
    };
    ledger.totals().into_iter().map(since).filter(|(_, bytes)| *bytes > 0).collect()
}

/// VmHWM of this process; 0 where /proc does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn fault(path: &Path, error: &std::io::Error) -> Error {
    Error::Failure(format!("{}: {error}", path.display()))
}
