//! Files of text: their format by name and first bytes, and those that are read by line.

use super::{Fault, LineProblem, Place, Record, Visit, json, table};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::io::BufRead;

const UTF_16: &str = "text in UTF-16; write it in UTF-8, as `iconv -f UTF-16 -t UTF-8` does";

/// The first bytes of files that are not read.
const FOREIGN: [(&[u8], &str); 6] = [
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"BZh", "a file that bzip2 packed; unpack it with `bunzip2`"),
    (b"\xfd7zXZ\0", "a file that xz packed; unpack it with `unxz`"),
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"{\0", UTF_16),
];

/// The mark that some programs set before a text.
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// Reads a file of text that is named `name`.
pub(super) fn read(
    reader: &mut dyn BufRead,
    name: &str,
    whole: bool,
    visit: &mut Visit,
) -> Result<(), Fault> {
    let buffered = reader.fill_buf()?;
    if let Some((_, what)) = FOREIGN.iter().find(|(magic, _)| buffered.starts_with(magic)) {
        return Err(Fault::Broken((*what).into()));
    }
    let mark = if buffered.starts_with(BOM) { BOM.len() } else { 0 };
    reader.consume(mark);
    let start = reader.fill_buf()?.trim_ascii_start();
    let (first, is_object) = (start.first().copied(), start.starts_with(b"{\""));
    let is_line = is_line_of_json(start);
    match name.rsplit('.').next().unwrap_or_default() {
        "csv" if first != Some(b'{') => table::read(reader, b',', visit),
        "tsv" if first != Some(b'{') => table::read(reader, b'\t', visit),
        "txt" if !is_object => plain(reader, whole, visit),
        _ if first == Some(b'[') => json::list(reader, visit),
        "json" if first == Some(b'{') && !is_line => json::objects(reader, visit),
        _ => json_lines(reader, visit),
    }
}

/// True if the first line is a whole value, as in every file of JSON lines.
fn is_line_of_json(start: &[u8]) -> bool {
    let line = start.split(|&byte| byte == b'\n').next().unwrap_or_default();
    serde_json::from_slice::<IgnoredAny>(line).is_ok()
}

/// Every line that is not blank.
fn json_lines(reader: &mut dyn BufRead, visit: &mut Visit) -> Result<(), Fault> {
    let mut buffer = Vec::new();
    for line in 1.. {
        buffer.clear();
        if reader.read_until(b'\n', &mut buffer)? == 0 {
            break;
        }
        let text = buffer.trim_ascii();
        if !text.is_empty() && visit(Place::Line(line), Ok(Record::Json(text.to_vec()))).is_break() {
            break;
        }
    }
    Ok(())
}

/// Every line that is not blank, or the whole file, as the field `text`.
fn plain(reader: &mut dyn BufRead, whole: bool, visit: &mut Visit) -> Result<(), Fault> {
    let record = |text: &[u8]| match str::from_utf8(text) {
        Ok(text) => Ok(Record::Fields(Map::from_iter([("text".into(), Value::from(text))]))),
        Err(error) => Err(LineProblem::NotUtf8 { byte: error.valid_up_to() + 1 }),
    };
    if whole {
        let mut all = Vec::new();
        reader.read_to_end(&mut all)?;
        if !all.trim_ascii().is_empty() {
            let _ = visit(Place::Line(1), record(&all));
        }
        return Ok(());
    }
    let mut buffer = Vec::new();
    for line in 1.. {
        buffer.clear();
        if reader.read_until(b'\n', &mut buffer)? == 0 {
            break;
        }
        // Spaces belong to a text, the end of its line does not.
        let text = buffer.strip_suffix(b"\n").unwrap_or(&buffer);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if !text.trim_ascii().is_empty() && visit(Place::Line(line), record(text)).is_break() {
            break;
        }
    }
    Ok(())
}
