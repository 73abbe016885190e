//! Samplers, and the steps of the model that sample.

use super::{Held, Models, held::Values, refused};
use crate::{
    Error, Result,
    infer::{
        compute::compute,
        step::{RankResult, Step},
    },
    lora::{Adapter, AdapterPlan},
    model::base_plan::all_projections,
    plan::AdapterMemory,
    server::{
        engine::residence::Need,
        request::{ModelId, Refusal},
        store,
    },
};
use std::{path::Path, rc::Rc};

impl Models {
    /// Memory of a rank that a sampler of `plan` needs, the same on every rank.
    pub fn need_of_sampler(&self, plan: &AdapterPlan) -> Need {
        let memory = AdapterMemory::new(plan, self.model.options(), &self.defaults.optimizer);
        Need { held: memory.frozen() as u64, at_work: 0 }
    }

    /// The plan of the sampler that the save `folder` is, by this rank's own look.
    pub fn plan_of_save(&self, folder: &Path) -> Result<AdapterPlan> {
        let (sites, shapes) = store::shapes(folder, &self.base, &all_projections(self.model.spec()))?;
        Ok(self.model.adapter_plan(&sites, shapes))
    }

    /// Makes the sampler `sampler` of `model`, which is in memory.
    pub fn freeze(&mut self, model: &ModelId, sampler: ModelId) -> Result<()> {
        let plan = self.held(model)?.plan().clone();
        let mut copy = self.model.frozen_adapter(plan);
        copy.regions_mut().copy_values(self.held(model)?.adapter(model)?.regions())?;
        self.adapters.insert(sampler, Held::new(Values::Frozen(Box::new(copy)), None));
        Ok(())
    }

    /// Makes the sampler `sampler` of the values of the save `folder`, or returns the refusal that every rank has.
    /// Collective.
    pub fn open_sampler(&mut self, sampler: ModelId, folder: &Path) -> Result<Result<(), Refusal>> {
        let projections = all_projections(self.model.spec());
        let stored = store::values(folder, &self.groups, &self.base, &projections);
        let made = stored.and_then(|stored| {
            let plan = self.model.adapter_plan(&stored.sites, stored.shapes);
            let mut adapter = self.model.frozen_adapter(Rc::new(plan));
            adapter.set(|parameter, range| stored.values[&parameter.name][range].to_vec())?;
            Ok::<_, Error>(adapter)
        });
        refused(made.map(|adapter| {
            self.adapters.insert(sampler, Held::new(Values::Frozen(Box::new(adapter)), None));
        }))
    }

    /// Makes room for the keys and values of `pages` pages.
    pub fn open_cache(&mut self, pages: usize) {
        self.cache = super::cache(&self.model, &self.groups, pages);
    }

    /// Computes this rank's part of `step`, and gathers the results of all ranks with data of their own. Collective.
    pub fn sample(&mut self, step: &Step<ModelId>) -> Result<Vec<RankResult>> {
        let own = self.groups.mesh.data_rank(self.groups.rank);
        let mut adapters = Vec::with_capacity(step.adapters.len());
        for (model, held) in &mut self.adapters {
            if let Some(place) = step.adapters.iter().position(|wanted| wanted == model) {
                adapters.push((place, held.adapter(model)?));
            }
        }
        adapters.sort_by_key(|(place, _)| *place);
        let mut adapters: Vec<&mut Adapter> = adapters.into_iter().map(|(_, adapter)| adapter).collect();
        let result = compute(&mut self.model, &mut adapters, &mut self.cache, step, own)?;
        self.gathered(&result)
    }
}
