//! Adapters to start from, and steps to resume from.

use super::{Case, POINTER, case};
use serde_json::json;

pub const CASES: &[Case] = &[
    case(
        "a folder without adapter_config.json",
        &["run.yaml:12: lora.adapter_path: adapter:", "expected a PEFT adapter (adapter_config.json)"],
        |w| {
            w.adapter();
            w.remove("adapter/adapter_config.json");
        },
    ),
    case(
        "an adapter's weights as its path",
        &[
            "run.yaml:12: lora.adapter_path:",
            "a file, where a PEFT adapter directory",
            "did you mean its folder, adapter?",
        ],
        |w| {
            w.adapter();
            w.set("adapter_path: adapter", "adapter_path: adapter/adapter_model.safetensors");
        },
    ),
    case(
        "an adapter that git-LFS has left out",
        &[
            "lora.adapter_path: adapter/adapter_model.safetensors:",
            "pointer of Git LFS",
            "run `git lfs pull`",
        ],
        |w| {
            w.adapter();
            w.write("adapter/adapter_model.safetensors", POINTER);
        },
    ),
    case(
        "an adapter whose weights are a pipe",
        &[
            "lora.adapter_path: adapter/adapter_model.safetensors:",
            "a pipe, socket or device, where a regular file is expected",
        ],
        |w| {
            w.adapter();
            w.pipe("adapter/adapter_model.safetensors");
        },
    ),
    case(
        "an adapter of some tokens alone (aLoRA)",
        &[
            "lora.adapter_path: adapter/adapter_config.json: alora_invocation_tokens is [1,2]",
            "cannot be merged or trained on here",
        ],
        |w| w.adapter_with("alora_invocation_tokens", json!([1, 2])),
    ),
    case(
        "an adapter with modules of its own",
        &[
            "lora.adapter_path: adapter/adapter_config.json: modules_to_save",
            "merge the adapter into its base with PEFT's merge_and_unload",
        ],
        |w| w.adapter_with("modules_to_save", json!(["lm_head"])),
    ),
    case(
        "an adapter that starts from PiSSA",
        &[
            "lora.adapter_path: adapter/adapter_config.json: init_lora_weights is \"pissa\"",
            "path_initial_model_for_weight_conversion",
        ],
        |w| w.adapter_with("init_lora_weights", json!("pissa")),
    ),
    case(
        "an output_dir that is taken",
        &["out/weights/run holds steps", "--train.load_checkpoint_path auto", "--train.overwrite true"],
        |w| w.trained(),
    ),
    case(
        "a step that is not there",
        &[
            "run.yaml:9: train.load_checkpoint_path: out/weights/run/step_9",
            "no such directory",
            "name another step, or auto",
        ],
        |w| w.resume("out/weights/run/step_9"),
    ),
    case(
        "a torn step",
        &[
            "run.yaml:9: train.load_checkpoint_path: out/weights/run/step_1 is not a whole step",
            "3772 bytes, 3776 were published",
            "name another step, or auto",
        ],
        |w| {
            w.resume("out/weights/run/step_1");
            w.cut("out/weights/run/step_1/adapter_model.safetensors", 4);
        },
    ),
    case(
        "a step whose manifest is a pipe",
        &[
            "run.yaml:9: train.load_checkpoint_path: out/weights/run/step_1 is not a whole step",
            "manifest.json: a pipe, socket or device, where a regular file is expected",
        ],
        |w| {
            w.resume("out/weights/run/step_1");
            w.pipe("out/weights/run/step_1/manifest.json");
        },
    ),
    case(
        "a checkpoint of transformers",
        &[
            "run.yaml:9: train.load_checkpoint_path: checkpoint-500 is not a whole step",
            "name another step, or auto",
        ],
        |w| {
            w.write("checkpoint-500/trainer_state.json", "{}");
            w.add("train", "load_checkpoint_path: checkpoint-500");
        },
    ),
    case(
        "a step before another one",
        &["out/weights/run: step_2 is published after", "resume from `auto`", "--train.overwrite true"],
        |w| {
            w.resume("out/weights/run/step_1");
            w.copy("out/weights/run/step_1", "out/weights/run/step_2");
        },
    ),
    case(
        "a resume with another optimizer",
        &[
            "out/weights/run/step_1: this run cannot resume from it: its train.optimizer is adamw, the run's sgd",
            "keep what the step was trained with, or start anew",
        ],
        |w| {
            w.resume("auto");
            w.add("train", "optimizer: sgd");
        },
    ),
    case(
        "a resume with other data",
        &[
            "out/weights/run/step_1: this run cannot resume from it: its data are others (4 rows then, 1 now)",
            "give it as lora.adapter_path",
        ],
        |w| {
            w.resume("auto");
            w.write("rows.jsonl", r#"{"input_ids": [5, 6, 7]}"#);
        },
    ),
    case(
        "a resume onto another base",
        &[
            "out/weights/run/step_1: this run cannot resume from it: the base is another one",
            "keep what the step was trained with, or start anew",
        ],
        |w| {
            w.resume("auto");
            w.change_base();
        },
    ),
];
