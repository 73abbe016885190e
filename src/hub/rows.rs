//! The files of a data set's rows, chosen as HF `datasets` (`data_files.py`, `load.py`) does: by `configs` of its
//! README.md, else by the splits that names of files and folders tell. Pure.

use super::HubError;
use crate::console::first_of;
use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;
use std::collections::BTreeSet;

/// A part of a data set: a configuration and a split of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subset {
    /// `None`: the only configuration, or the one by default.
    pub name: Option<String>,
    /// `None`: `train`, or the only split.
    pub split: Option<String>,
}

/// Splits with the words by which names of files and folders tell them.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];
/// Characters around such a word, as a set of a glob.
const AROUND: &str = "[-._ 0-9]";
/// Globs of files in a folder that is named after a split, and of files that are. `{word}` is one of [`SPLITS`].
const BY_FOLDER: [&str; 4] =
    ["**/{word}/**", "**/{word}{around}*/**", "**/*{around}{word}/**", "**/*{around}{word}{around}*/**"];
const BY_FILE: [&str; 2] = ["**/{word}{around}*", "**/*{around}{word}{around}*"];
/// Files beside data.
const ABOUT: [&str; 6] = [
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
];
/// Endings of data files, each with all of its format. The format of the ending with the most files is read; of as many
/// the first counts.
const FORMATS: [(&str, &[&str]); 8] = [
    ("parquet", &["parquet"]),
    ("arrow", &["arrow"]),
    ("jsonl", JSON),
    ("json", JSON),
    ("csv", TABLES),
    ("txt", &["txt"]),
    ("tsv", TABLES),
    ("ndjson", JSON),
];
const JSON: &[&str] = &["jsonl", "json", "ndjson"];
const TABLES: &[&str] = &["csv", "tsv"];
/// `*` stays within a folder, `**` does not.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Globs of a split's files.
type Splits = Vec<(String, Vec<String>)>;

/// An entry of `configs`.
#[derive(Debug)]
struct Configuration {
    name: String,
    is_default: bool,
    /// Folder that the globs begin at, with a slash behind it; empty for all.
    folder: String,
    /// `None`: names of files tell.
    splits: Option<Splits>,
}

/// Names of the files of `subset` in the order of reading, out of all `files` of a data set with this README.md.
///
/// # Errors
/// [`HubError::Rows`]: no such configuration or split, several without a default, or no file of a format that is read.
pub fn choose(files: &[String], readme: Option<&str>, subset: &Subset) -> Result<Vec<String>, HubError> {
    let configurations = configurations(readme)?;
    let chosen = configuration(&configurations, subset.name.as_deref())?;
    let folder = chosen.map_or("", |chosen| chosen.folder.as_str());
    let of_folder = files.iter().filter_map(|file| file.strip_prefix(folder)).collect::<Vec<_>>();
    let splits = match chosen.and_then(|chosen| chosen.splits.clone()) {
        Some(splits) => splits,
        None => told_by_names(&of_folder)?,
    };
    let names: Vec<&String> = splits.iter().map(|(name, _)| name).collect();
    let split = match &subset.split {
        Some(split) => split.as_str(),
        None if names.len() == 1 => names[0].as_str(),
        None => "train",
    };
    let Some((_, globs)) = splits.iter().find(|(name, _)| name == split) else {
        let words = match names.len() {
            0 => no_files(files),
            _ => format!("it has no split {split}; set split to one of: {}", listed(&names)),
        };
        return Err(rows(words));
    };
    let mut found: Vec<&str> = Vec::new();
    for glob in globs {
        let matching = matching(&of_folder, glob)?;
        if matching.is_empty() && !glob.contains(['*', '?', '[']) {
            return Err(rows(format!(
                "its README.md names {glob}, which it lacks; choose another split or revision"
            )));
        }
        found.extend(matching.into_iter().filter(|file| !found.contains(file)).collect::<Vec<_>>());
    }
    let with = |ending: &str| found.iter().filter(|file| has_ending(file, &[ending])).count();
    // Of several that are as many, `max_by_key` gives the last.
    let format = FORMATS.iter().rev().max_by_key(|(ending, _)| with(ending));
    let endings = format.map_or(&[][..], |(_, endings)| endings);
    found.retain(|file| has_ending(file, endings));
    if found.is_empty() {
        return Err(rows(no_files(files)));
    }
    Ok(found.into_iter().map(|file| format!("{folder}{file}")).collect())
}

