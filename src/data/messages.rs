//! A `chat` line: its messages, and which of them are trained.

use super::{Chat, LineProblem, integers, notes::Notes, source::wrong};
use crate::config::misspelt;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

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

const REFUSED: [(&str, &str); 18] = [
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
    ("functions", "not read: write them as `tools`"),
    ("function_call", "not read: write it as `tool_calls` of a message"),
    ("weight", "weights of rows are not built; give messages a weight of 0 or 1"),
    ("sample_weight", "weights of rows are not built; give messages a weight of 0 or 1"),
    ("train_on_inputs", "read for all rows at once: set data.train_on_inputs"),
    ("attention_mask", "read of type tokenized alone"),
];

/// Fields of a row that change nothing: an option of the service that made the answers.
const HARMLESS: [&str; 1] = ["parallel_tool_calls"];

/// Fields that hold the messages, the first that a row has.
const LISTS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Roles of ShareGPT's messages, which have `from` and `value`.
const ROLES: [(&str, &str); 9] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

/// Names of a data set's messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping<'a> {
    /// Our field of a message to the file's.
    pub properties: &'a BTreeMap<String, String>,
    /// Our role to the file's.
    pub roles: &'a BTreeMap<String, Vec<String>>,
}

impl Mapping<'_> {
    /// No names but those of `messages` and ShareGPT.
    pub fn none() -> Mapping<'static> {
        static PROPERTIES: BTreeMap<String, String> = BTreeMap::new();
        static ROLES: BTreeMap<String, Vec<String>> = BTreeMap::new();
        Mapping { properties: &PROPERTIES, roles: &ROLES }
    }

    /// Gives message `index` the fields and the role that templates know.
    fn apply(self, index: usize, message: &mut Value) -> Result<(), LineProblem> {
        let Value::Object(fields) = message else { return Ok(()) };
        for (ours, theirs) in self.properties {
            if let Some(value) = (ours != theirs).then(|| fields.swap_remove(theirs)).flatten() {
                fields.insert(ours.clone(), value);
            }
        }
        let is_sharegpt = !fields.contains_key("role") && fields.contains_key("from");
        if is_sharegpt {
            for (ours, theirs) in [("role", "from"), ("content", "value")] {
                if let Some(value) = fields.swap_remove(theirs) {
                    fields.insert(ours.into(), value);
                }
            }
        }
        let Some(role) = fields.get("role").and_then(Value::as_str) else { return Ok(()) };
        let named = self.roles.iter().find(|(_, theirs)| theirs.iter().any(|name| name == role));
        let known = || ROLES.iter().find(|(theirs, _)| is_sharegpt && *theirs == role).map(|found| found.1);
        if let Some(ours) = named.map(|found| found.0.as_str()).or_else(known) {
            fields.insert("role".into(), ours.into());
        } else if is_sharegpt && role == "function_call" {
            call(index, fields)?;
        }
        Ok(())
    }
}

/// Makes ShareGPT's `function_call`, whose text is `{"name": …, "arguments": …}`, a call of a tool.
fn call(index: usize, fields: &mut Map<String, Value>) -> Result<(), LineProblem> {
    let content = fields.get("content").cloned().unwrap_or_default();
    let function = match &content {
        Value::String(text) => {
            serde_json::from_slice(&integers::quoted(text.as_bytes())?).unwrap_or_default()
        }
        other => other.clone(),
    };
    if !function["name"].is_string() {
        let field = format!("messages[{index}].content");
        return Err(wrong(&field, "a call as JSON, {\"name\": …, \"arguments\": …}", &content));
    }
    fields.insert("role".into(), "assistant".into());
    fields.insert("content".into(), "".into());
    fields.insert("tool_calls".into(), json!([{ "type": "function", "function": function }]));
    Ok(())
}

/// Reads a line of `messages`; see [`chat_of`].
#[cfg(test)]
fn parse_chat(line: &[u8], notes: &mut Notes) -> Result<Chat, LineProblem> {
    chat_of(super::source::parse_object(&integers::quoted(line)?)?, Mapping::none(), notes)
}

