//! Samples while data are prepared: their tokens, labels and numbers in files, only their lengths in memory, so that
//! data of any size take little of it. The files have no name and go with the program.

use super::{
    IGNORE_INDEX,
    store::{NO_LABEL, NO_NUMBER},
    tokenized::Sample,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

/// Words that are copied at a time.
const BLOCK: usize = 1 << 16;

/// Words of 4 bytes in a file, which are appended and then read anywhere.
#[derive(Debug)]
pub(super) struct Column {
    file: BufWriter<File>,
    words: usize,
}

/// A part of an array: words of a column, or one word many times.
#[derive(Clone, Copy, Debug)]
pub(super) enum Segment {
    Copy { start: usize, words: usize },
    Fill { word: u32, words: usize },
}

/// Samples with their documents, in the order in which they came.
#[derive(Debug)]
pub(super) struct Spool {
    folder: PathBuf,
    pub tokens: Column,
    pub labels: Column,
    /// Inputs of the loss by name: those of the tokens up to the last that has the input.
    pub inputs: BTreeMap<&'static str, Column>,
    /// First token and first document of each sample, and of the one behind the last.
    starts: Vec<(usize, usize)>,
    documents: Vec<u32>,
    /// Tokens with loss of each sample.
    valid: Vec<u32>,
    /// The record that each sample came from, see [`super::split`].
    records: Vec<u64>,
}

impl Column {
    fn new(folder: &Path) -> io::Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".samples-{}-{number}.tmp", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file: BufWriter::with_capacity(4 * BLOCK, file), words: 0 })
    }

    fn push(&mut self, words: &[u32]) -> io::Result<()> {
        self.words += words.len();
        self.file.write_all(bytemuck::cast_slice(words))
    }

    /// Adds `word` until there are `words`.
    fn fill_to(&mut self, words: usize, word: u32) -> io::Result<()> {
        while self.words < words {
            let more = (words - self.words).min(BLOCK);
            self.push(&vec![word; more])?;
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.words
    }

    /// Gives `each` the words of `segments` in blocks.
    pub fn copy(
        &mut self,
        segments: &[Segment],
        each: &mut dyn FnMut(&[u32]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.file.flush()?;
        let file = self.file.get_ref();
        let mut block: Vec<u32> = Vec::with_capacity(BLOCK);
        for &segment in segments {
            let (mut at, mut left) = match segment {
                Segment::Copy { start, words } => (start, words),
                Segment::Fill { words, .. } => (0, words),
            };
            while left > 0 {
                if block.len() == BLOCK {
                    each(&block)?;
                    block.clear();
                }
                let (first, words) = (block.len(), left.min(BLOCK - block.len()));
                match segment {
                    Segment::Fill { word, .. } => block.resize(first + words, word),
                    Segment::Copy { .. } => {
                        block.resize(first + words, 0);
                        file.read_exact_at(bytemuck::cast_slice_mut(&mut block[first..]), 4 * at as u64)?;
                    }
                }
                at += words;
                left -= words;
            }
        }
        each(&block)
    }
}

impl Segment {
    pub fn words(&self) -> usize {
        match self {
            Self::Copy { words, .. } | Self::Fill { words, .. } => *words,
        }
    }
}

impl Spool {
    /// No samples; their files lie in `folder`.
    pub fn new(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            folder: folder.into(),
            tokens: Column::new(folder)?,
            labels: Column::new(folder)?,
            inputs: BTreeMap::new(),
            starts: vec![(0, 0)],
            documents: Vec::new(),
            valid: Vec::new(),
            records: Vec::new(),
        })
    }

    /// Adds a sample of `record`.
    pub fn push(&mut self, sample: &Sample, record: u64) -> io::Result<()> {
        let first = self.tokens.len();
        for (name, bits) in sample.inputs.iter().filter(|(_, bits)| !bits.is_empty()) {
            if !self.inputs.contains_key(name) {
                self.inputs.insert(name, Column::new(&self.folder)?);
            }
            if let Some(column) = self.inputs.get_mut(name) {
                column.fill_to(first, NO_NUMBER)?;
                column.push(bits)?;
            }
        }
        let label = |&label: &i64| if label == IGNORE_INDEX { NO_LABEL } else { label as u32 };
        let labels: Vec<u32> = sample.labels.iter().map(label).collect();
        self.tokens.push(&sample.tokens)?;
        self.labels.push(&labels)?;
        self.documents.extend(sample.documents.iter().map(|&length| length as u32));
        self.starts.push((self.tokens.len(), self.documents.len()));
        self.valid.push(sample.valid_tokens() as u32);
        self.records.push(record);
        Ok(())
    }

    /// Tokens with loss of a sample.
    pub fn valid_of(&self, sample: usize) -> usize {
        self.valid[sample] as usize
    }

    /// The record of each sample.
    pub fn records(&self) -> &[u64] {
        &self.records
    }

    pub fn samples(&self) -> usize {
        self.starts.len() - 1
    }

    /// First token and number of tokens of a sample.
    pub fn tokens_of(&self, sample: usize) -> (usize, usize) {
        let start = self.starts[sample].0;
        (start, self.starts[sample + 1].0 - start)
    }

    /// Lengths of the documents of a sample.
    pub fn documents_of(&self, sample: usize) -> &[u32] {
        &self.documents[self.starts[sample].1..self.starts[sample + 1].1]
    }
}
