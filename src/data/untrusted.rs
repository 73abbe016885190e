//! Files as a run reads them, without its threads and files: tests of broken files call this.

use super::{
    DataError, IGNORE_INDEX, LineProblem, RowInput,
    encode::Encoder,
    formats::{self, Found, Place},
    notes::Notes,
    prepared,
    source::Source,
};
use crate::config::{DataArgs, DatasetType, SampleBy};
use std::{ops::ControlFlow, path::Path};

/// Inputs of the loss that rows may give.
const INPUTS: &[RowInput] = &[RowInput { name: "weights", required: false }];

/// Reads the files of `data.datasets`, one at a time.
pub struct RowReader<'a>(Encoder<'a>);

impl<'a> RowReader<'a> {
    /// A reader with the tokenizer and the chat template in `tokenizer_dir`.
    ///
    /// # Errors
    /// These cannot be read.
    pub fn new(args: &'a DataArgs, tokenizer_dir: &Path, vocab_size: usize) -> Result<Self, DataError> {
        let chats = Source { index: 0, kind: DatasetType::Chat, has_chats: true, files: Vec::new() };
        Encoder::new(args, &[chats], Some(tokenizer_dir), vocab_size, INPUTS, 4096).map(Self)
    }

    /// Samples of entry `index`, and the rows that are refused.
    ///
    /// # Errors
    /// A file cannot be read on.
    pub fn read(&self, index: usize) -> Result<(usize, Vec<LineProblem>), DataError> {
        let entry = &self.0.args.datasets[index];
        let source = Source::of(index, entry)?;
        let (mut samples, mut refused, mut notes) = (0, Vec::new(), Notes::default());
        let mut visit = |_: Place, found: Found| {
            match found.and_then(|record| self.0.samples(&source, &record, &mut notes)) {
                Ok(found) => samples += found.iter().filter(|sample| sample.valid_tokens() > 0).count(),
                Err(problem) => refused.push(problem),
            }
            ControlFlow::Continue(())
        };
        for path in &source.files {
            formats::read(path, entry.sample_by == SampleBy::Document, &mut visit)?;
        }
        notes.lines();
        Ok((samples, refused))
    }
}

/// Reads every row of a file of prepared rows: the rows, and their labels that count. `None`: there is no such file.
///
/// # Errors
/// The file is damaged; the text says in what.
pub fn prepared_rows(path: &Path) -> Result<Option<(usize, usize)>, String> {
    let Some(prepared) = prepared::at(path)? else { return Ok(None) };
    let rows = (0..).map_while(|index| prepared.rows.row(index));
    let (mut count, mut labels) = (0, 0);
    for row in rows {
        count += 1;
        labels +=
            row.labels.iter().filter(|&&label| label != IGNORE_INDEX).count().min(row.valid_tokens() + 1);
    }
    Ok(Some((count, labels)))
}
