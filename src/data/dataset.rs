//! The data of a run: all rows, the same on every rank, and which of them stands at which position of an epoch.

use super::{
    ChatTemplate, Clock, DataError, IGNORE_INDEX, LineProblem, ROWS_PER_GROUP, Row, RowInput, Tokenizer,
    error::ONE_ROW_A_LINE,
    messages::{self, parse_chat},
    notes::Notes,
    order,
    pack::pack,
    preference, prepared, source, split,
    store::RowStore,
    tokenized::{Sample, parse_tokenized},
    tokenizer::Encoded,
    turns,
};
use crate::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod, Turns},
    console::first_of,
    rng::Stream,
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// The date that a template sees when training data are rendered, 2024-07-26 (what Llama's templates fall back
/// to): a date of today would give ranks, restarts and resumes on another day other data.
pub const TRAINING_CLOCK: Clock = Clock::Fixed(1_721_952_000);

/// Samples of a `dummy` dataset without `num_samples`.
const DUMMY_SAMPLES: usize = 128;

/// Changes when the meaning of prepared rows does.
const FORMAT: u32 = 3;

/// Counts of the data.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Samples that are used.
    pub samples: usize,
    /// Samples that were dropped because they are too long.
    pub dropped: usize,
    pub rows: usize,
    /// Tokens of all rows, padding included.
    pub tokens: usize,
    pub padding_tokens: usize,
    /// Tokens with loss; see [`Row::valid_tokens`].
    pub valid_tokens: usize,
    /// Tokens of the longest row.
    pub longest_row: usize,
    /// Counts of each data set that the user may not expect, by its place in `data.datasets`.
    pub remarks: Vec<(usize, String)>,
}

/// All rows of a run.
#[derive(Debug)]
pub struct Dataset {
    store: RowStore,
    summary: Summary,
    validation: Option<Prepared>,
    fingerprint: String,
    seed: u64,
    shuffle: bool,
    /// The order of the epoch that was asked for last.
    order: Mutex<Option<(usize, Arc<[usize]>)>>,
}

/// Rows with their counts.
type Prepared = (RowStore, Summary);

/// Everything besides the files that rows depend on.
#[derive(Clone, Copy)]
struct Recipe<'a> {
    args: &'a DataArgs,
    /// Data sets before the first of `args`.
    earlier: usize,
    text: Option<&'a (Tokenizer, ChatTemplate)>,
    vocab_size: usize,
    pad_id: i64,
    seed: u64,
    inputs: &'a [RowInput],
}

impl Dataset {
    /// Reads, tokenises and packs `args.datasets`, or takes the prepared rows of an earlier run.
    ///
    /// `tokenizer_dir` (tokenizer.json and chat template) is needed only for chats. `vocab_size` is the model's:
    /// no token id may reach it. `pad_id` fills packs up to `pad_to_multiple_of`, without labels.
    ///
    /// - A sample longer than `max_seq_len`, or than a pack, is dropped; one warning counts them.
    /// - With packing, a pack may exceed `sample_packing_sequence_len` by its padding alone.
    /// - `dummy`: `num_samples` (128) samples of random ids, all trained, each of `max_seq_len` tokens or, where
    ///   that is null or longer, of `sample_packing_sequence_len`.
    pub fn open(
        args: &DataArgs,
        tokenizer_dir: Option<&Path>,
        vocab_size: usize,
        pad_id: i64,
        seed: u64,
    ) -> Result<Self, DataError> {
        Self::open_with_inputs(args, tokenizer_dir, vocab_size, pad_id, seed, &[])
    }

