//! A whole run: prepare from the configuration, train step by step, save, leave metrics behind.
//!
//! [`Run::prepare`] reads and validates everything. It enters no collective, so that ranks agree to go on before
//! anything is written. [`Run::settle`] finds the step to resume from and locks the output directory. [`Run::execute`]
//! is the loop.

use super::{
    MicroBatch, StopSignals, Trainer,
    best::Best,
    evaluate::Evaluation,
    loss::RowLoss,
    merge::Merger,
    metrics::{Logging, Metrics, StepMetrics, peak_rss_bytes, received_since},
    output::{may_become_folder, run_dir},
    profile::Profile,
    reference::{self, ReferenceAdapter, ReferenceModel},
    resume::{Start, not_occupied},
    save::{Progress, Saver},
    signals::Asked,
    step::{Made, Skipped},
    variants,
};
use crate::{
    checkpoint::{base, output::OutputLock, publish, steps},
    comm::{Reduce, World},
    config::{
        BaseFiles, FieldLocations, InitLoraWeights, Loaded, Override, PackingMethod, ReduceGradients,
        RunConfig,
    },
    console::count,
    data::{
        Dataset, Loader, ROWS_PER_GROUP, StepPlan,
        schedule::{self, BatchSchedule, BatchSplit, DataCursor, StepRows},
    },
    device::Memory,
    error::{Error, Result, agree},
    lora::{self, AdapterPlan, LoraShapes, Site, pissa::Values, targets},
    loss::Rewards,
    mesh::{Mesh, MeshSizes},
    model::{
        ModelSpec,
        base_plan::{BasePlan, Options, all_projections},
        hf_config::HfModel,
        quantized::{Quantization, QuantizationError, StepNoise},
        stored_base,
        transformer::Transformer,
    },
    optim::{Optimizer, Schedule, Settings},
    plan::recompute::Choice,
    session::Session,
    shard::ProcessGroups,
    trace::{self, Category},
    weights::{RandomSource, WeightSource},
};
use std::{
    ops::{ControlFlow, Range},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tch::Device;

/// Steps of an epoch below which a warning asks whether they are meant.
const FEW_STEPS: usize = 10;
/// Steps that the loader prepares ahead.
const LOADER_AHEAD: usize = 4;

/// End of a run that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All steps are made.
    Done,
    /// A signal asked for it: everything is saved, and the same command with `load_checkpoint_path: auto` goes on.
    Stopped,
}

/// The state of a run that is to be saved.
#[derive(Clone, Copy)]
struct Saving<'a> {
    trainer: &'a Trainer,
    merger: &'a Merger,
    best: &'a Best,
}

/// Everything that a run needs, read and validated.
pub struct Run {
    pub(super) config: RunConfig,
    pub(super) places: FieldLocations,
    pub(super) mesh: Mesh,
    pub(super) spec: ModelSpec,
    pub(super) sites: Vec<Site>,
    /// Ranks and scales of the sites: the configuration's, or those of the adapter that the run starts from.
    pub(super) shapes: LoraShapes,
    pub(super) source: Box<dyn WeightSource>,
    pub(super) files: BaseFiles,
    pub(super) dataset: Arc<Dataset>,
    pub(super) loss: RowLoss,
    /// The token that fills packs.
    pub(super) pad_id: i64,
    pub(super) batches: BatchSchedule,
    /// Steps of the whole run, including those before a resume.
    pub(super) total_steps: usize,
    /// `{output_dir}/weights/{run_id}`
    pub(super) run_dir: PathBuf,
    pub(super) start: Start,
    /// The chosen recompute, if the configuration leaves it open and the memory is known.
    pub(super) choice: Option<Choice>,
    pub(super) reference: Option<ReferenceAdapter>,
    /// Held by rank 0 as long as the run lasts.
    pub(super) lock: Option<OutputLock>,
    debug: bool,
}

impl Run {
    /// Reads configuration, model headers and data for one of `world` ranks. Enters no collective and writes
    /// nothing. Warnings go to the log.
    pub fn prepare(path: &Path, overrides: &[Override], world: usize) -> Result<Self> {
        Self::from_config(load(path, overrides)?, world).inspect(warn_of_steps)
    }

