//! The files of a data set: a file, a folder, the files of a glob, or a folder of HF datasets' `save_to_disk`.

use super::{DataError, formats::ENDINGS};
use crate::{console::first_of, regular_file};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The files of a data set, in the order in which they are read, and a remark on what is left out.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Files {
    pub paths: Vec<PathBuf>,
    pub remark: Option<String>,
}

/// Names of files that hold rows kept apart from training, as HF's builders know them.
const HELD_OUT: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];

/// The files of `path`:
///
/// - a file;
/// - the files of a folder, not of its subfolders, by name: those of one format, the first that the folder has of
///   [`ENDINGS`], also packed;
/// - the files of a glob, by name (`data/*.parquet`, `data/**/train-*.jsonl.gz`);
/// - the shards of a folder that HF datasets saved (`state.json`), in the order that it names. One with several splits
///   (`dataset_dict.json`) has them in folders of its own.
///
/// `split` chooses a folder of that name within, else the files that are named after it (`train-00000.parquet`). By
/// default it is `train` where a folder of HF datasets has splits.
pub(crate) fn files(path: &Path, split: Option<&str>) -> Result<Files, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) => return if is_glob(path) { globbed(path, split) } else { Err(io(error)) },
    };
    if found.is_file() {
        return Ok(Files { paths: vec![path.into()], remark: None });
    }
    if !found.is_dir() {
        let problem = "a pipe or a device, which cannot be read twice; write its rows to a file".into();
        return Err(DataError::Foreign { path: path.into(), problem });
    }
    if let Some(dict) = read_json(&path.join("dataset_dict.json"))? {
        return saved(&path.join(split_of(path, &dict, split)?));
    }
    if path.join("state.json").is_file() {
        return saved(path);
    }
    if let Some(split) = split {
        let below = path.join(split);
        if below.is_dir() {
            return files(&below, None);
        }
    }
    folder(path, split)
}

/// True for a path with characters of a glob.
fn is_glob(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn globbed(path: &Path, split: Option<&str>) -> Result<Files, DataError> {
    let text = path.to_string_lossy();
    let problem = |problem: String| DataError::Foreign { path: path.into(), problem };
    let all = glob::glob(&text).map_err(|error| problem(format!("not a glob: {error}")))?;
    let named = |path: &PathBuf| split.is_none_or(|split| is_of_split(path, split));
    let mut paths: Vec<PathBuf> = all.flatten().filter(|path| path.is_file()).filter(named).collect();
    if paths.is_empty() {
        return Err(problem("no file matches this glob".into()));
    }
    paths.sort();
    Ok(Files { paths, remark: None })
}

/// The split to read of those that dataset_dict.json names.
fn split_of(path: &Path, dict: &Value, split: Option<&str>) -> Result<String, DataError> {
    let listed = dict["splits"].as_array().into_iter().flatten();
    let names: Vec<&str> = listed.filter_map(Value::as_str).collect();
    let chosen = match split {
        Some(split) => split,
        None if names.len() == 1 => names[0],
        None => "train",
    };
    if names.contains(&chosen) {
        return Ok(chosen.to_owned());
    }
    let problem = format!("no split {chosen}; set split to one of: {}", names.join(", "));
    Err(DataError::Foreign { path: path.into(), problem })
}

/// The shards of a folder that HF datasets saved.
fn saved(path: &Path) -> Result<Files, DataError> {
    let state = path.join("state.json");
    let broken = |problem: &str| DataError::Foreign { path: state.clone(), problem: problem.into() };
    let read = read_json(&state)?.ok_or_else(|| broken("missing in a folder that save_to_disk wrote"))?;
    if read["_indices_data_files"].as_array().is_some_and(|indices| !indices.is_empty()) {
        return Err(broken("rows chosen by indices; save the data set again after flatten_indices()"));
    }
    let shards = read["_data_files"].as_array().into_iter().flatten();
    let paths: Vec<PathBuf> =
        shards.filter_map(|shard| Some(path.join(shard["filename"].as_str()?))).collect();
    if paths.is_empty() {
        return Err(broken("expected `_data_files` with the names of shards"));
    }
    if let Some(shard) = paths.iter().find(|shard| shard.exists() && !shard.is_file()) {
        let problem = "no regular file, where a shard belongs; copy the data set again".into();
        return Err(DataError::Foreign { path: shard.clone(), problem });
    }
    Ok(Files { paths, remark: None })
}

fn read_json(path: &Path) -> Result<Option<Value>, DataError> {
    let bytes = match regular_file::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DataError::Io { path: path.into(), source }),
    };
    let problem =
        |error| DataError::Foreign { path: path.into(), problem: format!("not valid JSON: {error}") };
    serde_json::from_slice(&bytes).map(Some).map_err(problem)
}

/// The files of a folder that are of one format.
fn folder(path: &Path, split: Option<&str>) -> Result<Files, DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    let mut all = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.is_file() && !is_about(&file) {
            all.push(file);
        }
    }
    all.sort();
    let of_split = |file: &&PathBuf| split.is_none_or(|split| is_of_split(file, split));
    let chosen = ENDINGS.into_iter().find_map(|ending| {
        let paths: Vec<PathBuf> =
            all.iter().filter(|file| ending_of(file) == Some(ending)).filter(of_split).cloned().collect();
        (!paths.is_empty()).then_some((ending, paths))
    });
    let Some((ending, paths)) = chosen else {
        let names = names(all.iter());
        let found = if names.is_empty() { String::new() } else { format!("; it has {}", first_of(&names)) };
        return Err(match split {
            None => DataError::NoFiles { path: path.into(), found },
            Some(split) => DataError::Foreign {
                path: path.into(),
                problem: format!("neither a folder nor a file of split {split}{found}"),
            },
        });
    };
    let left_out = names(all.iter().filter(|file| split.is_none() && !paths.contains(file)));
    let held_out = HELD_OUT.iter().any(|split| paths.iter().any(|file| is_of_split(file, split)));
    let trained = paths.iter().any(|file| is_of_split(file, "train"));
    let remark = if !left_out.is_empty() {
        Some(format!("only .{ending} files of a folder are read, not {}", first_of(&left_out)))
    } else if split.is_none() && held_out && trained {
        Some("files of several splits are read; set split: train for those of training alone".into())
    } else {
        None
    };
    Ok(Files { paths, remark })
}

/// The ending of a file that may hold rows, without that of its packing.
fn ending_of(file: &Path) -> Option<&'static str> {
    let name = file.file_name()?.to_str()?;
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let ending = name.rsplit_once('.')?.1;
    ENDINGS.into_iter().find(|known| *known == ending)
}

/// True for files beside data: hidden ones and texts about them.
fn is_about(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.')
        || name.ends_with(".md")
        || name == "dataset_info.json"
        || name == "dataset_infos.json"
}

/// True for a file that is named after a split: `train.jsonl`, `train-00000-of-00002.parquet`.
fn is_of_split(file: &Path, split: &str) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.strip_prefix(split).is_some_and(|rest| rest.starts_with(['.', '-', '_']))
}

fn names<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Vec<String> {
    files.filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned())).collect()
}
