//! Rows that validate, and losses.

use super::{Case, case};

pub const CASES: &[Case] = &[
    case(
        "a share of 2.5",
        &["run.yaml:4: data.val_set_size: 2.5", "neither a share below 1 nor a whole number"],
        |w| w.add("data", "val_set_size: 2.5"),
    ),
    case(
        "more to validate than there is",
        &[
            "data.val_set_size: 100 of 1",
            "leaves none to train",
            "choose another size, or give data.test_datasets",
        ],
        |w| w.add("data", "val_set_size: 100"),
    ),
    case(
        "two sources of validation",
        &["run.yaml:5: data.val_set_size:", "so does data.test_datasets", "remove one"],
        |w| {
            w.add("data", "val_set_size: 0.5");
            w.add("data", "test_datasets: [{path: rows.jsonl, type: tokenized}]");
        },
    ),
    case(
        "evaluations of nothing",
        &[
            "run.yaml:9: train.eval_steps:",
            "nothing to evaluate on",
            "set data.val_set_size or data.test_datasets",
        ],
        |w| w.add("train", "eval_steps: 1"),
    ),
    case(
        "patience without a measure",
        &[
            "run.yaml:10: train.early_stopping_patience:",
            "needs train.metric_for_best",
            "set it, or remove one",
        ],
        |w| {
            w.add("train", "metric_for_best: null");
            w.add("train", "early_stopping_patience: 2");
            w.add("data", "val_set_size: 0.5");
        },
    ),
    case(
        "dpo on chats",
        &["chats.jsonl: its rows are of type chat", "dpo and simpo read rows of type preference"],
        |w| {
            w.chats();
            w.add("train", "loss_fn: dpo");
        },
    ),
    case(
        "pairs under cross_entropy",
        &["t.jsonl: its rows are of type preference", "train.loss_fn dpo and simpo read"],
        |w| {
            w.pairs(r#"{"prompt": "a", "chosen": "b", "rejected": "a"}"#);
            w.set("loss_fn: dpo", "loss_fn: cross_entropy");
        },
    ),
    case("a loss that is none", &["run.yaml:9: train.loss_fn:", "orpo", "there are cross_entropy"], |w| {
        w.add("train", "loss_fn: orpo")
    }),
    case(
        "a parameter of another loss",
        &["run.yaml:9: train.loss_fn_params: dpo:", "simpo_gamma", "it has beta, label_smoothing, loss_type"],
        |w| w.loss("simpo_gamma: 0.5"),
    ),
    case(
        "a beta below zero",
        &["run.yaml:9: train.loss_fn_params: dpo: parameter beta:", "expected a number above 0, got -0.1"],
        |w| w.loss("beta: -0.1"),
    ),
    case(
        "dpo of a base that merges change",
        &["run.yaml:14: lora.merge_lora_interval:", "leave merges out, or train with cross_entropy"],
        |w| {
            w.pairs(r#"{"prompt": "a", "chosen": "b", "rejected": "a"}"#);
            w.add("lora", "merge_lora_interval: 5");
        },
    ),
];
