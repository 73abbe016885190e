//! Methods and filters of Python and Jinja2 that minijinja lacks or answers otherwise.

use super::jinja_values::{is_printable, python_str};
use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};
use minijinja_contrib::{filters, pycompat};

/// The method that a template is given for one of a dict's which it names without calling it.
pub(super) const UNCALLED: &str = "__uncalled";

/// Adds them to an environment.
pub(super) fn add_to(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(method);
    add_text_filters(env);
    env.add_filter("truncate", truncate);
    env.add_filter("filesizeformat", filters::filesizeformat);
    env.add_function("cycler", |items: minijinja::value::Rest<Value>| {
        minijinja_contrib::globals::cycler(items.0)
    });
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_test("callable", |_: &Value| false);
}

/// Filters of Jinja2 that take `str(value)`, so that `none`, as the content of a message that calls tools, is the text
/// `None`.
fn add_text_filters(env: &mut Environment<'static>) {
    env.add_filter("upper", |value: &Value| python_str(value).to_uppercase());
    env.add_filter("lower", |value: &Value| python_str(value).to_lowercase());
    env.add_filter("title", |value: &Value| minijinja::filters::title(python_str(value).into()));
    env.add_filter("capitalize", |value: &Value| capitalized(&python_str(value)));
    env.add_filter("safe", |value: &Value| Value::from_safe_string(python_str(value)));
    env.add_filter("replace", |value: &Value, from: &Value, to: &Value, count: Option<usize>| {
        let [text, from, to] = [value, from, to].map(python_str);
        count.map_or_else(|| text.replace(&from, &to), |count| text.replacen(&from, &to, count))
    });
    env.add_filter("center", |value: &Value, width: Option<usize>| {
        pad(&python_str(value), width.unwrap_or(80), ' ', Side::Both)
    });
    env.add_filter("urlencode", |value: &Value| url_encoded(&python_str(value)));
    env.add_filter("striptags", |value: &Value| filters::striptags(python_str(value)));
    env.add_filter("trim", |value: &Value, chars: Option<&str>| {
        strip(&python_str(value), chars, "strip").to_owned()
    });
    env.add_filter("wordcount", |value: &Value| {
        let text = python_str(value);
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    env.add_filter("pprint", |_: &Value| -> Result<Value, Error> {
        let why = "the filter pprint is not built: write tojson, or string, in its place";
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
}

/// `str.capitalize`.
fn capitalized(text: &str) -> String {
    let mut rest = text.chars();
    let first: String = rest.next().into_iter().flat_map(char::to_uppercase).collect();
    first + &rest.as_str().to_lowercase()
}

/// Methods of values, as Python has them.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == UNCALLED {
        let (name,): (&str,) = from_args(args)?;
        if value.kind() != ValueKind::Map {
            return value.get_attr(name);
        }
        let why = format!(
            "`.{name}` is a method of Python's dict, not its key: write `.{name}()`, or `['{name}']`"
        );
        return Err(Error::new(ErrorKind::InvalidOperation, why));
    }
    let found = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), name, args)?,
        ValueKind::Seq => sequence_method(value, name, args)?,
        ValueKind::Map if name == "copy" => Some(value.clone()),
        _ => None,
    };
    found.map_or_else(|| pycompat::unknown_method_callback(state, value, name, args), Ok)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "format" => {
            narrow_format(text)?;
            return Ok(None);
        }
        "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ").into(),
        "swapcase" => text.chars().map(swapped).collect::<String>().into(),
        "title" => title(text).into(),
        "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let side = match name {
                "center" => Side::Both,
                "ljust" => Side::Right,
                _ => Side::Left,
            };
            pad(text, width, fill.unwrap_or(' '), side)?.into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign = if text.len() - digits.len() == 1 { &text[..1] } else { "" };
            let rest = &text[sign.len()..];
            format!("{sign}{}", pad(rest, width.saturating_sub(sign.len()), '0', Side::Left)?).into()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (found, rest) = match name {
                "partition" => (text.split_once(separator), (text, "", "")),
                _ => (text.rsplit_once(separator), ("", "", text)),
            };
            let (before, separator, after) = found.map_or(rest, |(before, after)| (before, separator, after));
            (before, separator, after).into()
        }
        "split" | "rsplit" => split(text, name == "rsplit", args)?,
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            lines(text, keep.unwrap_or(false)).into()
        }
        "index" | "rindex" | "find" | "rfind" | "count" => place(text, name, args)?,
        "startswith" | "endswith" if args.len() > 1 => {
            let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (within, _) = slice(text, start, end);
            (if name == "startswith" { within.starts_with(part) } else { within.ends_with(part) }).into()
        }
        "isdecimal" => all(text, is_decimal).into(),
        "istitle" => (text.chars().any(char::is_alphabetic) && title(text) == text).into(),
        "isprintable" => text.chars().all(is_printable).into(),
        "isspace" => all(text, is_space).into(),
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            strip(text, chars, name).into()
        }
        "isidentifier" => {
            let begins = text.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
            (begins && text.chars().all(|c| c.is_alphanumeric() || c == '_')).into()
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            expand_tabs(text, narrow(size.unwrap_or(8))?).into()
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn sequence_method(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == *wanted);
            place.ok_or_else(|| missing("the value is not in the list"))?.into()
        }
        "copy" => value.clone(),
        _ => return Ok(None),
    }))
}

