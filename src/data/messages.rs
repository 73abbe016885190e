//! A `chat` line: its messages, and which of them are trained.

use super::{
    Chat, LineProblem, integers,
    notes::Notes,
    source::{parse_object, wrong},
};
use crate::config::misspelt;
use serde_json::{Map, Value};

/// Fields of a message that say whether it is trained, with the value that means no.
const SWITCHES: [(&str, bool); 7] = [
    ("weight", false),
    ("train", false),
    ("training", false),
    ("trainable", false),
    ("loss", false),
    ("loss_mask", false),
    ("masked", true),
];

/// Fields of a message that change the loss elsewhere and are not built here.
const REFUSED_OF_MESSAGES: [(&str, &str); 3] = [
    ("train_detail", "losses on parts of a message are not built; give train: false or split the message"),
    ("training_detail", "losses on parts of a message are not built; give train: false or split the message"),
    ("eot", "not read: the chat template ends every turn"),
];

const PAIRS: &str = "pairs are not read: give one answer a row, as `messages`";
const MEDIA: &str = "not read: the models here take text alone";
const TO_TEMPLATE: &str =
    "not handed to the chat template; write its value into the template or the messages";

const REFUSED: [(&str, &str); 19] = [
    ("chosen", PAIRS),
    ("rejected", PAIRS),
    ("completion", PAIRS),
    ("images", MEDIA),
    ("image", MEDIA),
    ("videos", MEDIA),
    ("video", MEDIA),
    ("audios", MEDIA),
    ("audio", MEDIA),
    ("chat_template_kwargs", TO_TEMPLATE),
    ("chat_template", TO_TEMPLATE),
    ("documents", TO_TEMPLATE),
    ("system", "not read: write it as a first message of role system"),
    ("functions", "not read: write them as `tools`"),
    ("function_call", "not read: write it as `tool_calls` of a message"),
    ("weight", "weights of rows are not built; give messages a weight of 0 or 1"),
    ("sample_weight", "weights of rows are not built; give messages a weight of 0 or 1"),
    ("train_on_inputs", "read for all rows at once: set data.train_on_inputs"),
    ("attention_mask", "read of type tokenized alone"),
];

/// Fields of a row that change nothing: an option of the service that made the answers.
const HARMLESS: [&str; 1] = ["parallel_tool_calls"];

/// Reads a line: `messages`, each with a `role`, and `content` that is a string, a list of parts or null (or absent
/// beside `tool_calls`); optional `tools`. All fields of a message reach the template.
pub(crate) fn parse_chat(line: &[u8], notes: &mut Notes) -> Result<Chat, LineProblem> {
    let mut object = parse_object(&integers::quoted(line)?)?;
    let messages = match object.get("messages") {
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong("messages", "a list of messages", other)),
        None => return Err(missing(&object)),
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
    match object.get("tools") {
        None | Some(Value::Null | Value::Array(_)) => {}
        Some(other) => return Err(wrong("tools", "a list of tools", other)),
    }
    let known = [&["messages", "tools"][..], &HARMLESS].concat();
    notes.count_fields(&object, &known, &REFUSED)?;
    let tools = object.swap_remove("tools").filter(|tools| !tools.is_null());
    let Some(Value::Array(messages)) = object.swap_remove("messages") else { return Err(missing(&object)) };
    Ok(Chat { messages, tools })
}

/// A row without `messages`, with the fields that it has.
fn missing(row: &Map<String, Value>) -> LineProblem {
    let has = |field: &str| row.contains_key(field);
    let hint = if has("input_ids") {
        "; type tokenized reads `input_ids`"
    } else if ["conversations", "conversation", "text", "instruction", "prompt"].into_iter().any(has) {
        "; write each row as {\"messages\": [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", …}]}"
    } else {
        ""
    };
    LineProblem::missing("messages", row, hint)
}

