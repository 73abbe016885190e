//! Chats against transformers: texts, token ids, assistant masks and decoding, on templates with the constructs of
//! Llama 3, Qwen2.5, Qwen3, Mistral and SmolLM2, with a byte-level and a sentencepiece-like tokenizer.

use crate::common::python;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use xorl_dist::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod},
    data::{Chat, ChatTemplate, DataError, Dataset, TRAINING_CLOCK, Tokenizer},
};

const TOKENIZERS: [&str; 2] = ["byte_level", "sentence"];

fn chat_data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A tokenizer directory of a test tokenizer and a test template.
fn model_dir(tokenizer: &str, template: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(chat_data().join(tokenizer).join(file), dir.path().join(file)).unwrap();
    }
    let source = chat_data().join("templates").join(template).with_extension("jinja");
    std::fs::copy(source, dir.path().join("chat_template.jinja")).unwrap();
    dir
}

fn chat_of(conversation: &Value) -> Chat {
    let messages = conversation["messages"].as_array().unwrap().clone();
    Chat { messages, tools: conversation.get("tools").cloned() }
}

/// Every (template/conversation, what transformers makes of it, conversation).
fn cases() -> Vec<(String, Value, Value)> {
    let conversations = read_json(&chat_data().join("conversations.json"));
    let Value::Object(expected) = read_json(&chat_data().join("expected.json")) else {
        panic!("not an object")
    };
    let case = |(name, value): (String, Value)| {
        let conversation = conversations[name.split('/').nth(1).unwrap()].clone();
        (name, value, conversation)
    };
    expected.into_iter().map(case).collect()
}

