//! Fields that only xorl has. Some are accepted with a warning, as they only hint at performance or have one meaning
//! here. Others are refused, as they would change the result or the mesh.

use super::error::Problem;
use super::source::{Kind, Node};
use super::value::truth;

/// xorl's other fields of a kind of file.
#[derive(Clone, Copy)]
pub(super) struct Compat {
    pub accepted: &'static [Accepted],
    pub refused: &'static [Refused],
    pub unbuilt: &'static [Unbuilt],
    /// Fields of `run.yaml` that are judged here as they are there.
    pub as_in_run: &'static [&'static str],
}

/// A field that changes nothing here. It is ignored with a warning, except for the values that would change
/// the result.
pub(super) struct Accepted {
    pub field: &'static str,
    pub except: &'static [&'static str],
    pub reason: &'static str,
}

/// A field that would change the result or the mesh and is not built. Its neutral values are accepted silently.
pub(super) struct Refused {
    pub field: &'static str,
    pub neutral: &'static [&'static str],
    pub reason: &'static str,
}

/// A value of xorl's for a field of this program that is not built.
pub(super) struct Unbuilt {
    pub field: &'static str,
    pub value: &'static str,
    pub reason: &'static str,
}

pub(super) const fn hint(field: &'static str, reason: &'static str) -> Accepted {
    Accepted { field, except: &[], reason }
}

pub(super) const fn refused(
    field: &'static str,
    neutral: &'static [&'static str],
    reason: &'static str,
) -> Refused {
    Refused { field, neutral, reason }
}

pub(super) const KERNELS: &str = "kernels are chosen by the device";
const LOADER: &str = "one loader thread per rank feeds the step";
const ALWAYS_SHARDED: &str =
    "the base is always fully sharded; data_parallel_shard_size sets over how many ranks";
const SAVING: &str = "a save is published atomically and in lora.lora_export_format";
const METRICS: &str = "metrics go to metrics.jsonl in output_dir";
const PROFILING: &str = "profile_steps traces steps, and every step's phase times are in metrics.jsonl";
pub(super) const NO_PIPELINE: &str = "there are no pipeline stages";
const NO_DISTILLATION: &str = "only distillation reads it, which is not built";
pub(super) const MEMORY: &str =
    "it affects memory and time only; see gradient_checkpointing_method and ring_slots";
const PYTHON: &str = "it tunes the Python runtime, which is not used";
pub(super) const TOPOLOGY: &str = "only data parallelism (replicate × shard) is built";
const TEXT_ONLY: &str = "only text models are built";
const LOCAL_DATA: &str = "files are read as they are, and no code of a data set is run";
const ONE_DECAY: &str = "weight decay applies to the whole adapter";

/// xorl's other fields of `run.yaml`.
pub(super) const RUN: Compat =
    Compat { accepted: ACCEPTED_WITH_WARNING, refused: REFUSED, unbuilt: UNBUILT_VALUES, as_in_run: &[] };

