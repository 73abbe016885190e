//! Data files: which there are, their lines, and what a line must hold. Nothing here trusts its input.

use super::{Chat, DataError, IGNORE_INDEX, LineProblem};
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

/// The files of a dataset: `path` itself, or the .jsonl files of the folder (not of its subfolders) by name.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    if !std::fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|extension| extension == "jsonl") && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(DataError::NoFiles { path: path.into() });
    }
    files.sort();
    Ok(files)
}

/// Calls `visit` with every line that is not blank; what it finds wrong becomes an error naming file and line.
pub(crate) fn for_each_line(
    path: &Path,
    mut visit: impl FnMut(&[u8]) -> Result<(), LineProblem>,
) -> Result<(), DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
    let mut buffer = Vec::new();
    for line in 1.. {
        buffer.clear();
        if reader.read_until(b'\n', &mut buffer).map_err(io)? == 0 {
            break;
        }
        let text = if line == 1 { buffer.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&buffer) } else { &buffer };
        let text = text.trim_ascii();
        if !text.is_empty() {
            visit(text).map_err(|problem| DataError::Line { path: path.into(), line, problem })?;
        }
    }
    Ok(())
}

/// Token ids of a sample with aligned labels, both checked against the vocabulary.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TokenSample {
    pub tokens: Vec<u32>,
    pub labels: Vec<i64>,
}

/// A `tokenized` line: `input_ids`, and `labels` of the same length holding token ids or -100. Without
/// `labels` (or with null) every token is trained: labels are the input ids.
pub(crate) fn parse_tokenized(line: &[u8], vocab_size: usize) -> Result<TokenSample, LineProblem> {
    let object = parse_object(line)?;
    let ids = integers(&object, "input_ids")?.ok_or(LineProblem::Missing { field: "input_ids".into() })?;
    let tokens = check_tokens(&ids, vocab_size, "input_ids")?;
    let labels = integers(&object, "labels")?.unwrap_or_else(|| ids.clone());
    if labels.len() != ids.len() {
        return Err(LineProblem::LabelsLength { labels: labels.len(), tokens: ids.len() });
    }
    for (index, &value) in labels.iter().enumerate() {
        if value != IGNORE_INDEX && !in_vocabulary(value, vocab_size) {
            return Err(LineProblem::Vocabulary { field: format!("labels[{index}]"), value, vocab_size });
        }
    }
    Ok(TokenSample { tokens, labels })
}

/// Checks ids against the vocabulary; an empty list is an error too.
pub(crate) fn check_tokens(ids: &[i64], vocab_size: usize, field: &str) -> Result<Vec<u32>, LineProblem> {
    if ids.is_empty() {
        return Err(LineProblem::NoTokens);
    }
    let check = |(index, &value): (usize, &i64)| match u32::try_from(value) {
        Ok(token) if in_vocabulary(value, vocab_size) => Ok(token),
        _ => Err(LineProblem::Vocabulary { field: format!("{field}[{index}]"), value, vocab_size }),
    };
    ids.iter().enumerate().map(check).collect()
}

/// A `chat` line: `messages`, each with a `role`, and `content` that is a string, a list of parts or null (or
/// absent beside `tool_calls`); optional `tools`. All fields of a message reach the template.
pub(crate) fn parse_chat(line: &[u8]) -> Result<Chat, LineProblem> {
    let mut object = parse_object(line)?;
    let messages = match object.swap_remove("messages") {
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong("messages", "a list of messages", &other)),
        None => return Err(LineProblem::Missing { field: "messages".into() }),
    };
    if messages.is_empty() {
        return Err(LineProblem::Type {
            field: "messages".into(),
            expected: "at least one message",
            found: "none".into(),
        });
    }
    for (index, message) in messages.iter().enumerate() {
        check_message(index, message)?;
    }
    let tools = match object.swap_remove("tools") {
        None | Some(Value::Null) => None,
        Some(tools @ Value::Array(_)) => Some(tools),
        Some(other) => return Err(wrong("tools", "a list of tools", &other)),
    };
    Ok(Chat { messages, tools })
}

fn check_message(index: usize, message: &Value) -> Result<(), LineProblem> {
    let field = |name: &str| format!("messages[{index}].{name}");
    let Value::Object(fields) = message else {
        return Err(wrong(&format!("messages[{index}]"), "an object with role and content", message));
    };
    match fields.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong(&field("role"), "a string", other)),
        None => return Err(LineProblem::Missing { field: field("role") }),
    }
    match fields.get("content") {
        Some(Value::String(_) | Value::Array(_) | Value::Null) => Ok(()),
        Some(other) => Err(wrong(&field("content"), "a string", other)),
        None if fields.contains_key("tool_calls") => Ok(()),
        None => Err(LineProblem::Missing { field: field("content") }),
    }
}

fn parse_object(line: &[u8]) -> Result<Map<String, Value>, LineProblem> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(wrong("line", "a JSON object", &other)),
        Err(error) => {
            let text = error.to_string();
            let problem = text.split(" at line ").next().unwrap_or(&text).to_string();
            Err(LineProblem::Json { column: error.column(), problem })
        }
    }
}

