//! Rows in memory: flat arrays, 8 bytes a token, because every rank holds all of them.

use super::{IGNORE_INDEX, Row, tokenized::Sample};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, ops::Range};

/// Stored form of [`IGNORE_INDEX`]; a vocabulary never reaches it.
const NO_LABEL: u32 = u32::MAX;

/// Stored form of a number that a document does not give: bits of NaN.
const NO_NUMBER: u32 = f32::NAN.to_bits();

/// Rows of documents of tokens, in flat arrays.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RowStore {
    tokens: Vec<u32>,
    labels: Vec<u32>,
    document_lengths: Vec<u32>,
    /// Documents of each row.
    row_documents: Vec<u32>,
    /// First token and first document of each row.
    starts: Vec<(usize, usize)>,
    /// Inputs of the loss by name, bits of fp32: those of the tokens up to the last that has the input.
    inputs: BTreeMap<String, Vec<u32>>,
}

impl RowStore {
    /// Rows from their arrays, or `None` if these do not fit together.
    pub fn from_arrays([tokens, labels, document_lengths, row_documents]: [Vec<u32>; 4]) -> Option<Self> {
        let mut starts = Vec::with_capacity(row_documents.len());
        let (mut token, mut document) = (0usize, 0usize);
        for &count in &row_documents {
            starts.push((token, document));
            let lengths = document_lengths.get(document..document.checked_add(count as usize)?)?;
            token = lengths.iter().try_fold(token, |sum, &length| sum.checked_add(length as usize))?;
            document += count as usize;
        }
        let whole = document == document_lengths.len() && token == tokens.len() && token == labels.len();
        whole.then_some(Self {
            tokens,
            labels,
            document_lengths,
            row_documents,
            starts,
            inputs: BTreeMap::new(),
        })
    }

    /// The rows with inputs of the loss, or `None` if these have more tokens than the rows.
    pub fn with_inputs(self, inputs: BTreeMap<String, Vec<u32>>) -> Option<Self> {
        let fits = inputs.values().all(|bits| bits.len() <= self.tokens.len());
        fits.then_some(Self { inputs, ..self })
    }

    /// Inputs of the loss by name; see the field.
    pub fn inputs(&self) -> &BTreeMap<String, Vec<u32>> {
        &self.inputs
    }

    /// Tokens, labels, document lengths, documents per row.
    pub fn arrays(&self) -> [&[u32]; 4] {
        [&self.tokens, &self.labels, &self.document_lengths, &self.row_documents]
    }

    pub fn rows(&self) -> usize {
        self.row_documents.len()
    }

    /// Begins a row; documents are added to the last row.
    pub fn begin_row(&mut self) {
        self.starts.push((self.tokens.len(), self.document_lengths.len()));
        self.row_documents.push(0);
    }

    /// Adds the documents of row `index` of another store.
    pub fn push_row(&mut self, other: &Self, index: usize) {
        let (first, own) = (self.tokens.len(), other.range(index));
        for (name, bits) in &other.inputs {
            self.push_input(name, first, bits.get(own.start..own.end.min(bits.len())).unwrap_or_default());
        }
        let (tokens, labels) = other.stored(index);
        self.tokens.extend_from_slice(tokens);
        self.labels.extend_from_slice(labels);
        for &length in other.documents(index) {
            self.count_document(length as usize);
        }
    }

    /// Adds a document of `labels` that are token ids or [`IGNORE_INDEX`].
    pub fn push_labelled(&mut self, tokens: &[u32], labels: impl IntoIterator<Item = i64>) {
        self.tokens.extend_from_slice(tokens);
        self.labels.extend(labels.into_iter().map(|label| u32::try_from(label).unwrap_or(NO_LABEL)));
        self.labels.resize(self.tokens.len(), NO_LABEL);
        self.count_document(tokens.len());
    }

    /// Adds a sample as a row with its documents.
    pub fn push_sample(&mut self, sample: &Sample) {
        self.begin_row();
        for (name, bits) in &sample.inputs {
            self.push_input(name, self.tokens.len(), bits);
        }
        let mut at = 0;
        for &length in &sample.documents {
            let document = at..at + length;
            self.push_labelled(&sample.tokens[document.clone()], sample.labels[document].iter().copied());
            at += length;
        }
    }

    /// Adds `count` tokens of padding without labels as a document of its own.
    pub fn push_padding(&mut self, count: usize, pad: u32) {
        let first = self.tokens.len();
        for bits in self.inputs.values_mut() {
            // No loss reads them; a number is what it expects.
            bits.resize(first, NO_NUMBER);
            bits.resize(first + count, 0);
        }
        self.tokens.resize(first + count, pad);
        self.labels.resize(self.tokens.len(), NO_LABEL);
        self.count_document(count);
    }

    /// Adds an input of the tokens from `first` on.
    fn push_input(&mut self, name: &str, first: usize, bits: &[u32]) {
        if !bits.is_empty() {
            let all = self.inputs.entry(name.to_owned()).or_default();
            all.resize(first, NO_NUMBER);
            all.extend_from_slice(bits);
        }
    }