    /// The same with numbers for each token that the loss reads. Only rows of type tokenized can give them.
    pub fn open_with_inputs(
        args: &DataArgs,
        tokenizer_dir: Option<&Path>,
        vocab_size: usize,
        pad_id: i64,
        seed: u64,
        inputs: &[RowInput],
    ) -> Result<Self, DataError> {
        if args.datasets.is_empty() {
            return Err(DataError::NoDatasets);
        }
        let all = || args.datasets.iter().chain(args.validation_sets());
        let text = match all().find(|entry| is_chat(entry)) {
            None => None,
            Some(entry) => {
                let dir = tokenizer_dir.ok_or_else(|| DataError::NoTokenizer { path: entry.path.clone() })?;
                let template = ChatTemplate::load_with_clock(dir, TRAINING_CLOCK)?;
                if template.reads_clock() {
                    tracing::warn!(
                        "the chat template writes today's date: training data get 2024-07-26 instead"
                    );
                }
                if args.turns == Turns::Last && args.train_on_inputs {
                    return Err(DataError::TurnsOfAll);
                }
                Some((Tokenizer::load(dir)?, template))
            }
        };
        for entry in all().filter(|entry| !is_dummy(entry)) {
            let left_out = source::left_out(&entry.path);
            if !left_out.is_empty() {
                let names = first_of(&left_out);
                tracing::warn!(
                    "{}: only .jsonl files of a folder are read, not {names}",
                    entry.path.display()
                );
            }
        }
        let recipe = Recipe { args, earlier: 0, text: text.as_ref(), vocab_size, pad_id, seed, inputs };
        let ((store, summary), mut validation) = recipe.rows()?;
        warn_of(args, &summary);
        if !args.validation_sets().is_empty() {
            // In the order of the files.
            let own = DataArgs {
                datasets: args.validation_sets().to_vec(),
                test_datasets: None,
                shuffle_merged_datasets: false,
                shuffle_before_merging_datasets: false,
                ..args.clone()
            };
            let recipe = Recipe { args: &own, earlier: args.datasets.len(), ..recipe };
            let (rows, _) = recipe.rows()?;
            warn_of(&own, &rows.1);
            validation = Some(rows);
        }
        let mut hash = Sha256::new();
        hash.update(store.digest());
        hash.update(seed.to_le_bytes());
        hash.update([u8::from(args.shuffle_merged_datasets)]);
        let fingerprint = format!("{:x}", hash.finalize());
        let shuffle = args.shuffle_merged_datasets;
        Ok(Self { store, summary, validation, fingerprint, seed, shuffle, order: Mutex::new(None) })
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> usize {
        self.store.rows()
    }

    /// The row at `position` (from 0) of `epoch` (from 0): a function of these, the seed and the data alone.
    pub fn row_at(&self, epoch: usize, position: usize) -> Result<Row, DataError> {
        let order = self.order_of(epoch);
        let row = order.get(position).and_then(|&index| self.store.row(index));
        row.ok_or_else(|| DataError::DataCursor { epoch, position, rows: self.rows() })
    }

    /// Counts for the user.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Rows that validate.
    pub fn validation_rows(&self) -> usize {
        self.validation.as_ref().map_or(0, |(store, _)| store.rows())
    }

    /// The row at `index` of those that validate, always in the same order.
    pub fn validation_row(&self, index: usize) -> Result<Row, DataError> {
        let row = self.validation.as_ref().and_then(|(store, _)| store.row(index));
        row.ok_or_else(|| DataError::DataCursor { epoch: 0, position: index, rows: self.validation_rows() })
    }

    /// Counts of the rows that validate.
    pub fn validation_summary(&self) -> Option<&Summary> {
        self.validation.as_ref().map(|(_, summary)| summary)
    }

    /// A hash of the rows that validate, empty where there are none.
    pub fn validation_fingerprint(&self) -> String {
        let digest =
            |(store, _): &Prepared| store.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        self.validation.as_ref().map(digest).unwrap_or_default()
    }

    /// A hash of all rows and their order in all epochs: equal on ranks, and before and after a resume, exactly
    /// when they train on the same data in the same order.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn order_of(&self, epoch: usize) -> Arc<[usize]> {
        let mut cached = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((of, order)) if *of == epoch => order.clone(),
            _ => {
                let order: Arc<[usize]> =
                    order::row_order(self.seed, epoch, self.rows(), ROWS_PER_GROUP, self.shuffle).into();
                *cached = Some((epoch, order.clone()));
                order
            }
        }
    }
}