/// Fields that are ignored with a warning.
const ACCEPTED_WITH_WARNING: &[Accepted] = &[
    hint("model.attn_implementation", KERNELS),
    hint("model.moe_implementation", KERNELS),
    hint("model.rmsnorm_mode", KERNELS),
    hint("model.ep_dispatch", "tokens travel to experts by all-to-all"),
    hint("model.deepep_buffer_size_gb", KERNELS),
    hint("model.deepep_num_sms", KERNELS),
    hint("model.deepep_async_combine", KERNELS),
    hint("model.basic_modules", "every layer is a unit of sharding"),
    hint("model.freeze_router", "everything but the adapter is frozen, the router too"),
    hint("data.dataloader_num_workers", LOADER),
    hint("data.dataloader_prefetch_factor", LOADER),
    hint("data.dataloader_pin_memory", LOADER),
    hint("data.dataset_num_proc", LOADER),
    hint("data.sample_packing_group_size", "packs are formed over the whole data set"),
    hint("data.sample_packing_mp_start_method", LOADER),
    hint("data.num_dataset_shards_to_save", "the prepared data is one file"),
    hint("data.is_preprocess", "data is prepared at the start of the run"),
    hint("data.eval_sample_packing", "validation is packed as sample_packing_method says"),
    hint("train.enable_reentrant", MEMORY),
    hint("train.recompute_modules", MEMORY),
    hint("train.moe_checkpoint_method", MEMORY),
    hint("train.enable_activation_offload", MEMORY),
    hint("train.activation_gpu_limit", MEMORY),
    hint("train.enable_full_shard", ALWAYS_SHARDED),
    hint("train.data_parallel_mode", ALWAYS_SHARDED),
    hint("train.cp_fsdp_mode", ALWAYS_SHARDED),
    hint("train.enable_forward_prefetch", "ring_slots above 1 prefetch"),
    hint("train.init_device", "weights go straight into their shard"),
    Accepted {
        field: "train.load_weights_mode",
        except: &["skip"],
        reason: "each rank reads the bytes of its own shards",
    },
    hint("train.moe_grad_reduce_mode", "adapter gradients are reduce-scattered"),
    hint("train.enable_full_determinism", "runs are deterministic"),
    hint("train.allow_cuda_launch_blocking", PYTHON),
    hint("train.empty_cache_steps", PYTHON),
    hint("train.gc_steps", PYTHON),
    hint("train.enable_compile", "nothing is compiled at run time"),
    hint("train.pipeline_parallel_schedule", NO_PIPELINE),
    hint("train.pp_variable_seq_lengths", NO_PIPELINE),
    hint("train.ckpt_manager", SAVING),
    hint("train.save_hf_weights", SAVING),
    hint("train.wandb_project", METRICS),
    hint("train.wandb_name", METRICS),
    hint("train.wandb_tags", METRICS),
    hint("train.wandb_log_interval", METRICS),
    hint("train.repo_commit", METRICS),
    hint("train.enable_profiling", PROFILING),
    hint("train.profile_start_step", PROFILING),
    hint("train.profile_end_step", PROFILING),
    hint("train.profile_trace_dir", PROFILING),
    hint("train.profile_record_shapes", PROFILING),
    hint("train.profile_profile_memory", PROFILING),
    hint("train.profile_with_stack", PROFILING),
    hint("train.profile_rank0_only", PROFILING),
    hint("distill.teacher_model_path", NO_DISTILLATION),
    hint("distill.distillation_loss_type", NO_DISTILLATION),
    hint("distill.distillation_loss_weight", NO_DISTILLATION),
    hint("distill.stream_num_workers", NO_DISTILLATION),
];

/// Fields that are refused by name unless neutral.
const REFUSED: &[Refused] = &[
    refused("model.train_router", &["false"], "the router is part of the frozen base"),
    refused("model.foundation", &["{}", "null"], TEXT_ONLY),
    refused("model.encoders", &["{}", "null"], TEXT_ONLY),
    refused("data.push_dataset_to_hub", &["null"], "nothing is uploaded to the hub"),
    refused("data.hf_use_auth_token", &["null", "false"], "the environment has the hub's token, HF_TOKEN"),
    refused("data.skip_prepare_dataset", &["false", "null"], "dataset_prepared_path reuses prepared data"),
    refused("data.dataset_shard_num", &["null"], LOCAL_DATA),
    refused("data.dataset_shard_idx", &["null"], LOCAL_DATA),
    refused("data.sample_packing_sequentially", &["null"], "sample_packing_method: sequential says it"),
    refused("data.select_columns", &["null"], LOCAL_DATA),
    refused("train.tensor_parallel_size", &["1"], TOPOLOGY),
    refused("train.pipeline_parallel_size", &["1"], TOPOLOGY),
    refused("train.ringattn_parallel_size", &["1"], TOPOLOGY),
    refused("train.ep_outside", &["false"], "experts are divided over ranks that share a copy of the base"),
    refused("train.fsdp_reduce_dtype", &["fp32", "float32"], "adapter gradients are reduced in fp32"),
    refused("train.no_decay_modules", &["[]", "null"], ONE_DECAY),
    refused("train.no_decay_params", &["[]", "null"], ONE_DECAY),
    refused(
        "train.load_optimizer",
        &["true"],
        "a resume restores everything; lora.adapter_path starts from an adapter with a fresh optimizer",
    ),
    refused("lora.lora_target_manifest", &["null"], "name the targets in lora_target_modules"),
    refused("lora.lora_b_init_seed", &["0"], "B is drawn from train.seed"),
    refused("distill.enable_distillation", &["false"], "distillation is not built"),
    refused("data.datasets.revision", &["null"], "write it behind the id: path: owner/name@revision"),
    refused("data.datasets.trust_remote_code", &["null", "false"], LOCAL_DATA),
    refused("data.datasets.data_files", &["null"], "path names a file, a folder or a glob"),
    refused(
        "data.datasets.ds_type",
        &["null", "json", "jsonl", "parquet", "arrow", "csv", "text"],
        "a file's format is seen from its first bytes",
    ),
    refused("data.datasets.shards", &["null"], LOCAL_DATA),
    refused("data.datasets.shards_idx", &["null"], LOCAL_DATA),
    refused("data.datasets.preprocess_shards", &["null"], LOCAL_DATA),
    refused("data.datasets.max_seq_len", &["null"], "data.max_seq_len limits all data sets"),
    refused("data.datasets.activations_path", &["null"], "distillation is not built"),
];

