//! Rows as the model sees them, for people: the text of every document, with the tokens that carry loss marked.

use super::Run;
use crate::{
    console::count,
    data::{IGNORE_INDEX, Row, Tokenizer},
    error::Result,
};
use std::ops::Range;

/// Marks around tokens that carry loss: signs that no text has.
const MARKS: [&str; 2] = ["⟦", "⟧"];

impl Run {
    /// The first `rows` rows of the run as text; as token ids where there is no tokenizer.
    pub fn samples(&self, rows: usize) -> Result<String> {
        let folder = &self.files.tokenizer;
        let tokenizer = Tokenizer::load(folder).ok();
        let mut text = match &tokenizer {
            Some(_) => String::new(),
            None => format!("no tokenizer in {}: token ids\n", folder.display()),
        };
        for position in 0..rows.min(self.dataset.rows()) {
            let row = self.dataset.row_at(0, position)?;
            text += &shown(position + 1, &row, row.padding(self.pad_id), tokenizer.as_ref());
        }
        Ok(text)
    }
}

/// A document of a row.
struct Document<'a> {
    ids: &'a [i64],
    labels: &'a [i64],
}

fn documents(row: &Row) -> Vec<Document<'_>> {
    let mut start = 0;
    let document = |&length: &usize| {
        let range = start..start + length;
        start += length;
        Document { ids: &row.input_ids[range.clone()], labels: &row.labels[range] }
    };
    row.document_lengths.iter().map(document).collect()
}

impl Document<'_> {
    /// Returns true if token `at` carries loss: the first of a document is predicted from nothing.
    fn is_trained(&self, at: usize) -> bool {
        at > 0 && self.labels[at] != IGNORE_INDEX
    }

    /// Runs of tokens that carry loss, or do not, with which of the two it is.
    fn runs(&self) -> Vec<(Range<usize>, bool)> {
        let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
        for at in 0..self.ids.len() {
            match runs.last_mut() {
                Some((run, trained)) if *trained == self.is_trained(at) => run.end = at + 1,
                _ => runs.push((at..at + 1, self.is_trained(at))),
            }
        }
        runs
    }

    fn text(&self, tokenizer: Option<&Tokenizer>) -> String {
        let mut text = String::new();
        for (run, trained) in self.runs() {
            let run = match tokenizer {
                Some(tokenizer) => decoded(tokenizer, self.ids, run),
                None => self.ids[run].iter().map(|id| format!("{id} ")).collect(),
            };
            let marks = if trained { MARKS } else { ["", ""] };
            text += &format!("{}{run}{}", marks[0], marks[1]);
        }
        text
    }
}

/// The part of the text of `ids` that `run` adds. A decoder may write tokens otherwise at the start of a text, so the
/// ids before them are decoded too.
fn decoded(tokenizer: &Tokenizer, ids: &[i64], run: Range<usize>) -> String {
    let text = |ids: &[i64]| tokenizer.decode(ids, false).unwrap_or_default();
    let (before, with) = (text(&ids[..run.start]), text(&ids[..run.end]));
    with.strip_prefix(&before).map_or_else(|| text(&ids[run]), str::to_owned)
}

/// Row `number` with a heading, document by document; of its last `padding` tokens only the number.
fn shown(number: usize, row: &Row, padding: usize, tokenizer: Option<&Tokenizer>) -> String {
    let mut documents = documents(row);
    if padding > 0 {
        documents.pop();
    }
    let heading = |tokens: usize, trained: usize| format!("{}, {trained} with loss", count(tokens, "token"));
    let mut text = format!(
        "\n== row {number}: {}, {}\n",
        count(documents.len(), "document"),
        heading(row.input_ids.len(), row.valid_tokens())
    );
    for (index, document) in documents.iter().enumerate() {
        let (tokens, trained) =
            (document.ids.len(), (0..document.ids.len()).filter(|&at| document.is_trained(at)));
        text += &format!("-- document {}: {}\n", index + 1, heading(tokens, trained.count()));
        text += &format!("{}\n", document.text(tokenizer));
    }
    if padding > 0 {
        text += &format!("-- padding: {}\n", count(padding, "token"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_with_loss_are_marked_document_by_document() {
        let row = Row {
            input_ids: vec![1, 2, 3, 4, 5, 6, 0],
            labels: vec![1, -100, 3, 4, 5, -100, -100],
            document_lengths: vec![4, 2, 1],
            ..Row::default()
        };
        assert_eq!(
            shown(7, &row, 1, None),
            "\n== row 7: 2 documents, 7 tokens, 2 with loss\n-- document 1: 4 tokens, 2 with loss\n1 2 ⟦3 4 ⟧\n\
             -- document 2: 2 tokens, 0 with loss\n5 6 \n-- padding: 1 token\n"
        );
    }
}
