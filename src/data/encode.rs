//! Records as samples of tokens. All types but tokenized go through the model's tokenizer: chats as its template
//! renders them, other texts as they are, with the end-of-text token behind them.

use super::{
    Chat, ChatTemplate, DataError, IGNORE_INDEX, LineProblem, RowInput, TRAINING_CLOCK, Tokenizer,
    formats::Record,
    kinds::{self, Row},
    messages,
    notes::Notes,
    preference,
    source::{Source, check_tokens},
    special_tokens::SpecialTokens,
    tokenized::{Sample, tokenized_of},
    turns,
};
use crate::config::{DataArgs, DatasetType, Turns};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Everything that turns a record into samples. Threads share it.
pub(super) struct Encoder<'a> {
    pub args: &'a DataArgs,
    pub vocab_size: usize,
    pub inputs: &'a [RowInput],
    /// Tokens of the longest sample that is kept.
    pub limit: usize,
    texts: Option<Texts>,
}

/// A model's way from texts to tokens.
struct Texts {
    tokenizer: Tokenizer,
    /// `None` where no source has chats.
    template: Option<ChatTemplate>,
    /// The token that ends a text.
    eos: Option<String>,
}

impl<'a> Encoder<'a> {
    /// Loads what `sources` need: a tokenizer for all types but tokenized, its chat template for chats.
    pub fn new(
        args: &'a DataArgs,
        sources: &[Source],
        tokenizer_dir: Option<&Path>,
        vocab_size: usize,
        inputs: &'a [RowInput],
        limit: usize,
    ) -> Result<Self, DataError> {
        let mut encoder = Self { args, vocab_size, inputs, limit, texts: None };
        let texts = sources.iter().find(|source| source.kind != DatasetType::Tokenized);
        let Some(first) = texts else { return Ok(encoder) };
        let path = || args.datasets[first.index].path.clone();
        let dir = tokenizer_dir.ok_or_else(|| DataError::NoTokenizer { path: path() })?;
        let template = match sources.iter().any(|source| source.has_chats) {
            false => None,
            true => {
                let template = ChatTemplate::load_with_clock(dir, TRAINING_CLOCK)?;
                if template.reads_clock() {
                    tracing::warn!(
                        "the chat template writes today's date: training data get 2024-07-26 instead"
                    );
                }
                if args.turns == Turns::Last && args.train_on_inputs {
                    return Err(DataError::TurnsOfAll);
                }
                Some(template)
            }
        };
        let tokenizer = Tokenizer::load(dir)?;
        let eos = SpecialTokens::load(dir)?.texts().remove("eos_token");
        encoder.texts = Some(Texts { tokenizer, template, eos });
        Ok(encoder)
    }

    /// Adds all that the tokens of a text depend on to a hash.
    pub fn hash_into(&self, hash: &mut Sha256) {
        let Some(Texts { tokenizer, template, eos }) = &self.texts else { return };
        hash.update(tokenizer.digest());
        match template {
            Some(template) => template.hash_into(hash),
            None => hash.update(format!("{eos:?}")),
        }
    }

    /// The samples of a record.
    pub fn samples(
        &self,
        source: &Source,
        record: &Record,
        notes: &mut Notes,
    ) -> Result<Vec<Sample>, LineProblem> {
        let entry = &self.args.datasets[source.index];
        let fields = kinds::fields(record, entry, source.kind)?;
        if source.kind == DatasetType::Tokenized {
            notes.count_sample();
            return Ok(vec![tokenized_of(&fields, self.vocab_size, self.inputs, notes)?]);
        }
        if let Some(input) = self.inputs.iter().find(|input| input.required) {
            let reason = "read by train.loss_fn, and only rows of type tokenized have it; give such rows";
            return Err(LineProblem::Refused { field: input.name.into(), reason });
        }
        if source.kind == DatasetType::Preference {
            let halves = preference::halves(&fields)?.map(|half| self.answer(half, source, notes));
            let [chosen, rejected] = halves;
            return Ok(vec![chosen?.followed_by(rejected?)]);
        }
        match kinds::row(fields, entry, source.kind, self.args.train_on_inputs, notes)? {
            Row::Chat(chat) => self.chat(&chat, notes),
            Row::Text { text, trained } => self.text(text, trained, notes),
        }
    }

