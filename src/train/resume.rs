//! Start of a run: from a fresh adapter, from one that the user named, or from a step of an earlier run.
//!
//! Rank 0 finds and verifies the step; then every rank reads its own pieces. Nothing is written before all of it is
//! done: an error here ends all ranks with exit code 2 and changes no file.

use super::{
    Run,
    output::{not_taken, take_output},
    run::makes_steps,
};
use crate::{
    checkpoint::{
        CheckpointError, TrainerState, adapter_store, base,
        output::OutputLock,
        peft::AdapterFolder,
        pieces::{Pieces, read_pieces},
        publish::verify,
        reshard::Cut,
        state::TrainedBase,
        steps,
    },
    comm::Communicator,
    config::{InitLoraWeights, LoadCheckpoint, TrainArgs},
    data::schedule::DataCursor,
    error::{Error, Result, agree, broadcast_from_root},
    lora::{Adapter, LoraShape, LoraShapes},
    model::stored_base,
    optim::{Number, Optimizer, Schedule, Settings},
    shard::FlatRegion,
};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

/// The values that the adapter and the optimizer start from.
pub(super) enum Start {
    /// Values drawn from the seed.
    Fresh,
    /// A and B by logical parameter name, from `lora.adapter_path`, with a fresh optimizer.
    Adapter(HashMap<String, Vec<f32>>),
    Resumed(Box<Resumed>),
}

/// A step of an earlier run, as this rank needs it.
pub(super) struct Resumed {
    /// The step directory.
    pub path: PathBuf,
    pub state: TrainerState,
    /// This rank's pieces, until they are restored.
    pub pieces: Pieces,
}

impl Resumed {
    /// Moves the pieces into this rank's masters and the optimizer's state.
    ///
    /// # Errors
    /// A piece that was not read (a bug).
    pub fn restore(&mut self, adapter: &mut Adapter, optimizer: &mut Optimizer) -> Result<()> {
        let pieces = std::mem::take(&mut self.pieces);
        Ok(adapter_store::restore(&self.state.adapter, pieces, adapter, optimizer)?)
    }
}

impl Run {
    /// The step that the run resumes from, if any.
    pub(super) fn resumed(&self) -> Option<&Resumed> {
        match &self.start {
            Start::Resumed(resumed) => Some(resumed),
            Start::Fresh | Start::Adapter(_) => None,
        }
    }

    /// Finds and reads the start of the run, and locks the output directory. Collective.
    ///
    /// # Errors
    /// The error of the first rank that has one, and [`Error::Elsewhere`] on the others. Only the lock was written.
    pub fn settle(&mut self, world: &dyn Communicator) -> Result<()> {
        let found = if world.rank() == 0 { self.look() } else { Ok(None) };
        let found = agree(world, found)?.map(|path| path.display().to_string());
        let found = broadcast_from_root(world, &found.unwrap_or_default())?;
        let read = match found.as_str() {
            "" => self.start_afresh(),
            path => self.read_step(Path::new(path), world.rank()),
        };
        agree(world, read)?;
        if self.resumed().is_some() {
            self.same_plan_on_all_ranks(world)?;
        }
        let (held, output) = (self.lock.take(), self.config.train.output_dir.clone());
        self.lock = take_output(&output, &self.places.of("train.output_dir").to_string(), held, world)?;
        Ok(())
    }

    /// Decides on the step to resume from, and verifies it. On rank 0.
    fn look(&mut self) -> Result<Option<PathBuf>> {
        let output = &self.config.train.output_dir;
        if output.is_dir() {
            let place = self.places.of("train.output_dir").to_string();
            self.lock = Some(OutputLock::take(output).map_err(|error| not_taken(&place, &error))?);
        }
        self.find()
    }

