//! JSON files that are no lines: a list of rows, objects over several lines, and an object that holds the list. The
//! text is cut into values here, so that a list of any length is read row by row.

use super::{Fault, Place, Record, Visit};
use serde_json::{Map, Value};
use std::io::BufRead;

/// Fields that a row has itself, so that the object is no wrapper of a list.
const OF_ROWS: [&str; 7] =
    ["messages", "conversations", "conversation", "input_ids", "prompt", "text", "instruction"];

/// The bytes of a reader, one by one, with their line.
struct Bytes<'a> {
    reader: &'a mut dyn BufRead,
    line: usize,
}

impl Bytes<'_> {
    fn peek(&mut self) -> Result<Option<u8>, Fault> {
        Ok(self.reader.fill_buf()?.first().copied())
    }

    fn step(&mut self, byte: u8) {
        self.line += usize::from(byte == b'\n');
        self.reader.consume(1);
    }

    /// The next byte that is no white space, which stays.
    fn next_token(&mut self) -> Result<Option<u8>, Fault> {
        while let Some(byte) = self.peek()? {
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.step(byte);
        }
        Ok(None)
    }

    /// The text of the value that begins here: up to its closing bracket or, of a plain value, a comma, a bracket or
    /// white space.
    fn value(&mut self, into: &mut Vec<u8>) -> Result<(), Fault> {
        let begins = self.line;
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        into.clear();
        loop {
            let chunk = self.reader.fill_buf()?;
            if chunk.is_empty() {
                if depth > 0 || in_string {
                    return Err(Fault::Broken(format!(
                        "the file ends within the row that begins at line {begins}; it is cut: copy or write it again"
                    )));
                }
                return Ok(());
            }
            let mut end = None;
            for (at, &byte) in chunk.iter().enumerate() {
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                    continue;
                }
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 1 => depth -= 1,
                    b'}' | b']' if depth == 1 => {
                        end = Some(at + 1);
                        break;
                    }
                    b'}' | b']' | b',' if depth == 0 => {
                        end = Some(at);
                        break;
                    }
                    _ if depth == 0 && byte.is_ascii_whitespace() => {
                        end = Some(at);
                        break;
                    }
                    _ => {}
                }
            }
            let taken = &chunk[..end.unwrap_or(chunk.len())];
            self.line += taken.iter().filter(|&&byte| byte == b'\n').count();
            into.extend_from_slice(taken);
            let length = taken.len();
            self.reader.consume(length);
            if end.is_some() {
                return Ok(());
            }
        }
    }
}

/// The elements of a list.
pub(super) fn list(reader: &mut dyn BufRead, visit: &mut Visit) -> Result<(), Fault> {
    let mut bytes = Bytes { reader, line: 1 };
    bytes.next_token()?;
    bytes.step(b'[');
    let mut value = Vec::new();
    let mut is_first = true;
    loop {
        match bytes.next_token()? {
            None => return Err(cut(bytes.line)),
            Some(b']') if is_first => break,
            Some(b',' | b']' | b'}') => return Err(unexpected(&bytes, "a row")),
            Some(_) => {}
        }
        is_first = false;
        let line = bytes.line;
        bytes.value(&mut value)?;
        if visit(Place::Line(line), Ok(Record::Json(value.clone()))).is_break() {
            return Ok(());
        }
        match bytes.next_token()? {
            None => return Err(cut(bytes.line)),
            Some(b',') => bytes.step(b','),
            Some(b']') => break,
            Some(_) => return Err(unexpected(&bytes, "`,` or `]` behind a row")),
        }
    }
    bytes.step(b']');
    match bytes.next_token()? {
        None => Ok(()),
        Some(_) => Err(unexpected(&bytes, "the end of the file behind the list")),
    }
}

fn cut(line: usize) -> Fault {
    let words = format!("the list of rows has no end (line {line}); the file is cut: copy or write it again");
    Fault::Broken(words)
}

fn unexpected(bytes: &Bytes, expected: &str) -> Fault {
    Fault::Broken(format!("not valid JSON at line {}: expected {expected}", bytes.line))
}

/// Objects one after the other; a single one may hold the list of rows.
pub(super) fn objects(reader: &mut dyn BufRead, visit: &mut Visit) -> Result<(), Fault> {
    let mut bytes = Bytes { reader, line: 1 };
    // The first is kept until it is known whether another follows.
    let Some((line, first)) = object(&mut bytes)? else { return Ok(()) };
    let Some(second) = object(&mut bytes)? else { return only(line, first, visit) };
    let mut next = Some((line, first));
    let mut behind = Some(second);
    while let Some((line, value)) = next {
        if visit(Place::Line(line), Ok(Record::Json(value))).is_break() {
            break;
        }
        next = match behind.take() {
            Some(second) => Some(second),
            None => object(&mut bytes)?,
        };
    }
    Ok(())
}

/// The next object with its line, if there is one.
fn object(bytes: &mut Bytes) -> Result<Option<(usize, Vec<u8>)>, Fault> {
    if bytes.next_token()?.is_none() {
        return Ok(None);
    }
    let (line, mut value) = (bytes.line, Vec::new());
    bytes.value(&mut value)?;
    if value.is_empty() { Err(unexpected(bytes, "an object")) } else { Ok(Some((line, value))) }
}

/// The rows of the only object of a file.
fn only(line: usize, text: Vec<u8>, visit: &mut Visit) -> Result<(), Fault> {
    let Some(rows) = serde_json::from_slice(&text).ok().and_then(rows_of) else {
        let _ = visit(Place::Line(line), Ok(Record::Json(text)));
        return Ok(());
    };
    for (index, row) in rows.into_iter().enumerate() {
        let Value::Object(fields) = row else { continue };
        if visit(Place::Row(index + 1), Ok(Record::Fields(fields))).is_break() {
            break;
        }
    }
    Ok(())
}

/// The only list of objects in an object that is no row itself.
fn rows_of(object: Map<String, Value>) -> Option<Vec<Value>> {
    if object.keys().any(|key| OF_ROWS.contains(&key.as_str())) {
        return None;
    }
    let is_list = |value: &Value| matches!(value, Value::Array(items) if items.iter().all(Value::is_object) && !items.is_empty());
    let mut lists = object.into_iter().map(|(_, value)| value).filter(is_list);
    match (lists.next(), lists.next()) {
        (Some(Value::Array(rows)), None) => Some(rows),
        _ => None,
    }
}
