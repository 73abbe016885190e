//! The fields of one config.json: typed readers with errors that name file and field. Absent fields have the values of
//! the family's config class in transformers.

use super::{ConfigError, is_same, known};
use crate::console::shortened;
use crate::model::family::{Absent, FAMILIES, Family};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Fields that all families have under two names: (other name, name).
const ALIASES: &[(&str, &str)] = &[("torch_dtype", "dtype")];

/// The fields of one config.json.
pub struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
    family: &'static Family,
}

impl Fields {
    /// The fields of `map`, read from `path`, with those that are absent.
    ///
    /// # Errors
    /// The family is not built, two names of a field disagree, or a field is not known or not built.
    pub(super) fn new(path: &Path, mut map: Map<String, Value>) -> Result<Self, ConfigError> {
        let named = map.get("model_type").and_then(Value::as_str).unwrap_or("missing");
        let family = FAMILIES
            .iter()
            .find(|family| family.model_type == named)
            .ok_or_else(|| ConfigError::Family { path: path.to_owned(), found: named.to_owned() })?;
        known::check(path, &map, family)?;
        for (other, name) in ALIASES.iter().chain(family.aliases) {
            let Some(value) = map.remove(*other) else { continue };
            let kept = map.entry(*name).or_insert_with(|| value.clone());
            if !is_same(kept, &value) {
                return Err(ConfigError::disagree(path, (name, kept), (other, &value)));
            }
        }
        for (field, value) in family.absent_fields() {
            map.entry(field).or_insert_with(|| Absent::value(value));
        }
        Ok(Self { path: path.to_owned(), map, family })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn family(&self) -> &'static Family {
        self.family
    }

    /// The error of a value of `field` that is not as `expected`.
    pub fn fault(&self, field: &str, expected: impl Into<String>, found: &Value) -> ConfigError {
        let (field, found) = (field.to_owned(), shortened(found));
        ConfigError::Value { path: self.path.clone(), field, expected: expected.into(), found }
    }

    pub(super) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { path: self.path.clone(), field: field.to_owned() }
    }

    /// The value of `field`, `None` if absent or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A required positive integer.
    pub fn size(&self, field: &str) -> Result<usize, ConfigError> {
        self.optional_size(field)?.ok_or_else(|| self.missing(field))
    }

    /// A required positive integer of at most `most`.
    pub fn size_up_to(&self, field: &str, most: usize) -> Result<usize, ConfigError> {
        let size = self.size(field)?;
        let expected = || format!("a positive integer of at most {most}");
        if size > most { Err(self.fault(field, expected(), &size.into())) } else { Ok(size) }
    }

    /// A positive integer, or `None` when null.
    pub fn optional_size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().filter(|&n| n > 0 && n < 1 << 40);
        size.map(|n| Some(n as usize)).ok_or_else(|| self.fault(field, "a positive integer", value))
    }

    /// A required integer from 0 up.
    pub fn count(&self, field: &str) -> Result<usize, ConfigError> {
        let value = self.get(field).ok_or_else(|| self.missing(field))?;
        let count = value.as_u64().filter(|&n| n < 1 << 40);
        count.map(|n| n as usize).ok_or_else(|| self.fault(field, "an integer from 0 up", value))
    }

    /// A list of numbers from 0 up, empty when null.
    pub fn indices(&self, field: &str) -> Result<Vec<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let numbers = value.as_array().map(|values| values.iter().map(|n| n.as_u64().map(|n| n as usize)));
        let numbers = numbers.and_then(|numbers| numbers.collect::<Option<_>>());
        numbers.ok_or_else(|| self.fault(field, "a list of layer numbers", value))
    }

    /// A required positive number.
    pub fn positive(&self, field: &str) -> Result<f64, ConfigError> {
        self.optional_positive(field)?.ok_or_else(|| self.missing(field))
    }

    /// A positive number, or `None` when null.
    pub fn optional_positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        number.map(Some).ok_or_else(|| self.fault(field, "a positive number", value))
    }

    /// A required boolean.
    pub fn flag(&self, field: &str) -> Result<bool, ConfigError> {
        let value = self.map.get(field).unwrap_or(&Value::Null);
        value.as_bool().ok_or_else(|| self.fault(field, "true or false", value))
    }

    /// `eos_token_id`: one id or a list of them.
    pub(super) fn token_ids(&self) -> Result<Vec<i64>, ConfigError> {
        super::token_ids(&self.path, &self.map)
    }

    /// The id of padding. Negative ids count from the vocabulary's end in torch, and mean that there is none.
    pub(super) fn pad_token_id(&self, vocab_size: usize) -> Result<Option<i64>, ConfigError> {
        let field = "pad_token_id";
        let Some(value) = self.get(field) else { return Ok(None) };
        let vocab_size = vocab_size as i64;
        let id = value.as_i64().filter(|id| (-vocab_size..vocab_size).contains(id));
        let id = id.ok_or_else(|| self.fault(field, format!("an id of the {vocab_size} tokens"), value))?;
        Ok(Some(id).filter(|&id| id >= 0))
    }

    /// Windows of the layers from `layer_types`, or `sliding(layer)` where that is null. A layer that slides needs a
    /// `window`.
    pub fn windows(
        &self,
        layers: usize,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, ConfigError> {
        let slides = match self.get("layer_types") {
            None => (0..layers).map(sliding).collect(),
            Some(types) => self.layers_that_slide(layers, types)?,
        };
        if window.is_none() && slides.contains(&true) {
            let found = self.map.get("sliding_window").unwrap_or(&Value::Null);
            let expected = "the window of the layers that slide, with use_sliding_window true";
            return Err(self.fault("sliding_window", expected, found));
        }
        Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
    }

    fn layers_that_slide(&self, layers: usize, types: &Value) -> Result<Vec<bool>, ConfigError> {
        let fault =
            || self.fault("layer_types", format!("{layers} of full_attention, sliding_attention"), types);
        let names = types.as_array().filter(|names| names.len() == layers).ok_or_else(fault)?;
        let slides = |name: &Value| match name.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(fault()),
        };
        names.iter().map(slides).collect()
    }
}
