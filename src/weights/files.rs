//! The weight files of an HF model directory, chosen as transformers does: `model.safetensors`, or else the shards that
//! `model.safetensors.index.json` lists.

use super::SourceError;
use crate::{lfs, regular_file};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files of weights that cannot be read: (ending of the name, remedy). The first match is reported.
const FOREIGN: &[(&str, &str)] = &[
    (
        "pytorch_model.bin",
        "it is a pickle; convert it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)",
    ),
    (
        "pytorch_model.bin.index.json",
        "it lists pickles; convert them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)",
    ),
    (
        "adapter_model.safetensors",
        "it is an adapter: name its base here, and the adapter in lora.adapter_path",
    ),
    ("consolidated.safetensors", "it has Mistral's own names; take the model in HF format"),
    (".pth", "it has Meta's own names; take the model in HF format"),
    (".gguf", "it is quantized for llama.cpp; take the model in HF format"),
];

/// The weight files of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightFiles {
    pub files: Vec<PathBuf>,
    /// The index that lists them, if they are shards.
    pub index: Option<PathBuf>,
    /// An index beside a single file, which is not read.
    pub unread_index: Option<PathBuf>,
}

/// The safetensors files of an HF model directory.
pub fn weight_files(directory: &Path) -> Result<WeightFiles, SourceError> {
    let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
    if single.is_file() {
        let stale = index.is_file() && shards_of(directory, &index).ok() != Some(vec![single.clone()]);
        let unread_index = stale.then_some(index);
        return Ok(WeightFiles { files: vec![single], index: None, unread_index });
    }
    if index.is_file() {
        let files = shards_of(directory, &index)?;
        if let Some(absent) = files.iter().find(|file| !file.exists()) {
            let file = absent.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(SourceError::NoShard { index, file });
        }
        return Ok(WeightFiles { files, index: Some(index), unread_index: None });
    }
    match foreign_file(directory) {
        Some((found, remedy)) => Err(SourceError::Foreign { path: directory.to_owned(), found, remedy }),
        None => Err(SourceError::NoWeights { path: directory.to_owned() }),
    }
}

/// A file of weights in another format, and what to do with it.
fn foreign_file(directory: &Path) -> Option<(String, &'static str)> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let names: BTreeSet<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    FOREIGN.iter().find_map(|(ending, remedy)| {
        let name = names.iter().find(|name| name.ends_with(ending))?;
        Some((name.clone(), *remedy))
    })
}

/// The files that an index names, all of them inside `directory`.
fn shards_of(directory: &Path, index: &Path) -> Result<Vec<PathBuf>, SourceError> {
    let fault = |reason: String| SourceError::Index { path: index.to_owned(), reason };
    let text = regular_file::read_to_string(index)
        .map_err(|error| SourceError::Io { path: index.to_owned(), error })?;
    if lfs::is_pointer(text.as_bytes()) {
        return Err(SourceError::LfsPointer { path: index.to_owned() });
    }
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| fault("weight_map is missing".into()))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| fault(format!("weight_map.{tensor} is not a file name")))?;
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(fault(format!(
                "weight_map.{tensor} is {file}, which is not a file of this directory"
            )));
        }
        files.insert(directory.join(file));
    }
    Ok(files.into_iter().collect())
}