fn rows(problem: String) -> HubError {
    HubError::Rows { problem }
}

fn no_files(files: &[String]) -> String {
    let others: Vec<&String> = files.iter().filter(|file| !is_about(file, "")).collect();
    let found = if others.is_empty() { String::new() } else { format!("; it has {}", first_of(&others)) };
    format!(
        "it has no file of rows (parquet, arrow, jsonl, json, csv, tsv, txt){found}; give another data set, or one of \
         its revisions with such files, as refs/convert/parquet often is"
    )
}

fn listed(names: &[&String]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The configuration `name`, else the one by default; none of a data set without configurations.
fn configuration<'a>(
    all: &'a [Configuration],
    name: Option<&str>,
) -> Result<Option<&'a Configuration>, HubError> {
    let names: Vec<&String> = all.iter().map(|one| &one.name).collect();
    if all.is_empty() {
        return match name {
            None => Ok(None),
            Some(name) => Err(rows(format!("it has no configurations; remove name: {name}"))),
        };
    }
    let found = match name {
        Some(name) => all.iter().find(|one| one.name == name),
        None if all.len() == 1 => all.first(),
        None => all.iter().find(|one| one.is_default || one.name == "default"),
    };
    found.map(Some).ok_or_else(|| {
        let words = name
            .map_or("it has several configurations".into(), |name| format!("it has no configuration {name}"));
        rows(format!("{words}; set name to one of: {}", listed(&names)))
    })
}

/// The entries of `configs` in the head of README.md.
fn configurations(readme: Option<&str>) -> Result<Vec<Configuration>, HubError> {
    let Some(head) = readme.and_then(head_of).filter(|head| head.contains("configs:")) else {
        return Ok(Vec::new());
    };
    let broken =
        |problem: &str| rows(format!("configs in the head of its README.md: {problem}; report it there"));
    let head: Value = serde_yaml::from_str(&head).map_err(|error| broken(&error.to_string()))?;
    let list = match head.get("configs") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(list) => list.as_sequence().ok_or_else(|| broken("not a list"))?,
    };
    let read = |entry: &Value| {
        let text = |field: &str| entry.get(field).and_then(Value::as_str).map(str::to_owned);
        let name = text("config_name").ok_or_else(|| broken("an entry without config_name"))?;
        let folder = text("data_dir").map_or_else(String::new, |folder| {
            let folder = folder.trim_start_matches("./").trim_matches('/').to_owned();
            if folder.is_empty() { folder } else { folder + "/" }
        });
        let files = entry.get("data_files").filter(|files| !files.is_null());
        let splits =
            files.map(|files| splits(files).ok_or_else(|| broken("data_files of a form that is not known")));
        let is_default = entry.get("default").and_then(Value::as_bool) == Some(true);
        Ok(Configuration { name, is_default, folder, splits: splits.transpose()? })
    };
    list.iter().map(read).collect()
}

/// The text between the first two lines of `---`.
fn head_of(readme: &str) -> Option<String> {
    let mut lines = readme.trim_start_matches('\u{feff}').lines();
    (lines.next()?.trim_end() == "---").then_some(())?;
    Some(lines.take_while(|line| line.trim_end() != "---").map(|line| format!("{line}\n")).collect())
}

