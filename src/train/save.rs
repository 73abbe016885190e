//! Saves of a run. At the boundary of a step all ranks gather the adapter and copy what they own to host memory; that
//! is all that training waits for. A thread of each rank of the first copy of the base then writes its files
//! (`files`), and rank 0's publishes the step when all ranks have written. Threads call no MPI: ranks tell each other
//! in an exchange at the end of each step whether theirs still work ([`Saver::unfinished`]), and go on together
//! ([`Saver::poll`]). One save is under way at a time. With `train.save_async: false` a save is waited for at once.
//!
//! After each part all ranks agree on its outcome. A save that fails on one rank fails on all, with that rank's error,
//! and earlier steps are untouched. A base that merges have changed (`base`) is written before training goes on.

mod base;
mod files;

use super::{
    Run, Trainer, best::Best, merge::Merger, metrics::METRICS_FILE, output::remedy, signals::SavedStep,
};
use crate::{
    checkpoint::{
        self, CheckpointError, FolderWriter, TrainerState, adapter_store,
        model_files::ModelFiles,
        publish::KnownHashes,
        state::{AdapterState, DataIdentity},
        steps,
    },
    comm::Communicator,
    config::{InitLoraWeights, OnSaveError},
    console::first_of,
    data::schedule::DataCursor,
    error::{Error, Result, broadcast_from_root},
    lora::{Parameter, pissa::Values},
};
use files::{AdapterFiles, Files, Job, Published, Publishing, RootFiles};
use std::{
    fs::File,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

/// Progress of the run after a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Steps made.
    pub step: usize,
    /// The epoch of the last step made.
    pub epoch: usize,
    pub position: DataCursor,
    /// The step is to be evaluated, and a signal came before that was done.
    pub evaluation_due: bool,
}

/// Saves the steps of a run.
pub(super) struct Saver<'a> {
    run: &'a Run,
    world: Rc<dyn Communicator>,
    known: KnownHashes,
    /// Digest of the base, on rank 0.
    base: String,
    /// `model/` of the last step that has one.
    model: Option<PathBuf>,
    /// Merges in the base of the last step.
    merges: u64,
    /// A₀ and B₀ that were taken from the base, on rank 0.
    subtracted: Option<Arc<Values>>,
    /// The last step that was published, by this process or the one before.
    published: Option<usize>,
    under_way: Option<UnderWay>,
    /// The last save, if it has failed and the run went on.
    failed: Option<Error>,
    mark: SavedStep,
}

/// A save that is not published yet.
struct UnderWay {
    step: usize,
    merges: u64,
    best: Option<usize>,
    stage: Stage,
}

/// The work of this rank's thread; `None`: it has none.
enum Stage {
    /// Ranks write their files. On rank 0 with the folder that they are in.
    Write(Option<FolderWriter>, Option<Started<Result<(), CheckpointError>>>),
    /// Rank 0 publishes.
    Publish(Option<Started<Published>>),
}

type Started<T> = Result<Job<T>, CheckpointError>;

fn is_done<T: Send + 'static>(job: Option<&Started<T>>) -> bool {
    job.is_none_or(|job| job.as_ref().map_or(true, Job::is_done))
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

/// The error of a save of `step` for the user. That of a file system says what to do.
fn not_saved(step: usize, error: CheckpointError) -> Error {
    match &error {
        CheckpointError::Io { error: cause, .. } => Error::Failure(format!(
            "step {step} is not saved: {error}; {}; steps before it are untouched",
            remedy(cause.kind())
        )),
        _ => error.into(),
    }
}

/// Checks that `output` is still the folder in which the run began its files: one that was removed is not made anew.
fn still_there(output: &Path) -> Result<(), CheckpointError> {
    match std::fs::metadata(output.join(METRICS_FILE)) {
        Err(error) if !output.join("config.yaml").exists() => {
            Err(CheckpointError::Io { path: output.to_owned(), error })
        }
        _ => Ok(()),
    }
}

