//! Plan of the base before any tensor exists: options, and regions cut over ranks. Pure: the model's slot pools and the
//! byte formulas of [`plan`](crate::plan) are both made from it.

use super::{
    ModelSpec,
    declare::EntryForm,
    layer::LayerPlan,
    recompute::Recompute,
    spec::{EMBEDDING, FINAL_NORM, HEAD},
};
use crate::{
    config::{CheckpointingMethod::NoRecompute, ComputeArgs, ReduceGradients},
    dtype::DType,
    lora::{AdapterPlan, LoraShapes, Site},
    mesh::{Mesh, MeshError},
    shard::{EntrySpec, Region, RegionLayout, layout::BASE_ALIGN},
};

/// Bytes of the embedding or the head that are whole at a time when `vocab_chunk_rows` is null.
const VOCAB_CHUNK_BYTES: usize = 512 << 20;

/// Options of sharding and computing; none changes the result beyond rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Dtype of frozen matrices, gathered adapters and activations.
    pub compute: DType,
    /// One GEMM for q, k, v and one for gate, up.
    pub merge: bool,
    /// Layers gathered at a time.
    pub slots: usize,
    /// Rows of the embedding and the head gathered at a time.
    pub vocab_chunk_rows: usize,
    /// Tokens whose logits exist at a time.
    pub loss_chunk_tokens: usize,
    /// Activations that backward recomputes.
    pub checkpointing: Recompute,
    pub reduce: ReduceGradients,
    /// Predictions of a row are the same to the bit beside any other rows, and by a sampler, by [`evaluate`] and in a
    /// pass of a policy loss, where kernels of ours compute (CPUs).
    ///
    /// [`evaluate`]: super::transformer::Transformer::evaluate
    pub deterministic_sampling: bool,
    /// Checks the output of every layer and overwrites its weights with NaN after use: slow.
    pub debug: bool,
}

impl Default for Options {
    /// fp32, fused GEMMs, two slots, the vocabulary whole, all activations kept.
    fn default() -> Self {
        Self {
            compute: DType::F32,
            merge: true,
            slots: 2,
            vocab_chunk_rows: usize::MAX,
            loss_chunk_tokens: 256,
            checkpointing: NoRecompute.into(),
            reduce: ReduceGradients::Step,
            deterministic_sampling: false,
            debug: false,
        }
    }
}

impl Options {
    /// The options that `args` ask for in a model of `spec`. `merge`: one GEMM for q, k, v and one for gate, up.
    pub fn new(args: &ComputeArgs, spec: &ModelSpec, merge: bool) -> Self {
        let compute = if args.enable_mixed_precision { DType::Bf16 } else { DType::F32 };
        let row_bytes = spec.hidden_size * compute.size();
        Self {
            compute,
            merge,
            slots: if args.reshard_after_forward { args.ring_slots } else { spec.layers.len() },
            vocab_chunk_rows: args.vocab_chunk_rows.unwrap_or(VOCAB_CHUNK_BYTES / row_bytes).max(1),
            loss_chunk_tokens: args.loss_chunk_tokens,
            checkpointing: args.checkpointing().into(),
            reduce: args.reduce_gradients,
            deterministic_sampling: false,
            debug: false,
        }
    }

    /// Rows of a vocabulary chunk of a model of `vocab_size` tokens; the last chunk may have fewer.
    pub fn chunk_rows(&self, vocab_size: usize) -> usize {
        self.vocab_chunk_rows.clamp(1, vocab_size)
    }
}

/// Regions of the base as one rank has them. Those of experts, one a layer, have no entries in a dense layer.
pub struct Regions {
    pub layers: Vec<RegionLayout>,
    pub experts: Vec<RegionLayout>,
    pub vocab: Vec<RegionLayout>,
    pub final_norm: RegionLayout,
}

/// Everything about the sharded base of a model that needs no tensor.
pub struct BasePlan {
    pub layers: Vec<LayerPlan>,
    pub regions: Regions,
}

impl BasePlan {
    /// Plans the part of `spec` that rank `rank` of `mesh` has.
    ///
    /// # Errors
    /// `mesh` does not divide the experts of `spec`.
    pub fn new(spec: &ModelSpec, options: &Options, mesh: &Mesh, rank: usize) -> Result<Self, MeshError> {
        let Options { compute, merge, .. } = *options;
        let plan = |layer| {
            let experts = spec.moe_of(layer).map(|moe| mesh.experts_of(rank, moe.experts)).transpose()?;
            let experts = experts.unwrap_or_default();
            Ok(LayerPlan::new(
                spec,
                layer,
                EntryForm { compute, merge, experts, quantization: spec.quantization.clone() },
            ))
        };
        let plans: Vec<LayerPlan> = (0..spec.layers.len()).map(plan).collect::<Result<_, _>>()?;
        let cut = |name: String, specs, region: Region, align| {
            RegionLayout::new(name, specs, region.shards(mesh), align)
        };
        let region = |name: String, specs, align| cut(name, specs, Region::Dense, align);
        let (mut layers, mut experts) = (Vec::new(), Vec::new());
        for (i, plan) in plans.iter().enumerate() {
            layers.push(region(format!("layer {i}"), plan.specs.clone(), BASE_ALIGN));
            let name = format!("experts of layer {i}");
            experts.push(cut(name, plan.expert_specs.clone(), Region::Experts, BASE_ALIGN));
        }

        let rows = options.chunk_rows(spec.vocab_size);
        let chunk = |tensor: &str, first: usize| {
            let shape = [rows.min(spec.vocab_size - first), spec.hidden_size];
            let mut entry = EntrySpec::whole("weight", tensor.to_owned(), &shape, options.compute);
            entry.spans[0].start = first * spec.hidden_size;
            region(format!("{tensor} rows {first}.."), vec![entry], BASE_ALIGN)
        };
        let tensors: &[&str] = if spec.tie_word_embeddings { &[EMBEDDING] } else { &[EMBEDDING, HEAD] };
        let firsts = || (0..spec.vocab_size).step_by(rows);
        let vocab = tensors.iter().flat_map(|tensor| firsts().map(|first| chunk(tensor, first))).collect();
        let norm = EntrySpec::whole("norm", FINAL_NORM.into(), &[spec.hidden_size], DType::F32);
        let final_norm = region("final norm".into(), vec![norm], BASE_ALIGN);

        let regions = Regions { layers, experts, vocab, final_norm };
        Ok(Self { layers: plans, regions })
    }

    /// The plan of an adapter of `shapes` on `sites` of this base.
    pub fn adapter(
        &self,
        sites: &[Site],
        shapes: &LoraShapes,
        options: &Options,
        mesh: &Mesh,
    ) -> AdapterPlan {
        let projections = self.layers.iter().map(|layer| &layer.projections[..]);
        AdapterPlan::new(projections, sites, shapes, options.compute, mesh)
    }
}

/// All projections of a model, in unit order, against which targets are resolved.
pub fn all_projections(spec: &ModelSpec) -> Vec<crate::lora::targets::Projection> {
    spec.layer_plans().flat_map(|layer| layer.projections).collect()
}