fn integers(object: &Map<String, Value>, field: &str) -> Result<Option<Vec<i64>>, LineProblem> {
    let values = match object.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(values)) => values,
        Some(other) => return Err(wrong(field, "a list of integers", other)),
    };
    let integer = |(index, value): (usize, &Value)| {
        value.as_i64().ok_or_else(|| wrong(&format!("{field}[{index}]"), "an integer", value))
    };
    values.iter().enumerate().map(integer).collect::<Result<_, _>>().map(Some)
}

fn in_vocabulary(value: i64, vocab_size: usize) -> bool {
    usize::try_from(value).is_ok_and(|value| value < vocab_size)
}

/// A type error that shows the value when it is short, otherwise its kind.
fn wrong(field: &str, expected: &'static str, found: &Value) -> LineProblem {
    let found = match found {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.chars().count() > 40 => "a long string".into(),
        other => other.to_string(),
    };
    LineProblem::Type { field: field.into(), expected, found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn missing_labels_train_every_token() {
        let sample = parse_tokenized(br#"{"input_ids": [1, 2, 3]}"#, 4).unwrap();
        assert_eq!(sample, TokenSample { tokens: vec![1, 2, 3], labels: vec![1, 2, 3] });
        let sample = parse_tokenized(br#"{"input_ids": [1, 2], "labels": [-100, 3], "id": "x"}"#, 4).unwrap();
        assert_eq!(sample.labels, [-100, 3]);
    }

    #[test]
    fn each_bad_line_says_what_is_wrong_and_where() {
        let cases: [(&str, &str); 13] = [
            ("{\"input_ids\": [1", "not valid JSON at column 16: EOF while parsing a list"),
            ("[1]", "line: expected a JSON object, got a list of 1"),
            ("{}", "expected field `input_ids`, found none"),
            ("{\"input_ids\": 3}", "input_ids: expected a list of integers, got 3"),
            ("{\"input_ids\": []}", "expected at least one token, found none"),
            ("{\"input_ids\": [1, \"a\"]}", "input_ids[1]: expected an integer, got \"a\""),
            ("{\"input_ids\": [1.5]}", "input_ids[0]: expected an integer, got 1.5"),
            ("{\"input_ids\": [4]}", "input_ids[0]: token id 4 is not in the model's vocabulary of 4"),
            ("{\"input_ids\": [-1]}", "input_ids[0]: token id -1 is not in the model's vocabulary of 4"),
            ("{\"input_ids\": [1], \"labels\": [1, 2]}", "labels: expected 1 values like input_ids, got 2"),
            ("{\"input_ids\": [1], \"labels\": [-1]}", "labels[0]: token id -1 is not in"),
            ("{\"input_ids\": [1], \"labels\": [9]}", "labels[0]: token id 9 is not in"),
            ("\u{1}", "not valid JSON at column 1: expected value"),
        ];
        for (line, expected) in cases {
            let message = parse_tokenized(line.as_bytes(), 4).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{line}: got {message:?}, expected {expected:?}");
        }
    }

    #[test]
    fn each_bad_chat_names_its_message() {
        let cases: [(&str, &str); 8] = [
            ("{}", "expected field `messages`, found none"),
            (r#"{"messages": {}}"#, "messages: expected a list of messages, got an object"),
            (r#"{"messages": []}"#, "messages: expected at least one message, got none"),
            (r#"{"messages": ["x"]}"#, "messages[0]: expected an object with role and content, got \"x\""),
            (r#"{"messages": [{"content": "x"}]}"#, "expected field `messages[0].role`, found none"),
            (r#"{"messages": [{"role": 1, "content": "x"}]}"#, "messages[0].role: expected a string, got 1"),
            (r#"{"messages": [{"role": "user"}]}"#, "expected field `messages[0].content`, found none"),
            (
                r#"{"messages": [{"role": "u", "content": "x"}], "tools": 1}"#,
                "tools: expected a list of tools, got 1",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(parse_chat(line.as_bytes()).unwrap_err().to_string(), expected, "{line}");
        }
        let call = r#"{"messages": [{"role": "assistant", "tool_calls": []}]}"#;
        assert!(parse_chat(call.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_tokenized(&bytes, 100);
            let _ = parse_chat(&bytes);
        }

        #[test]
        fn no_broken_json_makes_a_parser_panic(cut in 0usize..110, at in 0usize..110, byte in any::<u8>()) {
            let good = br#"{"messages":[{"role":"user","content":"a\u00e4\ud83d\ude00"}],"input_ids":[1,-2,3e5],"labels":[null,1]}"#;
            let mut line = good[..cut.min(good.len())].to_vec();
            if let Some(place) = line.get_mut(at) {
                *place = byte;
            }
            let _ = parse_tokenized(&line, 100);
            let _ = parse_chat(&line);
        }
    }
}
