//! An adapter of a rank, in memory or on disk: one that is trained, or a sampler, which has nothing but its values.

use super::{Models, refused};
use crate::{
    Error, Result,
    lora::{Adapter, AdapterPlan},
    optim::{Optimizer, Settings},
    server::{
        engine::command::EngineError,
        request::{AdapterSpec, ModelId, Refusal},
        spill::{Spilled, bytes_of},
        store,
    },
    session::Session,
};
use std::rc::Rc;
use tch::Tensor;

/// An adapter that is trained, or a sampler.
pub struct Held {
    place: Place,
    /// `None`: a sampler.
    pub trained: Option<Trained>,
}

/// The state of an adapter that is trained, beside its tensors.
pub struct Trained {
    pub spec: AdapterSpec,
    /// A pass, whole or in part, has added to its gradients.
    pub(super) has_gradients: bool,
    /// The numbers of its last update.
    pub(super) numbers: Settings,
    /// Updates so far.
    pub step: u64,
    /// Passes with backward since the last update.
    pub accumulated: u64,
    /// Valid targets of these passes.
    pub valid: u64,
}

enum Place {
    Memory(Values),
    Disk(OnDisk),
}

/// The tensors of an adapter.
pub enum Values {
    Session(Box<Session>),
    Frozen(Box<Adapter>),
}

/// An adapter on disk.
struct OnDisk {
    file: Spilled,
    plan: Rc<AdapterPlan>,
    /// Updates that the optimizer has seen.
    updates: u64,
    /// The file has gradients too.
    with_gradients: bool,
}

impl Values {
    fn adapter(&self) -> &Adapter {
        match self {
            Self::Session(session) => &session.adapter,
            Self::Frozen(adapter) => adapter,
        }
    }

    /// The tensors that go to disk and back, on this rank: the state, and with `gradients` what is accumulated. The
    /// rest is made from them.
    fn tensors(&self, gradients: bool) -> Vec<Tensor> {
        match self {
            Self::Session(session) => {
                let sums = session.adapter.regions().accumulators().filter(|_| gradients);
                session.state().into_iter().chain(sums.map(Tensor::shallow_clone)).collect()
            }
            Self::Frozen(adapter) => adapter.pieces().map(|piece| piece.master.shallow_clone()).collect(),
        }
    }

    fn updates(&self) -> u64 {
        match self {
            Self::Session(session) => session.optimizer.updates(),
            Self::Frozen(_) => 0,
        }
    }
}

impl Held {
    /// An adapter in memory; `trained`: its state, `None` of a sampler.
    pub fn new(values: Values, trained: Option<Trained>) -> Self {
        Self { place: Place::Memory(values), trained }
    }

    pub fn plan(&self) -> &Rc<AdapterPlan> {
        match &self.place {
            Place::Memory(values) => values.adapter().plan(),
            Place::Disk(on_disk) => &on_disk.plan,
        }
    }

    /// The largest rank of its sites.
    pub fn rank(&self) -> usize {
        self.plan().sites().into_iter().map(|(_, shape)| shape.rank).max().unwrap_or(0)
    }

    /// The adapter `model`, which is in memory.
    pub fn adapter(&mut self, model: &ModelId) -> Result<&mut Adapter, EngineError> {
        match &mut self.place {
            Place::Memory(Values::Session(session)) => Ok(&mut session.adapter),
            Place::Memory(Values::Frozen(adapter)) => Ok(adapter),
            Place::Disk(_) => Err(EngineError::OnDisk(model.clone())),
        }
    }

    /// The adapter `model`, which is trained and in memory.
    pub fn session(&mut self, model: &ModelId) -> Result<(&mut Session, &mut Trained), EngineError> {
        match (&mut self.place, &mut self.trained) {
            (Place::Memory(Values::Session(session)), Some(trained)) => Ok((session, trained)),
            (Place::Disk(_), Some(_)) => Err(EngineError::OnDisk(model.clone())),
            _ => Err(EngineError::NoAdapter(model.clone())),
        }
    }