    /// As [`Run::prepare`], for a run that starts now: steps in its way are told before minutes go into reading data.
    pub fn prepare_to_train(path: &Path, overrides: &[Override], world: usize) -> Result<Self> {
        let loaded = load(path, overrides)?;
        let train = &loaded.config.train;
        not_occupied(train, &run_dir(train))?;
        Self::from_config(loaded, world).inspect(warn_of_steps)
    }

    pub(super) fn from_config(loaded: Loaded, world: usize) -> Result<Self> {
        let mut config = loaded.config;
        let refused = |field: &str, why: &str| Error::Input(format!("{}: {why}", loaded.places.of(field)));
        let mesh = Mesh::new(world, MeshSizes::from(&config.train.compute))?;
        let files = config.model.files();
        let files = files.map_err(|error| refused(&format!("model.{}", error.key), &error.to_string()))?;
        let hf = HfModel::open(&files.config)?;
        let pad = hf.padding();
        let mut spec = hf.spec;
        let experts = spec.moe().map(|moe| moe.experts);
        if experts.is_none() && mesh.expert() > 1 {
            return Err(refused(
                "train.expert_parallel_size",
                "this model has no experts to divide; leave it at 1",
            ));
        }
        mesh.experts_of(0, experts.unwrap_or_default())?;
        let source: Box<dyn WeightSource> = match &files.weights {
            Some(directory) => Box::new(stored_base::open(directory, &mut spec)?),
            None => Box::new(RandomSource::new(spec.tensors(), spec.initializer_range, config.train.seed)),
        };
        let exclude = config.lora.exclude_modules.as_deref().unwrap_or_default();
        let quantization = Quantization::of_base(&config.lora.quant, exclude, &spec, source.as_ref());
        spec.quantization = quantization.map_err(|error| match error {
            QuantizationError::Excluded(_) => refused("lora.exclude_modules", &error.to_string()),
            QuantizationError::Format { .. } => refused("lora.quant_format", &error.to_string()),
        })?;
        let merges = config.lora.merge_lora_interval > 0 || config.lora.merge_at_end;
        let packed = spec.quantization.as_ref().filter(|_| merges);
        if let Some(reason) = packed.and_then(|packed| packed.unwritable(&spec)) {
            return Err(refused("lora.quant_format", &format!("merged bases are saved: {reason}")));
        }
        let targets = config.lora.lora_target_modules.as_deref();
        let sites = targets::resolve(&all_projections(&spec), targets, hf.family.default_targets)
            .map_err(|error| refused("lora.lora_target_modules", &error.to_string()))?;
        let sites = if config.lora.moe_hybrid_shared_lora {
            if sites.iter().all(|site| site.experts.is_none()) {
                let reason = "no routed expert is adapted, so nothing could be shared";
                return Err(refused("lora.moe_hybrid_shared_lora", reason));
            }
            sites.into_iter().map(Site::hybrid).collect()
        } else {
            sites
        };
        let shapes = lora::shapes_of(&config.lora, &sites)
            .map_err(|error| refused(&format!("lora.{}", error.field), &error.fault))?;
        if let Some((field, why)) =
            variants::refusal(&config.lora, &sites, &shapes, spec.quantization.is_some())
        {
            return Err(refused(field, &why));
        }

        if !loaded.places.is_given("data.sample_packing_sequence_len") {
            let longest = hf.max_positions.unwrap_or(usize::MAX);
            let data = &mut config.data;
            data.sample_packing_sequence_len = data.sample_packing_sequence_len.min(longest);
        }
        let train = &config.train;
        let loss = RowLoss::new(train, &loaded.places)?;
        if let Some((field, why)) = reference::refusal(&config.lora).filter(|_| loss.reads_reference()) {
            return Err(refused(field, why));
        }
        let (vocabulary, data) = (spec.vocab_size, &config.data);
        let dataset =
            Dataset::open_for(data, Some(&files.tokenizer), vocabulary, pad, train.seed, loss.needs());
        let dataset = dataset.map_err(|error| error.placed(data, &loaded.places))?;
        let factors = [train.micro_batch_size, train.gradient_accumulation_steps, mesh.data_parallel()];
        let default_batch = || factors.into_iter().try_fold(1, usize::checked_mul);
        let global_batch = train.global_batch_size.or_else(default_batch).ok_or_else(|| {
            refused("train.micro_batch_size", "a step would have more rows than can be counted")
        })?;
        let batches = BatchSchedule {
            rows: dataset.rows(),
            global_batch,
            drop_last: config.data.dataloader_drop_last,
            epochs: train.num_train_epochs,
        };
        let in_epochs = batches.steps_from(DataCursor::default());
        let total_steps = train.max_steps.unwrap_or(in_epochs);
        // max_steps wins over the epochs: the data repeats as long as steps are left.
        let batches = match train.max_steps {
            Some(_) => BatchSchedule { epochs: usize::MAX, ..batches },
            None => batches,
        };
        let run_dir = run_dir(train);
        Ok(Self {
            config,
            places: loaded.places,
            mesh,
            spec,
            sites,
            shapes,
            source,
            files,
            dataset: Arc::new(dataset),
            loss,
            pad_id: pad,
            batches,
            total_steps,
            run_dir,
            start: Start::Fresh,
            choice: None,
            reference: None,
            lock: None,
            debug: false,
        })
    }

