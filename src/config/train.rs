//! Section `train`.

use super::compute::ComputeArgs;
use super::error::{Issue, Issues, Problem};
use super::loss::Param;
use super::optimizer::{Optimizer, OptimizerArgs};
use super::section::section;
use super::source::Node;
use super::value::{Description, Rule, Value, choices, quote};
use std::{collections::BTreeMap, path::PathBuf};

choices! {
    /// Fall of the learning rate after warm-up.
    pub enum LrDecayStyle {
        Constant = "constant",
        Linear = "linear",
        Cosine = "cosine",
    }

    /// Result of an evaluation that says which step is best: the lowest.
    pub enum MetricForBest {
        /// Mean loss of a validation token.
        EvalLoss = "eval_loss",
        /// Its exponential.
        EvalPerplexity = "eval_perplexity",
    }

    /// The course of a run after a step that could not be saved.
    pub enum OnSaveError {
        /// It ends with the error.
        Stop = "stop",
        /// It goes on, and the next save tries again.
        Continue = "continue",
    }

    /// Display of steps.
    pub enum LogFormat {
        /// A bar on a terminal, elsewhere a line every 10 s.
        ProgressBar = "progress_bar",
        /// One `key=value` line for every line of metrics.jsonl.
        Structured = "structured",
    }
}

/// `train.load_checkpoint_path`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(from = "String", into = "String")]
pub enum LoadCheckpoint {
    /// The newest whole step of this run_id; starts afresh where there is none.
    Auto,
    /// This step directory.
    Path(PathBuf),
}

impl From<String> for LoadCheckpoint {
    fn from(text: String) -> Self {
        if text == "auto" { Self::Auto } else { Self::Path(text.into()) }
    }
}

impl From<LoadCheckpoint> for String {
    fn from(value: LoadCheckpoint) -> Self {
        match value {
            LoadCheckpoint::Auto => "auto".into(),
            LoadCheckpoint::Path(path) => path.display().to_string(),
        }
    }
}

impl Value for LoadCheckpoint {
    fn describe(_: Rule) -> Description {
        Description { short: "path | auto".into(), phrase: "the path of a step directory or auto".into() }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let text = node.text().filter(|text| !text.is_empty() && !node.is_null());
        text.map(|text| Self::from(text.to_owned()))
            .ok_or_else(|| vec![Issue::expected(Self::describe(rule).phrase, node.shown())])
    }

    fn write(&self) -> String {
        quote(&String::from(self.clone()))
    }
}

