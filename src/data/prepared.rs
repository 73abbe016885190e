//! Rows kept in `dataset_prepared_path`, so that a restart neither tokenises nor packs again. A file is named
//! after everything that its rows depend on, and carries a hash of its rows: a damaged one is never used.

use super::{dataset::Summary, store::RowStore};
use bytemuck::cast_slice;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

const ARRAYS: [&str; 4] = ["tokens", "labels", "document_lengths", "row_documents"];

/// Before the names of inputs of the loss.
const INPUT: &str = "input.";

/// The field of the file's header that holds the hash and, behind a space, the summary.
const HEADER: &str = "xorl-dist rows";

/// The file for rows with this key.
pub(super) fn file(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("rows-{key}.safetensors"))
}

/// Rows that were prepared before: `Ok(None)` if there are none, `Err` with the reason if they are damaged.
pub(super) fn read(path: &Path) -> Result<Option<(RowStore, Summary)>, String> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| error.to_string())?;
    let stated =
        header.metadata().as_ref().and_then(|fields| fields.get(HEADER)).ok_or("its header says nothing")?;
    let (digest, counts) = stated.split_once(' ').ok_or("its header is cut")?;

    let array = |name: &str| {
        let view = tensors.tensor(name).map_err(|error| error.to_string())?;
        if view.dtype() != Dtype::U32 || view.shape().len() != 1 {
            return Err(format!("{name} is not a list of u32"));
        }
        Ok(view.data().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect::<Vec<_>>())
    };
    let [tokens, labels, lengths, documents] = ARRAYS.map(array);
    let inputs = tensors.names().into_iter().filter_map(|name| {
        let input = name.strip_prefix(INPUT)?.to_owned();
        Some(array(name).map(|bits| (input, bits)))
    });
    let inputs = inputs.collect::<Result<BTreeMap<_, _>, String>>()?;
    let rows = RowStore::from_arrays([tokens?, labels?, lengths?, documents?]);
    let rows = rows.and_then(|rows| rows.with_inputs(inputs)).ok_or("its arrays do not fit together")?;
    if hash(&rows, counts) != digest {
        return Err("its rows do not have the hash that it states".into());
    }
    let summary = serde_json::from_str(counts).map_err(|error| format!("summary: {error}"))?;
    Ok(Some((rows, summary)))
}

/// Writes rows so that a reader sees all of them or nothing, also when other ranks write the same file.
pub(super) fn write(path: &Path, rows: &RowStore, summary: &Summary) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let arrays = ARRAYS.iter().zip(rows.arrays()).map(|(name, array)| (name.to_string(), array));
    let inputs = rows.inputs().iter().map(|(name, bits)| (format!("{INPUT}{name}"), &bits[..]));
    let views = arrays.chain(inputs).map(|(name, array)| {
        TensorView::new(Dtype::U32, vec![array.len()], cast_slice(array)).map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(std::io::Error::other)?;
    // One field, because several would be written in random order.
    let counts = serde_json::to_string(summary)?;
    let metadata = HashMap::from([(HEADER.to_string(), format!("{} {counts}", hash(rows, &counts)))]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(std::io::Error::other)?;

    // Process ids repeat over nodes that share the folder, the clock's nanoseconds hardly do.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let temporary = folder.join(format!(".rows-{}-{}.tmp", std::process::id(), now.as_nanos()));
    let publish = || {
        let mut file = File::options().write(true).create_new(true).open(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    };
    publish().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

/// SHA-256 over the rows and the text of their summary.
fn hash(rows: &RowStore, counts: &str) -> String {
    format!("{:x}", Sha256::new().chain_update(rows.digest()).chain_update(counts).finalize())
}
