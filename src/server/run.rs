//! A server, whole: read the model, build each rank's part of it, run the engine.

use super::{
    engine::{self, AdapterDefaults, EngineHandle, EngineOptions},
    store::Base,
};
use crate::{
    comm::World,
    config::{BaseFiles, CheckpointingMethod, ComputeArgs, ModelArgs, QuantArgs},
    data::Tokenizer,
    error::{Error, Result},
    infer::stops::SharedDecode,
    lora::targets,
    mesh::{Mesh, MeshError, MeshSizes},
    model::{
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        quantized::{self, Quantization, QuantizationError},
        stored_base,
        transformer::Transformer,
    },
    optim::Settings,
    shard::ProcessGroups,
    weights::{RandomSource, WeightSource},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tch::Device;

/// Settings from which a server starts its engine.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerPlan {
    pub model: ModelArgs,
    /// Key of the base's weights where they are random.
    pub seed: u64,
    /// Folder of everything that the server leaves behind.
    pub output_dir: PathBuf,
    /// The mesh, precision and memory.
    pub compute: ComputeArgs,
    /// One GEMM for q, k, v and one for gate, up.
    pub merge: bool,
    /// Storage of the base.
    pub quant: QuantArgs,
    /// Linear layers that are not quantised.
    pub exclude: Vec<String>,
    /// Targets of an adapter that is created without; `None`: the default of the model's family.
    pub targets: Option<Vec<String>>,
    /// Experts share one factor.
    pub hybrid: bool,
    /// Standard deviation of the initial B.
    pub b_init_std: f64,
    /// Largest rank of an adapter; `None`: what memory holds.
    pub max_rank: Option<usize>,
    /// Rank of an adapter that is created without.
    pub rank: usize,
    /// The optimizer of every adapter; its weight decay, betas and ε are those of an update.
    pub optimizer: Settings,
    /// Bytes of a rank's memory for adapters; `None`: what the base and a pass leave.
    pub adapter_memory: Option<u64>,
    /// Bytes of a rank's memory for keys and values; `None`: a share of what the base and a pass leave.
    pub sampling_memory: Option<u64>,
    /// A row of a step that samples is the same to the bit beside any others; `None`: on CPUs.
    pub deterministic_sampling: Option<bool>,
    /// Bytes that `output_dir` may have after a save; `None`: any.
    pub storage_limit: Option<u64>,
    /// Tokens of a rank and micro-batch, at most; no datum may be longer.
    pub max_tokens_per_pass: usize,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Time for which an idle engine that gets a pass waits for those of other adapters.
    pub gather: Duration,
    /// Time for which a rank may be silent, or keep others waiting in a collective.
    pub comm_timeout: Duration,
    /// Checks the output of every layer: see [`Options::debug`].
    pub debug: bool,
}

/// A server whose model is read and validated.
pub struct Server {
    plan: ServerPlan,
    files: BaseFiles,
    model: HfModel,
    source: Box<dyn WeightSource>,
    mesh: Mesh,
    engine: EngineOptions,
}