fn write(dir: &Path, name: &str, lines: &[&str]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

/// A chat a row, in the order of the file.
fn chats(path: &Path) -> DataArgs {
    DataArgs {
        datasets: vec![DatasetArgs { path: path.into(), kind: DatasetType::Chat, ..DatasetArgs::default() }],
        sample_packing_method: PackingMethod::None,
        shuffle_merged_datasets: false,
        shuffle_before_merging_datasets: false,
        ..DataArgs::default()
    }
}

#[test]
fn rendered_texts_equal_transformers() {
    for (name, expected, conversation) in cases() {
        let dir = model_dir("byte_level", name.split('/').next().unwrap());
        let template = ChatTemplate::load_with_clock(dir.path(), TRAINING_CLOCK).unwrap();
        for (field, prompt) in [("text", false), ("prompt", true)] {
            let rendered = template.render(&chat_of(&conversation), prompt);
            match expected.get("error") {
                Some(error) => {
                    let ours = rendered.expect_err(&format!("{name}: transformers says {error}")).to_string();
                    assert!(!ours.contains('\n'), "{ours}");
                }
                None => assert_eq!(
                    rendered.map_err(|e| e.to_string()).as_deref(),
                    Ok(expected[field].as_str().unwrap()),
                    "{name}"
                ),
            }
        }
    }
}

#[test]
fn ids_and_assistant_masks_equal_transformers() {
    let mut compared = 0;
    for (name, expected, conversation) in cases() {
        for tokenizer in TOKENIZERS {
            let dir = model_dir(tokenizer, name.split('/').next().unwrap());
            let file = write(dir.path(), "chats.jsonl", &["", &conversation.to_string()]);
            let vocab = Tokenizer::load(dir.path()).unwrap().vocab_size();
            let args = chats(&file);
            let opened = Dataset::open(&args, Some(dir.path()), vocab, 0, 1);
            let rows = expected[tokenizer]["rows"].as_array();
            let silent = rows.is_some_and(|rows| {
                rows.iter()
                    .all(|row| row["mask"].as_array().is_some_and(|mask| mask.iter().all(|flag| *flag == 0)))
            });
            if expected.get("error").is_some() || silent {
                let message = opened.expect_err(&name).to_string();
                let place = if silent { ": nothing can be learned from it" } else { ":2: " };
                assert!(message.starts_with(&format!("{}{place}", file.display())), "{name}: {message}");
            } else {
                let opened = opened.map_err(|error| format!("{name}: {error}")).unwrap();
                let rows = rows.unwrap();
                assert_eq!(opened.rows(), rows.len(), "{name} {tokenizer}");
                for (index, expected) in rows.iter().enumerate() {
                    let row = opened.row_at(0, index).unwrap();
                    assert_eq!(json!(row.input_ids), expected["ids"], "{name} {tokenizer}");
                    let ours: Vec<u8> = row.labels.iter().map(|&label| u8::from(label != -100)).collect();
                    assert!(
                        expected["mask"].is_null() || json!(ours) == expected["mask"],
                        "{name} {tokenizer}"
                    );
                    assert!(ours.contains(&1), "{name} {tokenizer}");
                    assert!(
                        row.labels
                            .iter()
                            .zip(&row.input_ids)
                            .all(|(label, id)| *label == -100 || label == id)
                    );
                }
            }
            if expected.get("error").is_some() {
                continue;
            }
            let everywhere = DataArgs { train_on_inputs: true, ..args };
            let row =
                Dataset::open(&everywhere, Some(dir.path()), vocab, 0, 1).unwrap().row_at(0, 0).unwrap();
            assert_eq!(row.labels, row.input_ids, "{name} {tokenizer}");
            compared += 1;
        }
    }
    assert!(compared >= 60, "only {compared} chats were compared");
}

#[test]
fn decoding_equals_transformers() {
    for (name, expected, _) in cases() {
        for tokenizer in TOKENIZERS.iter().filter(|_| expected.get("error").is_none()) {
            let ids: Vec<i64> = serde_json::from_value(expected[tokenizer]["ids"].clone()).unwrap();
            let text = Tokenizer::load(&chat_data().join(tokenizer)).unwrap().decode(&ids, true).unwrap();
            assert_eq!(text, expected[tokenizer]["decoded"].as_str().unwrap(), "{name} {tokenizer}");
        }
    }
}

#[test]
fn python_the_committed_expectations_are_what_transformers_says() {
    let out = TempDir::new().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/chat_oracle.py");
    let mut oracle = Command::new(python());
    let status = oracle.arg(script).arg(out.path()).env("HF_HUB_OFFLINE", "1").status();
    let status = status.expect("launch/setup.sh makes .venv");
    assert!(status.success(), "the oracle failed: {status}");
    let (fresh, committed) =
        (read_json(&out.path().join("expected.json")), read_json(&chat_data().join("expected.json")));
    for (name, value) in fresh.as_object().unwrap() {
        assert_eq!(value, &committed[name], "{name}");
    }
    assert_eq!(fresh.as_object().unwrap().len(), committed.as_object().unwrap().len());
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let dir = TempDir::new().unwrap();
    let render =
        |chat: &Chat| ChatTemplate::load(dir.path()).unwrap().render(chat, false).map_err(|e| e.to_string());
    assert!(matches!(ChatTemplate::load(dir.path()), Err(DataError::TokenizerFolder { .. })));
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(ChatTemplate::load(dir.path()), Err(DataError::NoTemplate { .. })));
    let chat = Chat::user("hi");
    let config = |template: Value| {
        let config = json!({ "chat_template": template, "eos_token": { "content": "<e>" } });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    };
    config(json!("{{ messages[0].content }}{{ eos_token }}{{ bos_token }}"));
    assert_eq!(render(&chat).unwrap(), "hi<e>");
    std::fs::write(
        dir.path().join("special_tokens_map.json"),
        r#"{"bos_token": "<b>", "eos_token": "<no>"}"#,
    )
    .unwrap();
    // The map goes over the configuration, as in transformers, unless that has an added_tokens_decoder.
    assert_eq!(render(&chat).unwrap(), "hi<no><b>");
    config(
        json!([{ "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools {{ tools | length }}" }]),
    );
    assert_eq!(render(&chat).unwrap(), "plain");
    assert_eq!(render(&Chat { tools: Some(json!([])), ..chat.clone() }).unwrap(), "tools 0");
    config(json!([{ "name": "rag", "template": "x" }]));
    assert!(render(&chat).unwrap_err().contains("no chat template named `default`, only rag"));
    config(json!("{% if %}"));
    let error = ChatTemplate::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: ") && error.contains("template line 1"), "{error}");
    config(json!(3));
    assert!(ChatTemplate::load(dir.path()).is_err());
    std::fs::write(
        dir.path().join("chat_template.jinja"),
        "file {{ raise_exception('no\nway') if stop else 1 }}\n",
    )
    .unwrap();
    assert_eq!(render(&chat).unwrap(), "file 1");
}

#[test]
fn the_template_is_part_of_what_prepared_chats_depend_on() {
    let dir = model_dir("byte_level", "chatml");
    let chat = read_json(&chat_data().join("conversations.json"))["one_turn"].to_string();
    let path = write(dir.path(), "chats.jsonl", &[&chat]);
    let cache = dir.path().join("cache");
    let args = DataArgs { dataset_prepared_path: Some(cache), ..chats(&path) };
    let open = || Dataset::open(&args, Some(dir.path()), 1000, 0, 1).unwrap().fingerprint().to_string();
    let first = open();
    assert_eq!(open(), first);
    std::fs::copy(chat_data().join("templates/qwen3.jinja"), dir.path().join("chat_template.jinja")).unwrap();
    assert_ne!(open(), first);
}
