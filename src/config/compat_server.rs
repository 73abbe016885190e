//! Fields that only xorl's server has; see [`compat`](super::compat).

use super::compat::{
    Accepted, Compat, KERNELS, MEMORY, NO_PIPELINE, NO_RECOMPUTE_BEFORE, NO_SIGNED_REDUCTION, Refused,
    TOPOLOGY, Unbuilt, hint, refused,
};

/// xorl's other fields of `server.yaml`.
pub(super) const SERVER: Compat =
    Compat { accepted: ACCEPTED, refused: REFUSED, unbuilt: UNBUILT, as_in_run: AS_IN_RUN };

/// Names of xorl's server with the fields that they are here.
pub(super) const RENAMED: [(&str, &str); 3] = [
    ("model_name", "base_model_name"),
    ("adam_betas", "adam_beta1 and adam_beta2"),
    ("adam_eps", "adam_epsilon"),
];

const LAUNCHER: &str = "mpirun starts the ranks, which find each other through it";
const BY_TOKENS: &str = "requests are dealt out by tokens; max_tokens_per_pass bounds a micro-batch";
const NO_REPLAY: &str = "only a replay of expert routing reads it, which is not built";
const NO_SYNC: &str = "only a transfer of weights to inference engines reads it, which is not built";
const LOGGING: &str = "RUST_LOG sets the level of the log";
const ON_REQUEST: &str = "an adapter is saved when a client asks for it";
const NO_FP8: &str = "the base is computed in bf16 or fp32; see enable_mixed_precision";

const ACCEPTED: &[Accepted] = &[
    hint("server.moe_routing_weights_before_down", KERNELS),
    hint("server.alltoall_combine_hidden_chunk_size", KERNELS),
    hint("server.router_fp32", KERNELS),
    hint("server.lm_head_fp32", KERNELS),
    hint("server.qwen35_rmsnorm_family", KERNELS),
    hint("server.activation_native", KERNELS),
    hint("server.rope_native", KERNELS),
    hint("server.rope_class_b", KERNELS),
    hint("server.attention_cast_bf16", KERNELS),
    hint("server.flash_attention_deterministic", KERNELS),
    hint("server.sparse_mla_enabled", KERNELS),
    hint("server.sparse_mla_backend", KERNELS),
    hint("server.ce_mode", KERNELS),
    hint("server.use_shared_prefix", KERNELS),
    hint("server.compile_dynamic_shapes", KERNELS),
    hint("server.fsdp_sharded_lm_head_loss", MEMORY),
    hint("server.fsdp_sharded_lm_head_loss_num_chunks", MEMORY),
    hint("server.activation_offload_prefetch_count", MEMORY),
    hint("server.skip_param_upcast", MEMORY),
    hint("server.adapter_gradient_ownership_bucket_bytes", MEMORY),
    hint("server.enable_backward_prefetch", "ring_slots above 1 prefetch"),
    hint("server.defer_grad_sync_in_accumulation", "reduce_gradients says when gradients are reduced"),
    hint("server.pipeline_parallel_virtual_stages", NO_PIPELINE),
    hint("server.pipeline_parallel_input_weight", NO_PIPELINE),
    hint("server.pipeline_parallel_output_weight", NO_PIPELINE),
    hint("server.pipeline_parallel_num_layers_in_first_stage", NO_PIPELINE),
    hint("server.pipeline_parallel_num_layers_in_last_stage", NO_PIPELINE),
    hint("server.pp_seq_len_bucket_size", NO_PIPELINE),
    hint("server.sample_packing_sequence_len", BY_TOKENS),
    hint("server.sample_packing_strategy", BY_TOKENS),
    hint("server.enable_packing", BY_TOKENS),
    hint("server.pad_to_multiple_of", BY_TOKENS),
    hint("server.ckpt_manager", "a save is published atomically, in PEFT's format"),
    hint("server.skip_initial_checkpoint", ON_REQUEST),
    hint("server.load_optimizer", "only load_checkpoint_path reads it, which is not built"),
    hint("server.adapter_state_load_mode", "each rank reads the bytes of its own shards"),
    hint("server.log_level", LOGGING),
    hint("server.log_gradient_norms", LOGGING),
    hint("server.log_router_stats", LOGGING),
    hint("server.enable_self_test", "configuration, model and mesh are checked before the start"),
    hint("server.worker_bind_host", LAUNCHER),
    hint("server.worker_bind_port", LAUNCHER),
    hint("server.worker_bind_address", LAUNCHER),
    hint("server.worker_connection_timeout", LAUNCHER),
    hint("server.worker_max_retries", LAUNCHER),
    hint("server.engine_connect_host", LAUNCHER),
    hint("server.record_routing_weights", NO_REPLAY),
    hint("server.r3_payload_transport", NO_REPLAY),
    hint("server.r3_payload_dir", NO_REPLAY),
    hint("server.r3_payload_keep", NO_REPLAY),
    hint("server.r3_payload_namespace_prefix", NO_REPLAY),
    hint("server.externalize_r3_payloads", NO_REPLAY),
    hint("server.keep_r3_payloads", NO_REPLAY),
    hint("server.sync_inference_method", NO_SYNC),
    hint("server.receiver_kv_cache_dtype", NO_SYNC),
    hint("server.reset_optimizer_on_merge", "only merging during training reads it, which is of a run"),
];