/// `data_files`: a glob or a list of them, all of them of `train`; or a list of `{split, path}`.
fn splits(files: &Value) -> Option<Splits> {
    let globs = |value: &Value| -> Option<Vec<String>> {
        let all = value.as_sequence().cloned().unwrap_or_else(|| vec![value.clone()]);
        all.iter().map(|glob| glob.as_str().map(|glob| glob.trim_start_matches("./").to_owned())).collect()
    };
    let is_by_split = files.as_sequence().is_some_and(|list| list.iter().any(Value::is_mapping));
    if !is_by_split {
        return Some(vec![("train".to_owned(), globs(files)?)]);
    }
    let entries = files.as_sequence()?.iter();
    entries
        .map(|entry| Some((entry.get("split")?.as_str()?.to_owned(), globs(entry.get("path")?)?)))
        .collect()
}

/// The splits that names of files tell: `data/SPLIT-00000-of-00002.parquet`, else folders that are named after splits,
/// else files that are, else all files as `train`.
fn told_by_names(files: &[&str]) -> Result<Splits, HubError> {
    let digits = "[0-9]".repeat(5);
    let shards = |split: &str| format!("data/{split}-{digits}-of-{digits}*.*");
    let of_shards = matching(files, &shards("*"))?;
    let found: BTreeSet<&str> = of_shards.iter().filter_map(|file| split_of_shard(file)).collect();
    if !found.is_empty() {
        let known = SPLITS.iter().map(|(split, _)| *split).filter(|split| found.contains(split));
        let others = found.iter().copied().filter(|split| SPLITS.iter().all(|(known, _)| known != split));
        return Ok(known.chain(others).map(|split| (split.to_owned(), vec![shards(split)])).collect());
    }
    for globs in [&BY_FOLDER[..], &BY_FILE[..]] {
        let mut splits = Splits::new();
        for (split, words) in SPLITS {
            let with = |word: &str, glob: &str| glob.replace("{word}", word).replace("{around}", AROUND);
            let globs: Vec<String> =
                words.iter().flat_map(|word| globs.iter().map(move |glob| with(word, glob))).collect();
            let mut is_there = false;
            for glob in &globs {
                is_there |= !matching(files, glob)?.is_empty();
            }
            splits.extend(is_there.then(|| (split.to_owned(), globs)));
        }
        if !splits.is_empty() {
            return Ok(splits);
        }
    }
    let all = "**".to_owned();
    Ok(if matching(files, &all)?.is_empty() { Splits::new() } else { vec![("train".to_owned(), vec![all])] })
}

/// The split in `data/SPLIT-00000-of-00002.parquet`.
fn split_of_shard(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next()?;
    let (before, _) = name.rsplit_once("-of-")?;
    let (split, number) = before.rsplit_once('-')?;
    (number.len() == 5 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(split)
}

/// The files that a glob matches, by name; of hidden ones, and of those beside data, only what it names.
fn matching<'a>(files: &[&'a str], glob: &str) -> Result<Vec<&'a str>, HubError> {
    let pattern = Pattern::new(glob).map_err(|error| {
        rows(format!("its README.md has {glob}, which is no glob ({error}); report it there"))
    })?;
    let is_matched = |file: &&str| pattern.matches_with(file, MATCHING) && !is_about(file, glob);
    let mut matched: Vec<&str> = files.iter().copied().filter(is_matched).collect();
    matched.sort_unstable();
    Ok(matched)
}

/// True for a file beside data that `glob` does not name.
fn is_about(file: &str, glob: &str) -> bool {
    let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let hidden = |path: &str| path.split('/').filter(|part| part.starts_with('.')).count();
    let special = |path: &str| {
        let folders = path.rsplit_once('/').map_or("", |(folders, _)| folders);
        folders.split('/').filter(|part| part.starts_with("__")).count()
    };
    (ABOUT.contains(&&*name(file)) && name(file) != name(glob))
        || hidden(file) != hidden(glob)
        || special(file) != special(glob)
}

/// True for a file with one of `endings` in its name, also before that of a packing.
fn has_ending(file: &str, endings: &[&str]) -> bool {
    let name = file.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    name.split('.').skip(1).any(|ending| endings.contains(&ending))
}
