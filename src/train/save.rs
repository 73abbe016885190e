//! Publishing of a step, collectively. Rank 0 opens it and writes the adapter, every rank of the first copy writes its
//! pieces, rank 0 publishes and prunes. After each part all ranks agree to go on: a save that fails on one rank ends
//! all with that rank's error, and earlier steps are untouched.

use super::{Run, Trainer, best::Best, merge::Merger};
use crate::{
    checkpoint::{
        self, CheckpointError, FolderWriter, TrainerState,
        adapter_store::{self, Export},
        model_files::{FileTensor, ModelFiles, SHARD_BYTES},
        pieces::write_pieces,
        publish::{KnownHashes, publish_together, withdraw},
        state::{AdapterState, DataIdentity},
        steps,
    },
    config::InitLoraWeights,
    console::first_of,
    data::schedule::DataCursor,
    device::Staging,
    error::{Error, Result, agree},
    lora::{MergePlan, Parameter, pissa::Values},
    model::{quantized, stored_base},
    quant::Tile,
    shard::{ShardError, Storage},
    weights::TensorMeta,
};
use std::path::{Path, PathBuf};

/// Progress of the run after a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Steps made.
    pub step: usize,
    /// The epoch of the last step made.
    pub epoch: usize,
    pub position: DataCursor,
}

/// Saves the steps of a run.
pub(super) struct Saver<'a> {
    run: &'a Run,
    rank: usize,
    known: KnownHashes,
    /// Digest of the base, on rank 0.
    base: String,
    /// `model/` of the last step that has one.
    model: Option<PathBuf>,
    /// Merges in the base of the last step.
    merges: u64,
    /// A₀ and B₀ that were taken from the base, on rank 0.
    subtracted: Option<Values>,
}

/// Note for `model/`: a base beside an adapter is easily taken for a merged model.
const NOTE: &str = "This folder is the base model, unmerged: it is as it was before training, and answers as before. \
                    The adapter is in the folder above; PEFT's PeftModel.from_pretrained(model, \"..\") puts it on, and \
                    merge_and_unload() then merges it.\n";

/// The same for a base that merges have changed.
const NOTE_OF_MERGED: &str = "This folder is the base model with every adapter that was merged into it during training. \
                              The adapter in the folder above is the one that was trained since the last merge; right \
                              after a merge it is zero, and this folder alone is the trained model.\n";

/// Writes the note into `model/` of a step, unless a link of an earlier step's is there.
fn write_note(model: &Path, is_merged: bool) -> Result<()> {
    let path = model.join("README.md");
    if path.exists() {
        return Ok(());
    }
    std::fs::write(&path, if is_merged { NOTE_OF_MERGED } else { NOTE })
        .map_err(|error| CheckpointError::Io { path, error }.into())
}

/// Refuses an adapter with NaN or infinities, which would load and answer nonsense.
fn check_finite(whole: &[(Parameter, Vec<f32>)], step: usize) -> Result<()> {
    let is_broken = |values: &[f32]| values.iter().any(|value| !value.is_finite());
    let broken: Vec<&str> =
        whole.iter().filter(|(_, values)| is_broken(values)).map(|(parameter, _)| &*parameter.name).collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Error::Failure(format!(
        "step {step} is not saved: NaN or infinity in {}; lower train.lr, train.weight_decay or lora.lora_alpha, and go \
         on from an earlier step",
        first_of(&broken)
    )))
}

impl<'a> Saver<'a> {
    pub(super) fn new(run: &'a Run, rank: usize, subtracted: Option<Values>) -> Result<Self> {
        let model = run.resumed().map(|resumed| resumed.path.join(checkpoint::base::FOLDER));
        let base = if rank == 0 { run.base_digest()? } else { String::new() };
        let (known, model) = (KnownHashes::default(), model.filter(|path| path.is_dir()));
        let merges = run.resumed().map_or(0, |resumed| resumed.state.merges);
        let subtracted = subtracted.filter(|_| rank == 0);
        Ok(Self { run, rank, known, base, model, merges, subtracted })
    }

    /// Publishes the run as it stands. Collective.
    pub(super) fn save(
        &mut self,
        trainer: &Trainer,
        merger: &Merger,
        best: &Best,
        at: Progress,
    ) -> Result<()> {
        let world = &*trainer.world;
        let whole = trainer.session.adapter.whole()?;
        let (run, rank, merges) = (self.run, self.rank, merger.done());
        // All ranks know which base is in the last step, and write a new one together.
        let new_base = (merges != self.merges).then(|| merged_files(run, merger.plan()));
        let saved = Saved { at, merges, best, new_base: new_base.as_ref() };
        let opened = match rank {
            0 => check_finite(&whole, at.step).and_then(|()| self.begin(trainer, whole, saved)).map(Some),
            _ => Ok(None),
        };
        publish_together(
            world,
            |own| agree(world, own),
            opened,
            |hidden| {
                write_own_pieces(run, trainer, rank, hidden)?;
                new_base
                    .as_ref()
                    .map_or(Ok(()), |files| write_own_base(run, trainer, merger.plan(), files, rank, hidden))
            },
            |writer| self.publish(writer, trainer, saved),
        )?;
        self.merges = merges;
        Ok(())
    }

