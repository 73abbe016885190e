//! Section `data`, and the entries of its list of data sets.

use super::compat;
use super::error::{Issue, Issues, Problem};
use super::section::{Section, section};
use super::source::{Kind, Node};
use super::value::{Description, ListItem, Rule, Value, choices};
use std::path::{Path, PathBuf};

choices! {
    /// Forming of rows from samples.
    pub enum PackingMethod {
        /// A sample a row.
        None = "none",
        /// Samples in order, a new row where the next one does not fit.
        Sequential = "sequential",
        /// Best fit, for fewer and fuller rows.
        Multipack = "multipack",
    }

    /// Assistant turns of a chat that are trained.
    pub enum Turns {
        /// Every turn, once.
        All = "all",
        /// The last turn alone.
        Last = "last",
    }

    /// Content of a data file.
    pub enum DatasetType {
        /// `input_ids` and `labels`.
        Tokenized = "tokenized",
        /// `messages`, rendered by the model's chat template.
        Chat = "chat",
        /// A prompt with a `chosen` and a `rejected` answer.
        Preference = "preference",
    }
}

section! {
    /// One entry of `data.datasets`.
    pub struct DatasetArgs {
        /// A .jsonl file, a folder of them, or `dummy` (random token ids).
        path: PathBuf = PathBuf::new();
        /// `tokenized` (input_ids, labels) or `chat` (messages); `dummy` is always tokenized.
        kind as "type": DatasetType = DatasetType::Tokenized;
        /// `dummy` only: number of samples.
        num_samples: Option<usize> = None => OneOrMore;
    }
}

section! {
    /// Section `data`: the data sets, and the forming of rows.
    pub struct DataArgs {
        /// Data sets to train on, at least one.
        datasets: Vec<DatasetArgs> = Vec::new() => NonEmpty;
        /// Samples of `datasets` that validate and are never trained on, drawn by `train.seed`: a share below 1, or
        /// their number. Equal samples, and all rows of a chat, are on one side. null or 0: none.
        val_set_size: Option<f64> = None => NonNegative;
        /// Data sets to validate on, listed as `datasets` are, in place of `val_set_size`. null: none.
        test_datasets: Option<Vec<DatasetArgs>> = None;
        /// Samples longer than this are dropped with a warning (tokens). null: no limit besides the packing
        /// length.
        max_seq_len: Option<usize> = None => OneOrMore;
        /// A row is a sample (`none`), or a pack of samples in order (`sequential`) or by best fit (`multipack`).
        /// Packed documents never attend to each other.
        sample_packing_method: PackingMethod = PackingMethod::Sequential;
        /// Tokens per pack; longer samples are dropped with a warning. By default 2048, or the model's
        /// max_position_embeddings if that is less.
        sample_packing_sequence_len: usize = 2048 => OneOrMore;
        /// Pad packs to a multiple of this many tokens; not with `none`. null: no padding.
        pad_to_multiple_of: Option<usize> = Some(128) => Size;
        /// Shuffle all samples together, by `train.seed`.
        shuffle_merged_datasets: bool = true;
        /// Shuffle each data set before they are put one after the other.
        shuffle_before_merging_datasets: bool = true;
        /// Folder for tokenised and packed data, reused when the inputs did not change. null: nothing is kept.
        dataset_prepared_path: Option<PathBuf> = None;
        /// Drop the last, smaller step of an epoch.
        dataloader_drop_last: bool = false;
        /// chat: loss on every token, not on assistant turns only.
        train_on_inputs: bool = false;
        /// chat: train `all` assistant turns, or the `last` one of each chat. A turn that the chat template renders
        /// differently when messages follow it becomes a row of its own.
        turns: Turns = Turns::All;
    }
}

impl DataArgs {
    /// True if there is something to validate on.
    pub fn validates(&self) -> bool {
        self.val_set_size.is_some_and(|size| size > 0.0) || !self.validation_sets().is_empty()
    }

    /// The data sets of `test_datasets`.
    pub fn validation_sets(&self) -> &[DatasetArgs] {
        self.test_datasets.as_deref().unwrap_or_default()
    }

    /// The problem of a `val_set_size` that is neither a share nor a number of samples.
    pub(super) fn split_problem(&self) -> Option<Problem> {
        let size = self.val_set_size.filter(|&size| size >= 1.0 && size.fract() != 0.0)?;
        let words = format!("{size:?} is neither a share below 1 nor a whole number of samples");
        Some(Problem::Conflict(words))
    }
}

impl DatasetArgs {
    /// True for the built-in source of random tokens.
    pub fn is_dummy(&self) -> bool {
        self.path == Path::new("dummy")
    }

    /// The first rule between fields that is broken, with the field that it stands at.
    fn conflict(&self, given: impl Fn(&str) -> bool) -> Option<(&'static str, Problem)> {
        if !given("path") {
            let needed = "a .jsonl file, a folder of them, or dummy";
            return Some(("path", Problem::Missing { needed }));
        }
        match (self.is_dummy(), given("type")) {
            (false, false) => return Some(("type", Problem::Missing { needed: "tokenized or chat" })),
            (true, true) if self.kind != DatasetType::Tokenized => {
                return Some(("type", Problem::Conflict("dummy data is tokenized; leave type out".into())));
            }
            _ => {}
        }
        if !self.is_dummy() && self.num_samples.is_some() {
            let words = "only dummy data takes num_samples; limit a real run with train.max_steps";
            return Some(("num_samples", Problem::Conflict(words.into())));
        }
        let (scheme, _) = self.path.to_str()?.split_once("://")?;
        let value = format!("a {scheme} address");
        Some(("path", Problem::Refused { value, reason: "data is read from local files only" }))
    }
}

impl ListItem for DatasetArgs {
    const PLURAL: &'static str = "data sets ({path: …, type: …})";
    const LONE: bool = false;
}

impl Value for DatasetArgs {
    fn describe(_: Rule) -> Description {
        Description { short: "data set".into(), phrase: "a data set ({path: …, type: …})".into() }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let Kind::Map(entries) = &node.kind else {
            return Err(vec![Issue::expected(Self::describe(rule).phrase, node.shown())]);
        };
        let (mut dataset, mut issues) = (Self::default(), Issues::new());
        for entry in entries {
            let within = |issue: Issue| issue.inside(&format!(".{}", entry.key), entry.line);
            match dataset.set(&entry.key, &entry.value) {
                Ok(true) => {}
                Ok(false) => {
                    let judged = compat::check_dataset_field(&entry.key, &entry.value);
                    issues.extend(judged.err().map(|problem| within(problem.into())));
                }
                Err(wrong) => {
                    let named = compat::RUN.unbuilt(&format!("data.datasets.{}", entry.key), &entry.value);
                    let wrong = named.map_or(wrong, |problem| vec![problem.into()]);
                    issues.extend(wrong.into_iter().map(within));
                }
            }
        }
        let given = |key: &str| entries.iter().find(|entry| entry.key == key);
        if let Some((key, problem)) = dataset.conflict(|key| given(key).is_some()) {
            let unread = issues.iter().any(|issue| issue.suffix == format!(".{key}"));
            let line = given(key).map_or(node.line, |entry| entry.line);
            issues.extend((!unread).then(|| Issue::from(problem).inside(&format!(".{key}"), line)));
        }
        if issues.is_empty() { Ok(dataset) } else { Err(issues) }
    }

    fn write(&self) -> String {
        // JSON is YAML's flow form.
        serde_json::to_string(self).unwrap_or_default()
    }
}
