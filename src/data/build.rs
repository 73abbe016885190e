//! Rows from data files: records are read by one thread, encoded by several and put in the order of the files again;
//! samples are then ordered and packed by their lengths.

use super::{
    DataError, LineProblem, RowInput,
    dataset::{SourceSummary, Summary},
    encode::Encoder,
    error::NO_ROWS,
    formats::{self, Found, Place},
    notes::Notes,
    order,
    pack::pack,
    prepared::Plan,
    source::{Faults, Source},
    split,
    spool::Spool,
    tokenized::Sample,
};
use crate::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod, SampleBy},
    rng::Stream,
};
use crossbeam::channel::{Receiver, Sender, bounded};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::ControlFlow,
    path::Path,
};

/// Samples of a `dummy` dataset without `num_samples`.
pub(super) const DUMMY_SAMPLES: usize = 128;

/// Records and bytes of them that a thread encodes at a time.
const CHUNK_RECORDS: usize = 256;
const CHUNK_BYTES: usize = 1 << 18;

/// Everything besides the files that rows depend on.
pub(super) struct Recipe<'a> {
    pub args: &'a DataArgs,
    /// Data sets before the first of `args`.
    pub earlier: usize,
    pub sources: &'a [Source],
    pub encoder: Encoder<'a>,
    pub pad_id: i64,
    pub seed: u64,
    pub inputs: &'a [RowInput],
}

/// Records of one file, with their number among all chunks of a source. An error is the last of a file.
struct Chunk<T> {
    number: usize,
    file: usize,
    content: Result<T, DataError>,
}

/// Samples of each record, or its problem, and what is to be said of them.
type Encoded = (Vec<(Place, Result<Vec<Sample>, LineProblem>)>, Notes);

/// Counts of a source's samples, and remarks on them.
#[derive(Default)]
struct Outcome {
    summary: SourceSummary,
    notes: Notes,
}

/// The longest sample that is kept, and the field that says so.
pub(super) fn limit(args: &DataArgs) -> (usize, &'static str) {
    let pack = match args.sample_packing_method {
        PackingMethod::None => usize::MAX,
        PackingMethod::Sequential | PackingMethod::Multipack => args.sample_packing_sequence_len,
    };
    match args.max_seq_len {
        Some(max) if max <= pack => (max, "data.max_seq_len"),
        _ => (pack, "data.sample_packing_sequence_len"),
    }
}