    /// Checks the output of every layer in every step (`--debug`).
    pub fn set_debug(&mut self, debug: bool) {
        self.debug = debug;
    }

    /// Mesh, data, steps and trainable parameters in one line, for the log.
    pub fn summary(&self) -> String {
        let counts = targets::parameters_by_name(&self.sites, &self.shapes);
        let total: usize = counts.values().sum();
        let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let begins = match self.resumed() {
            None => "from the start".to_owned(),
            Some(resumed) if resumed.state.step >= self.total_steps => {
                format!("{} is at or behind the last: nothing is left to train", resumed.path.display())
            }
            Some(resumed) => format!("on from {}", resumed.path.display()),
        };
        let train = &self.config.train;
        let kept = train.save_total_limit.map_or_else(String::new, |limit| {
            format!("; the newest {} stay (train.save_total_limit)", count(limit, "save"))
        });
        format!(
            "{} (replicate {} × shard {}, experts over {}); {}, {} of {}, {begins}{kept}; {total} trainable \
             parameters: {}",
            count(self.mesh.world(), "rank"),
            self.mesh.replicate(),
            self.mesh.shard(),
            self.mesh.expert(),
            count(self.batches.rows, "row"),
            count(self.total_steps, "step"),
            count(self.batches.global_batch, "row"),
            counts.join(", ")
        )
    }

    pub(super) fn options(&self) -> Options {
        let RunConfig { model, train, lora, .. } = &self.config;
        let options = Options::new(&train.compute, &self.spec, model.merge_qkv && !lora.unfuse_for_lora);
        // A step of one micro-batch accumulates nothing, so no full gradient is kept.
        let reduce = if self.micro_batches() == 1 { ReduceGradients::MicroBatch } else { options.reduce };
        let checkpointing = self.choice.map_or(options.checkpointing, |choice| choice.recompute);
        Options { checkpointing, reduce, debug: self.debug, ..options }
    }

    /// Micro-batches of a whole step.
    pub(super) fn micro_batches(&self) -> usize {
        split(&self.mesh, self.config.train.micro_batch_size).micro_batches(self.batches.global_batch)
    }

    /// The base and the adapter without their tensors, as rank 0 has them; other ranks have as many experts.
    pub(super) fn plans(&self) -> Result<(BasePlan, AdapterPlan)> {
        let options = self.options();
        let base = BasePlan::new(&self.spec, &options, &self.mesh, 0)?;
        let adapter = base.adapter(&self.sites, &self.shapes, &options, &self.mesh);
        Ok((base, adapter))
    }