    /// Rank 0's files of the step, still hidden.
    fn begin(
        &self,
        trainer: &Trainer,
        whole: Vec<(Parameter, Vec<f32>)>,
        saved: Saved,
    ) -> Result<FolderWriter> {
        let Saved { at, merges, new_base, .. } = saved;
        let run = self.run;
        let mut writer = FolderWriter::of_step(&run.run_dir, at.step)?;
        // The state is written last: it has the digest of the base.
        let state = self.state(trainer, saved);
        adapter_store::open_state(&mut writer, &state.adapter, |_| Ok(()))?;

        let saves_base = merges > 0 || !run.config.lora.save_lora_only;
        if saves_base {
            let files = &run.files;
            match (new_base, &self.model) {
                (Some(new), _) => files.write_around(writer.directory(), new)?,
                (None, Some(model)) if merges > 0 && !model.is_dir() => {
                    let reason = "it is gone, and with it the base that the adapter belongs to".into();
                    return Err(CheckpointError::Format { path: model.clone(), reason }.into());
                }
                (None, model) => files.write(writer.directory(), model.as_deref(), run.source.as_ref())?,
            }
            write_note(&writer.directory().join(checkpoint::base::FOLDER), merges > 0)?;
        }
        let own = || steps::directory(&run.run_dir, at.step).join(checkpoint::base::FOLDER);
        let own = || own().display().to_string();
        let base = match run.config.model.weights_name() {
            // The step is the only place of a merged base, and of a random one.
            _ if merges > 0 => Some(own()),
            None if saves_base => Some(own()),
            other => other,
        };
        let lora = &run.config.lora;
        let (format, dropout) = (lora.lora_export_format, lora.lora_dropout);
        let (sites, shapes, subtracted) = (&run.sites[..], &run.shapes, self.subtracted.as_ref());
        let export = Export { sites, shapes, base, format, dropout, subtracted };
        adapter_store::write_adapter(writer.directory(), whole, export)?;
        Ok(writer)
    }

    fn state(&self, trainer: &Trainer, Saved { at, merges, best, .. }: Saved) -> TrainerState {
        let Run { config, mesh, dataset, batches, shapes, .. } = self.run;
        let (train, packed) = (&config.train, self.run.spec.quantization.as_ref());
        TrainerState {
            format: TrainerState::FORMAT,
            run_id: train.run_id.clone(),
            step: at.step,
            total_steps: self.run.total_steps,
            epoch: at.epoch,
            position: at.position,
            global_batch_size: batches.global_batch,
            seed: train.seed,
            lora_dropout: config.lora.lora_dropout,
            reference: self.run.reference.as_ref().map(|adapter| adapter.digest.clone()),
            merges,
            evaluations: best.state().cloned(),
            adapter: AdapterState {
                pissa: config.lora.init_lora_weights == InitLoraWeights::Pissa,
                ..adapter_store::state_of(&trainer.session, shapes, mesh, &self.base, packed)
            },
            schedule: trainer.schedule,
            data: DataIdentity { rows: dataset.rows(), fingerprint: dataset.fingerprint().to_owned() },
        }
    }

    /// Makes the step visible and removes older ones. On rank 0.
    fn publish(&mut self, writer: FolderWriter, trainer: &Trainer, saved: Saved) -> Result<()> {
        let (folder, step) = (writer.directory(), saved.at.step);
        if saved.new_base.is_some() {
            let written =
                stored_base::open(&folder.join(checkpoint::base::FOLDER), &mut self.run.spec.clone())?;
            self.base = quantized::digest(&written, self.run.spec.quantization.as_ref())?;
        }
        self.state(trainer, saved).write(folder)?;
        let published = writer.publish(&mut self.known)?;
        tracing::info!("saved {}", published.display());
        let model = published.join(checkpoint::base::FOLDER);
        if model.is_dir() {
            self.model = Some(model);
        }
        let (run_dir, best) = (&self.run.run_dir, saved.best.step().map(|best| best.step));
        steps::set_best(run_dir, best)?;
        if let Some(limit) = self.run.config.train.save_total_limit {
            let resumed = self.run.resumed().map(|resumed| resumed.state.step);
            let others: Vec<usize> = resumed.into_iter().chain(best).collect();
            for step in steps::surplus(&steps::published(run_dir), limit, step, &others) {
                // The run goes on with a step too many.
                match withdraw(&steps::directory(run_dir, step)) {
                    Ok(()) => tracing::info!("removed step {step}: train.save_total_limit is {limit}"),
                    Err(error) => tracing::warn!("could not remove step {step}: {error}"),
                }
            }
        }
        Ok(())
    }
}

/// A step as it is saved.
#[derive(Clone, Copy)]
struct Saved<'a> {
    at: Progress,
    merges: u64,
    best: &'a Best,
    /// Files of a base that no step has yet.
    new_base: Option<&'a ModelFiles>,
}

/// The weight files of the base as merges with `plan` have changed it: what they change is as the shards hold it, the
/// rest as the run has read it. All packed matrices are as the shards hold them.
fn merged_files(run: &Run, plan: &MergePlan) -> ModelFiles {
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
fn write_own_base(
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

/// Writes the pieces of a rank of the first copy into the hidden directory of the step.
fn write_own_pieces(run: &Run, trainer: &Trainer, rank: usize, hidden: &Path) -> Result<()> {
    if run.mesh.coordinates(rank).replicate > 0 {
        return Ok(());
    }
    let pieces = adapter_store::pieces_of(&trainer.session, trainer.model.device(), None)?;
    Ok(write_pieces(hidden, rank, run.mesh.world(), &pieces)?)
}
