//! Values as Python writes them: `json.dumps` for the `tojson` filter, `repr` and `str` for what a template prints.

use super::{integers::Digits, jinja_methods::narrow};
use fancy_regex::Regex;
use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs},
};
use std::sync::LazyLock;

/// Options of `json.dumps`.
struct JsonStyle {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)` that transformers gives its
/// templates: no HTML escaping, Python's separators.
pub(super) fn tojson(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut positional: Vec<Value> = arguments.into_values();
    let kwargs = match positional.last() {
        Some(last) if last.is_kwargs() => Kwargs::try_from(positional.pop().unwrap_or_default())?,
        _ => Kwargs::from_iter(std::iter::empty::<(String, Value)>()),
    };
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match argument(1, "indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_string),
        Some(number) => Some(" ".repeat(narrow(usize::try_from(number)?)?)),
    };
    let (item_separator, key_separator) = match argument(2, "separators")? {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
    };
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let style = JsonStyle { ensure_ascii, indent, item_separator, key_separator, sort_keys };
    let mut out = String::new();
    write_json(&mut out, value, &style, 0)?;
    Ok(Value::from(out))
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_container(out, style, depth, ['[', ']'], &items, |out, item| {
                write_json(out, item, style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                entries.push((json_key(&key)?, item));
            }
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            write_container(out, style, depth, ['{', '}'], &entries, |out, (key, item)| {
                write_json_string(out, key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_json(out, item, style, depth + 1)
            })?;
        }
        kind => {
            let Some(digits) = value.downcast_object_ref::<Digits>() else {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{kind} cannot be written as JSON"),
                ));
            };
            out.push_str(digits.text());
        }
    }
    Ok(())
}

fn write_container<T>(
    out: &mut String,
    style: &JsonStyle,
    depth: usize,
    [open, close]: [char; 2],
    items: &[T],
    mut write: impl FnMut(&mut String, &T) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    };
    out.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, depth + 1);
        write(out, item)?;
    }
    if !items.is_empty() {
        new_line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        ValueKind::Number => Ok(number(key)),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("{kind} cannot be a JSON key"))),
    }
}

fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `str(value)`: what `{{ value }}` and the `string` filter give.
pub(super) fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Number => number(value),
        ValueKind::Seq | ValueKind::Map => python_repr(value),
        _ => value.to_string(),
    }
}

fn python_repr(value: &Value) -> String {
    let join = |items: Vec<String>| items.join(", ");
    match value.kind() {
        ValueKind::String => string_repr(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items: Vec<String> =
                value.try_iter().into_iter().flatten().map(|item| python_repr(&item)).collect();
            match (value.is_tuple(), items.len()) {
                (true, 1) => format!("({},)", items[0]),
                (true, _) => format!("({})", join(items)),
                (false, _) => format!("[{}]", join(items)),
            }
        }
        ValueKind::Map => {
            let entry = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key), python_repr(&item))
            };
            format!("{{{}}}", join(value.try_iter().into_iter().flatten().map(entry).collect()))
        }
        _ => python_str(value),
    }
}

fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
    out
}

/// `str.isprintable` of one character: no control, format, private or unassigned one, and no space but the plain one.
pub(super) fn is_printable(c: char) -> bool {
    static NOT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\p{C}\p{Z}]$").ok());
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let not = |regex: &Regex| regex.is_match(c.encode_utf8(&mut [0; 4])).unwrap_or(false);
    !NOT.as_ref().is_some_and(not)
}

/// An integer, or a float as Python's `repr` writes it: shortest digits, an exponent below 1e-4 and from 1e16.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !number.is_finite() {
        return if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::value::Serde;

    fn dumps(json: &str, arguments: Vec<Value>) -> String {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        tojson(&Value::from(Serde(&value)), Rest(arguments.into_iter().map(ValueOrKwargs::from).collect()))
            .unwrap()
            .to_string()
    }

    #[test]
    fn json_is_that_of_python() {
        let text =
            r#"{"b":[1,2.0,1e16,1e-05,0.0001,-0.0],"a":{"x":"é<&'\"\n\u0001","y":[]},"t":true,"n":null}"#;
        assert_eq!(
            dumps(text, vec![]),
            r#"{"b": [1, 2.0, 1e+16, 1e-05, 0.0001, -0.0], "a": {"x": "é<&'\"\n\u0001", "y": []}, "t": true, "n": null}"#
        );
        let indented = "{\n  \"b\": [\n    1\n  ],\n  \"a\": {}\n}";
        assert_eq!(dumps(r#"{"b":[1],"a":{}}"#, vec![false.into(), 2.into()]), indented);
        let kwargs = Kwargs::from_iter([("ensure_ascii", Value::from(true)), ("sort_keys", true.into())]);
        assert_eq!(
            dumps(r#"{"é":"😀","a":1}"#, vec![kwargs.into()]),
            r#"{"a": 1, "\u00e9": "\ud83d\ude00"}"#
        );
    }

    #[test]
    fn printed_containers_are_those_of_python() {
        let value: serde_json::Value =
            serde_json::from_str(r#"{"a":["x'y","q\"",null,true,1.5],"b":{}}"#).unwrap();
        let printed = python_str(&Value::from(Serde(&value)));
        assert_eq!(printed, r#"{'a': ["x'y", 'q"', None, True, 1.5], 'b': {}}"#);
    }
}
