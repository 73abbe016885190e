//! Section `data`, and the entries of its list of data sets.

use super::compat;
use super::error::{Issue, Issues, Problem};
use super::section::{Section, section};
use super::source::{Kind, Node};
use super::value::{Description, ListItem, Rule, Value, choices};
use crate::hub::{self, HubId, Subset};
use std::collections::BTreeMap;
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
        /// The type that the fields of the first row tell.
        Auto = "auto",
        /// `input_ids` and `labels`.
        Tokenized = "tokenized",
        /// `messages` or `conversations`, rendered by the model's chat template.
        Chat = "chat",
        /// `instruction`, `input` and `output`, rendered as a chat.
        Alpaca = "alpaca",
        /// `prompt` and `completion`: texts as they are, or messages.
        Completion = "completion",
        /// `text` as it is.
        Text = "text",
        /// A prompt with a `chosen` and a `rejected` answer.
        Preference = "preference",
    }

    /// A sample of a file of plain text.
    pub enum SampleBy {
        /// Every line that is not blank.
        Line = "line",
        /// The whole file.
        Document = "document",
    }
}

section! {
    /// One entry of `data.datasets`.
    pub struct DatasetArgs {
        /// A file, a folder, a glob (`data/*.parquet`), a folder of datasets' `save_to_disk`, a data set of the Hugging
        /// Face hub (`tatsu-lab/alpaca`, `tatsu-lab/alpaca@main`), downloaded once into the hub's cache, or `dummy`
        /// (random token ids). Formats: jsonl, json, parquet, arrow, csv, tsv, txt; those of text also as .gz and .zst.
        path: PathBuf = PathBuf::new();
        /// Content of a row. By default what the fields of the first one tell. `chat`: messages, also as ShareGPT's
        /// conversations; `alpaca`: instruction, input, output; `completion`: prompt, completion; `text`: text;
        /// `tokenized`: input_ids, labels; `preference`: prompt, chosen, rejected. `dummy` is always tokenized.
        kind as "type": DatasetType = DatasetType::Auto;
        /// Split of a folder: its subfolder, or the files named after it. null: all files; `train` of a data set of the
        /// hub, and of a folder that `save_to_disk` wrote with splits.
        split: Option<String> = None;
        /// Configuration of a data set of the hub, as `configs` of its README.md names it. null: the one by default.
        name: Option<String> = None;
        /// At most this many rows, from the start. `dummy`: number of samples.
        num_samples: Option<usize> = None => OneOrMore;
        /// Times that each sample stands in an epoch: 2 twice, 0.5 a random half of them, 1.5 all and a random half
        /// again.
        weight: f64 = 1.0 => Positive;
        /// Names in the file of the fields that the type reads: {prompt: question, completion: answer}.
        columns: BTreeMap<String, String> = BTreeMap::new();
        /// chat: names in the file of a message's fields: {role: from, content: value}.
        message_property_mappings: BTreeMap<String, String> = BTreeMap::new();
        /// chat: names in the file of the roles: `{user: [human], assistant: [gpt, model]}`.
        roles: BTreeMap<String, Vec<String>> = BTreeMap::new();
        /// txt: a sample is a line, or the whole file (`document`).
        sample_by: SampleBy = SampleBy::Line;
    }
}

/// Names of other trainers, and of xorl, for types.
const TYPES: [(&str, &str); 8] = [
    ("chat_template", "chat"),
    ("messages", "chat"),
    ("conversational", "chat"),
    ("sharegpt", "chat"),
    ("openai", "chat"),
    ("prompt_completion", "completion"),
    ("pretrain", "text"),
    ("instruct", "alpaca"),
];

/// Fields of axolotl's that name one column, with its name here.
const COLUMNS: [(&str, &str); 7] = [
    ("field_messages", "messages"),
    ("field_tools", "tools"),
    ("field_system", "system"),
    ("field_instruction", "instruction"),
    ("field_input", "input"),
    ("field_output", "output"),
    ("field", "text"),
];

