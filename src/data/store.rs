//! Rows of a file that all ranks of a host map: flat arrays, 8 bytes a token.

use super::{IGNORE_INDEX, Row};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    ops::{Deref, Range},
    sync::Arc,
};

/// Stored form of [`IGNORE_INDEX`]; a vocabulary never reaches it.
pub(super) const NO_LABEL: u32 = u32::MAX;

/// Stored form of a number that a document does not give: bits of NaN.
pub(super) const NO_NUMBER: u32 = f32::NAN.to_bits();

/// Words of 4 bytes within a file that is mapped.
#[derive(Clone, Debug)]
pub(super) struct Words {
    map: Arc<Mmap>,
    bytes: Range<usize>,
}

impl Words {
    /// The words at `bytes` of the map, or `None` if they do not lie there whole.
    pub fn new(map: &Arc<Mmap>, bytes: Range<usize>) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, u32>(map.get(bytes.clone())?).ok()?;
        Some(Self { map: map.clone(), bytes })
    }
}

impl Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // Checked when it was made, so that this never is the empty list of a failure.
        bytemuck::try_cast_slice(&self.map[self.bytes.clone()]).unwrap_or_default()
    }
}

/// Rows of documents of tokens, in flat arrays.
#[derive(Debug)]
pub(crate) struct RowStore {
    tokens: Words,
    labels: Words,
    document_lengths: Words,
    /// Documents of each row.
    row_documents: Words,
    /// First token and first document of each row.
    starts: Vec<(usize, usize)>,
    /// Inputs of the loss by name, bits of fp32: those of the tokens up to the last that has the input.
    inputs: BTreeMap<String, Words>,
}

impl RowStore {
    /// Rows from their arrays (tokens, labels, document lengths, documents of each row) and inputs of the loss, or
    /// `None` if these do not fit together.
    pub fn new(
        [tokens, labels, document_lengths, row_documents]: [Words; 4],
        inputs: BTreeMap<String, Words>,
    ) -> Option<Self> {
        let mut starts = Vec::with_capacity(row_documents.len());
        let (mut token, mut document) = (0usize, 0usize);
        for &count in &*row_documents {
            starts.push((token, document));
            let lengths = document_lengths.get(document..document.checked_add(count as usize)?)?;
            token = lengths.iter().try_fold(token, |sum, &length| sum.checked_add(length as usize))?;
            document += count as usize;
        }
        let fits = document == document_lengths.len()
            && token == tokens.len()
            && token == labels.len()
            && inputs.values().all(|bits| bits.len() <= token);
        fits.then_some(Self { tokens, labels, document_lengths, row_documents, starts, inputs })
    }

    pub fn rows(&self) -> usize {
        self.row_documents.len()
    }

    /// Tokens of row `index`.
    fn row_length(&self, index: usize) -> usize {
        let end = self.starts.get(index + 1).map_or(self.tokens.len(), |next| next.0);
        end - self.starts[index].0
    }

    /// Lengths of the documents of row `index`.
    fn documents(&self, index: usize) -> &[u32] {
        let first = self.starts[index].1;
        &self.document_lengths[first..first + self.row_documents[index] as usize]
    }

    /// The tokens of row `index` among all.
    fn range(&self, index: usize) -> Range<usize> {
        let start = self.starts[index].0;
        start..start + self.row_length(index)
    }

    /// Row `index`, or `None` beyond the last.
    pub fn row(&self, index: usize) -> Option<Row> {
        self.starts.get(index)?;
        let (tokens, labels) = (&self.tokens[self.range(index)], &self.labels[self.range(index)]);
        let label = |&label: &u32| if label == NO_LABEL { IGNORE_INDEX } else { i64::from(label) };
        Some(Row {
            input_ids: tokens.iter().map(|&token| i64::from(token)).collect(),
            labels: labels.iter().map(label).collect(),
            document_lengths: self.documents(index).iter().map(|&length| length as usize).collect(),
            inputs: self.inputs.iter().filter_map(|(name, bits)| self.input(name, bits, index)).collect(),
        })
    }

    /// An input of row `index`, if one of its documents gives it.
    fn input(&self, name: &str, bits: &[u32], index: usize) -> Option<(String, Vec<f32>)> {
        let own = self.range(index).map(|at| f32::from_bits(bits.get(at).copied().unwrap_or(NO_NUMBER)));
        let own: Vec<f32> = own.collect();
        own.iter().any(|value| !value.is_nan()).then(|| (name.to_owned(), own))
    }

    /// SHA-256 of all rows.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = RowHash::default();
        for array in [&self.tokens, &self.labels, &self.document_lengths, &self.row_documents] {
            hash.begin(None, array.len());
            hash.add(array);
        }
        for (name, bits) in &self.inputs {
            hash.begin(Some(name), bits.len());
            hash.add(bits);
        }
        hash.finish()
    }
}

/// SHA-256 of rows, array by array: tokens, labels, document lengths, documents per row, inputs by name.
#[derive(Clone, Default)]
pub(super) struct RowHash(Sha256);

impl RowHash {
    /// Begins an array of `words`; inputs have a name.
    pub fn begin(&mut self, name: Option<&str>, words: usize) {
        if let Some(name) = name {
            self.0.update((name.len() as u64).to_le_bytes());
            self.0.update(name);
        }
        self.0.update((words as u64).to_le_bytes());
    }

    pub fn add(&mut self, words: &[u32]) {
        self.0.update(bytemuck::cast_slice::<u32, u8>(words));
    }

    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}
