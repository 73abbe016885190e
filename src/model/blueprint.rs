//! How a model is cut over ranks, before any tensor exists: its options, its regions, its adapters. Pure: both the
//! model's rings and the byte formulas of [`plan`](crate::plan) are made from it.

use super::{
    ModelSpec,
    layer::{LayerAdapterPlan, LayerPlan, projections},
};
use crate::{
    config::{CheckpointingMethod, ReduceGradients},
    dtype::DType,
    lora::{FirstEntries, LORA_MAPPING, Site, Stack},
    mesh::Mesh,
    shard::{EntrySpec, Region, RegionLayout, adapter::align_bytes, layout::BASE_ALIGN},
};

/// How a model is cut and computed; nothing here changes the result beyond rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Dtype of frozen matrices, gathered adapters and activations.
    pub compute: DType,
    /// One GEMM for q, k, v and one for gate, up.
    pub merge: bool,
    /// Layers that are whole at a time.
    pub slots: usize,
    /// Rows of the embedding and the head that are whole at a time.
    pub vocab_chunk_rows: usize,
    /// Tokens whose logits exist at a time.
    pub loss_chunk_tokens: usize,
    /// What of a layer is kept for backward; the rest is computed again.
    pub checkpointing: CheckpointingMethod,
    pub reduce: ReduceGradients,
    /// Looks at what every layer computes, and takes away its weights when it has: slow.
    pub debug: bool,
}

impl Options {
    /// Rows of a vocabulary chunk of a model of `vocab_size` tokens; the last chunk may have fewer.
    pub fn chunk_rows(&self, vocab_size: usize) -> usize {
        self.vocab_chunk_rows.clamp(1, vocab_size)
    }
}

/// Rank and scale of an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraShape {
    pub rank: usize,
    pub alpha: f64,
}

/// Regions of a model as one rank has them: what both the rings and the byte formulas are made from. Those of experts, one
/// a layer, are empty where there are none.
pub struct Regions {
    pub layers: Vec<RegionLayout>,
    pub experts: Vec<RegionLayout>,
    pub vocab: Vec<RegionLayout>,
    pub final_norm: RegionLayout,
    pub adapter: Vec<RegionLayout>,
    pub expert_adapter: Vec<RegionLayout>,
}

/// Everything about a sharded model that needs no tensor.
pub struct Blueprint {
    pub plans: Vec<LayerPlan>,
    pub lora: Vec<LayerAdapterPlan>,
    pub regions: Regions,
}

impl Blueprint {
    /// Plans what rank `rank` of `mesh` has of `spec` with adapters on `sites`. The mesh divides the experts of `spec`:
    /// [`Mesh::experts_of`] says so.
    pub fn new(
        spec: &ModelSpec,
        sites: &[Site],
        lora: LoraShape,
        options: &Options,
        mesh: &Mesh,
        rank: usize,
    ) -> Self {
        let experts = spec.moe.as_ref().and_then(|moe| mesh.experts_of(rank, moe.experts).ok());
        let experts = experts.unwrap_or_default();
        let plan = |i| LayerPlan::new(spec, i, options.compute, options.merge, experts.clone());
        let plans: Vec<LayerPlan> = (0..spec.num_layers).map(plan).collect();
        let cut = |name: String, specs, region, align| {
            let shards = match region {
                Region::Dense => mesh.block(),
                Region::Experts => mesh.block() / mesh.expert(),
            };
            RegionLayout::new(name, specs, shards, align)
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

        let (mut adapter, mut expert_adapter) = (Vec::new(), Vec::new());
        let mut adapters = Vec::new();
        let align = align_bytes(options.compute);
        for (i, plan) in plans.iter().enumerate() {
            let (plan, entries) = adapter_of(plan, sites, lora, options.compute, mesh.expert());
            adapters.push(plan);
            let of = |region| -> Vec<EntrySpec> {
                entries.iter().filter(|entry| entry.0 == region).map(|entry| entry.1.clone()).collect()
            };
            adapter.push(region(format!("adapter of layer {i}"), of(Region::Dense), align));
            let name = format!("adapter of the experts of layer {i}");
            expert_adapter.push(cut(name, of(Region::Experts), Region::Experts, align));
        }
        let regions = Regions { layers, experts, vocab, final_norm, adapter, expert_adapter };
        Self { plans, lora: adapters, regions }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "model.norm.weight";

/// The adapter modules of one layer and their entries.
fn adapter_of(
    plan: &LayerPlan,
    sites: &[Site],
    lora: LoraShape,
    dtype: DType,
    expert_groups: usize,
) -> (LayerAdapterPlan, Vec<(Region, EntrySpec)>) {
    let mut entries: Vec<(Region, EntrySpec)> = Vec::new();
    let mut adapters = LayerAdapterPlan::default();
    for projection in &plan.projections {
        let belongs = |site: &&Site| {
            site.parent == projection.parent
                && projection.leaves.iter().any(|leaf| leaf.0 == site.leaves[0].0)
        };
        let own: Vec<Site> = sites.iter().filter(belongs).cloned().collect();
        let constructor =
            own.first().and_then(|site| LORA_MAPPING.iter().find(|(kind, _)| *kind == site.kind));
        let count = |region| entries.iter().filter(|entry| entry.0 == region).count();
        let first = FirstEntries { dense: count(Region::Dense), experts: count(Region::Experts) };
        let stack = Stack { sites: own, rank: lora.rank, alpha: lora.alpha, expert_groups, first };
        let module = constructor.map(|(_, constructor)| constructor(stack));
        entries.extend(module.iter().flat_map(|module| module.entries(dtype)));
        adapters.modules.push(module);
    }
    (adapters, entries)
}

/// All projections of a model, in unit order: what targets are resolved against.
pub fn all_projections(spec: &ModelSpec) -> Vec<crate::lora::targets::Projection> {
    (0..spec.num_layers).flat_map(|i| projections(spec, i)).collect()
}
