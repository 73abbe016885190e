//! Integers of JSON that no machine word holds. Python keeps all their digits and a template writes them, while the
//! reader of JSON would make floats of them. They travel as objects with a mark.

use super::LineProblem;
use minijinja::value::{Object, ObjectRepr, Value};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::Value as Json;
use std::{borrow::Cow, fmt, sync::Arc};

/// The one key of the object that stands for an integer. U+10FFFF is no character, so that no text has it.
const MARK: &str = "\u{10FFFF}";

/// Digits beyond which Python refuses to read an integer.
const MOST_DIGITS: usize = 4300;

/// A line of JSON whose integers beyond 64 bits are marked objects.
pub(super) fn quoted(line: &[u8]) -> Result<Cow<'_, [u8]>, LineProblem> {
    let escaped = b"\\udbff\\udfff";
    if line.windows(MARK.len()).any(|bytes| bytes == MARK.as_bytes())
        || line.windows(escaped.len()).any(|bytes| bytes.eq_ignore_ascii_case(escaped))
    {
        return Err(LineProblem::NoCharacter);
    }
    let (mut out, mut copied) = (Vec::new(), 0);
    let (mut at, mut in_string) = (0, false);
    while at < line.len() {
        match line[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'-' | b'0'..=b'9' if !in_string => {
                let is_number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
                let length = line[at..].iter().position(|byte| !is_number(byte)).unwrap_or(line.len() - at);
                if let Some(text) = replacement(&line[at..at + length])? {
                    out.extend_from_slice(&line[copied..at]);
                    out.extend_from_slice(text.as_bytes());
                    copied = at + length;
                }
                at += length - 1;
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(line));
    }
    out.extend_from_slice(&line[copied..]);
    Ok(Cow::Owned(out))
}

/// The text in place of a number that would lose its digits or, as -0, its being an integer.
fn replacement(number: &[u8]) -> Result<Option<String>, LineProblem> {
    let digits = number.strip_prefix(b"-").unwrap_or(number);
    if number == b"-0" {
        return Ok(Some("0".into()));
    }
    let Ok(text) = str::from_utf8(number) else { return Ok(None) };
    let plain = digits.iter().all(u8::is_ascii_digit) && !digits.is_empty() && digits[0] != b'0';
    if !plain || text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok() {
        return Ok(None);
    }
    if digits.len() > MOST_DIGITS {
        return Err(LineProblem::LongInteger { digits: digits.len(), most: MOST_DIGITS });
    }
    Ok(Some(format!("{{\"{MARK}\":\"{text}\"}}")))
}

/// The digits of a marked object.
pub(super) fn digits(value: &Json) -> Option<&str> {
    value.get(MARK)?.as_str()
}

/// JSON as a template's values, marked objects as the integers that they stand for.
pub(super) struct Python<'a>(pub &'a Json);

impl Serialize for Python<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(digits) = digits(self.0) {
            return match digits.parse::<i128>() {
                Ok(number) => serializer.serialize_i128(number),
                Err(_) => Value::from_object(Digits(digits.into())).serialize(serializer),
            };
        }
        match self.0 {
            Json::Array(items) => {
                let mut sequence = serializer.serialize_seq(Some(items.len()))?;
                items.iter().try_for_each(|item| sequence.serialize_element(&Python(item)))?;
                sequence.end()
            }
            Json::Object(fields) => {
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                fields.iter().try_for_each(|(name, value)| map.serialize_entry(name, &Python(value)))?;
                map.end()
            }
            other => other.serialize(serializer),
        }
    }
}

/// An integer of any size; a template can print it, not compute with it.
#[derive(Debug)]
pub(super) struct Digits(String);

impl Digits {
    /// The digits, behind a minus for a negative number.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl Object for Digits {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_beyond_64_bits_keep_their_digits() {
        let line = br#"{"a": 18446744073709551616, "b": [-9223372036854775809,1], "c": "18446744073709551616", "d": -0, "e": 1e20, "f": 18446744073709551615}"#;
        let object: Json = serde_json::from_slice(&quoted(line).unwrap()).unwrap();
        let value = Value::from(minijinja::value::Serde(&Python(&object)));
        let text = |key: &str| value.get_attr(key).unwrap().to_string();
        assert_eq!(text("a"), "18446744073709551616");
        assert_eq!(text("b"), "[-9223372036854775809, 1]");
        assert_eq!((text("c"), text("d")), ("18446744073709551616".into(), "0".into()));
        assert_eq!(text("f"), "18446744073709551615");
        assert!(object["e"].is_f64());
        let long = format!("[{}]", "7".repeat(90));
        let object: Json = serde_json::from_slice(&quoted(long.as_bytes()).unwrap()).unwrap();
        assert_eq!(Value::from(minijinja::value::Serde(&Python(&object))).to_string(), long);
    }

    #[test]
    fn marks_in_a_text_and_integers_that_python_refuses_are_refused() {
        for line in ["{\"a\": \"\u{10FFFF}1\"}", r#"{"a": "\uDBFF\udfff1"}"#] {
            assert_eq!(quoted(line.as_bytes()), Err(LineProblem::NoCharacter));
        }
        let long = format!("[{}]", "7".repeat(4301));
        assert!(matches!(quoted(long.as_bytes()), Err(LineProblem::LongInteger { digits: 4301, .. })));
    }
}
