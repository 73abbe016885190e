//! Section `data`, and the entries of its list of data sets.

use super::compat;
use super::error::{Issue, Problem};
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
        /// Samples longer than this are dropped with a warning (tokens). null: no limit besides the packing
        /// length.
        max_seq_len: Option<usize> = None => OneOrMore;
        /// A row is a sample (`none`), or a pack of samples in order (`sequential`) or by best fit (`multipack`).
        /// Packed documents never attend to each other.
        sample_packing_method: PackingMethod = PackingMethod::Sequential;
        /// Tokens per pack.
        sample_packing_sequence_len: usize = 32000 => OneOrMore;
        /// Pad packs to a multiple of this many tokens; not with `none`. null: no padding.
        pad_to_multiple_of: Option<usize> = Some(128) => OneOrMore;
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

impl DatasetArgs {
    /// True for the built-in source of random tokens.
    pub fn is_dummy(&self) -> bool {
        self.path == Path::new("dummy")
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

    fn read(node: &Node, rule: Rule) -> Result<Self, Issue> {
        let Kind::Map(entries) = &node.kind else {
            return Err(Issue::expected(Self::describe(rule).phrase, node.shown()));
        };
        let mut dataset = Self::default();
        for entry in entries {
            let within = |issue: Issue| issue.inside(&format!(".{}", entry.key), entry.line);
            if !dataset.set(&entry.key, &entry.value).map_err(within)? {
                compat::check_dataset_field(&entry.key, &entry.value).map_err(|p| within(p.into()))?;
            }
        }
        let given = |key: &str| entries.iter().find(|entry| entry.key == key);
        let problem = |key: &str, problem: Problem| {
            Err(Issue::from(problem).inside(&format!(".{key}"), given(key).map_or(node.line, |e| e.line)))
        };
        if given("path").is_none() {
            return problem("path", Problem::Missing { needed: "a .jsonl file, a folder of them, or dummy" });
        }
        match (dataset.is_dummy(), given("type").is_some()) {
            (false, false) => return problem("type", Problem::Missing { needed: "tokenized or chat" }),
            (true, true) if dataset.kind != DatasetType::Tokenized => {
                return problem("type", Problem::Conflict("dummy data is tokenized; leave type out".into()));
            }
            _ => {}
        }
        if !dataset.is_dummy() && dataset.num_samples.is_some() {
            let words = "only dummy data takes num_samples; limit a real run with train.max_steps";
            return problem("num_samples", Problem::Conflict(words.into()));
        }
        if let Some((scheme, _)) = dataset.path.to_str().and_then(|path| path.split_once("://")) {
            let value = format!("a {scheme} address");
            return problem("path", Problem::Refused { value, reason: "data is read from local files only" });
        }
        Ok(dataset)
    }

    fn write(&self) -> String {
        // JSON is YAML's flow form.
        serde_json::to_string(self).unwrap_or_default()
    }
}