pub(super) const NO_RECOMPUTE_BEFORE: &str = "not built; use recompute_full_layer, selective or no_recompute";
pub(super) const NO_SIGNED_REDUCTION: &str =
    "signs that each rank gives would make the result depend on the number of ranks; use signsgd";
/// Values of xorl's for fields of this program that are not built.
const UNBUILT_VALUES: &[Unbuilt] = &[
    Unbuilt { field: "train.optimizer", value: "distsignsgd", reason: NO_SIGNED_REDUCTION },
    Unbuilt {
        field: "lora.lora_export_format",
        value: "dsv4_expert_banks",
        reason: "not built; use peft, per_expert or sglang_shared_outer",
    },
    Unbuilt {
        field: "train.gradient_checkpointing_method",
        value: "recompute_before_dispatch",
        reason: NO_RECOMPUTE_BEFORE,
    },
    Unbuilt {
        field: "data.datasets.type",
        value: "json",
        reason: "the format is seen from the file; type says what a row holds",
    },
];

/// The judgement of a field that only xorl has.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Unknown,
    /// It has its neutral value.
    Neutral,
    /// Ignored; a warning gives the reason.
    Warn(&'static str),
}

impl Compat {
    /// Judges `field` (`train.tensor_parallel_size`).
    pub fn judge(&self, field: &str, node: &Node) -> Result<Verdict, Problem> {
        if let Some(of_run) = self.as_in_run.iter().find(|of_run| key(of_run) == key(field)) {
            return RUN.judge(of_run, node);
        }
        let value = || if node.kind == Kind::Bare { "true".into() } else { node.shown() };
        let refuse = |reason| Err(Problem::Refused { value: value(), reason });
        if let Some(known) = self.refused.iter().find(|known| known.field == field) {
            let neutral = known.neutral.iter().any(|word| means(node, word));
            return if neutral { Ok(Verdict::Neutral) } else { refuse(known.reason) };
        }
        match self.accepted.iter().find(|known| known.field == field) {
            None => Ok(Verdict::Unknown),
            Some(known) if known.except.iter().any(|word| means(node, word)) => refuse(known.reason),
            Some(known) => Ok(Verdict::Warn(known.reason)),
        }
    }

    /// The problem of a value of xorl's for `field` that is not built.
    pub fn unbuilt(&self, field: &str, node: &Node) -> Option<Problem> {
        let is_given = |known: &&Unbuilt| known.field == field && node.text() == Some(known.value);
        let known = self.unbuilt.iter().find(is_given)?;
        Some(Problem::Refused { value: known.value.to_owned(), reason: known.reason })
    }