fn check_message(index: usize, message: &Value) -> Result<(), LineProblem> {
    let field = |name: &str| format!("messages[{index}].{name}");
    let Value::Object(fields) = message else {
        return Err(wrong(&format!("messages[{index}]"), "an object with role and content", message));
    };
    match fields.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong(&field("role"), "a string", other)),
        None => return Err(LineProblem::missing(&field("role"), fields, "")),
    }
    match fields.get("content") {
        Some(Value::String(_) | Value::Array(_) | Value::Null) => {}
        Some(other) => return Err(wrong(&field("content"), "a string", other)),
        None if fields.contains_key("tool_calls") => {}
        None => return Err(LineProblem::missing(&field("content"), fields, "")),
    }
    for (name, reason) in REFUSED_OF_MESSAGES {
        if fields.get(name).is_some_and(|value| !value.is_null()) {
            return Err(LineProblem::Refused { field: field(name), reason });
        }
    }
    match switch(index, fields)? {
        Some((name, true)) if fields["role"] != "assistant" => Err(LineProblem::Refused {
            field: field(name),
            reason: "only messages of role assistant are trained; leave it out, or say that it has no loss",
        }),
        _ => Ok(()),
    }
}

/// True for an assistant's message that is not switched off.
pub(crate) fn is_trained(index: usize, message: &Value) -> Result<bool, LineProblem> {
    let assistant = message.get("role").and_then(Value::as_str) == Some("assistant");
    let Value::Object(fields) = message else { return Ok(false) };
    Ok(assistant && !matches!(switch(index, fields)?, Some((_, false))))
}

/// The first message whose field switches its loss off although its role is the assistant's, as `messages[i].field`.
pub(crate) fn switched_off(messages: &[Value]) -> Result<Option<String>, LineProblem> {
    for (index, message) in messages.iter().enumerate() {
        let Value::Object(fields) = message else { continue };
        if fields.get("role").and_then(Value::as_str) == Some("assistant")
            && let Some((name, false)) = switch(index, fields)?
        {
            return Ok(Some(format!("messages[{index}].{name}")));
        }
    }
    Ok(None)
}

/// The field that says whether a message is trained, and what it says. Two that disagree are an error.
fn switch(index: usize, fields: &Map<String, Value>) -> Result<Option<(&'static str, bool)>, LineProblem> {
    let mut found: Option<(&'static str, bool)> = None;
    for (name, meaning) in SWITCHES {
        let value = match fields.get(name) {
            None | Some(Value::Null) => continue,
            Some(value) => value,
        };
        let place = |name: &str| format!("messages[{index}].{name}");
        let said = match (value.as_bool(), value.as_f64()) {
            (Some(said), _) => said,
            (None, Some(0.0)) => false,
            (None, Some(1.0)) => true,
            _ => return Err(wrong(&place(name), "0 or 1", value)),
        };
        let trained = said != meaning;
        match found {
            Some((other, before)) if before != trained => {
                return Err(LineProblem::Contradiction {
                    one: format!("{} is {}", place(other), fields[other]),
                    other: format!("{} is {value}", place(name)),
                });
            }
            _ => found = found.or(Some((name, trained))),
        }
    }
    Ok(found)
}

/// Takes the fields away that say whether a message is trained.
pub(crate) fn clear_switches(message: &mut Value) {
    if let Value::Object(fields) = message {
        fields.retain(|field, _| !is_switch(field));
    }
}

/// True for a message that the assistant says nothing in, though it has fields of `unnamed`, which the template leaves
/// out: calls of tools, for one.
pub(crate) fn is_emptied(message: &Value, unnamed: &[&String]) -> bool {
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(parts) => parts.is_empty(),
        _ => false,
    };
    is_empty(&message["content"]) && unnamed.iter().any(|&field| !is_empty(&message[field]))
}

/// Refuses a field of message `index` that is nearly one of those that say what is trained.
pub(crate) fn check_spelling(index: usize, field: &str) -> Result<(), LineProblem> {
    match misspelt(field, SWITCHES.iter().map(|(name, _)| *name)) {
        None => Ok(()),
        Some(_) => Err(LineProblem::Refused {
            field: format!("messages[{index}].{field}"),
            reason: "nearly a field that says whether a message has a loss (weight, train, trainable, loss); correct \
                     or leave it out",
        }),
    }
}

