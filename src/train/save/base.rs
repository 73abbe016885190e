//! The base beside an adapter: `model/` of a step.

use super::super::{Run, Trainer};
use crate::{
    checkpoint::{
        self, CheckpointError,
        model_files::{FileTensor, ModelFiles, SHARD_BYTES},
    },
    device::Staging,
    error::{Error, Result},
    lora::MergePlan,
    model::{quantized, stored_base},
    quant::Tile,
    shard::{ShardError, Storage},
    weights::TensorMeta,
};
use std::path::Path;

/// Note for `model/`: a base beside an adapter is easily taken for a merged model.
const NOTE: &str = "This folder is the base model, unmerged: it is as it was before training, and answers as before. \
                    The adapter is in the folder above; PEFT's PeftModel.from_pretrained(model, \"..\") puts it on, and \
                    merge_and_unload() then merges it.\n";

/// The same for a base that merges have changed.
const NOTE_OF_MERGED: &str = "This folder is the base model with every adapter that was merged into it during training. \
                              The adapter in the folder above is the one that was trained since the last merge; right \
                              after a merge it is zero, and this folder alone is the trained model.\n";

/// Writes the note into `model/` of a step, unless a link of an earlier step's is there.
pub(super) fn write_note(model: &Path, is_merged: bool) -> Result<()> {
    let path = model.join("README.md");
    if path.exists() {
        return Ok(());
    }
    std::fs::write(&path, if is_merged { NOTE_OF_MERGED } else { NOTE })
        .map_err(|error| CheckpointError::Io { path, error }.into())
}

/// The weight files of the base as merges with `plan` have changed it: what they change is as the shards hold it, the
/// rest as the run has read it. All packed matrices are as the shards hold them.
pub(super) fn merged_files(run: &Run, plan: &MergePlan) -> ModelFiles {
    let (source, compute) = (run.source.as_ref(), run.options().compute);
    let packed = run.spec.quantization.as_ref().map(|packed| packed.matrices(&run.spec)).unwrap_or_default();
    let tensors = source.names().into_iter().filter_map(|name| {
        let (meta, format) = (source.meta(&name)?, packed.get(&name).copied());
        let is_plain = format.is_none() && plan.columns(&name).is_some();
        let dtype = if is_plain { compute } else { meta.dtype };
        Some((name, FileTensor { meta: TensorMeta { dtype, ..meta }, format }))
    });
    ModelFiles::new(tensors, SHARD_BYTES)
}

/// Writes the part of the base that a rank of the first copy owns, and its share of what merges do not change.
pub(super) fn write_own_base(
    run: &Run,
    trainer: &Trainer,
    plan: &MergePlan,
    files: &ModelFiles,
    rank: usize,
    hidden: &Path,
) -> Result<()> {
    if run.mesh.coordinates(rank).replicate > 0 {
        return Ok(());
    }
    // Before anything that may fail on one rank alone.
    let scales = trainer.model.scales()?;
    let writer = files.open(&hidden.join(checkpoint::base::FOLDER))?;
    let mut staging = Staging::new(trainer.model.device())?;
    trainer.model.visit_layers(|piece, values| {
        let tensor = &piece.tensor;
        if let Storage::Packed(format) = piece.storage {
            let Tile { elements, bytes } = format.tile();
            let tiles = piece.range.start / elements..piece.range.end.div_ceil(elements);
            let packed: Vec<u8> = staging.fetch(values).map_err(ShardError::from)?;
            for run in files.grid(tensor).into_iter().flat_map(|grid| grid.runs(tiles.clone())) {
                let own = (run.start - tiles.start) * bytes..(run.end - tiles.start) * bytes;
                writer.write_tiles(tensor, run, &packed[own])?;
            }
            if tiles.start == 0 {
                writer.write_beside(tensor, scales.get(tensor).copied().unwrap_or(1.0))?;
            }
        } else if plan.columns(tensor).is_some() {
            let bytes: Vec<u8> = staging.fetch(values).map_err(ShardError::from)?;
            writer.write(tensor, piece.range.start, &bytes)?;
        }
        Ok::<_, Error>(())
    })?;
    for ((name, tensor), owner) in files.tensors().zip(files.owners(run.mesh.block())) {
        if owner == rank && tensor.format.is_none() && plan.columns(name).is_none() {
            writer.copy_whole(run.source.as_ref(), name)?;
        }
    }
    Ok(writer.sync()?)
}

/// Digest of the base that is in the hidden directory of a step.
pub(super) fn digest(run: &Run, hidden: &Path) -> Result<String> {
    let written = stored_base::open(&hidden.join(checkpoint::base::FOLDER), &mut run.spec.clone())?;
    Ok(quantized::digest(&written, run.spec.quantization.as_ref())?)
}