    /// Builds this rank's part of the model and trains it to the end, or until `stop` is asked for on any rank.
    pub fn execute(mut self, world: &World, stop: &StopSignals) -> Result<Ended> {
        let (groups, watcher) = (ProcessGroups::new(world, self.mesh), world.watcher());
        watcher.set_timeout(Duration::from_secs(self.config.train.comm_timeout_s as u64));
        watcher.set_output(&self.config.train.output_dir);
        let (device, rank) = (world.device(), world.rank());
        let (mut trainer, mut reference, first) = self.build(world, groups)?;
        let train = &self.config.train;

        // Nothing is written or removed before every rank is ready to train.
        trainer.world.barrier()?;
        stop.begin();
        let mut metrics = if rank == 0 { self.begin_output()? } else { Metrics::silent() };
        let mut saver = Saver::new(&self, trainer.world.clone(), first, stop.saved())?;
        let mut merger = Merger::new(&self);
        let mut best = Best::new(&self, rank);
        let traces = train.output_dir.join("trace").join(&train.run_id);
        let mut profile = Profile::new(train.profile_steps, &traces, &trainer)?;
        let loader = Loader::start(self.dataset.clone(), self.step_plans(rank), LOADER_AHEAD)?;
        let clock = trainer.model.clock.clone();
        let mut skipped = Skipped::new(self.resumed().is_some());
        // The state of the last step boundary.
        let mut at = self.beginning();
        if self.evaluates_first() {
            let Some(evaluation) =
                self.evaluate_trained(&mut trainer, reference.as_mut(), Some(stop), at.step)?
            else {
                return self.stopped(&mut metrics, saver, at, None);
            };
            if at.step == 0 {
                metrics.before_first_step(&evaluation)?;
            } else {
                metrics.evaluated(&evaluation)?;
                if best.weigh(at.step, &evaluation) && saver.has(at.step) && rank == 0 {
                    steps::set_best(&self.run_dir, Some(at.step))?;
                }
            }
        }
        at.evaluation_due = false;
        let mut steps = loader.zip(self.step_rows());
        clock.take();
        let mut begin = Instant::now();
        // A run that has stopped early has no step left.
        while !best.is_over() {
            profile.before_step();
            let tracing_step = trace::span(Category::Step, "step");
            let waiting = (clock.phase("data"), watcher.slow("data"));
            let Some((rows, step_rows)) = steps.next() else { break };
            let rows = rows?;
            let received = world.ledger().totals();
            let keys = self.token_keys(&rows, step_rows.rows.clone(), rank);
            let micro_batches = rows.micro_batches.iter().zip(keys);
            drop(waiting);
            let batches = micro_batches.map(|(own, keys)| {
                let log_probs =
                    |model: &mut ReferenceModel| model.log_probs(&mut trainer.model, own, self.pad_id);
                let reference = reference.as_mut().map(log_probs).transpose()?;
                self.loss.micro_batch(own, self.pad_id, keys, reference.as_ref(), device.tensors())
            });
            let batches = batches.collect::<Result<Vec<MicroBatch>>>()?;
            watcher.step(rows.step + 1);
            stop.at(rows.step + 1);
            let (everyone, grace) = (trainer.world.clone(), train.stop_grace_s as f64);
            let drops = |Made { left, seconds }: Made| {
                let (asked, seconds) = stop.agreed(&*everyone, seconds)?;
                let drops = asked.drops(left, seconds, grace);
                Ok(if drops { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            };
            let ControlFlow::Continue(report) = trainer.step_unless(&batches, rows.step, drops)? else {
                drop(tracing_step);
                profile.after_step(rows.step + 1, true)?;
                let _saving = watcher.slow("save");
                let saving = Saving { trainer: &trainer, merger: &merger, best: &best };
                return self.stopped(&mut metrics, saver, at, Some(saving));
            };
            let used = device.memory()?.map(Memory::used);
            let mut agreed =
                [peak_rss_bytes() as f64, stop.passed(), used.unwrap_or_default() as f64, saver.unfinished()];
            trainer.world.all_reduce_host(&mut agreed, Reduce::Max)?;
            let (peak, mut stopping) = (agreed[0] as u64, Asked::from(agreed[1]) != Asked::No);
            saver.poll(agreed[3])?;
            let (done, last) = (rows.step + 1, rows.step + 1 == self.total_steps);
            at = Progress {
                step: done,
                epoch: rows.epoch,
                position: step_rows.next,
                evaluation_due: self.evaluates_after(done, step_rows.ends_epoch(), last),
            };
            // A signal from here on is answered by the next step; during an evaluation, by this one.
            stop.at(if at.evaluation_due { done } else { (done + 1).min(self.total_steps) });
            drop(tracing_step.with("step", done));
            let mut row = StepMetrics {
                step: done,
                epoch: rows.epoch,
                report: &report,
                seconds: begin.elapsed().as_secs_f64(),
                phases: clock.take(),
                peak_rss_bytes: peak,
                device_memory_bytes: used.map(|_| agreed[2] as u64),
                received: received_since(&received, world.ledger()),
                evaluation: None,
            };
            if let Err(why) = skipped.count(&report, train.max_skipped_steps, last) {
                metrics.step(&row)?;
                metrics.sync()?;
                saver.finish()?;
                // Every rank has the same report; one says so.
                return Err(if rank == 0 { Error::Failure(why) } else { Error::Elsewhere { code: 1 } });
            }
            let mut merge = |trainer: &mut Trainer, ends: bool| {
                if !merger.is_due(done, ends) || !skipped.learned() {
                    return Ok(false);
                }
                let _merging = (trace::span(Category::Phase, "merge"), watcher.slow("merge"));
                merger.merge(trainer, done).map(|()| true)
            };
            let merged = merge(&mut trainer, last)?;
            let mut is_best = false;
            // A step that a merge may follow, if its evaluation ends the run, is saved after that alone.
            let finishes = train.early_stopping_patience.is_some() && self.config.lora.merge_at_end;
            if at.evaluation_due && (!stopping || finishes) {
                let may_stop = (!finishes).then_some(stop);
                let evaluated = self.evaluate_trained(&mut trainer, reference.as_mut(), may_stop, done)?;
                stop.at((done + 1).min(self.total_steps));
                stopping |= evaluated.is_none();
                at.evaluation_due = evaluated.is_none();
                is_best =
                    evaluated.is_some_and(|evaluation| skipped.learned() && best.weigh(done, &evaluation));
                row.evaluation = evaluated;
            }
            metrics.step(&row)?;
            let ends = last || best.is_over();
            if ends && !merged {
                // Early stopping makes this step the last.
                merge(&mut trainer, ends)?;
            }
            profile.after_step(done, ends || stopping)?;
            // As that of a save, the time of a merge or an evaluation belongs to no step.
            clock.take();
            begin = Instant::now();
            let every = |n: usize, count: usize| n > 0 && count.is_multiple_of(n);
            let ends_epoch = step_rows.ends_epoch() && every(train.save_epochs, step_rows.epoch + 1);
            let due = every(train.save_steps, done) || ends_epoch || ends || is_best;
            if (due && skipped.learned()) || stopping {
                let _saving = (trace::span(Category::Phase, "save"), watcher.slow("save"));
                saver.begin(&trainer, &merger, &best, at, metrics.lines())?;
                // A resumed process gathers everything anew. So does this one, and both report the same bytes.
                trainer.model.forget_gathered()?;
                trainer.session.adapter.regions_mut().refresh()?;
                reference.as_mut().map_or(Ok(()), ReferenceModel::forget_gathered)?;
                // The time of a save belongs to no step.
                clock.take();
                begin = Instant::now();
            }
            if stopping && (!ends || at.evaluation_due) {
                let _saving = watcher.slow("save");
                return self.stopped(&mut metrics, saver, at, None);
            }
        }
        let _ending = watcher.slow("end");
        saver.finish()?;
        let finished = metrics.finish();
        saver.last_is_saved()?;
        finished?;
        if rank == 0 {
            if best.is_over() {
                tracing::info!("stopped early: {}", best.ending());
            }
            tracing::info!("{}", self.farewell(&best));
        }
        Ok(Ended::Done)
    }

    /// This rank's part of the model with the session to train, the reference of the loss, and what PiSSA took from the
    /// base. Collective.
    fn build(
        &mut self,
        world: &World,
        groups: ProcessGroups,
    ) -> Result<(Trainer, Option<ReferenceModel>, Option<Values>)> {
        let (lora, train) = (&self.config.lora, &self.config.train);
        let device = world.device();
        if let Some(reason) =
            self.spec.quantization.as_ref().and_then(|_| Quantization::refusal(device.tensors()))
        {
            return Err(Error::Input(format!("{}: {reason}", self.places.of("lora.enable_qlora"))));
        }
        let noise = lora.noise.alpha().filter(|_| self.spec.quantization.is_some());
        let noise = noise.map(|alpha| StepNoise { seed: train.seed, step: 0, alpha: alpha as f32 });
        if noise.is_some() && device.tensors() != Device::Cpu {
            let reason = "quantisation noise is added on CPUs alone; give --device cpu, or leave it out";
            return Err(Error::Input(format!("{}: {reason}", self.places.of("lora.enable_aqn"))));
        }
        let mut model = Transformer::new(self.spec.clone(), self.options(), &groups)?;
        model.load(self.source.as_ref())?;
        groups.open(self.spec.moe().is_some())?;
        tracing::info!("rank {} read {} bytes of the base", world.rank(), self.source.bytes_read());
        let mut adapter = model.new_adapter(&self.sites, self.shapes.clone());
        adapter.set_dropout(lora.lora_dropout, train.seed);
        let first = match &self.start {
            _ if lora.init_lora_weights == InitLoraWeights::Default => None,
            Start::Resumed(resumed) => {
                Some(agree(&*groups.world, self.singular_vectors_of_step(&resumed.path))?)
            }
            Start::Fresh | Start::Adapter(_) => Some(self.singular_vectors(&*groups.world)?),
        };
        if let Some(first) = &first {
            self.subtract(&mut model, first)?;
        }
        let mut optimizer = Optimizer::new(&Settings::from(train), adapter.pieces());
        // Values are dropped once they are in place: they are as large as the adapter and its moments.
        match &mut self.start {
            Start::Fresh => match &first {
                Some(first) => adapter.set(|parameter, range| first[&parameter.name][range].to_vec())?,
                None => {
                    adapter.init(train.seed, lora.lora_b_init_std)?;
                    if self.shapes.use_dora() {
                        let norms = model.row_norms(&mut adapter)?;
                        adapter
                            .set_some(|parameter, range| Some(norms.get(&parameter.name)?[range].to_vec()))?;
                    }
                }
            },
            Start::Adapter(values) => {
                let values = std::mem::take(values);
                adapter.set(|parameter, range| values[&parameter.name][range].to_vec())?;
            }
            Start::Resumed(resumed) => resumed.restore(&mut adapter, &mut optimizer)?,
        }
        let schedule = Schedule::of_run(&self.config, self.total_steps);
        let name = train.run_id.clone();
        let session = Session { name, adapter, optimizer, max_grad_norm: train.max_grad_norm };
        let reference = ReferenceModel::new(self, &model, &session.adapter)?;
        Ok((Trainer { model, session, schedule, world: groups.world, noise }, reference, first))
    }

    /// The state at which the run begins.
    fn beginning(&self) -> Progress {
        let ((step, position), resumed) = (self.standing(), self.resumed());
        let epoch = resumed.map_or(0, |resumed| resumed.state.epoch);
        let evaluation_due = resumed.is_some_and(|resumed| resumed.state.evaluation_due);
        Progress { step, epoch, position, evaluation_due }
    }

    /// True if an evaluation comes before the first step of this process: `train.eval_on_start`, or one that a signal
    /// has put off.
    fn evaluates_first(&self) -> bool {
        let due = match self.resumed() {
            Some(resumed) => resumed.state.evaluation_due,
            None => self.config.train.eval_on_start,
        };
        due && self.dataset.validation_rows() > 0
    }

    /// Ends the run after a signal, with the state `at` of a step boundary published: what is under way, or if
    /// `unsaved`, a save of its own. Collective.
    fn stopped(
        &self,
        metrics: &mut Metrics,
        mut saver: Saver,
        at: Progress,
        unsaved: Option<Saving>,
    ) -> Result<Ended> {
        saver.finish()?;
        let dropped = unsaved.is_some();
        if let Some(Saving { trainer, merger, best }) = unsaved.filter(|_| at.step > 0 && !saver.has(at.step))
        {
            saver.begin(trainer, merger, best, at, metrics.lines())?;
            saver.finish()?;
        }
        saver.last_is_saved()?;
        if saver.is_root() {
            metrics.end_progress();
            let (Progress { step, evaluation_due, .. }, of) = (at, self.total_steps);
            let rest = match (dropped, evaluation_due) {
                (true, _) => format!("; step {} was dropped (train.stop_grace_s)", step + 1),
                (_, true) => "; its evaluation was put off".to_owned(),
                _ => String::new(),
            };
            let saved = match step {
                0 => "nothing is saved; the same command starts anew",
                _ => "it is saved; --train.load_checkpoint_path auto continues",
            };
            tracing::warn!("stopped after step {step} of {of}, as a signal asked for{rest}: {saved}");
        }
        Ok(Ended::Stopped)
    }

    /// An evaluation of what is trained, after `step` or before the first (0); `None`: `stop` was asked for.
    /// Collective.
    fn evaluate_trained(
        &self,
        trainer: &mut Trainer,
        reference: Option<&mut ReferenceModel>,
        stop: Option<&StopSignals>,
        step: usize,
    ) -> Result<Option<Evaluation>> {
        let _evaluating = trace::span(Category::Phase, "evaluate");
        let Trainer { model, session, world, .. } = trainer;
        let evaluated = self.evaluate(model, &mut [&mut session.adapter], &**world, stop, reference)?;
        if let Some(evaluation) = evaluated.filter(|_| world.rank() == 0) {
            let Evaluation { loss, tokens, rewards, seconds } = evaluation;
            let counted = |noun| count(tokens as usize, noun);
            let told = match rewards {
                None => {
                    let perplexity = evaluation.perplexity();
                    format!("eval_perplexity {perplexity:.3} over {}", counted("token"))
                }
                Some(Rewards { pairs, accuracy, .. }) => {
                    format!("{:.0} % of {} in the right order", 100.0 * accuracy / pairs, counted("pair"))
                }
            };
            tracing::info!("step {step}: eval_loss {loss:.4}, {told}, {seconds:.1} s");
        }
        Ok(evaluated)
    }

    /// The place of the adapter, that of the best one, and the command to try it.
    fn farewell(&self, best: &Best) -> String {
        let (run, step) = (self.run_dir.display(), steps::published(&self.run_dir).last().copied());
        let adapter = step.map_or_else(|| run.to_string(), |step| format!("{run}/step_{step}"));
        let has_base = Path::new(&adapter).join(base::FOLDER).is_dir();
        if self.config.model.model_path.is_none() && !has_base {
            return format!(
                "done: the adapter is {adapter}; its base has random weights, which are not saved"
            );
        }
        let best = best.told().map_or_else(String::new, |best| format!("; {run}/best is {best}"));
        format!(
            "done: the adapter is {adapter}{best}; try: xorl-dist generate --adapter {run} --chat 'Hello'"
        )
    }

    /// Begins the files of output_dir on rank 0, and removes the steps that the user wants overwritten.
    fn begin_output(&self) -> Result<Metrics> {
        let resumed = self.resumed().map(|resumed| resumed.state.step);
        if self.config.train.overwrite {
            steps::withdraw_later(&self.run_dir, resumed)?;
        }
        publish::recover(&self.run_dir)?;
        let best = self.resumed().and_then(|resumed| resumed.state.evaluations.as_ref()?.best);
        steps::set_best(&self.run_dir, best.map(|best| best.step))?;
        let output = &self.config.train.output_dir;
        std::fs::write(output.join("config.yaml"), self.config.to_yaml())
            .map_err(|error| Error::Failure(format!("{}: {error}", output.display())))?;
        Metrics::open(output, self.total_steps, resumed, &Logging::from(&self.config.train))
    }

    /// The rows of every step that is left.
    fn step_rows(&self) -> impl Iterator<Item = StepRows> + Send + use<> {
        let (done, position) = self.standing();
        self.batches.step_rows(position).take(self.total_steps.saturating_sub(done))
    }

    /// Rows of this rank, step by step.
    fn step_plans(&self, rank: usize) -> impl Iterator<Item = StepPlan> + Send + use<> {
        let (mesh, micro) = (self.mesh, self.config.train.micro_batch_size);
        let (done, _) = self.standing();
        (done..).zip(self.step_rows()).map(move |(step, StepRows { epoch, rows, .. })| StepPlan {
            step,
            epoch,
            micro_batches: deal(&mesh, rank, rows, micro),
        })
    }
}

/// Rows of `rank` of a step's `rows`, by micro-batch of at most `micro`. Ranks that share a sequence have the same
/// rows.
pub(super) fn deal(mesh: &Mesh, rank: usize, rows: Range<usize>, micro: usize) -> Vec<Vec<usize>> {
    schedule::deal(rows, mesh.data_rank(rank), split(mesh, micro))
}

/// Division of a step's rows over the ranks of `mesh` and micro-batches of at most `micro` rows.
fn split(mesh: &Mesh, micro: usize) -> BatchSplit {
    BatchSplit {
        data_parallel_size: mesh.data_parallel(),
        micro_batch_size: micro,
        rows_per_group: ROWS_PER_GROUP,
    }
}

/// Refuses data that make no step.
pub(super) fn makes_steps(batches: &BatchSchedule, places: &FieldLocations) -> Result<()> {
    if batches.steps_per_epoch() > 0 {
        return Ok(());
    }
    let place = places.of("data");
    if batches.rows == 0 {
        return Err(Error::Input(format!(
            "{place}: no row is left to train on: raise weight or max_samples of a data set, or lower data.val_set_size"
        )));
    }
    let (rows, batch) = (count(batches.rows, "row"), count(batches.global_batch, "row"));
    Err(Error::Input(format!(
        "{place}: {rows} make no step of {batch}; set train.global_batch_size to at most {}, or \
         data.dataloader_drop_last: false",
        batches.rows
    )))
}

/// The configuration of a run whose output directory can be made. Its warnings go to the log.
fn load(path: &Path, overrides: &[Override]) -> Result<Loaded> {
    let loaded = crate::config::load_with_paths(path, overrides)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    may_become_folder(&loaded.config.train.output_dir, &loaded.places.of("train.output_dir").to_string())?;
    Ok(loaded)
}

/// Warns of an epoch of very few steps, and of a warm-up as long as the run.
fn warn_of_steps(Run { config, batches, total_steps, .. }: &Run) {
    let (train, data, total_steps) = (&config.train, &config.data, *total_steps);
    let of_epoch = batches.steps_per_epoch();
    if (1..FEW_STEPS).contains(&of_epoch) {
        let shorter = match data.sample_packing_method {
            _ if batches.rows == 1 => String::new(),
            PackingMethod::None => String::new(),
            _ => format!("data.sample_packing_sequence_len ({}) or ", data.sample_packing_sequence_len),
        };
        tracing::warn!(
            "an epoch is {} only ({}, {} a step): lower {shorter}train.global_batch_size, or train longer",
            count(of_epoch, "step"),
            count(batches.rows, "row"),
            count(batches.global_batch, "row")
        );
    }
    if let Some(limit) = train.max_steps {
        let in_epochs = of_epoch.saturating_mul(train.num_train_epochs);
        if limit > in_epochs {
            tracing::info!(
                "train.max_steps {limit} is more than the {} of train.num_train_epochs {}: the data repeats",
                count(in_epochs, "step"),
                train.num_train_epochs
            );
        }
    }
    if train.lr_warmup_steps.is_some_and(|warmup| warmup >= total_steps) {
        tracing::warn!(
            "train.lr_warmup_steps is all of the {}: train.lr is hardly reached",
            count(total_steps, "step")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8 ranks = 2 replicas × 2 shards × 2 ranks a sequence.
    #[test]
    fn ranks_of_a_sequence_compute_the_same_rows() {
        let sizes = MeshSizes { replicate: 2, shard: 2, sequence: 2, expert: 1 };
        let mesh = Mesh::new(8, sizes).unwrap();
        let of = |rank| deal(&mesh, rank, 10..20, 2);
        let expected = [
            vec![vec![10, 11], vec![12]],
            vec![vec![13, 14], vec![15]],
            vec![vec![16, 17], vec![]],
            vec![vec![18, 19], vec![]],
        ];
        for rank in 0..8 {
            assert_eq!(of(rank), expected[rank / 2], "rank {rank}");
        }
    }
}
