//! Counts of what a data set holds and nothing is trained on, for one warning each.

use super::LineProblem;
use crate::console::count;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Counts over the lines of a data set.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Rows with a field that nothing reads.
    fields: BTreeMap<String, usize>,
    /// Messages with a field that the chat template does not name.
    message_fields: BTreeMap<String, usize>,
    /// Messages with a loss of which the template leaves nothing.
    emptied: usize,
    padding_tokens: usize,
    padded_rows: usize,
    /// Messages of roles that are neither trained nor usual.
    roles: BTreeMap<String, usize>,
    chats: usize,
    /// Chats without a token to learn.
    silent_chats: usize,
    /// Assistant messages that became rows of their own.
    own_rows: usize,
    /// Assistant messages whose thoughts the template leaves out.
    lost_thoughts: usize,
    /// Samples that are no chats, those of them without a token to learn, and the place of the first of these.
    samples: usize,
    silent_samples: usize,
    first_silent: Option<String>,
    /// Texts that are longer than a sample may be, and the samples that they became.
    long_texts: usize,
    pieces: usize,
}

/// Roles of messages that an answer follows, in the templates of known families.
const PROMPT_ROLES: [&str; 8] =
    ["system", "developer", "user", "tool", "function", "ipython", "environment", "context"];

impl Notes {
    /// Counts the fields of a row that are not in `known`; those in `refused` that have a value are errors.
    pub fn count_fields(
        &mut self,
        row: &Map<String, Value>,
        known: &[&str],
        refused: &[(&str, &'static str)],
    ) -> Result<(), LineProblem> {
        for (field, _) in row.iter().filter(|(_, value)| !value.is_null()) {
            if let Some(&(name, reason)) = refused.iter().find(|(name, _)| name == field) {
                return Err(LineProblem::Refused { field: name.into(), reason });
            }
            if !known.contains(&field.as_str()) {
                *self.fields.entry(field.clone()).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Counts a message's fields that the chat template does not name.
    pub fn count_message_fields<'a>(&mut self, fields: impl Iterator<Item = &'a String>) {
        for field in fields {
            *self.message_fields.entry(field.clone()).or_default() += 1;
        }
    }

    /// Counts a message with a loss whose fields the chat template leaves out, all that are not empty.
    pub fn count_emptied(&mut self) {
        self.emptied += 1;
    }

    /// Counts a row with `tokens` of padding.
    pub fn count_padding(&mut self, tokens: usize) {
        self.padding_tokens += tokens;
        self.padded_rows += usize::from(tokens > 0);
    }

    /// Counts a chat, of which `trained` assistant messages have a loss and `own_rows` are rows of their own.
    pub fn count_chat(&mut self, messages: &[Value], trained: usize, own_rows: usize, lost_thoughts: usize) {
        self.chats += 1;
        self.silent_chats += usize::from(trained == 0);
        self.own_rows += own_rows;
        self.lost_thoughts += lost_thoughts;
        for role in messages.iter().filter_map(|message| message.get("role")?.as_str()) {
            if role != "assistant" && !PROMPT_ROLES.contains(&role) {
                *self.roles.entry(role.into()).or_default() += 1;
            }
        }
    }

    /// Counts a sample that is no chat.
    pub fn count_sample(&mut self) {
        self.samples += 1;
    }

    /// Counts a sample without a token to learn.
    pub fn count_silent(&mut self, place: impl FnOnce() -> String) {
        self.silent_samples += 1;
        self.first_silent.get_or_insert_with(place);
    }

    /// Counts a text that became several samples.
    pub fn count_pieces(&mut self, pieces: usize) {
        self.long_texts += 1;
        self.pieces += pieces;
    }

    /// Adds the counts of `other`, whose rows follow.
    pub fn merge(&mut self, other: Self) {
        let counts = [
            (&mut self.fields, other.fields),
            (&mut self.message_fields, other.message_fields),
            (&mut self.roles, other.roles),
        ];
        for (ours, theirs) in counts {
            for (name, number) in theirs {
                *ours.entry(name).or_default() += number;
            }
        }
        for (ours, theirs) in [
            (&mut self.emptied, other.emptied),
            (&mut self.padding_tokens, other.padding_tokens),
            (&mut self.padded_rows, other.padded_rows),
            (&mut self.chats, other.chats),
            (&mut self.silent_chats, other.silent_chats),
            (&mut self.own_rows, other.own_rows),
            (&mut self.lost_thoughts, other.lost_thoughts),
            (&mut self.samples, other.samples),
            (&mut self.silent_samples, other.silent_samples),
            (&mut self.long_texts, other.long_texts),
            (&mut self.pieces, other.pieces),
        ] {
            *ours += theirs;
        }
        self.first_silent = self.first_silent.take().or(other.first_silent);
    }

    /// Roles that have no loss although an answer may stand under them, with their messages.
    pub fn foreign_roles(&self) -> Option<String> {
        (!self.roles.is_empty()).then(|| counted(&self.roles, "message"))
    }

    /// One line for each thing that the user may not expect.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.fields.is_empty() {
            lines.push(format!("fields that nothing reads: {}", counted(&self.fields, "row")));
        }
        if !self.message_fields.is_empty() {
            let fields = counted(&self.message_fields, "message");
            lines.push(format!("fields of messages that the chat template does not name: {fields}"));
        }
        if self.emptied > 0 {
            lines.push(format!(
                "{} of the assistant's would teach it to say nothing: content is empty, and the chat template leaves \
                 the rest out (tool_calls, for one); take a template that writes it, or give them weight 0",
                count(self.emptied, "message")
            ));
        }
        if self.padding_tokens > 0 {
            let (tokens, rows) = (self.padding_tokens, count(self.padded_rows, "row"));
            lines.push(format!(
                "attention_mask: {} of padding in {rows} dropped; the first token behind it has no loss",
                count(tokens, "token")
            ));
        }
        if let Some(roles) = self.foreign_roles() {
            lines.push(format!("roles without a loss, which only messages of role assistant have: {roles}"));
        }
        if self.silent_chats > 0 {
            let chats = count(self.chats, "chat");
            lines.push(format!("{} of {chats} have no assistant message with a loss", self.silent_chats));
        }
        if self.own_rows > 0 {
            let turns = count(self.own_rows, "assistant turn");
            lines.push(format!(
                "rows of their own for {turns}, which the chat template renders differently when messages follow"
            ));
        }
        if self.lost_thoughts > 0 {
            let messages = count(self.lost_thoughts, "message");
            lines.push(format!("thoughts before </think> in {messages} are left out by the chat template"));
        }
        if let Some(place) = &self.first_silent {
            let (silent, samples) = (self.silent_samples, count(self.samples, "sample"));
            lines.push(format!("{silent} of {samples} have no token with a loss, the first at {place}"));
        }
        if self.long_texts > 0 {
            let (texts, pieces) = (count(self.long_texts, "text"), count(self.pieces, "sample"));
            lines.push(format!("cut into {pieces}: {texts} longer than a sample may be"));
        }
        lines
    }
}

fn counted(counts: &BTreeMap<String, usize>, of: &str) -> String {
    let named: Vec<String> =
        counts.iter().map(|(name, &number)| format!("{name} ({})", count(number, of))).collect();
    named.join(", ")
}
