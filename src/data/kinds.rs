//! Types of rows: their detection from the fields of the first one, and rows of other types as chats or texts.

use super::{
    Chat, LineProblem,
    formats::Record,
    integers,
    messages::{self, Mapping},
    notes::Notes,
    preference,
    source::wrong,
};
use crate::config::{DatasetArgs, DatasetType};
use serde_json::{Map, Value};

type Fields = Map<String, Value>;

/// Fields that may be left out of a row although `columns` names them.
const OPTIONAL: [&str; 8] =
    ["input", "system", "tools", "labels", "attention_mask", "loss_mask", "position_ids", "history"];

/// Fields of lists, which a table of text holds as JSON.
const LISTS: [&str; 14] = [
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "conversation",
    "tools",
    "input_ids",
    "labels",
    "attention_mask",
    "loss_mask",
    "assistant_masks",
    "completion_mask",
    "position_ids",
    "token_type_ids",
];

/// Texts around an instruction: those of Stanford Alpaca, as axolotl and torchtune write them.
const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
                          context. Write a response that appropriately completes the request.\n\n";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately \
                             completes the request.\n\n";

/// A row that is no tokens yet.
#[derive(Debug, PartialEq)]
pub(super) enum Row {
    Chat(Chat),
    /// A text of which `trained` and all behind it has a loss, from this byte on.
    Text {
        text: String,
        trained: usize,
    },
}

/// The type of a data set whose first row has these fields, and the field that tells.
pub(super) fn detect(row: &Fields) -> Result<(DatasetType, &'static str), LineProblem> {
    let has = |field: &str| row.get(field).is_some_and(|value| !value.is_null());
    let all: [(&[&'static str], DatasetType); 8] = [
        (&["chosen", "rejected"], DatasetType::Preference),
        (&["input_ids"], DatasetType::Tokenized),
        (&["messages"], DatasetType::Chat),
        (&["conversations"], DatasetType::Chat),
        (&["conversation"], DatasetType::Chat),
        (&["prompt", "completion"], DatasetType::Completion),
        (&["instruction", "output"], DatasetType::Alpaca),
        (&["text"], DatasetType::Text),
    ];
    let fits = |(fields, _): &&(&[&str], DatasetType)| fields.iter().all(|field| has(field));
    match all.iter().find(fits) {
        Some((fields, kind)) => Ok((*kind, fields[0])),
        None => Err(LineProblem::no_type(row)),
    }
}

/// The name of a type.
pub(super) fn name(kind: DatasetType) -> String {
    format!("{kind:?}").to_lowercase()
}

/// True for a prompt of messages, also as JSON in a cell.
pub(super) fn is_of_messages(row: &Fields) -> bool {
    match row.get("prompt") {
        Some(Value::Array(_)) => true,
        Some(Value::String(text)) => text.starts_with("[{"),
        _ => false,
    }
}

/// True for a pair of answers that are messages.
pub(super) fn has_messages(row: &Fields) -> Result<bool, LineProblem> {
    preference::halves(row).map(|halves| halves.iter().any(is_of_messages))
}

/// The fields of a record under the names of its type: `columns` says which have others in the file.
pub(super) fn fields(record: &Record, entry: &DatasetArgs, kind: DatasetType) -> Result<Fields, LineProblem> {
    let is_tokens = kind == DatasetType::Tokenized;
    let mut row = if is_tokens { record.fields(Ok)? } else { record.fields(integers::quoted)? };
    for (ours, theirs) in &entry.columns {
        match row.swap_remove(theirs) {
            Some(value) => drop(row.insert(ours.clone(), value)),
            None if OPTIONAL.contains(&ours.as_str()) => {}
            None => {
                let hint = "; columns of the data set names it";
                return Err(LineProblem::missing(theirs, &row, hint));
            }
        }
    }
    if matches!(record, Record::Fields(_)) {
        LISTS.iter().try_for_each(|field| unfold(&mut row, field))?;
    }
    Ok(row)
}

/// Reads the list that a table of text holds as JSON.
fn unfold(row: &mut Fields, field: &str) -> Result<(), LineProblem> {
    let Some(Value::String(text)) = row.get(field) else { return Ok(()) };
    if text.trim().is_empty() {
        row.swap_remove(field);
        return Ok(());
    }
    if text.trim_start().starts_with(['[', '{']) {
        let quoted = integers::quoted(text.as_bytes())?;
        let value = serde_json::from_slice(&quoted)
            .map_err(|error| LineProblem::Cell { field: field.into(), problem: error.to_string() })?;
        row.insert(field.into(), value);
    }
    Ok(())
}

/// A row of any type but tokenized; of a pair one of its halves. `train_on_inputs` gives prompts a loss, too.
pub(super) fn row(
    fields: Fields,
    entry: &DatasetArgs,
    kind: DatasetType,
    train_on_inputs: bool,
    notes: &mut Notes,
) -> Result<Row, LineProblem> {
    let mapping = Mapping { properties: &entry.message_property_mappings, roles: &entry.roles };
    match kind {
        DatasetType::Alpaca => alpaca(fields, notes).map(Row::Chat),
        DatasetType::Completion | DatasetType::Preference => {
            completion(fields, mapping, train_on_inputs, notes)
        }
        DatasetType::Text => {
            notes.count_fields(&fields, &["text"], &[])?;
            Ok(Row::Text { text: text(&fields, "text")?.to_owned(), trained: 0 })
        }
        _ => messages::chat_of(fields, mapping, notes).map(Row::Chat),
    }
}

/// A field that is a text.
fn text<'a>(row: &'a Fields, field: &str) -> Result<&'a str, LineProblem> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text),
        None => Err(LineProblem::missing(field, row, messages::hint(row, field))),
        Some(Value::Null) => Err(LineProblem::null(field, "a text")),
        Some(other) => Err(wrong(field, "a text", other)),
    }
}

