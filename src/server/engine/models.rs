//! The base and the adapters of a rank, and how it carries out commands.

use super::{
    AdapterDefaults,
    command::{Command, EngineError, Rows},
    loss,
};
use crate::{
    Error, Result,
    checkpoint::state::Accumulated,
    config,
    lora::{LoraShape, Site, TargetError, targets},
    loss::{BySegment, NamedLoss, TokenLoss},
    model::{
        base_plan::all_projections,
        transformer::{Batch, Transformer},
    },
    ops::cpu::values,
    optim::{Optimizer, Settings},
    server::{
        request::{AdapterSpec, Load, ModelId, OptimStep, Refusal, Reply, Save, StepReply},
        store::{self, Base},
    },
    session::{Session, Update},
    shard::ProcessGroups,
    train::metrics::peak_rss_bytes,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, ops::Range};
use tch::Device;

/// Module of a layer's attention.
const ATTENTION: &str = ".self_attn";
/// The name of a gradient norm that overflows although every element is finite.
const NORM: &str = "grad_norm";

/// An adapter that is being trained.
pub struct Trained {
    pub spec: AdapterSpec,
    pub session: Session,
    /// Updates so far.
    pub step: u64,
    /// Passes with backward since the last update.
    pub accumulated: u64,
    /// Valid targets of these passes.
    pub valid: u64,
}

impl Trained {
    /// Drops the gradients that were accumulated.
    fn drop_gradients(&mut self) {
        self.session.adapter.regions_mut().zero_gradients();
        (self.accumulated, self.valid) = (0, 0);
    }
}

/// The part that one rank has of everything.
pub struct Models {
    model: Transformer,
    groups: ProcessGroups,
    defaults: AdapterDefaults,
    base: Base,
    adapters: BTreeMap<ModelId, Trained>,
}

