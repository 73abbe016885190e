//! A whole run: prepare from the configuration, train step by step, save, leave metrics behind.
//!
//! [`Run::prepare`] reads and validates everything and enters no collective, so that all ranks can agree on whether
//! to go on before anything is written; [`Run::execute`] is the loop.

use super::{
    Trainer,
    metrics::{Metrics, StepMetrics, peak_rss_bytes, received_since},
};
use crate::{
    checkpoint::{self, AdapterConfig, LogicalAdapter, StepWriter},
    cli::DeviceChoice,
    comm::{Reduce, World},
    config::{CheckpointingMethod, Override, RunConfig},
    data::{
        Dataset, Loader, Row, StepPlan,
        deal::{self, Position, Stride, Walk},
    },
    dtype::DType,
    error::{Error, Result},
    lora::{Site, targets},
    mesh::{Mesh, MeshSizes},
    model::{
        ModelSpec,
        hf_config::HfModel,
        source::{RandomSource, SafetensorsSource, WeightSource, validate},
        transformer::{Batch, LoraShape, Options, Transformer, all_projections},
    },
    optim::{Optimizer, Schedule, Settings},
};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};
use tch::Device;

/// Bytes of the embedding or the head that are whole at a time when `vocab_chunk_rows` is null.
const VOCAB_CHUNK_BYTES: usize = 512 << 20;
/// Steps that the loader prepares ahead.
const LOADER_AHEAD: usize = 4;

/// Everything that a run needs, read and validated.
pub struct Run {
    config: RunConfig,
    mesh: Mesh,
    spec: ModelSpec,
    sites: Vec<Site>,
    source: Box<dyn WeightSource>,
    dataset: Arc<Dataset>,
    total_steps: usize,
    walk: Walk,
    /// `{output_dir}/weights/{run_id}`
    run_dir: PathBuf,
    /// A and B to start from, by logical parameter name, from `lora.adapter_path`.
    start: Option<HashMap<String, Vec<f32>>>,
}

impl Run {
    /// Reads configuration, model headers and data for one of `world` ranks. Enters no collective and writes
    /// nothing. Warnings go to the log.
    pub fn prepare(path: &Path, overrides: &[Override], device: DeviceChoice, world: usize) -> Result<Self> {
        let loaded = crate::config::load(path, overrides)?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        let config = loaded.config;
        let refuse =
            |field: &str, why: &str| Err(Error::Input(format!("{}: {why}", loaded.places.of(field))));
        if config.train.load_checkpoint_path.is_some() {
            return refuse("train.load_checkpoint_path", "resuming is not built yet; use null");
        }
        if config.train.save_total_limit.is_some() {
            return refuse("train.save_total_limit", "pruning steps is not built yet; use null");
        }
        if config.train.overwrite {
            return refuse(
                "train.overwrite",
                "replacing an earlier run is not built yet; give another train.run_id",
            );
        }
        if !config.lora.save_lora_only {
            return refuse("lora.save_lora_only", "saving the base is not built yet; use true");
        }
        if device == DeviceChoice::Cuda {
            return Err(Error::Input("--device cuda: training on GPUs is not built yet; use cpu".into()));
        }
        let mesh = Mesh::new(world, MeshSizes::from(&config.train))?;
        let model_dir = config.model.model_path.clone();
        let config_path = config.model.config_path.clone().or(model_dir.clone()).unwrap_or_default();
        let hf = HfModel::open(&config_path)?;
        let spec = hf.spec;
        let source: Box<dyn WeightSource> = match &model_dir {
            Some(directory) => Box::new(SafetensorsSource::open(directory)?),
            None => Box::new(RandomSource::new(spec.tensors(), spec.initializer_range, config.train.seed)),
        };
        validate(source.as_ref(), &spec.tensors())?;
        let targets = config.lora.lora_target_modules.as_deref();
        let sites = targets::resolve(&all_projections(&spec), targets, hf.family.default_targets)?;

        let tokenizer = config.model.tokenizer_path.clone().unwrap_or(config_path);
        let pad = hf.pad_token_id.or(hf.eos_token_ids.first().copied()).unwrap_or(0);
        let dataset = Dataset::open(&config.data, Some(&tokenizer), spec.vocab_size, pad, config.train.seed)?;
        let train = &config.train;
        let default_batch = train.micro_batch_size * train.gradient_accumulation_steps * mesh.data_parallel();
        let global_batch = train.global_batch_size.unwrap_or(default_batch);
        let walk = Walk {
            rows: dataset.rows(),
            global_batch,
            drop_last: config.data.dataloader_drop_last,
            epochs: train.num_train_epochs,
        };
        let total = walk.steps_from(Position::default());
        let total_steps = train.max_steps.map_or(total, |limit| limit.min(total));
        if total_steps == 0 {
            let rows = walk.rows;
            return refuse("data", &format!("{rows} rows make no step of {global_batch} rows"));
        }
        let run_dir = train.output_dir.join("weights").join(&train.run_id);
        if !checkpoint::steps::published(&run_dir).is_empty() {
            return Err(checkpoint::CheckpointError::Occupied { path: run_dir }.into());
        }
        let dataset = Arc::new(dataset);
        let mut run =
            Self { config, mesh, spec, sites, source, dataset, total_steps, walk, run_dir, start: None };
        if let Some(path) = run.config.lora.adapter_path.clone() {
            // Whatever is wrong with an adapter that the user named is the user's to mend.
            run.start = Some(run.starting_adapter(&path).map_err(|error| Error::Input(error.to_string()))?);
        }
        Ok(run)
    }

