//! Prompts of generation as tokens: the chats of a file or of the command line, rendered up to where the
//! assistant's answer begins.

use super::{
    Chat, ChatTemplate, DataError, IGNORE_INDEX, LineProblem, Tokenizer,
    error::NO_ROWS,
    integers,
    messages::{Mapping, chat_of, clear_switches},
    notes::Notes,
    source, turns,
};
use crate::config::Turns;
use std::path::Path;

/// A prompt, and the answer that it should have when that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids up to where the answer begins.
    pub ids: Vec<i64>,
    pub reference: Option<Reference>,
}

/// A whole chat with labels on its last answer alone, end of turn included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub ids: Vec<i64>,
    /// As long as `ids`; -100 where there is no loss.
    pub labels: Vec<i64>,
}

impl Prompt {
    /// Text as it is, without special tokens.
    pub fn text(text: &str, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self, DataError> {
        let ids = checked(text, tokenizer, vocab_size).map_err(DataError::Render)?;
        Ok(Self { ids, reference: None })
    }

    /// A chat that ends with a message of the user.
    pub fn chat(
        chat: Chat,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        Self::of_chat(chat, tokenizer, template, vocab_size).map_err(DataError::Render)
    }

    /// Every chat of a data file. One that ends with an assistant message is continued before that message, which
    /// becomes the reference.
    pub fn chats(
        path: &Path,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        vocab_size: usize,
    ) -> Result<Vec<Self>, DataError> {
        let mut prompts = Vec::new();
        source::for_each_record(path, |record| {
            let fields = record.fields(integers::quoted)?;
            let chat = chat_of(fields, Mapping::none(), &mut Notes::default())?;
            prompts.push(Self::of_chat(chat, tokenizer, template, vocab_size)?);
            Ok(())
        })?;
        if prompts.is_empty() {
            return Err(DataError::Empty { path: path.into(), remedy: NO_ROWS });
        }
        Ok(prompts)
    }

    fn of_chat(
        mut chat: Chat,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        vocab_size: usize,
    ) -> Result<Self, LineProblem> {
        let is_answered = chat.messages.last().is_some_and(|last| last["role"] == "assistant");
        chat.messages.last_mut().into_iter().for_each(clear_switches);
        let reference = is_answered.then(|| {
            let row = turns::rows(template, &chat, Turns::Last)?.renderings.pop().unwrap_or_default();
            let encoded = tokenizer.ids_with_ranges(&row.text, false)?;
            let trained = encoded.covered_by(row.spans.last().map(std::slice::from_ref).unwrap_or_default());
            source::check_tokens(&encoded.ids, vocab_size, "rendered tokens")?;
            let label = |(&id, trained): (&i64, bool)| if trained { id } else { IGNORE_INDEX };
            let labels = encoded.ids.iter().zip(trained).map(label).collect();
            Ok::<_, LineProblem>(Reference { ids: encoded.ids, labels })
        });
        let reference = reference.transpose()?;
        if is_answered {
            chat.messages.pop();
        }
        let ids = checked(&template.render_prompt(&chat)?, tokenizer, vocab_size)?;
        Ok(Self { ids, reference })
    }
}

/// The ids of `text`, at least one and all in the vocabulary.
fn checked(text: &str, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Vec<i64>, LineProblem> {
    let ids = tokenizer.ids(text, false)?;
    source::check_tokens(&ids, vocab_size, "rendered tokens")?;
    Ok(ids)
}