const REFUSED: &[Refused] = &[
    refused("server.freeze_router", &["true"], "the router is part of the frozen base"),
    refused("server.lm_head_tensor_parallel_size", &["1"], TOPOLOGY),
    refused("server.cautious_weight_decay", &["false"], "weight decay is not masked"),
    refused("server.load_checkpoint_path", &["null", ""], "clients load what was saved; leave it out"),
    refused("server.sample_packing_on_oversized", &["error"], "a datum that is too long is refused"),
    refused("server.lora_export_format", &["peft"], "adapters are saved as PEFT has them"),
    refused("server.lora_b_init_seed", &["0"], "B is drawn from the adapter's seed"),
    refused(
        "server.merge_lora_interval",
        &["0"],
        "clients share the base; xorl-dist merge makes a model of what one has saved",
    ),
    refused(
        "server.block_fp8_qlora_training",
        &["false"],
        "enable_qlora with quant_format: block_fp8 says it",
    ),
    refused("server.enable_fp8_training", &["false"], NO_FP8),
    refused("server.fp8_cfg", &["null"], NO_FP8),
    refused("server.enable_qarl", &["false"], NO_FP8),
];

const UNBUILT: &[Unbuilt] = &[
    Unbuilt {
        field: "server.gradient_checkpointing_method",
        value: "recompute_before_dispatch",
        reason: NO_RECOMPUTE_BEFORE,
    },
    Unbuilt { field: "server.optimizer", value: "distsignsgd", reason: NO_SIGNED_REDUCTION },
];

const AS_IN_RUN: &[&str] = &[
    "model.attn_implementation",
    "model.moe_implementation",
    "model.rmsnorm_mode",
    "model.ep_dispatch",
    "model.deepep_buffer_size_gb",
    "model.deepep_num_sms",
    "model.deepep_async_combine",
    "model.basic_modules",
    "model.train_router",
    "model.foundation",
    "model.encoders",
    "train.data_parallel_mode",
    "train.tensor_parallel_size",
    "train.pipeline_parallel_size",
    "train.pipeline_parallel_schedule",
    "train.pp_variable_seq_lengths",
    "train.ringattn_parallel_size",
    "train.cp_fsdp_mode",
    "train.fsdp_reduce_dtype",
    "train.moe_grad_reduce_mode",
    "train.enable_full_shard",
    "train.enable_full_determinism",
    "train.enable_activation_offload",
    "train.activation_gpu_limit",
    "train.enable_reentrant",
    "train.enable_forward_prefetch",
    "train.enable_compile",
    "train.load_weights_mode",
    "train.init_device",
    "lora.lora_target_manifest",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ServerConfig, compat::RUN, file, source::Node};
    use std::collections::BTreeSet;

    #[test]
    fn no_name_is_in_two_lists() {
        let mut seen: BTreeSet<String> = file::names::<ServerConfig>().into_iter().collect();
        for name in SERVER.accepted_names().into_iter().chain(SERVER.refused_names()) {
            assert!(name.starts_with("server."), "{name}");
            assert!(seen.insert(name.clone()), "{name} is listed twice or is a field of ours");
        }
        for (name, _) in RENAMED {
            assert!(!seen.contains(&format!("server.{name}")), "{name}");
        }
        for known in UNBUILT {
            assert!(seen.contains(known.field), "{}", known.field);
        }
    }

    #[test]
    fn every_field_that_is_judged_as_in_a_run_is_known_there() {
        let known = [RUN.accepted_names(), RUN.refused_names()].concat();
        for name in AS_IN_RUN {
            assert!(known.iter().any(|known| known == name), "{name}");
            let key = name.split('.').nth(1).unwrap();
            let node = Node::plain("null");
            assert_eq!(SERVER.judge(&format!("server.{key}"), &node), RUN.judge(name, &node), "{name}");
        }
    }
}