    fn has_gradients(&self) -> bool {
        self.trained.as_ref().is_some_and(|trained| trained.has_gradients)
    }

    /// Drops the gradients that were accumulated.
    pub fn drop_gradients(&mut self) {
        if let Place::Memory(Values::Session(session)) = &mut self.place {
            session.adapter.regions_mut().zero_gradients();
        }
        if let Some(trained) = &mut self.trained {
            (trained.accumulated, trained.valid, trained.has_gradients) = (0, 0, false);
        }
    }

    /// Bytes of this rank's file: that on disk, or one that it would have there.
    pub fn bytes_on_disk(&self) -> u64 {
        match &self.place {
            Place::Memory(values) => bytes_of(&values.tensors(self.has_gradients())),
            Place::Disk(on_disk) => on_disk.file.bytes(),
        }
    }
}

impl Models {
    /// The tensors of an adapter of `plan`, of zeros; `trained`: its state, `None` of a sampler.
    pub(super) fn zeros(&self, model: &ModelId, plan: Rc<AdapterPlan>, trained: Option<&Trained>) -> Values {
        let Some(trained) = trained else {
            return Values::Frozen(Box::new(self.model.frozen_adapter(plan)));
        };
        let adapter = self.model.adapter_of(plan);
        let optimizer = Optimizer::new(&trained.numbers, adapter.pieces());
        let session = Session { name: model.to_string(), adapter, optimizer, max_grad_norm: 0.0 };
        Values::Session(Box::new(session))
    }

    /// Moves an adapter to disk. A refusal, which every rank has, leaves it in memory. Collective.
    pub fn spill(&mut self, model: &ModelId, number: u64) -> Result<Result<(), Refusal>> {
        let name = format!("{number}-{}", self.groups.rank);
        let (world, device) = (self.groups.world.clone(), self.groups.device.clone());
        let held = self.adapters.get_mut(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let with_gradients = held.has_gradients();
        let Place::Memory(values) = &held.place else {
            return Err(EngineError::OnDisk(model.clone()).into());
        };
        let file = Spilled::write(&self.output_dir, &name, &values.tensors(with_gradients), &device);
        let (updates, plan) = (values.updates(), values.adapter().plan().clone());
        let file = file.map_err(|error| Error::Failure(error.to_string()));
        refused(store::same_outcome(&*world, file).map(|file| {
            held.place = Place::Disk(OnDisk { file, plan, updates, with_gradients });
        }))
    }

    /// Brings an adapter back from disk. A refusal, which every rank has, leaves it there. Collective.
    pub fn restore(&mut self, model: &ModelId) -> Result<Result<(), Refusal>> {
        let (world, device) = (self.groups.world.clone(), &self.groups.device);
        let held = self.adapters.get(model).ok_or_else(|| EngineError::NoAdapter(model.clone()))?;
        let Place::Disk(on_disk) = &held.place else { return Ok(Ok(())) };
        let mut values = self.zeros(model, on_disk.plan.clone(), held.trained.as_ref());
        let read = on_disk.file.read(&values.tensors(on_disk.with_gradients), device);
        let again = match &held.trained {
            Some(_) => "make it again and load its last saved state to go on",
            None => "and make it again from its adapter or from what was saved",
        };
        let read = read.map_err(|error| {
            Error::Failure(format!(
                "{model} cannot come back from disk: {error}. Its requests are refused as long as that is so: unload it, \
                 {again}"
            ))
        });
        let read = store::same_outcome(&*world, read);
        if read.is_ok() {
            if let Values::Session(session) = &mut values {
                session.optimizer.set_updates(on_disk.updates);
                session.adapter.regions_mut().refresh()?;
            }
            let held = self.held(model)?;
            held.place = Place::Memory(values);
            if !held.has_gradients() {
                held.drop_gradients();
            }
        }
        refused(read)
    }
}
