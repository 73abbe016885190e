//! Contents of a whole folder, a step of a run or a save of a server, checked against each other. Bytes that are as
//! they were published ([`verify`](super::publish::verify)) may still say what cannot be: a save of a program with a
//! bug, or a manifest that was made anew.

use super::{
    CheckpointError,
    adapter_config::{AdapterConfig, CONFIG_FILE, read_config},
    adapter_file::{AdapterFile, Entry, WEIGHTS_FILE},
    pieces::{GRADIENT, MASTER, Pieces, read_pieces},
    publish::{MANIFEST, Manifest},
    reshard::Cut,
    state::{self, AdapterState},
};
use crate::{lora::Patterns, optim, shard::FlatRegion};
use std::{fs, path::Path};

/// A folder whose contents agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
}

/// Checks the contents of `folder`, whose files are as they were published:
///
/// - it has no file that its manifest does not list
/// - each tensor of the adapter has its other factor, and the rank that adapter_config.json says
/// - the pieces of all ranks hold every parameter once, and the adapter has the masters' values
/// - all values of adapter, optimizer and gradient are finite
///
/// A folder without adapter, such as a merged model, has only the first.
///
/// # Errors
/// [`CheckpointError::Damaged`] with the first thing that is wrong, or that of reading a file.
pub fn check(folder: &Path) -> Result<Contents, CheckpointError> {
    let manifest = Manifest::read(folder)?;
    let damaged = |reason: String| CheckpointError::Damaged { path: folder.to_owned(), reason };
    if let Some(file) = surplus(folder, "", &manifest).map_err(|error| damaged(error.to_string()))? {
        return Err(damaged(format!("{file} is in it, which {MANIFEST} does not list")));
    }
    let adapter = if manifest.lists(CONFIG_FILE) {
        let config = read_config(folder)?;
        let file = AdapterFile::open(folder)?;
        check_adapter(&config, &file).map_err(damaged)?;
        Some(file)
    } else {
        None
    };
    if let Some(state) = state::checked(folder)? {
        check_tiles(&state).map_err(damaged)?;
        let (regions, pieces) = whole_pieces(folder, &manifest, &state)?;
        let found = check_pieces(&state, &regions, &pieces, adapter.as_ref());
        found.map_err(|reason| damaged(format!("{}: {reason}", state::FOLDER)))?;
    }
    Ok(Contents { files: manifest.files().count(), bytes: manifest.bytes() })
}

