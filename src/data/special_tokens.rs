//! Tokens that stand in files beside tokenizer.json: names such as `eos_token`, and tokens that tokenizer.json lacks.
//! They are found, and added to the tokenizer, in the order in which transformers 5 does it.

use super::{DataError, chat_template::read_json, tokenizer_class::TokenizerClass, tokenizer_keys};
use crate::console::shortened;
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tokenizers::AddedToken;

/// Names that every tokenizer of transformers knows, in its order.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens of a tokenizer folder.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    /// `bos_token` and the like: the seven names first, then those of the model.
    named: Vec<(String, Token)>,
    /// `extra_special_tokens`, or `additional_special_tokens` by its old name.
    extra: Vec<Token>,
    /// Added tokens by id, as files beside tokenizer.json say.
    pub added: BTreeMap<u32, AddedToken>,
    /// `added` is all that transformers compares with tokenizer.json; otherwise the tokens of that file go over it.
    has_decoder: bool,
    /// Special tokens in a text are taken apart like other text.
    pub split: bool,
    /// tokenizer_config.json names code of a tokenizer (`auto_map`).
    pub names_code: bool,
    /// The class of transformers that rebuilds tokenizer.json.
    pub class: Option<TokenizerClass>,
}

/// A token, with its flags where a file gives them.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    Text(String),
    Flagged(AddedToken),
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Flagged(token) => &token.content,
        }
    }

    /// With the flags that transformers gives a special token that is a mere text.
    fn flagged(&self, is_named: bool) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text.clone(), true),
            Self::Flagged(token) => token.clone().special(token.special || is_named),
        }
    }
}

impl SpecialTokens {
    /// Reads tokenizer_config.json, and special_tokens_map.json and added_tokens.json, which an `added_tokens_decoder`
    /// in the first replaces.
    pub fn load(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join("tokenizer_config.json");
        let mut config = object(&path, read_json(&path)?)?;
        tokenizer_keys::check(&path, &config)?;
        let mut found = Self {
            split: config.get("split_special_tokens") == Some(&Value::Bool(true)),
            names_code: config.contains_key("auto_map"),
            class: TokenizerClass::of(dir, &config)?,
            ..Self::default()
        };
        if let Some(old) = config.swap_remove("additional_special_tokens") {
            config.entry("extra_special_tokens").or_insert(old);
        }
        let decoder = config.swap_remove("added_tokens_decoder").filter(|decoder| !decoder.is_null());
        if let Some(decoder) = decoder {
            found.has_decoder = true;
            found.added = decoded(&path, &decoder)?;
        } else {
            let map_path = dir.join("special_tokens_map.json");
            let map = object(&map_path, read_json(&map_path)?)?;
            tokenizer_keys::check_map(&map_path, &map)?;
            merge(&mut config, map);
        }
        for (name, token) in found.class.iter().flat_map(TokenizerClass::names) {
            config.entry(*name).or_insert_with(|| (*token).into());
        }
        found.read_names(&path, &config)?;
        if !found.has_decoder {
            let added_path = dir.join("added_tokens.json");
            found.read_added(&added_path, &object(&added_path, read_json(&added_path)?)?)?;
        }
        Ok(found)
    }

    /// The named tokens as text, for the chat template.
    pub fn texts(&self) -> BTreeMap<String, String> {
        self.named.iter().map(|(name, token)| (name.clone(), token.text().into())).collect()
    }

    /// The tokens to add, in order, to a tokenizer whose tokenizer.json has `present`.
    pub fn missing(&self, present: &BTreeMap<u32, AddedToken>) -> Vec<AddedToken> {
        let mut known = self.added.clone();
        if !self.has_decoder {
            known.extend(present.iter().map(|(id, token)| (*id, token.clone())));
        }
        // A class that rebuilds the tokenizer begins without added tokens.
        let none = BTreeMap::new();
        let present = if self.class.is_some() { &none } else { present };
        let is_present = |token: &AddedToken| present.values().any(|other| same(other, token));
        let named = |token: &AddedToken| self.named.iter().any(|(_, name)| name.text() == token.content);
        let as_added = |token: &AddedToken| token.clone().special(token.special || named(token));
        let mut missing: Vec<AddedToken> =
            known.values().filter(|token| !is_present(token)).map(as_added).collect();
        let is_listed = |missing: &[AddedToken], text: &str| {
            present.values().chain(missing).any(|token| token.content == text)
        };
        for (_, token) in &self.named {
            if !is_listed(&missing, token.text()) {
                missing.push(token.flagged(true));
            }
        }
        for token in &self.extra {
            if !is_listed(&missing, token.text()) {
                missing.push(token.flagged(false));
            }
        }
        missing
    }