impl Recipe<'_> {
    /// The rows to train on, and those of them that `val_set_size` takes away.
    fn rows(&self) -> Result<(Prepared, Option<Prepared>), DataError> {
        match &self.args.dataset_prepared_path {
            None => self.build(),
            Some(folder) => self.prepared(folder),
        }
    }

    /// The share or number of samples that validate.
    fn val_set_size(&self) -> Option<f64> {
        self.args.val_set_size.filter(|&size| size > 0.0 && self.earlier == 0)
    }

    /// The rows of an earlier run with the same inputs, otherwise rows built now and kept there.
    fn prepared(&self, folder: &Path) -> Result<(Prepared, Option<Prepared>), DataError> {
        let key = self.key()?;
        let [path, beside] = [key.clone(), key + "-validation"].map(|key| prepared::file(folder, &key));
        let found = |path: &Path| {
            prepared::read(path).unwrap_or_else(|reason| {
                tracing::warn!("{}: damaged ({reason}); preparing the data again", path.display());
                None
            })
        };
        match (found(&path), self.val_set_size()) {
            (Some(rows), None) => return Ok((rows, None)),
            (Some(rows), Some(_)) => {
                if let Some(validation) = found(&beside) {
                    return Ok((rows, Some(validation)));
                }
            }
            (None, _) => {}
        }
        let (rows, validation) = self.build()?;
        let all = [Some((&path, &rows)), validation.as_ref().map(|rows| (&beside, rows))];
        for (path, (store, summary)) in all.into_iter().flatten() {
            if let Err(error) = prepared::write(path, store, summary) {
                tracing::warn!("{}: could not keep the prepared data: {error}", path.display());
            }
        }
        Ok((rows, validation))
    }

    /// SHA-256 over all that the rows depend on.
    fn key(&self) -> Result<String, DataError> {
        let mut hash = Sha256::new();
        let args = self.args;
        let options = format!(
            "{FORMAT} {:?} {:?} {:?} {} {:?} {} {} {} {:?} {} {} {} {:?}",
            TRAINING_CLOCK,
            args.sample_packing_method,
            args.max_seq_len,
            args.sample_packing_sequence_len,
            args.pad_to_multiple_of,
            args.shuffle_before_merging_datasets,
            args.shuffle_merged_datasets,
            args.train_on_inputs,
            args.turns,
            self.vocab_size,
            self.pad_id,
            self.seed,
            self.inputs,
        );
        hash.update(options);
        if let Some(size) = self.val_set_size() {
            hash.update(format!("validation {size:?}"));
        }
        if self.earlier > 0 {
            hash.update(format!("behind {} data sets", self.earlier));
        }
        if let Some((tokenizer, template)) = self.text {
            hash.update(tokenizer.digest());
            template.hash_into(&mut hash);
        }
        for entry in &args.datasets {
            if is_dummy(entry) {
                hash.update(format!("dummy {:?}", entry.num_samples));
                continue;
            }
            let files = source::files(&entry.path)?;
            hash.update(format!("{:?} {}", entry.kind, files.len()));
            for path in files {
                hash.update(hash_file(path)?);
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }

    fn build(&self) -> Result<(Prepared, Option<Prepared>), DataError> {
        let (mut samples, mut sizes, mut dropped) = (RowStore::default(), Vec::new(), 0);
        let mut records = Vec::new();
        let (mut remarks, (limit, field)) = (Vec::new(), limit(self.args));
        for (index, entry) in self.args.datasets.iter().enumerate() {
            let (before, mut notes) = (samples.rows(), Notes::default());
            let required = self.inputs.iter().find(|input| input.required).map(|input| input.name);
            let dropped_here = if is_dummy(entry) {
                if let Some(input) = required {
                    return Err(DataError::DummyInput { input });
                }
                self.add_dummy(index, entry, &mut samples, &mut records)?;
                0
            } else {
                self.add_files(entry, limit, &mut samples, &mut records, &mut notes)?
            };
            if samples.rows() == before && dropped_here == 0 {
                let remedy =
                    if is_dummy(entry) { "set its num_samples to at least 1" } else { ONE_ROW_A_LINE };
                return Err(DataError::Empty { path: entry.path.clone(), remedy });
            }
            if samples.rows() > before && samples.valid_tokens_from(before) == 0 {
                let hint = notes.foreign_roles().map(|roles| {
                    format!("; only messages of role assistant have one, and there are {roles}")
                });
                return Err(DataError::NothingToLearn {
                    path: entry.path.clone(),
                    hint: hint.unwrap_or_default(),
                });
            }
            remarks.extend(notes.lines().into_iter().map(|line| (index, line)));
            sizes.push(samples.rows() - before);
            dropped += dropped_here;
        }
        if samples.rows() == 0 {
            return Err(DataError::AllDropped { samples: dropped, limit, field });
        }
        let (each, merged) = (self.args.shuffle_before_merging_datasets, self.args.shuffle_merged_datasets);
        let mut order = order::sample_order(self.seed, &sizes, each, merged);
        let mut validation = None;
        if let Some(size) = self.val_set_size() {
            let different = records.iter().collect::<BTreeSet<_>>().len();
            let refused = DataError::Split { size, records: different };
            let Some(drawn) = split::validating(self.seed, &records, size) else { return Err(refused) };
            order.retain(|&sample| !drawn[sample]);
            let own: Vec<usize> = (0..samples.rows()).filter(|&sample| drawn[sample]).collect();
            let (store, summary) = self.counted(&samples, &own)?;
            if summary.valid_tokens == 0 {
                return Err(refused);
            }
            validation = Some((store, summary));
        }
        let (store, summary) = self.counted(&samples, &order)?;
        Ok(((store, Summary { dropped, remarks, ..summary }), validation))
    }

    /// Rows of the samples in `order`, with their counts.
    fn counted(&self, samples: &RowStore, order: &[usize]) -> Result<Prepared, DataError> {
        let (store, padding_tokens) = self.pack(samples, order)?;
        let summary = Summary {
            samples: order.len(),
            rows: store.rows(),
            tokens: store.arrays()[0].len(),
            padding_tokens,
            valid_tokens: store.valid_tokens(),
            longest_row: (0..store.rows()).map(|row| store.row_length(row)).max().unwrap_or(0),
            ..Summary::default()
        };
        Ok((store, summary))
    }

    /// Rows of the samples in `order`, and the tokens of padding in them.
    fn pack(&self, samples: &RowStore, order: &[usize]) -> Result<(RowStore, usize), DataError> {
        let method = self.args.sample_packing_method;
        let multiple =
            self.args.pad_to_multiple_of.filter(|_| method != PackingMethod::None).unwrap_or(1).max(1);
        let pad = u32::try_from(self.pad_id).ok().filter(|&pad| (pad as usize) < self.vocab_size);
        let lengths: Vec<usize> = order.iter().map(|&sample| samples.row_length(sample)).collect();
        let (mut store, mut padding) = (RowStore::default(), 0);
        for documents in pack(method, &lengths, self.args.sample_packing_sequence_len) {
            store.begin_row();
            let tokens: usize = documents.iter().map(|&index| lengths[index]).sum();
            for index in documents {
                store.push_row(samples, order[index]);
            }
            let missing = tokens.next_multiple_of(multiple) - tokens;
            if missing > 0 {
                let pad = pad.ok_or(DataError::PadId { pad_id: self.pad_id, vocab_size: self.vocab_size })?;
                store.push_padding(missing, pad);
                padding += missing;
            }
        }
        Ok((store, padding))
    }

    /// Adds the samples of `entry` that are not too long; returns how many are.
    fn add_files(
        &self,
        entry: &DatasetArgs,
        limit: usize,
        samples: &mut RowStore,
        records: &mut Vec<u64>,
        notes: &mut Notes,
    ) -> Result<usize, DataError> {
        let mut dropped = 0;
        for path in source::files(&entry.path)? {
            source::for_each_line(&path, |line| {
                let found = match entry.kind {
                    DatasetType::Tokenized => {
                        vec![parse_tokenized(line, self.vocab_size, self.inputs, notes)?]
                    }
                    DatasetType::Chat => {
                        if let Some(input) = self.inputs.iter().find(|input| input.required) {
                            let reason =
                                "read by train.loss_fn, and chats have none; give rows of type tokenized";
                            return Err(LineProblem::Refused { field: input.name.into(), reason });
                        }
                        self.encode_chat(line, notes)?
                    }
                    DatasetType::Preference => {
                        let row = source::parse_object(line)?;
                        let mut pair = Sample::default();
                        for half in preference::halves(&row)? {
                            let mut all = half["prompt"].as_array().cloned().unwrap_or_default();
                            all.extend(half["completion"].as_array().cloned().unwrap_or_default());
                            let line = serde_json::json!({"messages": all}).to_string();
                            for sample in self.encode_chat(line.as_bytes(), notes)? {
                                pair.documents.push(sample.tokens.len());
                                pair.tokens.extend(sample.tokens);
                                pair.labels.extend(sample.labels);
                            }
                        }
                        vec![pair]
                    }
                };
                let record = split::record(&found);
                for sample in found {
                    if sample.tokens.len() > limit {
                        dropped += 1;
                    } else {
                        samples.push_sample(&sample);
                        records.push(record);
                    }
                }
                Ok(())
            })?;
        }
        Ok(dropped)
    }

    /// The rows of a chat as tokens; labels are on what the assistant said, or everywhere if `train_on_inputs`.
    fn encode_chat(&self, line: &[u8], notes: &mut Notes) -> Result<Vec<Sample>, LineProblem> {
        let chat = parse_chat(line, notes)?;
        let Some((tokenizer, template)) = self.text else {
            return Err(LineProblem::Tokenize("no tokenizer was given".into()));
        };
        for (index, message) in chat.messages.iter().enumerate() {
            let fields = message.as_object().into_iter().flat_map(|fields| fields.keys());
            let unnamed = |field: &&String| !messages::is_switch(field) && !template.names(field);
            let unnamed: Vec<&String> = fields.filter(unnamed).collect();
            unnamed.iter().try_for_each(|field| messages::check_spelling(index, field))?;
            if messages::is_trained(index, message)? && messages::is_emptied(message, &unnamed) {
                notes.count_emptied();
            }
            notes.count_message_fields(unnamed.into_iter());
        }
        if self.args.train_on_inputs {
            if let Some(field) = messages::switched_off(&chat.messages)? {
                let reason = "says that it has no loss, while data.train_on_inputs gives one to every token";
                return Err(LineProblem::Refused { field, reason });
            }
            let encoded = tokenizer.encode_with_offsets(&template.render_text(&chat)?)?;
            let everywhere = vec![true; encoded.ids.len()];
            return Ok(vec![self.labelled(&encoded, everywhere)?]);
        }
        let rows = turns::rows(template, &chat, self.args.turns)?;
        notes.count_chat(&chat.messages, rows.trained, rows.own_rows, rows.lost_thoughts);
        let sample = |row: &turns::Rendering| {
            let encoded = tokenizer.encode_with_offsets(&row.text)?;
            let trained = encoded.covered_by(&row.spans);
            self.labelled(&encoded, trained)
        };
        rows.renderings.iter().map(sample).collect()
    }

    /// Checked tokens, with labels where `trained`.
    fn labelled(&self, encoded: &Encoded, trained: Vec<bool>) -> Result<Sample, LineProblem> {
        let tokens = source::check_tokens(&encoded.ids, self.vocab_size, "rendered tokens")?;
        let label = |(&id, trained): (&i64, bool)| if trained { id } else { IGNORE_INDEX };
        let labels = encoded.ids.iter().zip(trained).map(label).collect();
        Ok(Sample::whole(tokens, labels))
    }

    fn add_dummy(
        &self,
        index: usize,
        entry: &DatasetArgs,
        samples: &mut RowStore,
        records: &mut Vec<u64>,
    ) -> Result<(), DataError> {
        let pack = self.args.sample_packing_sequence_len;
        let length = self.args.max_seq_len.map_or(pack, |max| match self.args.sample_packing_method {
            PackingMethod::None => max,
            PackingMethod::Sequential | PackingMethod::Multipack => max.min(pack),
        });
        if length == 0 || self.vocab_size == 0 {
            return Err(DataError::DummyShape { path: entry.path.clone() });
        }
        let stream = Stream::new(self.seed, &format!("data.dummy.{}", self.earlier + index));
        for sample in 0..entry.num_samples.unwrap_or(DUMMY_SAMPLES) {
            let id = |at: usize| stream.below((sample * length + at) as u64, self.vocab_size as u64) as u32;
            let tokens: Vec<u32> = (0..length).map(id).collect();
            samples.begin_row();
            samples.push_labelled(&tokens, tokens.iter().map(|&token| i64::from(token)));
            records.push(records.len() as u64);
        }
        Ok(())
    }
}

/// Tells what the user may not expect of the rows of `args`.
fn warn_of(args: &DataArgs, summary: &Summary) {
    if summary.dropped > 0 {
        let (limit, field) = limit(args);
        tracing::warn!(
            "dropped {} of {} samples: longer than {limit} tokens ({field})",
            summary.dropped,
            summary.samples + summary.dropped
        );
    }
    for (entry, remark) in &summary.remarks {
        let path = args.datasets.get(*entry).map(|entry| entry.path.display().to_string());
        tracing::warn!("{}: {remark}", path.unwrap_or_default());
    }
}

/// The longest sample that is kept, and the field that says so.
fn limit(args: &DataArgs) -> (usize, &'static str) {
    let pack = match args.sample_packing_method {
        PackingMethod::None => usize::MAX,
        PackingMethod::Sequential | PackingMethod::Multipack => args.sample_packing_sequence_len,
    };
    match args.max_seq_len {
        Some(max) if max <= pack => (max, "data.max_seq_len"),
        _ => (pack, "data.sample_packing_sequence_len"),
    }
}

fn is_dummy(entry: &DatasetArgs) -> bool {
    entry.path == Path::new("dummy")
}

fn is_chat(entry: &DatasetArgs) -> bool {
    entry.kind != DatasetType::Tokenized && !is_dummy(entry)
}

fn hash_file(path: PathBuf) -> Result<[u8; 32], DataError> {
    let mut hash = Sha256::new();
    let copied = File::open(&path).and_then(|mut file| std::io::copy(&mut file, &mut hash));
    copied.map_err(|source| DataError::Io { path, source })?;
    Ok(hash.finalize().into())
}
