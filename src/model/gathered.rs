//! A decoder layer whose slots are gathered: the only place where frozen tensors and adapters become the operands of a
//! computation.

use super::{
    declare::{BaseEntries, GemmEntries, ProjectionId, TensorId},
    layer::LayerPlan,
    quantized::StepNoise,
};
use crate::{
    dtype::DType,
    lora::Adapter,
    ops::linear::{Base, Linear, Matrices, PackedMatrices, Weight},
    shard::{ExpertDispatcher, ShardError, SlotPool},
};
use tch::Tensor;

/// Layer `unit` of the pools, gathered, with the adapters of the pass.
pub struct GatheredLayer<'a> {
    pub plan: &'a LayerPlan,
    pub unit: usize,
    /// Dtype of computation, in which packed weights are decoded.
    pub compute: DType,
    /// Noise that is added to packed weights.
    pub noise: Option<StepNoise>,
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
        let BaseEntries { experts, gemms } = &self.plan.bases()[id.index()];
        let pool = if *experts { self.experts } else { self.dense };
        let view = |entry| pool.view(self.unit, entry);
        let base = |gemm: &GemmEntries| {
            let tensor = view(gemm.weight)?;
            let weight = match gemm.format {
                None if *experts => Matrices::Each(tensor).into(),
                None => Matrices::Shared(tensor).into(),
                Some(format) => {
                    let packed = PackedMatrices {
                        format,
                        tiles: tensor,
                        scales: format.has_global().then(|| view(gemm.weight + 1)).transpose()?,
                        widths: gemm.widths.clone(),
                        columns: gemm.input,
                        kind: self.compute.kind(),
                    };
                    match self.noise {
                        None => Weight::Packed(packed),
                        Some(noise) => {
                            let spans = &pool.layout(self.unit).entries[gemm.weight].spec.spans;
                            let of_matrices = spans.iter().map(|span| noise.of(&span.tensor)).collect();
                            Weight::Noisy(packed, of_matrices)
                        }
                    }
                }
            };
            Ok::<_, ShardError>(Base { weight, bias: gemm.bias.map(view).transpose()? })
        };
        let bases = gemms.iter().map(base).collect::<Result<_, _>>()?;
        let bind = |adapter: &&mut Adapter| adapter.bind(self.unit, id.index());
        Ok(Linear { bases, adapters: self.adapters.iter().map(bind).collect::<Result<_, _>>()? })
    }
}