impl Recipe<'_> {
    /// The share or number of samples that validate.
    pub fn val_set_size(&self) -> Option<f64> {
        self.args.val_set_size.filter(|&size| size > 0.0 && self.earlier == 0)
    }

    /// All samples, with temporary files in `folder`, and the rows that they make: those to train on, and those of
    /// them that `val_set_size` takes away.
    pub fn build(&self, folder: &Path) -> Result<(Spool, Vec<Plan>), DataError> {
        let io = |source| DataError::Temporary { path: folder.into(), source };
        let mut spool = Spool::new(folder).map_err(io)?;
        let (mut remarks, mut sources, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        for source in self.sources {
            let (index, entry) = (source.index, &self.args.datasets[source.index]);
            let before = spool.samples();
            let outcome = if entry.is_dummy() {
                self.dummy(index, entry, &mut spool).map_err(|fault| fault.at(folder))?
            } else {
                self.files(source, entry, &mut spool).map_err(|fault| fault.at(folder))?
            };
            let Outcome { summary, notes } = outcome;
            if summary.samples == 0 && summary.dropped == 0 {
                let remedy = if entry.is_dummy() { "set its num_samples to at least 1" } else { NO_ROWS };
                return Err(DataError::Empty { path: entry.path.clone(), remedy });
            }
            if summary.samples > 0 && summary.valid_tokens == 0 {
                let hint = notes.foreign_roles().map(|roles| {
                    format!("; only messages of role assistant have one, and there are {roles}")
                });
                return Err(DataError::NothingToLearn {
                    path: entry.path.clone(),
                    hint: hint.unwrap_or_default(),
                });
            }
            remarks.extend(notes.lines().into_iter().map(|line| (index, line)));
            sizes.push(spool.samples() - before);
            sources.push(summary);
        }
        let summary = Summary { remarks, sources, ..Summary::default() };
        let plans = self.plans(&spool, &sizes, summary)?;
        Ok((spool, plans))
    }

    /// The rows of all samples, `sizes` of them from each source.
    fn plans(&self, spool: &Spool, sizes: &[usize], summary: Summary) -> Result<Vec<Plan>, DataError> {
        let dropped = summary.sources.iter().map(|source| source.dropped).sum();
        if spool.samples() == 0 {
            let (limit, field) = limit(self.args);
            return Err(DataError::AllDropped { samples: dropped, limit, field });
        }
        let (each, merged) = (self.args.shuffle_before_merging_datasets, self.args.shuffle_merged_datasets);
        let (chosen, sizes) = self.weighted(sizes);
        let mut order: Vec<usize> = order::sample_order(self.seed, &sizes, each, merged)
            .into_iter()
            .map(|index| chosen.as_ref().map_or(index, |chosen| chosen[index]))
            .collect();
        let mut validation = None;
        if let Some(size) = self.val_set_size() {
            let different = spool.records().iter().collect::<BTreeSet<_>>().len();
            let refused = DataError::Split { size, records: different };
            let Some(drawn) = split::validating(self.seed, spool.records(), size) else {
                return Err(refused);
            };
            order.retain(|&sample| !drawn[sample]);
            let own: Vec<usize> = (0..spool.samples()).filter(|&sample| drawn[sample]).collect();
            let plan = self.plan(spool, &own, Summary::default())?;
            if plan.summary.valid_tokens == 0 {
                return Err(refused);
            }
            validation = Some(plan);
        }
        let plan = self.plan(spool, &order, Summary { dropped, ..summary })?;
        Ok([plan].into_iter().chain(validation).collect())
    }

    /// The rows of the samples in `order`; their counts are added to `summary`.
    fn plan(&self, spool: &Spool, order: &[usize], mut summary: Summary) -> Result<Plan, DataError> {
        let (vocab_size, method) = (self.encoder.vocab_size, self.args.sample_packing_method);
        let multiple =
            self.args.pad_to_multiple_of.filter(|_| method != PackingMethod::None).unwrap_or(1).max(1);
        let pad = u32::try_from(self.pad_id).ok().filter(|&pad| (pad as usize) < vocab_size);
        let lengths: Vec<usize> = order.iter().map(|&sample| spool.tokens_of(sample).1).collect();
        let mut plan = Plan { pad: pad.unwrap_or_default(), ..Plan::default() };
        for documents in pack(method, &lengths, self.args.sample_packing_sequence_len) {
            let tokens: usize = documents.iter().map(|&index| lengths[index]).sum();
            let missing = tokens.next_multiple_of(multiple) - tokens;
            if missing > 0 && pad.is_none() {
                return Err(DataError::PadId { pad_id: self.pad_id, vocab_size });
            }
            plan.padding.push(missing);
            plan.rows.push(documents.into_iter().map(|index| order[index]).collect());
            summary.tokens += tokens + missing;
            summary.padding_tokens += missing;
            summary.longest_row = summary.longest_row.max(tokens + missing);
        }
        summary.samples = order.len();
        summary.rows = plan.rows.len();
        summary.valid_tokens = order.iter().map(|&sample| spool.valid_of(sample)).sum();
        plan.summary = summary;
        Ok(plan)
    }

    /// The samples of an epoch by the weights of their sources, as indices into all samples, and their number by
    /// source. `None` stands for each sample once.
    fn weighted(&self, sizes: &[usize]) -> (Option<Vec<usize>>, Vec<usize>) {
        let weight = |source: &Source| self.args.datasets[source.index].weight;
        if self.sources.iter().all(|source| weight(source) == 1.0) {
            return (None, sizes.to_vec());
        }
        let (mut chosen, mut counts, mut first) = (Vec::new(), Vec::new(), 0);
        for (source, &size) in self.sources.iter().zip(sizes) {
            let before = chosen.len();
            let whole = weight(source).floor();
            for _ in 0..whole as usize {
                chosen.extend(first..first + size);
            }
            let part = ((weight(source) - whole) * size as f64).round() as usize;
            let stream = Stream::new(self.seed, &format!("data.weight.{}", source.index));
            let mut some: Vec<usize> = stream.permutation(size).into_iter().take(part).collect();
            some.sort_unstable();
            chosen.extend(some.into_iter().map(|sample| first + sample));
            counts.push(chosen.len() - before);
            first += size;
        }
        (Some(chosen), counts)
    }

    /// Adds the samples of a source's files that are not too long.
    fn files(&self, source: &Source, entry: &DatasetArgs, spool: &mut Spool) -> Result<Outcome, Fault> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let (send_records, records) = bounded(2 * threads);
            let (send_samples, samples) = bounded(2 * threads);
            scope.spawn(move || read_all(source, entry, &send_records));
            for _ in 0..threads {
                let (records, samples) = (records.clone(), send_samples.clone());
                scope.spawn(move || self.encode_all(source, &records, &samples));
            }
            drop((records, send_samples));
            self.collect(source, &samples, spool)
        })
    }

    /// Encodes chunks until there are none.
    fn encode_all(
        &self,
        source: &Source,
        records: &Receiver<Chunk<Vec<(Place, Found)>>>,
        samples: &Sender<Chunk<Encoded>>,
    ) {
        for Chunk { number, file, content } in records {
            let content = content.map(|found| {
                let mut notes = Notes::default();
                let encode = |(place, found): (Place, Found)| {
                    let encoded = found.and_then(|record| self.encoder.samples(source, &record, &mut notes));
                    (place, encoded)
                };
                let encoded = found.into_iter().map(encode).collect();
                (encoded, notes)
            });
            if samples.send(Chunk { number, file, content }).is_err() {
                return;
            }
        }
    }

    /// Adds samples in the order of their records.
    fn collect(
        &self,
        source: &Source,
        chunks: &Receiver<Chunk<Encoded>>,
        spool: &mut Spool,
    ) -> Result<Outcome, Fault> {
        let mut outcome = Outcome::default();
        let (mut waiting, mut next) = (BTreeMap::new(), 0);
        let (mut faults, mut of_file) = (Faults::default(), 0);
        let splits = self.val_set_size().is_some();
        for chunk in chunks {
            waiting.insert(chunk.number, chunk);
            while let Some(Chunk { file, content, .. }) = waiting.remove(&next) {
                next += 1;
                if file != of_file {
                    std::mem::take(&mut faults).of(&source.files[of_file])?;
                    of_file = file;
                }
                let (encoded, notes) = content?;
                outcome.notes.merge(notes);
                for (place, found) in encoded {
                    match found {
                        Err(problem) => faults.add(place, problem),
                        Ok(samples) => {
                            // Only a split reads the hash.
                            let record = if splits { split::record(&samples) } else { 0 };
                            for sample in samples {
                                let at = || format!("{}:{place}", source.files[file].display());
                                outcome.add(sample, record, self.encoder.limit, source, at, spool)?;
                            }
                        }
                    }
                }
            }
        }
        if let Some(file) = source.files.get(of_file) {
            faults.of(file)?;
        }
        Ok(outcome)
    }

    fn dummy(&self, index: usize, entry: &DatasetArgs, spool: &mut Spool) -> Result<Outcome, Fault> {
        if let Some(input) = self.inputs.iter().find(|input| input.required) {
            return Err(DataError::DummyInput { input: input.name }.into());
        }
        let vocab_size = self.encoder.vocab_size;
        let pack = self.args.sample_packing_sequence_len;
        let length = self.args.max_seq_len.map_or(pack, |max| match self.args.sample_packing_method {
            PackingMethod::None => max,
            PackingMethod::Sequential | PackingMethod::Multipack => max.min(pack),
        });
        if length == 0 || vocab_size == 0 {
            return Err(DataError::DummyShape { path: entry.path.clone() }.into());
        }
        let mut outcome = Outcome::default();
        let stream = Stream::new(self.seed, &format!("data.dummy.{}", self.earlier + index));
        for sample in 0..entry.num_samples.unwrap_or(DUMMY_SAMPLES) {
            let id = |at: usize| stream.below((sample * length + at) as u64, vocab_size as u64) as u32;
            let tokens: Vec<u32> = (0..length).map(id).collect();
            let labels = tokens.iter().map(|&token| i64::from(token)).collect();
            let sample = Sample::whole(tokens, labels);
            outcome.summary.count(&sample, sample.valid_tokens());
            spool.push(&sample, spool.samples() as u64)?;
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// Counts a sample and keeps it if it is not too long.
    fn add(
        &mut self,
        sample: Sample,
        record: u64,
        limit: usize,
        source: &Source,
        at: impl FnOnce() -> String,
        spool: &mut Spool,
    ) -> io::Result<()> {
        if sample.tokens.len() > limit {
            self.summary.dropped += 1;
            return Ok(());
        }
        let valid = sample.valid_tokens();
        // The last piece of a long text may be a single token.
        if valid == 0 && !source.has_chats && source.kind != DatasetType::Text {
            self.notes.count_silent(at);
        }
        self.summary.count(&sample, valid);
        spool.push(&sample, record)
    }
}

/// Sends the records of a source in chunks, at most as many as its `num_samples`.
fn read_all(source: &Source, entry: &DatasetArgs, chunks: &Sender<Chunk<Vec<(Place, Found)>>>) {
    let mut left = entry.num_samples.unwrap_or(usize::MAX);
    let whole = entry.sample_by == SampleBy::Document;
    let mut number = 0;
    for (file, path) in source.files.iter().enumerate() {
        let (mut found, mut bytes) = (Vec::new(), 0);
        let mut send = |content| {
            number += 1;
            chunks.send(Chunk { number: number - 1, file, content }).is_ok()
        };
        let read = formats::read(path, whole, &mut |place, record| {
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            bytes += record.as_ref().map_or(0, |record| record.size());
            found.push((place, record));
            if found.len() < CHUNK_RECORDS && bytes < CHUNK_BYTES {
                return ControlFlow::Continue(());
            }
            bytes = 0;
            if send(Ok(std::mem::take(&mut found))) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        if !send(Ok(found)) {
            return;
        }
        if let Err(error) = read {
            // Nothing behind a broken file is of use.
            let _ = send(Err(error));
            return;
        }
        if left == 0 {
            return;
        }
    }
}

/// A fault of the data, or of the temporary files.
enum Fault {
    Data(DataError),
    Io(io::Error),
}

impl Fault {
    fn at(self, folder: &Path) -> DataError {
        match self {
            Self::Data(error) => error,
            Self::Io(source) => DataError::Temporary { path: folder.into(), source },
        }
    }
}

impl From<DataError> for Fault {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