/// The reply to a client, or the refusal that every rank has. Ranks that can no longer talk to each other have failed.
fn refused(outcome: Result<Reply>) -> Result<Result<Reply, Refusal>> {
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
    /// No adapters on `model`, the base `base`.
    pub fn new(model: Transformer, groups: ProcessGroups, defaults: AdapterDefaults, base: Base) -> Self {
        Self { model, groups, defaults, base, adapters: BTreeMap::new() }
    }

    pub fn groups(&self) -> &ProcessGroups {
        &self.groups
    }

    pub fn vocab_size(&self) -> usize {
        self.model.spec().vocab_size
    }

    /// The adapters by name.
    pub fn adapters(&self) -> &BTreeMap<ModelId, Trained> {
        &self.adapters
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
            Command::Unload { model } => {
                self.unload(model);
                Ok(())
            }
            Command::Stop => Ok(()),
        }
    }

    fn trained(&mut self, model: &ModelId) -> Result<&mut Trained, EngineError> {
        self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))
    }

    /// Makes a fresh adapter.
    pub fn create(&mut self, model: &ModelId, spec: &AdapterSpec) -> Result<()> {
        let AdapterDefaults { use_rslora, b_init_std, .. } = self.defaults;
        let shape = LoraShape { rank: spec.rank, alpha: spec.alpha, use_rslora };
        let mut adapter = self.model.new_adapter(&self.sites(spec)?, shape);
        adapter.init(spec.seed, b_init_std)?;
        let optimizer = Optimizer::new(&Settings::from(&config::TrainArgs::default()), adapter.pieces());
        let session = Session { name: model.to_string(), adapter, optimizer, max_grad_norm: 0.0 };
        let trained = Trained { spec: spec.clone(), session, step: 0, accumulated: 0, valid: 0 };
        self.adapters.insert(model.clone(), trained);
        Ok(())
    }

    /// Drops the gradients that were accumulated since the last step.
    pub fn abort(&mut self, model: &ModelId) -> Result<()> {
        self.trained(model)?.drop_gradients();
        Ok(())
    }

    /// Saves an adapter: its folder and bytes, or the refusal that every rank has. Collective.
    pub fn save(&mut self, model: &ModelId, save: &Save) -> Result<Result<Reply, Refusal>> {
        let trained = self.adapters.get(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let accumulated = Accumulated { passes: trained.accumulated, valid: trained.valid };
        let saved = store::save(&trained.session, &self.groups, &self.base, accumulated, save);
        refused(saved.map(|saved| {
            let (folder, bytes) = saved.unwrap_or_else(|| (save.folder.clone(), 0));
            Reply::Saved { folder, bytes }
        }))
    }

    /// Loads a save into an adapter, which is as it was if that is refused. Collective.
    pub fn load(&mut self, model: &ModelId, load: &Load) -> Result<Result<Reply, Refusal>> {
        let (groups, base) = (&self.groups, &self.base);
        let trained = self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let loaded = store::load(&mut trained.session, groups, base, load);
        refused(loaded.map(|loaded| {
            let Accumulated { passes, valid } = loaded.accumulated;
            (trained.step, trained.accumulated, trained.valid) = (loaded.step, passes, valid);
            Reply::Loaded { step: loaded.step }
        }))
    }

    /// Forgets an adapter.
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
        let mut adapters: Vec<_> = adapters.map(|(_, trained)| &mut trained.session.adapter).collect();
        let found = if rows.backward {
            self.model.forward_backward(&batch, &mut adapters, &loss)?
        } else {
            self.model.evaluate(&batch, &mut adapters, &loss)?
        };
        // Its sums have no reader.
        self.model.take_router_load();
        for (adapter, valid) in &rows.ended {
            let trained = self.trained(&rows.adapters[*adapter])?;
            trained.accumulated += 1;
            trained.valid += valid;
        }
        let host = |tensor: &tch::Tensor| values::<f32>(&tensor.to_device(Device::Cpu).contiguous());
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
        let bytes = postcard::to_stdvec(&answer).map_err(EngineError::from)?;
        let mut answers = Vec::new();
        answers.resize_with(mesh.data_parallel(), RankAnswer::default);
        for (rank, bytes) in self.groups.world.all_gather_host(&bytes)?.iter().enumerate() {
            answers[mesh.data_rank(rank)] = postcard::from_bytes(bytes).map_err(EngineError::from)?;
        }
        Ok(answers)
    }

    /// Updates an adapter by its accumulated gradient times `factor`, which is zero afterwards in any case. Collective.
    pub fn optim_step(&mut self, model: &ModelId, step: &OptimStep, factor: f64) -> Result<StepReply> {
        let world = self.groups.world.clone();
        let trained = self.trained(model)?;
        let session = &mut trained.session;
        session.reduce()?;
        if factor != 1.0 {
            session.adapter.regions_mut().scale_gradients(factor);
        }
        let &OptimStep { lr, betas, eps, weight_decay, max_grad_norm, .. } = step;
        session.optimizer.set_numbers(&Settings { kind: config::Optimizer::Adamw, weight_decay, betas, eps });
        session.max_grad_norm = max_grad_norm;
        let Update { grad_norm, mut non_finite } = session.update(lr, &*world)?;
        if grad_norm.is_finite() {
            trained.step += 1;
        } else if non_finite.is_empty() {
            non_finite.push(NORM.into());
        }
        trained.drop_gradients();
        Ok(StepReply { step: trained.step, grad_norm, non_finite })
    }
}

/// Neighbouring segments of one adapter as one.
fn merged(segments: &[(usize, Option<usize>)]) -> Vec<(usize, Option<usize>)> {
    let mut merged: Vec<(usize, Option<usize>)> = Vec::new();
    for &(rows, adapter) in segments {
        match merged.last_mut() {
            Some((before, same)) if *same == adapter => *before += rows,
            _ => merged.push((rows, adapter)),
        }
    }
    merged
}
