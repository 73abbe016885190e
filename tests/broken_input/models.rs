//! Models, tokenizers and chat templates.

use super::{Case, POINTER, case};
use serde_json::json;

pub const CASES: &[Case] = &[
    case("no model", &["nowhere", "expected an HF model directory"], |w| {
        w.edit("run.yaml", "model_path: model", "model_path: nowhere")
    }),
    case("a family that is not built", &["model/config.json", "gpt2", "built are llama"], |w| {
        w.set_model("model_type", json!("gpt2"))
    }),
    case("an activation that is not built", &["model/config.json", "hidden_act", "expected \"silu\""], |w| {
        w.set_model("hidden_act", json!("gelu"))
    }),
    case(
        "heads that do not divide",
        &["model/config.json", "num_key_value_heads", "expected a divisor of num_attention_heads 2"],
        |w| w.set_model("num_key_value_heads", json!(3)),
    ),
    case(
        "a size that is no number",
        &["model/config.json", "hidden_size", "expected a positive integer"],
        |w| w.set_model("hidden_size", json!("big")),
    ),
    case(
        "a model config that is no JSON",
        &["model/config.json: not JSON", "copy the model's file again"],
        |w| w.write("model/config.json", "{"),
    ),
    case(
        "a model config that is a pipe",
        &["model/config.json", "a pipe, socket or device, where a regular file is expected"],
        |w| w.pipe("model/config.json"),
    ),
    case(
        "a folder without a config",
        &["model: has no config.json", "give the folder of a model in HF format"],
        |w| w.remove("model/config.json"),
    ),
    case(
        "a field that may change the maths",
        &["model/config.json: logit_softcap:", "take it out if"],
        |w| w.set_model("logit_softcap", json!(30)),
    ),
    case("no weights", &["model: neither model.safetensors", "give a folder that has the weights"], |w| {
        w.remove("model/model.safetensors")
    }),
    case("weights cut short", &["model/model.safetensors: not a whole", "copy or download it again"], |w| {
        w.cut("model/model.safetensors", 7)
    }),
    case(
        "a tensor that is missing",
        &["model: its tensors", "missing: model.norm.weight; take both of one model"],
        |w| w.change_tensor("model.norm.weight", |_, _| None),
    ),
    case(
        "a tensor under another name",
        &["model: its tensors", "not read: model.norm.weights; take both of one model"],
        |w| w.change_tensor("model.norm.weight", |_, shape| Some(("model.norm.weights".into(), shape))),
    ),
    case(
        "a tensor of another shape",
        &["model: its tensors", "model.norm.weight is [8], expected [16]; take both of one model"],
        |w| w.change_tensor("model.norm.weight", |name, _| Some((name.into(), vec![8]))),
    ),
    case(
        "an index without its file",
        &["model.safetensors.index.json: lists model-00001-of-00002.safetensors", "copy or download it"],
        |w| {
            w.remove("model/model.safetensors");
            let map = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
            w.write("model/model.safetensors.index.json", &map.to_string());
        },
    ),
    case(
        "a broken tokenizer",
        &["tok/tokenizer.json: not a tokenizer", "copy the model's file again"],
        |w| {
            w.chats();
            w.write("tok/tokenizer.json", "{}");
        },
    ),
    case(
        "a broken chat template",
        &["tok/chat_template.jinja: the chat template fails (template line 1)", "mend it, or copy"],
        |w| {
            w.chats();
            w.write("tok/chat_template.jinja", "{% for m in messages %}");
        },
    ),
    case(
        "the address of a model's page",
        &["run.yaml:2: model.model_path:", "an address; name it by its hub id, Qwen/Qwen2.5-0.5B"],
        |w| w.set("model_path: model", "model_path: https://huggingface.co/Qwen/Qwen2.5-0.5B"),
    ),
    case("chats without a tokenizer", &["model: no tokenizer.json", "set model.tokenizer_path"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat")
    }),
    case(
        "weights that git-LFS has left out",
        &["model/model.safetensors:", "git-LFS pointer", "run `git lfs pull`"],
        |w| w.write("model/model.safetensors", POINTER),
    ),
    case(
        "a pickle alone",
        &["model: pytorch_model.bin", "no model.safetensors", "save_pretrained(DIR)"],
        |w| w.rename("model/model.safetensors", "model/pytorch_model.bin"),
    ),
    case(
        "a GGUF alone",
        &["model: model-Q4_K_M.gguf", "for llama.cpp", "take the model in HF format"],
        |w| w.rename("model/model.safetensors", "model/model-Q4_K_M.gguf"),
    ),
    case("weights in integers", &["model/model.safetensors: tensor", "is I32", "dequantize it"], |w| {
        w.store_integers()
    }),
    case(
        "the weights as the model's path",
        &["run.yaml:2: model.model_path:", "a file, where", "did you mean its folder, model?"],
        |w| w.set("model_path: model", "model_path: model/model.safetensors"),
    ),
    case(
        "an adapter beside the weights",
        &["model/adapter_config.json:", "in the folder of a model", "name them in lora.adapter_path"],
        |w| w.write("model/adapter_config.json", "{}"),
    ),
    case(
        "positions that are not built",
        &["model/config.json: rope_scaling.rope_type:", "expected one of default, linear", "magic"],
        |w| w.set_model("rope_scaling", json!({"rope_type": "magic", "factor": 2.0})),
    ),
    case(
        "a model of the hub, offline",
        &[
            "run.yaml:2: model.model_path: Qwen/Qwen2.5-0.5B:",
            "no such model in the cache",
            "unset HF_HUB_OFFLINE",
        ],
        |w| w.set("model_path: model", "model_path: Qwen/Qwen2.5-0.5B"),
    ),
    case(
        "a folder of home",
        &["run.yaml:2: model.model_path: ~/llama:", "~ is not expanded", "write the path in full"],
        |w| w.set("model_path: model", "model_path: ~/llama"),
    ),
    case(
        "a tokenizer of SentencePiece alone",
        &["run.yaml:2: model.tokenizer_path: tok:", "expected a directory with tokenizer.json"],
        |w| {
            w.chats();
            w.rename("tok/tokenizer.json", "tok/tokenizer.model");
        },
    ),
    case(
        "a tokenizer whose name is misspelt",
        &["run.yaml:2: model.tokenizer_path: tokk:", "no such folder", "did you mean tok?"],
        |w| {
            w.chats();
            w.set("tokenizer_path: tok", "tokenizer_path: tokk");
        },
    ),
    case(
        "a tokenizer without a template",
        &["tok: no chat template", "expected chat_template.jinja, or chat_template in tokenizer_config.json"],
        |w| {
            w.chats();
            w.remove("tok/chat_template.jinja");
        },
    ),
    case(
        "texts that no token ends",
        &["t.txt:1:", "names no eos_token", "set it in tokenizer_config.json"],
        |w| {
            w.rows("text", "t.txt", "a b\n");
            w.write("tok/tokenizer_config.json", "{}");
        },
    ),
];
