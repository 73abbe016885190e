//! Fields of a JSON object, read with errors that name them. Fields that nobody asks for are ignored, and null counts
//! as absent.

use crate::{
    console::shortened,
    server::{app::DEFAULT_MODEL, fault::Fault, request::ModelId, wire::check_size},
};
use serde_json::{Map, Value};

/// A body that is a JSON object.
///
/// # Errors
/// It is none, or too large; nested deeper than 128 levels counts as none.
pub fn object(body: &[u8]) -> Result<Map<String, Value>, Fault> {
    check_size(body)?;
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(Fault::user(format!("body: expected a JSON object, got {}", shortened(&other)))),
        Err(error) => Err(Fault::user(format!("body: expected a JSON object: {error}"))),
    }
}

/// The fields of an object.
pub struct Fields {
    /// The way to the object, for errors: `lora_config.`.
    prefix: &'static str,
    fields: Map<String, Value>,
}

impl Fields {
    pub fn read(body: &[u8]) -> Result<Self, Fault> {
        Ok(Self { prefix: "", fields: object(body)? })
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, value: &Value) -> Fault {
        Fault::user(format!("{}{name}: expected {expected}, got {}", self.prefix, shortened(value)))
    }

    /// An object in a field; empty where it is absent. `prefix` is the field's name with a dot.
    pub fn object(&self, name: &str, prefix: &'static str) -> Result<Self, Fault> {
        match self.get(name) {
            None => Ok(Self { prefix, fields: Map::new() }),
            Some(Value::Object(fields)) => Ok(Self { prefix, fields: fields.clone() }),
            Some(other) => Err(self.wrong(name, "an object", other)),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&str>, Fault> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a text", other)),
        }
    }

    pub fn texts(&self, name: &str) -> Result<Option<Vec<String>>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let texts =
            value.as_array().and_then(|all| all.iter().map(|one| one.as_str().map(str::to_owned)).collect());
        texts.map(Some).ok_or_else(|| self.wrong(name, "a list of texts", value))
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>, Fault> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(name, "true or false", other)),
        }
    }

    pub fn integer(&self, name: &str) -> Result<Option<i64>, Fault> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_i64().map(Some).ok_or_else(|| self.wrong(name, "an integer", value))
    }

    /// The first number that is there of several names, checked by `is_fine`.
    pub fn number(
        &self,
        names: &[&str],
        expected: &str,
        is_fine: fn(f64) -> bool,
    ) -> Result<Option<f64>, Fault> {
        let Some((name, value)) = names.iter().find_map(|name| Some((name, self.get(name)?))) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| number.is_finite() && is_fine(*number));
        number.map(Some).ok_or_else(|| self.wrong(name, expected, value))
    }

    /// The adapter: `model_id`, or its other name `session_id`.
    pub fn model(&self) -> Result<ModelId, Fault> {
        let own = self.text("model_id")?;
        model_id(own.or(self.text("session_id")?))
    }

    pub fn seq_id(&self) -> Result<Option<i64>, Fault> {
        self.integer("seq_id")
    }
}

/// The adapter that `text` names, or the default one.
pub fn model_id(text: Option<&str>) -> Result<ModelId, Fault> {
    ModelId::new(text.unwrap_or(DEFAULT_MODEL)).map_err(|error| Fault::user(error.to_string()))
}
