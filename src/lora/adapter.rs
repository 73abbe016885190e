//! An adapter with its shards: what a session trains and a model computes with. It is not part of a model: a pass is
//! handed the adapters of its rows.

use super::{init, module::Parameter, plan::AdapterPlan, targets::Site};
use crate::{
    config::ReduceGradients,
    device::{RankDevice, Staging},
    ops::linear::{BoundAdapter, Dropout},
    shard::{AdapterRegions, FlatRegion, OwnedPiece, ProcessGroups, Region, ShardError},
};
use std::{collections::BTreeMap, ops::Range, rc::Rc};
use tch::Tensor;

/// The plan of an adapter and this rank's part of it.
pub struct Adapter {
    plan: Rc<AdapterPlan>,
    regions: AdapterRegions,
    device: RankDevice,
    dropout: Option<AdapterDropout>,
}

/// The dropout of an adapter in training.
#[derive(Clone, Copy, Debug)]
struct AdapterDropout {
    rate: f64,
    seed: u64,
}

/// A parameter of which this rank owns elements.
struct OwnedParameter {
    unit: usize,
    parameter: Parameter,
    /// Its range in the unit's flat element space.
    all: Range<usize>,
    /// The part that this rank owns.
    own: Range<usize>,
}

impl Adapter {
    /// An adapter of zeros; [`init`](Self::init) or [`set`](Self::set) fills it. `slots` layers are gathered at a time.
    pub fn new(plan: Rc<AdapterPlan>, slots: usize, reduce: ReduceGradients, groups: &ProcessGroups) -> Self {
        let regions = AdapterRegions::new(plan.dense.clone(), plan.experts.clone(), slots, groups, reduce);
        Self { plan, regions, device: groups.device.clone(), dropout: None }
    }

    /// An adapter of zeros that is not trained, which takes the memory of its values in compute dtype alone;
    /// [`set`](Self::set) or [`copy_values`](AdapterRegions::copy_values) fills it.
    pub fn frozen(plan: Rc<AdapterPlan>, slots: usize, groups: &ProcessGroups) -> Self {
        let regions = AdapterRegions::frozen(plan.dense.clone(), plan.experts.clone(), slots, groups);
        Self { plan, regions, device: groups.device.clone(), dropout: None }
    }

    /// Drops the share `rate` of the elements that its dense sites read, in batches whose tokens have keys
    /// ([`init::token_keys`]). Masks are a function of `seed`, site, token and element.
    pub fn set_dropout(&mut self, rate: f64, seed: u64) {
        self.dropout = (rate > 0.0).then_some(AdapterDropout { rate, seed });
    }

    pub fn plan(&self) -> &Rc<AdapterPlan> {
        &self.plan
    }

    /// Its shards, gradients and slots.
    pub fn regions(&self) -> &AdapterRegions {
        &self.regions
    }

    pub fn regions_mut(&mut self) -> &mut AdapterRegions {
        &mut self.regions
    }

