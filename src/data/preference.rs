//! A `preference` row: a prompt with a chosen and a rejected answer, as two rows of prompt and completion.

use super::{LineProblem, source::wrong};
use serde_json::{Map, Value, json};

/// Fields that may hold the messages before both answers.
const DIALOGUES: [&str; 3] = ["prompt", "messages", "conversations"];

const HINT: &str =
    "; a row has prompt, chosen and rejected, or chosen and rejected that begin with the same messages";

/// The chosen and the rejected half of a row, each with a `prompt` and a `completion`: both texts, or both lists of
/// messages. Other fields of the row are in both.
///
/// - `prompt` is a text or a list of messages; `question` with an optional `system` are messages.
/// - An answer is a text (the assistant's, behind messages), a message, or a list of messages.
/// - Answers that begin with the same messages hold the prompt themselves, whatever `prompt` says.
pub(super) fn halves(row: &Map<String, Value>) -> Result<[Map<String, Value>; 2], LineProblem> {
    let answer = |field: &str| match row.get(field) {
        None => Err(LineProblem::missing(field, row, HINT)),
        Some(Value::Null) => Err(LineProblem::null(field, "a text, a message or a list of messages")),
        Some(value @ (Value::String(_) | Value::Object(_) | Value::Array(_))) => Ok(value),
        Some(other) => Err(wrong(field, "a text, a message or a list of messages", other)),
    };
    let (chosen, rejected) = (answer("chosen")?, answer("rejected")?);
    let mut rest = row.clone();
    for field in ["chosen", "rejected", "question", "system"].iter().chain(&DIALOGUES) {
        rest.shift_remove(*field);
    }
    let half = |prompt: &Value, completion: Value| {
        let mut half = rest.clone();
        half.insert("prompt".into(), prompt.clone());
        half.insert("completion".into(), completion);
        half
    };
    if let (Value::Array(chosen), Value::Array(rejected)) = (chosen, rejected) {
        let shared = chosen.iter().zip(rejected).take_while(|(one, other)| one == other).count();
        let shared = shared.min(chosen.len().min(rejected.len()).saturating_sub(1));
        if shared > 0 {
            let prompt = json!(chosen[..shared]);
            return Ok([chosen, rejected].map(|all| half(&prompt, json!(all[shared..]))));
        }
    }
    let prompt = prompt(row)?;
    let is_text = prompt.is_string();
    let completion = |field: &str, answer: &Value| match answer {
        Value::String(_) if is_text => Ok(answer.clone()),
        Value::String(text) => Ok(json!([{"role": "assistant", "content": text}])),
        other if is_text => Err(wrong(field, "a text, as prompt is one", other)),
        Value::Object(_) => Ok(json!([answer])),
        other => Ok(other.clone()),
    };
    Ok([half(&prompt, completion("chosen", chosen)?), half(&prompt, completion("rejected", rejected)?)])
}

/// The text or the messages before both answers.
fn prompt(row: &Map<String, Value>) -> Result<Value, LineProblem> {
    for field in DIALOGUES {
        match row.get(field) {
            None | Some(Value::Null) => {}
            Some(text @ Value::String(_)) if field == "prompt" => return Ok(text.clone()),
            Some(messages @ Value::Array(_)) => return Ok(messages.clone()),
            Some(other) if field == "prompt" => {
                return Err(wrong(field, "a text or a list of messages", other));
            }
            Some(other) => return Err(wrong(field, "a list of messages", other)),
        }
    }
    let text = |field: &str| row.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    let Some(question) = text("question") else { return Err(LineProblem::missing("prompt", row, HINT)) };
    let system = text("system").map(|system| json!({"role": "system", "content": system}));
    let question = json!({"role": "user", "content": question});
    Ok(Value::Array(system.into_iter().chain([question]).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(row: Value) -> Value {
        let found = row.as_object().map(halves);
        match found {
            Some(Ok([chosen, rejected])) => json!([chosen, rejected]),
            Some(Err(problem)) => json!(problem.to_string()),
            None => Value::Null,
        }
    }

    #[test]
    fn each_form_of_a_pair_is_two_rows_of_prompt_and_completion() {
        let user = json!({"role": "user", "content": "2 + 2?"});
        let says = |text: &str| json!({"role": "assistant", "content": text});
        let chat = json!([
            {"prompt": [user], "completion": [says("4")]},
            {"prompt": [user], "completion": [says("5")]},
        ]);
        let cases = [
            (
                json!({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}),
                json!([
                    {"prompt": "2 + 2 = ", "completion": "4"},
                    {"prompt": "2 + 2 = ", "completion": "5"},
                ]),
            ),
            (json!({"prompt": [user], "chosen": [says("4")], "rejected": [says("5")]}), chat.clone()),
            (json!({"prompt": [user], "chosen": "4", "rejected": "5"}), chat.clone()),
            (json!({"messages": [user], "chosen": says("4"), "rejected": says("5")}), chat.clone()),
            (json!({"question": "2 + 2?", "system": "", "chosen": "4", "rejected": "5"}), chat.clone()),
            (json!({"chosen": [user, says("4")], "rejected": [user, says("5")]}), chat.clone()),
            // Ultrafeedback's rows say the prompt twice.
            (
                json!({"prompt": "2 + 2?", "chosen": [user, says("4")], "rejected": [user, says("5")]}),
                chat.clone(),
            ),
        ];
        for (row, expected) in cases {
            assert_eq!(told(row.clone()), expected, "{row}");
        }
        let with_tools = told(json!({"prompt": [user], "chosen": "4", "rejected": "5", "tools": [1]}));
        assert_eq!(with_tools[1]["tools"], json!([1]));
    }

    #[test]
    fn answers_that_are_equal_keep_their_last_message() {
        let all = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        let found = told(json!({"chosen": all, "rejected": all}));
        assert_eq!(found[0]["completion"], json!([all[1]]));
        assert_eq!(found[0]["prompt"], json!([all[0]]));
    }

    #[test]
    fn a_row_that_is_no_pair_says_what_is_missing() {
        let cases = [
            (
                json!({"prompt": "a", "chosen": "b"}),
                "expected field `rejected`, found `prompt`, `chosen`; a row has",
            ),
            (
                json!({"chosen": "b", "rejected": "c"}),
                "expected field `prompt`, found `chosen`, `rejected`; a row",
            ),
            (
                json!({"prompt": 1, "chosen": "b", "rejected": "c"}),
                "prompt: expected a text or a list of messages, got 1",
            ),
            (
                json!({"prompt": "a", "chosen": 2, "rejected": "c"}),
                "chosen: expected a text, a message or a list",
            ),
            (
                json!({"prompt": "a", "chosen": "b", "rejected": []}),
                "rejected: expected a text, as prompt is one",
            ),
        ];
        for (row, expected) in cases {
            let found = told(row.clone());
            assert!(found.as_str().is_some_and(|found| found.starts_with(expected)), "{row}: {found}");
        }
    }
}