    fn count_document(&mut self, length: usize) {
        self.document_lengths.push(length as u32);
        if let Some(documents) = self.row_documents.last_mut() {
            *documents += 1;
        }
    }

    /// Tokens of row `index`.
    pub fn row_length(&self, index: usize) -> usize {
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

    /// Tokens and labels of row `index` as they are stored.
    fn stored(&self, index: usize) -> (&[u32], &[u32]) {
        let range = self.range(index);
        (&self.tokens[range.clone()], &self.labels[range])
    }

    /// Row `index`, or `None` beyond the last.
    pub fn row(&self, index: usize) -> Option<Row> {
        self.starts.get(index)?;
        let (tokens, labels) = self.stored(index);
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

    /// Tokens with loss over all rows; see [`Row::valid_tokens`].
    pub fn valid_tokens(&self) -> usize {
        self.valid_tokens_from(0)
    }

    /// Tokens with loss in the rows from `row` on.
    pub fn valid_tokens_from(&self, row: usize) -> usize {
        let Some(&(token, document)) = self.starts.get(row) else { return 0 };
        let mut rest = &self.labels[token..];
        let mut valid = 0;
        for &length in &self.document_lengths[document..] {
            let (document, tail) = rest.split_at(length as usize);
            valid += document.iter().skip(1).filter(|&&label| label != NO_LABEL).count();
            rest = tail;
        }
        valid
    }

    /// SHA-256 of all rows.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for array in self.arrays() {
            hash.update((array.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice::<u32, u8>(array));
        }
        for (name, bits) in &self.inputs {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update((bits.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice::<u32, u8>(bits));
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in() {
        let mut store = RowStore::default();
        store.begin_row();
        store.push_labelled(&[1, 2, 3], [-100, 2, 3]);
        store.push_padding(2, 9);
        store.begin_row();
        store.push_labelled(&[4, 5], [4, 5]);
        let first = Row {
            input_ids: vec![1, 2, 3, 9, 9],
            labels: vec![-100, 2, 3, -100, -100],
            document_lengths: vec![3, 2],
            ..Row::default()
        };
        let second =
            Row { input_ids: vec![4, 5], labels: vec![4, 5], document_lengths: vec![2], ..Row::default() };
        assert_eq!(
            (store.row(0), store.row(1), store.row(2)),
            (Some(first.clone()), Some(second.clone()), None)
        );
        assert_eq!(store.valid_tokens(), first.valid_tokens() + second.valid_tokens());
        assert_eq!((first.valid_tokens(), second.valid_tokens()), (2, 1));
        let copy = RowStore::from_arrays(store.arrays().map(<[u32]>::to_vec)).unwrap();
        assert_eq!(copy, store);
        assert_eq!(copy.digest(), store.digest());
    }

    #[test]
    fn inputs_stay_with_their_tokens_in_any_order_of_rows() {
        let sample = |tokens: &[u32], inputs: &[(&'static str, &[f32])]| {
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
            let inputs = inputs.iter().map(|(name, values)| (*name, bits(values))).collect();
            Sample { inputs, ..Sample::whole(tokens.to_vec(), vec![1; tokens.len()]) }
        };
        let mut samples = RowStore::default();
        samples.push_sample(&sample(&[1, 2], &[]));
        samples.push_sample(&sample(&[3, 4], &[("a", &[0.5, 1.5])]));
        samples.push_sample(&sample(&[5], &[("a", &[2.5]), ("b", &[3.5])]));
        samples.push_sample(&sample(&[6], &[]));
        let (mut packed, plain) = (RowStore::default(), samples.row(0).unwrap());
        assert!(plain.inputs.is_empty());
        packed.begin_row();
        for row in [2, 3, 1] {
            packed.push_row(&samples, row);
        }
        packed.push_padding(1, 0);
        packed.begin_row();
        packed.push_row(&samples, 0);
        let row = packed.row(0).unwrap();
        let bits = |name: &str| row.inputs[name].iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits("a"), expected(&[2.5, f32::NAN, 0.5, 1.5, 0.0]));
        assert_eq!(bits("b"), expected(&[3.5, f32::NAN, f32::NAN, f32::NAN, 0.0]));
        assert!(packed.row(1).unwrap().inputs.is_empty());
        let copy = RowStore::from_arrays(packed.arrays().map(<[u32]>::to_vec)).unwrap();
        assert_ne!(copy.digest(), packed.digest());
        assert_eq!(copy.with_inputs(packed.inputs().clone()).unwrap(), packed);
    }

    #[test]
    fn arrays_that_do_not_fit_together_are_refused() {
        let good = [vec![1, 2], vec![1, 2], vec![2], vec![1]];
        assert!(RowStore::from_arrays(good.clone()).is_some());
        for (index, bad) in
            [(0, vec![1]), (1, vec![1, 2, 3]), (2, vec![3]), (2, vec![2, 0]), (3, vec![2]), (3, vec![])]
        {
            let mut arrays = good.clone();
            arrays[index] = bad;
            assert_eq!(RowStore::from_arrays(arrays.clone()), None, "{arrays:?}");
        }
    }
}