    /// This rank's pieces: of the dense region of every layer, then of the experts' of every layer.
    pub fn pieces(&self) -> impl Iterator<Item = OwnedPiece<'_>> {
        [Region::Dense, Region::Experts].into_iter().flat_map(|region| {
            let (shards, flat) = (self.regions.of(region), self.plan.flat_of(region));
            flat.iter().enumerate().map(|(unit, region)| shards.piece(unit, region))
        })
    }

    /// Range of `parameter` in `unit`'s flat element space.
    pub fn elements(&self, unit: usize, parameter: &Parameter) -> Range<usize> {
        let Parameter { region, group, entry, first, .. } = *parameter;
        let start = self.regions.of(region).elements(unit, group, entry).start + first;
        start..start + parameter.shape[0] * parameter.shape[1]
    }

    fn owned_parameters(&self) -> impl Iterator<Item = OwnedParameter> {
        let all = self.plan.parameters().into_iter().enumerate();
        all.flat_map(|(unit, parameters)| parameters.into_iter().map(move |parameter| (unit, parameter)))
            .filter_map(|(unit, parameter)| {
                let owned = self.regions.of(parameter.region).owned(unit);
                let all = self.elements(unit, &parameter);
                let own = all.start.max(owned.start)..all.end.min(owned.end);
                (!own.is_empty()).then_some(OwnedParameter { unit, parameter, all, own })
            })
    }

    /// Sets each parameter to `values(parameter, elements)` on the ranks that own the elements.
    pub fn set(
        &mut self,
        mut values: impl FnMut(&Parameter, Range<usize>) -> Vec<f32>,
    ) -> Result<(), ShardError> {
        self.set_some(|parameter, range| Some(values(parameter, range)))
    }

    /// The same for the parameters of which there are values; the others stay as they are.
    pub fn set_some(
        &mut self,
        mut values: impl FnMut(&Parameter, Range<usize>) -> Option<Vec<f32>>,
    ) -> Result<(), ShardError> {
        let owned: Vec<_> = self.owned_parameters().collect();
        for OwnedParameter { unit, parameter, all, own } in owned {
            if let Some(new) = values(&parameter, own.start - all.start..own.end - all.start) {
                self.regions.of_mut(parameter.region).set_master(unit, own, &new);
            }
        }
        self.regions.refresh()
    }

    /// Fresh A and B, the same bits in every topology.
    pub fn init(&mut self, seed: u64, b_std: f64) -> Result<(), ShardError> {
        self.set(|parameter, range| init::values(parameter, range, seed, b_std))
    }

    /// Fresh A and B = 0 after merge `merge` (1 is the first), the same bits in every topology.
    pub fn init_after_merge(&mut self, seed: u64, merge: u64) -> Result<(), ShardError> {
        self.set(|parameter, range| init::values_after_merge(parameter, range, seed, merge))
    }

    /// Names of the parameters of which this rank owns an element that is not finite in one of `tensors(piece)`
    /// `[piece elements]`.
    pub fn non_finite(&self, tensors: impl Fn(&OwnedPiece) -> Vec<Tensor>) -> Vec<String> {
        let not_finite = |owned: &OwnedParameter| {
            let OwnedParameter { unit, parameter, own, .. } = owned;
            let (shards, flat) = (self.regions.of(parameter.region), self.plan.flat_of(parameter.region));
            let at = (own.start - shards.owned(*unit).start) as i64;
            let finite = |tensor: Tensor| {
                tensor.narrow(0, at, own.len() as i64).isfinite().all().int64_value(&[]) != 0
            };
            !tensors(&shards.piece(*unit, &flat[*unit])).into_iter().all(finite)
        };
        self.owned_parameters().filter(not_finite).map(|owned| owned.parameter.name).collect()
    }

    /// The accumulated gradients of this rank's [`pieces`](Self::pieces), in their order, summed over all ranks; what
    /// is accumulated stays. Collective.
    pub fn reduced_gradients(&self) -> Result<Vec<Tensor>, ShardError> {
        let both = [Region::Dense, Region::Experts].into_iter().map(|region| self.regions.of(region));
        both.flat_map(|shards| (0..shards.len()).map(|unit| shards.reduced_gradient(unit))).collect()
    }

    /// Replaces what is accumulated by `sums(region)` `[piece elements]`, the gradient of this rank's piece summed over
    /// all ranks.
    pub fn set_reduced_gradients<E>(
        &mut self,
        mut sums: impl FnMut(&FlatRegion) -> Result<Tensor, E>,
    ) -> Result<(), E> {
        for region in [Region::Dense, Region::Experts] {
            for (unit, flat) in self.plan.flat_of(region).iter().enumerate() {
                self.regions.of_mut(region).set_reduced_gradient(unit, &sums(flat)?);
            }
        }
        Ok(())
    }

    /// Every logical parameter with its whole fp32 values, row-major, on every rank of the block. Collective.
    pub fn whole(&self) -> Result<Vec<(Parameter, Vec<f32>)>, ShardError> {
        let mut whole = Vec::new();
        for unit in 0..self.plan.layers.len() {
            whole.extend(self.whole_of(unit)?);
        }
        Ok(whole)
    }

    /// The same of the parameters of layer `unit` alone. Collective.
    pub fn whole_of(&self, unit: usize) -> Result<Vec<(Parameter, Vec<f32>)>, ShardError> {
        let parameters: Vec<Parameter> = self.plan.layers[unit].parameters().collect();
        let (mut flat, mut staging) = (BTreeMap::new(), Staging::new(&self.device)?);
        for region in [Region::Dense, Region::Experts] {
            if parameters.iter().any(|parameter| parameter.region == region) {
                flat.insert(region, self.regions.of(region).whole_master(unit)?);
            }
        }
        let values = |parameter: Parameter| {
            let at = self.elements(unit, &parameter);
            let values = flat[&parameter.region].narrow(0, at.start as i64, at.len() as i64);
            Ok((parameter, staging.fetch(&values)?))
        };
        parameters.into_iter().map(values).collect()
    }

    /// The gathered adapter of projection `place` of layer `unit`, if it has one, with the sums of its gradients.
    pub fn bind(&self, unit: usize, place: usize) -> Result<Option<BoundAdapter>, ShardError> {
        let Some(module) = self.plan.layers[unit].modules[place].as_ref() else { return Ok(None) };
        let mut bound = module.bind(&self.regions, unit, self.plan.cast())?;
        bound.dropout = self.dropout.map(|AdapterDropout { rate, seed }| {
            let key = |site: &Site| init::dropout_stream(seed, &site.path());
            Dropout { rate, parts: module.stack().sites.iter().map(key).collect() }
        });
        Ok(Some(bound))
    }
}