/// A file below `folder`/`below` that the manifest does not list.
fn surplus(folder: &Path, below: &str, manifest: &Manifest) -> std::io::Result<Option<String>> {
    for entry in fs::read_dir(folder.join(below))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = format!("{below}{}", name.to_string_lossy());
        if entry.file_type()?.is_dir() {
            if let Some(file) = surplus(folder, &format!("{name}/"), manifest)? {
                return Ok(Some(file));
            }
        } else if name != MANIFEST && !manifest.lists(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// Checks the tensors of an adapter file against each other and against its configuration.
fn check_adapter(config: &AdapterConfig, file: &AdapterFile) -> Result<(), String> {
    let patterns = config.patterns().map_err(|error| format!("{CONFIG_FILE}: {error}"))?;
    if file.keys().next().is_none() {
        return Err(format!("{WEIGHTS_FILE} has no tensor"));
    }
    for key in file.keys() {
        let Some(entry) = file.get(key) else { continue };
        check_tensor(config, &patterns, file, key, entry)
            .map_err(|reason| format!("{WEIGHTS_FILE}: {reason}"))?;
    }
    Ok(())
}

fn check_tensor(
    config: &AdapterConfig,
    patterns: &Patterns,
    file: &AdapterFile,
    key: &str,
    entry: &Entry,
) -> Result<(), String> {
    let values = file.floats(entry).ok_or_else(|| format!("{key} is {:?}, no real numbers", entry.dtype))?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(format!("{key} has NaN or infinity"));
    }
    let other = |stem: &str, end: &str| {
        let name = format!("{stem}{end}");
        file.get(&name).map(|other| (name.clone(), other)).ok_or_else(|| format!("{name} is missing"))
    };
    if let Some(stem) = key.strip_suffix(B) {
        return other(stem, A).map(drop);
    }
    if let Some(stem) = key.strip_suffix(MAGNITUDE) {
        let (name, b) = other(stem, B)?;
        let rows = &b.shape[..b.shape.len().min(1)];
        return if entry.shape == rows {
            Ok(())
        } else {
            Err(format!("{key} is {:?}, but {name} is {:?}", entry.shape, b.shape))
        };
    }
    let stem = key.strip_suffix(A).ok_or_else(|| format!("{key} is no part of a LoRA adapter"))?;
    let (name, b) = other(stem, B)?;
    // `[.., rank, in]` and `[.., out, rank]`.
    let rank = entry.shape.iter().rev().nth(1);
    if rank.is_none() || rank != b.shape.last() {
        return Err(format!("{key} is {:?}, but {name} is {:?}", entry.shape, b.shape));
    }
    let path = stem.strip_prefix("base_model.model.").unwrap_or(stem);
    let parameter = format!("{path}.weight");
    let targeted = if config.targets(path) {
        path
    } else if config.targets_parameter(&parameter) {
        &parameter
    } else {
        // Experts that are fused or stacked have other names in the configuration.
        return Ok(());
    };
    let stated = patterns.shape_of(targeted).rank;
    if rank != Some(&stated) {
        return Err(format!("{key} is {:?}, but {CONFIG_FILE} says rank {stated}", entry.shape));
    }
    Ok(())
}

/// Checks that no two parameters of a region share an element. That each lies in its region is known.
fn check_tiles(state: &AdapterState) -> Result<(), String> {
    for region in &state.regions {
        let mut placed: Vec<_> = region
            .parameters
            .iter()
            .filter_map(|parameter| Some((parameter.elements()?, &parameter.name)))
            .collect();
        placed.sort_by_key(|(elements, _)| elements.start);
        for pair in placed.windows(2) {
            let [(first, one), (second, other)] = pair else { continue };
            if second.start < first.end {
                return Err(format!("{one} and {other} share elements of region {}", region.name));
            }
        }
    }
    Ok(())
}

/// The pieces of all ranks put together, and the regions that they are of: each one piece.
fn whole_pieces(
    folder: &Path,
    manifest: &Manifest,
    state: &AdapterState,
) -> Result<(Vec<FlatRegion>, Pieces), CheckpointError> {
    let gradient = state.accumulated.map(|_| GRADIENT);
    let names: Vec<&str> = optim::state_names(state.optimizer.kind).iter().copied().chain(gradient).collect();
    // A file may claim any size: memory is taken only for what the files can hold.
    let stored: u64 = state.piece_files().map(|file| manifest.size(&file)).sum();
    let each = (state.shards * size_of::<f32>()).saturating_mul(1 + names.len()) as u64;
    let needed = state
        .regions
        .iter()
        .fold(0u64, |sum, region| sum.saturating_add((region.piece as u64).saturating_mul(each)));
    if needed > stored {
        let reason = format!("its shards are {needed} bytes, and the files with them have {stored}");
        return Err(CheckpointError::Damaged { path: folder.to_owned(), reason });
    }
    let whole = |region: &FlatRegion| FlatRegion {
        piece: region.piece * state.shards,
        expert_groups: 1,
        ..region.clone()
    };
    let regions: Vec<FlatRegion> = state.regions.iter().map(whole).collect();
    let pieces = read_pieces(folder, state, Cut { regions: &regions, shards: 1 }, 0, &names)?;
    Ok((regions, pieces))
}

fn check_pieces(
    state: &AdapterState,
    regions: &[FlatRegion],
    pieces: &Pieces,
    adapter: Option<&AdapterFile>,
) -> Result<(), String> {
    for (region, tensor, values) in pieces.iter() {
        if values.iter().any(|value| !value.is_finite()) {
            return Err(format!("{region}.{tensor} has NaN or infinity"));
        }
    }
    // What PiSSA took from the base is in the file beside the masters.
    let Some(adapter) = adapter.filter(|_| !state.pissa) else { return Ok(()) };
    let masters = pieces.iter().filter(|(_, tensor, _)| *tensor == MASTER);
    for (name, _, values) in masters {
        let parameters = regions.iter().filter(|region| region.name == name).flat_map(|r| &r.parameters);
        for parameter in parameters {
            // Fused targets and experts have other keys in the file.
            let key = format!("base_model.model.{}.weight", parameter.name);
            let Some(entry) = adapter.get(&key) else { continue };
            let master = parameter.elements().and_then(|elements| values.get(elements)).unwrap_or_default();
            let stored = adapter.floats(entry).unwrap_or_default();
            if entry.shape != parameter.shape {
                return Err(format!(
                    "{} is {:?}, in {WEIGHTS_FILE} {:?}",
                    parameter.name, parameter.shape, entry.shape
                ));
            }
            if master.iter().map(|value| value.to_bits()).ne(stored.iter().map(|value| value.to_bits())) {
                return Err(format!("{} has other values than {WEIGHTS_FILE}", parameter.name));
            }
        }
    }
    Ok(())
}
