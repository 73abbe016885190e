//! The run's file: names, values and rules between fields.

use super::{Case, case};

pub const CASES: &[Case] = &[
    case("a field that is none", &["run.yaml:10", "train.max_stepz", "max_steps"], |w| {
        w.edit("run.yaml", "max_steps", "max_stepz")
    }),
    case("a section that is none", &["run.yaml:", "trian", "did you mean train?"], |w| {
        w.edit("run.yaml", "train:", "trian:")
    }),
    case(
        "a number that is none",
        &["run.yaml:10", "train.max_steps", "many", "expected a whole number of at least 1"],
        |w| w.edit("run.yaml", "max_steps: 1", "max_steps: many"),
    ),
    case(
        "a rank of zero",
        &["run.yaml:12", "lora.lora_rank", "expected a whole number of at least 1"],
        |w| w.edit("run.yaml", "lora_rank: 2", "lora_rank: 0"),
    ),
    case("a field twice", &["run.yaml:", "output_dir", "first on line 9"], |w| {
        w.edit("run.yaml", "  max_steps: 1", "  output_dir: b")
    }),
    case("yaml that is none", &["run.yaml:", "expected `key: value` in each line"], |w| {
        w.edit("run.yaml", "lora:\n", "lora: [\n")
    }),
    case("no dataset", &["data.datasets", "expected a non-empty list of data sets"], |w| {
        w.edit("run.yaml", "    - path: rows.jsonl\n      type: tokenized\n", "    []\n")
    }),
    case("a dataset type that is none", &["run.yaml:6", "tokenised", "expected auto, tokenized"], |w| {
        w.edit("run.yaml", "tokenized", "tokenised")
    }),
    case("a run_id with a slash", &["run.yaml:10", "train.run_id", "expected a name of letters"], |w| {
        w.edit("run.yaml", "max_steps: 1", "run_id: a/b")
    }),
    case(
        "an output_dir that is a link to nothing",
        &[
            "run.yaml:9",
            "train.output_dir",
            "a link that leads nowhere: make its target, or give another output_dir",
        ],
        |w| w.link("nowhere/out", "out"),
    ),
    case(
        "an output_dir that is a file",
        &["run.yaml:9", "train.output_dir", "rows.jsonl: a file", "name another one"],
        |w| w.edit("run.yaml", "output_dir: out", "output_dir: rows.jsonl/out"),
    ),
    case(
        "a target that matches nothing",
        &["run.yaml:12", "lora.lora_target_modules", "w1", "this model has q_proj"],
        |w| w.edit("run.yaml", "lora_rank: 2", "lora_target_modules: [w1]"),
    ),
    case(
        "a leaf that is adapted twice",
        &["run.yaml:12", "lora.lora_target_modules", "qkv_proj", "name one of them"],
        |w| {
            w.edit("run.yaml", "lora_rank: 2", "lora_target_modules: [q_proj, qkv_proj]");
        },
    ),
    case("more ranks than there are", &["data_parallel_shard_size", "2", "1 fits"], |w| {
        w.edit("run.yaml", "max_steps: 1", "data_parallel_shard_size: 2");
    }),
    case(
        "an adapter that is not there",
        &["run.yaml:12", "lora.adapter_path", "nowhere", "expected a PEFT adapter directory"],
        |w| {
            w.edit("run.yaml", "lora_rank: 2", "adapter_path: nowhere");
        },
    ),
    case(
        "full fine-tuning",
        &["run.yaml:12: lora.enable_lora:", "the base is frozen by design", "leave it out"],
        |w| w.edit("run.yaml", "lora_rank: 2", "enable_lora: false"),
    ),
    case(
        "bitsandbytes' 8 bits",
        &["run.yaml:12: lora.load_in_8bit:", "is lora.enable_qlora here", "quant_format: block_fp8"],
        |w| w.add("lora", "load_in_8bit: true"),
    ),
    case(
        "axolotl's name of the model",
        &["run.yaml:2: model.base_model:", "is model.model_path here"],
        |w| w.set("model_path: model", "base_model: model"),
    ),
    case("TRL's batch size", &["run.yaml:9:", "is train.micro_batch_size here"], |w| {
        w.add("train", "per_device_train_batch_size: 4")
    }),
    case(
        "DeepSpeed's file",
        &["run.yaml:9: train.deepspeed:", "not needed", "train.data_parallel_shard_size says"],
        |w| w.add("train", "deepspeed: ds_config.json"),
    ),
    case("fp16", &["run.yaml:9: train.fp16:", "not built", "train.enable_mixed_precision: true"], |w| {
        w.add("train", "fp16: true")
    }),
    case(
        "a field in another section",
        &["run.yaml:9: train.lora_rank:", "did you mean lora.lora_rank?"],
        |w| w.add("train", "lora_rank: 8"),
    ),
    case(
        "a learning rate with a unit",
        &["run.yaml:9: train.lr:", "expected a positive number, got \"2e-4%\""],
        |w| w.add("train", "lr: 2e-4%"),
    ),
    case(
        "a warm-up in percent",
        &["run.yaml:9: train.lr_warmup_ratio:", "expected a number from 0 to 1, got 10"],
        |w| w.add("train", "lr_warmup_ratio: 10"),
    ),
    case(
        "two lengths of a warm-up",
        &["run.yaml:9: train.lr_warmup_steps:", "train.lr_warmup_ratio says", "remove one"],
        |w| {
            w.add("train", "lr_warmup_ratio: 0.1");
            w.add("train", "lr_warmup_steps: 5");
        },
    ),
    case(
        "padding without packs",
        &["run.yaml:4: data.pad_to_multiple_of:", "sample_packing_method is none", "remove one"],
        |w| w.add("data", "pad_to_multiple_of: 64"),
    ),
    case("a tab", &["run.yaml:12:", "tabs", "indented by as many spaces"], |w| {
        w.set("  lora_rank", "\tlora_rank")
    }),
    case(
        "no model named",
        &["run.yaml:1: model.model_path: missing", "an HF model directory or a model of the hub"],
        |w| w.set("model:\n  model_path: model\n", ""),
    ),
    case(
        "the head as a target",
        &["run.yaml:12: lora.lora_target_modules: lm_head", "head are frozen", "name projections of layers"],
        |w| w.add("lora", "lora_target_modules: [q_proj, lm_head]"),
    ),
    case(
        "DoRA with dropout",
        &["run.yaml:13: lora.use_dora:", "not built", "remove lora.lora_dropout"],
        |w| {
            w.add("lora", "use_dora: true");
            w.add("lora", "lora_dropout: 0.1");
        },
    ),
    case("a file of another kind", &["run.toml:", "expected a .yaml, .yml or .json file"], |w| {
        w.rename("run.yaml", "run.toml")
    })
    .of(&["--config", "run.toml"]),
];
