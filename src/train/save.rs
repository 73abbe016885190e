//! Publishing of a step, collectively. Rank 0 opens it and writes the adapter, every rank of the first copy writes its
//! pieces, rank 0 publishes and prunes. After each part all ranks agree to go on: a save that fails on one rank ends
//! all with that rank's error, and earlier steps are untouched.

use super::{Run, Trainer};
use crate::{
    checkpoint::{
        self, CheckpointError, FolderWriter, TrainerState, adapter_store,
        base::BaseFiles,
        pieces::write_pieces,
        publish::{KnownHashes, publish_together, withdraw},
        state::DataIdentity,
        steps,
    },
    console::first_of,
    data::schedule::DataCursor,
    error::{Error, Result, agree},
    lora::Parameter,
    weights,
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
        let (run, rank) = (self.run, self.rank);
        let opened = match rank {
            0 => check_finite(&whole, at.step).and_then(|()| self.begin(trainer, whole, at)).map(Some),
            _ => Ok(None),
        };
        publish_together(
            world,
            |own| agree(world, own),
            opened,
            |hidden| write_own_pieces(run, trainer, rank, hidden),
            |writer| self.publish(writer, at.step),
        )?;
        Ok(())
    }

    /// Rank 0's files of the step, still hidden.
    fn begin(
        &self,
        trainer: &Trainer,
        whole: Vec<(Parameter, Vec<f32>)>,
        at: Progress,
    ) -> Result<FolderWriter> {
        let run = self.run;
        let mut writer = FolderWriter::of_step(&run.run_dir, at.step)?;
        let state = self.state(trainer, at);
        adapter_store::open_state(&mut writer, &state.adapter, |folder| state.write(folder))?;

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
        let base = base.map(|path| path.display().to_string());
        let format = run.config.lora.lora_export_format;
        adapter_store::write_adapter(writer.directory(), whole, &run.sites, &run.shapes, base, format)?;
        Ok(writer)
    }

    fn state(&self, trainer: &Trainer, at: Progress) -> TrainerState {
        let Run { config, mesh, dataset, batches, shapes, .. } = self.run;
        let train = &config.train;
        TrainerState {
            format: TrainerState::FORMAT,
            run_id: train.run_id.clone(),
            step: at.step,
            total_steps: self.run.total_steps,
            epoch: at.epoch,
            position: at.position,
            global_batch_size: batches.global_batch,
            seed: train.seed,
            adapter: adapter_store::state_of(&trainer.session, train.optimizer, shapes, mesh, &self.base),
            schedule: trainer.schedule,
            data: DataIdentity { rows: dataset.rows(), fingerprint: dataset.fingerprint().to_owned() },
        }
    }

    /// Makes the step visible and removes older ones. On rank 0.
    fn publish(&mut self, writer: FolderWriter, step: usize) -> Result<()> {
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
                match withdraw(&steps::directory(run_dir, step)) {
                    Ok(()) => tracing::info!("removed step {step}: train.save_total_limit is {limit}"),
                    Err(error) => tracing::warn!("could not remove step {step}: {error}"),
                }
            }
        }
        Ok(())
    }
}

/// Writes the pieces of a rank of the first copy into the hidden directory of the step.
fn write_own_pieces(run: &Run, trainer: &Trainer, rank: usize, hidden: &Path) -> Result<()> {
    if run.mesh.coordinates(rank).replicate > 0 {
        return Ok(());
    }
    let pieces = adapter_store::pieces_of(&trainer.session, trainer.model.device(), None)?;
    Ok(write_pieces(hidden, rank, run.mesh.world(), &pieces)?)
}
