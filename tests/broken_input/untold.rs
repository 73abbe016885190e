//! Mistakes whose line has place and cause, and leaves it to the user what to do.

use super::{Case, case};
use serde_json::json;
use std::fs;

pub const CASES: &[Case] = &[
    case("full fine-tuning", &["run.yaml:12", "enable_lora"], |w| {
        w.edit("run.yaml", "lora_rank: 2", "enable_lora: false")
    }),
    case("a model config that is no JSON", &["model/config.json"], |w| w.write("model/config.json", "{")),
    case("a field that may change the maths", &["model/config.json", "logit_softcap"], |w| {
        w.set_model("logit_softcap", json!(30))
    }),
    case("no weights", &["model", "safetensors"], |w| {
        fs::remove_file(w.at("model/model.safetensors")).unwrap()
    }),
    case("weights cut short", &["model/model.safetensors"], |w| {
        let bytes = fs::read(w.at("model/model.safetensors")).unwrap();
        fs::write(w.at("model/model.safetensors"), &bytes[..bytes.len() - 7]).unwrap();
    }),
    case("a tensor that is missing", &["model.norm.weight"], |w| {
        w.change_tensor("model.norm.weight", |_, _| None)
    }),
    case("a tensor too many", &["model.norm.weights"], |w| {
        w.change_tensor("model.norm.weight", |_, shape| Some(("model.norm.weights".into(), shape)));
    }),
    case("a tensor of another shape", &["model.norm.weight", "[8]", "[16]"], |w| {
        w.change_tensor("model.norm.weight", |name, _| Some((name.into(), vec![8])));
    }),
    case("an index without its file", &["model-00001-of-00002.safetensors"], |w| {
        fs::remove_file(w.at("model/model.safetensors")).unwrap();
        let map = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
        w.write("model/model.safetensors.index.json", &map.to_string());
    }),
    case("a broken tokenizer", &["model/tokenizer.json"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat");
        w.write("model/chat_template.jinja", "{{ messages[0].content }}");
        w.write("model/tokenizer.json", "{}");
    }),
    case("a broken chat template", &["model/chat_template.jinja"], |w| {
        w.edit("run.yaml", "rows.jsonl\n      type: tokenized", "chats.jsonl\n      type: chat");
        w.write("model/chat_template.jinja", "{% for m in messages %}");
    }),
    case("a line that is no JSON", &["rows.jsonl:3"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1, 2]}\n\n{\"input_ids\": [1,\n")
    }),
    case("a line without tokens", &["rows.jsonl:1", "input_ids"], |w| {
        w.write("rows.jsonl", "{\"ids\": [1]}\n")
    }),
    case("a token that is none", &["rows.jsonl:2", "input_ids[1]", "64"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [1, 64]}\n");
    }),
    case("a file that is not there", &["rows.jsonl"], |w| fs::remove_file(w.at("rows.jsonl")).unwrap()),
    case("a table of other columns", &["rows.csv:2", "`input_ids`, found `question`, `answer`"], |w| {
        w.write("rows.csv", "question,answer\n1,2\n");
        w.edit("run.yaml", "rows.jsonl", "rows.csv");
    }),
];