impl<'a> Saver<'a> {
    /// `mark`: told of each step that is published.
    pub(super) fn new(
        run: &'a Run,
        world: Rc<dyn Communicator>,
        subtracted: Option<Values>,
        mark: SavedStep,
    ) -> Result<Self> {
        let is_root = world.rank() == 0;
        let resumed = run.resumed();
        let model = resumed.map(|resumed| resumed.path.join(checkpoint::base::FOLDER));
        let base = if is_root { run.base_digest()? } else { String::new() };
        // A step of another run's folder is none of this one's.
        let own = resumed.filter(|resumed| {
            let own = steps::directory(&run.run_dir, resumed.state.step);
            resumed
                .path
                .canonicalize()
                .ok()
                .is_some_and(|path| own.canonicalize().is_ok_and(|own| own == path))
        });
        Ok(Self {
            run,
            known: KnownHashes::default(),
            base,
            model: model.filter(|path| path.is_dir()),
            merges: resumed.map_or(0, |resumed| resumed.state.merges),
            subtracted: subtracted.filter(|_| is_root).map(Arc::new),
            published: own.map(|resumed| resumed.state.step),
            under_way: None,
            failed: None,
            mark,
            world,
        })
    }

    pub(super) fn is_root(&self) -> bool {
        self.world.rank() == 0
    }

    /// True if `step` is published.
    pub(super) fn has(&self, step: usize) -> bool {
        self.published == Some(step)
    }

    /// Begins to save the run as it stands, after the save before is done. With `train.save_async: false` it is done
    /// when this returns. `lines`: the files of metrics, on rank 0. Collective.
    ///
    /// # Errors
    /// The adapter has NaN or infinities, or a save fails and `train.on_save_error` is stop.
    pub(super) fn begin(
        &mut self,
        trainer: &Trainer,
        merger: &Merger,
        best: &Best,
        at: Progress,
        lines: Result<Vec<(PathBuf, File)>, CheckpointError>,
    ) -> Result<()> {
        self.finish()?;
        let world = self.world.clone();
        let (run, rank, merges, step) = (self.run, world.rank(), merger.done(), at.step);
        let whole = trainer.session.adapter.whole()?;
        // All ranks know which base is in the last step, and write a new one together.
        let new_base = (merges != self.merges).then(|| base::merged_files(run, merger.plan()));
        let saved = Saved { at, merges, best, new_base: new_base.as_ref() };
        let opened = match rank {
            0 => check_finite(&whole, step).and_then(|()| {
                let lines = lines?;
                self.open(trainer, saved).map(|writer| Some((writer, lines)))
            }),
            _ => Ok(None),
        };
        let (opened, outcome) = parts(opened);
        if !self.agree(step, outcome)? {
            return Ok(());
        }
        let (mut writer, lines) = opened.unzip();
        let hidden = writer.as_ref().map(|writer| writer.directory().display().to_string());
        let hidden = PathBuf::from(broadcast_from_root(&*world, &hidden.unwrap_or_default())?);
        if let Some(new_base) = &new_base {
            let written = base::write_own_base(run, trainer, merger.plan(), new_base, rank, &hidden);
            if !self.agree_or_remove(step, written, &mut writer)? {
                return Ok(());
            }
            let digest = if rank == 0 { base::digest(run, &hidden).map(Some) } else { Ok(None) };
            let (digest, outcome) = parts(digest);
            if !self.agree_or_remove(step, outcome, &mut writer)? {
                return Ok(());
            }
            self.base = digest.unwrap_or_default();
        }
        let is_first_copy = run.mesh.coordinates(rank).replicate == 0;
        let pieces = is_first_copy
            .then(|| adapter_store::pieces_of(&trainer.session, trainer.model.device(), None))
            .transpose()?;
        let root = lines.map(|lines| {
            let (adapter, state) = (self.adapter_files(saved), self.state(trainer, saved));
            RootFiles { lines, whole, adapter, state }
        });
        let files = Files { hidden, rank, world: run.mesh.world(), pieces, root };
        let mut under_way =
            UnderWay { step, merges, best: best.step().map(|best| best.step), stage: Stage::Publish(None) };
        let folder = files.hidden.clone();
        under_way.stage = if run.mesh.block() > 1 {
            Stage::Write(writer, is_first_copy.then(|| Job::start(&folder, move || files.write())))
        } else {
            // Rank 0 alone writes.
            let publishing = writer.take().map(|writer| self.publishing(writer, &under_way));
            Stage::Publish(publishing.map(|publishing| {
                Job::start(&folder, move || match files.write() {
                    Ok(()) => publishing.publish(),
                    Err(error) => (publishing.known, Err(error)),
                })
            }))
        };
        self.under_way = Some(under_way);
        if run.config.train.save_async { Ok(()) } else { self.finish() }
    }

