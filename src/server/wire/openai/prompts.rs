//! Prompts of clients as token ids.

use super::{
    bodies::{Content, Message, Part, Prompt},
    fault::Refused,
};
use crate::{
    data::Chat,
    server::{app::App, fault::Fault, wire::sampling::check_ids},
};
use serde_json::{Map, Value};

/// Prompts of a request, at most.
const MOST_PROMPTS: usize = 1024;

/// A prompt of a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// `[tokens]`, at least one.
    pub ids: Vec<i64>,
    /// As it was sent, or as its ids are written.
    pub text: String,
}

/// The prompts of a completion.
///
/// # Errors
/// There are none or too many, or one has no token or a wrong one.
pub fn of_completion(app: &App, prompt: Prompt) -> Result<Vec<Read>, Refused> {
    let of_text = |text: String| {
        let ids = app.texts.encode(&text).map_err(of_prompt)?;
        Ok(Read { ids, text })
    };
    let of_ids = |ids: Vec<i64>| {
        check_ids("prompt", &ids, app.settings.vocab_size)?;
        if ids.is_empty() {
            return Err(Refused::field("prompt", "expected at least one token, got none"));
        }
        Ok(Read { text: app.texts.decode(&ids, false)?, ids })
    };
    let count = match &prompt {
        Prompt::Text(_) => 1,
        Prompt::Texts(texts) => texts.len(),
        Prompt::Ids(ids) => usize::from(!ids.is_empty()),
        Prompt::ListsOfIds(lists) => lists.len(),
    };
    if count == 0 || count > MOST_PROMPTS {
        return Err(Refused::field("prompt", format!("expected 1 to {MOST_PROMPTS} prompts, got {count}")));
    }
    match prompt {
        Prompt::Text(text) => Ok(vec![of_text(text)?]),
        Prompt::Texts(texts) => texts.into_iter().map(of_text).collect(),
        Prompt::Ids(ids) => Ok(vec![of_ids(ids)?]),
        Prompt::ListsOfIds(lists) => lists.into_iter().map(of_ids).collect(),
    }
}

/// A fault of a prompt names it, unless the server is at fault.
fn of_prompt(fault: Fault) -> Refused {
    match fault.status.is_server_error() {
        true => fault.into(),
        false => Refused::field("prompt", fault.detail),
    }
}

/// The ids of a chat up to where the assistant's answer begins.
///
/// # Errors
/// A message is wrong, or the chat template refuses the chat.
pub fn of_chat(app: &App, messages: Vec<Message>, tools: Option<Value>) -> Result<Vec<i64>, Refused> {
    if messages.is_empty() {
        return Err(Refused::field("messages", "expected at least one message, got none"));
    }
    let chat = Chat { messages: self::messages(messages)?, tools };
    let text = app.texts.template()?.render(&chat, true);
    let text = text.map_err(|error| Refused::field("messages", error))?;
    let ids = app.texts.encode(&text);
    ids.map_err(|fault| {
        if fault.status.is_server_error() { fault.into() } else { Refused::field("messages", fault.detail) }
    })
}

/// Messages as chat templates read them.
///
/// # Errors
/// The first that is wrong.
pub fn messages(messages: Vec<Message>) -> Result<Vec<Value>, Refused> {
    messages.into_iter().enumerate().map(|(index, message)| rendered(index, message)).collect()
}

/// A message as chat templates read them: content is a text, and a tool's arguments are an object.
fn rendered(index: usize, message: Message) -> Result<Value, Refused> {
    let place = |field: &str| format!("messages[{index}].{field}");
    let Message { role, content, mut more } = message;
    let role = match role.as_str() {
        // The newer name of the same.
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => &role,
        other => {
            let expected = "expected system, developer, user, assistant or tool";
            return Err(Refused::field(&place("role"), format!("{expected}, got {other:?}")));
        }
    };
    // Clients send answers back with all their fields.
    more.retain(|_, value| !value.is_null());
    if more.contains_key("audio") {
        return Err(Refused::field(&place("audio"), "the models here read text alone"));
    }
    if more.contains_key("function_call") {
        return Err(Refused::field(&place("function_call"), "write it as `tool_calls`"));
    }
    for call in more.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        read_arguments(call);
    }
    let content = match content {
        Some(content) => Value::String(text(index, content)?),
        None if more.contains_key("tool_calls") => Value::Null,
        None => {
            return Err(Refused::field(&place("content"), "expected a text or a list of parts, found none"));
        }
    };
    let fixed = [("role".to_owned(), role.into()), ("content".to_owned(), content)];
    Ok(Value::Object(fixed.into_iter().chain(more).collect()))
}

/// Templates write arguments as JSON, while clients send them as a text of it. One that is no object stays.
fn read_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    let read = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
    if let Some(object) = read {
        *arguments = Value::Object(object);
    }
}

/// The text of a message, its parts in lines.
fn text(index: usize, content: Content) -> Result<String, Refused> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let read = |(number, part): (usize, Part)| {
        let place = format!("messages[{index}].content[{number}]");
        match (part.kind.as_str(), part.text) {
            ("text", Some(text)) => Ok(text),
            ("text", None) => Err(Refused::field(&format!("{place}.text"), "expected a text, found none")),
            (kind, _) => {
                let reason = format!("{kind:?} is not read: the models here read text alone");
                Err(Refused::field(&format!("{place}.type"), reason))
            }
        }
    };
    Ok(parts.into_iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(message: Value) -> Result<Value, Refused> {
        rendered(2, serde_json::from_value(message).unwrap())
    }

    #[test]
    fn a_message_reaches_the_template_as_it_reads_them() {
        let parts = json!({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "refusal": null, "name": "x"});
        assert_eq!(read(parts), Ok(json!({"role": "system", "content": "a\nb", "name": "x"})));
        let call = |arguments: Value| json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
        let with = |calls: Value| json!({"role": "assistant", "content": null, "tool_calls": calls});
        assert_eq!(
            read(with(call(json!("{\"b\": 1, \"a\": [2]}")))),
            Ok(with(call(json!({"b": 1, "a": [2]}))))
        );
        assert_eq!(read(with(call(json!("none")))), Ok(with(call(json!("none")))));
    }

    #[test]
    fn a_wrong_message_is_named_by_its_place() {
        for (message, field) in [
            (json!({"role": "robot", "content": "a"}), "messages[2].role"),
            (json!({"role": "user"}), "messages[2].content"),
            (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[2].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[2].content[0].text"),
            (json!({"role": "assistant", "content": "a", "audio": {"id": "1"}}), "messages[2].audio"),
            (json!({"role": "assistant", "content": "a", "function_call": {}}), "messages[2].function_call"),
        ] {
            assert_eq!(read(message).unwrap_err().param.as_deref(), Some(field));
        }
    }
}
