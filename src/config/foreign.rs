//! Names of fields in axolotl, LLaMA-Factory, torchtune, TRL, transformers and PEFT: their fields here, or the reason
//! why there is none. A user who knows one of these trainers writes its names first.

use super::error::Problem;

/// The meaning of a foreign name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Means {
    /// A field, followed by a form that its value takes, if another one.
    Is(&'static str, &'static str),
    /// Not built; the words say what to do instead.
    Not(&'static str),
    /// Without use here; the words say why.
    Needless(&'static str),
}

use Means::{Is, Needless, Not};

const EVAL_STEPS: &str = " (a number of steps; 0: after each epoch)";
const VALIDATES: &str = "data.val_set_size or data.test_datasets name what is evaluated on";
const NO_QUANTIZED: &str = "lora.enable_qlora quantizes the base, in the format that lora.quant_format names";
const KERNELS: &str = "kernels are chosen by the device";
const SHARDED: &str =
    "the base is always sharded over all ranks; train.data_parallel_shard_size says over how many";
const LOGGED: &str = "it is in metrics.jsonl of train.output_dir";
const TRACKERS: &str = "metrics are in metrics.jsonl of train.output_dir, and TensorBoard's files with \
                        train.use_tensorboard; trackers such as W&B are not fed";
const TENSORBOARD: &str =
    " (true), for tensorboard; other trackers are not fed, and metrics.jsonl is always written";
const PLAIN_LORA: &str = "only plain LoRA is trained";
const ONE_RATE: &str =
    "all layers have one learning rate, train.lr; that of B is train.loraplus_lr_ratio times it";
const FROZEN: &str = "all but the adapter is frozen";
const TOKENIZER: &str =
    "tokenizer, special tokens and chat template are those of model.tokenizer_path, as they are";
const NO_UPLOAD: &str = "nothing is uploaded; hf upload takes a step's folder";
const TOKEN: &str = "the environment's HF_TOKEN is the hub's token";
const FOUND: &str = "it is read from the model's config.json";
const STAGE: &str = "the command says what is done: train, check or generate";
const PEFT_ONLY: &str = "the step's adapter_config.json has it";
const CACHE: &str = "all cores of a host prepare the rows; data.dataset_prepared_path keeps them";
const NO_SEQUENCE: &str =
    "a sequence is not divided over ranks; shorten it by data.sample_packing_sequence_len";
const SAVED: &str = "a save always has the adapter and the training state";
const SEEDED: &str = "train.seed seeds everything";
const DECAY: &str = "train.lr_decay_style, lr_min and lr_decay_ratio shape the decay";
const MIXED: &str = "train.enable_mixed_precision: true computes in bf16, false in fp32";
const OTHER_LOSS: &str = "train.loss_fn names the loss: cross-entropy, one of policies or one of pairs";

/// Names anywhere in a file but within `data.datasets`, in lower case.
const FOREIGN: &[(&str, Means)] = &[
    // The model.
    ("base_model", Is("model.model_path", "")),
    ("base_model_name_or_path", Is("model.model_path", "")),
    ("model_name_or_path", Is("model.model_path", "")),
    ("model_name", Is("model.model_path", "")),
    ("model_id", Is("model.model_path", "")),
    ("pretrained_model_name_or_path", Is("model.model_path", "")),
    ("checkpoint_dir", Is("model.model_path", "")),
    ("base_model_config", Is("model.config_path", "")),
    ("config_name", Is("model.config_path", "")),
    ("tokenizer_config", Is("model.tokenizer_path", "")),
    ("tokenizer_name", Is("model.tokenizer_path", "")),
    ("tokenizer_name_or_path", Is("model.tokenizer_path", "")),
    ("tokenizer", Is("model.tokenizer_path", "")),
    ("processing_class", Is("model.tokenizer_path", "")),
    ("tokenizer_type", Needless(TOKENIZER)),
    ("tokenizer_use_fast", Needless(TOKENIZER)),
    ("use_fast_tokenizer", Needless(TOKENIZER)),
    ("resize_vocab", Not(FROZEN)),
    ("special_tokens", Not(TOKENIZER)),
    ("eos_token", Not(TOKENIZER)),
    ("pad_token", Not(TOKENIZER)),
    ("template", Not(TOKENIZER)),
    ("chat_template", Not(TOKENIZER)),
    ("chat_template_path", Not(TOKENIZER)),
    ("chat_template_jinja", Not(TOKENIZER)),
    ("default_system_message", Not("the chat template writes its own; put a system message into the rows")),
    ("default_system", Not("the chat template writes its own; put a system message into the rows")),
    ("model_type", Needless(FOUND)),
    ("is_llama_derived_model", Needless(FOUND)),
    ("rope_scaling", Needless(FOUND)),
    ("rope_theta", Needless(FOUND)),
    ("model_revision", Is("model.revision", "")),
    ("trust_remote_code", Needless("no code of a model is run")),
    ("hub_model_id", Not(NO_UPLOAD)),
    ("hub_strategy", Not(NO_UPLOAD)),
    ("hub_token", Needless(TOKEN)),
    ("hf_hub_token", Needless(TOKEN)),
    ("push_to_hub", Not(NO_UPLOAD)),
    ("torch_dtype", Is("train.enable_mixed_precision", " (true computes in bf16, false in fp32)")),
    ("dtype", Is("train.enable_mixed_precision", " (true computes in bf16, false in fp32)")),
    ("bf16", Is("train.enable_mixed_precision", "")),
    ("bfloat16", Is("train.enable_mixed_precision", "")),
    ("mixed_precision", Is("train.enable_mixed_precision", "")),
    ("pure_bf16", Not(MIXED)),
    ("fp16", Not(MIXED)),
    ("float16", Not(MIXED)),
    ("tf32", Needless(MIXED)),
    ("bf16_full_eval", Needless("evaluations compute in the dtype of training")),
    ("load_in_4bit", Is("lora.enable_qlora", " (with quant_format: nf4)")),
    ("load_in_8bit", Is("lora.enable_qlora", " (with quant_format: block_fp8)")),
    ("quantization_bit", Not(NO_QUANTIZED)),
    ("quantization_method", Is("lora.quant_format", "")),
    ("quantization_config", Not(NO_QUANTIZED)),
    ("bnb_4bit_compute_dtype", Not(NO_QUANTIZED)),
    ("bnb_4bit_quant_type", Is("lora.quant_format", "")),
    ("bnb_4bit_use_double_quant", Not(NO_QUANTIZED)),
    ("gptq", Not(NO_QUANTIZED)),
    ("quantizer", Not(NO_QUANTIZED)),
    ("flash_attention", Needless(KERNELS)),
    ("flash_attn", Needless(KERNELS)),
    ("flash_attn_cross_entropy", Needless(KERNELS)),
    ("use_flash_attention_2", Needless(KERNELS)),
    ("sdp_attention", Needless(KERNELS)),
    ("xformers_attention", Needless(KERNELS)),
    ("flex_attention", Needless(KERNELS)),
    ("enable_liger_kernel", Needless(KERNELS)),
    ("use_liger_kernel", Needless(KERNELS)),
    ("liger_kernel_config", Needless(KERNELS)),
    ("use_unsloth", Needless(KERNELS)),
    ("use_unsloth_gc", Needless(KERNELS)),
    ("torch_compile", Needless(KERNELS)),
    ("torch_compile_backend", Needless(KERNELS)),
    ("compile", Needless(KERNELS)),
    // Data.
    ("dataset", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("dataset_name", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("dataset_path", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("train_file", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("train_dataset", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("dataset_dir", Is("data.datasets", ", a list of {path: …, type: …}")),
    ("pretraining_dataset", Is("data.datasets", ", with type: text")),
    ("dataset_text_field", Is("data.datasets", ": columns of a data set, {text: NAME}")),
    ("dataset_kwargs", Not("data.datasets has path and type of each data set")),
    ("streaming", Needless("rows are prepared on disk, so that data of any size fit")),
    ("mix_strategy", Not("data sets are put together and shuffled; weight of an entry repeats its samples")),
    (
        "interleave_probs",
        Not("data sets are put together and shuffled; weight of an entry repeats its samples"),
    ),
    ("max_samples", Is("data.datasets", ": num_samples of a data set")),
    ("overwrite_cache", Needless("data.dataset_prepared_path notices changed inputs")),
    ("preprocessing_num_workers", Needless(CACHE)),
    ("dataset_processes", Needless(CACHE)),
    ("dataloader_persistent_workers", Needless(CACHE)),
    ("sequence_len", Is("data.sample_packing_sequence_len", "")),
    ("cutoff_len", Is("data.sample_packing_sequence_len", "")),
    ("max_seq_length", Is("data.sample_packing_sequence_len", "")),
    ("max_length", Is("data.sample_packing_sequence_len", "")),
    ("model_max_length", Is("data.sample_packing_sequence_len", "")),
    ("block_size", Is("data.sample_packing_sequence_len", "")),
    ("sample_packing", Is("data.sample_packing_method", ": sequential, multipack or none")),
    ("sample_packing_bin_size", Needless("data.sample_packing_method: multipack looks at all samples")),
    ("packing", Is("data.sample_packing_method", ": sequential, multipack or none")),
    ("packed", Is("data.sample_packing_method", ": sequential, multipack or none")),
    ("neat_packing", Is("data.sample_packing_method", "; packed documents never attend to each other")),
    ("padding_free", Is("data.sample_packing_method", "; packed documents never attend to each other")),
    ("packing_strategy", Is("data.sample_packing_method", ": sequential, multipack or none")),
    ("eval_packing", Needless("validation is packed as data.sample_packing_method says")),
    ("pad_to_sequence_len", Is("data.pad_to_multiple_of", " (a number of tokens, or null)")),
    ("group_by_length", Is("data.sample_packing_method", "; packs need no grouping by length")),
    ("curriculum_sampling", Is("data.shuffle_merged_datasets", ": false keeps the order of the file")),
    ("disable_shuffling", Is("data.shuffle_merged_datasets", " (false)")),
    ("shuffle", Is("data.shuffle_merged_datasets", "")),
    ("train_on_prompt", Is("data.train_on_inputs", "")),
    ("mask_history", Is("data.turns", ": last")),
    ("assistant_only_loss", Is("data.train_on_inputs", " (false, the default, is assistant_only_loss)")),
    ("completion_only_loss", Is("data.train_on_inputs", " (false, the default, is completion_only_loss)")),
    ("roles_to_train", Not("loss is on the assistant's turns, or with data.train_on_inputs on all")),
    ("train_on_eos", Needless("the end of each turn is trained as the chat template writes it")),
    ("val_size", Is("data.val_set_size", "")),
    ("test_size", Is("data.val_set_size", "")),
    ("eval_dataset", Is("data.test_datasets", ", a list of {path: …, type: …}")),
    ("eval_strategy", Is("train.eval_steps", EVAL_STEPS)),
    ("evaluation_strategy", Is("train.eval_steps", EVAL_STEPS)),
    ("evals_per_epoch", Is("train.eval_steps", EVAL_STEPS)),
    ("do_eval", Needless(VALIDATES)),
    ("do_predict", Not("the command eval tells loss, perplexity and exact match of an adapter")),
    ("eval_batch_size", Is("train.micro_batch_size", ", of evaluations too")),
    ("per_device_eval_batch_size", Is("train.micro_batch_size", ", of evaluations too")),
    ("load_best_model_at_end", Is("train.metric_for_best", "; weights/{run_id}/best names the best step")),
    ("metric_for_best_model", Is("train.metric_for_best", ": eval_loss or eval_perplexity")),
    ("predict_with_generate", Not("the command eval --exact-match compares greedy answers")),
    // The run.
    ("do_train", Needless(STAGE)),
    ("stage", Needless(STAGE)),
    ("rl", Is("train.loss_fn", " (dpo or simpo)")),
    ("loss", Not(OTHER_LOSS)),
    ("loss_type", Is("train.loss_fn_params", ", {loss_type: …} of dpo")),
    ("label_smoothing_factor", Not(OTHER_LOSS)),
    ("pref_beta", Is("train.loss_fn_params", ", {beta: …} of dpo and simpo")),
    ("beta", Is("train.loss_fn_params", ", {beta: …} of dpo and simpo")),
    ("rl_beta", Is("train.loss_fn_params", ", {beta: …} of dpo and simpo")),
    ("simpo_gamma", Is("train.loss_fn_params", ", {simpo_gamma: …}")),
    ("pref_loss", Is("train.loss_fn", " (dpo or simpo)")),
    ("neftune_noise_alpha", Not("no noise is added to embeddings")),
    ("overwrite_output_dir", Is("train.overwrite", "")),
    ("run_name", Is("train.run_id", "")),
    ("data_seed", Needless(SEEDED)),
    ("full_determinism", Needless("runs are deterministic")),
    ("device", Not("the flag --device of the command line says it")),
    ("use_cpu", Not("the flag --device cpu of the command line says it")),
    ("no_cuda", Not("the flag --device cpu of the command line says it")),
    ("local_rank", Needless("ranks are the launcher's: launch/mpirun.sh, mpirun or srun")),
    ("batch_size", Is("train.micro_batch_size", "; train.global_batch_size is that of all ranks")),
    ("per_device_train_batch_size", Is("train.micro_batch_size", "")),
    ("train_batch_size", Is("train.global_batch_size", " (rows in a step over all ranks)")),
    ("auto_find_batch_size", Not("the check command says the memory of a micro_batch_size")),
    ("accumulate_grad_batches", Is("train.gradient_accumulation_steps", "")),
    ("epochs", Is("train.num_train_epochs", "")),
    ("num_epochs", Is("train.num_train_epochs", "")),
    ("max_epochs", Is("train.num_train_epochs", "")),
    ("max_steps_per_epoch", Is("train.max_steps", " (of the whole run)")),
    ("learning_rate", Is("train.lr", "")),
    ("optim", Is("train.optimizer", ": adamw, anyprecision_adamw, sgd, signsgd or muon")),
    ("optim_args", Is("train.adam_beta1", ", adam_beta2, adam_epsilon and weight_decay")),
    ("optim_target_modules", Not("only the adapter is trained; lora.lora_target_modules names its places")),
    ("adamw_8bit", Is("train.optimizer", ": anyprecision_adamw keeps moments in bf16")),
    ("betas", Is("train.adam_beta1", " and train.adam_beta2")),
    ("eps", Is("train.adam_epsilon", "")),
    ("fused", Needless("AdamW is fused")),
    ("optimizer_in_bwd", Needless("gradients are of the adapter alone, which is small")),
    ("momentum", Is("train.muon_momentum", "; sgd has no momentum")),
    ("loraplus_lr_embedding", Not(ONE_RATE)),
    ("embedding_lr", Not(ONE_RATE)),
    ("lr_groups", Not(ONE_RATE)),
    ("lr_scheduler", Is("train.lr_decay_style", ": constant, linear or cosine")),
    ("lr_scheduler_type", Is("train.lr_decay_style", ": constant, linear or cosine")),
    ("scheduler", Is("train.lr_decay_style", ": constant, linear or cosine")),
    ("lr_scheduler_kwargs", Not(DECAY)),
    ("cosine_min_lr_ratio", Is("train.lr_min", " (a learning rate, not a ratio)")),
    ("min_lr", Is("train.lr_min", "")),
    ("min_lr_rate", Is("train.lr_min", " (a learning rate, not a ratio)")),
    ("cosine_constant_lr_ratio", Is("train.lr_decay_ratio", "")),
    ("warmup_steps", Is("train.lr_warmup_steps", "")),
    ("num_warmup_steps", Is("train.lr_warmup_steps", "")),
    ("warmup_ratio", Is("train.lr_warmup_ratio", "")),
    ("clip_grad_norm", Is("train.max_grad_norm", "")),
    ("gradient_clipping", Is("train.max_grad_norm", "")),
    ("gradient_checkpointing", Is("train.enable_gradient_checkpointing", "")),
    ("enable_activation_checkpointing", Is("train.enable_gradient_checkpointing", "")),
    ("disable_gradient_checkpointing", Is("train.enable_gradient_checkpointing", " (the opposite)")),
    ("gradient_checkpointing_kwargs", Is("train.gradient_checkpointing_method", "")),
    ("enable_activation_offloading", Not("activations are recomputed, not offloaded")),
    ("activation_offloading", Not("activations are recomputed, not offloaded")),
    ("deepspeed", Needless(SHARDED)),
    ("fsdp", Needless(SHARDED)),
    ("fsdp_config", Needless(SHARDED)),
    ("fsdp_transformer_layer_cls_to_wrap", Needless(SHARDED)),
    ("fsdp_version", Needless(SHARDED)),
    ("fsdp_cpu_offload", Not(SHARDED)),
    ("dp_shard_size", Is("train.data_parallel_shard_size", "")),
    ("data_parallel_shard_dim", Is("train.data_parallel_shard_size", "")),
    ("dp_replicate_size", Is("train.data_parallel_replicate_size", "")),
    ("data_parallel_replicate_dim", Is("train.data_parallel_replicate_size", "")),
    ("tensor_parallel_dim", Not(SHARDED)),
    ("tp_size", Not(SHARDED)),
    ("custom_sharded_layers", Needless(SHARDED)),
    ("sequence_parallel_degree", Not(NO_SEQUENCE)),
    ("context_parallel_size", Not(NO_SEQUENCE)),
    ("context_parallel_dim", Not(NO_SEQUENCE)),
    ("sequence_parallel_size", Not(NO_SEQUENCE)),
    ("ddp_timeout", Is("train.comm_timeout_s", "")),
    ("ddp_backend", Needless("the device says it: MPI on CPUs, NCCL on GPUs")),
    ("ddp_find_unused_parameters", Needless(SHARDED)),
    ("resume_from_checkpoint", Is("train.load_checkpoint_path", " (a step directory, or auto)")),
    ("auto_resume_from_checkpoints", Is("train.load_checkpoint_path", " (auto)")),
    ("resume", Is("train.load_checkpoint_path", " (a step directory, or auto)")),
    ("save_strategy", Is("train.save_steps", " or train.save_epochs")),
    ("saves_per_epoch", Is("train.save_steps", " or train.save_epochs")),
    ("save_every_n_steps", Is("train.save_steps", "")),
    ("save_every_n_epochs", Is("train.save_epochs", "")),
    ("keep_last_n_checkpoints", Is("train.save_total_limit", "")),
    ("save_safetensors", Needless("adapters are always safetensors")),
    ("save_only_model", Not(SAVED)),
    ("enable_async_checkpointing", Is("train.save_async", "")),
    ("checkpointer", Is("model.model_path", " and train.output_dir")),
    ("save_adapter_weights_only", Is("lora.save_lora_only", "")),
    ("merge_lora", Not("an adapter is saved beside the base; xorl-dist merge makes one model of them")),
    ("logging_strategy", Is("train.logging_steps", "")),
    ("logging_first_step", Needless("the first step is always logged")),
    ("logging_dir", Needless("metrics and TensorBoard's files are in train.output_dir")),
    ("log_every_n_steps", Is("train.logging_steps", "")),
    ("log_peak_memory_stats", Needless(LOGGED)),
    ("log_level", Needless("the environment's RUST_LOG says it")),
    ("include_tokens_per_second", Needless(LOGGED)),
    ("include_num_input_tokens_seen", Needless(LOGGED)),
    ("plot_loss", Needless(LOGGED)),
    ("disable_tqdm", Is("train.log_format", ": structured")),
    ("report_to", Is("train.use_tensorboard", TENSORBOARD)),
    ("metric_logger", Is("train.use_tensorboard", TENSORBOARD)),
    ("wandb_entity", Not(TRACKERS)),
    ("wandb_mode", Not(TRACKERS)),
    ("wandb_run_id", Not(TRACKERS)),
    ("wandb_log_model", Not(TRACKERS)),
    ("mlflow_experiment_name", Not(TRACKERS)),
    ("comet_project_name", Not(TRACKERS)),
    ("profiler", Is("train.profile_steps", " (steps to trace)")),
    ("debug", Not("the flag --debug of the command line says it")),
    ("strict", Needless("unknown fields are always refused")),
    ("remove_unused_columns", Needless("fields of a row that are not read do no harm")),
    ("average_tokens_across_devices", Needless("the loss is a mean over the tokens of all ranks")),
    // The adapter.
    ("adapter", Needless("LoRA is trained; lora.lora_rank is its rank")),
    ("finetuning_type", Needless("LoRA is trained; lora.lora_rank is its rank")),
    ("use_peft", Needless("LoRA is trained; lora.lora_rank is its rank")),
    ("peft_type", Needless(PEFT_ONLY)),
    ("task_type", Needless(PEFT_ONLY)),
    ("lora_task_type", Needless(PEFT_ONLY)),
    ("inference_mode", Needless(PEFT_ONLY)),
    ("auto_mapping", Needless(PEFT_ONLY)),
    ("peft_version", Needless(PEFT_ONLY)),
    ("r", Is("lora.lora_rank", "")),
    ("lora_r", Is("lora.lora_rank", "")),
    ("rank", Is("lora.lora_rank", "")),
    ("alpha", Is("lora.lora_alpha", "")),
    ("target_modules", Is("lora.lora_target_modules", "")),
    ("lora_target", Is("lora.lora_target_modules", "")),
    ("lora_attn_modules", Is("lora.lora_target_modules", "")),
    ("lora_target_linear", Is("lora.lora_target_modules", " (all-linear)")),
    ("apply_lora_to_mlp", Is("lora.lora_target_modules", ", which names the MLP's projections too")),
    ("apply_lora_to_output", Not("the head is not adapted")),
    ("target_parameters", Is("lora.lora_target_modules", " (\"*.experts.down_proj\" names routed experts)")),
    ("layers_to_transform", Is("lora.lora_target_modules", " (\"layers.[0-7].*.q_proj\" names layers)")),
    ("peft_layers_to_transform", Is("lora.lora_target_modules", " (\"layers.[0-7].*.q_proj\" names layers)")),
    ("layers_pattern", Is("lora.lora_target_modules", " (\"layers.[0-7].*.q_proj\" names layers)")),
    ("peft_dropout", Is("lora.lora_dropout", "")),
    ("peft_use_rslora", Is("lora.use_rslora", "")),
    ("peft_use_dora", Is("lora.use_dora", "")),
    ("use_qalora", Not(PLAIN_LORA)),
    ("qalora_group_size", Not(PLAIN_LORA)),
    ("use_bdlora", Not(PLAIN_LORA)),
    ("alora_invocation_tokens", Not(PLAIN_LORA)),
    ("arrow_config", Not(PLAIN_LORA)),
    ("velora_config", Not(PLAIN_LORA)),
    ("kasa_config", Not(PLAIN_LORA)),
    ("monteclora_config", Not(PLAIN_LORA)),
    ("pissa_init", Is("lora.init_lora_weights", " (pissa)")),
    ("bias", Not("biases are frozen, as with bias: none")),
    ("lora_bias", Not("adapters have no bias")),
    ("fan_in_fan_out", Needless("linear layers are stored as HF stores them")),
    ("lora_fan_in_fan_out", Needless("linear layers are stored as HF stores them")),
    ("peft_init_lora_weights", Is("lora.init_lora_weights", " (default is init_lora_weights: true)")),
    ("loftq_config", Not(PLAIN_LORA)),
    ("eva_config", Not(PLAIN_LORA)),
    ("corda_config", Not(PLAIN_LORA)),
    ("lora_ga_config", Not(PLAIN_LORA)),
    ("megatron_config", Not(PLAIN_LORA)),
    ("megatron_core", Not(PLAIN_LORA)),
    ("layer_replication", Not(PLAIN_LORA)),
    ("modules_to_save", Not(FROZEN)),
    ("lora_modules_to_save", Not(FROZEN)),
    ("additional_target", Not(FROZEN)),
    ("trainable_token_indices", Not(FROZEN)),
    ("ensure_weight_tying", Needless(FROZEN)),
    ("runtime_config", Needless(PEFT_ONLY)),
    ("lora_model_dir", Is("lora.adapter_path", "")),
    ("adapter_name_or_path", Is("lora.adapter_path", "")),
    (
        "create_new_adapter",
        Needless("lora.adapter_path goes on with an adapter; without it a new one is made"),
    ),
    ("relora_steps", Is("lora.merge_lora_interval", "")),
    ("unfrozen_parameters", Not(FROZEN)),
];

const TEMPLATED: &str = "the model's own chat template renders the messages";
/// Names within an entry of `data.datasets`.
const FOREIGN_OF_DATASETS: &[(&str, Means)] = &[
    ("data_path", Is("path", "")),
    ("source", Is("path", "")),
    ("file", Is("path", "")),
    ("file_name", Is("path", "")),
    ("dataset", Is("path", "")),
    ("formatting", Is("type", ": chat, alpaca, completion, text or tokenized")),
    ("format", Is("type", ": chat, alpaca, completion, text or tokenized")),
    ("conversation", Needless(TEMPLATED)),
    ("conversation_style", Needless(TEMPLATED)),
    ("chat_template", Needless(TEMPLATED)),
    ("chat_template_jinja", Not(TEMPLATED)),
    ("tags", Is("message_property_mappings", " and roles")),
    ("conversation_column", Is("columns", ": {messages: NAME}")),
    ("column_map", Is("columns", "")),
    ("text_column", Is("columns", ": {text: NAME}")),
    ("message_field_role", Is("message_property_mappings", ": {role: NAME}")),
    ("message_field_content", Is("message_property_mappings", ": {content: NAME}")),
    ("sampling_ratio", Is("weight", "")),
    ("roles_to_train", Not("loss is on the assistant's turns, or with data.train_on_inputs on all")),
    ("train_on_eos", Needless("the end of each turn is trained as the chat template writes it")),
    ("train_on_input", Is("data.train_on_inputs", ", for all data sets")),
    ("train_on_inputs", Is("data.train_on_inputs", ", for all data sets")),
    ("packed", Is("data.sample_packing_method", ", for all data sets")),
    ("max_samples", Is("num_samples", "")),
];

/// A foreign name, spelt as it stands in its list.
fn plain(name: &str) -> String {
    name.trim_start_matches('-').to_ascii_lowercase().replace('-', "_")
}

/// The hint for the field `name`, and the field that it belongs to.
pub(super) fn field(name: &str) -> Option<(Problem, Option<&'static str>)> {
    hint(FOREIGN, &plain(name))
}

/// The hint for the field `name` of an entry of `data.datasets`.
pub(super) fn dataset_field(name: &str) -> Option<Problem> {
    hint(FOREIGN_OF_DATASETS, &plain(name)).map(|(problem, _)| problem)
}

/// All foreign names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FOREIGN.iter().map(|(name, _)| *name)
}

fn hint(known: &[(&str, Means)], name: &str) -> Option<(Problem, Option<&'static str>)> {
    let (_, means) = known.iter().find(|(known, _)| *known == name)?;
    let (hint, field) = match means {
        Is(field, form) => (format!("{name} is {field} here{form}"), Some(*field)),
        Not(instead) => (format!("{name} is not built: {instead}"), None),
        Needless(reason) => (format!("{name} is not needed: {reason}"), None),
    };
    Some((Problem::Foreign { hint }, field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{data::DatasetArgs, schema, section::Section};
    use std::collections::BTreeSet;

    #[test]
    fn every_field_that_is_named_exists_and_no_foreign_name_is_ours() {
        let ours: BTreeSet<String> =
            schema().into_iter().map(|(section, field)| format!("{section}.{}", field.key)).collect();
        let keys: BTreeSet<&str> = ours.iter().filter_map(|name| name.split('.').nth(1)).collect();
        let mut seen = BTreeSet::new();
        for (name, means) in FOREIGN {
            assert!(seen.insert(*name), "{name} is listed twice");
            assert!(!keys.contains(name), "{name} is a field of ours");
            assert_eq!(plain(name), *name);
            if let Is(field, _) = means {
                assert!(ours.contains(*field), "{name} is {field}?");
            }
        }
        let of_datasets: Vec<_> = DatasetArgs::default().fields().iter().map(|field| field.key).collect();
        for (name, means) in FOREIGN_OF_DATASETS {
            assert!(!of_datasets.contains(name), "{name} is a field of ours");
            if let Is(field, _) = means {
                assert!(of_datasets.contains(field) || ours.contains(*field), "{name} is {field}?");
            }
        }
        assert!(FOREIGN.len() >= 60, "{}", FOREIGN.len());
    }
}