    /// What a lone reader of the log wants to know before the first step.
    pub fn summary(&self) -> String {
        let counts = targets::parameters_by_name(&self.sites, self.config.lora.lora_rank);
        let total: usize = counts.values().sum();
        let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        format!(
            "{} ranks (replicate {} × shard {}); {} rows, {} steps of {} rows; {total} trainable parameters: {}",
            self.mesh.world(),
            self.mesh.replicate(),
            self.mesh.shard(),
            self.walk.rows,
            self.total_steps,
            self.walk.global_batch,
            counts.join(", ")
        )
    }

    fn options(&self) -> Options {
        let train = &self.config.train;
        let compute = if train.enable_mixed_precision { DType::Bf16 } else { DType::F32 };
        let row_bytes = self.spec.hidden_size * compute.size();
        Options {
            compute,
            merge: self.config.model.merge_qkv && !self.config.lora.unfuse_for_lora,
            slots: if train.reshard_after_forward { train.ring_slots } else { self.spec.num_layers },
            vocab_chunk_rows: train.vocab_chunk_rows.unwrap_or(VOCAB_CHUNK_BYTES / row_bytes).max(1),
            loss_chunk_tokens: train.loss_chunk_tokens,
            recompute: train.enable_gradient_checkpointing
                && train.gradient_checkpointing_method == CheckpointingMethod::RecomputeFullLayer,
            reduce: train.reduce_gradients,
        }
    }

    /// A and B of the adapter at `path`, by logical parameter name.
    fn starting_adapter(&self, path: &Path) -> Result<HashMap<String, Vec<f32>>> {
        let theirs = checkpoint::peft::read_config(path)?;
        let lora = &self.config.lora;
        if (theirs.r, theirs.lora_alpha) != (lora.lora_rank, lora.lora_alpha) {
            return Err(Error::Input(format!(
                "lora.adapter_path: {} has rank {} and alpha {}, the run {} and {}",
                path.display(),
                theirs.r,
                theirs.lora_alpha,
                lora.lora_rank,
                lora.lora_alpha
            )));
        }
        Ok(checkpoint::peft::read_values(path, &self.sites, lora.lora_rank)?)
    }

    /// Builds this rank's part of the model and trains it to the end.
    pub fn execute(self, world: &World) -> Result<()> {
        let at = self.mesh.coordinates(world.rank());
        let everyone = world.group("world", 0);
        let shard = world.group("shard", at.replicate);
        let replicate = world.group(
            "replicate",
            self.mesh.shard_group(world.rank()).iter().position(|&r| r == world.rank()).unwrap_or(0),
        );
        let (lora, train) = (&self.config.lora, &self.config.train);
        let shape = LoraShape { rank: lora.lora_rank, alpha: lora.lora_alpha };
        let device = Device::Cpu;
        let mut model = Transformer::new(
            self.spec.clone(),
            &self.sites,
            shape,
            self.options(),
            &shard,
            &replicate,
            device,
        );
        model.load(self.source.as_ref())?;
        tracing::info!("rank {} read {} bytes of the base", world.rank(), self.source.bytes_read());
        match &self.start {
            None => model.init_adapter(train.seed, lora.lora_b_init_std)?,
            Some(start) => model.set_adapter(|parameter, range| start[&parameter.name][range].to_vec())?,
        }
        let optimizer = Optimizer::new(Settings::new(train.optimizer, train.weight_decay), &model.adapter);
        let schedule = Schedule::new(train, self.total_steps);
        let mut trainer =
            Trainer { model, optimizer, schedule, max_grad_norm: train.max_grad_norm, world: everyone };

        let rank = world.rank();
        let mut metrics = if rank == 0 { self.begin_output()? } else { Metrics::silent() };
        let loader = Loader::start(self.dataset.clone(), self.plan(rank), LOADER_AHEAD)?;
        let per_epoch = self.walk.steps_per_epoch();
        for rows in loader {
            let rows = rows?;
            let (begin, received) = (Instant::now(), world.ledger().totals());
            let batches: Vec<Batch> = rows.micro_batches.iter().map(|rows| batch(rows, device)).collect();
            let report = trainer.step(&batches, rows.step)?;
            let mut peak = [peak_rss_bytes() as f64];
            trainer.world.all_reduce_host(&mut peak, Reduce::Max)?;
            metrics.step(&StepMetrics {
                step: rows.step + 1,
                epoch: rows.epoch,
                report: &report,
                seconds: begin.elapsed().as_secs_f64(),
                peak_rss_bytes: peak[0] as u64,
                received: received_since(&received, world.ledger()),
            })?;
            let done = rows.step + 1;
            let every = |n: usize, count: usize| n > 0 && count.is_multiple_of(n);
            let ends_epoch = done.is_multiple_of(per_epoch) && every(train.save_epochs, done / per_epoch);
            if every(train.save_steps, done) || ends_epoch || done == self.total_steps {
                self.save(&trainer, done, rank)?;
            }
        }
        metrics.finish()
    }