    /// Half of a pair: one document, whose answer has the only loss.
    fn answer(
        &self,
        half: Map<String, Value>,
        source: &Source,
        notes: &mut Notes,
    ) -> Result<Sample, LineProblem> {
        let entry = &self.args.datasets[source.index];
        let found = match kinds::row(half, entry, source.kind, false, notes)? {
            Row::Chat(chat) => self.chat(&chat, notes)?,
            Row::Text { text, trained } => self.text(text, trained, notes)?,
        };
        let answers = found.len();
        match <[Sample; 1]>::try_from(found) {
            Ok([sample]) if sample.valid_tokens() > 0 => Ok(sample),
            Ok(_) => Err(LineProblem::NoAnswer),
            Err(_) => Err(LineProblem::Answers { answers }),
        }
    }

    fn texts(&self) -> Result<&Texts, LineProblem> {
        self.texts.as_ref().ok_or_else(|| LineProblem::Tokenize("no tokenizer was given".into()))
    }

    /// The rows of a chat as tokens; labels are on what the assistant said, or everywhere if `train_on_inputs`.
    fn chat(&self, chat: &Chat, notes: &mut Notes) -> Result<Vec<Sample>, LineProblem> {
        let Texts { tokenizer, template, .. } = self.texts()?;
        let Some(template) = template else {
            let words = "the first row of the data set has a text as its prompt, and this one messages";
            return Err(LineProblem::Template(words.into()));
        };
        for (index, message) in chat.messages.iter().enumerate() {
            let fields = message.as_object().into_iter().flat_map(|fields| fields.keys());
            let unnamed = |field: &&String| !messages::is_switch(field) && !template.names(field);
            let unnamed: Vec<&String> = fields.filter(unnamed).collect();
            unnamed.iter().try_for_each(|field| messages::check_spelling(index, field))?;
            if messages::is_trained(index, message)? && messages::is_emptied(message, &unnamed) {
                notes.count_emptied();
            }
            notes.count_message_fields(unnamed.into_iter());
        }
        if self.args.train_on_inputs {
            if let Some(field) = messages::switched_off(&chat.messages)? {
                let reason = "says that it has no loss, while data.train_on_inputs gives one to every token";
                return Err(LineProblem::Refused { field, reason });
            }
            let ids = tokenizer.ids(&template.render_text(chat)?, false)?;
            return Ok(vec![self.labelled(&ids, None)?]);
        }
        let rows = turns::rows(template, chat, self.args.turns)?;
        notes.count_chat(&chat.messages, rows.trained, rows.own_rows, rows.lost_thoughts);
        let sample = |row: &turns::Rendering| {
            let encoded = tokenizer.ids_with_ranges(&row.text, false)?;
            self.labelled(&encoded.ids, Some(encoded.covered_by(&row.spans)))
        };
        rows.renderings.iter().map(sample).collect()
    }

    /// A text as the tokenizer writes it by itself, ended by its end-of-text token. From byte `trained` on it has a
    /// loss, everywhere if `train_on_inputs`. One without a prompt is cut where it is too long.
    fn text(&self, mut text: String, trained: usize, notes: &mut Notes) -> Result<Vec<Sample>, LineProblem> {
        let Texts { tokenizer, eos, .. } = self.texts()?;
        let eos = eos.as_deref().filter(|eos| !eos.is_empty()).ok_or(LineProblem::NoEos)?;
        if !text[trained..].ends_with(eos) {
            text.push_str(eos);
        }
        notes.count_sample();
        let sample = if trained == 0 || self.args.train_on_inputs {
            self.labelled(&tokenizer.ids(&text, true)?, None)?
        } else {
            let encoded = tokenizer.ids_with_ranges(&text, true)?;
            let flags = encoded.covered_by(std::slice::from_ref(&(trained..text.len())));
            self.labelled(&encoded.ids, Some(flags))?
        };
        if trained > 0 || sample.tokens.len() <= self.limit {
            return Ok(vec![sample]);
        }
        let pieces = sample.tokens.chunks(self.limit).zip(sample.labels.chunks(self.limit));
        let pieces: Vec<Sample> =
            pieces.map(|(tokens, labels)| Sample::whole(tokens.to_vec(), labels.to_vec())).collect();
        notes.count_pieces(pieces.len());
        Ok(pieces)
    }

    /// Checked tokens, with labels where `trained`, or everywhere.
    fn labelled(&self, ids: &[i64], trained: Option<Vec<bool>>) -> Result<Sample, LineProblem> {
        let tokens = check_tokens(ids, self.vocab_size, "rendered tokens")?;
        let label = |(&id, trained): (&i64, bool)| if trained { id } else { IGNORE_INDEX };
        let labels = match trained {
            Some(trained) => ids.iter().zip(trained).map(label).collect(),
            None => ids.to_vec(),
        };
        Ok(Sample::whole(tokens, labels))
    }
}
