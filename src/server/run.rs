//! A server, whole: read the model, build each rank's part of it, run the engine.

use super::{
    engine::{self, AdapterDefaults, EngineHandle, EngineOptions},
    store::Base,
};
use crate::{
    comm::World,
    error::{Error, Result},
    lora::targets,
    mesh::{Mesh, MeshSizes},
    model::{
        ModelSpec,
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        stored_base,
        transformer::Transformer,
    },
    shard::ProcessGroups,
    weights::{self, SafetensorsSource, WeightSource},
};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// Settings from which a server starts its engine.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerPlan {
    /// HF model directory.
    pub model_path: PathBuf,
    /// Folder of everything that the server leaves behind.
    pub output_dir: PathBuf,
    pub mesh: MeshSizes,
    pub options: Options,
    /// Targets of an adapter that is created without; `None`: the default of the model's family.
    pub targets: Option<Vec<String>>,
    /// Scale by alpha / √rank.
    pub use_rslora: bool,
    /// Experts share one factor.
    pub hybrid: bool,
    /// Standard deviation of the initial B.
    pub b_init_std: f64,
    /// Largest rank of an adapter; `None`: what memory holds.
    pub max_rank: Option<usize>,
    /// Rank of an adapter that is created without.
    pub rank: usize,
    /// Bytes of a rank's memory for adapters; `None`: what the base and a pass leave.
    pub adapter_memory: Option<u64>,
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
}

/// A server whose model is read and validated.
pub struct Server {
    plan: ServerPlan,
    spec: ModelSpec,
    source: SafetensorsSource,
    mesh: Mesh,
    engine: EngineOptions,
}

impl Server {
    /// Reads everything but the weights, for one of `world` ranks. Enters no collective and writes nothing.
    pub fn prepare(plan: ServerPlan, world: usize) -> Result<Self> {
        let mesh = Mesh::new(world, plan.mesh)?;
        let hf = HfModel::open(&plan.model_path)?;
        let mut spec = hf.spec;
        let experts = spec.moe().map(|moe| moe.experts);
        if experts.is_none() && mesh.expert() > 1 {
            let why = "expert_parallel_size: this model has no experts to divide; leave it at 1";
            return Err(Error::Input(why.into()));
        }
        mesh.experts_of(0, experts.unwrap_or_default())?;
        let source = stored_base::open(&plan.model_path, &mut spec)?;
        let of_family = || hf.family.default_targets.iter().map(|name| name.to_string()).collect();
        let targets = plan.targets.clone().unwrap_or_else(of_family);
        targets::resolve(&all_projections(&spec), Some(&targets), &[])
            .map_err(|error| Error::Input(format!("lora_target_modules: {error}")))?;
        let ServerPlan { use_rslora, hybrid, b_init_std, max_rank, rank, .. } = plan;
        let engine = EngineOptions {
            defaults: AdapterDefaults { targets, use_rslora, hybrid, b_init_std, max_rank, rank },
            base: Base { name: plan.model_path.display().to_string(), digest: weights::digest(&source)? },
            max_tokens_per_pass: plan.max_tokens_per_pass,
            max_waiting: plan.max_waiting,
            gather: plan.gather,
            output_dir: plan.output_dir.clone(),
            adapter_memory: plan.adapter_memory,
            storage_limit: plan.storage_limit,
        };
        Ok(Self { plan, spec, source, mesh, engine })
    }

    /// Builds this rank's part of the model and serves until `front`, which runs on a thread of rank 0, returns. Gives
    /// what it returned, on rank 0.
    pub fn execute<T: Send + 'static>(
        self,
        world: &World,
        front: impl FnOnce(Arc<EngineHandle>) -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let Self { plan, spec, source, mesh, engine } = self;
        let (groups, watcher) = (ProcessGroups::new(world, mesh), world.watcher());
        watcher.set_timeout(plan.comm_timeout);
        watcher.set_output(&plan.output_dir);
        let has_experts = spec.moe().is_some();
        let mut model = Transformer::new(spec, plan.options, &groups)?;
        model.load(&source as &dyn WeightSource)?;
        groups.open(has_experts)?;
        groups.world.barrier()?;
        engine::serve(world, groups, model, engine, front)
    }
}