    /// The dotted names of fields that are ignored with a warning.
    pub fn accepted_names(&self) -> Vec<String> {
        self.names_in(|compat| compat.accepted.iter().map(|known| known.field).collect())
    }

    /// The dotted names of fields that are refused.
    pub fn refused_names(&self) -> Vec<String> {
        self.names_in(|compat| compat.refused.iter().map(|known| known.field).collect())
    }

    /// The names of one list, those of a run's list after them.
    fn names_in(&self, list: impl Fn(&Self) -> Vec<&'static str>) -> Vec<String> {
        let of_run = list(&RUN).into_iter().filter(|name| self.as_in_run.contains(name));
        let of_run = of_run.map(|name| format!("server.{}", key(name)));
        list(self).into_iter().map(str::to_owned).chain(of_run).collect()
    }
}

fn key(field: &str) -> &str {
    field.rsplit('.').next().unwrap_or(field)
}

/// Judges a field of an entry of `data.datasets`.
pub(super) fn check_dataset_field(key: &str, node: &Node) -> Result<(), Problem> {
    match RUN.judge(&format!("data.datasets.{key}"), node)? {
        Verdict::Unknown => Err(super::nearest::dataset_field(key)),
        Verdict::Neutral | Verdict::Warn(_) => Ok(()),
    }
}

/// True if the node is the value that `word` stands for.
fn means(node: &Node, word: &str) -> bool {
    match &node.kind {
        Kind::Bare => word == "true",
        Kind::List(items) => items.is_empty() && word == "[]",
        Kind::Map(entries) => entries.is_empty() && word == "{}",
        Kind::Scalar { .. } if node.is_null() => word == "null",
        Kind::Scalar { text, .. } => match word {
            "true" | "false" => truth(text) == truth(word),
            _ => text.eq_ignore_ascii_case(word),
        },
    }
}

/// All dotted names of xorl's that are judged in `run.yaml`.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ACCEPTED_WITH_WARNING.iter().map(|known| known.field).chain(REFUSED.iter().map(|known| known.field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema;
    use std::collections::BTreeSet;

    #[test]
    fn no_name_is_in_two_lists() {
        let ours = schema().into_iter().map(|(section, field)| format!("{section}.{}", field.key));
        let mut seen: BTreeSet<String> = ours.collect();
        for name in names() {
            assert!(seen.insert(name.to_owned()), "{name} is listed twice or is a field of ours");
        }
    }

    #[test]
    fn every_unbuilt_value_belongs_to_a_field_of_ours() {
        let mut ours: Vec<_> =
            schema().into_iter().map(|(section, f)| format!("{section}.{}", f.key)).collect();
        ours.push("data.datasets.type".into());
        for known in UNBUILT_VALUES {
            assert!(ours.iter().any(|name| name == known.field), "{}", known.field);
        }
    }

    #[test]
    fn neutral_values_pass_in_every_spelling_and_others_are_refused() {
        let size = "train.tensor_parallel_size";
        assert_eq!(RUN.judge(size, &Node::plain("1")), Ok(Verdict::Neutral));
        assert!(matches!(RUN.judge(size, &Node::plain("2")), Err(Problem::Refused { .. })));
        for word in ["false", "no", "0", "False"] {
            assert_eq!(RUN.judge("train.ep_outside", &Node::plain(word)), Ok(Verdict::Neutral), "{word}");
        }
        assert!(RUN.judge("train.ep_outside", &Node { line: 1, kind: Kind::Bare }).is_err());
        assert_eq!(RUN.judge("lora.lora_target_manifest", &Node::plain("None")), Ok(Verdict::Neutral));
        assert!(matches!(
            RUN.judge("train.load_weights_mode", &Node::plain("grouped")),
            Ok(Verdict::Warn(_))
        ));
        assert!(RUN.judge("train.load_weights_mode", &Node::plain("skip")).is_err());
        assert_eq!(RUN.judge("train.nonsense", &Node::plain("1")), Ok(Verdict::Unknown));
    }
}