    /// Rank 0 begins the files of output_dir.
    fn begin_output(&self) -> Result<Metrics> {
        let output = &self.config.train.output_dir;
        std::fs::create_dir_all(output)
            .and_then(|()| std::fs::write(output.join("config.yaml"), self.config.to_yaml()))
            .map_err(|error| Error::Failure(format!("{}: {error}", output.display())))?;
        Metrics::open(output, self.total_steps)
    }

    /// Which rows this rank computes, step by step.
    fn plan(&self, rank: usize) -> impl Iterator<Item = StepPlan> + Send + use<> {
        let (ranks, micro) = (self.mesh.data_parallel(), self.config.train.micro_batch_size);
        let strides = self.walk.strides(Position::default()).take(self.total_steps).enumerate();
        strides.map(move |(step, Stride { epoch, rows, .. })| {
            let micro_batches = deal::deal(rows, rank, ranks, micro);
            StepPlan { step, epoch, micro_batches }
        })
    }

    /// Publishes the adapter after `step` steps. Collective; rank 0 writes.
    fn save(&self, trainer: &Trainer, step: usize, rank: usize) -> Result<()> {
        let rank_of = self.config.lora.lora_rank;
        let mut adapters: Vec<_> = self.sites.iter().map(|site| LogicalAdapter::of(site, rank_of)).collect();
        let whole = trainer.model.whole_adapter()?;
        if rank == 0 {
            let mut whole: HashMap<String, Vec<f32>> =
                whole.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
            for (site, adapter) in self.sites.iter().zip(&mut adapters) {
                let mut take =
                    |factor| whole.remove(&format!("{}.{factor}", site.path())).unwrap_or_default();
                (adapter.a, adapter.b) = (take("lora_A"), take("lora_B"));
            }
            let mut target_modules: Vec<String> = adapters
                .iter()
                .flat_map(|adapter| adapter.leaves.iter().map(|(leaf, _)| leaf.clone()))
                .collect();
            target_modules.sort();
            target_modules.dedup();
            let lora = &self.config.lora;
            let config = AdapterConfig {
                r: lora.lora_rank,
                lora_alpha: lora.lora_alpha,
                target_modules,
                base_model_name_or_path: self
                    .config
                    .model
                    .model_path
                    .as_ref()
                    .map(|path| path.display().to_string()),
            };
            let writer = StepWriter::begin(&self.run_dir, step)?;
            checkpoint::peft::write(writer.directory(), &config, &adapters)?;
            let published = writer.publish(&mut Default::default())?;
            tracing::info!("saved {}", published.display());
        }
        // Nobody runs ahead of a save that may fail.
        Ok(trainer.world.barrier()?)
    }
}

/// A micro-batch of rows, flat.
fn batch(rows: &[Row], device: Device) -> Batch {
    let ids: Vec<i64> = rows.iter().flat_map(|row| row.input_ids.iter().copied()).collect();
    let labels: Vec<i64> = rows.iter().flat_map(|row| row.labels.iter().copied()).collect();
    let lengths: Vec<usize> = rows.iter().flat_map(|row| row.document_lengths.iter().copied()).collect();
    Batch::new(&ids, &labels, &lengths, device)
}