    /// Says what the run would do with steps that exist, without touching them.
    ///
    /// # Errors
    /// The step that was named is not whole.
    pub fn foresee(&self) -> Result<()> {
        match self.find() {
            Ok(None) => {}
            Ok(Some(step)) => tracing::info!("the run would go on from {}", step.display()),
            Err(Error::Checkpoint(error @ CheckpointError::Occupied { .. })) => {
                tracing::warn!("the run would be refused: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The step to resume from, verified.
    fn find(&self) -> Result<Option<PathBuf>> {
        let train = &self.config.train;
        match &train.load_checkpoint_path {
            None => not_occupied(train, &self.run_dir).map(|()| None),
            Some(LoadCheckpoint::Auto) => {
                let (found, skipped) = steps::newest_whole(&self.run_dir);
                let mut skipped = skipped.into_iter().peekable();
                if found.is_none() {
                    // Steps whose files may come back are not replaced unasked.
                    if let Some(newest) = skipped.next_if(|_| !train.overwrite) {
                        let (path, newest) = (self.run_dir.clone(), Box::new(newest));
                        return Err(CheckpointError::NoneWhole { path, newest }.into());
                    }
                    tracing::info!("{} has no whole step: starting afresh", self.run_dir.display());
                }
                skipped.for_each(|error| tracing::warn!("skipped: {error}"));
                Ok(found)
            }
            Some(LoadCheckpoint::Path(path)) => {
                let hint = "name another step, or auto for the newest whole one";
                verify(path).map_err(|error| {
                    Error::Input(format!("{}: {error}; {hint}", self.places.of("train.load_checkpoint_path")))
                })?;
                Ok(Some(path.clone()))
            }
        }
    }

    /// Starts from the adapter that the user named, if there is one.
    ///
    /// # Errors
    /// The data make no step, or the adapter does not fit.
    pub fn start_afresh(&mut self) -> Result<()> {
        makes_steps(&self.batches, &self.places)?;
        if let Some(path) = self.config.lora.adapter_path.clone() {
            // The user named the adapter, so all faults of it are user errors.
            let place = self.places.of("lora.adapter_path");
            let values = self.starting_adapter(&path);
            let values = values.map_err(|error| Error::Input(format!("{place}: {error}")))?;
            self.take_reference(&path, Some(&values))?;
            self.start = Start::Adapter(values);
        }
        Ok(())
    }

    /// A and B of the adapter at `path`, by logical parameter name. The run takes over its ranks and scales of sites.
    fn starting_adapter(&mut self, path: &Path) -> Result<HashMap<String, Vec<f32>>> {
        let path = &steps::adapter_at(path).map_err(Error::Input)?;
        let folder = AdapterFolder::open(path)?;
        if let Some(trained) = TrainedBase::of(path)?.filter(|trained| trained.merges > 0)
            && !trained.is(self.source.as_ref())?
        {
            let path = path.display();
            return Err(Error::Input(format!(
                "{path} was trained on a base that merges have changed: give {path}/{} as model.model_path",
                base::FOLDER
            )));
        }
        if let Some(difference) = different(folder.config().shape(), self.shapes.common) {
            return Err(Error::Input(format!("{} {difference}", path.display())));
        }
        let shapes = folder.shapes(&self.sites)?;
        if let Some(difference) = self.other_shape(&shapes) {
            return Err(Error::Input(format!("{} {difference}", path.display())));
        }
        self.shapes = shapes;
        Ok(folder.values(&self.sites, &self.shapes)?)
    }

    /// Reads the parts of the step at `path` that this rank needs, and takes its progress over.
    fn read_step(&mut self, path: &Path, rank: usize) -> Result<()> {
        let state = TrainerState::read(path)?;
        let unfit = |reason| CheckpointError::Unfit { path: path.to_owned(), reason };
        self.same_beginning(&state).map_err(unfit)?;
        self.same_course(&state).map_err(unfit)?;
        self.shapes = state.adapter.lora.clone();
        let regions: Vec<FlatRegion> = self.plans()?.1.flat().cloned().collect();
        let own = Cut { regions: &regions, shards: self.mesh.block() };
        let names = Settings::from(&self.config.train).rule().state_names();
        let pieces = read_pieces(path, &state.adapter, own, rank % self.mesh.block(), names)?;
        if let Some(adapter) = self.config.lora.adapter_path.clone() {
            let place = self.places.of("lora.adapter_path");
            let taken = self.take_reference(&adapter, None);
            taken.map_err(|error| Error::Input(format!("{place}: {error}")))?;
        }
        if state.reference.as_ref() != self.reference.as_ref().map(|adapter| &adapter.digest) {
            let reason =
                "its loss compares with another reference; give the lora.adapter_path that it began with";
            return Err(unfit(reason.into()).into());
        }
        if state.merges > 0 {
            self.source = Box::new(stored_base::open(&path.join(base::FOLDER), &mut self.spec)?);
        }
        if rank == 0 && self.base_digest()? != state.adapter.base {
            let reason = "the base is another one than it was trained on, or packed in another format";
            return Err(unfit(reason.into()).into());
        }

        if !self.places.is_given("train.run_id") {
            self.config.train.run_id.clone_from(&state.run_id);
            self.run_dir = self.config.train.output_dir.join("weights").join(&state.run_id);
        }
        let later = steps::published(&self.run_dir).into_iter().filter(|&step| step > state.step);
        if rank == 0 && !self.config.train.overwrite {
            // A damaged step counts as absent. It is replaced when the run reaches it.
            let whole = |&step: &usize| verify(&steps::directory(&self.run_dir, step)).is_ok();
            if let Some(step) = later.rev().find(whole) {
                let (path, later) = (self.run_dir.clone(), format!("step_{step}"));
                return Err(CheckpointError::Later { path, later }.into());
            }
        }
        self.go_on_from(&state, rank);
        self.start = Start::Resumed(Box::new(Resumed { path: path.to_owned(), state, pieces }));
        Ok(())
    }

    /// Checks that seed, rank and scale are those of the step. Shapes are compared where they are read.
    ///
    /// # Errors
    /// The first difference.
    fn same_beginning(&self, state: &TrainerState) -> Result<(), String> {
        if let Some(difference) = different(state.adapter.lora.common, self.shapes.common) {
            return Err(format!("it {difference}"));
        }
        if let Some(difference) = self.other_shape(&state.adapter.lora) {
            return Err(format!("it {difference}"));
        }
        let starts = [state.adapter.pissa, self.config.lora.init_lora_weights == InitLoraWeights::Pissa]
            .map(|is_pissa| if is_pissa { "pissa" } else { "default" });
        if starts[0] != starts[1] {
            return Err(format!("its lora.init_lora_weights is {}, the run's {}", starts[0], starts[1]));
        }
        if state.seed != self.config.train.seed {
            return Err(format!("its train.seed is {}, the run's {}", state.seed, self.config.train.seed));
        }
        Ok(())
    }

    /// The first site whose shape in `stored` is not that of the run's patterns, in words; `None` where the run has
    /// none and takes the stored ones over.
    fn other_shape(&self, stored: &LoraShapes) -> Option<String> {
        let lora = &self.config.lora;
        if lora.rank_pattern.is_empty() && lora.alpha_pattern.is_empty() {
            return None;
        }
        let (site, own) = self
            .sites
            .iter()
            .map(|site| (site, self.shapes.of(site)))
            .find(|(site, own)| stored.of(site) != *own)?;
        let path = site.path();
        Some(format!("has {} on {path}, lora.rank_pattern and alpha_pattern {own}", stored.of(site)))
    }

    /// Checks that optimizer and data are those that the step's state tensors and position belong to.
    ///
    /// # Errors
    /// The first difference.
    fn same_course(&self, state: &TrainerState) -> Result<(), String> {
        let train = &self.config.train;
        if state.adapter.optimizer.kind != train.optimizer {
            let name = |kind| serde_json::json!(kind).as_str().unwrap_or_default().to_owned();
            let (theirs, ours) = (name(state.adapter.optimizer.kind), name(train.optimizer));
            return Err(format!("its train.optimizer is {theirs}, the run's {ours}"));
        }
        if let Some((number, before)) = self.changed_numbers(state).find(|n| n.0.shapes_state) {
            return Err(format!("its train.{} is {before:?}, the run's {:?}", number.field, number.value));
        }
        if state.data.fingerprint != self.dataset.fingerprint() {
            return Err(format!(
                "its data are others ({} rows then, {} now), so its place in them means nothing; to train its \
                 adapter on other data, give it as lora.adapter_path",
                state.data.rows,
                self.dataset.rows()
            ));
        }
        Ok(())
    }

    /// The optimizer's numbers that differ from those of the step, and the step's. A step that does not know a number
    /// has the run's.
    fn changed_numbers(&self, state: &TrainerState) -> impl Iterator<Item = (Number, f64)> {
        let numbers = Settings::from(&self.config.train).numbers().into_iter();
        let before = |number: &Number| state.adapter.optimizer.numbers.get(number.field).copied();
        let paired = numbers.filter_map(move |number| Some((number, before(&number)?)));
        paired.filter(|(number, before)| number.value != *before)
    }

    /// Takes over the global batch unless another one was given, and counts the steps that are left.
    fn go_on_from(&mut self, state: &TrainerState, rank: usize) {
        let train = &mut self.config.train;
        match train.global_batch_size {
            None => {
                train.global_batch_size = Some(state.global_batch_size);
                self.batches.global_batch = state.global_batch_size;
            }
            Some(given) if given != state.global_batch_size && rank == 0 => {
                let before = state.global_batch_size;
                tracing::warn!("train.global_batch_size: {given} rows a step from here on, {before} before");
            }
            Some(_) => {}
        }
        for (number, before) in self.changed_numbers(state).filter(|_| rank == 0) {
            let (field, shown) = (number.field, |value| number.shown(value));
            tracing::warn!("train.{field}: {} from here on, {} before", shown(number.value), shown(before));
        }
        let (now, before) = (self.config.lora.lora_dropout, state.lora_dropout);
        if now != before && rank == 0 {
            tracing::warn!("lora.lora_dropout: {now:?} from here on, {before:?} before");
        }
        let total = state.step.saturating_add(self.batches.steps_from(state.position));
        self.total_steps = self.config.train.max_steps.map_or(total, |limit| limit.min(total));
        let schedule = Schedule::of_run(&self.config, self.total_steps);
        if let Some(step) =
            schedule.parts_from(&state.schedule, state.step..self.total_steps).filter(|_| rank == 0)
        {
            tracing::warn!(
                "the learning rate follows this configuration from here on: {:.3e} in step {}, {:.3e} by the schedule \
                 before (warm-up of {} steps, {} before; decay until step {}, {} before)",
                schedule.rate(step),
                step + 1,
                state.schedule.rate(step),
                schedule.warmup_steps,
                state.schedule.warmup_steps,
                schedule.decay_steps,
                state.schedule.decay_steps,
            );
        }
    }

    /// Steps made before the run's first one, and the place in the data at which it begins.
    pub(super) fn standing(&self) -> (usize, DataCursor) {
        self.resumed()
            .map_or((0, DataCursor::default()), |resumed| (resumed.state.step, resumed.state.position))
    }
}

/// Refuses steps in `run_dir` of which the configuration says neither to go on from them nor to remove them.
pub(super) fn not_occupied(train: &TrainArgs, run_dir: &Path) -> Result<()> {
    let is_decided = train.overwrite || train.load_checkpoint_path.is_some();
    if is_decided || steps::published(run_dir).is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Occupied { path: run_dir.to_owned() }.into())
}

/// The difference of a stored adapter's rank and scale from the run's, to stand behind the adapter's name.
fn different(stored: LoraShape, run: LoraShape) -> Option<String> {
    let said = |LoraShape { rank, alpha, use_rslora, use_dora }: LoraShape| {
        [
            ("lora_rank", rank.to_string()),
            ("lora_alpha", format!("{alpha:?}")),
            ("use_rslora", use_rslora.to_string()),
            ("use_dora", use_dora.to_string()),
        ]
    };
    let pairs = said(stored).into_iter().zip(said(run)).filter(|(stored, run)| stored != run);
    let differences: Vec<_> =
        pairs.map(|((name, stored), (_, run))| format!("{name} {stored}, the run {run}")).collect();
    (!differences.is_empty()).then(|| format!("has {}", differences.join("; ")))
}