    fn read_names(&mut self, path: &Path, config: &Map<String, Value>) -> Result<(), DataError> {
        let mut names: Vec<(String, &Value)> = Vec::new();
        names.extend(NAMES.iter().filter_map(|&name| Some((name.to_string(), config.get(name)?))));
        let others =
            config.iter().filter(|(name, value)| !NAMES.contains(&name.as_str()) && is_name(name, value));
        names.extend(others.map(|(name, value)| (name.clone(), value)));
        match config.get("extra_special_tokens") {
            None | Some(Value::Null) => {}
            Some(Value::Object(extra)) => {
                names.extend(extra.iter().map(|(name, value)| (name.clone(), value)))
            }
            Some(Value::Array(extra)) => {
                let token = |value| token(path, "extra_special_tokens", value);
                self.extra = extra.iter().map(token).collect::<Result<_, _>>()?;
            }
            Some(other) => {
                return Err(wrong(path, "extra_special_tokens", "a list or an object of tokens", other));
            }
        }
        for (name, value) in names.into_iter().filter(|(_, value)| !value.is_null()) {
            let token = token(path, &name, value)?;
            match self.named.iter_mut().find(|(known, _)| *known == name) {
                Some(known) => known.1 = token,
                None => self.named.push((name, token)),
            }
        }
        Ok(())
    }

    /// Reads added_tokens.json: texts with their ids.
    fn read_added(&mut self, path: &Path, file: &Map<String, Value>) -> Result<(), DataError> {
        for (text, id) in file {
            let id = id
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| wrong(path, text, "an id", id))?;
            let usual =
                self.named.iter().filter(|(name, _)| NAMES.contains(&name.as_str())).map(|(_, token)| token);
            let special = usual.chain(&self.extra).any(|token| token.text() == text);
            self.added.insert(id, AddedToken::from(text.clone(), special));
        }
        Ok(())
    }
}

/// True for a field that names a token: `image_token` and the like.
pub(super) fn is_name(field: &str, value: &Value) -> bool {
    field.ends_with("_token")
        && (value.is_string() || value.get("content").is_some() || NAMES.contains(&field))
}

/// Lays special_tokens_map.json over tokenizer_config.json, as it is done for tokenizers of the old form.
fn merge(config: &mut Map<String, Value>, map: Map<String, Value>) {
    for (name, mut value) in map {
        // A token of this file is special, whatever it says.
        let tokens = match &mut value {
            Value::Array(tokens) => tokens.iter_mut().collect(),
            token => vec![token],
        };
        for token in tokens.into_iter().filter(|token| token.get("content").is_some()) {
            token["special"] = Value::Bool(true);
        }
        match (name.as_str(), value) {
            ("extra_special_tokens", Value::Array(tokens)) => {
                let known = config.entry(name).or_insert_with(|| Value::Array(Vec::new()));
                if let Value::Array(known) = known {
                    for token in tokens {
                        if !known.contains(&token) {
                            known.push(token);
                        }
                    }
                }
            }
            ("additional_special_tokens", value) => {
                config.entry("extra_special_tokens").or_insert(value);
            }
            (_, value) => {
                config.insert(name, value);
            }
        }
    }
}

/// `added_tokens_decoder`: tokens by their ids.
fn decoded(path: &Path, decoder: &Value) -> Result<BTreeMap<u32, AddedToken>, DataError> {
    let field = "added_tokens_decoder";
    let Value::Object(entries) = decoder else {
        return Err(wrong(path, field, "an object of tokens by their ids", decoder));
    };
    let entry = |(id, value): (&String, &Value)| match (id.parse::<u32>(), flagged(value)) {
        (Ok(id), Some(token)) => Ok((id, token)),
        _ => Err(wrong(path, &format!("{field}.{id}"), "a token with content and flags under its id", value)),
    };
    entries.iter().map(entry).collect()
}

/// A token given as a text, or as an object with its flags.
fn token(path: &Path, field: &str, value: &Value) -> Result<Token, DataError> {
    match value {
        Value::String(text) => Ok(Token::Text(text.clone())),
        value => {
            let token = flagged(value).ok_or_else(|| wrong(path, field, "a token", value))?;
            Ok(Token::Flagged(token))
        }
    }
}

/// A token with `content` and flags; those that it lacks are as transformers has them.
fn flagged(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!special)))
}

/// True for tokens alike in text and flags.
fn same(a: &AddedToken, b: &AddedToken) -> bool {
    let flags =
        |token: &AddedToken| (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special);
    a.content == b.content && flags(a) == flags(b)
}

fn object(path: &Path, file: Option<Value>) -> Result<Map<String, Value>, DataError> {
    match file {
        None => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(other) => Err(wrong(path, "file", "a JSON object", &other)),
    }
}

fn wrong(path: &Path, field: &str, expected: &str, found: &Value) -> DataError {
    let problem = format!("{field}: expected {expected}, got {}", shortened(found));
    DataError::Tokenizer { path: PathBuf::from(path), problem }
}
