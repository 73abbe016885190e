//! config.json beside weights that were written anew: their dtype, and the tool in whose form they are packed.

use super::{CheckpointError, base::CONFIG, io, model_files::ModelFiles, packed_files};
use crate::{dtype::DType, json, regular_file};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Fields of config.json with the dtype of the weights: the present name, and that of transformers before 5.
const DTYPE_FIELDS: [&str; 2] = ["dtype", "torch_dtype"];
/// Those that name the tool that packed them.
const TOOL_FIELDS: [&str; 2] = ["quantization_config", "compression_config"];
/// ModelOpt's own file, which would speak of the weights that were before.
const MODELOPT: &str = "hf_quant_config.json";

/// Puts `side`, the files beside a base's weights by name, into `folder`, which gets the weights `files`; `put` links
/// or copies a file. config.json is rewritten where it would not be true: weights in another `dtype`, packed or no
/// more.
pub(super) fn put_beside(
    side: BTreeMap<String, PathBuf>,
    folder: &Path,
    files: &ModelFiles,
    dtype: Option<DType>,
    put: impl Fn(&Path, &Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    for (name, path) in side.into_iter().filter(|(name, _)| name != MODELOPT) {
        let to = folder.join(&name);
        if name == CONFIG { write(&path, &to, files, dtype, &put)? } else { put(&path, &to)? }
    }
    Ok(())
}

fn write(
    from: &Path,
    to: &Path,
    files: &ModelFiles,
    dtype: Option<DType>,
    put: impl Fn(&Path, &Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let text = regular_file::read_to_string(from).map_err(io(from))?;
    let mut fields: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
        CheckpointError::Format { path: from.to_owned(), reason: json::problem(text.as_bytes(), &error) }
    })?;
    let format = files.format();
    if dtype.is_none() && format.is_none() && !TOOL_FIELDS.iter().any(|field| fields.contains_key(*field)) {
        return put(from, to);
    }
    if let Some(dtype) = dtype {
        let known: Vec<&str> = DTYPE_FIELDS.into_iter().filter(|field| fields.contains_key(*field)).collect();
        for field in if known.is_empty() { &DTYPE_FIELDS[1..] } else { &known } {
            fields.insert((*field).to_owned(), dtype.name().into());
        }
    }
    for field in TOOL_FIELDS {
        fields.shift_remove(field);
    }
    if let Some(format) = format {
        fields.insert(TOOL_FIELDS[0].to_owned(), packed_files::config(format, &plain_layers(files)));
    }
    let text = serde_json::to_string_pretty(&fields).unwrap_or_default();
    fs::write(to, text + "\n").map_err(io(to))
}

/// Modules that stay plain, as tools name them: those with a matrix that is not packed, and the head, which may be the
/// embedding and then has none.
fn plain_layers(files: &ModelFiles) -> Vec<String> {
    let plain = files.tensors().filter(|(_, tensor)| tensor.format.is_none() && tensor.meta.shape.len() == 2);
    let modules = plain.filter_map(|(name, _)| name.strip_suffix(".weight"));
    let mut modules: Vec<String> =
        modules.filter(|module| !module.ends_with("embed_tokens")).map(str::to_owned).collect();
    if !modules.iter().any(|module| module == "lm_head") {
        modules.push("lm_head".into());
    }
    modules
}
