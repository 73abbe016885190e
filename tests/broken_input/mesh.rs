//! Ranks, experts over them, and quantised bases.

use super::{Case, case};
use serde_json::json;

pub const CASES: &[Case] = &[
    case(
        "more shards than ranks",
        &["1 data-parallel ranks cannot be divided by train.data_parallel_shard_size 8", "1 fits"],
        |w| w.add("train", "data_parallel_shard_size: 8"),
    ),
    case(
        "replicas and shards beyond the ranks",
        &[
            "train.data_parallel_replicate_size 2 × train.data_parallel_shard_size 2",
            "1 were started",
            "set one of the first two to -1",
        ],
        |w| {
            w.add("train", "data_parallel_shard_size: 2");
            w.add("train", "data_parallel_replicate_size: 2");
        },
    ),
    case(
        "experts over ranks that they do not divide",
        &["train.expert_parallel_size 3 does not divide the 4 ranks", "1, 2 and 4 fit"],
        |w| {
            w.experts();
            w.add("train", "expert_parallel_size: 3");
        },
    )
    .of(&["check", "--config", "run.yaml", "--ranks", "4"]),
    case(
        "experts of a model that has none",
        &["run.yaml:9: train.expert_parallel_size:", "no experts to divide", "leave it at 1"],
        |w| w.add("train", "expert_parallel_size: 2"),
    )
    .of(&["check", "--config", "run.yaml", "--ranks", "2"]),
    case(
        "a sequence over ranks",
        &["run.yaml:9: train.ulysses_parallel_size: 2", "not built", "leave it at 1"],
        |w| w.add("train", "ulysses_parallel_size: 2"),
    ),
    case(
        "what experts share, saved without any",
        &["run.yaml:12: lora.lora_export_format:", "set lora.moe_hybrid_shared_lora, or use per_expert"],
        |w| w.add("lora", "lora_export_format: sglang_shared_outer"),
    ),
    case(
        "a format that is none",
        &["lora.quant_format:", "expected nf4, block_fp8 or nvfp4, got \"int4\""],
        |w| w.quantise("int4"),
    ),
    case(
        "groups of another format",
        &["run.yaml:12: lora.quant_group_size: 128 is no group size of nf4, which has 64", "leave it out"],
        |w| {
            w.quantise("nf4");
            w.add("lora", "quant_group_size: 128");
        },
    ),
    case(
        "an excluded layer that is none",
        &["run.yaml:12: lora.exclude_modules: w1 matches nothing", "this model has q_proj"],
        |w| {
            w.quantise("nf4");
            w.add("lora", "exclude_modules: [w1]");
        },
    ),
    case(
        "bitsandbytes' switch",
        &["run.yaml:2: model.load_in_4bit:", "is lora.enable_qlora here (with quant_format: nf4)"],
        |w| w.add("model", "load_in_4bit: true"),
    ),
    case(
        "PiSSA of a quantised base",
        &["lora.init_lora_weights:", "a quantised base would lose", "use default"],
        |w| {
            w.quantise("nf4");
            w.add("lora", "init_lora_weights: pissa");
        },
    ),
    case(
        "files that are packed in another format",
        &[
            "run.yaml:12: lora.quant_format:",
            "in block_fp8, which is not packed anew",
            "set quant_format: block_fp8",
        ],
        |w| {
            w.quantise("nf4");
            w.pack_fp8();
        },
    ),
    case(
        "GPTQ",
        &[
            "model/config.json: quantization_config.",
            "quant_method is gptq",
            "take the model in one of these, or in bfloat16",
        ],
        |w| w.set_model("quantization_config", json!({"quant_method": "gptq", "bits": 4})),
    ),
    case(
        "fp4 of bitsandbytes",
        &["model/config.json: quantization_config.", "bnb_4bit_quant_type is \"fp4\"", "\"nf4\" can be read"],
        |w| {
            w.set_model(
                "quantization_config",
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
            )
        },
    ),
];