enum Side {
    Left,
    Right,
    Both,
}

/// Characters that a template may ask a text to be filled to.
const WIDEST: usize = 1 << 16;

/// `width`, unless a text of so many characters is only there to fill memory.
pub(super) fn narrow(width: usize) -> Result<usize, Error> {
    let why = || format!("a width of {width}, more than {WIDEST}");
    if width > WIDEST { Err(Error::new(ErrorKind::InvalidOperation, why())) } else { Ok(width) }
}

/// Checks the widths and precisions of a format, as of `{:>8}`: pycompat takes any.
fn narrow_format(format: &str) -> Result<(), Error> {
    let fields = format.split('{').filter_map(|field| field.split('}').next()?.split_once(':'));
    let numbers = fields.flat_map(|(_, shape)| shape.split(|c: char| !c.is_ascii_digit()));
    let widths =
        numbers.filter(|digits| !digits.is_empty()).map(|digits| digits.parse().unwrap_or(usize::MAX));
    widths.map(narrow).try_for_each(|width| width.map(drop))
}

/// Text of at least `width` characters, filled on a side.
fn pad(text: &str, width: usize, fill: char, side: Side) -> Result<String, Error> {
    let missing = narrow(width)?.saturating_sub(text.chars().count());
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        // Python puts the odd character on the left where the width is odd.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fill = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    Ok(format!("{}{text}{}", fill(left), fill(missing - left)))
}

fn swapped(c: char) -> String {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

/// Capitals behind everything that is no letter.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        in_word = c.is_alphabetic();
    }
    out
}

/// True for digits, and in other scripts for numerals that are no fractions, roman or raised ones.
fn is_decimal(c: char) -> bool {
    let other = matches!(c, '\u{b2}' | '\u{b3}' | '\u{b9}' | '\u{bc}'..='\u{be}' | '\u{2070}'..='\u{24ff}');
    c.is_numeric() && !other
}

fn all(text: &str, test: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(test)
}

