//! Tables of text: csv and tsv, with a header. Cells are text; a field that is a list or an object is JSON in its cell.

use super::{Fault, LineProblem, Place, Record, Visit};
use crate::data::error::one_line;
use csv::{ErrorKind, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};
use std::io::{self, BufRead};

/// Reads a table whose cells `delimiter` divides.
pub(super) fn read(reader: &mut dyn BufRead, delimiter: u8, visit: &mut Visit) -> Result<(), Fault> {
    let mut table = ReaderBuilder::new().delimiter(delimiter).from_reader(reader);
    let header = table.headers().map_err(fault)?.clone();
    if let Some(name) = twice(&header) {
        return Err(Fault::Broken(format!("the header names the column `{name}` twice; rename one of them")));
    }
    let mut row = StringRecord::new();
    let mut line = 1;
    loop {
        let found = match table.read_record(&mut row) {
            Ok(false) => return Ok(()),
            Ok(true) => {
                line = row.position().map_or(line, |place| place.line() as usize);
                let cells = header.iter().zip(&row);
                let fields = cells.map(|(name, cell)| (name.to_owned(), Value::from(cell)));
                Ok(Record::Fields(fields.collect::<Map<_, _>>()))
            }
            Err(error) => {
                line = error.position().map_or(line, |place| place.line() as usize);
                Err(problem(error)?)
            }
        };
        if visit(Place::Line(line), found).is_break() {
            return Ok(());
        }
    }
}

fn twice(header: &StringRecord) -> Option<&str> {
    header
        .iter()
        .enumerate()
        .find(|(at, name)| header.iter().take(*at).any(|other| other == *name))
        .map(|x| x.1)
}

/// The problem of one row, behind which others can be read.
fn problem(error: csv::Error) -> Result<LineProblem, Fault> {
    match error.kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            Ok(LineProblem::Ragged { cells: *len as usize, columns: *expected_len as usize })
        }
        ErrorKind::Utf8 { err, .. } => Ok(LineProblem::NotUtf8 { byte: err.valid_up_to() + 1 }),
        _ => Err(fault(error)),
    }
}

fn fault(error: csv::Error) -> Fault {
    match error.into_kind() {
        ErrorKind::Io(error) => Fault::Io(error),
        ErrorKind::Utf8 { err, .. } => {
            Fault::Io(io::Error::new(io::ErrorKind::InvalidData, format!("the header is not UTF-8: {err}")))
        }
        other => Fault::Broken(one_line(csv_text(&other))),
    }
}

fn csv_text(kind: &ErrorKind) -> String {
    format!("not a table: {kind:?}")
}
