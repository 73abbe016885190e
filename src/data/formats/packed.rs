//! Files of text that gzip or zstd packed. A small one can unpack to any size: a row of it has its limit.

use super::{Fault, Found, Place, START, Visit, text};
use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, ErrorKind, Read},
    ops::ControlFlow,
};

/// Limit of a row, unpacked: [`MOST`] bytes or, where that is more, [`MOST_TO_FILE`] times the size of the file. Texts
/// shrink to a third, those that repeat themselves to a twentieth.
const MOST: u64 = 256 << 20;
const MOST_TO_FILE: u64 = 32;

/// Programs that pack.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Packing {
    Gzip,
    Zstd,
}

impl Packing {
    /// The program that packed a file that begins with `start`, if it is packed.
    pub fn of(start: &[u8]) -> Option<Self> {
        if start.starts_with(b"\x1f\x8b") {
            Some(Self::Gzip)
        } else if start.starts_with(b"\x28\xb5\x2f\xfd") {
            Some(Self::Zstd)
        } else {
            None
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    fn unpack<'a>(self, packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
        })
    }
}

/// Limit of a row, unpacked, in a packed file of `size` bytes.
pub(super) fn most_of_a_row(size: u64) -> u64 {
    MOST.max(size.saturating_mul(MOST_TO_FILE))
}

/// Reads what is `packed`, whose text has the name `name`, as [`text::read`] does; `most`: bytes of a row.
pub(super) fn read(
    packing: Packing,
    packed: impl BufRead,
    most: u64,
    name: &str,
    whole: bool,
    visit: &mut Visit,
) -> Result<(), Fault> {
    let left = Cell::new(most);
    let unpacked = Limited { inner: packing.unpack(packed)?, left: &left };
    let mut reader = BufReader::with_capacity(START, unpacked);
    let mut last = None;
    let mut counted = |place: Place, found: Found| -> ControlFlow<()> {
        last = Some(place);
        left.set(most);
        visit(place, found)
    };
    text::read(&mut reader, name, whole, &mut counted).map_err(|fault| {
        let Fault::Io(error) = fault else { return fault };
        let (packing, place) = (packing.name(), behind(last));
        Fault::Broken(match error.kind() {
            ErrorKind::FileTooLarge => format!(
                "the data that {packing} packed have a row, or one object around all rows, of more than {} MB {place}; \
                 write one row a line, or unpack the file",
                most >> 20
            ),
            _ => format!(
                "the data that {packing} packed end or break {place} ({error}); the file is cut or damaged: copy or \
                 write it again"
            ),
        })
    })
}

fn behind(last: Option<Place>) -> String {
    match last {
        None => "before its first row".into(),
        Some(Place::Line(line)) => format!("behind line {line}"),
        Some(Place::Row(row)) => format!("behind row {row}"),
    }
}

/// A reader that fails with [`ErrorKind::FileTooLarge`] where more than `left` bytes are read.
struct Limited<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        let left = self.left.get().checked_sub(read as u64).ok_or(ErrorKind::FileTooLarge)?;
        self.left.set(left);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    /// The rows that `text` is cut into, packed, with the words of the fault.
    fn rows_of(text: &str, most: u64) -> (usize, Option<String>) {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(text.as_bytes()).unwrap();
        let packed = gzip.finish().unwrap();
        let mut count = 0;
        let read = read(Packing::Gzip, &packed[..], most, "a.jsonl", false, &mut |_, _| {
            count += 1;
            ControlFlow::Continue(())
        });
        let fault = read.err().map(|fault| match fault {
            Fault::Broken(words) => words,
            Fault::Io(error) => error.to_string(),
        });
        (count, fault)
    }

    #[test]
    fn a_row_that_unpacks_without_end_is_refused() {
        // Read by START bytes at a time, which may be those of the next row.
        let (most, row) = (4 * START as u64, "{}\n");
        assert_eq!(rows_of(&row.repeat(8 * START / row.len()), most), (8 * START / row.len(), None));
        let long = format!("{row}{}", " ".repeat(8 * START));
        let (count, fault) = rows_of(&long, most);
        assert_eq!(count, 1);
        assert_eq!([0, 1 << 30].map(most_of_a_row), [MOST, 32 << 30]);
        assert!(
            fault
                .is_some_and(|words| words.contains("of more than 4 MB behind line 1; write one row a line"))
        );
    }
}