/// Fields of rows that `columns` may name.
const NAMED: [&str; 21] = [
    "messages",
    "tools",
    "system",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
    "input_ids",
    "labels",
    "attention_mask",
    "loss_mask",
    "assistant_masks",
    "completion_mask",
    "position_ids",
    "weights",
    "advantages",
    "logprobs",
];

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
        /// Loss on every token, not on assistant turns and completions only.
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

    /// All data sets with the fields that hold them (`data.datasets[0]`), those of `test_datasets` last.
    pub fn named_sets(&self) -> impl Iterator<Item = (String, &DatasetArgs)> {
        let lists = [("datasets", &self.datasets[..]), ("test_datasets", self.validation_sets())];
        lists.into_iter().flat_map(|(list, sets)| {
            sets.iter().enumerate().map(move |(i, set)| (format!("data.{list}[{i}]"), set))
        })
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

    /// The part of a data set of the hub that is read.
    pub fn subset(&self) -> Subset {
        Subset { name: self.name.clone(), split: self.split.clone() }
    }

    /// The first rule between fields that is broken, with the field that it stands at.
    fn conflict(&self, given: impl Fn(&str) -> bool) -> Option<(&'static str, Problem)> {
        if !given("path") {
            let needed = "a file, a folder, a glob, a data set of the hub, or dummy";
            return Some(("path", Problem::Missing { needed }));
        }
        if self.is_dummy() {
            if given("type") && !matches!(self.kind, DatasetType::Tokenized | DatasetType::Auto) {
                return Some(("type", Problem::Conflict("dummy data is tokenized; leave type out".into())));
            }
            let others = [
                ("split", self.split.is_some()),
                ("name", self.name.is_some()),
                ("columns", !self.columns.is_empty()),
                ("message_property_mappings", !self.message_property_mappings.is_empty()),
                ("roles", !self.roles.is_empty()),
                ("sample_by", self.sample_by != SampleBy::Line),
            ];
            let (other, _) = others.into_iter().find(|(_, is_given)| *is_given)?;
            return Some((other, Problem::Conflict("dummy data has no files; leave it out".into())));
        }
        if let Some(name) = self.columns.keys().find(|name| !NAMED.contains(&name.as_str())) {
            let words = format!("{name} is no field of a type; those are {}", NAMED.join(", "));
            return Some(("columns", Problem::Conflict(words)));
        }
        if self.split.as_ref().is_some_and(|split| split.contains(['[', '/', '+'])) {
            let words = "a split is a name alone; num_samples takes rows from the start";
            return Some(("split", Problem::Conflict(words.into())));
        }
        let is_chat = matches!(
            self.kind,
            DatasetType::Chat | DatasetType::Completion | DatasetType::Preference | DatasetType::Auto
        );
        for (field, is_given) in [
            ("message_property_mappings", !self.message_property_mappings.is_empty()),
            ("roles", !self.roles.is_empty()),
        ] {
            if is_given && !is_chat {
                let words = format!("type {} has no messages; remove one of them", self.kind.write());
                return Some((field, Problem::Conflict(words)));
            }
        }
        let address = self.path.to_str()?;
        let (scheme, _) = address.split_once("://")?;
        if HubId::of_address(address).is_some() {
            return Some(("path", Problem::Conflict(hub::address_words(address))));
        }
        let value = format!("a {scheme} address");
        let reason =
            "data is read from local files only, and from the hub by its id, owner/name; copy it here";
        Some(("path", Problem::Refused { value, reason }))
    }

    /// Sets the field `key`; `false` where there is none. Names of axolotl's stand for a column.
    fn set_field(&mut self, key: &str, node: &Node) -> Result<bool, Issues> {
        if let Some((_, column)) = COLUMNS.iter().find(|(name, _)| *name == key) {
            if !node.is_null() {
                self.columns.insert((*column).to_owned(), String::read(node, Rule::Any)?);
            }
            return Ok(true);
        }
        if key == "type"
            && let Some(text) = node.text()
        {
            let known = TYPES.iter().find(|(name, _)| *name == text);
            let name = known.map_or(text, |(_, ours)| ours);
            return self
                .set(key, &Node { line: node.line, kind: Kind::Scalar { text: name.into(), quoted: true } });
        }
        self.set(key, node)
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
            match dataset.set_field(&entry.key, &entry.value) {
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

/// Texts by name.
impl Value for BTreeMap<String, String> {
    fn describe(_: Rule) -> Description {
        Description { short: "map of names".into(), phrase: "a mapping of names, {role: from}".into() }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        named(node, Self::describe(rule), |value| String::read(value, rule))
    }

    fn write(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// Lists of texts by name.
impl Value for BTreeMap<String, Vec<String>> {
    fn describe(_: Rule) -> Description {
        Description {
            short: "map of lists of names".into(),
            phrase: "a mapping of lists of names, {assistant: [gpt]}".into(),
        }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        named(node, Self::describe(rule), |value| Vec::read(value, rule))
    }

    fn write(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A mapping whose values `read` reads.
fn named<T>(
    node: &Node,
    expected: Description,
    read: impl Fn(&Node) -> Result<T, Issues>,
) -> Result<BTreeMap<String, T>, Issues> {
    let entries = match &node.kind {
        Kind::Map(entries) => entries,
        _ if node.is_null() => return Ok(BTreeMap::new()),
        _ => return Err(vec![Issue::expected(expected.phrase, node.shown())]),
    };
    let (mut values, mut issues) = (BTreeMap::new(), Issues::new());
    for entry in entries {
        match read(&entry.value) {
            Ok(value) => drop(values.insert(entry.key.clone(), value)),
            Err(wrong) => {
                let place = format!(".{}", entry.key);
                issues.extend(wrong.into_iter().map(|issue| issue.inside(&place, entry.line)));
            }
        }
    }
    if issues.is_empty() { Ok(values) } else { Err(issues) }
}