/// Fields of messages that a template need not name: they say what is trained.
pub(crate) fn is_switch(field: &str) -> bool {
    SWITCHES.iter().any(|(name, _)| *name == field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn each_bad_chat_names_its_message() {
        let cases: [(&str, &str); 19] = [
            ("{}", "expected field `messages`, found none"),
            (
                r#"{"input_ids": [1]}"#,
                "expected field `messages`, found `input_ids`; type tokenized reads `input_ids`",
            ),
            (r#"{"text": "a", "id": 1}"#, "expected field `messages`, found `text`, `id`; write each row as"),
            (r#"{"messages": {}}"#, "messages: expected a list of messages, got an object"),
            (r#"{"messages": []}"#, "messages: expected at least one message, got none"),
            (r#"{"messages": ["x"]}"#, "messages[0]: expected an object with role and content, got \"x\""),
            (r#"{"messages": [{"content": "x"}]}"#, "expected field `messages[0].role`, found `content`"),
            (r#"{"messages": [{"role": 1, "content": "x"}]}"#, "messages[0].role: expected a string, got 1"),
            (r#"{"messages": [{"role": "user"}]}"#, "expected field `messages[0].content`, found `role`"),
            (
                r#"{"messages": [{"role": "user", "content": 18446744073709551616}]}"#,
                "messages[0].content: expected a string, got 18446744073709551616",
            ),
            (
                r#"{"messages": [{"role": "u", "content": "x"}], "tools": 1}"#,
                "tools: expected a list of tools, got 1",
            ),
            (
                r#"{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}"#,
                "messages[0].weight: expected 0 or 1, got 0.5",
            ),
            (
                r#"{"messages": [{"role": "assistant", "content": "x", "weight": 0, "train": true}]}"#,
                "messages[0].weight is 0, but messages[0].train is true",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x", "train": true}]}"#,
                "messages[0].train: only messages of role assistant are trained",
            ),
            (
                r#"{"messages": [{"role": "assistant", "content": "x", "train_detail": []}]}"#,
                "messages[0].train_detail: losses on parts of a message",
            ),
            (r#"{"messages": [{"role": "user", "content": "x"}], "images": ["a"]}"#, "images: not read"),
            (
                r#"{"messages": [{"role": "user", "content": "x"}], "system": "a"}"#,
                "system: not read: write it",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x"}], "chosen": "a"}"#,
                "chosen: pairs are not read",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": 1}}"#,
                "chat_template_kwargs: not handed to the chat template",
            ),
        ];
        for (line, expected) in cases {
            let message = parse_chat(line.as_bytes(), &mut Notes::default()).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{line}: got {message:?}, expected {expected:?}");
        }
        let call = r#"{"messages": [{"role": "assistant", "tool_calls": []}]}"#;
        assert!(parse_chat(call.as_bytes(), &mut Notes::default()).is_ok());
    }

    #[test]
    fn a_switch_turns_an_assistant_message_off() {
        for (field, off) in [
            ("weight", json!(0)),
            ("weight", json!(0.0)),
            ("train", json!(false)),
            ("training", json!(false)),
            ("trainable", json!(false)),
            ("loss", json!(false)),
            ("loss_mask", json!(0)),
            ("masked", json!(true)),
        ] {
            let mut message = json!({"role": "assistant", "content": "x", field: off});
            assert_eq!(is_trained(0, &message), Ok(false), "{message}");
            message[field] = Value::Null;
            assert_eq!(is_trained(0, &message), Ok(true), "{message}");
        }
        assert_eq!(is_trained(0, &json!({"role": "user", "content": "x"})), Ok(false));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_chat(&bytes, &mut Notes::default());
        }

        #[test]
        fn no_broken_json_makes_a_parser_panic(cut in 0usize..140, at in 0usize..140, byte in any::<u8>()) {
            let good = br#"{"messages":[{"role":"user","content":"a\u00e4\ud83d\ude00","n":-18446744073709551616}],"input_ids":[1,-2,3e5]}"#;
            let mut line = good[..cut.min(good.len())].to_vec();
            if let Some(place) = line.get_mut(at) {
                *place = byte;
            }
            let _ = parse_chat(&line, &mut Notes::default());
        }
    }
}
