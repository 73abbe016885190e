//! Tables of inputs from practice against transformers: tokenizers with tokens beside tokenizer.json, constructs of
//! templates, chats and their trained tokens, and the masks and positions of tokenized rows. One Python process
//! computes all right values.

use crate::common::python;
use serde_json::{Map, Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use xorl_dist::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod, Turns},
    data::{Chat, ChatTemplate, Dataset, Row, Tokenizer},
};

fn tables() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// A folder with the test tokenizer, `config` over its tokenizer_config.json, and `files`.
fn tokenizer_dir(dir: &Path, config: &Value, files: &Value) {
    tokenizer_dir_of("byte_level", dir, config, files);
}

/// As [`tokenizer_dir`], with the tokenizer `base` of tests/data/chat.
fn tokenizer_dir_of(base: &str, dir: &Path, config: &Value, files: &Value) {
    let source = tables().join("chat").join(base);
    std::fs::create_dir_all(dir).unwrap();
    std::fs::copy(source.join("tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let mut whole = read_json(&source.join("tokenizer_config.json"));
    whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    let named = files.as_object().unwrap().iter().map(|(name, file)| (name.as_str(), file));
    for (name, file) in named.chain([("tokenizer_config.json", &whole)]) {
        std::fs::write(dir.join(name), file.to_string()).unwrap();
    }
}

/// A row for each row of the file, in its order.
fn rows_of(path: &Path, kind: DatasetType) -> DataArgs {
    DataArgs {
        datasets: vec![DatasetArgs { path: path.into(), kind, ..DatasetArgs::default() }],
        sample_packing_method: PackingMethod::None,
        shuffle_merged_datasets: false,
        shuffle_before_merging_datasets: false,
        ..DataArgs::default()
    }
}

/// The rows that `line` becomes.
fn open(
    folder: &Path,
    line: &str,
    kind: DatasetType,
    turns: Turns,
    vocabulary: usize,
) -> Result<(Vec<Row>, Vec<String>), String> {
    let path = folder.join("data.jsonl");
    std::fs::write(&path, line).unwrap();
    let args = DataArgs { turns, ..rows_of(&path, kind) };
    let dataset = Dataset::open(&args, Some(folder), vocabulary, 0, 1).map_err(|error| error.to_string())?;
    let rows = (0..dataset.rows()).map(|at| dataset.row_at(0, at).unwrap()).collect();
    Ok((rows, dataset.summary().remarks.iter().map(|(_, remark)| remark.clone()).collect()))
}

fn mask(row: &Row) -> Vec<u8> {
    row.labels.iter().map(|&label| u8::from(label != -100)).collect()
}

/// The first message of the table of expressions; its integers are larger than a machine word.
const FIRST: &str = r#"{"messages": [{"role": "user", "content": "hi", "n": 100000000000000000000, "f": 1.5, "l": [18446744073709551616, -9223372036854775809], "z": -0}, {"role": "assistant", "content": "x"}]}"#;

/// Ids of each tokenizer, and the named tokens that its template sees.
fn our_tokenizers(cases: &Value, folder: &Path) -> Vec<Result<Value, String>> {
    let one = |(index, case): (usize, &Value)| {
        let dir = folder.join("tokenizers").join(index.to_string());
        let base = case["base"].as_str().unwrap_or("byte_level");
        tokenizer_dir_of(base, &dir, &case["config"], &case["files"]);
        let ids =
            Tokenizer::load(&dir).and_then(|tokenizer| tokenizer.encode(case["text"].as_str().unwrap()));
        ids.map(|ids| json!(ids)).map_err(|error| error.to_string())
    };
    list(cases).iter().enumerate().map(one).collect()
}

/// The named tokens as a template prints them.
fn our_names(folder: &Path, index: usize, names: &Value) -> String {
    let dir = folder.join("tokenizers").join(index.to_string());
    let printed: String =
        names.as_object().unwrap().keys().map(|name| format!("{name}={{{{ {name} }}}};")).collect();
    std::fs::write(dir.join("chat_template.jinja"), printed).unwrap();
    ChatTemplate::load(&dir).unwrap().render(&Chat::user("x"), false).unwrap()
}

/// Texts of the expressions. The message comes by way of a data file, as it would in training.
fn our_expressions(folder: &Path) -> Vec<Result<Value, String>> {
    let lines = std::fs::read_to_string(tables().join("rows/expressions.txt")).unwrap();
    let one = |line: &str| {
        let dir = folder.join("expression");
        // The answer has a loss by its mark, and only the text before it is compared.
        let template = format!("{line}\u{1}{{% generation %}}x{{% endgeneration %}}");
        tokenizer_dir(&dir, &json!({"chat_template": template}), &json!({}));
        let path = dir.join("data.jsonl");
        std::fs::write(&path, FIRST).unwrap();
        let args = rows_of(&path, DatasetType::Chat);
        let dataset = Dataset::open(&args, Some(&dir), 1000, 0, 1).map_err(|error| error.to_string())?;
        let ids = dataset.row_at(0, 0).unwrap().input_ids;
        let text = Tokenizer::load(&dir).unwrap().decode(&ids, false).unwrap();
        Ok(json!(text.split('\u{1}').next().unwrap()))
    };
    lines.lines().map(one).collect()
}

fn our_chats(cases: &Value, folder: &Path) -> Vec<Result<Value, String>> {
    let one = |case: &Value| {
        let dir = folder.join("chat");
        tokenizer_dir(&dir, &json!({"chat_template": case["template"]}), &json!({}));
        let turns = if case["turns"] == "last" { Turns::Last } else { Turns::All };
        // The line is a text: serde_json would round its large integers.
        let line = case["line"].as_str().unwrap();
        let (rows, _) = open(&dir, line, DatasetType::Chat, turns, 1000)?;
        let shown = |row: &Row| json!({"ids": row.input_ids, "mask": mask(row)});
        Ok(Value::Array(rows.iter().map(shown).collect()))
    };
    list(cases).iter().map(one).collect()
}

/// A tokenizer folder for rows of all types; `begun` has a tokenizer that sets `<s>` before a text.
fn typed_dir(folder: &Path, name: &str) -> PathBuf {
    let dir = folder.join("types").join(name);
    tokenizer_dir(&dir, &json!({}), &json!({}));
    let path = dir.join("tokenizer.json");
    let mut tokenizer = read_json(&path);
    if name == "begun" {
        let tokens = list(&tokenizer["added_tokens"]);
        let id = tokens.iter().find(|token| token["content"] == "<s>").unwrap()["id"].clone();
        let first = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [first, text("A", 0)],
            "pair": [first, text("A", 0), first, text("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}},
        });
    }
    std::fs::write(path, tokenizer.to_string()).unwrap();
    dir
}

/// Rows of each type, by its name or as the fields of the row tell.
fn our_types(cases: &Value, dir: &Path) -> Vec<Result<Value, String>> {
    let one = |case: &Value| {
        if let Some(template) = case["template"].as_str() {
            let source = tables().join("chat/templates").join(template).with_extension("jinja");
            std::fs::copy(source, dir.join("chat_template.jinja")).unwrap();
        }
        let path = dir.join("data.jsonl");
        std::fs::write(&path, case["row"].to_string()).unwrap();
        let mut entry = case.get("entry").cloned().unwrap_or_else(|| json!({}));
        entry["path"] = json!(path);
        entry["type"] = case["type"].clone();
        let entry: DatasetArgs = serde_json::from_value(entry).unwrap();
        let args = DataArgs { datasets: vec![entry], ..rows_of(&path, DatasetType::Auto) };
        let dataset = Dataset::open(&args, Some(dir), 1000, 0, 1).map_err(|error| error.to_string())?;
        let row = dataset.row_at(0, 0).unwrap();
        Ok(json!({"ids": row.input_ids, "mask": mask(&row)}))
    };
    list(cases).iter().map(one).collect()
}

fn our_tokenized(cases: &Value, folder: &Path) -> Value {
    let one = |case: &Value| {
        let (rows, _) = open(folder, &case["row"].to_string(), DatasetType::Tokenized, Turns::All, 256)
            .unwrap_or_else(|error| panic!("{}: {error}", case["name"]));
        let [row] = &rows[..] else { panic!("{}: {} rows", case["name"], rows.len()) };
        json!({"ids": row.input_ids, "labels": row.labels, "documents": row.document_lengths})
    };
    list(cases).iter().map(one).collect()
}

#[test]
fn python_tables_of_rows_tokenizers_and_templates_equal_transformers() {
    let folder = TempDir::new().unwrap();
    let cases = read_json(&tables().join("rows/cases.json"));
    let tokenizers = our_tokenizers(&cases["tokenizers"], folder.path());
    let expressions = our_expressions(folder.path());
    let chats = our_chats(&cases["chats"], folder.path());
    let tokenized = our_tokenized(&cases["tokenized"], folder.path());
    std::fs::write(folder.path().join("ours.json"), tokenized.to_string()).unwrap();
    let type_cases = read_json(&tables().join("rows/types.json"));
    let types = ["plain", "begun"].map(|name| {
        let dir = typed_dir(folder.path(), name);
        (format!("types of {name}"), our_types(&type_cases, &dir))
    });

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/rows.py");
    let status = Command::new(python()).arg(script).arg(folder.path()).env("HF_HUB_OFFLINE", "1").status();
    assert!(status.unwrap().success());
    let right = read_json(&folder.path().join("right.json"));

    let mut wrong = Vec::new();
    let mut compare = |name: String, ours: &Result<Value, String>, right: &Value| {
        if ours.as_ref() != Ok(right) {
            wrong.push(format!("{name}\n    ours  {ours:?}\n    right {right}"));
        }
    };
    for (index, (ours, case)) in tokenizers.iter().zip(list(&cases["tokenizers"])).enumerate() {
        let right = &right["tokenizers"][index];
        compare(case["name"].to_string(), ours, &right["ids"]);
        let names = right["names"].as_object().unwrap();
        let expected: String =
            names.iter().map(|(name, text)| format!("{name}={};", text.as_str().unwrap())).collect();
        let printed = our_names(folder.path(), index, &right["names"]);
        compare(format!("names of {}", case["name"]), &Ok(printed.into()), &expected.into());
    }
    for name in list(&right["classes"]) {
        let dir = folder.path().join("class");
        tokenizer_dir(
            &dir,
            &json!({"tokenizer_class": name}),
            &json!({"config.json": {"model_type": "llama"}}),
        );
        let is_built =
            ["Qwen2Tokenizer", "GPTNeoXTokenizer", "GPT2Tokenizer"].contains(&name.as_str().unwrap());
        let is_refused = Tokenizer::load(&dir).is_err();
        compare(format!("class {name} is refused"), &Ok(is_refused.into()), &(!is_built).into());
    }
    let lines = std::fs::read_to_string(tables().join("rows/expressions.txt")).unwrap();
    for ((ours, right), line) in expressions.iter().zip(list(&right["expressions"])).zip(lines.lines()) {
        // An input that transformers cannot render has no right value; ours is one line or a text.
        if right.is_string() {
            compare(line.into(), ours, right);
        } else {
            compare(format!("{line}: transformers fails"), &Ok(Value::Null), right);
        }
    }
    for ((ours, right), case) in chats.iter().zip(list(&right["chats"])).zip(list(&cases["chats"])) {
        let plain = |row: &Value| json!({"ids": row["ids"], "mask": row["mask"]});
        compare(case["name"].to_string(), ours, &list(right).iter().map(plain).collect());
    }
    for (name, ours) in &types {
        for ((ours, right), case) in ours.iter().zip(list(&right[name])).zip(list(&type_cases)) {
            let right = json!({"ids": right["ids"], "mask": right["mask"]});
            compare(format!("{name}: {}", case["name"]), ours, &right);
        }
    }
    for (losses, case) in list(&right["tokenized"]).iter().zip(list(&cases["tokenized"])) {
        let [ours, right] = ["ours", "right"].map(|whose| losses[whose].as_f64().unwrap());
        if (ours - right).abs() > 2e-5 * right.abs() {
            compare(case["name"].to_string(), &Ok(ours.into()), &right.into());
        }
    }
    let compared = tokenizers.len() + expressions.len() + chats.len() + list(&cases["tokenized"]).len();
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared >= 120, "only {compared} inputs");
}

#[test]
fn tokenizer_files_that_cannot_be_honoured_are_refused_in_one_line() {
    let folder = TempDir::new().unwrap();
    let cases = read_json(&tables().join("rows/cases.json"));
    for case in list(&cases["refused_tokenizers"]) {
        let dir = folder.path().join("refused");
        let _ = std::fs::remove_dir_all(&dir);
        tokenizer_dir(&dir, &case["config"], &case["files"]);
        let error = Tokenizer::load(&dir).unwrap_err();
        assert!(error.is_input());
        let message = error.to_string();
        let (file, problem) = message.split_once(".json: ").expect(&message);
        assert!(file.starts_with(dir.to_str().unwrap()) && !message.contains('\n'), "{message}");
        assert!(problem.starts_with(case["name"].as_str().unwrap()), "{message}");
    }
}

#[test]
fn folders_without_a_tokenizer_are_named_as_what_they_are() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let load = |dir: &Path| Tokenizer::load(dir).unwrap_err().to_string();
    assert!(load(&at("nowhere")).ends_with(
        "nowhere: no such folder; set model.tokenizer_path to the folder that has tokenizer.json"
    ));
    std::fs::write(at("file"), "x").unwrap();
    assert!(load(&at("file")).contains("file: a file; set model.tokenizer_path"));
    std::fs::create_dir(at("empty")).unwrap();
    assert!(load(&at("empty")).contains("empty: no tokenizer.json; copy it here"));
    for (name, form) in [
        ("sentencepiece", "tokenizer.model"),
        ("xlm", "sentencepiece.bpe.model"),
        ("mistral", "tekken.json"),
        ("gpt2", "vocab.json"),
        ("qwen", "qwen.tiktoken"),
    ] {
        std::fs::create_dir(at(name)).unwrap();
        std::fs::write(at(name).join(form), "x").unwrap();
        let message = load(&at(name));
        assert!(
            message.contains(&format!("{form} but no tokenizer.json; convert it once: python -c")),
            "{message}"
        );
    }
    std::fs::create_dir(at("pointer")).unwrap();
    std::fs::write(
        at("pointer/tokenizer.json"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(load(&at("pointer")).contains("tokenizer.json: a pointer of Git LFS"));

    // The same of a data set, whose template is missing too.
    let path = at("data.jsonl");
    std::fs::write(&path, FIRST).unwrap();
    let error =
        Dataset::open(&rows_of(&path, DatasetType::Chat), Some(&at("nowhere")), 10, 0, 1).unwrap_err();
    assert!(error.to_string().contains("nowhere: no such folder"), "{error}");
}

#[test]
fn counts_of_what_nothing_is_trained_on_are_said_once() {
    let folder = TempDir::new().unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    tokenizer_dir(folder.path(), &json!({"chat_template": template}), &json!({}));
    let path = folder.path().join("data.jsonl");
    let remarks = |lines: &[Value], kind, turns| {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let cache = folder.path().join("cache");
        let args = DataArgs { dataset_prepared_path: Some(cache), turns, ..rows_of(&path, kind) };
        let first =
            Dataset::open(&args, Some(folder.path()), 1000, 0, 1).map_err(|error| error.to_string())?;
        let again = Dataset::open(&args, Some(folder.path()), 1000, 0, 1).unwrap();
        assert_eq!(first.summary(), again.summary());
        Ok::<_, String>(first.summary().remarks.iter().map(|(_, remark)| remark.clone()).collect::<Vec<_>>())
    };
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let good = json!({"messages": [message("user", "a"), message("assistant", "b")]});
    let gpt = json!({"id": 1, "source": "x", "messages": [message("human", "a"), message("gpt", "b")]});
    let thought = json!({"id": 2, "parallel_tool_calls": true, "messages": [
        {"role": "user", "content": "a", "name": "Bo"}, {"role": "assistant", "content": "b", "reasoning_content": "c", "weight": 1}]});
    assert_eq!(remarks(std::slice::from_ref(&good), DatasetType::Chat, Turns::All), Ok(vec![]));
    assert_eq!(
        remarks(&[good, gpt.clone(), gpt.clone(), thought], DatasetType::Chat, Turns::All),
        Ok(vec![
            "fields that nothing reads: id (3 rows), source (2 rows)".into(),
            "fields of messages that the chat template does not name: name (1 message), reasoning_content (1 message)"
                .into(),
            "roles without a loss, which only messages of role assistant have: gpt (2 messages), human (2 messages)"
                .into(),
            "2 of 4 chats have no assistant message with a loss".into(),
        ])
    );
    assert_eq!(
        remarks(&[gpt], DatasetType::Chat, Turns::All).unwrap_err(),
        format!(
            "{}: nothing can be learned from it: no token has a loss; only messages of role assistant have one, and \
             there are gpt (1 message), human (1 message)",
            path.display()
        )
    );
    let calls = json!({"messages": [message("user", "a"),
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}, message("tool", "1"), message("assistant", "b"),
        message("user", ""), {"role": "assistant", "content": "", "tool_calls": []}]});
    assert_eq!(
        remarks(std::slice::from_ref(&calls), DatasetType::Chat, Turns::All),
        Ok(vec![
            "fields of messages that the chat template does not name: tool_calls (2 messages)".into(),
            "1 message of the assistant's would teach it to say nothing: content is empty, and the chat template \
             leaves the rest out (tool_calls, for one); take a template that writes it, or give them weight 0"
                .into(),
        ])
    );
    let misspelt =
        json!({"messages": [message("user", "a"), {"role": "assistant", "content": "b", "wieght": 0}]});
    let refused = remarks(&[misspelt], DatasetType::Chat, Turns::All).unwrap_err();
    assert!(refused.contains("messages[1].wieght") && refused.contains("weight, train"), "{refused}");
    let padded = json!({"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "idx": 7});
    assert_eq!(
        remarks(&[padded.clone(), padded], DatasetType::Tokenized, Turns::All),
        Ok(vec![
            "fields that nothing reads: idx (2 rows)".into(),
            "attention_mask: 4 tokens of padding in 2 rows dropped; the first token behind it has no loss"
                .into(),
        ])
    );
    let silent = json!({"input_ids": [1, 2], "labels": [-100, -100]});
    assert!(
        remarks(&[silent], DatasetType::Tokenized, Turns::All)
            .unwrap_err()
            .contains("nothing can be learned")
    );
}

#[test]
fn every_key_of_a_row_is_understood_harmless_or_refused() {
    let folder = TempDir::new().unwrap();
    tokenizer_dir(
        folder.path(),
        &json!({"chat_template": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"}),
        &json!({}),
    );
    let ids = json!({"input_ids": [5, 6, 7, 8]});
    let chat =
        json!({"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]});
    // A value other than the neutral one.
    let ones = json!([0, 1, 1, 1]);
    let keys: [(&str, &Value, Value); 36] = [
        ("labels", &ids, json!([-100, -100, 7, 8])),
        ("attention_mask", &ids, ones.clone()),
        ("loss_mask", &ids, json!([0, 0, 1, 1])),
        ("assistant_masks", &ids, json!([0, 0, 1, 1])),
        ("completion_mask", &ids, json!([0, 0, 1, 1])),
        ("position_ids", &ids, json!([0, 1, 0, 1])),
        ("token_type_ids", &ids, ones.clone()),
        ("special_tokens_mask", &ids, ones.clone()),
        ("offset_mapping", &ids, json!([[0, 1]])),
        ("length", &ids, json!(3)),
        ("num_tokens", &ids, json!(3)),
        ("seq_lengths", &ids, json!([2, 2])),
        ("document_ids", &ids, json!([0, 0, 1, 1])),
        ("segment_ids", &ids, json!([0, 0, 1, 1])),
        ("cu_seqlens", &ids, json!([0, 2, 4])),
        ("weight", &ids, json!(0.5)),
        ("loss_weights", &ids, json!([1, 2, 1, 1])),
        ("pixel_values", &ids, json!([[1.0]])),
        ("inputs_embeds", &ids, json!([[1.0]])),
        ("decoder_input_ids", &ids, json!([1])),
        ("chosen_input_ids", &ids, json!([1])),
        ("anything", &ids, json!("x")),
        ("tools", &chat, json!([])),
        ("chosen", &chat, json!([])),
        ("completion", &chat, json!("x")),
        ("images", &chat, json!(["x"])),
        ("videos", &chat, json!(["x"])),
        ("audio", &chat, json!("x")),
        ("chat_template_kwargs", &chat, json!({"enable_thinking": false})),
        ("chat_template", &chat, json!("x")),
        ("documents", &chat, json!([])),
        ("system", &chat, json!("x")),
        ("functions", &chat, json!([])),
        ("weight", &chat, json!(0)),
        ("parallel_tool_calls", &chat, json!(true)),
        ("anything", &chat, json!("x")),
    ];
    let harmless =
        ["special_tokens_mask", "offset_mapping", "length", "num_tokens", "parallel_tool_calls", "tools"];
    for (key, base, value) in keys {
        let kind = if base.get("messages").is_some() { DatasetType::Chat } else { DatasetType::Tokenized };
        let plain = open(folder.path(), &base.to_string(), kind, Turns::All, 1000).unwrap();
        let mut row: Map<String, Value> = base.as_object().unwrap().clone();
        row.insert(key.into(), value);
        match open(folder.path(), &Value::Object(row).to_string(), kind, Turns::All, 1000) {
            Err(message) => {
                assert!(message.contains(&format!(":1: {key}")) && !message.contains('\n'), "{message}")
            }
            Ok((rows, _)) if rows != plain.0 => {}
            Ok((_, remarks)) => {
                let said = remarks.iter().any(|remark| remark.contains(key));
                assert!(said != harmless.contains(&key), "{key}: {remarks:?}");
            }
        }
    }
}
