//! Typed `run.yaml`: sections `model`, `data`, `train`, `lora` with xorl's names, defaults and validation.

use std::path::PathBuf;

/// A complete, resolved run configuration.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct RunConfig {
    pub model: ModelArgs,
    pub data: DataArgs,
    pub train: TrainArgs,
    pub lora: LoraArgs,
}

/// Section `model`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ModelArgs {
    /// HF model directory (config.json, safetensors). null: random weights, `config_path` is then needed.
    pub model_path: Option<PathBuf>,
    /// HF config directory or config.json, when it is not in `model_path`.
    pub config_path: Option<PathBuf>,
    /// Directory with tokenizer.json and the chat template; null: `model_path`, then `config_path`.
    pub tokenizer_path: Option<PathBuf>,
    /// Compute q, k, v (and gate, up) as one GEMM. Results and adapter keys are the same either way.
    pub merge_qkv: bool,
}

/// How samples become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackingMethod {
    None,
    Sequential,
    Multipack,
}

/// What a data file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetType {
    Tokenized,
    Chat,
}

/// One entry of `data.datasets`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DatasetArgs {
    /// A .jsonl file, a folder of them, or `dummy` (random token ids).
    pub path: PathBuf,
    /// `tokenized` (input_ids, labels) or `chat` (messages).
    #[serde(rename = "type")]
    pub kind: DatasetType,
    /// `dummy` only: number of samples.
    pub num_samples: Option<usize>,
}

/// Section `data`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct DataArgs {
    pub datasets: Vec<DatasetArgs>,
    /// Samples longer than this are dropped with a warning (tokens). null: no limit besides the packing length.
    pub max_seq_len: Option<usize>,
    pub sample_packing_method: PackingMethod,
    /// Tokens per pack.
    pub sample_packing_sequence_len: usize,
    /// Pads packs to a multiple of this; not with `none`. null: no padding.
    pub pad_to_multiple_of: Option<usize>,
    pub shuffle_merged_datasets: bool,
    pub shuffle_before_merging_datasets: bool,
    /// Folder for tokenised and packed data, reused when the inputs did not change.
    pub dataset_prepared_path: Option<PathBuf>,
    /// Drop the last, smaller step of an epoch.
    pub dataloader_drop_last: bool,
    /// chat: loss on every token, not on assistant turns only.
    pub train_on_inputs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrDecayStyle {
    Constant,
    Linear,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    Adamw,
    Sgd,
}

/// When adapter gradients are reduced over the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceGradients {
    /// Once, after the last micro-batch: full fp32 gradients are kept until then.
    Step,
    /// After every unit's backward: only the shard is kept.
    MicroBatch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointingMethod {
    RecomputeFullLayer,
    NoRecompute,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    ProgressBar,
    Structured,
}

/// `load_checkpoint_path`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(from = "String", into = "String")]
pub enum LoadCheckpoint {
    Auto,
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

/// Section `train`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct TrainArgs {
    pub output_dir: PathBuf,
    pub run_id: String,
    /// Allow a run directory that already holds steps to be written again.
    pub overwrite: bool,
    pub seed: u64,
    pub micro_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    /// Rows per step over all ranks. null: micro_batch_size × gradient_accumulation_steps × data-parallel size.
    pub global_batch_size: Option<usize>,
    pub num_train_epochs: usize,
    pub max_steps: Option<usize>,
    pub optimizer: Optimizer,
    pub lr: f64,
    pub lr_min: f64,
    pub lr_start: f64,
    pub lr_warmup_ratio: f64,
    pub lr_decay_style: LrDecayStyle,
    pub lr_decay_ratio: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub data_parallel_replicate_size: i64,
    pub data_parallel_shard_size: i64,
    pub ulysses_parallel_size: usize,
    pub expert_parallel_size: usize,
    pub enable_mixed_precision: bool,
    pub enable_gradient_checkpointing: bool,
    pub gradient_checkpointing_method: CheckpointingMethod,
    pub reshard_after_forward: bool,
    /// Layers that are whole on a rank at a time.
    pub ring_slots: usize,
    pub reduce_gradients: ReduceGradients,
    /// Rows of the embedding and the head gathered at a time. null: as many as 512 MiB hold.
    pub vocab_chunk_rows: Option<usize>,
    /// Tokens per logits chunk.
    pub loss_chunk_tokens: usize,
    pub save_steps: usize,
    pub save_epochs: usize,
    pub save_total_limit: Option<usize>,
    pub load_checkpoint_path: Option<LoadCheckpoint>,
    pub log_format: LogFormat,
    pub use_wandb: bool,
}

/// Section `lora`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct LoraArgs {
    pub enable_lora: bool,
    pub lora_rank: usize,
    pub lora_alpha: f64,
    /// Leaf names, globs over dotted paths, or `all-linear`. null: the family's default.
    pub lora_target_modules: Option<Vec<String>>,
    pub lora_b_init_std: f64,
    pub unfuse_for_lora: bool,
    pub save_lora_only: bool,
    /// A PEFT adapter directory to start from, with a fresh optimizer.
    pub adapter_path: Option<PathBuf>,
}

impl Default for ModelArgs {
    fn default() -> Self {
        Self { model_path: None, config_path: None, tokenizer_path: None, merge_qkv: true }
    }
}

impl Default for DataArgs {
    fn default() -> Self {
        Self {
            datasets: Vec::new(),
            max_seq_len: None,
            sample_packing_method: PackingMethod::Sequential,
            sample_packing_sequence_len: 32000,
            pad_to_multiple_of: Some(128),
            shuffle_merged_datasets: true,
            shuffle_before_merging_datasets: true,
            dataset_prepared_path: None,
            dataloader_drop_last: false,
            train_on_inputs: false,
        }
    }
}

impl Default for TrainArgs {
    fn default() -> Self {
        Self {
            output_dir: "outputs".into(),
            run_id: "run".into(),
            overwrite: false,
            seed: 42,
            micro_batch_size: 1,
            gradient_accumulation_steps: 1,
            global_batch_size: None,
            num_train_epochs: 1,
            max_steps: None,
            optimizer: Optimizer::Adamw,
            lr: 5e-5,
            lr_min: 1e-7,
            lr_start: 0.0,
            lr_warmup_ratio: 0.0,
            lr_decay_style: LrDecayStyle::Constant,
            lr_decay_ratio: 1.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            data_parallel_replicate_size: -1,
            data_parallel_shard_size: -1,
            ulysses_parallel_size: 1,
            expert_parallel_size: 1,
            enable_mixed_precision: true,
            enable_gradient_checkpointing: true,
            gradient_checkpointing_method: CheckpointingMethod::RecomputeFullLayer,
            reshard_after_forward: true,
            ring_slots: 2,
            reduce_gradients: ReduceGradients::Step,
            vocab_chunk_rows: None,
            loss_chunk_tokens: 1024,
            save_steps: 0,
            save_epochs: 1,
            save_total_limit: None,
            load_checkpoint_path: None,
            log_format: LogFormat::ProgressBar,
            use_wandb: false,
        }
    }
}

impl Default for LoraArgs {
    fn default() -> Self {
        Self {
            enable_lora: true,
            lora_rank: 16,
            lora_alpha: 32.0,
            lora_target_modules: None,
            lora_b_init_std: 0.0,
            unfuse_for_lora: false,
            save_lora_only: true,
            adapter_path: None,
        }
    }
}