/// `split` and `rsplit`, with `sep` and `maxsplit` by place or name.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator, most, names): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => names.get::<Option<Value>>("sep")?,
    };
    let most = match most {
        Some(most) => Some(most),
        None => names.get::<Option<Value>>("maxsplit")?,
    };
    names.assert_all_used()?;
    let most = most.map(i64::try_from).transpose()?.and_then(|most| usize::try_from(most).ok());
    let separator = separator.filter(|separator| !separator.is_none());
    let parts: Vec<String> = match (&separator, from_right) {
        (Some(separator), from_right) => {
            let separator = separator.as_str().ok_or_else(|| missing("split: the separator is no string"))?;
            if separator.is_empty() {
                return Err(missing("split: the separator is empty"));
            }
            let parts = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut found: Vec<String> = if from_right {
                text.rsplitn(parts, separator).map(str::to_string).collect()
            } else {
                text.splitn(parts, separator).map(str::to_string).collect()
            };
            if from_right {
                found.reverse();
            }
            found
        }
        (None, false) => words(text, most.unwrap_or(usize::MAX)),
        (None, true) => {
            let backwards: String = text.chars().rev().collect();
            let mut found = words(&backwards, most.unwrap_or(usize::MAX));
            found.reverse();
            found.into_iter().map(|word| word.chars().rev().collect()).collect()
        }
    };
    Ok(parts.into())
}

/// White space as Python has it: with the separators of files, groups, records and units.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `strip`, `lstrip` or `rstrip` by `name`, of `chars` or of white space.
fn strip<'a>(text: &'a str, chars: Option<&str>, name: &str) -> &'a str {
    let is_edge = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if name == "rstrip" { text } else { text.trim_start_matches(is_edge) };
    if name == "lstrip" { text } else { text.trim_end_matches(is_edge) }
}

/// Words of a text, what is left after `most` splits as it is.
fn words(text: &str, most: usize) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = rest.find(is_space).filter(|_| found.len() < most).unwrap_or(rest.len());
        found.push(rest[..end].to_string());
        rest = rest[end..].trim_start_matches(is_space);
    }
    found
}

/// Lines at every line boundary of Python, with their ends if `keep`.
fn lines(text: &str, keep: bool) -> Vec<String> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut found = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let break_length = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        found.push(rest[..end + if keep { break_length } else { 0 }].to_string());
        rest = &rest[end + break_length..];
    }
    found
}

/// `find`, `index`, `count` and their kin, within `start..end`; places are counted in characters.
fn place(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (within, before) = slice(text, start, end);
    let found = match name {
        "count" if part.is_empty() => return Ok((within.chars().count() + 1).into()),
        "count" => return Ok(within.matches(part).count().into()),
        "rindex" | "rfind" => within.rfind(part),
        _ => within.find(part),
    };
    match found {
        Some(at) => Ok((before + within[..at].chars().count()).into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(missing("substring not found")),
    }
}

/// `text[start:end]` and the characters before it.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    let length = text.chars().count() as i64;
    let clamp = |at: i64| if at < 0 { (length + at).max(0) } else { at.min(length) } as usize;
    let (start, end) = (clamp(start.unwrap_or(0)), clamp(end.unwrap_or(length)));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (if start < end { &text[byte(start)..byte(end)] } else { "" }, start)
}

fn expand_tabs(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let fill = size - column % size;
                out.extend(std::iter::repeat_n(' ', fill));
                column += fill;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
fn truncate(
    text: &str,
    length: Option<usize>,
    kill_words: Option<bool>,
    end: Option<&str>,
    names: Kwargs,
) -> Result<String, Error> {
    let length = length.or(names.get::<Option<usize>>("length")?).unwrap_or(255);
    let kill_words = kill_words.or(names.get::<Option<bool>>("killwords")?).unwrap_or(false);
    let end = end.or(names.get::<Option<&str>>("end")?).unwrap_or("...");
    let leeway = names.get::<Option<usize>>("leeway")?.unwrap_or(5);
    names.assert_all_used()?;
    let kept =
        length.checked_sub(end.chars().count()).ok_or_else(|| missing("truncate: shorter than its end"))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let (start, _) = slice(text, None, Some(kept as i64));
    let start = if kill_words { start } else { start.rsplit_once(' ').map_or(start, |(words, _)| words) };
    Ok(format!("{start}{end}"))
}

/// A text as a part of an address, in which letters, digits and `_.-~/` stay.
fn url_encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                out.push(char::from(byte))
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn missing(problem: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}
