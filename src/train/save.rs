//! Publishing of a step, collectively. Rank 0 opens it and writes the adapter, every rank of the first copy writes its
//! pieces, rank 0 publishes and prunes. After each part all ranks agree to go on: a save that fails on one rank ends
//! all with that rank's error, and earlier steps are untouched.

use super::{Run, Trainer};
use crate::{
    checkpoint::{
        self, AdapterConfig, CheckpointError, StepWriter, TrainerState,
        base::BaseFiles,
        publish::KnownHashes,
        reshard,
        state::{DataIdentity, MASTER, OptimizerState, Pieces, write_pieces},
        steps,
    },
    console::first_of,
    data::schedule::DataCursor,
    device::Staging,
    error::{Error, Result, agree, broadcast_from_root},
    lora::Parameter,
    shard::ShardError,
    weights,
};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

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
    /// `model/` of the last step of this base that has one.
    model: Option<PathBuf>,
}

/// Note for `model/`: a base beside an adapter is easily taken for a merged model.
const NOTE: &str = "This folder is the base model, unmerged: it is as it was before training, and answers as before. \
                    The adapter is in the folder above; PEFT's PeftModel.from_pretrained(model, \"..\") puts it on, and \
                    merge_and_unload() then merges it.\n";

/// Writes the note into `model/` of a step, unless a link of an earlier step's is there.
fn write_note(model: &Path) -> Result<()> {
    let path = model.join("README.md");
    if path.exists() {
        return Ok(());
    }
    std::fs::write(&path, NOTE).map_err(|error| CheckpointError::Io { path, error }.into())
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
    pub(super) fn new(run: &'a Run, rank: usize) -> Result<Self> {
        let model = run.resumed().map(|resumed| resumed.path.join(checkpoint::base::FOLDER));
        let base = if rank == 0 { weights::digest(run.source.as_ref())? } else { String::new() };
        let (known, model) = (KnownHashes::default(), model.filter(|path| path.is_dir()));
        Ok(Self { run, rank, known, base, model })
    }

    /// Publishes the run as it stands. Collective.
    pub(super) fn save(&mut self, trainer: &Trainer, at: Progress) -> Result<()> {
        let world = &*trainer.world;
        let whole = trainer.session.adapter.whole()?;
        let begun = match self.rank {
            0 => check_finite(&whole, at.step).and_then(|()| self.begin(trainer, whole, at)).map(Some),
            _ => Ok(None),
        };
        let writer = agree(world, begun)?;
        let hidden = writer.as_ref().and_then(|writer| writer.directory().file_name());
        let hidden = broadcast_from_root(world, &hidden.unwrap_or_default().to_string_lossy())?;
        let wrote = self.write_own_pieces(trainer, &self.run.run_dir.join(hidden));
        agree(world, wrote)?;
        let published = writer.map_or(Ok(()), |writer| self.publish(writer, at.step));
        agree(world, published)
    }

    /// Rank 0's files of the step, still hidden.
    fn begin(
        &mut self,
        trainer: &Trainer,
        whole: Vec<(Parameter, Vec<f32>)>,
        at: Progress,
    ) -> Result<StepWriter> {
        let run = self.run;
        let mut writer = StepWriter::begin(&run.run_dir, at.step)?;
        let state = self.state(trainer, at)?;
        reshard::check(state.cut()).map_err(|reason| CheckpointError::Mismatch {
            path: writer.directory().to_owned(),
            reason: format!("its shards do not tile its shapes: {reason}"),
        })?;
        let folder = writer.directory().join(checkpoint::state::FOLDER);
        std::fs::create_dir(&folder).map_err(|error| CheckpointError::Io { path: folder, error })?;
        state.write(writer.directory())?;
        state.piece_files().for_each(|file| writer.expect(file));

        let saves_base = !run.config.lora.save_lora_only;
        if saves_base {
            let model = &run.config.model;
            let files = BaseFiles {
                weights: model.model_path.clone(),
                tokenizer: model.tokenizer(),
                config: model.hf_config(),
            };
            files.write(writer.directory(), self.model.as_deref(), run.source.as_ref())?;
            write_note(&writer.directory().join(checkpoint::base::FOLDER))?;
        }
        let model_path = run.config.model.model_path.clone();
        let base = match model_path {
            // The step is the only place of a random base.
            None if saves_base => {
                Some(steps::directory(&run.run_dir, at.step).join(checkpoint::base::FOLDER))
            }
            other => other,
        };
        self.write_adapter(writer.directory(), whole, base.as_deref())?;
        Ok(writer)
    }

    fn write_adapter(
        &self,
        directory: &Path,
        whole: Vec<(Parameter, Vec<f32>)>,
        base: Option<&Path>,
    ) -> Result<()> {
        let Run { sites, shapes, config, .. } = self.run;
        let mut whole: HashMap<String, Vec<f32>> =
            whole.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
        let adapters = checkpoint::peft::adapters(sites, shapes, |name| whole.remove(name));
        let base = base.map(|path| path.display().to_string());
        let format = config.lora.lora_export_format;
        let config = AdapterConfig::new(shapes.common, base, &adapters, format);
        Ok(checkpoint::peft::write(directory, &config, &adapters, format)?)
    }

    fn state(&self, trainer: &Trainer, at: Progress) -> Result<TrainerState> {
        let Run { config, mesh, dataset, batches, shapes, .. } = self.run;
        let train = &config.train;
        let numbers = trainer.session.optimizer.numbers();
        Ok(TrainerState {
            format: TrainerState::FORMAT,
            run_id: train.run_id.clone(),
            step: at.step,
            total_steps: self.run.total_steps,
            epoch: at.epoch,
            position: at.position,
            global_batch_size: batches.global_batch,
            seed: train.seed,
            world: mesh.world(),
            shards: mesh.block(),
            optimizer: OptimizerState {
                kind: train.optimizer,
                updates: trainer.session.optimizer.updates(),
                numbers: numbers.iter().map(|number| (number.field.to_owned(), number.value)).collect(),
            },
            schedule: trainer.schedule,
            data: DataIdentity { rows: dataset.rows(), fingerprint: dataset.fingerprint().to_owned() },
            lora: shapes.clone(),
            base: self.base.clone(),
            regions: trainer.session.adapter.plan().flat().cloned().collect(),
        })
    }

    fn write_own_pieces(&self, trainer: &Trainer, step: &Path) -> Result<()> {
        let mesh = &self.run.mesh;
        if mesh.coordinates(self.rank).replicate > 0 {
            return Ok(());
        }
        let mut pieces = Pieces::default();
        let mut staging = Staging::new(trainer.model.device()).map_err(ShardError::from)?;
        let mut fetch = |tensor| staging.fetch(tensor).map_err(ShardError::from);
        for piece in trainer.session.adapter.pieces() {
            pieces.insert(&piece.region.name, MASTER, fetch(piece.master)?);
            for (name, tensor) in &trainer.session.optimizer.state()[piece.region] {
                pieces.insert(&piece.region.name, name, fetch(tensor)?);
            }
        }
        Ok(write_pieces(step, self.rank, mesh.world(), &pieces)?)
    }

    /// Makes the step visible and removes older ones. On rank 0.
    fn publish(&mut self, writer: StepWriter, step: usize) -> Result<()> {
        let published = writer.publish(&mut self.known)?;
        tracing::info!("saved {}", published.display());
        let model = published.join(checkpoint::base::FOLDER);
        if model.is_dir() {
            self.model = Some(model);
        }
        if let Some(limit) = self.run.config.train.save_total_limit {
            let run_dir = &self.run.run_dir;
            let resumed = self.run.resumed().map(|resumed| resumed.state.step);
            for step in steps::surplus(&steps::published(run_dir), limit, step, resumed) {
                // The run goes on with a step too many.
                match steps::withdraw(run_dir, step) {
                    Ok(()) => tracing::info!("removed step {step}: train.save_total_limit is {limit}"),
                    Err(error) => tracing::warn!("could not remove step {step}: {error}"),
                }
            }
        }
        Ok(())
    }
}
