//! A decoder layer whose slots are gathered: the only place where frozen tensors and adapters become the operands of a
//! computation.

use super::{
    declare::{BaseEntries, ProjectionId, TensorId},
    layer::LayerPlan,
};
use crate::{
    lora::Adapter,
    ops::linear::{Base, Linear, Matrices},
    shard::{ExpertDispatcher, ShardError, SlotPool},
};
use tch::Tensor;

/// Layer `unit` of the pools, gathered, with the adapters of the pass.
pub struct GatheredLayer<'a> {
    pub plan: &'a LayerPlan,
    pub unit: usize,
    pub dense: &'a SlotPool,
    pub experts: &'a SlotPool,
    pub adapters: &'a [&'a mut Adapter],
    /// Communication with the ranks that have the other experts.
    pub dispatcher: Option<&'a ExpertDispatcher>,
}

impl GatheredLayer<'_> {
    /// A view of a frozen tensor.
    pub fn tensor(&self, id: TensorId) -> Result<Tensor, ShardError> {
        self.dense.view(self.unit, id.entry())
    }

    /// A projection with the adapters of the pass, as views of their slots.
    pub fn linear(&self, id: ProjectionId) -> Result<Linear, ShardError> {
        let dense = |entry| self.dense.view(self.unit, entry);
        let bases = match &self.plan.bases()[id.index()] {
            BaseEntries::Dense(gemms) => {
                let base = |&(weight, bias): &(usize, Option<usize>)| {
                    let weight = Matrices::Shared(dense(weight)?);
                    Ok::<_, ShardError>(Base { weight, bias: bias.map(dense).transpose()? })
                };
                gemms.iter().map(base).collect::<Result<_, _>>()?
            }
            &BaseEntries::Experts(entry) => {
                let weight = Matrices::Each(self.experts.view(self.unit, entry)?);
                vec![Base { weight, bias: None }]
            }
        };
        let bind = |adapter: &&mut Adapter| adapter.bind(self.unit, id.index());
        Ok(Linear { bases, adapters: self.adapters.iter().map(bind).collect::<Result<_, _>>()? })
    }
}