impl Server {
    /// Reads everything but the weights, for one of `world` ranks. Enters no collective and writes nothing.
    pub fn prepare(plan: ServerPlan, world: usize) -> Result<Self> {
        // In server.yaml the fields of the mesh stand at the top.
        let of_server = |error: MeshError| Error::Input(error.to_string().replace("train.", ""));
        let mesh = Mesh::new(world, MeshSizes::from(&plan.compute)).map_err(of_server)?;
        let files = plan.model.files();
        let files = files.map_err(|error| Error::Input(format!("{}: {error}", error.key)))?;
        let mut model = HfModel::open(&files.config)?;
        let experts = model.spec.moe().map(|moe| moe.experts);
        if experts.is_none() && mesh.expert() > 1 {
            let why = "expert_parallel_size: this model has no experts to divide; leave it at 1";
            return Err(Error::Input(why.into()));
        }
        mesh.experts_of(0, experts.unwrap_or_default()).map_err(of_server)?;
        let spec = &mut model.spec;
        let source: Box<dyn WeightSource> = match &files.weights {
            Some(directory) => Box::new(stored_base::open(directory, spec)?),
            None => Box::new(RandomSource::new(spec.tensors(), spec.initializer_range, plan.seed)),
        };
        let quantization = Quantization::of_base(&plan.quant, &plan.exclude, spec, source.as_ref());
        spec.quantization = quantization.map_err(|error| match error {
            QuantizationError::Excluded(_) => Error::Input(format!("qlora_exclude_modules: {error}")),
            QuantizationError::Format { .. } => Error::Input(format!("quant_format: {error}")),
        })?;
        let digest = quantized::digest(source.as_ref(), spec.quantization.as_ref())?;
        let quantization = spec.quantization.clone();
        let of_family = || model.family.default_targets.iter().map(|name| name.to_string()).collect();
        let targets = plan.targets.clone().unwrap_or_else(of_family);
        targets::resolve(&all_projections(&model.spec), Some(&targets), &[])
            .map_err(|error| Error::Input(format!("lora_target_modules: {error}")))?;
        let ServerPlan { hybrid, b_init_std, max_rank, rank, optimizer, .. } = plan;
        // Clients of both wires are told rank and alpha alone, and scale by their ratio.
        let use_rslora = false;
        let name = plan.model.name();
        let engine = EngineOptions {
            defaults: AdapterDefaults { targets, use_rslora, hybrid, b_init_std, max_rank, rank, optimizer },
            base: Base { name, digest, quantization, files: files.clone(), seed: plan.seed },
            max_tokens_per_pass: plan.max_tokens_per_pass,
            max_waiting: plan.max_waiting,
            gather: plan.gather,
            output_dir: plan.output_dir.clone(),
            adapter_memory: plan.adapter_memory,
            sampling_memory: plan.sampling_memory,
            max_positions: model.max_positions,
            storage_limit: plan.storage_limit,
            fits_recompute: plan.compute.checkpointing() == CheckpointingMethod::Auto,
        };
        Ok(Self { plan, files, model, source, mesh, engine })
    }

    /// The base as its configuration describes it.
    pub fn model(&self) -> &HfModel {
        &self.model
    }

    /// [`quantized::digest`] of the base.
    pub fn digest(&self) -> &str {
        &self.engine.base.digest
    }

    /// Builds this rank's part of the model and serves until `front`, which runs on a thread of rank 0, returns. Gives
    /// what it returned, on rank 0.
    pub fn execute<T: Send + 'static>(
        self,
        world: &World,
        front: impl FnOnce(Arc<EngineHandle>) -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let Self { plan, files, model: HfModel { spec, .. }, source, mesh, engine } = self;
        let (groups, watcher) = (ProcessGroups::new(world, mesh), world.watcher());
        watcher.set_timeout(plan.comm_timeout);
        watcher.set_output(&plan.output_dir);
        let has_experts = spec.moe().is_some();
        let device = groups.device.tensors();
        if let Some(reason) = spec.quantization.as_ref().and_then(|_| Quantization::refusal(device)) {
            return Err(Error::Input(format!("enable_qlora: {reason}")));
        }
        let is_host = device == Device::Cpu;
        if plan.deterministic_sampling == Some(true) && !is_host {
            let why =
                "deterministic_sampling: GPUs have no kernels for it; leave it out, or compute on the CPU";
            return Err(Error::Input(why.into()));
        }
        let options = Options {
            debug: plan.debug,
            deterministic_sampling: plan.deterministic_sampling.unwrap_or(is_host),
            ..Options::new(&plan.compute, &spec, plan.merge)
        };
        let mut model = Transformer::new(spec, options, &groups)?;
        model.load(source.as_ref())?;
        groups.open(has_experts)?;
        let decode = if world.rank() == 0 { decode(&files.tokenizer) } else { None };
        groups.world.barrier()?;
        engine::serve(world, groups, model, engine, decode, front)
    }
}

/// The text of tokens by the tokenizer in `folder`, if there is one.
fn decode(folder: &Path) -> Option<SharedDecode> {
    match Tokenizer::load(folder) {
        Ok(tokenizer) => Some(Arc::new(tokenizer)),
        Err(error) => {
            tracing::warn!("{error}; requests to sample cannot name stop texts");
            None
        }
    }
}