    /// 1 while this rank's thread works, else 0: for the exchange at the end of a step.
    pub(super) fn unfinished(&self) -> f64 {
        let is_done = self.under_way.as_ref().is_none_or(|under_way| match &under_way.stage {
            Stage::Write(_, job) => is_done(job.as_ref()),
            Stage::Publish(job) => is_done(job.as_ref()),
        });
        f64::from(u8::from(!is_done))
    }

    /// Goes on with the save that is under way, if no rank's thread works any more. Collective: `unfinished` is the
    /// largest of all ranks' [`unfinished`](Self::unfinished).
    ///
    /// # Errors
    /// A save has failed and `train.on_save_error` is stop.
    pub(super) fn poll(&mut self, unfinished: f64) -> Result<()> {
        if unfinished > 0.0 { Ok(()) } else { self.advance() }
    }

    /// Waits until the save that is under way is published, or has failed. Collective.
    ///
    /// # Errors
    /// It has failed and `train.on_save_error` is stop.
    pub(super) fn finish(&mut self) -> Result<()> {
        while self.under_way.is_some() {
            self.advance()?;
        }
        Ok(())
    }

    /// The error of the last save, if that has failed and the run went on.
    ///
    /// # Errors
    /// That one, on the rank that had it.
    pub(super) fn last_is_saved(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Waits for this rank's thread, agrees with the others on the outcome and begins what is next. Collective.
    fn advance(&mut self) -> Result<()> {
        let Some(mut under_way) = self.under_way.take() else { return Ok(()) };
        let step = under_way.step;
        match std::mem::replace(&mut under_way.stage, Stage::Publish(None)) {
            Stage::Write(mut writer, job) => {
                let written = job.map_or(Ok(()), |job| job.and_then(Job::wait));
                if self.agree_or_remove(step, written.map_err(Error::from), &mut writer)? {
                    let publishing = writer.map(|writer| self.publishing(writer, &under_way));
                    under_way.stage = Stage::Publish(publishing.map(|publishing| {
                        let folder = publishing.run_dir.clone();
                        Job::start(&folder, move || publishing.publish())
                    }));
                    self.under_way = Some(under_way);
                }
            }
            Stage::Publish(job) => {
                let outcome = job.map_or(Ok(None), |job| {
                    let (known, published) = job?.wait();
                    self.known = known;
                    published.map(Some)
                });
                let (published, outcome) = parts(outcome);
                if self.agree(step, outcome.map_err(Error::from))? {
                    let model = published.map(|step| step.join(checkpoint::base::FOLDER));
                    self.model = model.filter(|model| model.is_dir()).or(self.model.take());
                    (self.merges, self.published, self.failed) = (under_way.merges, Some(step), None);
                }
            }
        }
        Ok(())
    }

    /// True on all ranks if all could. False where `train.on_save_error` lets the run go on without this save.
    ///
    /// # Errors
    /// The error of the first rank that has one, and [`Error::Elsewhere`] on the others.
    fn agree(&mut self, step: usize, own: Result<()>) -> Result<bool> {
        let goes_on = self.run.config.train.on_save_error == OnSaveError::Continue;
        let is_io = matches!(&own, Err(Error::Checkpoint(CheckpointError::Io { .. })));
        let said = match &own {
            Ok(()) => Vec::new(),
            Err(error) => vec![error.exit_code() as u8, u8::from(is_io && goes_on)],
        };
        let all = self.world.all_gather_host(&said)?;
        let Some(first) = all.iter().position(|said| !said.is_empty()) else { return own.map(|()| true) };
        let error = match own {
            Err(Error::Checkpoint(error)) if first == self.world.rank() => not_saved(step, error),
            Err(error) if first == self.world.rank() => error,
            _ => Error::Elsewhere { code: i32::from(all[first][0]) },
        };
        if all.iter().any(|said| matches!(said[..], [_, 0])) {
            return Err(error);
        }
        if first == self.world.rank() {
            tracing::warn!(
                "{error}; training goes on, and the next save tries again (train.on_save_error: continue)"
            );
        }
        self.failed = Some(error);
        Ok(false)
    }

    /// The same; where not all could, the hidden directory is gone before a rank ends.
    fn agree_or_remove(
        &mut self,
        step: usize,
        own: Result<()>,
        writer: &mut Option<FolderWriter>,
    ) -> Result<bool> {
        let agreed = self.agree(step, own);
        if !matches!(agreed, Ok(true)) {
            *writer = None;
            self.world.barrier()?;
        }
        agreed
    }

    /// The hidden directory of the step, with its base, on rank 0.
    fn open(&self, trainer: &Trainer, saved: Saved) -> Result<FolderWriter> {
        let Saved { at, merges, new_base, .. } = saved;
        let run = self.run;
        still_there(&run.config.train.output_dir)?;
        let mut writer = FolderWriter::of_step(&run.run_dir, at.step)?;
        let state = self.state(trainer, saved);
        adapter_store::open_state(&mut writer, &state.adapter, |_| Ok(()))?;
        if self.saves_base(merges) {
            let files = &run.files;
            match (new_base, &self.model) {
                (Some(new), _) => files.write_around(writer.directory(), new)?,
                (None, Some(model)) if merges > 0 && !model.is_dir() => {
                    let reason = "it is gone, and with it the base that the adapter belongs to".into();
                    return Err(CheckpointError::Format { path: model.clone(), reason }.into());
                }
                (None, model) => files.write(writer.directory(), model.as_deref(), run.source.as_ref())?,
            }
            base::write_note(&writer.directory().join(checkpoint::base::FOLDER), merges > 0)?;
        }
        Ok(writer)
    }

    fn saves_base(&self, merges: u64) -> bool {
        merges > 0 || !self.run.config.lora.save_lora_only
    }

    fn adapter_files(&self, Saved { at, merges, .. }: Saved) -> AdapterFiles {
        let run = self.run;
        let own = || steps::directory(&run.run_dir, at.step).join(checkpoint::base::FOLDER);
        let own = || own().display().to_string();
        let base = match run.config.model.weights_name() {
            // The step is the only place of a merged base, and of a random one.
            _ if merges > 0 => Some(own()),
            None if self.saves_base(merges) => Some(own()),
            other => other,
        };
        let lora = &run.config.lora;
        AdapterFiles {
            sites: run.sites.clone(),
            shapes: run.shapes.clone(),
            base,
            format: lora.lora_export_format,
            dropout: lora.lora_dropout,
            subtracted: self.subtracted.clone(),
        }
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
            evaluation_due: at.evaluation_due,
            adapter: AdapterState {
                pissa: config.lora.init_lora_weights == InitLoraWeights::Pissa,
                ..adapter_store::state_of(&trainer.session, shapes, mesh, &self.base, packed)
            },
            schedule: trainer.schedule,
            data: DataIdentity { rows: dataset.rows(), fingerprint: dataset.fingerprint().to_owned() },
        }
    }

    /// The end of the save `under_way`.
    fn publishing(&mut self, writer: FolderWriter, under_way: &UnderWay) -> Publishing {
        Publishing {
            writer,
            known: std::mem::take(&mut self.known),
            run_dir: self.run.run_dir.clone(),
            step: under_way.step,
            best: under_way.best,
            resumed: self.run.resumed().map(|resumed| resumed.state.step),
            limit: self.run.config.train.save_total_limit,
            mark: self.mark.clone(),
        }
    }
}

/// A value, where there is one, and the outcome without it.
fn parts<T, E>(result: Result<Option<T>, E>) -> (Option<T>, Result<(), E>) {
    match result {
        Ok(value) => (value, Ok(())),
        Err(error) => (None, Err(error)),
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