section! {
    /// Section `train`: the run, its schedule, its mesh and its checkpoints.
    pub struct TrainArgs {
        /// Folder of everything that the run leaves behind; shared by all ranks.
        output_dir: PathBuf = "outputs".into();
        /// Names the run's checkpoints, `{output_dir}/weights/{run_id}/step_{N}`. A resume from a step keeps its run_id
        /// unless one is given.
        run_id: String = "run".into() => DirectoryName;
        /// Remove the steps that this run_id has already: all of them, or on a resume those after the resumed one.
        /// Everything is validated first.
        overwrite: bool = false;
        /// Seed of the adapter's initial values and of the data order.
        seed: u64 = 42;
        /// Rows that a rank computes at a time.
        micro_batch_size: usize = 1 => Size;
        /// Micro-batches per step and rank.
        gradient_accumulation_steps: usize = 1 => Size;
        /// Rows per step over all ranks. null: micro_batch_size × gradient_accumulation_steps × data-parallel
        /// size, or on a resume that of the step.
        global_batch_size: Option<usize> = None => OneOrMore;
        /// Passes over the data.
        num_train_epochs: usize = 1 => OneOrMore;
        /// Make this many steps, whatever `num_train_epochs` says: fewer than its epochs have, or more, over which the
        /// data repeats. Also the length of the schedule. null: `num_train_epochs` decides.
        max_steps: Option<usize> = None => OneOrMore;
        /// Loss of the rows: `cross_entropy`, `importance_sampling`, `ppo`, `cispo`, `dro`, `gspo`, `policy_loss` or
        /// `drgrpo`. Rows of type tokenized give its inputs beside `input_ids`. `dpo` and `simpo` read rows of type
        /// preference; dpo compares with the base, or with the adapter of `lora.adapter_path` on it.
        loss_fn: String = "cross_entropy".into();
        /// Parameters of the loss by name; of dpo `beta` (0.1), `loss_type` (sigmoid, sigmoid_norm, hinge, ipo or
        /// robust), `label_smoothing` and `reference_free`, of simpo `beta`, `simpo_gamma` (0.5) and `label_smoothing`.
        /// null: none.
        loss_fn_params: BTreeMap<String, Param> = BTreeMap::new();
        /// `adamw` (decoupled decay, fp32 moments), `anyprecision_adamw` (moments in `optimizer_dtype`), `sgd`,
        /// `signsgd` (steps along the sign of the gradient) or `muon` (orthogonal steps of every A and B).
        optimizer: Optimizer = Optimizer::Adamw;
        /// adamw and anyprecision_adamw: decay of the first moment. A resume with another one is refused.
        adam_beta1: f64 = 0.9 => BelowOne;
        /// adamw and anyprecision_adamw: decay of the second moment. A resume with another one is refused.
        adam_beta2: f64 = 0.95 => BelowOne;
        /// adamw and anyprecision_adamw: added to the root of the second moment.
        adam_epsilon: f64 = 1e-8 => Positive;
        ..rule: OptimizerArgs;
        /// Peak learning rate; of muon `muon_lr` is, and `lr_min` and `lr_start` keep their ratio to it.
        lr: f64 = 5e-5 => Positive;
        /// Learning rate at the end of the decay.
        lr_min: f64 = 1e-7 => NonNegative;
        /// Learning rate at the start of the warm-up.
        lr_start: f64 = 0.0 => NonNegative;
        /// Share of all steps that warms up from `lr_start` to `lr`.
        lr_warmup_ratio: f64 = 0.0 => Ratio;
        /// Steps that warm up, in place of `lr_warmup_ratio`. null: the ratio decides.
        lr_warmup_steps: Option<usize> = None;
        /// Fall of the learning rate from `lr` to `lr_min`.
        lr_decay_style: LrDecayStyle = LrDecayStyle::Constant;
        /// Share of all steps after which the decay has reached `lr_min`.
        lr_decay_ratio: f64 = 1.0 => Ratio;
        /// Decoupled weight decay of the adapter.
        weight_decay: f64 = 0.0 => NonNegative;
        /// After this many steps in a row whose gradient is not finite the run ends, with exit code 1. Such steps
        /// change nothing. A run of no other steps publishes no adapter.
        max_skipped_steps: usize = 20 => OneOrMore;
        /// Global gradient norm is clipped to this. 0 or less: no clipping; the norm is reported all the same.
        max_grad_norm: f64 = 1.0;
        ..compute: ComputeArgs;
        /// Save every this many steps. 0: not by steps. The last step is always saved.
        save_steps: usize = 0;
        /// Save every this many epochs. 0: not by epochs.
        save_epochs: usize = 1;
        /// Published steps that are kept; older ones are deleted, but never the one resumed from or the best. null:
        /// all.
        save_total_limit: Option<usize> = Some(3) => OneOrMore;
        /// Write saves while training goes on: a save stops it for the copy to host memory alone, and the next save
        /// waits for the one before. An error shows at the end of a later step. The last save is waited for. A base
        /// that merges have changed is written before training goes on. false: each save is waited for.
        save_async: bool = true;
        /// When a step cannot be saved, as on a full disk: `stop` ends the run with the error; `continue` warns, goes
        /// on and tries again at the next save, and the run ends with exit code 1 if its last save failed.
        on_save_error: OnSaveError = OnSaveError::Stop;
        /// Seconds that a run may take to finish its step after a signal asked it to stop. Where the micro-batches that
        /// are left would take longer, the step is dropped and the state before it saved.
        stop_grace_s: usize = 30;
        /// Evaluate on `data.val_set_size` or `data.test_datasets` every this many steps, and after the last. null or
        /// 0: after each epoch.
        eval_steps: Option<usize> = None;
        /// Evaluate before the first step too: row 0 of metrics.jsonl. It counts neither for the best step nor for
        /// `early_stopping_patience`.
        eval_on_start: bool = false;
        /// Result of evaluations by which a step is best (`eval_loss` or `eval_perplexity`, the lowest). The best step
        /// is saved, kept beyond `save_total_limit`, and named by `weights/{run_id}/best`. null: none is.
        metric_for_best: Option<MetricForBest> = Some(MetricForBest::EvalLoss);
        /// End after this many evaluations in a row that were not better than the best. null: make all steps.
        early_stopping_patience: Option<usize> = None => OneOrMore;
        /// Step directory to resume from, or `auto`: the newest whole one of this run_id, if any. null: start
        /// anew, which is refused where this run_id has steps.
        load_checkpoint_path: Option<LoadCheckpoint> = None;
        /// A bar where stderr is a terminal (elsewhere a line at the first and last step and every 10 s), or one
        /// structured line for every line of metrics.jsonl.
        log_format: LogFormat = LogFormat::ProgressBar;
        /// Write a line of metrics.jsonl every this many steps; the first, the last and saved steps have one always. As
        /// in transformers, its loss is the mean of its steps, learning rate and norm those of the last; tokens, bytes
        /// and seconds are sums, and `steps` says of how many steps.
        logging_steps: usize = 1 => OneOrMore;
        /// Write the lines of metrics.jsonl as scalars for TensorBoard, too: `{output_dir}/tensorboard/{run_id}`.
        use_tensorboard: bool = false;
        /// Trace this many steps, after two that warm up, into `{output_dir}/trace/{run_id}/rank_{N}.json`
        /// (chrome://tracing, Perfetto) with a table of times beside it. An earlier trace of this run_id is removed.
        /// 0: none.
        profile_steps: usize = 0;
        /// Seconds for which a rank may be silent, or keep others waiting in a collective, before all ranks end with a
        /// line that names it. Loading, data and saving have no limit.
        comm_timeout_s: usize = 600 => OneOrMore;
        /// Must stay false: metrics go to metrics.jsonl.
        use_wandb: bool = false;
    }
}

impl TrainArgs {
    /// The first field that is about evaluations and was given a meaning.
    pub(super) fn evaluates(&self) -> Option<&'static [&'static str]> {
        let asked: [(bool, &'static [&'static str]); 3] = [
            (self.eval_steps.is_some_and(|steps| steps > 0), &["train.eval_steps"]),
            (self.eval_on_start, &["train.eval_on_start"]),
            (self.early_stopping_patience.is_some(), &["train.early_stopping_patience"]),
        ];
        asked.into_iter().find(|(is_asked, _)| *is_asked).map(|(_, field)| field)
    }
}

/// The problem of an ε that AdamW cannot compute with.
pub(super) fn epsilon_problem(epsilon: f64) -> Option<Problem> {
    let words = || format!("{epsilon:?} is 0 in fp32, in which AdamW computes");
    (epsilon as f32 == 0.0).then(|| Problem::Conflict(words()))
}
