//! The base and the adapters of a rank, and how it carries out commands.

mod held;
mod sampling;

pub use held::{Held, Trained};

use super::{
    AdapterDefaults, EngineOptions,
    command::{Command, EngineError, Rows},
    loss,
    residence::Need,
};
use crate::{
    Error, Result,
    checkpoint::state::Accumulated,
    dtype::DType,
    infer::cache::KvCache,
    lora::{Adapter, AdapterPlan, LoraShape, Site, TargetError, targets},
    loss::{BySegment, NamedLoss, TokenLoss},
    model::{
        base_plan::all_projections,
        recompute::Recompute,
        transformer::{Batch, Transformer},
    },
    ops::cpu::values,
    optim::Settings,
    plan::AdapterMemory,
    server::{
        merged,
        request::{AdapterSpec, Contents, Load, ModelId, OptimStep, Refusal, Reply, Save, StepReply},
        store::{self, Base},
    },
    session::Update,
    shard::ProcessGroups,
    train::metrics::peak_rss_bytes,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, ops::Range, path::PathBuf, rc::Rc};
use tch::{Device, Tensor};

/// Module of a layer's attention.
const ATTENTION: &str = ".self_attn";
/// The largest rank whose bytes are counted one by one; those of larger ones by multiples.
const MOST_RANK: usize = 1 << 20;
/// The name of a gradient norm that overflows although every element is finite.
const NORM: &str = "grad_norm";

/// The part that one rank has of everything.
pub struct Models {
    model: Transformer,
    groups: ProcessGroups,
    defaults: AdapterDefaults,
    base: Base,
    output_dir: PathBuf,
    adapters: BTreeMap<ModelId, Held>,
    cache: KvCache,
}

/// The reply to a client, or the refusal that every rank has. Ranks that can no longer talk to each other have failed.
fn refused<T>(outcome: Result<T>) -> Result<Result<T, Refusal>> {
    match outcome {
        Err(error @ (Error::Comm(_) | Error::Shard(_))) => Err(error),
        outcome => Ok(outcome.map_err(|error| store::refusal(&error))),
    }
}

/// The part of a rank in a micro-batch.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankAnswer {
    /// In the order of the rank's data.
    pub data: Vec<DatumAnswer>,
    pub peak_rss_bytes: u64,
}

/// A datum that was computed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DatumAnswer {
    /// Σ of the loss.
    pub loss: f64,
    /// `[tokens × k]`, 0 where a target is absent.
    pub log_probs: Vec<f32>,
}

