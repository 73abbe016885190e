//! The rows of a chat: rendered texts, with the parts of them that are trained.
//!
//! A chat is one row as long as its template writes each assistant message as it does when no other follows. A
//! template that leaves thoughts out of earlier answers does not: such a message becomes a row of its own, which ends
//! with it, and stays untrained in the row of the chat.

use super::{Chat, ChatTemplate, LineProblem, integers, messages};
use crate::config::Turns;
use serde_json::{Value, json};
use std::{collections::BTreeSet, ops::Range};

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
    let mut count = trained.len().min(spans.len());
    if trained.len() < assistant.len() {
        let owners = owners(template, chat, assistant, &whole.text, &spans)
            .ok_or(LineProblem::MarksOfMessages { blocks: spans.len(), messages: assistant.len() })?;
        let is_trained = |(_, owner): &(Range<usize>, usize)| trained.contains(owner);
        let kept: Vec<_> = spans.into_iter().zip(owners).filter(is_trained).collect();
        count = kept.iter().map(|(_, owner)| owner).collect::<BTreeSet<_>>().len();
        spans = kept.into_iter().map(|(span, _)| span).collect();
    }
    let renderings = vec![Rendering { text: whole.text, spans }];
    Ok(ChatRows { renderings, trained: count, ..ChatRows::default() })
}

/// The message of `assistant` that each generation block belongs to: the one whose change changes the block. `None`
/// where that cannot be told for a block.
fn owners(
    template: &ChatTemplate,
    chat: &Chat,
    assistant: &[usize],
    text: &str,
    spans: &[Range<usize>],
) -> Option<Vec<usize>> {
    let mut found: Vec<Option<usize>> = vec![None; spans.len()];
    for &index in assistant {
        // A text where there was none may open a block, which says nothing of the others.
        let changed = [true, false].into_iter().find_map(|with_empty| {
            let mut messages = chat.messages.clone();
            change(&mut messages[index], with_empty);
            let probe = template.render_messages(&messages, chat.tools.as_ref(), false).ok()?;
            (probe.generated.len() == spans.len()).then_some(probe)
        })?;
        for ((span, other), owner) in spans.iter().zip(changed.generated).zip(&mut found) {
            if text.get(span.clone()) != changed.text.get(other) && owner.replace(index).is_some() {
                return None;
            }
        }
    }
    // A block that no change reaches, as that of an empty answer, has the owner that is left for it.
    let in_order = spans.len() == assistant.len()
        && found.iter().zip(assistant).all(|(owner, index)| owner.is_none_or(|owner| owner == *index));
    if in_order { Some(assistant.to_vec()) } else { found.into_iter().collect() }
}

/// Changes every text of a message that a template may write as generated; the empty ones too `with_empty`.
fn change(value: &mut Value, with_empty: bool) {
    // Read for what they are, as `content[0].type`.
    const FIXED: [&str; 4] = ["role", "type", "id", "tool_call_id"];
    match value {
        Value::String(text) if with_empty || !text.is_empty() => {
            *text = text.replace("</think>", "x</think>x") + "x";
        }
        Value::Array(items) => items.iter_mut().for_each(|item| change(item, with_empty)),
        Value::Object(_) if integers::digits(value).is_some() => {}
        Value::Object(fields) => {
            let free = fields.iter_mut().filter(|(name, _)| !FIXED.contains(&name.as_str()));
            free.for_each(|(_, field)| change(field, with_empty));
        }
        _ => {}
    }
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
