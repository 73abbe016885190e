//! The data of a run: all rows, the same on every rank, and which of them stands at which position of an epoch.

use super::{
    DataError, ROWS_PER_GROUP, Row, RowNeeds,
    build::{Recipe, limit},
    chat_template::Clock,
    encode::Encoder,
    kinds, order,
    prepared::{self, Prepared},
    source::Source,
    tokenized::Sample,
};
use crate::config::{DataArgs, DatasetType};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// The date that a template sees when training data are rendered, 2024-07-26 (what Llama's templates fall back
/// to): a date of today would give ranks, restarts and resumes on another day other data.
pub const TRAINING_CLOCK: Clock = Clock::Fixed(1_721_952_000);

/// Changes when the meaning of prepared rows does.
const FORMAT: u32 = 4;

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
    /// Counts by data set.
    pub sources: Vec<SourceSummary>,
}

/// Counts of one data set, each sample once whatever its weight.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceSummary {
    /// Samples that are used.
    pub samples: usize,
    /// Samples that were dropped because they are too long.
    pub dropped: usize,
    pub tokens: usize,
    /// Tokens with loss; see [`Row::valid_tokens`].
    pub valid_tokens: usize,
}

impl SourceSummary {
    /// Counts a sample that is used.
    pub(super) fn count(&mut self, sample: &Sample, valid_tokens: usize) {
        self.samples += 1;
        self.tokens += sample.tokens.len();
        self.valid_tokens += valid_tokens;
    }
}

/// All rows of a run.
#[derive(Debug)]
pub struct Dataset {
    prepared: Prepared,
    validation: Option<Prepared>,
    types: Vec<String>,
    fingerprint: String,
    seed: u64,
    shuffle: bool,
    /// The order of the epoch that was asked for last.
    order: Mutex<Option<(usize, Arc<[usize]>)>>,
}