/// An instruction as a chat of two messages, behind `system` where that is given.
fn alpaca(row: Fields, notes: &mut Notes) -> Result<Chat, LineProblem> {
    let history = "earlier turns are not read of type alpaca: write the row as `messages`, of type chat";
    notes.count_fields(&row, &["instruction", "input", "output", "system"], &[("history", history)])?;
    let (instruction, output) = (text(&row, "instruction")?, text(&row, "output")?);
    let input = if row.get("input").is_none_or(Value::is_null) { "" } else { text(&row, "input")? };
    let mut chat = Chat::default();
    if row.get("system").is_some_and(|system| !system.is_null()) {
        let system = text(&row, "system")?;
        if !system.is_empty() {
            chat.add("system", system);
        }
    }
    chat.add("user", &instruct(instruction, input));
    chat.add("assistant", output);
    Ok(chat)
}

/// The prompt of an instruction.
fn instruct(instruction: &str, input: &str) -> String {
    match input {
        "" => format!("{WITHOUT_INPUT}### Instruction:\n{instruction}\n\n### Response:\n"),
        _ => format!("{WITH_INPUT}### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"),
    }
}

/// A prompt and its completion: both texts, or both messages.
fn completion(
    mut row: Fields,
    mapping: Mapping,
    train_on_inputs: bool,
    notes: &mut Notes,
) -> Result<Row, LineProblem> {
    for field in ["prompt", "completion"] {
        match row.get(field) {
            None => return Err(LineProblem::missing(field, &row, messages::hint(&row, field))),
            Some(Value::Null) => return Err(LineProblem::null(field, "a text or messages")),
            Some(_) => {}
        }
        // Tables of text hold messages as JSON.
        if row[field].as_str().is_some_and(|text| text.starts_with("[{")) {
            unfold(&mut row, field)?;
        }
    }
    if let (Value::String(prompt), Value::String(completion)) = (&row["prompt"], &row["completion"]) {
        notes.count_fields(&row, &["prompt", "completion"], &[])?;
        return Ok(Row::Text { text: format!("{prompt}{completion}"), trained: prompt.len() });
    }
    let list = |field: &str, row: &mut Fields| match row.swap_remove(field) {
        Some(Value::Array(messages)) => Ok(messages),
        other => Err(wrong(field, "messages, like the other part", &other.unwrap_or_default())),
    };
    let mut messages = list("prompt", &mut row)?;
    let answers = list("completion", &mut row)?;
    let count = answers.len();
    messages.extend(answers);
    row.insert("messages".into(), Value::Array(messages));
    let mut chat = messages::chat_of(row, mapping, notes)?;
    if !train_on_inputs {
        // An answer within the prompt has no loss.
        let prompt = chat.messages.len() - count;
        messages::switch_off(&mut chat.messages[..prompt]);
    }
    Ok(Row::Chat(chat))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(row: Value) -> Fields {
        row.as_object().unwrap().clone()
    }

    #[test]
    fn the_type_is_told_by_the_fields_of_a_row() {
        for (row, expected) in [
            (json!({"input_ids": [1]}), DatasetType::Tokenized),
            (json!({"messages": [], "text": "x"}), DatasetType::Chat),
            (json!({"conversations": []}), DatasetType::Chat),
            (json!({"prompt": "a", "completion": "b"}), DatasetType::Completion),
            (json!({"instruction": "a", "input": "", "output": "b", "text": "abc"}), DatasetType::Alpaca),
            (json!({"text": "a", "messages": null}), DatasetType::Text),
            (json!({"prompt": "a", "chosen": "b", "rejected": "c"}), DatasetType::Preference),
        ] {
            assert_eq!(detect(&fields(row.clone())).map(|found| found.0), Ok(expected), "{row}");
        }
        let said = |row: Value| detect(&fields(row)).unwrap_err().to_string();
        let unknown = said(json!({"question": "a", "answer": "b"}));
        assert!(unknown.starts_with("no type fits a row of `question`, `answer`"), "{unknown}");
        assert!(unknown.contains("columns: {prompt: question, completion: answer}"), "{unknown}");
    }
}