impl Models {
    /// No adapters on `model`, and no room for keys and values.
    pub fn new(model: Transformer, groups: ProcessGroups, options: &EngineOptions) -> Self {
        let EngineOptions { defaults, base, output_dir, .. } = options.clone();
        let cache = cache(&model, &groups, 0);
        Self { model, groups, defaults, base, output_dir, adapters: BTreeMap::new(), cache }
    }

    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Has backward recompute `recompute` from now on.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        self.model.set_recompute(recompute);
    }

    /// Recompute in backward, for people.
    pub fn told_of_recompute(&self) -> String {
        let layers = self.model.spec().layers.len();
        format!("recompute: {}", self.model.options().checkpointing.told(layers))
    }

    /// Settings that all adapters have in common.
    pub fn defaults(&self) -> &AdapterDefaults {
        &self.defaults
    }

    pub fn groups(&self) -> &ProcessGroups {
        &self.groups
    }

    pub fn vocab_size(&self) -> usize {
        self.model.spec().vocab_size
    }

    /// The adapters and samplers by name.
    pub fn adapters(&self) -> &BTreeMap<ModelId, Held> {
        &self.adapters
    }

    /// The state of the adapter `model`, if there is one that is trained.
    pub fn trained(&self, model: &ModelId) -> Option<&Trained> {
        self.adapters.get(model)?.trained.as_ref()
    }

    /// The places of an adapter of `spec`; perhaps none.
    pub fn sites(&self, spec: &AdapterSpec) -> Result<Vec<Site>, TargetError> {
        let targets = spec.targets.as_ref().unwrap_or(&self.defaults.targets);
        let sites = targets::resolve(&all_projections(self.model.spec()), Some(targets), &[])?;
        let wanted = |site: &Site| {
            if site.parent.ends_with(ATTENTION) { spec.train_attn } else { spec.train_mlp }
        };
        let sites = sites.into_iter().filter(wanted);
        Ok(if self.defaults.hybrid { sites.map(Site::hybrid).collect() } else { sites.collect() })
    }

    /// The plan of an adapter of `spec`.
    pub fn plan(&self, spec: &AdapterSpec) -> Result<AdapterPlan, TargetError> {
        Ok(self.model.adapter_plan(&self.sites(spec)?, self.shape(spec)))
    }

    /// Memory of a rank that an adapter of `spec` needs, the same on every rank.
    pub fn need(&self, spec: &AdapterSpec) -> Result<Need, TargetError> {
        // Sizes of more would not be numbers.
        let (rank, times) = (spec.rank.min(MOST_RANK), spec.rank.div_ceil(MOST_RANK) as u64);
        let plan = self.plan(&AdapterSpec { rank, ..spec.clone() })?;
        let memory = AdapterMemory::new(&plan, self.model.options(), &self.defaults.optimizer);
        // An update that would not stay finite keeps what it changes. Copies of a save are on the host.
        let at_work = match self.groups.device.tensors() {
            Device::Cpu => memory.optimizer.max(memory.save),
            _ => memory.optimizer,
        };
        let times = |bytes: usize| (bytes as u64).saturating_mul(times);
        Ok(Need { held: times(memory.held()), at_work: times(at_work) })
    }

    fn shape(&self, spec: &AdapterSpec) -> LoraShape {
        LoraShape { use_rslora: self.defaults.use_rslora, ..LoraShape::new(spec.rank, spec.alpha) }
    }

    /// Bytes of the files of all ranks of an adapter: those that it has on disk, or would have there.
    pub fn bytes_on_disk(&self, model: &ModelId) -> u64 {
        self.adapters.get(model).map_or(0, Held::bytes_on_disk) * self.groups.world.size() as u64
    }

    /// Carries out `command`. Collective: every rank has the same adapters and the same command.
    pub fn execute(&mut self, command: &Command) -> Result<()> {
        match command {
            Command::Create { model, spec } => self.create(model, spec),
            Command::MicroBatch(rows) => self.compute(rows).map(drop),
            Command::OptimStep { model, step, factor } => self.optim_step(model, step, *factor).map(drop),
            Command::Abort { model } => self.abort(model),
            // Rank 0 answers with the refusal, which every rank has.
            Command::Save { model, save } => self.save(model, &Save::from(save)).map(drop),
            Command::Load { model, load } => self.load(model, load).map(drop),
            Command::Spill { model, number } => self.spill(model, *number).map(drop),
            Command::Restore { model } => self.restore(model).map(drop),
            Command::Unload { model } => {
                self.unload(model);
                Ok(())
            }
            Command::Sample(step) => self.sample(step).map(drop),
            Command::Freeze { model, sampler } => self.freeze(model, sampler.clone()),
            Command::OpenSampler { model, folder } => self.open_sampler(model.clone(), folder).map(drop),
            Command::Stop => Ok(()),
        }
    }

    fn held(&mut self, model: &ModelId) -> Result<&mut Held, EngineError> {
        self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))
    }

    /// Makes a fresh adapter.
    pub fn create(&mut self, model: &ModelId, spec: &AdapterSpec) -> Result<()> {
        let trained = Trained {
            spec: spec.clone(),
            has_gradients: false,
            numbers: self.defaults.optimizer,
            step: 0,
            accumulated: 0,
            valid: 0,
        };
        let values = self.zeros(model, Rc::new(self.plan(spec)?), Some(&trained));
        let mut held = Held::new(values, Some(trained));
        held.adapter(model)?.init(spec.seed, self.defaults.b_init_std)?;
        self.adapters.insert(model.clone(), held);
        Ok(())
    }

    /// Drops the gradients that were accumulated since the last step.
    pub fn abort(&mut self, model: &ModelId) -> Result<()> {
        self.held(model)?.drop_gradients();
        Ok(())
    }

    /// Saves an adapter: its folder and bytes, or the refusal that every rank has. Collective.
    pub fn save(&mut self, model: &ModelId, save: &Save) -> Result<Result<Reply, Refusal>> {
        let held = self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let (session, trained) = held.session(model)?;
        let accumulated = Accumulated { passes: trained.accumulated, valid: trained.valid };
        let (groups, base) = (&self.groups, &self.base);
        let saved = match save.contents {
            Contents::Merged { dtype } => {
                merged::save(&session.adapter, groups, base, self.model.spec(), dtype, save)
            }
            Contents::Adapter | Contents::Training => store::save(session, groups, base, accumulated, save),
        };
        refused(saved.map(|saved| {
            let (folder, bytes) = saved.unwrap_or_else(|| (save.folder.clone(), 0));
            Reply::Saved { folder, bytes }
        }))
    }

    /// Bytes of the files of the merge of an adapter, about; see [`merged::bytes`].
    pub fn merged_bytes(&self, dtype: Option<DType>) -> Result<u64, Refusal> {
        let bytes = merged::bytes(&self.base, self.model.spec(), dtype);
        bytes.map_err(|error| store::refusal(&error))
    }

    /// Loads a save into an adapter, which is as it was if that is refused. Collective.
    pub fn load(&mut self, model: &ModelId, load: &Load) -> Result<Result<Reply, Refusal>> {
        let (groups, base) = (&self.groups, &self.base);
        let held = self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let (session, trained) = held.session(model)?;
        let loaded = store::load(session, groups, base, load);
        refused(loaded.map(|loaded| {
            let Accumulated { passes, valid } = loaded.accumulated;
            (trained.step, trained.accumulated, trained.valid) = (loaded.step, passes, valid);
            trained.has_gradients = passes > 0;
            Reply::Loaded { step: loaded.step }
        }))
    }

    /// Forgets an adapter or a sampler, also on disk.
    pub fn unload(&mut self, model: &ModelId) {
        self.adapters.remove(model);
    }

    /// Computes this rank's data of a micro-batch, and gathers the answers of all ranks with data of their own.
    /// Collective.
    pub fn compute(&mut self, rows: &Rows) -> Result<Vec<RankAnswer>> {
        let (mesh, rank) = (self.groups.mesh, self.groups.rank);
        let own = rows.ranks.get(mesh.data_rank(rank)).map_or(&[][..], Vec::as_slice);
        let device = self.model.device().tensors();
        let (mut ids, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut segments, mut losses) = (Vec::new(), Vec::<(Range<usize>, Box<dyn TokenLoss>)>::new());
        for segment in own {
            let start = ids.len();
            for datum in &segment.data {
                ids.extend_from_slice(&datum.ids);
                targets.extend_from_slice(&datum.targets);
                lengths.push(datum.ids.len());
            }
            let named = NamedLoss::from(&rows.losses[segment.loss]);
            let loss = loss::token_loss(&named, &segment.data, device).map_err(EngineError::Loss)?;
            segments.push((ids.len() - start, Some(segment.adapter)));
            losses.push((start..ids.len(), loss));
        }
        let batch = Batch::with_targets(&ids, &targets, rows.k, &lengths, device);
        // One adapter has all rows, which costs nothing; every rank sees so.
        let count = rows.adapters.len();
        let batch = if count > 1 { batch.with_adapters(&merged(&segments), count) } else { batch };
        let loss = BySegment::new(losses.iter().map(|(rows, loss)| (rows.clone(), &**loss)).collect());
        // Both are in the order of names.
        let adapters =
            self.adapters.iter_mut().filter(|(model, _)| rows.adapters.binary_search(model).is_ok());
        let mut adapters: Vec<&mut Adapter> = adapters
            .map(|(model, held)| {
                let (session, trained) = held.session(model)?;
                trained.has_gradients |= rows.backward;
                Ok(&mut session.adapter)
            })
            .collect::<Result<_, EngineError>>()?;
        let found = if rows.backward {
            self.model.forward_backward(&batch, &mut adapters, &loss)?
        } else {
            self.model.evaluate(&batch, &mut adapters, &loss)?
        };
        // Its sums have no reader.
        self.model.take_router_load();
        for (adapter, valid) in &rows.ended {
            let model = &rows.adapters[*adapter];
            let (_, trained) = self.held(model)?.session(model)?;
            trained.accumulated += 1;
            trained.valid += valid;
        }
        let host = |tensor: &Tensor| values::<f32>(&tensor.to_device(Device::Cpu).contiguous());
        let (losses, log_probs) = (host(&found.values), host(&found.log_probs));
        let mut start = 0;
        let data = lengths.iter().map(|tokens| {
            let own = start..start + tokens;
            start = own.end;
            DatumAnswer {
                loss: losses[own.clone()].iter().map(|&value| f64::from(value)).sum(),
                log_probs: log_probs[own.start * rows.k..own.end * rows.k].to_vec(),
            }
        });
        let answer = RankAnswer { data: data.collect(), peak_rss_bytes: peak_rss_bytes() };
        self.gathered(&answer)
    }

    /// The answers of all ranks with data of their own. Collective.
    fn gathered<T: Serialize + DeserializeOwned + Default>(&self, own: &T) -> Result<Vec<T>> {
        let mesh = self.groups.mesh;
        let bytes = postcard::to_stdvec(own).map_err(EngineError::from)?;
        let mut answers = Vec::new();
        answers.resize_with(mesh.data_parallel(), T::default);
        for (rank, bytes) in self.groups.world.all_gather_host(&bytes)?.iter().enumerate() {
            answers[mesh.data_rank(rank)] = postcard::from_bytes(bytes).map_err(EngineError::from)?;
        }
        Ok(answers)
    }

    /// Updates an adapter by its accumulated gradient times `factor`, which is zero afterwards in any case. Collective.
    pub fn optim_step(&mut self, model: &ModelId, step: &OptimStep, factor: f64) -> Result<StepReply> {
        let world = self.groups.world.clone();
        let held = self.held(model)?;
        let (session, trained) = held.session(model)?;
        let &OptimStep { lr, betas, eps, weight_decay, max_grad_norm, .. } = step;
        trained.numbers = Settings { weight_decay, betas, eps, ..trained.numbers };
        session.reduce()?;
        session.optimizer.set_numbers(&trained.numbers);
        session.max_grad_norm = max_grad_norm;
        let Update { grad_norm, mut non_finite } = session.update_finite(lr, factor, &*world)?;
        if !grad_norm.is_finite() && non_finite.is_empty() {
            non_finite.push(NORM.into());
        }
        trained.step += u64::from(non_finite.is_empty());
        let step = trained.step;
        held.drop_gradients();
        Ok(StepReply { step, grad_norm, non_finite })
    }
}

/// Room for the keys and values of `pages` pages.
fn cache(model: &Transformer, groups: &ProcessGroups, pages: usize) -> KvCache {
    KvCache::new(model.spec(), pages, model.options().compute.kind(), groups.device.tensors())
}

/// Neighbouring segments of one adapter as one.
fn merged(segments: &[(usize, Option<usize>)]) -> Vec<(usize, Option<usize>)> {
    let same = segments.chunk_by(|a, b| a.1 == b.1);
    same.map(|same| (same.iter().map(|(rows, _)| rows).sum(), same[0].1)).collect()
}
