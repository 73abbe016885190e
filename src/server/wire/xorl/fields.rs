//! Reads bodies without data, with errors that name the field.

use super::bodies::Address;
use crate::server::{app::DEFAULT_MODEL, fault::Fault, request::ModelId, wire::check_size};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::{Deserializer, Track};

/// A body that is a JSON object.
///
/// # Errors
/// It is none, or too large; nested deeper than 128 levels counts as none.
pub fn object(body: &[u8]) -> Result<Map<String, Value>, Fault> {
    read(body)
}

/// A body of type `T`.
///
/// # Errors
/// It is no JSON object, too large, or a field is wrong or missing.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    check_size(body)?;
    read_data(body)
}

/// A body of type `T` that may be as large as the server takes them.
///
/// # Errors
/// It is no JSON object, or a field is wrong or missing.
pub fn read_data<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    // A struct would be read from a list, too.
    if body.trim_ascii_start().first().is_some_and(|&first| first != b'{') {
        return Err(Fault::user("body: expected a JSON object"));
    }
    let wrong = |error: &serde_json::Error| Fault::user(format!("body: expected a JSON object: {error}"));
    let (mut json, mut track) = (serde_json::Deserializer::from_slice(body), Track::new());
    let read = T::deserialize(Deserializer::new(&mut json, &mut track)).map_err(|error| {
        let path = track.path().to_string();
        if error.is_data() && path != "." { Fault::user(format!("{path}: {error}")) } else { wrong(&error) }
    })?;
    json.end().map_err(|error| wrong(&error))?;
    Ok(read)
}

/// `number`, if it is there, checked by `is_fine`.
///
/// # Errors
/// It is not fine; the text names it by `name`.
pub fn checked(
    name: &str,
    number: Option<f64>,
    expected: &str,
    is_fine: fn(f64) -> bool,
) -> Result<Option<f64>, Fault> {
    match number.filter(|&number| !is_fine(number)) {
        Some(number) => Err(Fault::user(format!("{name}: expected {expected}, got {number}"))),
        None => Ok(number),
    }
}

/// The adapter that `text` names, or the default one.
pub fn model_id(text: Option<&str>) -> Result<ModelId, Fault> {
    ModelId::new(text.unwrap_or(DEFAULT_MODEL)).map_err(|error| Fault::user(error.to_string()))
}

impl Address {
    /// The adapter: `model_id`, or its other name `session_id`.
    pub fn model(&self) -> Result<ModelId, Fault> {
        model_id(self.model_id.as_deref().or(self.session_id.as_deref()))
    }
}
