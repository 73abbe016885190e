//! The rows of a chat: rendered texts, with the parts of them that are trained.
//!
//! A chat is one row as long as its template writes each assistant message as it does when no other follows. A
//! template that leaves thoughts out of earlier answers does not: such a message becomes a row of its own, which ends
//! with it, and stays untrained in the row of the chat.

use super::{Chat, ChatTemplate, LineProblem, messages};
use crate::config::Turns;
use serde_json::{Value, json};
use std::ops::Range;

/// A rendered text and the byte ranges of it that are trained.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rendering {
    pub text: String,
    pub spans: Vec<Range<usize>>,
}

/// All rows of a chat.
#[derive(Debug, Default)]
pub(super) struct ChatRows {
    pub renderings: Vec<Rendering>,
    /// Assistant messages that are trained.
    pub trained: usize,
    /// Those of them that have a row of their own.
    pub own_rows: usize,
    /// Those of them whose thoughts are not in the text.
    pub lost_thoughts: usize,
}

/// The rows of `chat`. Its assistant messages are trained, their end-of-turn tokens included, or the last of them
/// alone; each of them once, and none that a field of it switches off.
pub(super) fn rows(template: &ChatTemplate, chat: &Chat, turns: Turns) -> Result<ChatRows, LineProblem> {
    let messages = &chat.messages;
    let assistant: Vec<usize> =
        (0..messages.len()).filter(|&at| messages[at]["role"] == "assistant").collect();
    let mut trained = Vec::with_capacity(assistant.len());
    for &index in &assistant {
        let chosen = turns == Turns::All || Some(&index) == assistant.last();
        if messages::is_trained(index, &messages[index])? && chosen {
            trained.push(index);
        }
    }
    if template.marks_generation() {
        marked(template, chat, &assistant, &trained)
    } else {
        unmarked(template, chat, &trained)
    }
}

/// The row of a template that marks what it generates.
fn marked(
    template: &ChatTemplate,
    chat: &Chat,
    assistant: &[usize],
    trained: &[usize],
) -> Result<ChatRows, LineProblem> {
    let whole = template.render_messages(&chat.messages, chat.tools.as_ref(), false)?;
    if whole.captured {
        return Err(LineProblem::CapturedGeneration);
    }
    let mut spans = whole.generated;
    if trained.len() < assistant.len() {
        if spans.len() != assistant.len() {
            return Err(LineProblem::MarksOfMessages { blocks: spans.len(), messages: assistant.len() });
        }
        let of_message = spans.into_iter().zip(assistant);
        spans = of_message.filter(|(_, at)| trained.contains(at)).map(|(span, _)| span).collect();
    }
    let trained = spans.len();
    Ok(ChatRows { renderings: vec![Rendering { text: whole.text, spans }], trained, ..ChatRows::default() })
}

/// The rows of a template without marks.
fn unmarked(template: &ChatTemplate, chat: &Chat, trained: &[usize]) -> Result<ChatRows, LineProblem> {
    let text = template.render_text(chat)?;
    let mut whole = Rendering { text, spans: Vec::new() };
    let mut rows = ChatRows { trained: trained.len(), ..ChatRows::default() };
    for &index in trained {
        let turn = turn(template, chat, index)?;
        rows.lost_thoughts += usize::from(loses_thoughts(&chat.messages[index], &turn));
        if whole.text.starts_with(&turn.text) {
            whole.spans.extend(turn.spans);
        } else {
            rows.renderings.push(turn);
        }
    }
    rows.own_rows = rows.renderings.len();
    if !whole.spans.is_empty() || rows.renderings.is_empty() {
        rows.renderings.insert(0, whole);
    }
    Ok(rows)
}

/// The chat up to message `index`, with what that message adds behind the generation prompt.
fn turn(template: &ChatTemplate, chat: &Chat, index: usize) -> Result<Rendering, LineProblem> {
    let tools = chat.tools.as_ref();
    let text = template.render_messages(&chat.messages[..=index], tools, false)?.text;
    let start = match template.render_messages(&chat.messages[..index], tools, true) {
        Ok(prompt) if text.starts_with(&prompt.text) => prompt.text.len(),
        // A template that opens a thought in the prompt alone, or that wants a first message.
        _ => answer_start(template, chat, index, &text)?,
    };
    let span = start..text.len();
    Ok(Rendering { text, spans: vec![span] })
}

/// The place in `text`, the chat up to message `index`, where that message's answer begins: as far as two other
/// answers give the same text.
fn answer_start(
    template: &ChatTemplate,
    chat: &Chat,
    index: usize,
    text: &str,
) -> Result<usize, LineProblem> {
    let probe = |answer: &str| {
        let content = match &chat.messages[index]["content"] {
            Value::Array(_) => json!([{ "type": "text", "text": answer }]),
            _ => json!(answer),
        };
        let mut messages = chat.messages[..index].to_vec();
        messages.push(json!({ "role": "assistant", "content": content }));
        let rendered = template.render_messages(&messages, chat.tools.as_ref(), false);
        rendered
            .map(|rendered| rendered.text)
            .map_err(|problem| LineProblem::NoProbe { message: index, problem: problem.to_string() })
    };
    let (one, other) = (probe("x")?, probe("y")?);
    let alike =
        text.bytes().zip(one.bytes()).zip(other.bytes()).take_while(|((a, b), c)| a == b && b == c).count();
    Ok((0..=alike).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0))
}

/// True if a message has thoughts that its row lacks.
fn loses_thoughts(message: &Value, turn: &Rendering) -> bool {
    let has = |text: &str| text.contains("</think>");
    message["content"].as_str().is_some_and(has)
        && !turn.spans.iter().any(|span| turn.text.get(span.clone()).is_some_and(has))
}