/// The chat of a row: `messages` (or `conversations`), each with a `role`, and `content` that is a string, a list of
/// parts or null (or absent beside `tool_calls`); optional `tools`, also as JSON in a string, and `system`, a first
/// message. Messages with `from` and `value` are ShareGPT's. All fields of a message reach the template.
pub(crate) fn chat_of(
    mut object: Map<String, Value>,
    mapping: Mapping,
    notes: &mut Notes,
) -> Result<Chat, LineProblem> {
    let name = LISTS.into_iter().find(|name| object.contains_key(*name));
    let mut messages = match name.map(|name| (name, object.swap_remove(name))) {
        Some((_, Some(Value::Array(messages)))) => messages,
        Some((name, Some(other))) => return Err(wrong(name, "a list of messages", &other)),
        _ => return Err(LineProblem::missing("messages", &object, hint(&object, "messages"))),
    };
    if messages.is_empty() {
        return Err(LineProblem::Type {
            field: "messages".into(),
            expected: "at least one message",
            found: "none".into(),
        });
    }
    for (index, message) in messages.iter_mut().enumerate() {
        mapping.apply(index, message)?;
        check_message(index, message)?;
    }
    let tools = tools(object.swap_remove("tools").unwrap_or_default())?;
    if let Some(system) = object.swap_remove("system").filter(|system| !system.is_null() && system != "") {
        if !system.is_string() {
            return Err(wrong("system", "a text", &system));
        }
        if messages[0]["role"] == "system" {
            return Err(LineProblem::Contradiction {
                one: "system is given".into(),
                other: "messages[0] is of role system".into(),
            });
        }
        messages.insert(0, json!({ "role": "system", "content": system }));
    }
    notes.count_fields(&object, &HARMLESS, &REFUSED)?;
    Ok(Chat { messages, tools })
}

/// The tools of a chat.
fn tools(tools: Value) -> Result<Option<Value>, LineProblem> {
    match tools {
        Value::Null => Ok(None),
        Value::String(text) if text.trim().is_empty() => Ok(None),
        Value::String(text) if text.trim_start().starts_with('[') => {
            let parsed = serde_json::from_slice(&integers::quoted(text.as_bytes())?);
            let problem = |error: serde_json::Error| error.to_string();
            parsed
                .map(Some)
                .map_err(|error| LineProblem::Cell { field: "tools".into(), problem: problem(error) })
        }
        Value::Array(_) => Ok(Some(tools)),
        other => Err(wrong("tools", "a list of tools", &other)),
    }
}

/// The type that reads a row in which `field` is missing.
pub(super) fn hint(row: &Map<String, Value>, field: &str) -> &'static str {
    let has = |name: &str| name != field && row.get(name).is_some_and(|value| !value.is_null());
    if has("input_ids") {
        "; type tokenized reads `input_ids`"
    } else if has("messages") {
        "; type chat reads `messages`"
    } else if has("conversations") {
        "; type chat reads `conversations`"
    } else if has("prompt") && has("completion") {
        "; type completion reads `prompt` and `completion`"
    } else if has("instruction") && has("output") {
        "; type alpaca reads `instruction` and `output`"
    } else if has("text") {
        "; type text reads `text`"
    } else {
        ""
    }
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

/// Switches the losses of the assistant's messages off.
pub(super) fn switch_off(messages: &mut [Value]) {
    for message in messages.iter_mut().filter(|message| message["role"] == "assistant") {
        clear_switches(message);
        message["train"] = json!(false);
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
            (
                r#"{"text": "a", "id": 1}"#,
                "expected field `messages`, found `text`, `id`; type text reads `text`",
            ),
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
                r#"{"messages": [{"role": "system", "content": "x"}], "system": "a"}"#,
                "system is given, but messages[0] is of role system",
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

    #[test]
    fn messages_of_other_forms_become_those_that_templates_know() {
        let parsed = |line: Value, mapping: Mapping| {
            chat_of(line.as_object().unwrap().clone(), mapping, &mut Notes::default())
        };
        let sharegpt = json!({"system": "s", "tools": "[{\"name\": \"f\"}]", "conversations": [
            {"from": "human", "value": "a", "weight": null},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ]});
        let chat = parsed(sharegpt, Mapping::none()).unwrap();
        assert_eq!(chat.tools, Some(json!([{"name": "f"}])));
        let expected = json!([
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a", "weight": null},
            {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ]);
        assert_eq!(json!(chat.messages), expected);

        let properties = [("role", "who"), ("content", "says")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let roles =
            [("user".to_owned(), vec!["me".to_owned()]), ("assistant".to_owned(), vec!["it".to_owned()])];
        let (properties, roles) = (properties.into(), roles.into());
        let line = json!({"messages": [{"who": "me", "says": "a"}, {"who": "it", "says": "b"}]});
        let chat = parsed(line, Mapping { properties: &properties, roles: &roles }).unwrap();
        let expected = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        assert_eq!(json!(chat.messages), expected);

        let call = json!({"conversations": [{"from": "function_call", "value": "f(1)"}]});
        let error = parsed(call, Mapping::none()).unwrap_err().to_string();
        assert!(error.starts_with("messages[0].content: expected a call as JSON"), "{error}");
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