impl Dataset {
    /// Reads, tokenises and packs `args.datasets`, or takes the prepared rows of an earlier run.
    ///
    /// `tokenizer_dir` is needed for texts (tokenizer.json), and for chats (their template too). `vocab_size` is the
    /// model's: no token id may reach it. `pad_id` fills packs up to `pad_to_multiple_of`, without labels. One process
    /// of a host does the work, and all map its rows.
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
        Self::open_for(args, tokenizer_dir, vocab_size, pad_id, seed, &RowNeeds::default())
    }

    /// The same for a loss that needs more of rows than their tokens and labels.
    pub fn open_for(
        args: &DataArgs,
        tokenizer_dir: Option<&Path>,
        vocab_size: usize,
        pad_id: i64,
        seed: u64,
        needs: &RowNeeds,
    ) -> Result<Self, DataError> {
        let RowNeeds { inputs, pairs } = needs;
        if args.datasets.is_empty() {
            return Err(DataError::NoDatasets);
        }
        let rows = |args: &DataArgs, earlier: usize| {
            let of_entry = |(index, entry)| Source::of(index, entry);
            let sources = args.datasets.iter().enumerate().map(of_entry).collect::<Result<Vec<_>, _>>()?;
            if let Some(other) =
                sources.iter().find(|source| (source.kind == DatasetType::Preference) != *pairs)
            {
                let (path, kind) = (args.datasets[other.index].path.clone(), kinds::name(other.kind));
                return Err(DataError::OfAnotherLoss { path, kind });
            }
            let encoder = Encoder::new(args, &sources, tokenizer_dir, vocab_size, inputs, limit(args).0)?;
            let recipe = Recipe { args, earlier, sources: &sources, encoder, pad_id, seed, inputs };
            let folder = args.dataset_prepared_path.as_deref();
            let key = key(&recipe, folder.is_some())?;
            let beside = recipe.val_set_size().map(|_| format!("{key}-validation"));
            let keys: Vec<String> = [key].into_iter().chain(beside).collect();
            let prepared = prepared::obtain(folder, &keys, |temporary| recipe.build(temporary))?;
            let types = sources.iter().map(|source| kinds::name(source.kind)).collect::<Vec<_>>();
            Ok::<_, DataError>((prepared.into_iter(), types))
        };
        let (mut all, types) = rows(args, 0)?;
        let (prepared, mut validation) = (all.next().ok_or(DataError::NoDatasets)?, all.next());
        warn_of(args, &prepared.summary);
        if !args.validation_sets().is_empty() {
            // In the order of the files.
            let own = DataArgs {
                datasets: args.validation_sets().to_vec(),
                test_datasets: None,
                shuffle_merged_datasets: false,
                shuffle_before_merging_datasets: false,
                ..args.clone()
            };
            validation = rows(&own, args.datasets.len())?.0.next();
            validation.iter().for_each(|rows| warn_of(&own, &rows.summary));
        }
        let mut hash = Sha256::new();
        hash.update(prepared.digest);
        hash.update(seed.to_le_bytes());
        hash.update([u8::from(args.shuffle_merged_datasets)]);
        let fingerprint = format!("{:x}", hash.finalize());
        let shuffle = args.shuffle_merged_datasets;
        Ok(Self { prepared, validation, types, fingerprint, seed, shuffle, order: Mutex::new(None) })
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> usize {
        self.prepared.rows.rows()
    }

    /// The row at `position` (from 0) of `epoch` (from 0): a function of these, the seed and the data alone.
    pub fn row_at(&self, epoch: usize, position: usize) -> Result<Row, DataError> {
        let order = self.order_of(epoch);
        let row = order.get(position).and_then(|&index| self.prepared.rows.row(index));
        row.ok_or_else(|| DataError::DataCursor { epoch, position, rows: self.rows() })
    }

    /// Counts for the user.
    pub fn summary(&self) -> &Summary {
        &self.prepared.summary
    }

    /// Rows that validate.
    pub fn validation_rows(&self) -> usize {
        self.validation.as_ref().map_or(0, |prepared| prepared.rows.rows())
    }

    /// The row at `index` of those that validate, always in the same order.
    pub fn validation_row(&self, index: usize) -> Result<Row, DataError> {
        let row = self.validation.as_ref().and_then(|prepared| prepared.rows.row(index));
        row.ok_or_else(|| DataError::DataCursor { epoch: 0, position: index, rows: self.validation_rows() })
    }

    /// Counts of the rows that validate.
    pub fn validation_summary(&self) -> Option<&Summary> {
        self.validation.as_ref().map(|prepared| &prepared.summary)
    }

    /// A hash of the rows that validate, empty where there are none.
    pub fn validation_fingerprint(&self) -> String {
        let digest = |prepared: &Prepared| prepared.digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.validation.as_ref().map(digest).unwrap_or_default()
    }

    /// The type of each data set, also where the configuration leaves it open.
    pub fn types(&self) -> &[String] {
        &self.types
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

/// SHA-256 over all that the rows depend on: of files their content or, for rows that are not kept, their identity.
fn key(recipe: &Recipe, by_content: bool) -> Result<String, DataError> {
    let mut hash = Sha256::new();
    let args = recipe.args;
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
        recipe.encoder.vocab_size,
        recipe.pad_id,
        recipe.seed,
        recipe.inputs,
    );
    hash.update(options);
    if let Some(size) = recipe.val_set_size() {
        hash.update(format!("validation {size:?}"));
    }
    if recipe.earlier > 0 {
        hash.update(format!("behind {} data sets", recipe.earlier));
    }
    recipe.encoder.hash_into(&mut hash);
    for source in recipe.sources {
        let entry = &args.datasets[source.index];
        hash.update(format!(
            "{:?} {} {:?} {} {:?} {:?} {:?} {:?} {}",
            source.kind,
            entry.is_dummy(),
            entry.num_samples,
            entry.weight,
            entry.columns,
            entry.message_property_mappings,
            entry.roles,
            entry.sample_by,
            source.files.len()
        ));
        for path in &source.files {
            hash.update(if by_content { hash_file(path)? } else { identity(path)? });
        }
    }
    Ok(format!("{:x}", hash.finalize()))
}

fn hash_file(path: &Path) -> Result<[u8; 32], DataError> {
    let mut hash = Sha256::new();
    let copied = File::open(path).and_then(|mut file| std::io::copy(&mut file, &mut hash));
    copied.map_err(|source| DataError::Io { path: path.into(), source })?;
    Ok(hash.finalize().into())
}

/// A hash that a file keeps as long as nobody writes it.
fn identity(path: &Path) -> Result<[u8; 32], DataError> {
    let found = std::fs::metadata(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    let times = (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec());
    let text = format!("{} {} {} {times:?}", found.dev(), found.ino(), found.size());
    Ok(Sha256::digest(text).into())
}
